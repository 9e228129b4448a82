"""The kernels of the backend `pallas_gpu`, written with Pallas Mosaic GPU: a stream over the rows, and two merges.

`stream` is every pass over arrays of x's size: the moments' sums, the normalisation, the backward's sums and its
gradients differ only in the function of one row that they give it. `merge_moments` and `merge_sums` are launches of
O(channels) between two passes: they add up what the blocks found and compute the values per channel that the second
pass needs.

How a stream keeps the memory busy on a Hopper GPU:

- One block of threads for each multiprocessor, of up to four warpgroups. Each warpgroup has its own range of rows, its
  own ring of tiles in shared memory, which the copy engine (TMA) fills, and its own barriers: no warpgroup ever waits
  for another one until the end. With three tiles in each ring a multiprocessor has 150 to 190 KiB in flight; 30 KiB
  would do at the memory's unloaded latency.
- A tile's row is 256 (or 128) columns, and each thread owns two (or one) of them: it adds up its columns in registers,
  without exchange between threads, and a warp reads 128 or 256 consecutive bytes of shared memory at a time, without
  bank conflicts. Eight rows are read before the first is used.
- Results leave from registers, by stores of 128 or 256 consecutive bytes a warp.
- The automatic barriers around every load and store are off. What they protect is protected here: a slot of the ring
  is filled again only after all threads of its warpgroup have read it (`commit_smem` has the barrier and the fence
  towards the copy engine), and nothing but the copy engine writes there.
- The sums are added up tile by tile and then warpgroup by warpgroup in a fixed order: two runs give the same bits.

Row and column numbers are 32-bit integers, which are multiplied to addresses in 64 bits: an array may have more than
2^31 elements as long as it has fewer rows and channels than that.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu.plan import COPIED, MERGE_WARPGROUPS, UNROLL, WARPGROUP
from bn_fused.kernels.contract import blend_channels

F32 = jnp.float32


def _pallas():
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl, plgpu


def _launch(body, name, out_types, scratch, grid, warpgroups):
    _, plgpu = _pallas()
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def _div(dividend, divisor):
    """Of 32-bit integers that are not negative, also where JAX's default integers have 64."""
    return lax.div(dividend, jnp.int32(divisor))


def _rem(dividend, divisor):
    return lax.rem(dividend, jnp.int32(divisor))


def _finite_or_zero(value):
    return jnp.where(jnp.abs(value) < jnp.inf, value, jnp.zeros_like(value))


def variance_sum(square_sum, total, mean):
    """square_sum - total * mean, at least 0: the sum of squares about the mean; `jnp_backend` has the same guard."""
    correction = total * mean
    # Two selections, because Mosaic has no logic on vectors of bool.
    unless_overflow = jnp.where(jnp.abs(mean) < jnp.inf, jnp.zeros_like(mean), correction)
    correction = jnp.where(jnp.abs(correction) < jnp.inf, correction, unless_overflow)
    return jnp.maximum(square_sum - correction, jnp.zeros_like(mean))


# --- the pass over rows ---------------------------------------------------------------------------------------


