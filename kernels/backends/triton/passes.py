"""The passes over rows of the backend `triton`. Import it where they are launched, not before: it imports Triton.

They read and write arrays [groups, rows, width] with `width` = fold * channels. A block of threads has a range of rows
of one block of columns, and walks through it tile by tile; each value of a tile has a place of its own in the registers
of one thread, where it is added up, and only the end of the range is summed across threads. The partial results of the
ranges lie in memory as [groups, splits, values, slab], and `merges` merges them in a fixed order: two runs give
the same bits.

A launch has all columns, or those of one slab: SLAB neighbouring columns, less in the last. Which slab it is, is read
from memory, where the second pass over the slab before it has written it: so that launches of different slabs are the
same program, and none begins before those of the slab before it have ended.

Moments are (pivot, delta, squares about the mean), the pivot being the mean of the range's first tile, or 0 where that
is not finite. What is read beyond the end of a range or a row is replaced by a selection, never by a product: a value
of another channel that is not finite stays where it is.

The address of a tile is computed with 64-bit integers, places within it with 32-bit ones. All sizes are constants of
the compilation, so that the compiler knows which loads it may make 16 bytes wide.
"""

import triton
import triton.language as tl

# --- places ---------------------------------------------------------------------------------------------------


@triton.jit
def _block_of(SPLITS: tl.constexpr, BLOCKS: tl.constexpr, GRID: tl.constexpr, REVERSE: tl.constexpr):
    """(group, split, column block) of this block of threads: neighbours in a row run at the same time."""
    block = tl.program_id(0)
    if REVERSE:
        block = GRID - 1 - block
    rest = block // BLOCKS
    return rest // SPLITS, rest % SPLITS, block % BLOCKS


