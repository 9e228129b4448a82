"""Axes of devices (of shard_map and pmap): told apart from those of vmaps, and what shares statistics along them."""

import math

from bn_fused import arguments
from bn_fused.kernels.jax_internals import axis_size, device_axis_names
from bn_fused.kernels.merging import Devices


def split_names(names):
    """(names of vmaps, names of devices), each in the given order. NameError for a name that is not bound."""
    arguments.check_bound(names)
    devices = device_axis_names()
    return tuple(name for name in names if name not in devices), tuple(name for name in names if name in devices)


def devices_of(names, device_groups):
    """The `Devices` along the names: all, or the members of a device's group.

    ValueError if the groups need other names, or hold other indices than the axis has.
    """
    if device_groups is None:
        return Devices(names)
    if len(names) != 1:
        raise ValueError(
            f"axis_index_groups is {device_groups!r}, which needs exactly one axis of devices in axis_name; there are "
            f"{len(names)}: {names!r}"
        )
    size = axis_size(*names)
    if sum(map(len, device_groups)) != size:
        raise ValueError(f"axis_index_groups is {device_groups!r}; axis {names[0]!r} has the indices 0 to {size - 1}")
    return Devices(names, device_groups)


def total_size(names):
    """The product of the named axes' sizes."""
    return math.prod(axis_size(name) for name in names)
