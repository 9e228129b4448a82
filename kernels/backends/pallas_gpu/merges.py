"""How the kernels of the backend `pallas_gpu` merge the partial results of their blocks.

A `Merge` is what is computed of them, per channel; `Parts` are the partial results as the warpgroups of a block add
them up. A kernel of one launch does that itself. Between the passes of streams, `merge_moments` and `merge_sums` are
launches of O(channels) that do it and compute the values per channel that the second pass needs.
"""

import functools

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
    or_zero,
    pallas,
    taker,
    vectors_of,
    when,
)
from bn_fused.kernels.backends.pallas_gpu.tiles import ALIGNMENT, SPLITS_TOGETHER, SUMS, WARPGROUP, minimum, one_if
from bn_fused.kernels.contract import blend_channels

# Where partial results are merged in a launch of its own, so many warpgroups share the work of 128 columns.
MERGE_WARPGROUPS = 4
# Fragments of partial results that a warpgroup keeps in registers, or waits for at the same time: 12 of each thread's.
HELD = 4
COPIED = ALIGNMENT // 4  # so many float32 are what the copy engine can copy


class Merge:
    """What a merge computes: `reduce(parts)`, by all warpgroups, and `finish(reduced, channels, scalars)`.

    - `condense`: what makes one of a warpgroup's own parts: how many fragments its state has, which are zero at first,
      and the functions `add(state, parts)`, each of them (values, number), and `end(state)`: such a part.
    - `rounds`: the calls of `Parts.total` in `reduce`; `exchanged`: the most vectors that one of them adds up.
    - `finished`: the vectors that `finish` returns. The first `needed` are what the rows are computed with, the last
      `results` are results of the operation; some may be both.
    """

    def __init__(self, reduce, finish, condense, *, rounds, exchanged, finished, needed, results):
        self.reduce, self.finish, self.condense, self.rounds, self.exchanged = (
            reduce, finish, condense, rounds, exchanged,
        )  # fmt: skip
        self.finished, self.needed, self.results = finished, needed, results


def moments_merge(tiling, blends, eps):
    """The `Merge` of moments: pivot, delta and var.

    With `blends`, which weight, bias, running_mean and running_var and the six coefficients are for: pivot, offset and
    rstd, which are needed, delta, var, new_running_mean and new_running_var; all of them results.
    """

    def reduce(parts):
        # Each column starts with its own copy of the channel: two columns of a channel may differ in the last bits.
        pivot = parts.pivot
        (common,) = parts.rows.spread([pivot])
        (delta,) = parts.total(lambda part, n: [((part[0] - common) + part[1]) * (n * (1 / tiling.samples))], 1)
        (mean,) = parts.rows.spread([delta])

        def squares(part, n):
            # Where there is no part the square may be infinite, and infinity times zero is no number.
            return [or_zero(n > 0, part[2] + jnp.square(((part[0] - common) + part[1]) - mean) * n)]

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
    condense = 4, _add_moments, _end_moments
    return Merge(
        reduce, finish, condense, rounds=2, exchanged=1, finished=finished, needed=needed, results=finished
    )  # fmt: skip


# The moments of many parts, some at a time: Chan, Golub & LeVeque, The American Statistician 37, 1983. About the pivot
# of the first that counts: sums about it, corrected in the end, would lose digits where that one lies far off.


def _add_moments(state, parts):
    pivot, count, delta, squares = state
    all_count = count
    for (part_pivot, *_), number in parts:
        pivot, all_count = lax.select(all_count > 0, pivot, part_pivot), all_count + number
    start = or_zero(lax.abs(delta) < jnp.inf, delta)  # an infinite one stays as it is
    offsets = [
        or_zero(number > 0, ((part_pivot - pivot) + part_delta) - start)
        for (part_pivot, part_delta, _), number in parts
    ]
    numbers = [number for _, number in parts]
    new = functools.reduce(jnp.add, numbers)
    reciprocal = 1 / lax.max(new * all_count, jnp.ones_like(new))
    weighted = [offset * number for offset, number in zip(offsets, numbers, strict=True)]
    mean = functools.reduce(jnp.add, weighted) * (reciprocal * all_count)
    change = mean * (new * (new * reciprocal))
    for offset, ((*_, part_squares), number) in zip(offsets, parts, strict=True):
        squares = squares + (part_squares + or_zero(number > 0, (offset - mean) * (offset - mean) * number))
    return pivot, all_count, delta + change, squares + mean * change * count