@triton.jit
def range_of(split, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """(first row, number of rows) of a split: all rows, in order, differing by at most one."""
    base: tl.constexpr = ROWS // SPLITS
    extra: tl.constexpr = ROWS % SPLITS
    return split * base + tl.minimum(split, extra), base + (split < extra).to(tl.int32)


@triton.jit
def first_of(slab, WIDTH: tl.constexpr, SLAB: tl.constexpr):
    """The first column of a launch."""
    first = 0
    if SLAB != WIDTH:
        first = tl.load(slab) * SLAB
    return first


@triton.jit
def _say_which_is_next(following, slab):
    """For the slab that comes after this one."""
    tl.store(following, tl.load(slab) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def _columns_of(begin, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """(columns, the channel of each, whether there is one) of the block of columns that begins there."""
    columns = begin + tl.arange(0, COLUMNS)
    channel = columns
    if WIDTH != CHANNELS:
        channel = columns % CHANNELS
    return columns, channel, columns < WIDTH


@triton.jit
def _tile_at(group, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a tile begins, counted in values."""
    return (group.to(tl.int64) * ROWS + row) * WIDTH + column


@triton.jit
def _within(TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The places of a tile's values, counted from its beginning."""
    return tl.arange(0, TILE_ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _per_channel(values, group, channel, inside, CHANNELS: tl.constexpr):
    """The values per channel [groups, channels] of a block's columns."""
    return tl.load(values + group * CHANNELS + channel, mask=inside, other=0.0)


@triton.jit
def _read(array, places, inside, LAST: tl.constexpr):
    """The values of a tile in float32, 0 outside; the last reader of an array lets L2 drop them first."""
    if LAST:
        return tl.load(array + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return tl.load(array + places, mask=inside, other=0.0).to(tl.float32)


# --- arithmetic of values -------------------------------------------------------------------------------------


@triton.jit
def _finite_or_zero(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def _variance_sum(square_sum, total, mean):
    """square_sum - total * mean, at least 0: the sum of squares about the mean; see `contract.squares_about_mean`."""
    correction = total * mean
    overflows = (tl.abs(mean) < float("inf")) & ~(tl.abs(correction) < float("inf"))
    squares = square_sum - tl.where(overflows, 0.0, correction)
    return tl.where(squares < 0, 0.0, squares)  # NaN stays


@triton.jit
def times(coefficient, value):
    """`contract.scaled`: zero where the coefficient is, whatever the value."""
    return tl.where(coefficient == 0, 0.0, coefficient * value)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_inner(x):
    """Twice the argument of gelu's tanh: x/2 * (1 + tanh(u)) is x * sigmoid(2u)."""
    return 1.5957691216057308 * (x + 0.044715 * (x * x * x))


# One return each, behind the branches: Triton compiles what follows a branch that has returned, assertions too.


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The functions of `activations.ACTIVATIONS`; NaN passes each of them."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(x < 0, SLOPE * x, x)
    elif ACTIVATION == "silu":
        y = x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        y = x * _sigmoid(_gelu_inner(x))
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that the kernels do not know")
        y = x
    return y


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The derivatives of `activations.ACTIVATIONS`; relu's and leaky_relu's are the same of the result as of x."""
    if ACTIVATION == "relu":
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        slope = tl.where(x >= 0, 1.0, SLOPE)
    elif ACTIVATION == "silu":
        sigmoid = _sigmoid(x)
        slope = sigmoid * (1 + x * _sigmoid(-x))
    else:
        tl.static_assert(ACTIVATION == "gelu", "an activation that the kernels do not know")
        inner = _gelu_inner(x)
        sigmoid = _sigmoid(inner)
        sigmoid_slope = sigmoid * _sigmoid(-inner)
        # Where the sigmoid is saturated the second term is zero, also where x * inner' overflows.
        second = x * sigmoid_slope * (1.5957691216057308 * (1 + 0.134145 * (x * x)))
        slope = sigmoid + tl.where(sigmoid_slope == 0, 0.0, second)
    return slope


@triton.jit
def through_moments(dmean, dvar, delta, count):
    """slope and level of dmean/n + (d - delta) * 2 * dvar/n, as a function of d."""
    slope = 2 * dvar / count
    return slope, dmean / count - delta * slope


# --- passes over rows -----------------------------------------------------------------------------------------


@triton.jit
def moments(
    slab,
    x,
    partial,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GRID: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The moments of each range of rows: pivot, delta, squares about the mean, [groups, splits, 3, slab]."""
    group, split, block = _block_of(SPLITS, BLOCKS, GRID, REVERSE)
    start, count = range_of(split, ROWS, SPLITS)
    first_column = first_of(slab, WIDTH, SLAB)
    column = first_column + block * COLUMNS
    columns, _, there = _columns_of(column, WIDTH, CHANNELS, COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    array = x + _tile_at(group, start, column, ROWS, WIDTH)
    within = _within(TILE_ROWS, COLUMNS, WIDTH)

    first = _read(array, within, (rows < count)[:, None] & there[None, :], False)
    pivot = _finite_or_zero(tl.sum(first, axis=0) / tl.minimum(count, TILE_ROWS).to(tl.float32))
    total = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    for step in tl.range(0, tl.cdiv(count, TILE_ROWS), num_stages=STAGES):
        row = step * TILE_ROWS
        inside = (row + rows < count)[:, None] & there[None, :]
        values = _read(array + row.to(tl.int64) * WIDTH, within, inside, False)
        d = tl.where(inside, values - pivot[None, :], 0.0)
        total += d
        squares += d * d
    total_sum = tl.sum(total, axis=0)
    delta = total_sum / count.to(tl.float32)
    result = partial + (group.to(tl.int64) * SPLITS + split) * (3 * SLAB) + (columns - first_column)
    tl.store(result, pivot, mask=there)
    tl.store(result + SLAB, delta, mask=there)
    tl.store(result + 2 * SLAB, _variance_sum(tl.sum(squares, axis=0), total_sum, delta), mask=there)


@triton.jit
def normalise(
    slab,
    before,
    x,
    residual,
    pivot,
    offset,
    rstd,
    weight,
    bias,
    y,
    following,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GRID: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """y = activation((x - pivot - offset) * rstd * weight + bias + residual). `residual` is read if RESIDUAL.

    `pivot`, `offset` and `rstd` are those of the slab's channels, [groups, slab]. `before` is y with the slabs that are
    done, in the same memory; it is not read.
    """
    group, split, block = _block_of(SPLITS, BLOCKS, GRID, REVERSE)
    start, count = range_of(split, ROWS, SPLITS)
    first_column = first_of(slab, WIDTH, SLAB)
    column = first_column + block * COLUMNS
    _, channel, there = _columns_of(column, WIDTH, CHANNELS, COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    begin = _tile_at(group, start, column, ROWS, WIDTH)
    within = _within(TILE_ROWS, COLUMNS, WIDTH)

    of_slab = channel - first_column
    SLAB_CHANNELS: tl.constexpr = CHANNELS if SLAB == WIDTH else SLAB
    scale = _per_channel(rstd, group, of_slab, there, SLAB_CHANNELS) * _per_channel(
        weight, group, channel, there, CHANNELS
    )
    shift = _per_channel(bias, group, channel, there, CHANNELS)
    shift = shift - _per_channel(offset, group, of_slab, there, SLAB_CHANNELS) * scale
    centre = _per_channel(pivot, group, of_slab, there, SLAB_CHANNELS)
    steps = tl.cdiv(count, TILE_ROWS)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = step * TILE_ROWS
        if REVERSE:
            row = (steps - 1 - step) * TILE_ROWS
        inside = (row + rows < count)[:, None] & there[None, :]
        tile = begin + row.to(tl.int64) * WIDTH
        z = (_read(x + tile, within, inside, REVERSE) - centre[None, :]) * scale[None, :] + shift[None, :]
        if RESIDUAL:
            z += _read(residual + tile, within, inside, REVERSE)
        tl.store(y + tile + within, _activate(z, ACTIVATION, SLOPE).to(y.dtype.element_ty), mask=inside)
    if SLAB != WIDTH:
        _say_which_is_next(following, slab)


@triton.jit
def gradient(
    slab,
    before,
    dy,
    x,
    kept,
    pivot,
    offset,
    rstd,
    weight,
    bias,
    slope,
    level,
    first_out,
    second_out,
    third_out,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GRID: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEPT: tl.constexpr,
    SUMS: tl.constexpr,
    WRITE_DX: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """The passes of a backward, of dz = dy * activation'(z) and d = x - pivot.

    - KEPT: "none"; or, where a residual was added, which array the derivative is computed of, `kept`: "residual" or
      "y". Then dz, the residual's gradient, is written. A second pass has it in dy's place, and no activation.
    - SUMS: the sums of dz and dz * d of each range of rows, [groups, splits, 2, slab].
    - WRITE_DX: dx = dz * scale, and with MOMENTS + d * slope + level.

    The results are dx, dz, and the sums or the number of the next slab: those that a launch has are written, in this
    order, to `first_out`, `second_out` and `third_out`; the other pointers are None. `slope` and `level` are read if
    MOMENTS; they are those of the slab's channels, [groups, slab]. `before` is the first result with the slabs that are
    done, in the same memory; it is not read.
    """
    group, split, block = _block_of(SPLITS, BLOCKS, GRID, REVERSE)
    start, count = range_of(split, ROWS, SPLITS)
    first_column = first_of(slab, WIDTH, SLAB)
    column = first_column + block * COLUMNS
    columns, channel, there = _columns_of(column, WIDTH, CHANNELS, COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    begin = _tile_at(group, start, column, ROWS, WIDTH)
    within = _within(TILE_ROWS, COLUMNS, WIDTH)

    scale = _per_channel(rstd, group, channel, there, CHANNELS) * _per_channel(weight, group, channel, there, CHANNELS)
    shift = _per_channel(bias, group, channel, there, CHANNELS)
    shift = shift - _per_channel(offset, group, channel, there, CHANNELS) * scale
    centre = _per_channel(pivot, group, channel, there, CHANNELS)
    if MOMENTS:
        of_slab = channel - first_column
        SLAB_CHANNELS: tl.constexpr = CHANNELS if SLAB == WIDTH else SLAB
        slopes = _per_channel(slope, group, of_slab, there, SLAB_CHANNELS)
        levels = _per_channel(level, group, of_slab, there, SLAB_CHANNELS)
    WRITE_DZ: tl.constexpr = KEPT != "none"
    # What is computed of dy is in memory then, and a pass that follows reads that.
    DY_LAST: tl.constexpr = WRITE_DX or WRITE_DZ
    if SUMS:
        sum_dz = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
        sum_dz_d = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
    steps = tl.cdiv(count, TILE_ROWS)
    for step in tl.range(0, steps, num_stages=STAGES):
        row = step * TILE_ROWS
        if REVERSE:
            row = (steps - 1 - step) * TILE_ROWS
        inside = (row + rows < count)[:, None] & there[None, :]
        tile = begin + row.to(tl.int64) * WIDTH
        d = _read(x + tile, within, inside, REVERSE) - centre[None, :]
        dz = _read(dy + tile, within, inside, DY_LAST)
        if ACTIVATION != "none":
            if KEPT == "y":
                argument = _read(kept + tile, within, inside, DY_LAST)
            else:
                argument = d * scale[None, :] + shift[None, :]
                if KEPT == "residual":
                    argument += _read(kept + tile, within, inside, DY_LAST)
            dz = dz * _derivative(argument, ACTIVATION, SLOPE)
        if SUMS:
            sum_dz += tl.where(inside, dz, 0.0)
            sum_dz_d += tl.where(inside, dz * d, 0.0)
        if WRITE_DX:
            dx = dz * scale[None, :]
            if MOMENTS:
                dx += d * slopes[None, :] + levels[None, :]
            tl.store(first_out + tile + within, dx.to(first_out.dtype.element_ty), mask=inside)
        if WRITE_DZ:
            dz_out = second_out if WRITE_DX else first_out
            tl.store(dz_out + tile + within, dz.to(dz_out.dtype.element_ty), mask=inside)
    if SUMS:
        if WRITE_DX and WRITE_DZ:
            sums_out = third_out
        elif WRITE_DX or WRITE_DZ:
            sums_out = second_out
        else:
            sums_out = first_out
        result = sums_out + (group.to(tl.int64) * SPLITS + split) * (2 * SLAB) + (columns - first_column)
        tl.store(result, tl.sum(sum_dz, axis=0), mask=there)
        tl.store(result + SLAB, tl.sum(sum_dz_d, axis=0), mask=there)
    elif SLAB != WIDTH:
        _say_which_is_next(second_out, slab)


@triton.jit
def moments_gradient(
    slab,
    x,
    pivot,
    delta,
    dmean,
    dvar,
    counts,
    dx,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GRID: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """dx = dmean/n + (x - pivot - delta) * 2 * dvar/n, of all columns in one launch."""
    tl.static_assert(SLAB == WIDTH)
    group, split, block = _block_of(SPLITS, BLOCKS, GRID, REVERSE)
    start, count = range_of(split, ROWS, SPLITS)
    _, channel, there = _columns_of(block * COLUMNS, WIDTH, CHANNELS, COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    begin = _tile_at(group, start, block * COLUMNS, ROWS, WIDTH)
    within = _within(TILE_ROWS, COLUMNS, WIDTH)

    slope, level = through_moments(
        _per_channel(dmean, group, channel, there, CHANNELS),
        _per_channel(dvar, group, channel, there, CHANNELS),
        _per_channel(delta, group, channel, there, CHANNELS),
        tl.load(counts + group),
    )
    centre = _per_channel(pivot, group, channel, there, CHANNELS)
    for step in tl.range(0, tl.cdiv(count, TILE_ROWS), num_stages=STAGES):
        row = step * TILE_ROWS
        inside = (row + rows < count)[:, None] & there[None, :]
        tile = begin + row.to(tl.int64) * WIDTH
        d = _read(x + tile, within, inside, REVERSE) - centre[None, :]
        result = d * slope[None, :] + level[None, :]
        tl.store(dx + tile + within, result.to(dx.dtype.element_ty), mask=inside)
