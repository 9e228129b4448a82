"""Sums over the rows, written so that XLA compiles them well."""

import math

import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from bn_fused.kernels.backends.jnp.plan import plan_of
from bn_fused.kernels.layout import ROW, axes_of, merge_rows, sum_rows

# Sums of a backward through an activation that XLA:GPU makes at the same time, at least. With fewer it writes the terms
# to memory first, in float32 (with up to 38912 on an H200, 49152 on a B200: counted in code compiled for them).
LEAST_SUMS = 1 << 16
LEAST_ROWS = 32  # of each of those


def sums_of(arrays, spec, least_sums=1):
    """The sums over the rows of arrays of x's shape, which are computed for that alone or not at all.

    On a GPU the rows are cut into so many parts that there are `least_sums` sums in all, where that may be.
    """
    plan = plan_of(spec)
    if plan.fold is not None:
        return _folded_sums(arrays, spec.layout, plan.fold)
    if plan.stages:
        return [_staged_sum(array, spec.layout, least_sums) for array in arrays]
    return [sum_rows(array, spec.layout) for array in arrays]


def _staged_sum(array, layout, least_sums):
    """The sum over the rows for XLA:GPU, in two stages where the rows lie together before the channels.

    XLA:GPU sums many such rows in two stages by itself, and computes what comes before the sums within the first. Few
    (4096 of 512 channels, say) it sums in one, and writes what several sums have in common to memory before: 3 reads
    and 2 writes forward in place of 2 and 1, in bfloat16 5 and 3 (counted in code compiled for an H200).
    """
    axes = axes_of(layout, ROW)
    if not axes:
        return array
    first, end = axes[0], axes[-1] + 1
    rows = math.prod(array.shape[first:end])
    together = end < len(layout) and layout[first:end] == ROW * len(axes)
    if not together or is_symbolic_dim(rows) or 0 in array.shape:
        return sum_rows(array, layout)
    # What `jax.export` leaves open of the groups and channels may be one.
    beside = math.prod(size for size in array.shape[:first] + array.shape[end:] if not is_symbolic_dim(size))
    parts = _parts(rows, least_sums // beside)
    array = jnp.reshape(array, (*array.shape[:first], parts, rows // parts, *array.shape[end:]))
    partial = lax.optimization_barrier(jnp.sum(array, first + 1))
    return sum_rows(partial, layout[:first] + ROW + layout[end:])


def _parts(rows, least):
    """Into how many equal parts the rows are cut: about as many as rows in each, and `least` where that may be.

    It may with LEAST_ROWS rows in each; with fewer the parts' sums are no longer few beside the rows.
    """
    small = [parts for parts in range(1, math.isqrt(rows) + 1) if rows % parts == 0]
    large = [rows // parts for parts in reversed(small) if parts >= LEAST_ROWS]
    candidates = [small[-1], *large]
    return next((parts for parts in candidates if parts >= least), candidates[-1])


def _folded_sums(arrays, layout, parts):
    """`sums_of` for XLA:CPU, whose plain sums of x and x^2 took 1.5 times as long in float32, 3 to 6 in bfloat16.

    XLA:CPU gives a reduction to a library, together with the elementwise work before it, each operation of which costs
    it about as much as the reduction alone. It does not know those of several arrays at once: XLA makes them with what
    comes before in one loop and one read, at the memory's speed if few rows are added up and the innermost axis is
    long. So row axes that lie together are one; the first that is long enough is cut into about so many parts, they are
    added up that way, and the library sums what is left.
    """
    arrays, layout = merge_rows(arrays, layout)
    shape, dtype = arrays[0].shape, arrays[0].dtype
    known = [axis for axis in axes_of(layout, ROW) if not is_symbolic_dim(shape[axis])]
    counts = range(parts // 2, parts + parts // 2 + 1)
    axis = next((axis for axis in known if shape[axis] >= counts[0]), None)
    if axis is None:
        return [sum_rows(array, layout) for array in arrays]
    counts = [count for count in counts if count <= shape[axis]]
    parts = min(counts, key=lambda count: (shape[axis] % count, abs(count - parts)))
    size, rest = divmod(shape[axis], parts)

    def in_parts(array):
        array = lax.slice_in_dim(array, 0, parts * size, axis=axis) if rest else array
        return jnp.reshape(array, (*shape[:axis], parts, size, *shape[axis + 1 :]))

    zeros = [jnp.zeros((), dtype)] * len(arrays)
    folded = lax.reduce([in_parts(array) for array in arrays], zeros, _add, (axis,))
    sums = [sum_rows(array, layout) for array in folded]
    if rest:
        remainders = (lax.slice_in_dim(array, parts * size, shape[axis], axis=axis) for array in arrays)
        sums = [total + sum_rows(array, layout) for total, array in zip(sums, remainders, strict=True)]
    return sums


def _add(values, others):
    return [value + other for value, other in zip(values, others, strict=True)]


def written_out(array):
    """The same array, which XLA:CPU computes into memory before it is used.

    The barrier does it in some versions of XLA; in others it goes too early, and what helps is an operation that the
    reductions' library does not take: rounding to the precision that the array has already.
    """
    precision = jnp.finfo(array.dtype)
    return lax.optimization_barrier(lax.reduce_precision(array, precision.nexp, precision.nmant))