def _end_moments(state):
    pivot, count, delta, squares = state
    return (pivot, delta, squares), count


def sums_merge(finish, needed):
    """The `Merge` of two sums: `finish` returns the vectors that are needed, and two that are results."""

    def reduce(parts):
        return parts.total(lambda part, n: part, SUMS)

    def add(state, parts):
        return functools.reduce(added, [values for values, _ in parts], state)

    condense = SUMS, add, lambda state: (state, None)
    return Merge(
        reduce, finish, condense, rounds=1, exchanged=SUMS, finished=needed + SUMS, needed=needed, results=SUMS
    )  # fmt: skip


class Results:
    """How a kernel writes results per channel, vectors of its columns, as arrays [groups, channels].

    Where rows are folded, the columns that are the first copy of a channel are written by the copy engine, if it can
    (multiples of 16 bytes), and cut out by XLA otherwise.
    """

    def __init__(self, tiling, columns):
        self.tiling, self.columns = tiling, columns
        self.cuts = tiling.fold > 1 and tiling.channels % COPIED == 0
        self.width = tiling.channels if self.cuts else tiling.width

    def types(self, number):
        """The types of so many results."""
        return [jax.ShapeDtypeStruct((self.tiling.groups, self.width), F32)] * number

    def write(self, refs, vectors, group, start, block, rows):
        """By one warpgroup, with its `Rows`: the vectors of the columns from `start` on, the block of this number."""
        pl, plgpu = pallas()
        if not self.cuts:
            for ref, vector in zip(refs, vectors, strict=True):
                ref[group, pl.ds(start, self.columns)] = vector
            return
        full_blocks, rest = divmod(self.tiling.channels, self.columns)

        def write(number):
            def copy(ref, memory):
                there = ref.at[group, pl.ds(block * self.columns, number)]
                plgpu.copy_smem_to_gmem(memory.at[pl.ds(0, number)], there)

            rows.copy_out(refs, vectors, copy)

        if full_blocks:
            when(block < full_blocks)(lambda: write(self.columns))
        if rest:
            when(block == full_blocks)(lambda: write(rest))

    def cut(self, values):
        """What was written, as [groups, channels]."""
        channels = self.tiling.channels
        return [value if value.shape[1] == channels else value[:, :channels] for value in values]


def times(coefficient, value):
    """`contract.scaled` of a scalar: zero where the coefficient is, whatever the value."""
    coefficient = lax.broadcast(coefficient, value.shape)
    return or_zero(coefficient != 0, coefficient * value)


