"""The kernel of the backend `pallas_gpu` that streams over the rows, written with Pallas Mosaic GPU.

`stream` is every pass over arrays of x's size: the moments' sums, the normalisation, the backward's sums and its
gradients differ only in the function of one row that they give it. What its blocks add up, `merges` merges.

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
from bn_fused.kernels.backends.pallas_gpu.tiles import MOMENTS, rem


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
    pl, plgpu = pallas()
    t, inputs = tiling, len(arrays)
    vectors = MOMENTS if moments else sums
    out_types = [jax.ShapeDtypeStruct((t.groups, t.rows, t.width), arrays[0].dtype)] * outputs
    scratch = Worker.scratch(t, [array.dtype for array in arrays])
    if sums:
        out_types.append(jax.ShapeDtypeStruct((t.groups, t.splits, vectors, t.padded_width), F32))
        scratch += Exchange.scratch(1, t.warpgroups, vectors, t.columns)

    def body(*refs):
        take = taker(refs)
        array_refs, channel_refs, scalar_refs = take(inputs), take(len(channels)), take(len(scalars))
        out_refs, partial_refs = take(outputs), take(1 if sums else 0)
        rings, (filled,) = take(inputs), take(1)

        index = lax.axis_index("block")
        group, block, split = t.place(t.grid - 1 - index if reverse else index)
        start = t.block_start(block)
        columns = pl.ds(start, t.columns)
        worker = Worker(t, split, array_refs, rings, filled)
        tiles = worker.range.tiles

        def tile(step):
            return worker.range.tile(tiles - 1 - step if reverse else step)

        def slot_of(step):
            return worker.first_slot + rem(step, t.stages)

        def fetch(step):
            first_row, _ = tile(step)
            worker.fetch(group, columns, first_row, slot_of(step))

        for step in range(t.stages):
            pl.when(step < tiles)(functools.partial(fetch, jnp.int32(step)))
        per_channel, per_group = vectors_of(channel_refs, group, columns), numbers_of(scalar_refs, group)
        worker.wait(slot_of(jnp.int32(0)))
        if moments:
            per_channel.append(worker.pivot(slot_of(jnp.int32(0))))

        def one_tile(step, totals):
            slot = slot_of(step)
            first_row, skipped = tile(step)

            def one_row(i, values):
                terms, results = row(values, per_channel, per_group)
                write_row(out_refs, group, first_row + i, columns, results)
                return terms

            partial = worker.add_rows(slot, skipped, one_row, sums)
            plgpu.commit_smem()  # all threads of the warpgroup have read the tile
            pl.when(step + t.stages < tiles)(lambda: fetch(step + t.stages))
            pl.when(step + 1 < tiles)(lambda: worker.wait(slot_of(step + 1)))
            return added(totals, partial)

        totals = lax.fori_loop(jnp.int32(0), tiles, one_tile, zeros(sums, t.columns))
        if not sums:
            return
        if moments:
            totals = worker.moments(per_channel[-1], totals)
        exchange = Exchange(*take(2))
        exchange.show(0, worker.warpgroup, totals)

        @pl.when(worker.warpgroup == 0)
        def _():
            worker.write_partial(*partial_refs, group, start, block, worker.merged(exchange, moments))

    kernel = launch(body, name, out_types, scratch, {"block": t.grid}, t.warpgroups)
    return kernel(*arrays, *channels, *scalars)