def stream(tiling, name, arrays, channels, scalars, row, *, sums=0, outputs=0, moments=False, reverse=False):
    """One pass over arrays [groups, rows, width], read once, each by the same tiles.

    - `channels`: arrays [groups, width], or several in one, [groups, number, width]; `scalars`: arrays [groups] and
      [groups, number]. All float32.
    - `row(values, channels, scalars)`: of a row's values (float32 vectors of the block's columns, one for each array),
      the block's vectors of `channels` and the group's `scalars`, returns `sums` vectors to add up and `outputs`
      vectors to store.
    - `moments`: `row` gets the pivot in addition, as the last of `channels`: the mean of the worker's first tile.
    - `reverse`: walks through each worker's tiles from the last one to the first, and through the blocks in the same
      way, so that it begins with what the pass before it read last and L2 still holds.

    Returns the tuple of the outputs [groups, rows, width] in the first array's dtype and, where there are sums, their
    partial results [groups, splits, sums, padded width]; for moments, pivot, delta and the squares about the mean.
    """
    pl, plgpu = _pallas()
    t, inputs = tiling, len(arrays)
    slots, vector = t.warpgroups * t.stages, (t.columns,)
    kept = 3 if moments else sums
    dtype = arrays[0].dtype
    out_types = [jax.ShapeDtypeStruct((t.groups, t.rows, t.width), dtype)] * outputs
    if sums:
        out_types.append(jax.ShapeDtypeStruct((t.groups, t.splits, kept, t.padded_width), F32))
    scratch = [plgpu.SMEM((slots, t.tile_rows, t.columns), array.dtype) for array in arrays]
    scratch.append(plgpu.Barrier(num_arrivals=inputs, num_barriers=slots))
    if sums:
        scratch.append(plgpu.SMEM((t.warpgroups, kept, t.columns), F32))
        scratch.append(plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=1))
    base_rows, extra_rows = divmod(t.rows, t.workers)

    def body(*refs):
        take = _taker(refs)
        array_refs, channel_refs, scalar_refs = take(inputs), take(len(channels)), take(len(scalars))
        out_refs, (partial_ref,) = take(outputs), take(1 if sums else 0) or (None,)
        rings, (filled,) = take(inputs), take(1)
        (exchange, arrived) = take(2) if sums else (None, None)

        block = lax.axis_index("block")
        block = t.grid - 1 - block if reverse else block
        split, rest = _rem(block, t.splits), _div(block, t.splits)
        column_block, group = _rem(rest, t.blocks), _div(rest, t.blocks)
        columns = pl.ds(jnp.minimum(column_block * t.columns, t.width - t.columns), t.columns)
        warpgroup = lax.axis_index("warpgroup")
        worker = split * t.warpgroups + warpgroup
        start = worker * base_rows + jnp.minimum(worker, extra_rows)
        rows = base_rows + (worker < extra_rows).astype(jnp.int32)
        tiles = _div(rows + (t.tile_rows - 1), t.tile_rows)
        first_slot = warpgroup * t.stages

        def place(step):
            """The tile of a step: its first row of the array, and the rows to skip that another tile has."""
            index = tiles - 1 - step if reverse else step
            moved = jnp.minimum(index * t.tile_rows, rows - t.tile_rows)
            return start + moved, index * t.tile_rows - moved

        def slot_of(step):
            return first_slot + _rem(step, t.stages)

        def fetch(step):
            first_row, _ = place(step)
            slot = slot_of(step)
            for array_ref, ring in zip(array_refs, rings, strict=True):
                tile = array_ref.at[group, pl.ds(first_row, t.tile_rows), columns]
                plgpu.copy_gmem_to_smem(tile, ring.at[slot], filled.at[slot])

        def zeros():
            return jnp.zeros(vector, F32)

        for step in range(t.stages):
            pl.when(step < tiles)(functools.partial(fetch, jnp.int32(step)))
        per_channel = _vectors(channel_refs, group, columns)
        per_group = _numbers(scalar_refs, group)
        plgpu.barrier_wait(filled.at[slot_of(jnp.int32(0))])
        if moments:
            slot = slot_of(jnp.int32(0))
            first = _unrolled(
                0, t.tile_rows, lambda i: rings[0][slot, i].astype(F32), lambda i, value, total: total + value, zeros()
            )
            per_channel.append(_finite_or_zero(first * (1 / t.tile_rows)))

        def one_tile(step, totals):
            slot = slot_of(step)
            first_row, skipped = place(step)

            def load(i):
                return [ring[slot, i].astype(F32) for ring in rings]

            def one_row(i, values, partial):
                terms, results = row(values, per_channel, per_group)
                for out_ref, result in zip(out_refs, results, strict=True):
                    out_ref[group, first_row + i, columns] = result.astype(dtype)
                return tuple(a + b for a, b in zip(partial, terms, strict=True))

            partial = _unrolled(skipped, t.tile_rows, load, one_row, tuple(zeros() for _ in range(sums)))
            plgpu.commit_smem()  # all threads of the warpgroup have read the tile
            pl.when(step + t.stages < tiles)(lambda: fetch(step + t.stages))
            pl.when(step + 1 < tiles)(lambda: plgpu.barrier_wait(filled.at[slot_of(step + 1)]))
            return tuple(a + b for a, b in zip(totals, partial, strict=True))

        totals = lax.fori_loop(jnp.int32(0), tiles, one_tile, tuple(zeros() for _ in range(sums)))
        if not sums:
            return
        if moments:
            (total, square_sum), number = totals, rows.astype(F32)
            delta = total / number
            totals = per_channel[-1], delta, variance_sum(square_sum, total, delta)
        for index, value in enumerate(totals):
            exchange[warpgroup, index] = value
        plgpu.commit_smem()
        plgpu.barrier_arrive(arrived.at[0])
        plgpu.barrier_wait(arrived.at[0])

        @pl.when(warpgroup == 0)
        def _():
            if moments:
                numbers = [
                    (base_rows + (split * t.warpgroups + w < extra_rows).astype(jnp.int32)).astype(F32)
                    for w in range(t.warpgroups)
                ]
                merged = _merge([[exchange[w, i] for i in range(3)] for w in range(t.warpgroups)], numbers)
            else:
                merged = [functools.reduce(jnp.add, [exchange[w, i] for w in range(t.warpgroups)]) for i in range(kept)]
            for index, value in enumerate(merged):
                partial_ref[group, split, index, columns] = value
            if t.fold > 1:

                @pl.when(column_block == 0)
                def _():
                    for index, value in enumerate(merged):
                        partial_ref[group, split, index, pl.ds(t.width, t.columns)] = value

    kernel = _launch(body, name, out_types, scratch, t.grid, t.warpgroups)
    return kernel(*arrays, *channels, *scalars)


