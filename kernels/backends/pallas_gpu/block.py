"""What a block of threads does in each kernel of the backend `pallas_gpu`, and how it is launched.

A block has up to four warpgroups. In the kernels that read arrays of x's size each of them is a `Worker`: it has its
own rows and its own tiles in shared memory, which the copy engine fills, and its own barriers for them. What they add
up they show each other through an `Exchange`; one of them merges it and writes the block's partial result.
"""

import functools

import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu.tiles import UNROLL, div
from bn_fused.kernels.contract import squares_about_mean

F32 = jnp.float32


def pallas():
    """The modules `pallas` and `mosaic_gpu`, imported where a kernel is made: `import bn_fused` does not need them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl, plgpu


def launch(body, name, out_types, scratch, grid, warpgroups, cluster=None):
    """The launch of a kernel by that name: `grid` blocks, or clusters of blocks, each as {name of the axis: size}."""
    _, plgpu = pallas()
    body.__name__ = name
    clusters = {} if cluster is None else {"cluster": tuple(cluster.values()), "cluster_names": tuple(cluster)}
    return plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        **clusters,
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def taker(refs):
    """The function `take(number)`: the next so many of a kernel's references."""
    remaining = iter(refs)
    return lambda number: tuple(next(remaining) for _ in range(number))


def vectors_of(refs, group, columns):
    """The vectors of arrays [groups, width] and [groups, number, width], in order."""
    vectors = []
    for ref in refs:
        several = [ref.at[group, index] for index in range(ref.shape[1])] if len(ref.shape) == 3 else [ref.at[group]]
        vectors += [one[columns] for one in several]
    return vectors


def numbers_of(refs, group):
    """The numbers of a group in arrays [groups] and [groups, number], in order."""
    numbers = []
    for ref in refs:
        numbers += [ref[group, index] for index in range(ref.shape[1])] if len(ref.shape) == 2 else [ref[group]]
    return numbers


def zeros(number, columns):
    """So many vectors of zeros."""
    return tuple(jnp.zeros((columns,), F32) for _ in range(number))


def added(some, others):
    """The sums of vectors with vectors."""
    return tuple(a + b for a, b in zip(some, others, strict=True))


def unrolled(start, stop, load, use, carry):
    """fori_loop over [start, stop) of carry = use(i, load(i), carry).

    Of `UNROLL` numbers at a time first the loads, then their use; of the rest one by one.
    """
    start, stop = jnp.int32(start), jnp.int32(stop)
    groups = div(stop - start, UNROLL)

    def several(index, carry):
        indices = [start + index * UNROLL + offset for offset in range(UNROLL)]
        loaded = [load(i) for i in indices]
        for i, values in zip(indices, loaded, strict=True):
            carry = use(i, values, carry)
        return carry

    carry = lax.fori_loop(jnp.int32(0), groups, several, carry)
    return lax.fori_loop(start + groups * UNROLL, stop, lambda i, carry: use(i, load(i), carry), carry)


class Exchange:
    """Vectors that the warpgroups of a block show each other, in one or several rounds."""

    def __init__(self, shown, arrived):
        self.shown, self.arrived, self.warpgroups = shown, arrived, shown.shape[1]

    @staticmethod
    def scratch(rounds, warpgroups, number, columns):
        """The types of its scratch memory, for at most so many vectors of a warpgroup in each round."""
        _, plgpu = pallas()
        return [
            plgpu.SMEM((rounds, warpgroups, number, columns), F32),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=rounds),
        ]

    def show(self, turn, warpgroup, vectors):
        """Every warpgroup, in this round: show these, and wait for what the others show."""
        _, plgpu = pallas()
        for index, value in enumerate(vectors):
            self.shown[turn, warpgroup, index] = value
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.arrived.at[turn])
        plgpu.barrier_wait(self.arrived.at[turn])

    def vectors(self, turn, warpgroup, number):
        """The vectors that a warpgroup has shown."""
        return [self.shown[turn, warpgroup, index] for index in range(number)]

    def sums(self, turn, number):
        """The sums over all warpgroups, in their order."""
        return [
            functools.reduce(jnp.add, [self.shown[turn, w, index] for w in range(self.warpgroups)])
            for index in range(number)
        ]


