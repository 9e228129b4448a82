"""The kernels of the backend `pallas_tpu` on arrays [groups, rows, channels]; `operations` says what they move.

A kernel sees a block of x as a reference [block_rows, block_channels], and a channel's values as [1, block_channels].
Its grid is (groups * channel blocks, row blocks), with the phase between them where it has two.
"""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bn_fused.kernels.activations import ACTIVATIONS, activate, is_transcendental
from bn_fused.kernels.backends.pallas_tpu.plan import ROW_TILE, ceil_div, round_up
from bn_fused.kernels.contract import (
    Coefficients,
    blend_channels,
    moments_cotangents,
    reciprocal_std,
    scale_and_shift,
    squares_about_mean,
    statistics_cotangents,
    sum_with_xhat,
    through_moments,
)

SUBLANES = 8
PIVOT_ROWS = 128
# Rows of the scratch with values per channel that outlive a step of the grid.
PIVOT, DELTA, M2, CENTRE, SCALE, SHIFT, SLOPE, LEVEL = range(SUBLANES)
SUM_DZ, SUM_DZ_D = DELTA, M2


# ------------------------------------------------------------------------------------------ walking over a block


class _Walk:
    """Which rows of which blocks there are, and where they lie: static but for the block `index` of this step."""

    def __init__(self, rows, plan, index):
        self.rows, self.plan, self.index = rows, plan, index
        self.count = ceil_div(rows, plan.block_rows)
        self.last = rows - (self.count - 1) * plan.block_rows
        self.chunk = plan.chunk_rows

    def blocks(self, work):
        """Run work(rows, in_vmem) for this step's block, which has so many rows of x and stays in VMEM or not."""
        resident, count, whole = self.plan.resident, self.count, self.plan.block_rows
        spans = [
            (0, min(resident, count - 1), whole, True),
            (min(resident, count - 1), count - 1, whole, False),
            (count - 1, count, self.last, resident == count),
        ]
        merged = []
        for start, stop, *kind in spans:
            if start == stop:
                continue
            if merged and merged[-1][2:] == kind:
                start = merged.pop()[0]
            merged.append([start, stop, *kind])
        for start, stop, rows, in_vmem in merged:
            if len(merged) == 1:
                work(rows, in_vmem)
            else:
                inside = (self.index >= start) & (self.index < stop)
                pl.when(inside)(functools.partial(work, rows, in_vmem))

    def chunks(self, rows, body, carry=None):
        """carry = body(rows of the chunk as a slice, how many of them are x's or None for all, carry), repeatedly."""
        whole, rest = divmod(rows, self.chunk)

        def step(index, carry):
            first = pl.multiple_of(index * self.chunk, self.chunk)
            return body(pl.ds(first, self.chunk), None, carry)

        def steps(index, carry):
            for part in range(unroll):
                carry = step(index * unroll + part, carry)
            return carry

        # Unrolled here, because the compiler's own unrolling crashes on some numbers of steps. Those that are left over
        # have a loop too: side by side they would need more registers than there are.
        unroll = self.plan.unroll
        unrolled = whole // unroll
        if unrolled:
            carry = lax.fori_loop(0, unrolled, steps, carry)
        if whole % unroll:
            carry = lax.fori_loop(unrolled * unroll, whole, step, carry)
        if rest:
            size = round_up(rest, ROW_TILE)
            carry = body(pl.ds(whole * self.chunk, size), rest if rest < size else None, carry)
        return carry


def _where_valid(values, valid, *arrays):
    """The arrays with zeros in the rows that are not x's: what is read there may be anything, NaN too."""
    if valid is None:
        return arrays
    inside = lax.broadcasted_iota(jnp.int32, values.shape, 0) < valid
    return tuple(jnp.where(inside, array, 0.0) for array in arrays)


