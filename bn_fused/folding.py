"""Inference without a BatchNorm: what it computes after a convolution or a matrix product, put into their weights."""

import equinox as eqx
import jax.numpy as jnp

from bn_fused import arguments
from bn_fused.kernels.contract import reciprocal_std, widest
from bn_fused.kernels.jax_internals import is_traced
from bn_fused.layer import BatchNorm
from bn_fused.models import hint_at_conversion, layer_moments, with_fields

_LAYERS = (eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Linear)


def fold(layer, norm, state):
    """The layer that gives at inference what `norm` gives of it: one in place of two.

    **Arguments:**

    - `layer`: an `equinox.nn.Conv`, `ConvTranspose` or `Linear` (of any dimensions, groups, with or without bias),
        whose result goes into `norm` and nowhere else.
    - `norm`: the `bn_fused.BatchNorm` behind it, without an activation and called without a residual: both come after
        the folded layer then.
    - `state`: the `equinox.nn.State` with norm's running statistics.

    **Returns:**

    A layer of the same class with a bias, its arrays of the same dtype; computed in float32 (float64 if they are). The
    norm before any training is mean 0, variance 1.

    **Raises:**

    TypeError for other layers, ValueError where the channels do not fit or `norm` has an activation.
    """
    if not isinstance(layer, _LAYERS):
        accepted = ", ".join(f"equinox.nn.{each.__name__}" for each in _LAYERS)
        raise TypeError(f"layer is a {type(layer).__name__}; accepted are {accepted}, and `fold_arrays` takes arrays")
    if type(norm) is not BatchNorm:  # what a subclass does beside it would be lost
        raise TypeError(
            f"norm is a {type(norm).__name__}; accepted is a bn_fused.BatchNorm itself{hint_at_conversion(norm)}"
        )
    if norm.activation is not None:
        raise ValueError(
            f"norm has the activation {norm.activation!r}, which no layer can take over: give "
            "bn_fused.with_settings(norm, activation=None) and apply it to what the folded layer gives"
        )
    moments = layer_moments(norm, state)
    arguments.check_no_ensemble(moments[0])
    bias = None if layer.bias is None else jnp.reshape(layer.bias, (-1,))
    weight, bias = fold_arrays(layer.weight, bias, *moments, norm.weight, norm.bias, eps=norm.eps)
    behind = (1,) * (layer.weight.ndim - 2)  # a convolution's bias has its result's rank
    return with_fields(layer, {"weight": weight, "bias": jnp.reshape(bias, (-1, *behind)), "use_bias": True})


def fold_arrays(weight, bias, mean, var, norm_weight=None, norm_bias=None, *, eps=1e-5, axis=0):
    """What `fold` does, on arrays: the weight and bias with which a linear map gives its normalised result.

    **Arguments:**

    - `weight`: the weight of a convolution or matrix product, floating, with its C output channels on `axis` (0 for
        Equinox and PyTorch, -1 for Flax and Keras).
    - `bias`: shape [C], or None for zeros.
    - `mean`, `var`: what inference normalises with, shape [C]: `RunningStats.moments()`, or another library's running
        mean and variance.
    - `norm_weight`, `norm_bias`: shape [C], or None for 1 and 0.
    - `eps`: as the normalisation has it, PyTorch's and Equinox's 1e-5 or Keras' and others' 1e-3.

    **Returns:**

    The weight, of its shape and dtype, and the bias, of shape [C] and the dtype of `bias`, or of `weight` without one;
    float32 for float64 where JAX has no 64-bit types.

    **Raises:**

    TypeError for what is no floating array, ValueError where shapes do not fit, for an `axis` that the weight does not
    have, an `eps` that is not above 0, and a variance below zero.
    """
    named = {"bias": bias, "mean": mean, "var": var, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, value in {"weight": weight, **named}.items():
        optional, dtype = name not in ("weight", "mean", "var"), getattr(value, "dtype", None)
        if (value is None and optional) or (dtype is not None and jnp.issubdtype(dtype, jnp.floating)):
            continue
        given = type(value).__name__ if dtype is None else dtype
        raise TypeError(f"{name} is {given}; accepted is a floating array{' or None' if optional else ''}")
    if not isinstance(axis, int) or not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"axis is {axis!r}; a weight of shape {weight.shape} has axes 0 to {weight.ndim - 1}")
    arguments.check_eps("eps", eps)
    if not is_traced(var) and bool((jnp.asarray(var) < 0).any()):
        raise ValueError(f"var is {var}; accepted are variances of 0 and above")
    weight, bias = jnp.asarray(weight), None if bias is None else jnp.asarray(bias)
    channels = (weight.shape[axis],)
    for name, value in named.items():
        if value is not None and value.shape != channels:
            raise ValueError(
                f"{name} has shape {value.shape}; a weight of shape {weight.shape} has {channels[0]} output channels "
                f"on axis {axis}, and accepted is {channels}"
            )
    dtype = widest(weight.dtype)
    scale = reciprocal_std(jnp.asarray(var, dtype), eps)
    if norm_weight is not None:
        scale = scale * jnp.asarray(norm_weight, dtype)
    shift = -jnp.asarray(mean, dtype) if bias is None else jnp.asarray(bias, dtype) - jnp.asarray(mean, dtype)
    new_bias = shift * scale
    if norm_bias is not None:
        new_bias = new_bias + jnp.asarray(norm_bias, dtype)
    places = [1] * weight.ndim
    places[axis] = -1
    new_weight = jnp.asarray(weight, dtype) * jnp.reshape(scale, places)
    return new_weight.astype(weight.dtype), new_bias.astype(weight.dtype if bias is None else bias.dtype)
