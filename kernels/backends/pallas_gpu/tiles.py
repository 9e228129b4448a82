"""How the backend `pallas_gpu` cuts an array into tiles, and the index arithmetic of its kernels.

x [groups, rows, channels] is seen as [groups, rows/fold, fold*channels]: `fold` neighbouring rows make one. Its columns
are cut into blocks, its rows into ranges, one for each worker (a warpgroup), and a worker's range into tiles.

Every function of an index takes a Python int or an int32 value of a kernel: the tests go through all plans of small
sizes with the functions that the kernels call.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

WARPGROUP = 128  # threads
MOST_WARPGROUPS = 4
# Elements of a fragment, which a warpgroup loads in one instruction of 8 bytes a thread where they have 16 bits.
FRAGMENT = 4 * WARPGROUP
# Fragments that a thread loads before it uses the first: enough to hide shared memory's latency.
FRAGMENTS_AT_ONCE = 4
# Vectors that a warpgroup turns into fragments at once, or fragments into vectors.
ROWS_AT_ONCE = 3
# Shared memory for barriers and for the alignment of what stands beside them.
BARRIERS = 2048
# Copies of a channel that a block merges.
MOST_COPIES = 16
# Rows that a warpgroup should have at least.
LEAST_ROWS = 8
# Partial results of neighbouring splits that are merged as the rows of a fragment, at most.
SPLITS_TOGETHER = FRAGMENT // WARPGROUP
# The longest row segment of a tile, a limit of the copy engine (TMA boxes have at most 256 elements an axis).
WIDEST = 256
# More neighbouring rows than that are not folded into one: their columns have to be merged again.
MOST_FOLDED = 256
# The longest tile that the copy engine takes.
LONGEST_TILE = 256
# Tiles of a warpgroup in shared memory: Mosaic has up to 32 barriers in a group, one for each tile of a block. Where
# there are more tiles, so many at least: one is used, and another is on its way.
MOST_STAGES, LEAST_STAGES = 8, 2
ALIGNMENT = 16  # bytes: what the copy engine demands of an array's rows
# Values per column by which parts are merged: pivot, delta and squares; two sums.
MOMENTS, SUMS = 3, 2

Index = int | jax.Array  # a Python int, or an int32 value of a kernel; never negative


# --- arithmetic of both kinds of index -------------------------------------------------------------------------


def _of_python(*values):
    return all(isinstance(value, int) for value in values)


def div(dividend, divisor: int):
    """The quotient, rounded down; of 32 bits in a kernel, also where JAX's default integers have 64."""
    return dividend // divisor if _of_python(dividend) else lax.div(dividend, jnp.int32(divisor))


def rem(dividend, divisor: int):
    """The remainder of `div`."""
    return dividend % divisor if _of_python(dividend) else lax.rem(dividend, jnp.int32(divisor))


def minimum(one, other):
    """The smaller of the two."""
    return min(one, other) if _of_python(one, other) else lax.min(jnp.int32(one), jnp.int32(other))


def one_if(condition):
    """1 where the condition holds, else 0. By a choice: to convert from bool, Mosaic asks ptxas for its version."""
    if isinstance(condition, bool):
        return int(condition)
    return lax.select(condition, *(lax.full(condition.shape, value, jnp.int32) for value in (1, 0)))


def as_float(number):
    """A number of rows as float32 values are multiplied with."""
    return float(number) if isinstance(number, int) else number.astype(jnp.float32)


# --- tiles ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowRange:
    """The rows of a worker: their number, the first one, and in how many tiles of `tile_rows` they are worked on."""

    first: Index
    rows: Index
    tiles: Index
    tile_rows: int

    def tile_row(self, index):
        """The first row of a tile: the last one is moved back to end with the worker's rows."""
        return self.first + minimum(index * self.tile_rows, self.rows - self.tile_rows)

    @property
    def last_overlaps(self):
        """Whether the last tile is moved back; a bool where that is known of Python's numbers."""
        return self.tiles * self.tile_rows > self.rows

    def skipped(self, index):
        """The rows of a tile that the one before it has."""
        return self.first + index * self.tile_rows - self.tile_row(index)