def _taker(refs):
    remaining = iter(refs)
    return lambda number: tuple(next(remaining) for _ in range(number))


def _vectors(refs, group, columns):
    """The vectors of arrays [groups, width] and [groups, number, width], in order."""
    found = []
    for ref in refs:
        several = [ref.at[group, index] for index in range(ref.shape[1])] if len(ref.shape) == 3 else [ref.at[group]]
        found += [one[columns] for one in several]
    return found


def _numbers(refs, group):
    """The numbers of a group in arrays [groups] and [groups, number], in order."""
    found = []
    for ref in refs:
        found += [ref[group, index] for index in range(ref.shape[1])] if len(ref.shape) == 2 else [ref[group]]
    return found


def _unrolled(start, stop, load, use, carry):
    """fori_loop over [start, stop) of carry = use(i, load(i), carry): `UNROLL` loads, then their use; the rest singly."""
    start, stop = jnp.int32(start), jnp.int32(stop)
    groups = _div(stop - start, UNROLL)

    def several(index, carry):
        indices = [start + index * UNROLL + offset for offset in range(UNROLL)]
        loaded = [load(i) for i in indices]
        for i, values in zip(indices, loaded, strict=True):
            carry = use(i, values, carry)
        return carry

    carry = lax.fori_loop(jnp.int32(0), groups, several, carry)
    return lax.fori_loop(start + groups * UNROLL, stop, lambda i, carry: use(i, load(i), carry), carry)


def _merge(parts, numbers):
    """Moments (pivot, delta, squares about the mean) of parts with these numbers of values, as those of the whole.

    About the first part's pivot; Chan, Golub & LeVeque, The American Statistician 37, 1983.
    """
    pivot = parts[0][0]
    total = functools.reduce(jnp.add, numbers)
    offsets = [(part_pivot - pivot) + delta for part_pivot, delta, _ in parts]
    delta = functools.reduce(jnp.add, [offset * (n / total) for offset, n in zip(offsets, numbers, strict=True)])
    squares = [
        part[2] + jnp.square(offset - delta) * n for part, offset, n in zip(parts, offsets, numbers, strict=True)
    ]
    return pivot, delta, functools.reduce(jnp.add, squares)


