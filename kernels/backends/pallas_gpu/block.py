"""What a block of threads does in each kernel of the backend `pallas_gpu`, and how it is launched.

A block has up to four warpgroups. Values are held in two forms:

- A *vector* has a value for each of the block's columns, [columns]. What is computed once per channel is a vector.
- A *fragment* has some rows of them, [fragment_rows, columns], of which each thread holds neighbouring values, so that
  a load or store of shared memory moves 8 bytes. What is computed for every element is computed on fragments: one
  operation in the kernel's text for several rows. Which thread holds what is said where a fragment is loaded or made
  (`as_fragment`), and nothing is left for Mosaic to infer, whose inference takes time that grows with the square of the
  number of operations: hence the semantics `Lane` in `launch`.

`Rows` turns one into the other. In the kernels that read arrays of x's size each warpgroup is a `Worker`: it has its
own rows and its own tiles in shared memory, which the copy engine fills and empties, and its own barriers for them.
What warpgroups add up they show each other through an `Exchange`; one of them merges it and writes the block's partial
result.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax

from bn_fused.kernels.backends.pallas_gpu.tiles import ROWS_AT_ONCE, WARPGROUP, as_float, div, minimum, one_if, rem
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
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
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


def as_fragment(value):
    """A value that was just loaded or made, as a fragment: every thread holds four neighbouring elements, or fewer."""
    _, plgpu = pallas()
    neighbours = min(4, math.prod(value.shape) // WARPGROUP)
    return plgpu.layout_cast(value, plgpu.Layout.WG_STRIDED(value.shape, vec_size=neighbours))


def when(condition):
    """`pl.when`, which converts a bool, by a choice: see `one_if`."""
    if isinstance(condition, bool):
        return lambda work: work() if condition else None
    return lambda work: lax.switch(one_if(condition), [lambda: None, lambda: work()])


def or_zero(condition, value):
    """The value where the condition holds, and zero elsewhere. Without jnp's own functions, which are calls inside."""
    return lax.select(condition, value, lax.full_like(value, 0))


def added(some, others):
    """The sums of values with values."""
    return tuple(a + b for a, b in zip(some, others, strict=True))


class Rows:
    """Vectors as fragments and fragments as vectors, by way of a warpgroup's own memory [at once, rows, columns]."""

    def __init__(self, memory, warpgroup):
        self.memory, self.shape = memory.at[warpgroup], memory.shape[2:]

    @staticmethod
    def scratch(warpgroups, rows, columns):
        """The type of that memory for all warpgroups."""
        _, plgpu = pallas()
        return plgpu.SMEM((warpgroups, ROWS_AT_ONCE, rows, columns), F32)

    def number(self):
        """The fragment of the rows' numbers."""
        return as_fragment(lax.broadcasted_iota(jnp.int32, self.shape, 0))

    def zeros(self, number):
        """So many fragments of zeros."""
        return tuple(as_fragment(jnp.zeros(self.shape, F32)) for _ in range(number))

    def spread(self, vectors):
        """The fragments in whose every row these vectors stand."""
        rows = range(self.shape[0])

        def write(place, vector):
            for row in rows:
                self.memory[place, row] = vector

        return self._exchange(vectors, write, lambda place: as_fragment(self.memory[place]))

    def sums(self, fragments):
        """The vectors of the sums over these fragments' rows."""

        def write(place, fragment):
            self.memory[place] = fragment

        def read(place):
            return functools.reduce(jnp.add, [self.memory[place, row] for row in range(self.shape[0])])

        return self._exchange(fragments, write, read)

    def copy_out(self, refs, vectors, copy):
        """Have the copy engine write vectors: `copy(ref, memory)` starts that for one, which stands in memory."""
        _, plgpu = pallas()
        rows = self.shape[0]
        at_once = ROWS_AT_ONCE * rows
        for first in range(0, len(vectors), at_once):
            some = list(zip(refs, vectors, strict=True))[first : first + at_once]
            for index, (_, vector) in enumerate(some):
                self.memory[divmod(index, rows)] = vector
            plgpu.commit_smem()
            for index, (ref, _) in enumerate(some):
                copy(ref, self.memory.at[divmod(index, rows)])
            plgpu.wait_smem_to_gmem(0)

    def _exchange(self, values, write, read):
        _, plgpu = pallas()
        exchanged = []
        for first in range(0, len(values), ROWS_AT_ONCE):
            some = values[first : first + ROWS_AT_ONCE]
            for place, value in enumerate(some):
                write(place, value)
            plgpu.commit_smem()  # all threads of the warpgroup have written
            exchanged += [read(place) for place in range(len(some))]
            plgpu.commit_smem()  # and have read, before they write again
        return exchanged


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


