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
    Rows,
    added,
    as_fragment,
    launch,
    numbers_of,
    pallas,
    taker,
    vectors_of,
)
from bn_fused.kernels.backends.pallas_gpu.tiles import ALIGNMENT, SPLITS_TOGETHER, SUMS, WARPGROUP, share
from bn_fused.kernels.contract import blend_channels

# Where partial results are merged in a launch of its own, 1024 threads share the work of 128 channels.
MERGE_WARPGROUPS = 8
COPIED = ALIGNMENT // 4  # so many float32 are what the copy engine can copy


class Merge:
    """What a merge computes: `reduce(parts)`, by all warpgroups, and `finish(reduced, channels, scalars)`.

    - `rounds`: the calls of `Parts.total` in `reduce`; `exchanged`: the most vectors that one of them adds up.
    - `finished`: the vectors that `finish` returns. The first `needed` are what the rows are computed with, the last
      `results` are results of the operation; some may be both.
    """

    def __init__(self, reduce, finish, *, rounds, exchanged, finished, needed, results):
        self.reduce, self.finish, self.rounds, self.exchanged = reduce, finish, rounds, exchanged
        self.finished, self.needed, self.results = finished, needed, results


def moments_merge(tiling, blends, eps):
    """The `Merge` of moments: pivot, delta and var.

    With `blends`, which weight, bias, running_mean and running_var and the six coefficients are for: pivot, offset and
    rstd, which are needed, delta, var, new_running_mean and new_running_var; all of them results.
    """

    def reduce(parts):
        # Each column starts with its own copy of the channel: two columns of a channel may differ in the last bits.
        pivot = parts.pivot()
        common = parts.rows.spread(pivot)
        (delta,) = parts.total(lambda part, n: [((part[0] - common) + part[1]) * (n * (1 / tiling.samples))], 1)
        mean = parts.rows.spread(delta)

        def squares(part, n):
            return [part[2] + jnp.square(((part[0] - common) + part[1]) - mean) * n]

        (square_sum,) = parts.total(squares, 1)
        return pivot, delta, square_sum * (1 / tiling.samples)

    def finish(moments, channels, coefficients):
        if not blends:
            return moments
        new = blend_channels(*moments, *channels[2:], coefficients, times=times)
        rstd = lax.rsqrt(new.norm_var + jnp.float32(eps))
        pivot, *others = moments
        return pivot, new.offset, rstd, *others, new.new_running_mean, new.new_running_var

    finished, needed = (7, 3) if blends else (3, 0)
    return Merge(reduce, finish, rounds=2, exchanged=1, finished=finished, needed=needed, results=finished)


def sums_merge(finish, needed):
    """The `Merge` of two sums: `finish` returns the vectors that are needed, and two that are results."""

    def reduce(parts):
        return parts.total(lambda part, n: part, SUMS)

    return Merge(reduce, finish, rounds=1, exchanged=SUMS, finished=needed + SUMS, needed=needed, results=SUMS)


def cut_to(channels, values):
    """Values [groups, width] as [groups, channels]."""
    return [value if value.shape[1] == channels else value[:, :channels] for value in values]


def times(coefficient, value):
    """`contract.scaled` of a scalar: zero where the coefficient is, whatever the value."""
    coefficient = jnp.broadcast_to(coefficient, value.shape)
    return jnp.where(coefficient == 0, jnp.zeros_like(value), coefficient * value)


class Parts:
    """The partial results of `columns` columns from `start` on, which the warpgroups of a block add up together.

    `partial_ref` are the partial results [groups or units, vectors, padded splits, width]; `whole` is the group or the
    unit. They are read as fragments, whose rows are splits.
    """

    def __init__(self, tiling, partial_ref, whole, start, columns, warpgroup, exchange, rows):
        self.tiling, self.partial_ref, self.whole = tiling, partial_ref, whole
        self.start, self.columns = start, columns
        self.warpgroup, self.exchange, self.rows, self.turns = warpgroup, exchange, rows, 0
        self.together = rows.shape[0]

    def pivot(self):
        """The first part's first vector."""
        pl, _ = pallas()
        return self.partial_ref[self.whole, 0, 0, pl.ds(self.start, self.columns)]

    def fragments(self, entry):
        """The fragments of one of the tiling's `entries`, and its first split."""
        pl, _ = pallas()
        first_split, copy = self.tiling.entry(entry, self.together)
        splits, here = pl.ds(first_split, self.together), pl.ds(self.tiling.copy_start(self.start, copy), self.columns)
        vectors = range(self.partial_ref.shape[1])
        values = [as_fragment(self.partial_ref[self.whole, index, splits, here]) for index in vectors]
        return values, first_split

    def total(self, terms, number):
        """The sums over all parts of the `number` values that `terms(values, values per channel)` returns: vectors.

        Terms are fragments. The warpgroups share the parts, in order, and then their sums in the next round of the
        exchange. To be called by all of them.
        """
        turn = self.turns
        self.turns += 1

        def add(entry, sums):
            values, first_split = self.fragments(entry)
            split = first_split + self.rows.number()
            there = split < self.tiling.splits
            new = terms(values, self.tiling.split_rows(split).astype(F32))
            return added(sums, [jnp.where(there, term, jnp.zeros_like(term)) for term in new])

        first, end = share(self.tiling.entries(self.together), self.warpgroup, self.exchange.warpgroups)
        sums = lax.fori_loop(first, end, add, self.rows.zeros(number))
        self.exchange.show(turn, self.warpgroup, [self.rows.sum(total) for total in sums])
        return self.exchange.sums(turn, number)