def _partial_sums(array):
    """[rows, channels] to [8, channels]: a register's rows stay apart until the block's end."""
    return jnp.sum(array.reshape(array.shape[0] // SUBLANES, SUBLANES, array.shape[1]), 0)


def _row(reference, index):
    return reference[pl.ds(index, 1), :]


def _float(reference, chunk):
    return reference[chunk, :].astype(jnp.float32)


# ------------------------------------------------------------------------------------------ arithmetic per channel


def _times(coefficient, value):
    """`contract.scaled` for a scalar."""
    return jnp.where(coefficient == 0, 0.0, coefficient * value)


def _finite_or(value, other):
    return jnp.where(jnp.abs(value) < jnp.inf, value, other)


# ------------------------------------------------------------------------------------------ statistics


def _choose_pivot(walk, x, stats):
    """The mean of the channel's first rows, or 0 where it is not finite."""
    rows = min(PIVOT_ROWS, walk.plan.block_rows, walk.rows)
    size = round_up(rows, ROW_TILE)
    first = _float(x, pl.ds(0, size))
    (first,) = _where_valid(first, rows if rows < size else None, first)
    pivot = jnp.sum(first, 0, keepdims=True) * (1 / rows)
    pivot = _finite_or(pivot, 0.0)
    zero = jnp.zeros_like(pivot)
    for row, value in ((PIVOT, pivot), (CENTRE, pivot), (DELTA, zero), (M2, zero)):
        stats[pl.ds(row, 1), :] = value


def _add_to_moments(walk, rows, x, slab, stats):
    """Merge a block's mean and sum of squares about it into those of the blocks before; keep the block in the slab.

    The block's sums are of deviations from the mean so far (of the first block: from the pivot), so that neither a
    large mean nor an unusual first block costs digits.
    """
    centre = _row(stats, CENTRE)

    def add(chunk, valid, sums):
        values = x[chunk, :]
        if slab is not None:
            slab[chunk, :] = values
        d = values.astype(jnp.float32) - centre
        (d,) = _where_valid(d, valid, d)
        return sums[0] + _partial_sums(d), sums[1] + _partial_sums(d * d)

    zeros = jnp.zeros((SUBLANES, centre.shape[1]), jnp.float32)
    sums = walk.chunks(rows, add, (zeros, zeros))
    total, squares = (jnp.sum(part, 0, keepdims=True) for part in sums)

    before = walk.index.astype(jnp.float32) * walk.plan.block_rows
    share = rows / (before + rows)
    shift = total * (1 / rows)
    m2 = squares_about_mean(squares, total, shift)
    pivot, delta = _row(stats, PIVOT), _row(stats, DELTA)
    block_delta = (centre - pivot) + shift
    gap = jnp.where(before == 0, 0.0, block_delta - delta)
    # As a weighted mean, so that an infinite mean stays infinite.
    delta = delta * (1 - share) + block_delta * share
    stats[pl.ds(M2, 1), :] = _row(stats, M2) + (m2 + gap * gap * (before * share))
    stats[pl.ds(DELTA, 1), :] = delta
    stats[pl.ds(CENTRE, 1), :] = _finite_or(pivot + delta, pivot)


def _moments_of(walk, stats):
    return _row(stats, PIVOT), _row(stats, DELTA), _row(stats, M2) * (1 / walk.rows)


def _statistics_phase(walk, x, slab, stats, finish):
    """One block's part of the first phase of `forward`, and the whole of `moments`."""
    pl.when(walk.index == 0)(lambda: _choose_pivot(walk, x, stats))
    walk.blocks(lambda rows, in_vmem: _add_to_moments(walk, rows, x, slab.at[walk.index] if in_vmem else None, stats))
    pl.when(walk.index == walk.count - 1)(lambda: finish(*_moments_of(walk, stats)))


# ------------------------------------------------------------------------------------------ elementwise


def _before_activation(d, scale, shift, residual, chunk):
    z = d * scale + shift
    return z if residual is None else z + _float(residual, chunk)


def _normalise_block(walk, rows, x, y, residual, pivot, scale, shift, activation):
    def normalise(chunk, valid, carry):
        z = _before_activation(_float(x, chunk) - pivot, scale, shift, residual, chunk)
        y[chunk, :] = activate(z, activation).astype(y.dtype)
        return carry

    walk.chunks(rows, normalise)


def _pre_activation_cotangent(refs, chunk, pivot, scale, shift, activation):
    """d = x - pivot, and dz = dy * activation'(z), of which y tells where it is kept for that."""
    d, dz = _float(refs.x, chunk) - pivot, _float(refs.dy, chunk)
    if activation is not None:
        kept = refs.y is not None
        z = _float(refs.y, chunk) if kept else _before_activation(d, scale, shift, refs.residual, chunk)
        dz = dz * ACTIVATIONS[activation].derivative(z)
    return d, dz


def _scale_and_shift(refs):
    return scale_and_shift(refs.offset[...], refs.rstd[...], refs.weight[...], refs.bias[...])


# ------------------------------------------------------------------------------------------ the kernels


def _forward(refs, walk, phase, *, eps, activation):
    stats = refs.stats

    def finish(pivot, delta, var):
        coefficients = (refs.coefficients[0, 0, index] for index in range(len(Coefficients._fields)))
        offset, norm_var, new_mean, new_var = blend_channels(
            pivot, delta, var, refs.running_mean[...], refs.running_var[...], coefficients, _times
        )
        rstd = reciprocal_std(norm_var, eps)
        stats[pl.ds(SCALE, 1), :], stats[pl.ds(SHIFT, 1), :] = scale_and_shift(
            offset, rstd, refs.weight[...], refs.bias[...]
        )
        refs.pivot[...], refs.delta[...], refs.var[...] = pivot, delta, var
        refs.offset[...], refs.rstd[...] = offset, rstd
        refs.new_running_mean[...], refs.new_running_var[...] = new_mean, new_var

    def normalise(rows, in_vmem):
        x = refs.x_slab.at[walk.index] if in_vmem else refs.x
        per_channel = (_row(stats, row) for row in (PIVOT, SCALE, SHIFT))
        _normalise_block(walk, rows, x, refs.y, refs.residual, *per_channel, activation)

    pl.when(phase == 0)(lambda: _statistics_phase(walk, refs.x, refs.x_slab, stats, finish))
    pl.when(phase == 1)(lambda: walk.blocks(normalise))


def _moments(refs, walk, phase, **_):
    def finish(pivot, delta, var):
        refs.pivot[...], refs.delta[...], refs.var[...] = pivot, delta, var

    _statistics_phase(walk, refs.x, None, refs.stats, finish)


def _normalise(refs, walk, phase, *, activation, **_):
    scale, shift = _scale_and_shift(refs)
    walk.blocks(
        lambda rows, in_vmem: _normalise_block(
            walk, rows, refs.x, refs.y, refs.residual, refs.pivot[...], scale, shift, activation
        )
    )


def _sum_block(walk, rows, refs, activation, to):
    """Add a block's sum of dz and of dz * d to the scratch.

    `to`: references to write x, dy, dz or dx = dz * scale to, by these names.
    """
    pivot, scale, shift = (_row(refs.stats, row) for row in (PIVOT, SCALE, SHIFT))

    def add(chunk, valid, sums):
        for name in ("x", "dy"):
            if name in to:
                to[name][chunk, :] = getattr(refs, name)[chunk, :]
        d, dz = _pre_activation_cotangent(refs, chunk, pivot, scale, shift, activation)
        if "dx" in to:
            to["dx"][chunk, :] = (dz * scale).astype(to["dx"].dtype)
        if "dz" in to:
            to["dz"][chunk, :] = dz.astype(to["dz"].dtype)
        d, dz = _where_valid(d, valid, d, dz)
        return sums[0] + _partial_sums(dz), sums[1] + _partial_sums(dz * d)

    zeros = jnp.zeros((SUBLANES, pivot.shape[1]), jnp.float32)
    sums = walk.chunks(rows, add, (zeros, zeros))
    for row, part in zip((SUM_DZ, SUM_DZ_D), sums, strict=True):
        refs.stats[pl.ds(row, 1), :] += jnp.sum(part, 0, keepdims=True)


def _begin_sums(refs):
    """Clear the sums, and put what every chunk needs where a chip with few registers reads it again and again."""
    scale, shift = _scale_and_shift(refs)
    zero = jnp.zeros_like(scale)
    values = (SUM_DZ, zero), (SUM_DZ_D, zero), (PIVOT, refs.pivot[...]), (SCALE, scale), (SHIFT, shift)
    for row, value in values:
        refs.stats[pl.ds(row, 1), :] = value


def _write_sums(refs):
    sum_dz = _row(refs.stats, SUM_DZ)
    sum_dz_xhat = sum_with_xhat(sum_dz, _row(refs.stats, SUM_DZ_D), refs.offset[...], refs.rstd[...])
    refs.sum_dz[...], refs.sum_dz_xhat[...] = sum_dz, sum_dz_xhat
    return sum_dz, sum_dz_xhat


def _backward(refs, walk, phase, *, activation, **_):
    stats = refs.stats
    dz_is_a_result = refs.dresidual is not None

    def finish():
        sum_dz, sum_dz_xhat = _write_sums(refs)
        from_normalisation = statistics_cotangents(refs.weight[...], refs.rstd[...], sum_dz, sum_dz_xhat)
        dmean, dvar = moments_cotangents(
            refs.dmean[...], refs.dvar[...], *from_normalisation, refs.batch[0, 0, 0], _times
        )
        slope, level = through_moments(dmean, dvar, refs.delta[...], refs.count[0, 0, 0])
        stats[pl.ds(SLOPE, 1), :], stats[pl.ds(LEVEL, 1), :] = slope, level

    def slabs():
        """What stays of a block; dz is rounded as its result is."""
        x, cotangent = refs.x_slab.at[walk.index], refs.dy_slab.at[walk.index]
        return {"x": x, "dz" if dz_is_a_result else "dy": cotangent}

    def sums():
        pl.when(walk.index == 0)(lambda: _begin_sums(refs))
        walk.blocks(lambda rows, in_vmem: _sum_block(walk, rows, refs, activation, slabs() if in_vmem else {}))
        pl.when(walk.index == walk.count - 1)(finish)

    def gradient(rows, in_vmem):
        sources, of_dy = refs, activation
        if in_vmem:
            x, cotangent = slabs().values()
            sources = SimpleNamespace(x=x, dy=cotangent, residual=None, y=None)
            of_dy = None if dz_is_a_result else activation
        pivot, scale, shift, slope, level = (_row(stats, row) for row in (PIVOT, SCALE, SHIFT, SLOPE, LEVEL))

        def write(chunk, valid, carry):
            d, dz = _pre_activation_cotangent(sources, chunk, pivot, scale, shift, of_dy)
            refs.dx[chunk, :] = (dz * scale + (d * slope + level)).astype(refs.dx.dtype)
            if dz_is_a_result:
                refs.dresidual[chunk, :] = dz.astype(refs.dresidual.dtype)
            return carry

        walk.chunks(rows, write)

    pl.when(phase == 0)(sums)
    pl.when(phase == 1)(lambda: walk.blocks(gradient))


def _normalise_backward(refs, walk, phase, *, activation, **_):
    pl.when(walk.index == 0)(lambda: _begin_sums(refs))
    to = {"dx": refs.dx} | ({} if refs.dresidual is None else {"dz": refs.dresidual})
    walk.blocks(lambda rows, in_vmem: _sum_block(walk, rows, refs, activation, to))

    @pl.when(walk.index == walk.count - 1)
    def _():
        _write_sums(refs)


def _moments_backward(refs, walk, phase, **_):
    pivot = refs.pivot[...]
    slope, level = through_moments(refs.dmean[...], refs.dvar[...], refs.delta[...], refs.count[0, 0, 0])

    def write(chunk, valid, carry):
        refs.dx[chunk, :] = ((_float(refs.x, chunk) - pivot) * slope + level).astype(refs.dx.dtype)
        return carry

    walk.blocks(lambda rows, in_vmem: walk.chunks(rows, write))


# name: kernel, whether it has two phases, arrays read in the second phase alone, arrays saved in VMEM between the two
# (in dy's place dz, where that is a result).
KERNELS = {
    "forward": (_forward, True, ("residual",), ("x",)),
    "backward": (_backward, True, (), ("x", "dy")),
    "moments": (_moments, False, (), ()),
    "moments_backward": (_moments_backward, False, (), ()),
    "normalise": (_normalise, False, (), ()),
    "normalise_backward": (_normalise_backward, False, (), ()),
}
# Kernels that carry sums from one row block to the next.
SEQUENTIAL = ("forward", "backward", "moments", "normalise_backward")
LARGE, CHANNEL, SCALARS = "large", "channel", "scalars"


# ------------------------------------------------------------------------------------------ the call


def call(name, operands, results, plan, *, eps=None, activation=None, interpret=False):
    """Run a kernel.

    `operands`: {name: (kind, array)} with kind LARGE ([groups, rows, channels]), CHANNEL ([groups, 1, channels],
    float32) or SCALARS ([groups, 1, n], float32). `results`: {name: kind}; large ones have x's dtype. Returns
    {name: array}.
    """
    kernel, two_phases, read_for_results, saved = KERNELS[name]
    large = next(array for kind, array in operands.values() if kind == LARGE)
    groups, rows, channels = large.shape
    block_rows, block_channels, resident = plan.block_rows, plan.block_channels, plan.resident
    row_blocks, channel_blocks = ceil_div(rows, block_rows), ceil_div(channels, block_channels)

    if resident > row_blocks:
        raise ValueError(f"the plan keeps {resident} row blocks of {row_blocks} that there are: {plan}")

    def column(index):
        return (0, index) if groups == 1 else (lax.div(index, channel_blocks), lax.rem(index, channel_blocks))

    def read(name):
        def place(index, phase, row):
            if two_phases and name in read_for_results:
                row = jnp.where(phase == 1, row, 0)
            elif two_phases and resident:
                # What is in VMEM is not read again: the window stays on the first phase's last block.
                row = jnp.where((phase == 1) & (row < resident), row_blocks - 1, row)
            group, channel = column(index)
            return group, row, channel

        return place

    def write(index, phase, row):
        group, channel = column(index)
        # The window that is written stays on the block with which the second phase begins.
        return group, jnp.where(phase == 1, row, 0) if two_phases else row, channel

    def per_channel(index, phase, row):
        group, channel = column(index)
        return group, 0, channel

    def spec(kind, array, place):
        if not two_phases:
            place_of = place
            place = lambda index, row: place_of(index, 0, row)  # noqa: E731
        if kind == LARGE:
            return pl.BlockSpec((None, block_rows, block_channels), place)
        if kind == CHANNEL:
            return pl.BlockSpec((None, 1, block_channels), place)
        return pl.BlockSpec((1, 1, array.shape[-1]), place, memory_space=pltpu.SMEM)

    def scalars(index, phase, row):
        return column(index)[0], 0, 0

    places = {CHANNEL: lambda name: per_channel, SCALARS: lambda name: scalars, LARGE: read}
    in_specs = [spec(kind, array, places[kind](name)) for name, (kind, array) in operands.items()]
    # Inside shard_map the results' types must say over which device axes they differ: as the operands' do.
    varying = jax.typeof(large).manual_axis_type
    out_types = {
        name: jax.ShapeDtypeStruct((groups, rows, channels), large.dtype, manual_axis_type=varying)
        if kind == LARGE
        else jax.ShapeDtypeStruct((groups, 1, channels), jnp.float32, manual_axis_type=varying)
        for name, kind in results.items()
    }
    out_specs = [spec(kind, None, write if kind == LARGE else per_channel) for name, kind in results.items()]
    slab = pltpu.VMEM((resident, block_rows, block_channels), large.dtype)
    scratch = {f"{name}_slab": slab for name in saved if resident}
    scratch["stats"] = pltpu.VMEM((SUBLANES, block_channels), jnp.float32)
    names = (*operands, *results, *scratch)
    absent = dict.fromkeys(("residual", "y", "dresidual", "x_slab", "dy_slab"))

    def body(*references):
        refs = SimpleNamespace(**{**absent, **dict(zip(names, references, strict=True))})
        phase = pl.program_id(1) if two_phases else 0
        walk = _Walk(rows, plan, pl.program_id(2 if two_phases else 1))
        kernel(refs, walk, phase, eps=eps, activation=activation)

    order = "arbitrary" if name in SEQUENTIAL else "parallel"
    arrays = pl.pallas_call(
        body,
        grid=(groups * channel_blocks, *((2,) if two_phases else ()), row_blocks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=list(out_types.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *(("arbitrary",) if two_phases else ()), order),
            vmem_limit_bytes=plan.vmem_limit_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * math.prod(large.shape),
            transcendentals=math.prod(large.shape) if is_transcendental(activation) else 0,
            bytes_accessed=int((plan.reads + plan.writes) * large.size * large.dtype.itemsize),
        ),
        interpret=interpret,
        name=f"bn_fused_{name}",
    )(*(array for _, array in operands.values()))
    return dict(zip(results, arrays, strict=True))
