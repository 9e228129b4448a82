"""Where the channels, the reduced rows and the independent groups lie in an array.

A layout is a string with one letter for each axis of x: `g` a group (an ensemble member, an unnamed vmap, a
virtual batch: statistics of its own), `r` rows (examples and positions: what the statistics reduce over), `c` the
channels (exactly one). NCHW images are "rcrr", the kernels' canonical [groups, rows, channels] is "grc".

Values per channel have shape [*groups, channels], values per group [*groups], with the groups in x's order.
"""

import itertools
import math

import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

GROUP, ROW, CHANNEL = "g", "r", "c"


def axes_of(layout, letter):
    """The axes of x with this letter."""
    return tuple(axis for axis, role in enumerate(layout) if role == letter)


def group_shape(shape, layout):
    """The shape [*groups] of a value per group."""
    return tuple(shape[axis] for axis in axes_of(layout, GROUP))


def channel_shape(shape, layout):
    """The shape [*groups, channels] of a value per channel."""
    return (*group_shape(shape, layout), shape[layout.index(CHANNEL)])


def count_rows(shape, layout):
    """How many rows each channel of each group has."""
    return math.prod(shape[axis] for axis in axes_of(layout, ROW))


def as_number(size, dtype):
    """A size, for arithmetic with arrays of this dtype: an int as it is, one that `jax.export` leaves open an array."""
    return jnp.asarray(size).astype(dtype) if is_symbolic_dim(size) else size


def expand(value, layout):
    """Give a value per channel [*groups, channels] x's rank, so that it broadcasts against x."""
    source = {CHANNEL: value.ndim - 1}
    source.update(zip(axes_of(layout, GROUP), range(value.ndim - 1), strict=True))
    axes = [axis for axis, role in enumerate(layout) if role != ROW]
    order = [source[CHANNEL] if layout[axis] == CHANNEL else source[axis] for axis in axes]
    if order != sorted(order):
        value = jnp.transpose(value, order)
    sizes = dict(zip(axes, value.shape, strict=True))
    return jnp.reshape(value, [sizes.get(axis, 1) for axis in range(len(layout))])


def sum_rows(array, layout):
    """Sum an array of x's rank over its rows; the result is per channel, [*groups, channels]."""
    total = lax.reduce_sum(array, axes_of(layout, ROW))  # jnp.sum takes ten times as long to trace
    channel = layout[: layout.index(CHANNEL)].count(GROUP)
    return total if channel == total.ndim - 1 else jnp.moveaxis(total, channel, -1)


def merge_rows(arrays, layout):
    """Arrays with x's rows and rank whose row axes that lie together are one, and their layout.

    Axes that `jax.export` leaves open stay as they are.
    """
    shape = arrays[0].shape
    runs = itertools.groupby(
        range(len(layout)), lambda axis: ROW if layout[axis] == ROW and not is_symbolic_dim(shape[axis]) else axis
    )
    runs = [tuple(axes) for _, axes in runs]
    merged = [jnp.reshape(array, [math.prod(array.shape[axis] for axis in run) for run in runs]) for array in arrays]
    return merged, "".join(layout[run[0]] for run in runs)


OPEN_STRIDE = 15


def sample_rows(array, layout, of_each_axis=False):
    """A slice with about sqrt(rows) rows of every group, evenly apart, for a pivot: see `backends/jnp/operations.py`.

    `of_each_axis`: about the square root of every row axis. Else the axes between the first and the last row axis are
    thinned first, the first one (the examples, which may lie on several devices) last. Where `jax.export` leaves a row
    axis open, every 15th along the first such axis.
    """
    first, *others = axes_of(layout, ROW) or (None,)
    if first is None:
        return array
    left_open = next((axis for axis in axes_of(layout, ROW) if is_symbolic_dim(array.shape[axis])), None)
    if left_open is not None:
        return lax.slice_in_dim(array, 0, array.shape[left_open], OPEN_STRIDE, left_open)
    remaining = count_rows(array.shape, layout)
    target = math.isqrt(remaining - 1) + 1 if remaining > 1 else 1
    index = [slice(None)] * array.ndim
    for axis in (*others, first):
        size = array.shape[axis]
        # An odd stride does not fall in step with what repeats at a power of two.
        stride = max(1, (math.isqrt(size) if of_each_axis else min(size, remaining // target)) - 1 | 1)
        index[axis] = slice(stride // 2, size, stride)
        remaining = remaining // size * len(range(*index[axis].indices(size)))
    return array[tuple(index)]