# --- the launches between two passes --------------------------------------------------------------------------


def _merge_launch(tiling, name, partial, channels, scalars, merge, wide, exact):
    """A launch with one block of threads for each 128 columns, whose warpgroups share the partial results.

    A column's result is that of its channel: where rows are folded, the copies of a channel are merged in each block
    that has one of them, so that the next pass reads values per column without anything in between.

    Returns the first `wide` results per column [groups, width] and the other `exact` ones per channel [groups,
    channels]: where rows are folded these are cut to size by the copy engine, if it can (multiples of 16 bytes).
    """
    pl, plgpu = _pallas()
    t, warpgroups = tiling, MERGE_WARPGROUPS
    entries = t.splits * t.fold
    base_rows, extra_rows = divmod(t.rows, t.workers)
    widest = partial.shape[2]
    cuts = t.fold > 1 and t.channels % COPIED == 0
    widths = [t.width] * wide + [t.channels if cuts else t.width] * exact
    out_types = [jax.ShapeDtypeStruct((t.groups, width), F32) for width in widths]
    scratch = [
        plgpu.SMEM((merge.rounds, warpgroups, merge.exchanged, WARPGROUP), F32),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=merge.rounds),
    ]
    if cuts:
        scratch.append(plgpu.SMEM((exact, WARPGROUP), F32))

    def body(partial_ref, *refs):
        take = _taker(refs)
        channel_refs, scalar_refs, out_refs = take(len(channels)), take(len(scalars)), take(wide + exact)
        exchange, arrived = take(2)
        (cut,) = take(1) if cuts else (None,)
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        group, column_block = _div(block, t.merge_blocks), _rem(block, t.merge_blocks)
        start = jnp.minimum(column_block * WARPGROUP, t.width - WARPGROUP)
        columns = pl.ds(start, WARPGROUP)

        def part(entry):
            split, copy = _div(entry, t.fold), _rem(entry, t.fold)
            here = pl.ds(_rem(start + copy * t.channels, t.width), WARPGROUP)
            return [partial_ref[group, split, index, here] for index in range(widest)], split

        def weight(split):
            """Values per channel that the split's part stands for."""
            more = jnp.clip(extra_rows - split * t.warpgroups, 0, t.warpgroups)
            return (base_rows * t.warpgroups + more).astype(F32)

        vector = (WARPGROUP,)
        total = summation(part, weight, entries, warpgroup, warpgroups, exchange, arrived, vector)

        def write_cut(number):
            for index, out_ref in enumerate(out_refs[wide:]):
                there = out_ref.at[group, pl.ds(column_block * WARPGROUP, number)]
                plgpu.copy_smem_to_gmem(cut.at[index, pl.ds(0, number)], there)

        # Each column starts with its own copy of the channel: two columns of a channel may differ in the last bits.
        reduced = merge.reduce(total, part(jnp.int32(0))[0][0])

        @pl.when(warpgroup == 0)
        def _():
            values = _vectors(channel_refs, group, columns)
            results = merge.finish(reduced, values, _numbers(scalar_refs, group))
            for index, (out_ref, result) in enumerate(zip(out_refs, results, strict=True)):
                if cuts and index >= wide:
                    cut[index - wide] = result
                else:
                    out_ref[group, columns] = result
            if cuts:
                plgpu.commit_smem()
                whole, rest = divmod(t.channels, WARPGROUP)
                if whole:
                    pl.when(column_block < whole)(lambda: write_cut(WARPGROUP))
                if rest:
                    pl.when(column_block == whole)(lambda: write_cut(rest))
                plgpu.wait_smem_to_gmem(0)

    kernel = _launch(body, name, out_types, scratch, t.groups * t.merge_blocks, warpgroups)
    found = kernel(partial, *channels, *scalars)
    return found[:wide], [value[:, : t.channels] if value.shape[1] != t.channels else value for value in found[wide:]]


