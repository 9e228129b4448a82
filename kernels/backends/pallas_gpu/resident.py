"""The kernel of the backend `pallas_gpu` that reads its arrays once: it keeps them in shared memory.

`resident` is one launch for a whole forward or backward. Each block of threads has a range of rows of a block of
columns (the part of a *unit*, see `resident_plan.Resident`), and does in order:

1. The copy engine brings its part into shared memory; as the tiles arrive, each thread adds up its columns.
2. The warpgroups merge what they found, and the block writes it to global memory: its partial result.
3. All blocks of the unit wait for each other: see `barrier`, also for why they do not wait for ever.
4. Each block merges the partial results of all of them, in the same order, and so with the same bits, and computes the
   values per channel: blend, scale and shift. One block writes those that are results.
5. Each block computes its rows from shared memory and writes them. As soon as a tile is used, the copy engine brings
   the same rows of the block's next unit, so that a large array passes through the chip slab after slab.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu import barrier as barriers
from bn_fused.kernels.backends.pallas_gpu.block import (
    F32,
    Exchange,
    Worker,
    added,
    launch,
    numbers_of,
    pallas,
    taker,
    vectors_of,
    write_row,
    zeros,
)
from bn_fused.kernels.backends.pallas_gpu.merges import Parts, cut_to
from bn_fused.kernels.backends.pallas_gpu.tiles import MOMENTS


def resident(tiling, name, arrays, channels, scalars, sum_row, merge, result_row, *, sums, outputs, moments=False):
    """A whole operation on arrays [groups, rows, width] in one launch, which reads each of them once.

    - `channels`, `scalars`, `moments`: as of `stream`.
    - `sum_row(values, channels, scalars)`: of a row's values, the `sums` vectors to add up.
    - `merge`: a `Merge` of the partial results.
    - `result_row(values, merged, channels, scalars)`: of a row's values and the vectors of the merge that are needed,
      `outputs` vectors.

    Returns the tuple of the outputs [groups, rows, width], and that of the results per channel [groups, channels].
    """
    pl, plgpu = pallas()
    t, inputs = tiling, len(arrays)
    vectors = MOMENTS if moments else sums
    out_types = [jax.ShapeDtypeStruct((t.groups, t.rows, t.width), arrays[0].dtype)] * outputs
    out_types += [jax.ShapeDtypeStruct((t.groups, t.width), F32)] * merge.results
    out_types.append(jax.ShapeDtypeStruct((t.units, t.splits, vectors, t.partial_width), F32))
    barrier = barriers.barrier_type(t.members, t.units)
    scratch = [
        *Worker.scratch(t, [array.dtype for array in arrays]),
        *Exchange.scratch(1, t.warpgroups, vectors, t.columns),
        *Exchange.scratch(merge.rounds, t.warpgroups, merge.exchanged, t.columns),
        *barrier.scratch(),
    ]
    most_turns = t.turns(0)

    def body(*refs):
        take = taker(refs)
        array_refs, channel_refs, scalar_refs = take(inputs), take(len(channels)), take(len(scalars))
        out_refs, result_refs, (partial_ref,) = take(outputs), take(merge.results), take(1)
        rings, (filled,) = take(inputs), take(1)
        in_block, between_blocks = Exchange(*take(2)), Exchange(*take(2))
        barrier.prepare(take(len(barrier.scratch())))

        if t.cluster:
            slot, member = lax.axis_index("slot"), lax.axis_index("member")
        else:
            slot, member = t.slot(lax.axis_index("slot"))
        split, within = t.member(member)
        worker = Worker(t, split, array_refs, rings, filled)
        tiles = worker.range.tiles

        def place(unit):
            """The group and the first column of this block's part of a unit."""
            group, block = t.unit_place(unit, within)
            return group, t.block_start(block)

        def fetch(unit, index):
            group, start = place(unit)
            first_row, _ = worker.range.tile(index)
            worker.fetch(group, pl.ds(start, t.columns), first_row, worker.first_slot + index)

        def one_unit(turn, carry):
            unit = t.unit(slot, turn)
            group, start = place(unit)
            columns, partial_start = pl.ds(start, t.columns), t.partial_start(start)
            per_channel, per_group = vectors_of(channel_refs, group, columns), numbers_of(scalar_refs, group)

            worker.wait(worker.first_slot)
            pivot = [worker.pivot(worker.first_slot)] if moments else []

            def add_tile(index, totals):
                _, skipped = worker.range.tile(index)
                partial = worker.add_rows(
                    worker.first_slot + index,
                    skipped,
                    lambda i, values: sum_row(values, per_channel + pivot, per_group),
                    sums,
                )
                pl.when(index + 1 < tiles)(lambda: worker.wait(worker.first_slot + index + 1))
                return added(totals, partial)

            totals = lax.fori_loop(jnp.int32(0), tiles, add_tile, zeros(sums, t.columns))
            if moments:
                totals = worker.moments(*pivot, totals)
            in_block.show(0, worker.warpgroup, totals)

            @pl.when(worker.warpgroup == 0)
            def _():
                worker.write_partial(partial_ref, unit, partial_start, within, worker.merged(in_block, moments))
                barrier.signal(unit)

            barrier.wait(unit)

            parts = Parts(t, partial_ref, unit, partial_start, t.columns, worker.warpgroup, between_blocks)
            finished = merge.finish(merge.reduce(parts), per_channel, per_group)
            merged, results = finished[: merge.needed], finished[-merge.results :]

            @pl.when((worker.warpgroup == 0) & (split == 0))
            def _():
                for result_ref, result in zip(result_refs, results, strict=True):
                    result_ref[group, columns] = result

            def write_tile(index, carry):
                first_row, skipped = worker.range.tile(index)

                def one_row(i, values):
                    results = result_row(values, merged, per_channel, per_group)
                    write_row(out_refs, group, first_row + i, columns, results)
                    return ()

                worker.add_rows(worker.first_slot + index, skipped, one_row, 0)
                if most_turns > 1:
                    plgpu.commit_smem()  # all threads of the warpgroup have read the tile
                    pl.when(unit + t.at_once < t.units)(lambda: fetch(unit + t.at_once, index))
                return carry

            return lax.fori_loop(jnp.int32(0), tiles, write_tile, carry)

        for index in range(t.stages):
            pl.when(index < tiles)(functools.partial(fetch, slot, jnp.int32(index)))
        if most_turns == 1:
            one_unit(jnp.int32(0), ())
        else:
            lax.fori_loop(jnp.int32(0), t.turns(slot), one_unit, ())

    blocks, cluster = ({"slot": t.at_once}, {"member": t.members}) if t.cluster else ({"slot": t.grid}, None)
    kernel = launch(body, name, out_types, scratch, blocks, t.warpgroups, cluster)
    results = kernel(*arrays, *channels, *scalars)
    return results[:outputs], cut_to(t.channels, results[outputs : outputs + merge.results])
