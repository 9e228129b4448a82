"""What `bn_fused.nnx.BatchNorm` and `bn_fused.linen.BatchNorm` have in common: flax's conventions, on `batch_norm`.

Their variables `mean` and `var` are flax's: what inference normalises with, from a start at 0 and 1. `zero_frac` beside
them says how much of the zero start is left in the running averages that they stand for, mean * (1 - zero_frac) and var
alike: 1 in a layer that was never trained. Statistics without it were trained, and nothing is left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_fused import arguments
from bn_fused.approaches import inference_moments
from bn_fused.function import batch_norm
from bn_fused.running_stats import RunningStats


class Stored(NamedTuple):
    """The values of a layer's variables: `mean` and `var` [C], `zero_frac` and `count` [], or None where missing.

    All are floating, `count` too, so that the usual averages over replicas keep its dtype.
    """

    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array | None
    count: jax.Array | None


def check(layer):
    """ValueError or TypeError for settings that are not accepted."""
    arguments.check_integer("axis", layer.axis)
    arguments.check_eps("epsilon", layer.epsilon)
    arguments.Settings(
        layer.approach,
        layer.epsilon,
        layer.warmup_period,
        layer.activation,
        layer.debias,
        layer.virtual_batch_size,
        layer.backend,
    )
    arguments.as_momentum(layer.momentum)
    arguments.check_dtype("param_dtype", layer.param_dtype)
    arguments.as_axis_names(layer.axis_name)
    arguments.as_device_groups(layer.axis_index_groups)


def feature_axis(axis, shape):
    """The axis of the features, counted from the front. ValueError unless a batch of this shape has it."""
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis is {axis!r}; for x of shape {shape!r} accepted is one of its axes")
    return axis % len(shape)


def infer(layer, stored, x, scale, bias, *, residual, mask):
    """y with the stored moments, of x's shape and dtype. Arguments as of `train`."""
    mean, var = jnp.asarray(stored.mean), jnp.asarray(stored.var)
    stats = RunningStats(mean, var, jnp.zeros((), mean.dtype), jnp.zeros((), jnp.int32))
    return _batch_norm(layer, stats, x, scale, bias, residual, mask, inference=True)[0]


def train(layer, stored, x, scale, bias, *, residual, mask, synchronised=True):
    """y, of x's shape and dtype, and the new `Stored`, which lacks nothing.

    `layer` has flax's settings and ours as attributes; `scale` and `bias` are [C] or None; `residual` has x's shape;
    `mask` is flax's. Without `synchronised` the names of axes are left out, as when a linen module is initialised.
    """
    stats = _running_stats(stored)
    y, new = _batch_norm(layer, stats, x, scale, bias, residual, mask, inference=False, synchronised=synchronised)
    mean, var = inference_moments(new.mean, new.var, new.zero_frac.astype(new.mean.dtype))
    if mask is not None:
        # Nothing counted: to the bit what it was. (Where nothing is left of the start, the division is by one.)
        unchanged = (new.zero_frac == stats.zero_frac) & (1 - new.zero_frac != 1)
        mean = jnp.where(unchanged, stored.mean, mean)
        var = jnp.where(unchanged, stored.var, var)
    return y, Stored(mean, var, new.zero_frac, new.count.astype(new.zero_frac.dtype))


def _running_stats(stored):
    """The running averages from a zero start that the stored moments stand for."""
    mean, var = jnp.asarray(stored.mean), jnp.asarray(stored.var)
    zero_frac, count = (
        jnp.zeros((), mean.dtype) if value is None else jnp.asarray(value) for value in (stored.zero_frac, stored.count)
    )
    # A new layer into which a checkpoint without zero_frac was put has kept its 1 beside moments that are not its own.
    elsewhere = (zero_frac == 1) & ~(jnp.all(mean == 0) & jnp.all(var == 1))
    zero_frac = jnp.where(elsewhere, jnp.zeros_like(zero_frac), zero_frac)
    trained = (1 - zero_frac).astype(mean.dtype)
    return RunningStats(mean * trained, var * trained, zero_frac, jnp.round(count).astype(jnp.int32))


def _batch_norm(layer, stats, x, scale, bias, residual, mask, *, inference, synchronised=True):
    axis, features = feature_axis(layer.axis, x.shape), stats.mean.shape[0]
    if x.shape[axis] != features:
        raise ValueError(
            f"x has shape {x.shape}, with {x.shape[axis]} features on axis {axis}; the layer has {features}"
        )
    scale, bias = (
        arguments.as_parameter(name, value, stats.mean.shape, "the running mean")
        for name, value in (("scale", scale), ("bias", bias))
    )
    mask = _positions(mask, x.shape, axis)
    if residual is not None:
        residual = jnp.asarray(residual).astype(x.dtype)
    alone = axis == 0  # features and no examples: the axes that are there become those of one example
    if alone:
        axis = 1
        x, residual, mask = (None if value is None else value[None] for value in (x, residual, mask))
    y, new = batch_norm(
        x,
        stats,
        scale,
        bias,
        approach=layer.approach,
        momentum=layer.momentum,
        eps=layer.epsilon,
        warmup_period=layer.warmup_period,
        channel_axis=axis,
        axis_name=layer.axis_name if synchronised else None,
        axis_index_groups=layer.axis_index_groups if synchronised else None,
        activation=layer.activation,
        residual=residual,
        mask=mask,
        debias=layer.debias,
        virtual_batch_size=layer.virtual_batch_size,
        inference=inference,
        backend=layer.backend,
    )
    return y[0] if alone else y, new


def _positions(mask, shape, axis):
    """flax's mask, which broadcasts to x, as one of x's positions; None for None. ValueError for one per channel."""
    if mask is None:
        return None
    mask = jnp.asarray(mask).astype(bool)
    whole = (1,) * (len(shape) - mask.ndim) + mask.shape
    if len(whole) != len(shape) or any(own not in (1, size) for own, size in zip(whole, shape, strict=True)):
        raise ValueError(f"mask has shape {mask.shape}; accepted is one that broadcasts to x's, {shape}")
    if whole[axis] != 1:
        raise ValueError(
            f"mask has shape {mask.shape}, a value for each feature on axis {axis} of x; accepted is one value for all "
            "features of a position: size 1 on that axis"
        )
    return jnp.squeeze(jnp.reshape(mask, whole), axis)