def summation(part, weight, entries, warpgroup, warpgroups, exchange, arrived, vector):
    """The function `total(terms, number)`: the sums over all parts of the vectors that `terms(values, weight)` returns.

    The warpgroups of a block share the parts, in order: of each, `part(entry)` returns the values and the number of
    its split, and `weight(split)` the values per channel that it stands for. What they find goes through `exchange`,
    by its next round and the next of the barriers `arrived`. The function is to be called by all of them.
    """
    _, plgpu = _pallas()
    turns = iter(range(exchange.shape[0]))

    def total(terms, number):
        turn = next(turns)

        def add(_, found, sums):
            values, split = found
            return tuple(a + b for a, b in zip(sums, terms(values, weight(split)), strict=True))

        zeros = tuple(jnp.zeros(vector, F32) for _ in range(number))
        first, end = (_div((warpgroup + more) * entries, warpgroups) for more in (0, 1))
        sums = _unrolled(first, end, part, add, zeros)
        for index, value in enumerate(sums):
            exchange[turn, warpgroup, index] = value
        plgpu.commit_smem()
        plgpu.barrier_arrive(arrived.at[turn])
        plgpu.barrier_wait(arrived.at[turn])
        return [
            functools.reduce(jnp.add, [exchange[turn, w, index] for w in range(warpgroups)]) for index in range(number)
        ]

    return total


class Merge:
    """What a merge computes: `reduce(total, first_pivot)`, by all warpgroups, and `finish(reduced, channels, scalars)`.

    `rounds` are the calls of `total` in `reduce`, and `exchanged` the most vectors that one of them adds up.
    """

    def __init__(self, reduce, finish, rounds, exchanged):
        self.reduce, self.finish, self.rounds, self.exchanged = reduce, finish, rounds, exchanged


def merge_moments(tiling, partial, step=None, eps=None):
    """The moments of a stream's partial results, and what follows from them.

    Without `step`, pivot, delta and var [groups, channels]. With it, (arrays of weight, bias, running_mean and
    running_var, the packed coefficients [groups, 6]): first pivot, offset and rstd [groups, width], then the three moments,
    new_running_mean and new_running_var [groups, channels].
    """
    channels, scalars = step if step is not None else ((), ())
    merge, (wide, exact) = moments_merge(tiling, step is not None, eps), (0, 3) if step is None else (3, 5)
    return _merge_launch(tiling, "bn_fused_merge_moments", partial, channels, scalars, merge, wide, exact)


def moments_merge(tiling, blends, eps):
    """The `Merge` of moments, and with `blends` what `merge_moments` says follows from them."""

    def reduce(total, pivot):
        (delta,) = total(lambda part, n: [((part[0] - pivot) + part[1]) * (n * (1 / tiling.samples))], 1)

        def squares(part, n):
            return [part[2] + jnp.square(((part[0] - pivot) + part[1]) - delta) * n]

        (square_sum,) = total(squares, 1)
        return pivot, delta, square_sum * (1 / tiling.samples)

    def finish(moments, channels, coefficients):
        if not blends:
            return moments
        new = blend_channels(*moments, *channels[2:], coefficients, times=times)
        rstd = lax.rsqrt(new.norm_var + jnp.float32(eps))
        return moments[0], new.offset, rstd, *moments, new.new_running_mean, new.new_running_var

    return Merge(reduce, finish, 2, 1)


def merge_sums(tiling, partial, channels, scalars, finish, wide, exact):
    """What `finish(sums, channels, scalars)` computes from a stream's sums: the first `wide` results [groups, width],
    the other `exact` ones [groups, channels].
    """
    merge = sums_merge(partial.shape[2], finish)
    return _merge_launch(tiling, "bn_fused_merge_sums", partial, channels, scalars, merge, wide, exact)


def sums_merge(number, finish):
    """The `Merge` of `number` sums."""
    return Merge(lambda total, _: total(lambda part, n: part, number), finish, 1, number)


def times(coefficient, value):
    """`contract.scaled` of a scalar: zero where the coefficient is, whatever the value."""
    coefficient = jnp.broadcast_to(coefficient, value.shape)
    return jnp.where(coefficient == 0, jnp.zeros_like(value), coefficient * value)
