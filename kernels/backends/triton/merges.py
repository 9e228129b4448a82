"""The merges of the backend `triton`, launches of O(channels) between two passes. Importing it imports Triton.

Each block of threads has a few channels, and adds up in a fixed order the ranges' partial results of them. Moments
are merged about the first range's pivot: Chan, Golub & LeVeque, The American Statistician 37, 1983.
What the second pass needs per channel is computed in the same launch.

A launch has all channels, or the SLAB channels of one slab, see `passes`. What is given per channel is of all,
[groups, channels]; partial results and what is written are those of the slab, [groups, slab].
"""

import triton
import triton.language as tl

from bn_fused.kernels.backends.triton.passes import first_of, range_of, through_moments, times


@triton.jit
def _merge_place(slab, CHANNELS: tl.constexpr, SLAB: tl.constexpr, COLUMNS: tl.constexpr):
    """(group, channels counted in the slab, channels of all, whether there is one) of this block of a merge."""
    blocks: tl.constexpr = (SLAB + COLUMNS - 1) // COLUMNS
    of_slab = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    channel = first_of(slab, CHANNELS, SLAB) + of_slab
    return tl.program_id(0) // blocks, of_slab, channel, (of_slab < SLAB) & (channel < CHANNELS)


@triton.jit
def _entry(
    partial,
    entries,
    group,
    of_slab,
    there,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Where the partial results of some entries lie, whether there are any, and how many values each comes from.

    An entry is a range of rows and one of the `FOLD` copies of the slab's channels in its columns.
    """
    split = entries // FOLD
    inside = (entries < SPLITS * FOLD)[:, None] & there[None, :]
    place = split * (NUMBER * FOLD * SLAB) + entries % FOLD * SLAB
    _, count = range_of(split, ROWS, SPLITS)
    group_place = group.to(tl.int64) * (SPLITS * NUMBER * FOLD * SLAB)
    return partial + group_place + place[:, None] + of_slab[None, :], inside, count.to(tl.float32)[:, None]


@triton.jit
def _merged_moments(
    partial,
    group,
    of_slab,
    there,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """pivot, delta and variance of the whole from those of its parts, about the first part's pivot."""
    WIDTH: tl.constexpr = FOLD * SLAB
    share: tl.constexpr = 1.0 / (ROWS * FOLD)
    start = partial + group.to(tl.int64) * (SPLITS * 3 * WIDTH)
    pivot = tl.load(start + of_slab, mask=there, other=0.0)
    deltas = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for first in tl.range(0, SPLITS * FOLD, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        part, inside, n = _entry(partial, entries, group, of_slab, there, ROWS, FOLD, SLAB, SPLITS, 3)
        part_pivot = tl.load(part, mask=inside, other=0.0)
        offset = (part_pivot - pivot[None, :]) + tl.load(part + WIDTH, mask=inside, other=0.0)
        deltas += tl.where(inside, offset * (n * share), 0.0)
    delta = tl.sum(deltas, axis=0)
    squares = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for first in tl.range(0, SPLITS * FOLD, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        part, inside, n = _entry(partial, entries, group, of_slab, there, ROWS, FOLD, SLAB, SPLITS, 3)
        part_pivot = tl.load(part, mask=inside, other=0.0)
        offset = (part_pivot - pivot[None, :]) + tl.load(part + WIDTH, mask=inside, other=0.0)
        distance = offset - delta[None, :]
        square = tl.load(part + 2 * WIDTH, mask=inside, other=0.0) + distance * distance * n
        squares += tl.where(inside, square, 0.0)
    return pivot, delta, tl.sum(squares, axis=0) * share


@triton.jit
def merge_moments(
    slab,
    partial,
    pivot,
    delta,
    var,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The moments of each channel, [groups, slab], from those of its parts."""
    group, of_slab, channel, there = _merge_place(slab, CHANNELS, SLAB, COLUMNS)
    merged_pivot, merged_delta, merged_var = _merged_moments(
        partial, group, of_slab, there, ROWS, FOLD, SLAB, SPLITS, ENTRIES, COLUMNS
    )
    slab_place = group * SLAB + of_slab
    tl.store(pivot + slab_place, merged_pivot, mask=there)
    tl.store(delta + slab_place, merged_delta, mask=there)
    tl.store(var + slab_place, merged_var, mask=there)


@triton.jit
def merge_and_blend(
    slab,
    partial,
    running_mean,
    running_var,
    coefficients,
    pivot,
    delta,
    var,
    offset,
    rstd,
    new_mean,
    new_var,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
):
    """`merge_moments`, and what `contract.blend` makes of the moments; `coefficients` [groups, 6]."""
    group, of_slab, channel, there = _merge_place(slab, CHANNELS, SLAB, COLUMNS)
    merged_pivot, merged_delta, merged_var = _merged_moments(
        partial, group, of_slab, there, ROWS, FOLD, SLAB, SPLITS, ENTRIES, COLUMNS
    )
    slab_place = group * SLAB + of_slab
    tl.store(pivot + slab_place, merged_pivot, mask=there)
    tl.store(delta + slab_place, merged_delta, mask=there)
    tl.store(var + slab_place, merged_var, mask=there)

    place = group * CHANNELS + channel
    old_mean = tl.load(running_mean + place, mask=there, other=0.0)
    old_var = tl.load(running_var + place, mask=there, other=0.0)
    batch = tl.load(coefficients + group * 6)
    running = tl.load(coefficients + group * 6 + 1)
    constant = tl.load(coefficients + group * 6 + 2)
    mean_gain = tl.load(coefficients + group * 6 + 3)
    var_gain = tl.load(coefficients + group * 6 + 4)
    keep = tl.load(coefficients + group * 6 + 5)
    # norm_mean - pivot, without going through the rounded mean: see `contract.blend_channels`.
    rest = times(batch - 1, merged_pivot) + times(running, old_mean)
    tl.store(offset + slab_place, times(batch, merged_delta) + rest, mask=there)
    norm_var = times(batch, merged_var) + times(running, old_var) + constant
    tl.store(rstd + slab_place, tl.rsqrt(norm_var + EPS), mask=there)
    mean = merged_pivot + merged_delta
    tl.store(new_mean + slab_place, times(mean_gain, mean) + times(keep, old_mean), mask=there)
    tl.store(new_var + slab_place, times(var_gain, merged_var) + times(keep, old_var), mask=there)


@triton.jit
def _merged_sums(
    partial,
    offset,
    rstd,
    group,
    of_slab,
    channel,
    there,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum(dz), sum(dz * xhat) and rstd; xhat = (d - offset) * rstd."""
    sums_dz = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    sums_dz_d = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for first in tl.range(0, SPLITS * FOLD, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        part, inside, _ = _entry(partial, entries, group, of_slab, there, ROWS, FOLD, SLAB, SPLITS, 2)
        sums_dz += tl.load(part, mask=inside, other=0.0)
        sums_dz_d += tl.load(part + FOLD * SLAB, mask=inside, other=0.0)
    place = group * CHANNELS + channel
    reciprocal = tl.load(rstd + place, mask=there, other=0.0)
    total = tl.sum(sums_dz, axis=0)
    about = tl.load(offset + place, mask=there, other=0.0) * total
    return total, (tl.sum(sums_dz_d, axis=0) - about) * reciprocal, reciprocal


@triton.jit
def merge_sums(
    slab,
    partial,
    offset,
    rstd,
    sum_dz,
    sum_dz_xhat,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sum(dz) and sum(dz * xhat) of each channel, [groups, slab]."""
    group, of_slab, channel, there = _merge_place(slab, CHANNELS, SLAB, COLUMNS)
    total_dz, total_dz_xhat, _ = _merged_sums(
        partial, offset, rstd, group, of_slab, channel, there, ROWS, FOLD, CHANNELS, SLAB, SPLITS, ENTRIES, COLUMNS
    )
    slab_place = group * SLAB + of_slab
    tl.store(sum_dz + slab_place, total_dz, mask=there)
    tl.store(sum_dz_xhat + slab_place, total_dz_xhat, mask=there)


@triton.jit
def merge_backward(
    slab,
    partial,
    offset,
    rstd,
    weight,
    dmean,
    dvar,
    delta,
    batches,
    counts,
    sum_dz,
    sum_dz_xhat,
    slope,
    level,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`merge_sums`, and the part of dx that goes through the moments: d * slope + level."""
    group, of_slab, channel, there = _merge_place(slab, CHANNELS, SLAB, COLUMNS)
    total_dz, total_dz_xhat, reciprocal = _merged_sums(
        partial, offset, rstd, group, of_slab, channel, there, ROWS, FOLD, CHANNELS, SLAB, SPLITS, ENTRIES, COLUMNS
    )
    slab_place = group * SLAB + of_slab
    tl.store(sum_dz + slab_place, total_dz, mask=there)
    tl.store(sum_dz_xhat + slab_place, total_dz_xhat, mask=there)

    place = group * CHANNELS + channel
    batch = tl.load(batches + group)
    # The cotangents of offset and norm_var: see `contract.statistics_cotangents`.
    scale = tl.load(weight + place, mask=there, other=0.0) * reciprocal
    mean_cotangent = tl.load(dmean + place, mask=there, other=0.0) + times(batch, -scale * total_dz)
    var_cotangent = tl.load(dvar + place, mask=there, other=0.0) + times(batch, -scale * reciprocal * total_dz_xhat / 2)
    slopes, levels = through_moments(
        mean_cotangent, var_cotangent, tl.load(delta + place, mask=there, other=0.0), tl.load(counts + group)
    )
    tl.store(slope + slab_place, slopes, mask=there)
    tl.store(level + slab_place, levels, mask=there)
