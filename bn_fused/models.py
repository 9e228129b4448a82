"""Whole models: what is said once about all BatchNorm layers that are somewhere in one."""

import contextlib
import dataclasses
import reprlib

import equinox as eqx
import jax
import jax.numpy as jnp

from bn_fused.approaches import inference_moments
from bn_fused.arguments import EQUINOXS, held
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
    `equinox.nn.inference_mode` sets the same flag: to validate in between, infer with `inference_mode(model)` and go on
    training with `model` itself, because `inference_mode(model, value=False)` has the frozen layers train too.

    **Arguments:**

    - `model`: a pytree with layers `bn_fused.BatchNorm` anywhere in it, ensembles made by `equinox.filter_vmap` among
        them.
    - `where`: None for all of these layers, or a function of a layer's path ("blocks.0.norm") and the layer: whether it
        changes.
    - `settings`: `axis_name`, `approach`, `eps`, `momentum`, `warmup_period`, `inference`, `activation`, `debias`,
        `virtual_batch_size`, `axis_index_groups`, `backend`, as `bn_fused.BatchNorm` takes them.

    **Raises:**

    TypeError for another setting, ValueError if there is no layer to change, and what `bn_fused.BatchNorm` raises, with
    the layer's path. A momentum that rounds to 1 in the statistics' own dtype, narrower than JAX's default float, is
    refused when the layer trains: after `equinox.nn.make_with_state` the state alone knows that dtype.
    """
    check_settings(settings)
    if not (where is None or callable(where)):
        raise TypeError(
            f"where is {where!r}; accepted are None and a function of a layer's path and the layer, as lambda path, "
            'layer: path.startswith("encoder")'
        )
    paths = list(layers_of(model))  # raises if there are none
    changed = []

    def change(path, node):
        if not isinstance(node, BatchNorm) or not (where is None or where(name_of(path), node)):
            return node
        changed.append(path)
        with named(name_of(path)):
            return _with_settings(node, settings)

    model = jax.tree_util.tree_map_with_path(change, model, is_leaf=_is_layer)
    if not changed:
        raise ValueError(f"where takes no bn_fused.BatchNorm of model; their paths are {reprlib.repr(paths)}")
    return model


def check_settings(settings):
    """TypeError for settings that decide more than how a layer computes."""
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise TypeError(f"settings that can change are {', '.join(_SETTINGS)}; given is {', '.join(unknown)}")


def layers_of(model):
    """{path: layer} of the BatchNorm layers in a model, path as "blocks.0.norm"; an error if there are none."""
    check_no_state(model)
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_layer)
    layers = {name_of(path): layer for path, layer in leaves if _is_layer(layer)}
    if not layers:
        raise ValueError(f"model has no bn_fused.BatchNorm{hint_at_conversion(model)}")
    return layers


def check_no_state(model):
    """TypeError for a state in the model's place."""
    if isinstance(model, eqx.nn.State):
        raise TypeError("model is an equinox.nn.State; accepted is a model, and its state comes after it")


def hint_at_conversion(model):
    """The end of a message about what has none of our layers: what to do with Equinox's or flax's, if it has these."""
    if _holds(model, eqx.nn.BatchNorm):
        return "; equinox.nn.BatchNorm becomes one by model, state = bn_fused.from_equinox(model, state)"
    return _hint_at_flax(model)


def _hint_at_flax(model):
    def is_flaxs(node):
        return any(cls.__module__.split(".")[0] == "flax" for cls in type(node).__mro__)

    if not _has_node(model, is_flaxs):
        return ""
    return "; it is flax's, and this function is for Equinox models: docs/flax.md says what there is for flax"


@contextlib.contextmanager
def named(path):
    """A TypeError or ValueError of what is done for a layer begins with its path in the model."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not path:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


def replaced(model, state, kind, replace):
    """The model with layers of a kind replaced, and a state for it: the old values at places that fit.

    `replace(path, layer)` is the new layer, whose `equinox.nn.StateIndex`es hold its state.
    """
    check_no_state(model)
    if not _holds(model, kind):
        other, name = (eqx.nn.BatchNorm, "equinox.nn") if kind is BatchNorm else (BatchNorm, "bn_fused")
        hint = f"; its layers are {name}.BatchNorm already" if _holds(model, other) else _hint_at_flax(model)
        raise ValueError(f"model has no {kind.__module__.split('.')[0]} {kind.__name__} that could be replaced{hint}")

    def change(path, node):
        return replace(name_of(path), node) if isinstance(node, kind) else renewed(node, state)

    def is_leaf(node):
        return isinstance(node, (kind, eqx.nn.StateIndex))

    return eqx.nn.make_with_state(lambda: jax.tree_util.tree_map_with_path(change, model, is_leaf=is_leaf))()


def renewed(model, state):
    """The model with the values of a state as the starts that `equinox.nn.make_with_state` collects."""

    def is_index(node):
        return isinstance(node, eqx.nn.StateIndex)

    return jax.tree.map(
        lambda node: eqx.nn.StateIndex(held(state, node, "the model", EQUINOXS)) if is_index(node) else node,
        model,
        is_leaf=is_index,
    )


def moments_of(model, state):
    """The mean and variance that inference normalises with, of each BatchNorm layer in a model.

    **Arguments:**

    - `model`, `state`: as `equinox.nn.make_with_state` makes them.

    **Returns:**

    {path: (mean, var)}, path as "blocks.0.norm"; mean and variance of shape [C], 0 and 1 where a layer was never
    trained; with a leading axis for an ensemble.

    **Raises:**

    ValueError if there is no layer or the state is another model's, TypeError for what is no state.
    """
    return {path: layer_moments(layer, state, path) for path, layer in layers_of(model).items()}


def layer_moments(layer, state, path=""):
    """Mean and variance of one layer, as of `moments_of`."""
    mean, var = held(state, layer.state_index, path or "this layer")
    zero_frac = state.get(layer.zero_frac_index)[..., None]
    dtype = widest(mean.dtype)
    return inference_moments(*(jnp.asarray(value, dtype) for value in (mean, var, zero_frac)))


def _is_layer(node):
    return isinstance(node, BatchNorm)


def _holds(model, kind):
    return _has_node(model, lambda node: isinstance(node, kind))


def _has_node(model, is_one):
    return any(map(is_one, jax.tree.leaves(model, is_leaf=is_one)))


def name_of(path):
    """A path in a pytree as "blocks.0.norm"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _with_settings(layer, settings):
    """The layer with other settings, checked as the constructor does."""
    own = {name: getattr(layer, name) for name in _SETTINGS}
    start = layer.state_index.init  # `make_with_state` takes it away
    dtype = widest(start[0].dtype) if isinstance(start, tuple) else None
    checked = BatchNorm(layer.input_size, channelwise_affine=False, dtype=dtype, **(own | settings))
    return with_fields(layer, {name: getattr(checked, name) for name in settings})


def with_fields(module, values, cls=None):
    """An Equinox module of the same class or a subclass, with other values in some of its fields, static ones too."""
    # Neither `equinox.tree_at` nor `dataclasses.replace` sets what is static: a new object is filled.
    cls = cls or type(module)
    new = object.__new__(cls)
    for field in dataclasses.fields(cls):
        value = values[field.name] if field.name in values else getattr(module, field.name)
        object.__setattr__(new, field.name, value)
    return new
