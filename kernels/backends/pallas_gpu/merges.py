"""How the kernels of the backend `pallas_gpu` merge the partial results of their blocks.

A `Merge` is what is computed of them, per channel; `Parts` are the partial results as the warpgroups of a block add
them up. A resident kernel does that itself. Between two passes of a stream, `merge_moments` and `merge_sums` are
launches of O(channels) that do it and compute the values per channel that the second pass needs.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu.block import (
    F32,
    Exchange,
    added,
    launch,
    numbers_of,
    pallas,
    taker,
    unrolled,
    vectors_of,
    zeros,
)
from bn_fused.kernels.backends.pallas_gpu.tiles import ALIGNMENT, WARPGROUP, share
from bn_fused.kernels.contract import blend_channels

# Where partial results are merged in a launch of its own, 1024 threads share the work of 128 channels.
MERGE_WARPGROUPS = 8
COPIED = ALIGNMENT // 4  # so many float32 are what the copy engine can copy


class Merge:
    """What a merge computes: `reduce(parts)`, by all warpgroups, and `finish(reduced, channels, scalars)`.

    `rounds` are the calls of `Parts.total` in `reduce`, and `exchanged` the most vectors that one of them adds up.
    """

    def __init__(self, reduce, finish, rounds, exchanged):
        self.reduce, self.finish, self.rounds, self.exchanged = reduce, finish, rounds, exchanged


def moments_merge(tiling, blends, eps):
    """The `Merge` of moments, and with `blends` what `merge_moments` says follows from them."""

    def reduce(parts):
        # Each column starts with its own copy of the channel: two columns of a channel may differ in the last bits.
        pivot = parts.pivot()
        (delta,) = parts.total(lambda part, n: [((part[0] - pivot) + part[1]) * (n * (1 / tiling.samples))], 1)

        def squares(part, n):
            return [part[2] + jnp.square(((part[0] - pivot) + part[1]) - delta) * n]

        (square_sum,) = parts.total(squares, 1)
        return pivot, delta, square_sum * (1 / tiling.samples)

    def finish(moments, channels, coefficients):
        if not blends:
            return moments
        new = blend_channels(*moments, *channels[2:], coefficients, times=times)
        rstd = lax.rsqrt(new.norm_var + jnp.float32(eps))
        return moments[0], new.offset, rstd, *moments, new.new_running_mean, new.new_running_var

    return Merge(reduce, finish, 2, 1)


def sums_merge(number, finish):
    """The `Merge` of `number` sums."""
    return Merge(lambda parts: parts.total(lambda part, n: part, number), finish, 1, number)


def times(coefficient, value):
    """`contract.scaled` of a scalar: zero where the coefficient is, whatever the value."""
    coefficient = jnp.broadcast_to(coefficient, value.shape)
    return jnp.where(coefficient == 0, jnp.zeros_like(value), coefficient * value)


class Parts:
    """The partial results of `columns` columns from `start` on, which the warpgroups of a block add up together.

    `partial_ref` are the partial results [groups or units, splits, vectors, width]; `whole` is the group or the unit.
    """

    def __init__(self, tiling, partial_ref, whole, start, columns, warpgroup, exchange):
        self.tiling, self.partial_ref, self.whole = tiling, partial_ref, whole
        self.start, self.columns = start, columns
        self.warpgroup, self.exchange, self.turns = warpgroup, exchange, 0

    def part(self, entry):
        """The vectors of one of the tiling's `entries`, and its split."""
        pl, _ = pallas()
        split, copy = self.tiling.entry(entry)
        here = pl.ds(self.tiling.copy_start(self.start, copy), self.columns)
        return [self.partial_ref[self.whole, split, index, here] for index in range(self.partial_ref.shape[2])], split

    def pivot(self):
        """The first part's first vector."""
        return self.part(jnp.int32(0))[0][0]

    def total(self, terms, number):
        """The sums over all parts of the `number` vectors that `terms(vectors, values per channel)` returns.

        The warpgroups share the parts, in order, and then their sums in the next round of the exchange. To be called
        by all of them.
        """
        turn = self.turns
        self.turns += 1

        def add(_, part, sums):
            vectors, split = part
            return added(sums, terms(vectors, self.tiling.split_rows(split).astype(F32)))

        first, end = share(self.tiling.entries, self.warpgroup, self.exchange.warpgroups)
        sums = unrolled(first, end, self.part, add, zeros(number, self.columns))
        self.exchange.show(turn, self.warpgroup, sums)
        return self.exchange.sums(turn, number)


