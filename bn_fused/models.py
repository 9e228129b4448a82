"""Whole models: what is said once about all BatchNorm layers that are somewhere in one."""

import dataclasses

import jax
import jax.numpy as jnp

from bn_fused.approaches import inference_moments
from bn_fused.kernels.contract import widest
from bn_fused.layer import BatchNorm

# What the constructor takes and `with_settings` changes: everything but what decides the shapes of arrays.
_SETTINGS = (
    "axis_name",
    "approach",
    "eps",
    "momentum",
    "warmup_period",
    "inference",
    "activation",
    "debias",
    "virtual_batch_size",
    "axis_index_groups",
    "backend",
)


def with_settings(model, *, where=None, **settings):
    """A model whose BatchNorm layers have other settings; their weights and their places in the state stay.

    To synchronise a model over devices, `with_settings(model, axis_name=("batch", "devices"))`; to freeze the layers of
    a part of it, `with_settings(model, where=lambda path, layer: path.startswith("encoder"), inference=True)`.

    **Arguments:**

    - `model`: a pytree with layers `bn_fused.BatchNorm` anywhere in it, ensembles made by `equinox.filter_vmap` among
        them.
    - `where`: None for all of these layers, or a function of a layer's path ("blocks.0.norm") and the layer: whether it
        changes.
    - `settings`: `axis_name`, `approach`, `eps`, `momentum`, `warmup_period`, `inference`, `activation`, `debias`,
        `virtual_batch_size`, `axis_index_groups`, `backend`, as `bn_fused.BatchNorm` takes them.

    **Raises:**

    TypeError for another setting, ValueError if there is no layer to change, and what `bn_fused.BatchNorm` raises.
    """
    check_settings(settings)
    changed = []

    def change(path, node):
        if not isinstance(node, BatchNorm) or not (where is None or where(name_of(path), node)):
            return node
        changed.append(path)
        return _with_settings(node, settings)

    model = jax.tree_util.tree_map_with_path(change, model, is_leaf=_is_layer)
    if not changed:
        raise ValueError(f"model has no bn_fused.BatchNorm{'' if where is None else ' that `where` takes'}")
    return model


def check_settings(settings):
    """TypeError for settings that decide more than how a layer computes."""
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise TypeError(f"settings that can change are {', '.join(_SETTINGS)}; given is {', '.join(unknown)}")


def moments_of(model, state):
    """The mean and variance that inference normalises with, of each BatchNorm layer in a model.

    **Arguments:**

    - `model`, `state`: as `equinox.nn.make_with_state` makes them.

    **Returns:**

    {path: (mean, var)}, path as "blocks.0.norm"; mean and variance of shape [C], 0 and 1 where a layer was never
    trained; with a leading axis for an ensemble.
    """
    moments = {}
    for path, layer in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_layer):
        if _is_layer(layer):
            moments[name_of(path)] = layer_moments(layer, state)
    return moments


def layer_moments(layer, state):
    """Mean and variance of one layer, as of `moments_of`."""
    mean, var = state.get(layer.state_index)
    zero_frac = state.get(layer.zero_frac_index)[..., None]
    dtype = widest(mean.dtype)
    return inference_moments(*(jnp.asarray(value, dtype) for value in (mean, var, zero_frac)))


def _is_layer(node):
    return isinstance(node, BatchNorm)


def name_of(path):
    """A path in a pytree as "blocks.0.norm"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _with_settings(layer, settings):
    """The layer with other settings, checked as the constructor does."""
    own = {name: getattr(layer, name) for name in _SETTINGS}
    checked = BatchNorm(layer.input_size, channelwise_affine=False, **(own | settings))
    return with_fields(layer, {name: getattr(checked, name) for name in settings})


def with_fields(module, values):
    """An Equinox module of the same class, with other values in some of its fields, static ones too."""
    # Neither `equinox.tree_at` nor `dataclasses.replace` sets what is static: a new object is filled.
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):
        object.__setattr__(new, field.name, values.get(field.name, getattr(module, field.name)))
    return new
