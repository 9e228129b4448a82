"""The kernel of the backend `pallas_gpu` that is a whole forward or backward: two passes in one launch.

Each block of threads has a range of rows of a block of columns (its part of a *unit*, see `one_launch_plan.OneLaunch`),
and stays on the chip for both passes:

1. The copy engine brings the block's tiles into rings in shared memory; as they arrive, each thread adds up its
   columns. The last tiles stay in the rings: all of them, where there are no more.
2. The warpgroups merge what they found, and the block writes it to global memory: its partial result.
3. All blocks of the unit wait for each other: see `barrier`, also for why they do not wait for ever.
4. Each block merges the partial results of all of them, in the same order, and so with the same bits, and computes the
   values per channel: blend, scale and shift. One block writes those that are results.
5. Each block goes backwards through its tiles, first over those that are kept, then over what is brought again, whose
   last part L2 may still hold, and computes the results. Where there are units left, the copy engine brings the first
   tiles of the block's next one as soon as there is room.

Where the first pass has results of its own, the second reads them in the first array's place: kept tiles hold them
already, and the others are brought again from memory, after the copy engine has finished writing them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu import barrier as barriers
from bn_fused.kernels.backends.pallas_gpu.block import (
    F32,
    Copies,
    Exchange,
    Worker,
    launch,
    numbers_of,
    pallas,
    taker,
    vectors_of,
    when,
)
from bn_fused.kernels.backends.pallas_gpu.merges import Parts, Results
from bn_fused.kernels.backends.pallas_gpu.tiles import MOMENTS, minimum


def one_launch(tiling, name, arrays, channels, scalars, first, merge, second, *, sums, reads, outputs=0, moments=False):
    """A whole operation on arrays [groups, rows, width] in one launch.

    - `channels`, `scalars`, `moments`: as of `stream`.
    - `first`: a `Pass` of the first `reads` arrays with `sums` terms and `outputs` results, which are results of the
      operation.
    - `merge`: a `Merge` of the partial results.
    - `second`: a `Pass` with one result, whose constants are computed of the vectors of the merge that are needed,
      followed by those per channel. Where the first pass has a result, it gets that in the first array's place, and
      none of the arrays after the second.

    Returns the tuple of the results [groups, rows, width], the second pass' before the first's, and that of the results
    per channel [groups, channels].
    """
    pl, _ = pallas()
    t, inputs = tiling, len(arrays)
    vectors = MOMENTS if moments else sums
    out_types = [jax.ShapeDtypeStruct((t.groups, t.rows, t.width), arrays[0].dtype)] * (1 + outputs)
    results_per_channel = Results(t, t.columns)
    out_types += results_per_channel.types(merge.results)
    out_types.append(jax.ShapeDtypeStruct((t.units, vectors, t.padded_splits, t.partial_width), F32))
    barrier = barriers.barrier_type(t.members, t.units)
    scratch = [
        *Worker.scratch(t, [array.dtype for array in arrays]),
        *Exchange.scratch(1, t.warpgroups, vectors, t.columns),
        *Copies.scratch(t, vectors),
        *Exchange.scratch(merge.rounds, t.warpgroups, merge.exchanged, t.columns),
        *barrier.scratch(),
    ]
    several_units = t.turns(0) > 1

    def body(*refs):
        take = taker(refs)
        array_refs, channel_refs, scalar_refs = take(inputs), take(len(channels)), take(len(scalars))
        (last_ref,), first_refs, result_refs, (partial_ref,) = take(1), take(outputs), take(merge.results), take(1)
        rings, (filled, rows_memory) = take(inputs), take(2)
        in_block, copies = Exchange(*take(2)), Copies(t, take(len(Copies.scratch(t, vectors))))
        between_blocks = Exchange(*take(2))
        barrier.prepare(take(len(barrier.scratch())))
        again_refs = [*first_refs, *array_refs[outputs:2]] if outputs else array_refs

        if t.cluster:
            slot, member = lax.axis_index("slot"), lax.axis_index("member")
        else:
            slot, member = t.slot(lax.axis_index("slot"))
        split, within = t.member(member)
        worker = Worker(t, split, rings, filled, rows_memory)
        tiles = worker.range.tiles

        def part_of(unit):
            """The group and the first column of this block's part of a unit."""
            group, block = t.unit_place(unit, within)
            return group, t.block_start(block)

        def fetch(refs, unit, index):
            worker.fetch(refs, *part_of(unit), index)

        def fetch_first(unit, index):
            """For the first pass: of what only the second reads, the tiles that are kept."""
            if reads == inputs:
                fetch(array_refs, unit, index)
            else:
                kept = index >= tiles - t.stages
                when(kept)(lambda: fetch(array_refs, unit, index))
                when(jnp.logical_not(kept))(lambda: fetch(array_refs[:reads], unit, index))

        def one_unit(turn, carry):
            unit = t.unit(slot, turn)
            group, start = part_of(unit)
            columns, partial_start = pl.ds(start, t.columns), t.partial_start(start)
            per_channel, per_group = vectors_of(channel_refs, group, columns), numbers_of(scalar_refs, group)
            constants = worker.rows.spread(first.constants(per_channel, per_group))
            if moments:
                worker.wait(jnp.int32(0))
                pivot = worker.pivot()
                constants += worker.rows.spread([pivot])

            totals = worker.walk(
                lambda values: first.row(values, constants),
                worker.rows.zeros(sums),
                lambda index: when(index + t.stages < tiles)(lambda: fetch_first(unit, index + t.stages)),
                inputs=reads,
                there=int(moments),
                written=[functools.partial(worker.tile_of, ref, group, start) for ref in first_refs],
                read_again=True,
            )
            totals = worker.rows.sums(totals)
            if moments:
                totals = worker.moments(pivot, totals)
            in_block.show(0, worker.warpgroup, totals)

            @when(worker.warpgroup == 0)
            def _():
                worker.write_partial(partial_ref, unit, partial_start, within, worker.merged(in_block, copies, moments))
                barrier.signal(unit)

            barrier.wait(unit)

            place = unit, partial_start, t.columns
            parts = Parts(t, partial_ref, *place, merge, worker.warpgroup, between_blocks, worker.rows)
            finished = merge.finish(merge.reduce(parts), per_channel, per_group)
            needed, results = finished[: merge.needed], finished[-merge.results :]

            @when((worker.warpgroup == 0) & (split == 0))
            def _():
                results_per_channel.write(result_refs, results, group, start, within, worker.rows)

            constants = second.constants([*needed, *per_channel], per_group)
            constants = worker.rows.spread(constants)

            def refill(index):
                when(index >= t.stages)(lambda: fetch(again_refs, unit, index - t.stages))
                if several_units:
                    when((index < t.stages) & (unit + t.at_once < t.units))(
                        lambda: fetch_first(unit + t.at_once, index)
                    )

            worker.walk(
                lambda values: second.row(values, constants),
                (),
                refill,
                inputs=len(again_refs),
                backwards=True,
                there=minimum(tiles, t.stages),
                written=[functools.partial(worker.tile_of, last_ref, group, start)],
            )
            return carry

        worker.fetch_all(functools.partial(fetch_first, slot))
        if several_units:
            lax.fori_loop(jnp.int32(0), t.turns(slot), one_unit, ())
        else:
            one_unit(jnp.int32(0), ())

    blocks, cluster = ({"slot": t.at_once}, {"member": t.members}) if t.cluster else ({"slot": t.grid}, None)
    kernel = launch(body, name, out_types, scratch, blocks, t.warpgroups, cluster)
    results = kernel(*arrays, *channels, *scalars)
    return results[: 1 + outputs], results_per_channel.cut(results[1 + outputs : 1 + outputs + merge.results])