class Parts:
    """The partial results of `columns` columns from `start` on, which the warpgroups of a block add up together.

    `partial_ref` are the partial results [groups or units, vectors, padded splits, width]; `whole` is the group or the
    unit. They are read as fragments, whose rows are splits, and once: the warpgroups take them in turn, and each keeps
    its own in registers, or, if there are more than `HELD`, what `Merge.condense` makes of them.
    """

    def __init__(self, tiling, partial_ref, whole, start, columns, merge, warpgroup, exchange, rows):
        self.tiling, self.partial_ref, self.whole = tiling, partial_ref, whole
        self.start, self.columns, self.merge = start, columns, merge
        self.warpgroup, self.exchange, self.rows, self.turns = warpgroup, exchange, rows, 0
        pl, _ = pallas()
        self.pivot = partial_ref[whole, 0, 0, pl.ds(start, columns)]  # the first part's
        mine = -(-tiling.entries(rows.shape[0]) // exchange.warpgroups)
        self.held = [self._load(index) for index in range(mine)] if mine <= HELD else [self._condensed(mine)]

    def _load(self, index):
        """One of the warpgroup's fragments of parts: the values, and the number of values that each row stands for."""
        pl, _ = pallas()
        t, together = self.tiling, self.rows.shape[0]
        entry = index * self.exchange.warpgroups + self.warpgroup
        first_split, copy = t.entry(minimum(entry, t.entries(together) - 1), together)
        splits, here = pl.ds(first_split, together), pl.ds(t.copy_start(self.start, copy), self.columns)
        vectors = range(self.partial_ref.shape[1])
        values = [as_fragment(self.partial_ref[self.whole, vector, splits, here]) for vector in vectors]
        split = first_split + self.rows.number()
        number = jnp.broadcast_to(t.part_values(split), self.rows.shape).astype(F32)
        if isinstance(entry, int) and first_split + together <= t.splits:
            return values, number
        # What is not there is memory that nobody wrote.
        counts = split < one_if(entry < t.entries(together)) * t.splits
        *values, number = (or_zero(counts, value) for value in (*values, number))
        return values, number

    def _condensed(self, number):
        """One in place of so many fragments of parts."""
        fragments, add, end = self.merge.condense

        def several(turn, state):
            return add(state, [self._load(turn * HELD + index) for index in range(HELD)])

        return end(lax.fori_loop(jnp.int32(0), jnp.int32(-(-number // HELD)), several, self.rows.zeros(fragments)))

    def total(self, terms, number):
        """The sums over all parts of the `number` values that `terms(values, values per channel)` returns: vectors.

        Terms are fragments. To be called by all warpgroups, which add up their sums in the next round of the exchange.
        """
        turn = self.turns
        self.turns += 1
        sums = functools.reduce(added, [terms(*held) for held in self.held])
        self.exchange.show(turn, self.warpgroup, self.rows.sums(sums))
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

    Returns the vectors that the next pass needs, [groups, width], and the results [groups, channels].
    """
    pl, _ = pallas()
    t, results = tiling, Results(tiling, WARPGROUP)
    # Results that the next pass needs are written once, unless they are cut.
    whole, written = (merge.needed, merge.results) if results.cuts else (0, merge.finished)
    out_types = [*[jax.ShapeDtypeStruct((t.groups, t.width), F32)] * whole, *results.types(written)]
    scratch = Exchange.scratch(merge.rounds, MERGE_WARPGROUPS, merge.exchanged, WARPGROUP)
    scratch.append(Rows.scratch(MERGE_WARPGROUPS, SPLITS_TOGETHER, WARPGROUP))

    def body(partial_ref, *refs):
        take = taker(refs)
        channel_refs, scalar_refs = take(len(channels)), take(len(scalars))
        whole_refs, result_refs = take(whole), take(written)
        exchange, (rows_memory,) = Exchange(*take(2)), take(1)
        warpgroup = lax.axis_index("warpgroup")
        group, block = t.merge_place(lax.axis_index("block"))
        start = t.merge_start(block)
        columns = pl.ds(start, WARPGROUP)
        rows = Rows(rows_memory, warpgroup)
        parts = Parts(t, partial_ref, group, start, WARPGROUP, merge, warpgroup, exchange, rows)
        reduced = merge.reduce(parts)

        @when(warpgroup == 0)
        def _():
            values = vectors_of(channel_refs, group, columns)
            finished = merge.finish(reduced, values, numbers_of(scalar_refs, group))
            for ref, vector in zip(whole_refs, finished[:whole], strict=True):
                ref[group, columns] = vector
            results.write(result_refs, finished[-written:], group, start, block, rows)

    kernel = launch(body, name, out_types, scratch, {"block": t.groups * t.merge_blocks}, MERGE_WARPGROUPS)
    found = kernel(partial, *channels, *scalars)
    return found[: merge.needed], results.cut(found[-merge.results :])