class Worker:
    """A warpgroup that works on a range of the rows of a block of columns, tile by tile.

    `arrays` are the references of the arrays [groups, rows, width]; `rings` the tiles [warpgroups * stages, tile rows,
    columns] of each in shared memory, and `filled` their barriers.
    """

    def __init__(self, tiling, split, arrays, rings, filled):
        self.tiling, self.split = tiling, split
        self.arrays, self.rings, self.filled = arrays, rings, filled
        self.warpgroup = lax.axis_index("warpgroup")
        self.range = tiling.worker_range(tiling.worker(split, self.warpgroup))
        self.first_slot = self.warpgroup * tiling.stages

    @staticmethod
    def scratch(tiling, dtypes):
        """The types of the rings, one for each of the arrays of these dtypes, and of `filled`."""
        _, plgpu = pallas()
        slots = tiling.warpgroups * tiling.stages
        rings = [plgpu.SMEM((slots, tiling.tile_rows, tiling.columns), dtype) for dtype in dtypes]
        return [*rings, plgpu.Barrier(num_arrivals=len(rings), num_barriers=slots)]

    def fetch(self, group, columns, first_row, slot):
        """Have the copy engine bring the tile that starts with this row."""
        pl, plgpu = pallas()
        for array, ring in zip(self.arrays, self.rings, strict=True):
            tile = array.at[group, pl.ds(first_row, self.tiling.tile_rows), columns]
            plgpu.copy_gmem_to_smem(tile, ring.at[slot], self.filled.at[slot])

    def wait(self, slot):
        """Until the tile is there."""
        _, plgpu = pallas()
        plgpu.barrier_wait(self.filled.at[slot])

    def add_rows(self, slot, skipped, row, sums):
        """The sums, over the rows of a tile from `skipped` on, of the `sums` vectors that `row(i, values)` returns.

        `values` are the row's, as a float32 vector for each array.
        """

        def load(i):
            return [ring[slot, i].astype(F32) for ring in self.rings]

        return unrolled(
            skipped,
            self.tiling.tile_rows,
            load,
            lambda i, values, partial: added(partial, row(i, values)),
            zeros(sums, self.tiling.columns),
        )

    def pivot(self, slot):
        """The mean of the first array's tile, 0 where that is not finite."""
        (total,) = self.add_rows(slot, 0, lambda i, values: values[:1], 1)
        return _finite_or_zero(total * (1 / self.tiling.tile_rows))

    def moments(self, pivot, sums):
        """Pivot, delta and squares about the mean, of the sums of deviations from the pivot and of their squares."""
        (total, square_sum), number = sums, self.range.rows.astype(F32)
        delta = total / number
        return pivot, delta, squares_about_mean(square_sum, total, delta)

    def merged(self, exchange, moments):
        """The block's partial result, of those that its warpgroups have shown."""
        t, vectors = self.tiling, exchange.shown.shape[2]
        if not moments:
            return exchange.sums(0, vectors)
        numbers = [t.worker_rows(t.worker(self.split, w)).astype(F32) for w in range(t.warpgroups)]
        return _merge([exchange.vectors(0, w, vectors) for w in range(t.warpgroups)], numbers)

    def write_partial(self, partial_ref, whole, start, block, vectors):
        """Write the block's partial result for the columns from `start` on, which are the block of this number.

        `whole` is the group, or the unit, that it is a part of.
        """
        pl, _ = pallas()
        t = self.tiling
        for index, value in enumerate(vectors):
            partial_ref[whole, self.split, index, pl.ds(start, t.columns)] = value
        if t.fold > 1:

            @pl.when(block == 0)
            def _():
                for index, value in enumerate(vectors):
                    partial_ref[whole, self.split, index, pl.ds(t.width, t.columns)] = value


def write_row(out_refs, group, row, columns, results):
    """Write the vectors of a row to the arrays [groups, rows, width]."""
    for out_ref, result in zip(out_refs, results, strict=True):
        out_ref[group, row, columns] = result.astype(out_ref.dtype)


def _finite_or_zero(value):
    return jnp.where(jnp.abs(value) < jnp.inf, value, jnp.zeros_like(value))


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
