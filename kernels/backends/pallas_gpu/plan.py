"""How the backend `pallas_gpu` cuts an array into tiles: the `Plan`, and the arithmetic that follows from it.

The streaming kernels' tiles are the plan's own; `Resident` has those of a kernel that keeps what it reads on chip.

Pure functions of sizes, without JAX: they are tested exhaustively on small sizes. The kernels of `pallas_gpu_kernels`
compute the same with the device's integers.
"""

import itertools
import math
from dataclasses import dataclass

from bn_fused.kernels.backends.gpu.launches import launches, passes

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
# A resident kernel: the longest tile the copy engine takes, and tiles a warpgroup keeps. Mosaic has up to 32 barriers
# in a group, one for each tile of a block.
LONGEST_TILE = 256
MOST_TILES = 8
# Blocks in a cluster that every chip can place.
LARGEST_CLUSTER = 8
# What a slab after slab loses at most of the chip: more, and the pass that it saves does not pay.
LEAST_OCCUPIED = 0.75
# Columns that the last block reads again, as a share: more of them, and the rows are folded, or streamed.
MOST_OVERLAP = 1.05
# Shared memory for barriers and for the alignment of what stands beside them.
BARRIERS = 2048
# Vectors that the warpgroups of a resident kernel exchange in all the rounds of its merge.
EXCHANGED = 2
# Values per column by which parts are merged: pivot, delta and squares; two sums.
MOMENTS, SUMS = 3, 2


@dataclass(frozen=True)
class Resident:
    """Tiles of a kernel that reads its arrays once and keeps them in shared memory: see `pallas_gpu_resident`.

    A unit is what is merged together: the rows of a group in one block of columns, or, where rows are folded, in all
    of them. `members` blocks of threads share it, and each keeps its part until all have found their sums.

    - `fold`, `columns`, `warpgroups`: as of `Plan`.
    - `members`: blocks of threads of a unit, which wait for each other. So all of them must be on the chip at once.
    - `at_once`: units that are worked on at the same time, `members * at_once` blocks in all, one on a multiprocessor.
    - `slabs`: how often these blocks go on to the next `at_once` units: 1 if everything fits on chip.
    - `tiles`, `tile_rows`: what each warpgroup keeps.
    - `cluster`: a unit's blocks are launched as one cluster, which the hardware starts together or not at all.
    """

    fold: int
    columns: int
    warpgroups: int
    members: int
    at_once: int
    slabs: int
    tiles: int
    tile_rows: int
    cluster: bool


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
    - `forward`, `backward`: how these operations keep what they read on chip, or None: they stream it twice.
    """

    fold: int
    columns: int
    splits: int
    warpgroups: int
    stages: int
    ring_bytes: int
    residual: bool = False
    derivative: bool = False
    forward: Resident | None = None
    backward: Resident | None = None

    def kind(self, operation):
        """ "resident" where all of an operation's arrays stay on chip, "slab" where one part after another does so, else
        "streaming".
        """
        kept = self.kept(operation)
        return "streaming" if kept is None else "resident" if kept.slabs == 1 else "slab"

    def kept(self, operation):
        """The `Resident` of an operation, or None."""
        return {"forward": self.forward, "backward": self.backward}.get(operation)

    def passes(self, operation):
        """(reads, writes) of arrays of x's size inside the kernels of an operation."""
        return passes(operation, self.residual, self.derivative, self.kept(operation) is not None)

    def launches(self, operation):
        """The kernels of an operation, by name and in order."""
        return launches(operation) if self.kept(operation) is None else (f"bn_fused_resident_{operation}",)


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


