"""What the backend `pallas_gpu` keeps on chip: the `Resident`, the plan of a kernel that reads its arrays once.

Pure functions of sizes: they are tested exhaustively on small sizes.
"""

import itertools
import math
from dataclasses import dataclass

from bn_fused.kernels.backends.pallas_gpu.tiles import (
    ALIGNMENT,
    UNROLL,
    WARPGROUP,
    WIDEST,
    ResidentTiling,
    can_cut,
    fold_of,
    warpgroups_of,
)

# The longest tile that the copy engine takes, and tiles that a warpgroup keeps. Mosaic has up to 32 barriers in a
# group, one for each tile of a block.
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
# Vectors that the warpgroups of a block exchange in all the rounds of its merge.
EXCHANGED = 2


@dataclass(frozen=True)
class Resident:
    """Tiles of a kernel that reads its arrays once and keeps them in shared memory: see `pallas_gpu.resident`.

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
    """The `Resident` of an operation, or None where it does not pay or does not fit.

    Its kernel keeps `inputs` arrays [groups, rows, channels] and merges `sums` values per column. With
    `clusters_only`, its units are clusters.

    Of the ways to fold rows and of blocks of 128 and 256 columns, those with the fewest slabs, and then the wider ones
    unless their merge, of more and longer parts, is more than a quarter of what a block keeps.
    """
    fold_and_columns = fold_of(rows, channels, itemsize)
    if fold_and_columns is None:
        return None
    folds = {fold_and_columns[0]}
    if channels >= WARPGROUP and channels * itemsize % ALIGNMENT == 0:
        folds.add(1)
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
            column_bytes = rows // fold / splits * itemsize * inputs
            candidates.append((resident.slabs, splits * fold * sums * 4 > column_bytes / 4, fold, -columns, resident))
    return min(candidates, key=lambda candidate: candidate[:4])[4] if candidates else None


def _resident(groups, rows, blocks, itemsize, chip, inputs, sums, fold, columns, clusters_only):
    unit_blocks = blocks if fold > 1 else 1
    units = groups * blocks // unit_blocks
    warpgroups = warpgroups_of(rows)
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


def resident_tiling(resident, groups, rows, channels, itemsize, inputs):
    """What a `Resident` makes of `inputs` arrays [groups, rows, channels].

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
        can_cut(rows, channels, itemsize, r.fold, r.columns, splits, r.warpgroups)
        and r.members == splits * unit_blocks
        and 1 <= r.at_once <= tiling.units
        and r.slabs == -(-tiling.units // r.at_once)
        and 1 <= r.tile_rows <= min(LONGEST_TILE, folded // workers)
        and r.tiles <= MOST_TILES
        and tiling.worker_range(0).tiles <= r.tiles
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
