"""How the backend `pallas_gpu` cuts an array into tiles: the `Plan`, and the arithmetic that follows from it.

Pure functions of sizes, without JAX: they are tested exhaustively on small sizes. The kernels of `pallas_gpu_kernels`
compute the same with the device's integers.
"""

import math
from dataclasses import dataclass

from .launches import launches, passes

WARPGROUP = 128  # threads
# Rows whose values a thread holds at the same time: enough independent loads to hide shared memory's latency.
UNROLL = 8
# The longest row segment of a tile, a limit of the copy engine (TMA boxes have at most 256 elements an axis).
WIDEST = 256
# More neighbouring rows than that are not folded into one: their columns have to be merged again.
MOST_FOLDED = 256
MOST_TILE_ROWS = 64
# Of a block's shared memory: what is left for the barriers and for the exchange between warpgroups, at most 4
# warpgroups * 3 values * 256 columns * 4 bytes.
RESERVED = 16 * 1024
STAGES = 3
MOST_WARPGROUPS = 4
# Where the moments' partial results are merged, 1024 threads share the work of 128 channels.
MERGE_WARPGROUPS = 8
ALIGNMENT = 16  # bytes: what the copy engine demands of an array's rows
COPIED = ALIGNMENT // 4  # so many float32 make that


@dataclass(frozen=True)
class Plan:
    """Tiles and launches of the streaming kernels.

    x [groups, rows, channels] is seen as [groups, rows/fold, fold*channels]: `fold` neighbouring rows make one.

    - `fold`: so that a row is a multiple of 16 bytes, and where it can be, of the block's columns: see `fold_of`.
    - `columns`: of a block, 128 or 256. Where they do not divide the row, the last block overlaps the one before.
    - `splits`: the rows of each group are cut into that many ranges, one block (of threads) each.
    - `warpgroups`: of a block, each of which has a part of the block's rows, a ring of tiles and barriers of its own.
    - `stages`: tiles in that ring.
    - `ring_bytes`: shared memory of all the rings of a block.
    - `residual`: a residual is added; `derivative`: an activation's derivative needs it in a backward.
    """

    fold: int
    columns: int
    splits: int
    warpgroups: int
    stages: int
    ring_bytes: int
    residual: bool = False
    derivative: bool = False

    def passes(self, operation):
        """(reads, writes) of arrays of x's size inside the kernels of an operation."""
        return passes(operation, self.residual, self.derivative)

    def launches(self, operation):
        """The kernels of an operation, by name and in order."""
        return launches(operation)


@dataclass(frozen=True)
class Tiling:
    """What a plan makes of an array: everything a kernel's indices are computed from.

    `rows` and `width` are those of the folded view; `blocks` the column blocks; `workers` the warpgroups that share the
    rows of a column block; `tile_rows` the rows of a tile.
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
        return -(-self.width // self.columns)

    @property
    def workers(self) -> int:
        return self.splits * self.warpgroups

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
        """Width of the partial results: where rows are folded, the first block's columns stand there twice.

        So the columns of any 128 neighbouring channels, counted cyclically, are neighbours in memory.
        """
        return self.width + (self.columns if self.fold > 1 else 0)

    @property
    def merge_blocks(self) -> int:
        """Blocks of 128 columns of the folded row, one for each block of threads of a merge."""
        return -(-self.width // WARPGROUP)

    def merge_start(self, block):
        """The first column of a merge's block; the last block ends with the row."""
        return min(block * WARPGROUP, self.width - WARPGROUP)

    def copy_start(self, start, copy):
        """Where the columns of the same channels as those from `start` on begin, in the copy of that number."""
        return (start + copy * self.channels) % self.width

    def block_start(self, block):
        """The first column of a block; the last block ends with the row."""
        return min(block * self.columns, self.width - self.columns)

    def worker_range(self, worker):
        """(first row, number of rows) of a worker: all rows, in order, differing by at most one."""
        base, extra = divmod(self.rows, self.workers)
        return worker * base + min(worker, extra), base + (worker < extra)

    def tile(self, worker, index):
        """(first row, rows to skip) of a worker's tile: the last one is moved back to end with the worker's rows."""
        start, rows = self.worker_range(worker)
        moved = min(index * self.tile_rows, rows - self.tile_rows)
        return start + moved, index * self.tile_rows - moved

    def tiles(self, worker):
        """How many tiles a worker has."""
        return -(-self.worker_range(worker)[1] // self.tile_rows)

    def split_rows(self, split):
        """Rows that the warpgroups of a split have together."""
        base, extra = divmod(self.rows, self.workers)
        return base * self.warpgroups + min(max(extra - split * self.warpgroups, 0), self.warpgroups)


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


def splits_of(rows, blocks, warpgroups, cores):
    """Into how many ranges the rows are cut: so that the last wave of thread blocks leaves few cores without work.

    Every worker keeps `UNROLL` rows or more where there are that many.
    """
    most = max(1, rows // (warpgroups * UNROLL))

    def occupied(splits):
        return blocks * splits / (-(-blocks * splits // cores) * cores)

    one_wave = cores // blocks
    if one_wave >= 1:
        return min(one_wave, most)
    # More than one wave: a few ranges more, where that fills the last one better.
    return max(range(1, min(most, 8) + 1), key=lambda splits: (occupied(splits) > 0.9, occupied(splits), -splits))


def make_plan(groups, rows, channels, itemsize, chip, residual=False, derivative=False):
    """The plan for x [groups, rows, channels] on a chip, or None if there is none (see `fold_of`)."""
    found = fold_of(rows, channels, itemsize)
    if found is None:
        return None
    fold, columns = found
    rows //= fold
    warpgroups = next((number for number in (MOST_WARPGROUPS, 2) if rows >= number * UNROLL), 1)
    blocks = groups * -(-fold * channels // columns)
    return Plan(
        fold=fold,
        columns=columns,
        splits=splits_of(rows, blocks, warpgroups, chip.cores),
        warpgroups=warpgroups,
        stages=STAGES,
        ring_bytes=chip.shared_memory_per_block - RESERVED,
        residual=residual,
        derivative=derivative,
    )


def tiling(plan, groups, rows, channels, itemsize, inputs):
    """What a plan makes of arrays [groups, rows, channels], of which a pass reads `inputs`.

    ValueError where the plan (one given by hand) does not fit them.
    """
    width, folded = plan.fold * channels, rows // plan.fold
    workers = plan.splits * plan.warpgroups
    fits = (
        rows % plan.fold == 0
        and width * itemsize % ALIGNMENT == 0
        and plan.columns in (WARPGROUP, WIDEST)
        and plan.columns <= width
        and 1 <= plan.warpgroups <= MOST_WARPGROUPS
        and plan.splits >= 1
        and plan.stages >= 1
        and workers <= folded
    )
    row_bytes = plan.columns * itemsize
    most = plan.ring_bytes // (plan.warpgroups * plan.stages * inputs * row_bytes) if fits else 0
    if most < 1:
        raise ValueError(f"{plan} does not fit {inputs} arrays [{groups}, {rows}, {channels}] of {itemsize} bytes")
    tile_rows = min(1 << int(math.log2(most)), MOST_TILE_ROWS, folded // workers)
    return Tiling(
        groups, folded, width, channels, plan.fold, plan.columns, plan.splits, plan.warpgroups, plan.stages, tile_rows
    )