def make_plan(groups, rows, channels, itemsize, chip, residual=False, derivative=False, clusters_only=False):
    """The plan for x [groups, rows, channels] on a chip, or None if there is none (see `fold_of`)."""
    found = fold_of(rows, channels, itemsize)
    if found is None:
        return None
    fold, columns = found
    rows //= fold
    warpgroups = next((number for number in (MOST_WARPGROUPS, 2) if rows >= number * UNROLL), 1)
    blocks = groups * -(-fold * channels // columns)
    sizes = groups, rows * fold, channels, itemsize, chip
    return Plan(
        fold=fold,
        columns=columns,
        splits=splits_of(rows, blocks, warpgroups, chip.cores),
        warpgroups=warpgroups,
        stages=STAGES,
        ring_bytes=chip.shared_memory_per_block - RESERVED,
        residual=residual,
        derivative=derivative,
        forward=make_resident(*sizes, 1 + residual, MOMENTS, clusters_only),
        backward=make_resident(*sizes, 2 + (residual and derivative), SUMS, clusters_only),
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


# --- what stays on chip ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResidentTiling(Tiling):
    """What a `Resident` makes of an array. `stages` are the tiles that a warpgroup keeps, `splits` a unit's row ranges."""

    at_once: int
    cluster: bool

    @property
    def unit_blocks(self) -> int:
        """Blocks of columns that are merged together: the copies of a channel lie anywhere in a folded row."""
        return self.blocks if self.fold > 1 else 1

    @property
    def units(self) -> int:
        return self.groups * self.blocks // self.unit_blocks

    @property
    def members(self) -> int:
        """Blocks of threads of a unit."""
        return self.unit_blocks * self.splits

    @property
    def grid(self) -> int:
        return self.at_once * self.members

    @property
    def partial_width(self) -> int:
        """Width of a unit's partial results."""
        return self.padded_width if self.fold > 1 else self.columns

    def place(self, slot, member, turn):
        """(unit, group, block of columns, split) that a block of threads works on in a turn; None if there is none."""
        unit = slot + turn * self.at_once
        if unit >= self.units:
            return None
        split, within = member % self.splits, member // self.splits
        group, block = (unit, within) if self.fold > 1 else divmod(unit, self.blocks)
        return unit, group, block, split

    def turns(self, slot):
        """How many units the blocks of threads of a slot work on."""
        return -(-(self.units - slot) // self.at_once)


def kept_bytes(chip, columns, warpgroups, sums):
    """Shared memory of a block for tiles: all but the exchange between its warpgroups, before and in the merge."""
    return chip.shared_memory_per_block - BARRIERS - warpgroups * columns * 4 * (sums + EXCHANGED)


def tiles_of(rows, workers, most_rows):
    """(tiles, tile_rows) with which every worker keeps its part of the rows in room for `most_rows`, or None.

    Of those that overlap little, more tiles, so that a warpgroup has something to do while others come.
    """
    least, most = rows // workers, -(-rows // workers)
    fitting = []
    for wanted in range(1, min(MOST_TILES, -(-most // UNROLL)) + 1) if least else ():
        tile_rows = min(-(-most // wanted), least, LONGEST_TILE)
        tiles = -(-most // tile_rows)
        if tiles <= MOST_TILES and tiles * tile_rows <= most_rows:
            fitting.append((tiles * tile_rows / most + 0.05 / tiles, tiles, tile_rows))
    return min(fitting)[1:] if fitting else None


def make_resident(groups, rows, channels, itemsize, chip, inputs, sums, clusters_only=False):
    """The `Resident` for a kernel that keeps `inputs` arrays [groups, rows, channels] and merges `sums` values per
    column; None where it does not pay or does not fit. With `clusters_only`, of blocks that are clusters.

    Of the ways to fold rows and of blocks of 128 and 256 columns, those with the fewest slabs, and then the wider ones
    unless their merge, of more and longer parts, is more than a quarter of what a block keeps.
    """
    found = fold_of(rows, channels, itemsize)
    if found is None:
        return None
    folds = {found[0]} if channels < WARPGROUP or channels * itemsize % ALIGNMENT else {1, found[0]}
    candidates = []
    for fold, columns in itertools.product(sorted(folds), (WARPGROUP, WIDEST)):
        width = fold * channels
        blocks = -(-width // columns)
        if columns > width or blocks * columns > MOST_OVERLAP * width:
            continue
        sizes = groups, rows // fold, blocks, itemsize, chip, inputs, sums, fold, columns
        resident = _resident(*sizes, clusters_only)
        if resident is not None:
            splits = resident.members // (blocks if fold > 1 else 1)
            kept = rows // fold / splits * itemsize * inputs
            candidates.append((resident.slabs, splits * fold * sums * 4 > kept / 4, fold, -columns, resident))
    return min(candidates, key=lambda candidate: candidate[:4])[4] if candidates else None


def _resident(groups, rows, blocks, itemsize, chip, inputs, sums, fold, columns, clusters_only):
    unit_blocks = blocks if fold > 1 else 1
    units = groups * blocks // unit_blocks
    warpgroups = next((number for number in (MOST_WARPGROUPS, 2) if rows >= number * UNROLL), 1)
    most_rows = kept_bytes(chip, columns, warpgroups, sums) // (warpgroups * inputs * columns * itemsize)
    # All blocks of a unit read the parts of all of them: in sum no more than each one keeps.
    cheap = math.isqrt(max(rows * itemsize * inputs // (fold * sums * 4), 1))
    together = LARGEST_CLUSTER if clusters_only else chip.cores
    most = min(together // unit_blocks, rows // warpgroups, cheap)
    fewest = next((splits for splits in range(1, most + 1) if tiles_of(rows, warpgroups * splits, most_rows)), None)
    if fewest is None:
        return None
    # As few slabs as there can be, and then the cores shared out among the units of one.
    slabs = -(-units // (chip.cores // (unit_blocks * fewest)))
    at_once = -(-units // slabs)
    enough = max(1, rows // (warpgroups * UNROLL))
    wanted = max(fewest, min(chip.cores // (unit_blocks * at_once), most, enough))
    splits = next(splits for splits in range(wanted, 0, -1) if tiles_of(rows, warpgroups * splits, most_rows))
    members = unit_blocks * splits
    if slabs > 1 and units * members < LEAST_OCCUPIED * slabs * chip.cores:
        return None
    tiles, tile_rows = tiles_of(rows, warpgroups * splits, most_rows)
    return Resident(fold, columns, warpgroups, members, at_once, slabs, tiles, tile_rows, members <= LARGEST_CLUSTER)


def resident_tiling(resident, groups, rows, channels, itemsize, inputs, sums):
    """What a `Resident` makes of `inputs` arrays [groups, rows, channels], merged by `sums` values per column.

    ValueError where it (one given by hand) does not fit them; whether it fits the chip, `not_co_resident` says.
    """
    r = resident
    width, folded = r.fold * channels, rows // r.fold
    blocks = -(-width // r.columns)
    unit_blocks = blocks if r.fold > 1 else 1
    splits = r.members // unit_blocks
    workers = splits * r.warpgroups
    tiling = ResidentTiling(
        groups, folded, width, channels, r.fold, r.columns, splits, r.warpgroups, r.tiles, r.tile_rows, r.at_once,
        r.cluster,
    )  # fmt: skip
    fits = (
        rows % r.fold == 0
        and width * itemsize % ALIGNMENT == 0
        and r.columns in (WARPGROUP, WIDEST)
        and r.columns <= width
        and 1 <= r.warpgroups <= MOST_WARPGROUPS
        and splits >= 1
        and r.members == splits * unit_blocks
        and 1 <= r.at_once <= tiling.units
        and r.slabs == -(-tiling.units // r.at_once)
        and workers <= folded
        and 1 <= r.tile_rows <= min(LONGEST_TILE, folded // workers)
        and r.tiles <= MOST_TILES
        and all(tiling.tiles(worker) <= r.tiles for worker in (0, workers - 1))
    )
    if not fits:
        raise ValueError(f"{r} does not fit {inputs} arrays [{groups}, {rows}, {channels}] of {itemsize} bytes")
    return tiling


def not_co_resident(resident, chip, itemsize, inputs, sums):
    """None, or one sentence: why the blocks of a `Resident` may not all be on the chip at the same time.

    Blocks that wait for each other would then wait for ever. A multiprocessor takes one block of such a kernel at
    least: of 128 threads for each warpgroup, with the registers that 512 of them can have, if its shared memory does.
    """
    r = resident
    asked = r.warpgroups * r.tiles * r.tile_rows * r.columns * itemsize * inputs
    room = kept_bytes(chip, r.columns, r.warpgroups, sums)
    if asked > room:
        return f"a block keeps {asked} bytes of tiles, and {chip.name} has room for {room}"
    if r.cluster:
        return (
            None if r.members <= LARGEST_CLUSTER else f"{r.members} blocks are more than a cluster's {LARGEST_CLUSTER}"
        )
    blocks = r.members * r.at_once
    if blocks > chip.cores:
        return f"{blocks} blocks wait for each other, and {chip.name} has {chip.cores} multiprocessors for one each"
    return None
