"""The backend `reference`: the definition, op for op, differentiated by JAX. The oracle; never tuned.

`moments` and `normalise` are one channel's formulas as Ioffe & Szegedy (arXiv:1502.03167, algorithm 1) give them
and Equinox writes them; `bn_fused.reference` puts the approaches around them.
"""

import jax
import jax.numpy as jnp

from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.contract import Coefficients, accumulation_dtype, widest


def moments(x, average):
    """Mean and biased variance of one channel's values; `average` takes an array to its scalar mean."""
    mean = average(x)
    var = average((x - mean) * jnp.conj(x - mean))
    return mean, jnp.maximum(jnp.zeros((), var.dtype), var)


def normalise(x, mean, var, eps, weight=None, bias=None):
    """(x - mean) / sqrt(var + eps) * weight + bias, for one channel's values."""
    out = (x - mean) / jnp.sqrt(var + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def activate(y, activation):
    """JAX's own activation of this name."""
    return y if activation is None else ACTIVATIONS[activation].definition(y)


def fused_batch_norm(x, weight, bias, running_mean, running_var, coefficients, residual, *, eps, activation):
    """`kernels.fused_batch_norm` in the definition's terms, for x of shape [groups, rows, channels]."""
    dtype = widest(x.dtype, running_mean.dtype)

    def one_channel(values, weight, bias, running_mean, running_var, c):
        values = values.astype(accumulation_dtype(values.dtype))
        mean, var = moments(values, jnp.mean)
        mean, var = mean.astype(dtype), var.astype(dtype)
        norm_mean = c.batch * mean + c.running * running_mean
        norm_var = c.batch * var + c.running * running_var + c.constant
        y = normalise(values.astype(dtype), norm_mean, norm_var, eps, weight.astype(dtype), bias.astype(dtype))
        new_mean = c.mean_gain * mean + c.keep * running_mean
        new_var = c.var_gain * var + c.keep * running_var
        return y, mean, var, new_mean, new_var

    state_dtype = running_mean.dtype
    per_channel = jax.vmap(one_channel, in_axes=(1, 0, 0, 0, 0, None), out_axes=(1, 0, 0, 0, 0))
    y, mean, var, new_mean, new_var = jax.vmap(per_channel)(
        x,
        weight,
        bias,
        running_mean.astype(dtype),
        running_var.astype(dtype),
        Coefficients.unpack(coefficients.astype(dtype)),
    )
    if residual is not None:
        y = y + residual.astype(dtype)
    y = activate(y, activation).astype(x.dtype)
    moments_dtype = accumulation_dtype(x.dtype)
    return (
        y,
        mean.astype(moments_dtype),
        var.astype(moments_dtype),
        new_mean.astype(state_dtype),
        new_var.astype(state_dtype),
    )