class Copies:
    """Vectors of a folded row, and the same with its channels' other copies in each column, for one warpgroup."""

    def __init__(self, tiling, refs):
        self.tiling, self.twice = tiling, refs[0] if refs else None

    @staticmethod
    def scratch(tiling, number):
        """The types of its scratch memory, for so many vectors."""
        _, plgpu = pallas()
        return [plgpu.SMEM((number, 2 * tiling.columns), F32)] if tiling.copies_in_block > 1 else []

    def of(self, vectors):
        """For each copy of a channel the vectors in whose columns it stands, the column's own copy first."""
        pl, plgpu = pallas()
        t = self.tiling
        for index, vector in enumerate(vectors):
            for again in range(2):
                self.twice[index, pl.ds(again * t.columns, t.columns)] = vector
        plgpu.commit_smem()
        starts = [copy * t.channels for copy in range(t.fold)]
        found = [[self.twice[index, pl.ds(start, t.columns)] for index in range(len(vectors))] for start in starts]
        plgpu.commit_smem()
        return found


class Worker:
    """A warpgroup that works on a range of the rows of a block of columns, tile by tile.

    `rings` are the tiles [warpgroups * stages, tile rows, columns] in shared memory, a ring for each array that is
    read, and `filled` their barriers. Results take the place of what they are computed of: the copy engine fetches them
    from the first rings.
    """

    def __init__(self, tiling, split, rings, filled, rows_memory):
        self.tiling, self.split, self.rings, self.filled = tiling, split, rings, filled
        self.warpgroup = lax.axis_index("warpgroup") if tiling.warpgroups > 1 else 0
        self.range = tiling.worker_range(split, self.warpgroup)
        self.rows = Rows(rows_memory, self.warpgroup)

    @staticmethod
    def scratch(tiling, dtypes):
        """The types of the rings, one for each of the arrays of these dtypes, of `filled` and of the `Rows`."""
        _, plgpu = pallas()
        slots = tiling.warpgroups * tiling.stages
        rings = [plgpu.SMEM((slots, tiling.tile_rows, tiling.columns), dtype) for dtype in dtypes]
        return [
            *rings,
            plgpu.Barrier(num_arrivals=len(rings), num_barriers=slots),
            Rows.scratch(tiling.warpgroups, tiling.fragment_rows, tiling.columns),
        ]

    def slot(self, index):
        """The place of a tile in the warpgroup's rings."""
        return self.warpgroup * self.tiling.stages + rem(index, self.tiling.stages)

    def tile_of(self, array, group, start, first_row):
        """A tile of this block's columns, from `start` on, of an array [groups, rows, width]."""
        pl, _ = pallas()
        return array.at[group, pl.ds(first_row, self.tiling.tile_rows), pl.ds(start, self.tiling.columns)]

    def fetch(self, arrays, group, start, index):
        """Have the copy engine bring a tile of these arrays, which are as many as there are rings, or fewer."""
        _, plgpu = pallas()
        slot, first_row = self.slot(index), self.range.tile_row(index)
        filled = self.filled.at[slot]
        for array, ring in zip(arrays, self.rings, strict=False):
            plgpu.copy_gmem_to_smem(self.tile_of(array, group, start, first_row), ring.at[slot], filled)
        for _ in self.rings[len(arrays) :]:
            plgpu.barrier_arrive(filled)

    def fetch_all(self, fetch, backwards=False):
        """The first tiles that are worked on, as many as there is room for, by `fetch(index)` each."""
        tiles = self.range.tiles

        def one(step, carry):
            fetch(tiles - 1 - step if backwards else step)
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(minimum(tiles, self.tiling.stages)), one, ())

    def wait(self, index):
        """Until the tile is there."""
        _, plgpu = pallas()
        plgpu.barrier_wait(self.filled.at[self.slot(index)])

    def walk(self, row, totals, refill, *, inputs, backwards=False, there=0, written=(), read_again=False):
        """Work on all tiles, from the first to the last or backwards; returns the totals.

        - `row(values)`: of a fragment of each of the first `inputs` rings, (terms to add to the totals, results).
        - `refill(index)`: that tile is done with; fetch another into its slot, if there is one.
        - `there`: so many tiles, the first that are worked on, were waited for already.
        - `written`: functions of a tile's first row, the tiles in memory to which the results go.
        - `read_again`: they are read from there afterwards.
        """
        pl, plgpu = pallas()
        tiles, outputs = self.range.tiles, len(written)
        step_of_the_second = jnp.int32(1) if backwards else tiles - 1
        last_overlaps = self.range.last_overlaps

        def index_of(step):
            return tiles - 1 - step if backwards else step

        def one_tile(step, totals):
            index = index_of(step)
            when(step >= there)(lambda: self.wait(index))
            # First of the tile: added one after the other to a long sum, values lose more digits than sums of them do.
            totals = added(totals, self._tile(index, row, self.rows.zeros(len(totals)), inputs, outputs))
            plgpu.commit_smem()  # all threads of the warpgroup have read the tile, and written the results
            if not outputs:
                refill(index)
                return totals
            # Rows that two tiles have are written twice, with the same bits; one after the other nevertheless.
            if last_overlaps is not False:
                when(last_overlaps & (step == step_of_the_second))(lambda: plgpu.wait_smem_to_gmem(0))
            slot, first_row = self.slot(index), self.range.tile_row(index)
            for ring, to in zip(self.rings[:outputs], written, strict=True):
                plgpu.copy_smem_to_gmem(ring.at[slot], to(first_row))
            # A slot is filled again a step later, so that its results have had time to leave.
            plgpu.wait_smem_to_gmem(outputs, wait_read_only=True)
            when(step > 0)(lambda: refill(index_of(step - 1)))
            return totals

        totals = lax.fori_loop(jnp.int32(0), jnp.int32(tiles), one_tile, totals)
        if outputs:
            plgpu.wait_smem_to_gmem(0, wait_read_only=not read_again)
            refill(index_of(tiles - 1))
        return totals

    def _tile(self, index, row, totals, inputs, outputs=0, *, first=False):
        """One tile: the totals with the terms of the rows that no tile before it has; the results of all its rows.

        `first`: it is the first one.
        """
        pl, _ = pallas()
        t, slot = self.tiling, self.slot(index)
        tiles = [ring.at[slot] for ring in self.rings[:inputs]]
        rows, turn_rows = t.fragment_rows, t.fragment_rows * t.fragments_at_once

        def load(refs, place):
            return [as_fragment(ref[place]).astype(F32) for ref in refs]

        def use(refs, place, values, totals, counted=None):
            terms, results = row(values)
            for ref, result in zip(refs[:outputs], results, strict=True):
                ref[place] = result.astype(ref.dtype)
            if counted is not None:
                terms = [or_zero(counted, term) for term in terms]
            return added(totals, terms)

        def one_turn(turn, totals):
            refs = [tile.at[pl.ds(turn * turn_rows, turn_rows)] for tile in tiles]
            places = [pl.ds(start, rows) for start in range(0, turn_rows, rows)]
            loaded = [load(refs, place) for place in places]  # all of them before the first is used
            for place, values in zip(places, loaded, strict=True):
                totals = use(refs, place, values, totals)
            return totals

        whole_turns = jnp.int32(0)
        if (
            totals and not first and self.range.last_overlaps is not False
        ):  # fragments with rows that another tile has, up to the first turn without
            skipped = self.range.skipped(index)

            def fragment_in_part(i, totals):
                place = pl.ds(i * rows, rows)
                return use(tiles, place, load(tiles, place), totals, self.rows.number() + i * rows >= skipped)

            whole_turns = div(skipped + (turn_rows - 1), turn_rows)
            start = jnp.int32(0) if outputs else div(skipped, rows)
            totals = lax.fori_loop(start, whole_turns * t.fragments_at_once, fragment_in_part, totals)
        return lax.fori_loop(whole_turns, jnp.int32(t.tile_rows // turn_rows), one_turn, totals)

    def pivot(self):
        """The mean of the first array's first tile, 0 where that is not finite: a vector."""
        (total,) = self._tile(jnp.int32(0), lambda values: (values, ()), self.rows.zeros(1), 1, first=True)
        (total,) = self.rows.sums([total])
        return _finite_or_zero(total * (1 / self.tiling.tile_rows))

    def moments(self, pivot, sums):
        """Pivot, delta and squares about the mean, of the sums of deviations from the pivot and of their squares."""
        (total, square_sum), number = sums, as_float(self.range.rows)
        delta = total / number
        return pivot, delta, squares_about_mean(square_sum, total, delta)

    def merged(self, exchange, copies, moments):
        """The block's partial result, of those that its warpgroups have shown."""
        t, vectors = self.tiling, exchange.shown.shape[2]
        if moments:
            numbers = [as_float(t.worker_range(self.split, w).rows) for w in range(t.warpgroups)]
            merged = _merge([exchange.vectors(0, w, vectors) for w in range(t.warpgroups)], numbers)
        else:
            merged = exchange.sums(0, vectors)
        if t.copies_in_block == 1:
            return merged
        parts = copies.of(merged)
        if moments:
            return _merge(parts, [as_float(t.split_rows(self.split))] * len(parts))
        return functools.reduce(added, parts)

    def write_partial(self, partial_ref, whole, start, block, vectors):
        """Write the block's partial result for the columns from `start` on, which are the block of this number.

        `whole` is the group, or the unit, that it is a part of.
        """
        pl, _ = pallas()
        t = self.tiling
        for index, value in enumerate(vectors):
            partial_ref[whole, index, self.split, pl.ds(start, t.columns)] = value
        if t.copies > 1:

            @when(block == 0)
            def _():
                for index, value in enumerate(vectors):
                    partial_ref[whole, index, self.split, pl.ds(t.width, t.columns)] = value


def _finite_or_zero(value):
    return or_zero(lax.abs(value) < jnp.inf, value)


def _merge(parts, numbers):
    """Moments (pivot, delta, squares about the mean) of parts with these numbers of values, as those of the whole.

    About the first part's pivot; Chan, Golub & LeVeque, The American Statistician 37, 1983.
    """
    pivot = parts[0][0]
    total = sum(numbers)
    offsets = [(part_pivot - pivot) + delta for part_pivot, delta, _ in parts]
    delta = functools.reduce(jnp.add, [offset * (n / total) for offset, n in zip(offsets, numbers, strict=True)])
    squares = [
        part[2] + jnp.square(offset - delta) * n for part, offset, n in zip(parts, offsets, numbers, strict=True)
    ]
    return pivot, delta, functools.reduce(jnp.add, squares)
