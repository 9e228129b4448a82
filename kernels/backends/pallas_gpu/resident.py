"""The kernels of the backend `pallas_gpu` that read their arrays once: they keep them in shared memory.

`resident` is one launch for a whole forward or backward. Each block of threads has a range of rows of a block of
columns (the part of a *unit*, see `pallas_gpu_plan.Resident`), and does in order:

1. The copy engine brings its part into shared memory; as the tiles arrive, each thread adds up its columns.
2. The warpgroups merge what they found, and the block writes it to global memory: its partial result.
3. All blocks of the unit wait for each other: `CounterBarrier`.
4. Each block merges the partial results of all of them, in the same order, and so with the same bits, and computes the
   values per channel: blend, scale and shift. One block writes those that are results.
5. Each block computes its rows from shared memory and writes them. As soon as a tile is used, the copy engine brings
   the same rows of the block's next unit, so that a large array passes through the chip slab after slab.

Waiting for each other is sound only if all blocks of a unit are on the chip together. A cluster is placed together or
not at all, by the hardware. Where a unit needs more blocks than a cluster has, no more blocks are launched than there
are multiprocessors, each of which takes one: `pallas_gpu_plan.not_co_resident` refuses everything else before it is
lowered, with the number of multiprocessors that the device itself reports if that is less than the chip's table says
(a slice of a GPU: MIG; a share under MPS). In a program for several devices only clusters are taken: a collective that
runs beside such a kernel holds multiprocessors until it has met those of the other devices, which may be waiting for
multiprocessors in the same way. What is left to go wrong at run time:

- A program that was compiled for a whole chip and is run, from a file, on a part of one.
- Two of these kernels at the same time on one device, each of which holds multiprocessors that the other one needs.
  JAX runs the programs of a process one after another on a device, and XLA the kernels of a program in one stream; two
  processes that share a device with MPS, or XLA with `--xla_gpu_command_buffer_scheduling_mode=CONCURRENT`, do not.
  (Other kernels, which end by themselves, only delay it.)

Therefore no block waits longer than `PATIENCE_SECONDS`: it then ends the kernel by a trap, with an assertion's message
on the process's standard error. That is an error in place of a hang, but the CUDA context, and so the process's use of
the device, ends with it. Nothing of a half-run kernel is ever returned. `plan=` with `forward=None, backward=None` streams.

The counters of the barrier are zeroed by XLA before each launch, and belong to that launch: launches that are repeated,
in loops or of other programs, never see each other's. Each unit has its own counter and uses it once: it counts up to
the number of members, and is never lowered or used again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu.plan import MOMENTS
from bn_fused.kernels.backends.pallas_gpu.stream import (
    F32,
    _div,
    _finite_or_zero,
    _merge,
    _numbers,
    _pallas,
    _rem,
    _taker,
    _unrolled,
    _vectors,
    summation,
    variance_sum,
)
from bn_fused.kernels.jax_internals import barrier_signal, barrier_wait

# Far more than any kernel that shares the device holds its multiprocessors, and less than anybody waits for a hang.
PATIENCE_SECONDS = 60


class CounterBarrier:
    """Where the blocks of a unit wait for each other: a counter in global memory for each unit."""

    def __init__(self, members, units):
        self.members, self.units = members, units

    def scratch(self):
        """The types of the scratch memory that it needs."""
        return []

    def prepare(self, scratch):
        """Once in each thread; with the references to that memory."""
        del scratch
        pl, plgpu = _pallas()
        self.counters = pl.get_global(plgpu.SemaphoreType.REGULAR((self.units,)))

    def signal(self, unit):
        """One warpgroup of each block: what the block wrote to global memory is there."""
        barrier_signal(self.counters.at[unit])

    def wait(self, unit):
        """Every warpgroup: until all members have signalled; sees all that they wrote before."""
        barrier_wait(self.counters.at[unit], self.members, PATIENCE_SECONDS)


# The tests put another one in its place, for the interpreter, which has no global counters.
barrier_type = CounterBarrier


def resident(tiling, name, arrays, channels, scalars, first, merge, second, *, sums, outputs, exact, moments=False):
    """A whole operation on arrays [groups, rows, width] in one launch, which reads each of them once.

    - `channels`, `scalars`, `moments`: as of `stream`.
    - `first(values, vectors, scalars)`: of a row's values, the `sums` vectors to add up.
    - `merge`: a `Merge` of the partial results. Of what it finishes with, the last `exact` are results.
    - `second(values, found, vectors, scalars)`: of a row's values and the vectors found by the merge, `outputs` vectors.

    Returns the tuple of the outputs [groups, rows, width], and that of the exact results [groups, channels].
    """
    pl, plgpu = _pallas()
    t, inputs = tiling, len(arrays)
    slots, vector = t.warpgroups * t.stages, (t.columns,)
    kept = MOMENTS if moments else sums
    dtype = arrays[0].dtype
    entries, folded = t.splits * t.fold, t.fold > 1
    out_types = [jax.ShapeDtypeStruct((t.groups, t.rows, t.width), dtype)] * outputs
    out_types += [jax.ShapeDtypeStruct((t.groups, t.width), F32)] * exact
    out_types.append(jax.ShapeDtypeStruct((t.units, t.splits, kept, t.partial_width), F32))
    barrier = barrier_type(t.members, t.units)
    scratch = [plgpu.SMEM((slots, t.tile_rows, t.columns), array.dtype) for array in arrays]
    scratch += [
        plgpu.Barrier(num_arrivals=inputs, num_barriers=slots),
        plgpu.SMEM((t.warpgroups, kept, t.columns), F32),
        plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=1),
        plgpu.SMEM((merge.rounds, t.warpgroups, merge.exchanged, t.columns), F32),
        plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=merge.rounds),
        *barrier.scratch(),
    ]
    base_rows, extra_rows = divmod(t.rows, t.workers)
    most_turns = t.turns(0)

    def body(*refs):
        take = _taker(refs)
        array_refs, channel_refs, scalar_refs = take(inputs), take(len(channels)), take(len(scalars))
        out_refs, exact_refs, (partial_ref,) = take(outputs), take(exact), take(1)
        rings, (filled, exchange, arrived, merging, merged) = take(inputs), take(5)
        barrier.prepare(refs[len(refs) - len(barrier.scratch()) :])

        if t.cluster:
            slot, member = lax.axis_index("slot"), lax.axis_index("member")
        else:
            slot, member = (of(lax.axis_index("slot"), t.members) for of in (_div, _rem))
        split, within = _rem(member, t.splits), _div(member, t.splits)
        warpgroup = lax.axis_index("warpgroup")
        worker = split * t.warpgroups + warpgroup
        start = worker * base_rows + jnp.minimum(worker, extra_rows)
        rows = base_rows + (worker < extra_rows).astype(jnp.int32)
        tiles = _div(rows + (t.tile_rows - 1), t.tile_rows)
        first_slot = warpgroup * t.stages

        def place(unit):
            """The group and the first column of this block's part of a unit."""
            group, column_block = (unit, within) if folded else (_div(unit, t.blocks), _rem(unit, t.blocks))
            return group, jnp.minimum(column_block * t.columns, t.width - t.columns)

        def tile_of(index):
            """The first row of a tile, and the rows to skip that another tile has."""
            moved = jnp.minimum(index * t.tile_rows, rows - t.tile_rows)
            return start + moved, index * t.tile_rows - moved

        def fetch(unit, index):
            group, first_column = place(unit)
            first_row, _ = tile_of(index)
            for array_ref, ring in zip(array_refs, rings, strict=True):
                tile = array_ref.at[group, pl.ds(first_row, t.tile_rows), pl.ds(first_column, t.columns)]
                plgpu.copy_gmem_to_smem(tile, ring.at[first_slot + index], filled.at[first_slot + index])

        def zeros():
            return jnp.zeros(vector, F32)

        def load_from(index):
            return lambda i: [ring[first_slot + index, i].astype(F32) for ring in rings]

        def weight(number):
            """Values per channel that the part of a split stands for."""
            more = jnp.clip(extra_rows - number * t.warpgroups, 0, t.warpgroups)
            return (base_rows * t.warpgroups + more).astype(F32)

        def merge_warpgroups():
            if not moments:
                return [functools.reduce(jnp.add, [exchange[w, i] for w in range(t.warpgroups)]) for i in range(kept)]
            numbers = [
                (base_rows + (split * t.warpgroups + w < extra_rows).astype(jnp.int32)).astype(F32)
                for w in range(t.warpgroups)
            ]
            return _merge([[exchange[w, i] for i in range(kept)] for w in range(t.warpgroups)], numbers)

        def one_unit(turn, carry):
            unit = slot + turn * t.at_once
            group, first_column = place(unit)
            columns = pl.ds(first_column, t.columns)
            # Where a unit is a block of columns, its partial results have no others.
            start_column = first_column if folded else 0
            vectors = _vectors(channel_refs, group, columns)
            numbers = _numbers(scalar_refs, group)

            plgpu.barrier_wait(filled.at[first_slot])
            pivot = []
            if moments:
                load = load_from(jnp.int32(0))
                total = _unrolled(0, t.tile_rows, lambda i: load(i)[0], lambda i, value, total: total + value, zeros())
                pivot = [_finite_or_zero(total * (1 / t.tile_rows))]

            def add_tile(index, totals):
                def add_row(_, values, partial):
                    return tuple(a + b for a, b in zip(partial, first(values, vectors + pivot, numbers), strict=True))

                _, skipped = tile_of(index)
                nothing = tuple(zeros() for _ in range(sums))
                partial = _unrolled(skipped, t.tile_rows, load_from(index), add_row, nothing)
                pl.when(index + 1 < tiles)(lambda: plgpu.barrier_wait(filled.at[first_slot + index + 1]))
                return tuple(a + b for a, b in zip(totals, partial, strict=True))

            totals = lax.fori_loop(jnp.int32(0), tiles, add_tile, tuple(zeros() for _ in range(sums)))
            if moments:
                (total, square_sum), number = totals, rows.astype(F32)
                delta = total / number
                totals = *pivot, delta, variance_sum(square_sum, total, delta)
            for index, value in enumerate(totals):
                exchange[warpgroup, index] = value
            plgpu.commit_smem()
            plgpu.barrier_arrive(arrived.at[0])
            plgpu.barrier_wait(arrived.at[0])

            @pl.when(warpgroup == 0)
            def _():
                part = merge_warpgroups()
                for index, value in enumerate(part):
                    partial_ref[unit, split, index, pl.ds(start_column, t.columns)] = value
                if folded:

                    @pl.when(within == 0)
                    def _():
                        for index, value in enumerate(part):
                            partial_ref[unit, split, index, pl.ds(t.width, t.columns)] = value

                barrier.signal(unit)

            barrier.wait(unit)

            def part(entry):
                number, copy = _div(entry, t.fold), _rem(entry, t.fold)
                here = _rem(start_column + copy * t.channels, t.width) if folded else 0
                return [partial_ref[unit, number, index, pl.ds(here, t.columns)] for index in range(kept)], number

            total = summation(part, weight, entries, warpgroup, t.warpgroups, merging, merged, vector)
            found = merge.finish(merge.reduce(total, part(jnp.int32(0))[0][0]), vectors, numbers)
            found, results = found[: len(found) - exact], found[len(found) - exact :]

            @pl.when((warpgroup == 0) & (split == 0))
            def _():
                for exact_ref, result in zip(exact_refs, results, strict=True):
                    exact_ref[group, columns] = result

            def write_tile(index, carry):
                first_row, skipped = tile_of(index)

                def write_row(i, values, carry):
                    results = second(values, found, vectors, numbers)
                    for out_ref, result in zip(out_refs, results, strict=True):
                        out_ref[group, first_row + i, columns] = result.astype(dtype)
                    return carry

                _unrolled(skipped, t.tile_rows, load_from(index), write_row, ())
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
            lax.fori_loop(jnp.int32(0), _div(t.units - slot + (t.at_once - 1), t.at_once), one_unit, ())

    kernel = _launch(body, name, out_types, scratch, t)
    found = kernel(*arrays, *channels, *scalars)
    results = found[outputs : outputs + exact]
    return found[:outputs], [value[:, : t.channels] for value in results] if folded else results


def _launch(body, name, out_types, scratch, tiling):
    _, plgpu = _pallas()
    body.__name__ = name
    cluster = {"cluster": (tiling.members,), "cluster_names": ("member",)} if tiling.cluster else {}
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=(tiling.at_once if tiling.cluster else tiling.grid,),
        grid_names=("slot",),
        **cluster,
        num_threads=tiling.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