@dataclass(frozen=True)
class Tiling:
    """What a plan makes of an array: everything a kernel's indices are computed from.

    `rows` and `width` are those of the folded view; `blocks` the column blocks; `splits` the ranges that their rows are
    cut into, one for each block of threads, whose `warpgroups` share its rows; `stages` the tiles that each of these
    has in shared memory; `tile_rows` the rows of a tile.
    """

    groups: int
    rows: int
    width: int
    channels: int
    fold: int
    columns: int
    splits: int
    warpgroups: int
    stages: int
    tile_rows: int

    @property
    def blocks(self) -> int:
        """Blocks of columns, of which the last one overlaps the one before where they do not divide the row."""
        return -(-self.width // self.columns)

    @property
    def grid(self) -> int:
        """Blocks of threads in a launch."""
        return self.groups * self.blocks * self.splits

    @property
    def samples(self) -> int:
        """Values of one channel of one group."""
        return self.rows * self.fold

    @property
    def padded_width(self) -> int:
        """Width of the partial results: where they hold several copies, the first block's columns stand there twice.

        So the columns of any 128 neighbouring channels, counted cyclically, are neighbours in memory.
        """
        return self.width + (self.columns if self.copies > 1 else 0)

    @property
    def padded_splits(self) -> int:
        """Partial results in memory: the last ones, up to a multiple of those merged together, are never written."""
        return -(-self.splits // SPLITS_TOGETHER) * SPLITS_TOGETHER

    @property
    def fragment_rows(self) -> int:
        """Rows of a fragment, a power of two that divides the rows of a tile."""
        return math.gcd(FRAGMENT // self.columns, self.tile_rows)

    @property
    def fragments_at_once(self) -> int:
        """Fragments that are loaded before the first is used."""
        return math.gcd(FRAGMENTS_AT_ONCE, self.tile_rows // self.fragment_rows)

    @property
    def copies_in_block(self) -> int:
        """Copies of a channel in a folded row that a block merges itself: all of them, if its columns are the row."""
        return self.fold if self.width == self.columns and self.fold <= MOST_COPIES else 1

    @property
    def copies(self) -> int:
        """Copies of a channel in the partial results."""
        return self.fold // self.copies_in_block

    def entries(self, together: int) -> int:
        """Partial results of a channel, so many splits at a time."""
        return -(-self.splits // together) * self.copies

    @property
    def merge_blocks(self) -> int:
        """Blocks of 128 columns of the folded row, one for each block of threads of a merge."""
        return -(-self.width // WARPGROUP)

    def place(self, index):
        """(group, block of columns, split) of a stream's block of threads."""
        split, rest = rem(index, self.splits), div(index, self.splits)
        block, group = rem(rest, self.blocks), div(rest, self.blocks)
        return group, block, split

    def block_start(self, block):
        """The first column of a block; the last block ends with the row."""
        return minimum(block * self.columns, self.width - self.columns)

    def split_rows(self, split):
        """How many rows a split has: numbers that differ by at most one."""
        base, extra = divmod(self.rows, self.splits)
        return base + one_if(split < extra) if extra else base

    def part_values(self, split):
        """Values of a channel in a partial result of a split."""
        return self.split_rows(split) * self.copies_in_block

    def worker_range(self, split, warpgroup):
        """The `RowRange` of a split's warpgroup: they share its rows, in order and as evenly as they go."""
        base, extra = divmod(self.rows, self.splits)
        of_split = self.split_rows(split)
        before = split * base + (minimum(split, extra) if extra else 0)
        base, extra = div(of_split, self.warpgroups), rem(of_split, self.warpgroups)
        rows = base + one_if(warpgroup < extra)
        first = before + warpgroup * base + minimum(warpgroup, extra)
        return RowRange(first, rows, div(rows + (self.tile_rows - 1), self.tile_rows), self.tile_rows)

    def merge_place(self, index):
        """(group, block of 128 columns) of a merge's block of threads."""
        return div(index, self.merge_blocks), rem(index, self.merge_blocks)

    def merge_start(self, block):
        """The first column of a merge's block; the last block ends with the row."""
        return minimum(block * WARPGROUP, self.width - WARPGROUP)

    def entry(self, index, together):
        """(first split, copy) of one of the `entries`."""
        of_copy = -(-self.splits // together)
        return rem(index, of_copy) * together, div(index, of_copy)

    def copy_start(self, start, copy):
        """Where the columns of the same channels as those from `start` on begin, in the copy of that number."""
        return rem(start + copy * self.channels, self.width) if self.copies > 1 else start


@dataclass(frozen=True)
class OneLaunchTiling(Tiling):
    """What a `OneLaunch` makes of an array: `splits` are a unit's row ranges.

    A unit is what is merged together, and a slot a place on the chip for one, which `members` blocks of threads fill.
    """

    at_once: int
    cluster: bool

    @property
    def unit_blocks(self) -> int:
        """Blocks of columns that are merged together: the copies of a channel may lie anywhere in a folded row."""
        return self.blocks if self.copies > 1 else 1

    @property
    def units(self) -> int:
        """Units, of which `at_once` are worked on at the same time."""
        return self.groups * self.blocks // self.unit_blocks

    @property
    def members(self) -> int:
        """Blocks of threads of a unit."""
        return self.unit_blocks * self.splits

    @property
    def grid(self) -> int:
        """Blocks of threads in a launch."""
        return self.at_once * self.members

    @property
    def partial_width(self) -> int:
        """Width of a unit's partial results."""
        return self.padded_width if self.copies > 1 else self.columns

    def slot(self, index):
        """(slot, member) of a block of threads that is not in a cluster, whose members the hardware numbers."""
        return div(index, self.members), rem(index, self.members)

    def member(self, member):
        """(split, block of columns within the unit) of a slot's member."""
        return rem(member, self.splits), div(member, self.splits)

    def turns(self, slot):
        """How many units the blocks of threads of a slot work on."""
        return div(self.units - slot + (self.at_once - 1), self.at_once)

    def unit(self, slot, turn):
        """The unit that the blocks of threads of a slot work on in a turn."""
        return slot + turn * self.at_once

    def unit_place(self, unit, within):
        """(group, block of columns) of a unit's block of columns."""
        return (unit, within) if self.copies > 1 else (div(unit, self.blocks), rem(unit, self.blocks))

    def partial_start(self, start):
        """Where columns that start there in the row start in the partial results of their unit."""
        return start if self.copies > 1 else 0


# --- how an array can be cut ----------------------------------------------------------------------------------


def fold_of(rows, channels, itemsize):
    """(fold, columns) for an array, or None if no view of it has rows that the copy engine can address.

    The one with the least extra traffic: where the blocks' columns do not fit the row exactly, the last block reads
    again, in every pass, what the one before has read; and with the fold grow the partial results and the repeated
    values per channel, some 90 bytes for each column of a folded row.
    """
    candidates = []
    for fold in range(1, min(rows, MOST_FOLDED) + 1):
        width = fold * channels
        if rows % fold or (width * itemsize) % ALIGNMENT or width < WARPGROUP:
            continue
        for columns in (WIDEST, WARPGROUP):
            if columns <= width:
                again = -(-width // columns) * columns / width - 1
                per_column = 90 / (rows // fold * itemsize)
                # Half as many bytes in an access, and one more small launch, cost little, but not nothing.
                preferences = 0.01 * (columns < WIDEST) + 0.02 * (fold > 1)
                candidates.append((3 * again + per_column + preferences, fold, columns))
    return min(candidates)[1:] if candidates else None


def warpgroups_of(rows):
    """Warpgroups of a block whose column blocks have so many (folded) rows: each finds `LEAST_ROWS` or more."""
    return next((number for number in (MOST_WARPGROUPS, 2) if rows >= number * LEAST_ROWS), 1)


def can_cut(rows, channels, itemsize, fold, columns, splits, warpgroups):
    """Whether an array can be folded and cut in this way, with a row for every worker."""
    width = fold * channels
    return (
        rows % fold == 0
        and width * itemsize % ALIGNMENT == 0
        and columns in (WARPGROUP, WIDEST)
        and columns <= width
        and 1 <= warpgroups <= MOST_WARPGROUPS
        and splits >= 1
        and splits * warpgroups <= rows // fold
    )


def ring_bytes(chip, columns, warpgroups, vectors):
    """Shared memory of a block for its rings: what its warpgroups exchange, of so many vectors, is not of it."""
    exchanged = 4 * columns * (warpgroups * vectors + 2 * MOMENTS)
    rows = 4 * FRAGMENT * ROWS_AT_ONCE * warpgroups
    return chip.shared_memory_per_block - BARRIERS - exchanged - rows


def ring_of(least, most, room, columns):
    """(tiles, tile_rows, stages) for workers of `least` to `most` rows, with room for so many rows of tiles; or None.

    As few rows as possible are read again, because there is no room to keep them or because two tiles have them; a tile
    has whole turns of the kernels' loops where it can; and there are enough of them for some to be on their way. What
    these are worth against each other was found by measuring.
    """
    turn = FRAGMENT // columns * FRAGMENTS_AT_ONCE
    candidates = []
    for stages in range(1, MOST_STAGES + 1):
        longest = min(least, room // stages, LONGEST_TILE)
        multiples = [2**power for power in range(turn.bit_length())]
        enough = -(-most // stages)  # for all of them to be kept
        for tile_rows in {rows for m in multiples for rows in (longest // m * m, -(-enough // m) * m)}:
            if not 1 <= tile_rows <= longest:
                continue
            tiles = -(-most // tile_rows)
            if tiles < stages or tiles > stages < LEAST_STAGES:
                continue
            twice = tiles * tile_rows / most - 1
            again = max(0, 1 - stages * tile_rows / most)
            # Nothing is added up until the first tile is there, and a tile costs as many instructions as ten rows more.
            cost = twice + again + 0.4 / stages + 0.3 * 10 * tiles / most
            # Fewer fragments at once, and narrower loads.
            halved = math.log2(turn / math.gcd(tile_rows, turn))
            narrow = math.log2(FRAGMENT // columns / math.gcd(tile_rows, FRAGMENT // columns))
            candidates.append((cost + 0.05 * halved + 0.1 * narrow, tiles, tile_rows, stages))
    return min(candidates)[1:] if candidates else None
