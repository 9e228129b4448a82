"""Arrays of one call as streaming GPU kernels see them, [groups, rows, channels], and results as the caller does.

Where the channels lie last in memory the view costs nothing, and where XLA chooses the layout (between convolutions on
a GPU) it makes them lie last.
"""

import math

import jax.numpy as jnp

from bn_fused.kernels.layout import CHANNEL, GROUP, ROW, axes_of, count_rows, group_shape


class View:
    """Arrays of x's shape with `fold` neighbouring rows seen as one: [groups, rows/fold, fold*channels]."""

    def __init__(self, x, layout, fold):
        self.order = tuple(axis for letter in (GROUP, ROW, CHANNEL) for axis in axes_of(layout, letter))
        self.transposed = tuple(x.shape[axis] for axis in self.order)
        self.group_shape = group_shape(x.shape, layout)
        self.groups, self.rows = math.prod(self.group_shape), count_rows(x.shape, layout)
        self.channels, self.itemsize, self.fold = self.transposed[-1], x.dtype.itemsize, fold
        self.folded = (self.groups, self.rows // fold, fold * self.channels)

    def as_rows(self, array):
        """An array of x's shape as [groups, rows/fold, fold*channels]."""
        return jnp.reshape(jnp.transpose(array, self.order), self.folded)

    def like_x(self, array):
        """The inverse of `as_rows`: an array of x's shape."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(jnp.reshape(array, self.transposed), inverse)

    def channel(self, value):
        """A value per channel as float32 [groups, channels]."""
        return jnp.reshape(value.astype(jnp.float32), (self.groups, self.channels))

    def unchannel(self, value):
        """[groups, channels] as the caller's value per channel."""
        return jnp.reshape(value, (*self.group_shape, self.channels))

    def group(self, value):
        """A value per group as float32 [groups]."""
        return jnp.reshape(value.astype(jnp.float32), (self.groups,))

    def gradient_arrays(self, dy, x, residual, y):
        """What a backward reads: dy, x, and what else the activation's derivative needs, residual or y."""
        return [self.as_rows(array) for array in (dy, x, residual, y) if array is not None]

    def gradients(self, dx, dresidual, sums):
        """The results of a backward; `dresidual` is a list of one, or empty."""
        return self.like_x(dx), *(self.unchannel(value) for value in sums), *map(self.like_x, dresidual)
