"""Axes bound to devices (shard_map, pmap): splitting them off."""

import math

import jax

from . import arguments
from .kernels.jax_internals import device_axis_names


def split_names(names):
    """(names of vmaps, names of devices), each in the given order. NameError for a name that is not bound."""
    arguments.bound(names)
    devices = device_axis_names()
    return tuple(name for name in names if name not in devices), tuple(name for name in names if name in devices)


def total_size(names):
    """The product of the named axes' sizes."""
    return math.prod(jax.lax.axis_size(name) for name in names)