# --- the launches between two passes --------------------------------------------------------------------------


def merge_moments(tiling, partial, step=None, eps=None):
    """The moments of a stream's partial results, and what follows from them.

    Without `step`, pivot, delta and var [groups, channels]. With it, (arrays of weight, bias, running_mean and
    running_var, the packed coefficients [groups, 6]): first pivot, offset and rstd [groups, width], then the three
    moments, new_running_mean and new_running_var [groups, channels].
    """
    channels, scalars = step if step is not None else ((), ())
    merge, numbers = moments_merge(tiling, step is not None, eps), (0, 3) if step is None else (3, 5)
    return _merge_launch(tiling, "bn_fused_merge_moments", partial, channels, scalars, merge, *numbers)


def merge_sums(tiling, partial, channels, scalars, finish, results_per_column, results_per_channel):
    """What `finish(sums, channels, scalars)` computes from a stream's sums.

    The first results are [groups, width], so many as `results_per_column`, the others [groups, channels].
    """
    merge, numbers = sums_merge(partial.shape[2], finish), (results_per_column, results_per_channel)
    return _merge_launch(tiling, "bn_fused_merge_sums", partial, channels, scalars, merge, *numbers)


def _merge_launch(tiling, name, partial, channels, scalars, merge, results_per_column, results_per_channel):
    """A launch with one block of threads for each 128 columns, whose warpgroups share the partial results.

    A column's result is that of its channel: where rows are folded, the copies of a channel are merged in each block
    that has one of them, so that the next pass reads values per column without anything in between.

    Returns the first `results_per_column` results [groups, width] and the other `results_per_channel` ones [groups,
    channels]: where rows are folded these are cut to size by the copy engine, if it can (multiples of 16 bytes).
    """
    pl, plgpu = pallas()
    t, outputs = tiling, results_per_column + results_per_channel
    cuts = t.fold > 1 and t.channels % COPIED == 0
    widths = [t.width] * results_per_column + [t.channels if cuts else t.width] * results_per_channel
    out_types = [jax.ShapeDtypeStruct((t.groups, width), F32) for width in widths]
    scratch = Exchange.scratch(merge.rounds, MERGE_WARPGROUPS, merge.exchanged, WARPGROUP)
    if cuts:
        scratch.append(plgpu.SMEM((results_per_channel, WARPGROUP), F32))

    def body(partial_ref, *refs):
        take = taker(refs)
        channel_refs, scalar_refs, out_refs = take(len(channels)), take(len(scalars)), take(outputs)
        exchange = Exchange(*take(2))
        (cut,) = take(1) if cuts else (None,)
        warpgroup = lax.axis_index("warpgroup")
        group, block = t.merge_place(lax.axis_index("block"))
        start = t.merge_start(block)
        columns = pl.ds(start, WARPGROUP)
        reduced = merge.reduce(Parts(t, partial_ref, group, start, WARPGROUP, warpgroup, exchange))

        def write_cut(number):
            for index, out_ref in enumerate(out_refs[results_per_column:]):
                there = out_ref.at[group, pl.ds(block * WARPGROUP, number)]
                plgpu.copy_smem_to_gmem(cut.at[index, pl.ds(0, number)], there)

        @pl.when(warpgroup == 0)
        def _():
            values = vectors_of(channel_refs, group, columns)
            results = merge.finish(reduced, values, numbers_of(scalar_refs, group))
            for index, (out_ref, result) in enumerate(zip(out_refs, results, strict=True)):
                if cuts and index >= results_per_column:
                    cut[index - results_per_column] = result
                else:
                    out_ref[group, columns] = result
            if cuts:
                plgpu.commit_smem()
                whole, rest = divmod(t.channels, WARPGROUP)
                if whole:
                    pl.when(block < whole)(lambda: write_cut(WARPGROUP))
                if rest:
                    pl.when(block == whole)(lambda: write_cut(rest))
                plgpu.wait_smem_to_gmem(0)

    kernel = launch(body, name, out_types, scratch, {"block": t.groups * t.merge_blocks}, MERGE_WARPGROUPS)
    results = kernel(partial, *channels, *scalars)
    per_channel = results[results_per_column:]
    return results[:results_per_column], [
        value[:, : t.channels] if value.shape[1] != t.channels else value for value in per_channel
    ]
