"""Merging the moments that devices have of their parts of the rows, with one small all-reduce."""

import functools

import jax
import jax.numpy as jnp

PACKED_DEVICES = 64  # up to here one all-reduce of every device's moments, beyond it two dependent ones of O(channels)


def merge_moments(mean, var, count, names, delta=None):
    """The moments over all devices of `names` from each device's own, by Chan's formula, with one small all-reduce.

    `mean` and `var` have shape [channels], `count` is the number of positions behind them: devices may differ, a
    device without any contributes nothing. With `delta`, the mean is `mean + delta` and no digit of delta is lost
    where devices differ little. Returns pivot, delta (the mean is their sum), var and the whole count, the same on
    every device (and typed so under shard_map's check_vma).

    Every device's moments are sent whole, in a slot of their own, because sums of x and x^2 lose all digits of the
    variance where |mean| is large. Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983.
    """
    devices = 1
    for name in names:
        devices *= jax.lax.axis_size(name)
    channels = mean.shape[0]
    count = jnp.reshape(count, (1,))
    if devices <= PACKED_DEVICES:
        packed = jnp.concatenate([mean, var, count] if delta is None else [mean, var, count, delta])
        index = jax.lax.axis_index(names)
        mine = jnp.arange(devices, dtype=index.dtype) == index
        slots = jnp.where(mine[:, None], packed[None, :], jnp.zeros((1, packed.shape[0]), packed.dtype))
        slots = jax.lax.psum(slots, names)
        end = 2 * channels
        deltas = jnp.zeros_like(slots[:, :channels]) if delta is None else slots[:, end + 1 :]
        return _chan(slots[:, :channels], deltas, slots[:, channels:end], slots[:, end : end + 1])
    mean, var, total = _two_sums(tuple(names), mean if delta is None else mean + delta, var, count)
    return mean, jnp.zeros_like(mean), var, total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _two_sums(names, mean, var, count):
    """The mean, then the variance around it, and the whole count."""
    empty = count == 0
    weighted = jnp.where(empty, jnp.zeros_like(mean), count * mean)
    sums = jax.lax.psum(jnp.concatenate([weighted, count]), names)
    total = jnp.maximum(sums[-1], 1)
    merged = sums[:-1] / total
    spread = jnp.where(empty, jnp.zeros_like(var), count * (var + (mean - merged) ** 2))
    return merged, jax.lax.psum(spread, names) / total, sums[-1]


@_two_sums.defjvp
def _two_sums_jvp(names, values, tangents):
    """One sum, where JAX's own rule has two, one after the other, each way.

    The variance does not depend on the mean it is taken around to first order: the differences from it sum to zero.
    The count is no function of anything that is differentiated.
    """
    (mean, var, count), (dmean, dvar, _) = values, tangents
    merged, spread, whole = _two_sums(names, mean, var, count)
    empty, total = count == 0, jnp.maximum(whole, 1)
    difference = jnp.where(empty, jnp.zeros_like(mean), mean - merged)
    changes = [jnp.where(empty, jnp.zeros_like(d), count * d) for d in (dmean, dvar + 2 * difference * dmean)]
    dmerged, dspread = jnp.split(jax.lax.psum(jnp.concatenate(changes), names) / total, 2)
    return (merged, spread, whole), (dmerged, dspread, jnp.zeros_like(whole))


def _chan(pivots, deltas, variances, counts):
    """Merge moments [devices, channels] with counts [devices, 1]."""
    empty = counts == 0
    total = jnp.maximum(jnp.sum(counts), 1)
    # The merged mean as one device's pivot and the weighted differences from it, which stay small.
    first = pivots[jnp.argmax(counts[:, 0])]
    shifts = jnp.where(empty, jnp.zeros_like(pivots), (pivots - first[None, :]) + deltas)
    shift = jnp.sum(counts * shifts, 0) / total
    deviations = jnp.where(empty, jnp.zeros_like(pivots), shifts - shift[None, :])
    spread = jnp.where(empty, jnp.zeros_like(variances), counts * (variances + deviations * deviations))
    return first, shift, jnp.sum(spread, 0) / total, jnp.sum(counts)
