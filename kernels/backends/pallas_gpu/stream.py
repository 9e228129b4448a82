"""The kernel of the backend `pallas_gpu` that goes once over arrays of x's size, written with Pallas Mosaic GPU.

`stream` is every pass that is a launch of its own: the moments' sums, the normalisation, the backward's sums and its
gradients differ only in the function of a fragment of rows that they give it. What its blocks add up, `merges` merges.

How a pass keeps the memory busy on a Hopper GPU:

- One block of threads for each multiprocessor, of up to four warpgroups. Each warpgroup has its own range of rows, its
  own ring of tiles in shared memory, which the copy engine (TMA) fills and empties, and its own barriers: no warpgroup
  ever waits for another one until the end. A multiprocessor has 150 to 190 KiB in flight; 30 KiB would do at the
  memory's unloaded latency.
- Values are loaded as fragments of several rows, 8 bytes at a time for each thread and without bank conflicts, four
  fragments before the first is used. Each thread adds up its own columns in registers.
- Results take the place of the tile that they are computed of, and leave by the copy engine.
- The automatic barriers around every load and store are off. What they protect is protected here: a slot of the ring
  is filled or emptied by the copy engine only after all threads of its warpgroup have read it and written it
  (`commit_smem` has the barrier and the fence towards the copy engine), and filled again only when it has been emptied.
- The sums are added up tile by tile, then row by row of the fragment and then warpgroup by warpgroup, in a fixed order:
  two runs give the same bits.

Row and column numbers are 32-bit integers, which are multiplied to addresses in 64 bits: an array may have more than
2^31 elements as long as it has fewer rows and channels than that.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
from bn_fused.kernels.backends.pallas_gpu.tiles import MOMENTS


class Pass(NamedTuple):
    """What a pass computes of every row.

    - `constants(channels, scalars)`: of the vectors per channel and the numbers per group, the vectors that rows need.
    - `row(values, constants)`: of a row's values, float32, one for each array, and the constants, the terms to add up
      and the results. It gets fragments: several rows at once.
    """

    constants: Callable
    row: Callable


def stream(tiling, name, arrays, channels, scalars, work, *, sums=0, outputs=0, moments=False, reverse=False):
    """One `Pass` over arrays [groups, rows, width], read once, each by the same tiles.

    - `channels`: arrays [groups, width], or several in one, [groups, number, width]; `scalars`: arrays [groups] and
      [groups, number]. All float32.
    - `work`: a `Pass` with `sums` terms and `outputs` results.
    - `moments`: its rows get the pivot in addition, as the last of the constants: the mean of the worker's first tile.
    - `reverse`: walks through each worker's tiles from the last one to the first, and through the blocks in the same
      way, so that it begins with what the pass before it read last and L2 still holds.

    Returns the tuple of the outputs [groups, rows, width] in the first array's dtype and, where there are sums, their
    partial results [groups, sums, padded splits, padded width]; for moments, pivot, delta and the squares about the
    mean.
    """
    pl, _ = pallas()
    t, inputs = tiling, len(arrays)
    vectors = MOMENTS if moments else sums
    out_types = [jax.ShapeDtypeStruct((t.groups, t.rows, t.width), arrays[0].dtype)] * outputs
    scratch = Worker.scratch(t, [array.dtype for array in arrays])
    if sums:
        out_types.append(jax.ShapeDtypeStruct((t.groups, vectors, t.padded_splits, t.padded_width), F32))
        scratch += [*Exchange.scratch(1, t.warpgroups, vectors, t.columns), *Copies.scratch(t, vectors)]

    def body(*refs):
        take = taker(refs)
        array_refs, channel_refs, scalar_refs = take(inputs), take(len(channels)), take(len(scalars))
        out_refs, partial_refs = take(outputs), take(1 if sums else 0)
        rings, (filled, rows_memory) = take(inputs), take(2)

        index = lax.axis_index("block")
        group, block, split = t.place(t.grid - 1 - index if reverse else index)
        start = t.block_start(block)
        worker = Worker(t, split, rings, filled, rows_memory)
        tiles = worker.range.tiles

        def fetch(index):
            worker.fetch(array_refs, group, start, index)

        def refill(index):
            following = index - t.stages if reverse else index + t.stages
            when((following >= 0) & (following < tiles))(lambda: fetch(following))

        worker.fetch_all(fetch, reverse)
        columns = pl.ds(start, t.columns)
        constants = work.constants(vectors_of(channel_refs, group, columns), numbers_of(scalar_refs, group))
        constants = worker.rows.spread(constants)
        if moments:
            worker.wait(jnp.int32(0))
            pivot = worker.pivot()
            constants += worker.rows.spread([pivot])

        totals = worker.walk(
            lambda values: work.row(values, constants),
            worker.rows.zeros(sums),
            refill,
            inputs=inputs,
            backwards=reverse,
            there=int(moments),
            written=[functools.partial(worker.tile_of, ref, group, start) for ref in out_refs],
        )
        if not sums:
            return
        totals = worker.rows.sums(totals)
        if moments:
            totals = worker.moments(pivot, totals)
        exchange, copies = Exchange(*take(2)), Copies(t, take(len(Copies.scratch(t, vectors))))
        exchange.show(0, worker.warpgroup, totals)

        @when(worker.warpgroup == 0)
        def _():
            worker.write_partial(*partial_refs, group, start, block, worker.merged(exchange, copies, moments))

    kernel = launch(body, name, out_types, scratch, {"block": t.grid}, t.warpgroups)
    return kernel(*arrays, *channels, *scalars)
