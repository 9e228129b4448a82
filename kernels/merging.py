"""Merging the moments that devices have of their parts of the rows, with one small all-reduce."""

import functools
import math

import jax
import jax.numpy as jnp

PACKED_DEVICES = 64  # up to here one all-reduce of every device's moments, beyond it two dependent ones of O(channels)


def merge_moments(pivot, delta, var, count, names):
    """The moments over all devices of `names` from each device's own, by Chan's formula, with one small all-reduce.

    `pivot`, `delta` and `var` have shape [channels], a device's mean being the sum of the first two; `count` is the
    number of positions behind them: devices may differ, a device without any contributes nothing. Returns pivot, delta,
    var and the whole count, the same on every device (and typed so under shard_map's check_vma). The mean is never
    rounded to one number: where it is large, y needs the digits that delta has beyond it.

    Up to `PACKED_DEVICES` devices every one's moments are sent whole, in a slot of their own, because sums of x and x^2
    lose all digits of the variance where |mean| is large. Chan, Golub & LeVeque, "Algorithms for computing the sample
    variance", 1983. The derivative is one sum of 2 channels values over the devices.
    """
    pivot, delta, var, total = _merge(tuple(names), pivot, delta, var, jnp.reshape(count, (1,)))
    return pivot, delta, var, total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _merge(names, pivot, delta, var, count):
    devices = math.prod(jax.lax.axis_size(name) for name in names)
    if devices <= PACKED_DEVICES:
        return _chan(*_slots(names, devices, pivot, delta, var, count))
    return _two_sums(names, pivot, delta, var, count)


@_merge.defjvp
def _merge_jvp(names, values, tangents):
    """One sum, as small as the moments, where JAX's own rule has one of all slots, or two, one after the other.

    The mean's tangent is all in delta's. The variance is spread - delta^2, with the spread around the pivot, which is
    no function of anything that is differentiated, and neither is the count.
    """
    (pivot, delta, var, count), (dpivot, ddelta, dvar, _) = values, tangents
    merged = _merge(names, pivot, delta, var, count)
    whole_pivot, whole_delta, _, whole = merged
    dmean = dpivot + ddelta
    deviation = (pivot - whole_pivot) + delta
    changes = jnp.concatenate([_times(count, dmean), _times(count, dvar + 2 * _unless_empty(count, deviation) * dmean)])
    dwhole_delta, dspread = jnp.split(jax.lax.psum(changes, names) / jnp.maximum(whole, 1), 2)
    zeros = jnp.zeros_like
    return merged, (zeros(whole_pivot), dwhole_delta, dspread - 2 * whole_delta * dwhole_delta, zeros(whole))


def _unless_empty(count, value):
    return jnp.where(count == 0, jnp.zeros_like(value), value)


def _times(count, value):
    """Exactly nothing, not even a NaN, where nothing counts."""
    return _unless_empty(count, count * value)


def _slots(names, devices, *values):
    """Every device's values, stacked [devices, ...], by one sum in which each fills its own slot."""
    packed = jnp.concatenate(values)
    index = jax.lax.axis_index(names)
    mine = jnp.arange(devices, dtype=index.dtype) == index
    slots = jnp.where(mine[:, None], packed[None, :], jnp.zeros((1, packed.shape[0]), packed.dtype))
    ends = [sum(value.shape[0] for value in values[:place]) for place in range(1, len(values))]
    return jnp.split(jax.lax.psum(slots, names), ends, 1)


def _chan(pivots, deltas, variances, counts):
    """Merge moments [devices, channels] with counts [devices, 1]."""
    total = jnp.maximum(jnp.sum(counts), 1)
    # The merged mean as one device's pivot and the weighted differences from it, which stay small.
    first = pivots[jnp.argmax(counts[:, 0])]
    shifts = _unless_empty(counts, (pivots - first[None, :]) + deltas)
    shift = jnp.sum(counts * shifts, 0) / total
    deviations = _unless_empty(counts, shifts - shift[None, :])
    spread = jnp.sum(_times(counts, variances + deviations * deviations), 0)
    return first, shift, spread / total, jnp.sum(counts)


def _two_sums(names, pivot, delta, var, count):
    """The mean in one number; then, around it, what that number lacks, and the variance."""
    sums = jax.lax.psum(jnp.concatenate([_times(count, pivot + delta), count]), names)
    total = jnp.maximum(sums[-1], 1)
    merged = sums[:-1] / total
    shift = (pivot - merged) + delta
    changes = jnp.concatenate([_times(count, shift), _times(count, var + shift * shift)])
    missing, spread = jnp.split(jax.lax.psum(changes, names) / total, 2)
    return merged, missing, jnp.maximum(spread - missing * missing, 0), sums[-1]