# --- the launches between two passes --------------------------------------------------------------------------


def merge_moments(tiling, partial, step=None, eps=None):
    """What `moments_merge` computes of a stream's partial results.

    With `step`, (arrays of weight, bias, running_mean and running_var, the packed coefficients [groups, 6]), it blends.
    """
    channels, scalars = step if step is not None else ((), ())
    merge = moments_merge(tiling, step is not None, eps)
    return _merge_launch(tiling, "bn_fused_merge_moments", partial, channels, scalars, merge)


def merge_sums(tiling, partial, channels, scalars, merge):
    """What a `sums_merge` computes of a stream's sums."""
    return _merge_launch(tiling, "bn_fused_merge_sums", partial, channels, scalars, merge)


def _merge_launch(tiling, name, partial, channels, scalars, merge):
    """A launch with one block of threads for each 128 columns, whose warpgroups share the partial results.

    A column's result is that of its channel: where rows are folded, the copies of a channel are merged in each block
    that has one of them, so that the next pass reads values per column without anything in between.

    Returns the vectors that the next pass needs, [groups, width], and the results [groups, channels]: where rows are
    folded these are cut to size by the copy engine, if it can (multiples of 16 bytes), and by XLA otherwise.
    """
    pl, plgpu = pallas()
    t = tiling
    cuts = t.fold > 1 and t.channels % COPIED == 0
    whole, cut_out = (merge.needed, merge.results) if cuts else (merge.finished, 0)
    out_types = [jax.ShapeDtypeStruct((t.groups, t.width), F32)] * whole
    out_types += [jax.ShapeDtypeStruct((t.groups, t.channels), F32)] * cut_out
    scratch = Exchange.scratch(merge.rounds, MERGE_WARPGROUPS, merge.exchanged, WARPGROUP)
    scratch.append(Rows.scratch(MERGE_WARPGROUPS, SPLITS_TOGETHER, WARPGROUP))
    if cuts:
        scratch.append(plgpu.SMEM((cut_out, WARPGROUP), F32))

    def body(partial_ref, *refs):
        take = taker(refs)
        channel_refs, scalar_refs = take(len(channels)), take(len(scalars))
        whole_refs, cut_out_refs = take(whole), take(cut_out)
        exchange, (rows_memory,) = Exchange(*take(2)), take(1)
        (cut,) = take(1) if cuts else (None,)
        warpgroup = lax.axis_index("warpgroup")
        group, block = t.merge_place(lax.axis_index("block"))
        start = t.merge_start(block)
        columns = pl.ds(start, WARPGROUP)
        rows = Rows(rows_memory, warpgroup)
        reduced = merge.reduce(Parts(t, partial_ref, group, start, WARPGROUP, warpgroup, exchange, rows))

        def write_cut(number):
            for index, out_ref in enumerate(cut_out_refs):
                there = out_ref.at[group, pl.ds(block * WARPGROUP, number)]
                plgpu.copy_smem_to_gmem(cut.at[index, pl.ds(0, number)], there)

        @pl.when(warpgroup == 0)
        def _():
            values = vectors_of(channel_refs, group, columns)
            finished = merge.finish(reduced, values, numbers_of(scalar_refs, group))
            for out_ref, value in zip(whole_refs, finished[:whole], strict=True):
                out_ref[group, columns] = value
            if cuts:
                for index, value in enumerate(finished[-cut_out:]):
                    cut[index] = value
                plgpu.commit_smem()
                full_blocks, rest = divmod(t.channels, WARPGROUP)
                if full_blocks:
                    pl.when(block < full_blocks)(lambda: write_cut(WARPGROUP))
                if rest:
                    pl.when(block == full_blocks)(lambda: write_cut(rest))
                plgpu.wait_smem_to_gmem(0)

    kernel = launch(body, name, out_types, scratch, {"block": t.groups * t.merge_blocks}, MERGE_WARPGROUPS)
    written = kernel(partial, *channels, *scalars)
    return written[: merge.needed], cut_to(t.channels, written[-merge.results :])
