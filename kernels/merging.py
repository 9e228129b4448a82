"""Merging the moments that devices have of their parts of the rows, with one small all-reduce."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bn_fused.kernels.jax_internals import axis_size

PACKED_DEVICES = 64  # up to here one all-reduce of every device's moments, beyond it two dependent ones of O(channels)


@dataclass(frozen=True)
class Devices:
    """The devices that share statistics: all along some named axes, or the members of a device's group on one axis.

    `device_groups`: None, or tuples of as many indices each, as JAX's `axis_index_groups`, which needs exactly one
    name.
    """

    names: tuple = ()
    device_groups: tuple | None = None

    @property
    def size(self):
        """How many they are."""
        if self.device_groups is None:
            return math.prod(axis_size(name) for name in self.names)
        return len(self.device_groups[0])

    @property
    def index(self):
        """Which of them this device is."""
        if self.device_groups is None:
            return jax.lax.axis_index(self.names)
        return self._look_up({member: place for group in self.device_groups for place, member in enumerate(group)})

    @property
    def group(self):
        """The number of this device's group."""
        return self._look_up({member: number for number, group in enumerate(self.device_groups) for member in group})

    def _look_up(self, values):
        index = jax.lax.axis_index(self.names)
        return jnp.asarray([values[member] for member in sorted(values)], index.dtype)[index]

    def sum(self, value):
        """The sum over them; the value itself where there are no names."""
        if not self.names:
            return value
        try:
            return jax.lax.psum(value, self.names, axis_index_groups=self.device_groups)
        except NotImplementedError:
            if self.device_groups is None:
                raise
            raise NotImplementedError(
                f"axis_index_groups is {self.device_groups!r}, and JAX sums over groups of devices under pmap and "
                "inside of shard_map(..., check_vma=False), but for values that a vmap has mapped: give the mesh one "
                "axis for the groups and one for their members, and name the latter in axis_name"
            ) from None


def merge_moments(pivot, delta, var, count, devices):
    """The moments over all of the `Devices` from each device's own, by Chan's formula, with one small all-reduce.

    `pivot`, `delta` and `var` have shape [channels], a device's mean being the sum of the first two; `count` is the
    number of positions behind them: devices may differ, a device without any contributes nothing. Returns pivot, delta,
    var and the whole count, the same on every device (and typed so under shard_map's check_vma). The mean is never
    rounded to one number: where it is large, y needs the digits that delta has beyond it.

    Up to `PACKED_DEVICES` devices every one's moments are sent whole, in a slot of their own, because sums of x and x^2
    lose all digits of the variance where |mean| is large. Chan, Golub & LeVeque, "Algorithms for computing the sample
    variance", 1983. The derivative is one sum of 2 channels values over the devices.
    """
    pivot, delta, var, total = _merge(devices, pivot, delta, var, jnp.reshape(count, (1,)))
    return pivot, delta, var, total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _merge(devices, pivot, delta, var, count):
    if devices.size <= PACKED_DEVICES:
        return _chan(*_slots(devices, pivot, delta, var, count))
    return _two_sums(devices, pivot, delta, var, count)


@_merge.defjvp
def _merge_jvp(devices, values, tangents):
    """One sum, as small as the moments, where JAX's own rule has one of all slots, or two, one after the other.

    The mean's tangent is all in delta's. The variance is the mean square about the pivot, less delta^2. The pivot is
    no function of anything that is differentiated, and neither is the count.
    """
    (pivot, delta, var, count), (dpivot, ddelta, dvar, _) = values, tangents
    merged = _merge(devices, pivot, delta, var, count)
    whole_pivot, whole_delta, _, whole = merged
    dmean = dpivot + ddelta
    deviation = (pivot - whole_pivot) + delta
    changes = jnp.concatenate([_times(count, dmean), _times(count, dvar + 2 * _unless_empty(count, deviation) * dmean)])
    dwhole_delta, dmean_square = jnp.split(devices.sum(changes) / jnp.maximum(whole, 1), 2)
    zeros = jnp.zeros_like
    return merged, (zeros(whole_pivot), dwhole_delta, dmean_square - 2 * whole_delta * dwhole_delta, zeros(whole))


def _unless_empty(count, value):
    return jnp.where(count == 0, jnp.zeros_like(value), value)


def _times(count, value):
    """Exactly nothing, not even a NaN, where nothing counts."""
    return _unless_empty(count, count * value)


def _slots(devices, *values):
    """Every device's values, stacked [devices, ...], by one sum in which each fills its own slot."""
    packed = jnp.concatenate(values)
    index = devices.index
    mine = jnp.arange(devices.size, dtype=index.dtype) == index
    slots = jnp.where(mine[:, None], packed[None, :], jnp.zeros((1, packed.shape[0]), packed.dtype))
    ends = [sum(value.shape[0] for value in values[:place]) for place in range(1, len(values))]
    return jnp.split(devices.sum(slots), ends, 1)


def _chan(pivots, deltas, variances, counts):
    """Merge moments [devices, channels] with counts [devices, 1]."""
    total = jnp.maximum(jnp.sum(counts), 1)
    # The merged mean as one device's pivot and the weighted differences from it, which stay small.
    first = pivots[jnp.argmax(counts[:, 0])]
    shifts = _unless_empty(counts, (pivots - first[None, :]) + deltas)
    shift = jnp.sum(counts * shifts, 0) / total
    deviations = _unless_empty(counts, shifts - shift[None, :])
    squares = jnp.sum(_times(counts, variances + deviations * deviations), 0)
    return first, shift, squares / total, jnp.sum(counts)


def _two_sums(devices, pivot, delta, var, count):
    """The mean in one number; then, around it, what that number lacks, and the variance."""
    sums = devices.sum(jnp.concatenate([_times(count, pivot + delta), count]))
    total = jnp.maximum(sums[-1], 1)
    merged = sums[:-1] / total
    shift = (pivot - merged) + delta
    changes = jnp.concatenate([_times(count, shift), _times(count, var + shift * shift)])
    missing, mean_square = jnp.split(devices.sum(changes) / total, 2)
    return merged, missing, jnp.maximum(mean_square - missing * missing, 0), sums[-1]
