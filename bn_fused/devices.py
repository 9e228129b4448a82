"""Axes bound to devices (shard_map, pmap): splitting them off, and merging moments over them."""

import math

import jax
import jax.numpy as jnp

from . import arguments
from .kernels.jax_internals import device_axis_names

PACKED_DEVICES = 64  # up to here one all-reduce of every device's moments, beyond it two dependent ones of O(channels)


def split_names(names):
    """(names of vmaps, names of devices), each in the given order. NameError for a name that is not bound."""
    arguments.bound(names)
    devices = device_axis_names()
    return tuple(name for name in names if name not in devices), tuple(name for name in names if name in devices)


def total_size(names):
    """The product of the named axes' sizes."""
    return math.prod(jax.lax.axis_size(name) for name in names)


def merge_moments(mean, var, count, names):
    """The moments over all devices of `names` from each device's own, by Chan's formula, with one small all-reduce.

    `mean` and `var` have shape [channels], `count` is the number of positions behind them: devices may differ, a
    device without any contributes nothing. Returns mean, var and the whole count, the same on every device (and
    typed so under shard_map's check_vma).

    Every device's moments are sent whole, in a slot of their own, because sums of x and x^2 lose all digits of the
    variance where |mean| is large. Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983.
    """
    devices = total_size(names)
    channels = mean.shape[0]
    packed = jnp.concatenate([mean, var, jnp.reshape(count, (1,))])
    if devices <= PACKED_DEVICES:
        index = jax.lax.axis_index(names)
        mine = jnp.arange(devices, dtype=index.dtype) == index
        slots = jnp.where(mine[:, None], packed[None, :], jnp.zeros((1, packed.shape[0]), packed.dtype))
        slots = jax.lax.psum(slots, names)
        means, variances, counts = slots[:, :channels], slots[:, channels:-1], slots[:, -1:]
        return _chan(means, variances, counts)
    empty = count == 0
    weighted = jnp.where(empty, jnp.zeros_like(mean), count * mean)
    sums = jax.lax.psum(jnp.concatenate([weighted, jnp.reshape(count, (1,))]), names)
    total = jnp.maximum(sums[-1], 1)
    merged = sums[:-1] / total
    spread = jnp.where(empty, jnp.zeros_like(var), count * (var + (mean - merged) ** 2))
    return merged, jax.lax.psum(spread, names) / total, sums[-1]


def _chan(means, variances, counts):
    """Merge moments [devices, channels] with counts [devices, 1]."""
    empty = counts == 0
    total = jnp.maximum(jnp.sum(counts), 1)
    # The merged mean as one device's mean and the weighted differences from it, which stay small.
    first = means[jnp.argmax(counts[:, 0])]
    shifts = jnp.where(empty, jnp.zeros_like(means), means - first[None, :])
    shift = jnp.sum(counts * shifts, 0) / total
    deviations = jnp.where(empty, jnp.zeros_like(means), shifts - shift[None, :])
    spread = jnp.where(empty, jnp.zeros_like(variances), counts * (variances + deviations * deviations))
    return first + shift, jnp.sum(spread, 0) / total, jnp.sum(counts)
