"""How the backend `pallas_gpu` cuts an array for an operation in one launch: the `OneLaunch`.

Pure functions of sizes: they are tested exhaustively on small sizes.
"""

import itertools
from dataclasses import dataclass

from bn_fused.kernels.backends.pallas_gpu.tiles import (
    ALIGNMENT,
    LEAST_ROWS,
    LEAST_STAGES,
    LONGEST_TILE,
    MOST_STAGES,
    WARPGROUP,
    WIDEST,
    OneLaunchTiling,
    can_cut,
    fold_of,
    ring_bytes,
    ring_of,
    warpgroups_of,
)

# Warpgroups of a block: four were faster once in twenty-two, by 1 %.
WARPGROUPS = (1, 2)
# Blocks in a cluster that every chip can place.
LARGEST_CLUSTER = 8
# Vectors that the warpgroups of a block exchange in all the rounds of its merge.
EXCHANGED = 2
# The figures below are fitted to device times on an H200 (bench/results/nvidia-h200/2026-11-26-one-launch/plans.jsonl).
# What a block could move through memory while the blocks of a unit meet and merge, about 3 us; and while its warpgroups
# exchange their part of it, for each after the first.
MEETING_BYTES, EXCHANGE_BYTES = 96 * 1024, 32 * 1024
# And while streaming kernels are launched one after the other, and merge, about 10 us.
STREAMING_BYTES = 320 * 1024
# A multiprocessor moves so many times its share of the memory's bandwidth where others have nothing to do.
AHEAD = 1.35
# What one warpgroup loses against two where tiles come and go.
ALONE = 0.02
# Of what L2 holds, so much is counted on when the second pass comes to what is not kept.
CACHED_BYTES = 20 << 20


@dataclass(frozen=True)
class OneLaunch:
    """Tiles of a kernel that is a whole operation: see `pallas_gpu.one_launch`.

    A unit is what is merged together: the rows of a group in one block of columns, or, where rows are folded and the
    copies of a channel lie in several blocks, in all of them. `members` blocks of threads share it, and wait for each
    other when they have found their sums.

    - `fold`, `columns`, `warpgroups`: as of `Plan`.
    - `members`: blocks of threads of a unit. All of them must be on the chip at once.
    - `at_once`: units that are worked on at the same time, `members * at_once` blocks in all, one on a multiprocessor.
    - `slabs`: how often these blocks go on to the next `at_once` units.
    - `tiles`: into how many a warpgroup's rows are cut, at most; `tile_rows`: the rows of each.
    - `stages`: tiles that each warpgroup has in shared memory. It reads so many of them once, and the others twice.
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
    stages: int
    cluster: bool

    @property
    def kept(self):
        """The share of the rows that are read once."""
        return min(1, self.stages / self.tiles)


@dataclass(frozen=True)
class Way:
    """What of a `OneLaunch` is a matter of speed and does not depend on the number of rows.

    - `fold`, `columns`, `warpgroups`, `slabs`: as of `OneLaunch`.
    - `share`: of the blocks that there could be, one of so many is launched.
    """

    fold: int
    columns: int
    warpgroups: int
    slabs: int
    share: int


def ways(groups, rows, channels, itemsize, chip, inputs, again, outputs, sums, clusters_only=False):
    """The `Way`s of an operation and what they make of it, {Way or None: OneLaunch or None}, the best by rule first.

    Its kernel reads `inputs` arrays [groups, rows, channels], `again` of them a second time where they are not kept,
    writes `outputs`, and merges `sums` values per column. With `clusters_only`, its units are clusters. None stands for
    the streaming kernels.

    By rule the best way to fold rows, of blocks of 128 and 256 columns, of warpgroups and of numbers of slabs is the
    one in which a multiprocessor moves the fewest bytes, those counted that it could have moved while it waits and
    merges.
    """
    fold_and_columns = fold_of(rows, channels, itemsize)
    if fold_and_columns is None:
        return {None: None}
    whole = [width // channels for width in (WARPGROUP, WIDEST) if width % channels == 0]
    folds = {fold_and_columns[0], *(fold for fold in whole if rows % fold == 0)}
    if channels >= WARPGROUP and channels * itemsize % ALIGNMENT == 0:
        folds.add(1)
    streamed = groups * rows * channels * itemsize / chip.cores
    streaming = _moved(streamed, streamed * chip.cores, 0, inputs, again, outputs) + STREAMING_BYTES
    # Of the same cost the streaming kernels, then the fewest folded rows and columns.
    candidates = [((streaming, 0, 0), None, None)]
    for fold, columns, warpgroups in itertools.product(sorted(folds), (WARPGROUP, WIDEST), WARPGROUPS):
        if columns > fold * channels or warpgroups > warpgroups_of(rows // fold):
            continue
        room = ring_bytes(chip, columns, warpgroups, sums + EXCHANGED) // (warpgroups * inputs * columns * itemsize)
        for share, splits, unit_blocks, at_once, slabs in _shapes(
            groups, rows // fold, fold, -(-fold * channels // columns), warpgroups, chip.cores, clusters_only
        ):
            of_block, more = divmod(rows // fold, splits)
            ring = ring_of(of_block // warpgroups, -(-(of_block + (more > 0)) // warpgroups), room, columns)
            if ring is not None:
                shape = fold, columns, warpgroups, splits * unit_blocks, at_once, slabs
                plan = OneLaunch(*shape, *ring, clusters_only)
                cost = _cost(plan, rows, channels, itemsize, chip.cores, inputs, again, outputs, sums)
                candidates.append(((cost, fold, columns), Way(fold, columns, warpgroups, slabs, share), plan))
    return {way: plan for _, way, plan in sorted(candidates, key=lambda candidate: candidate[0])}


def _shapes(groups, rows, fold, blocks, warpgroups, cores, clusters_only):
    """Ways to share out the multiprocessors: (share, splits, blocks of columns of a unit, units at once, slabs)."""
    unit_blocks = blocks if fold > 1 else 1
    units = groups * blocks // unit_blocks
    together = LARGEST_CLUSTER if clusters_only else cores
    for slabs in sorted({1, 2, 3, 4, 6, 8, -(-units * unit_blocks // cores), units}):
        at_once = -(-units // slabs)
        most = min(together, cores // at_once) // unit_blocks
        if most >= 1 and slabs == -(-units // at_once):
            most = max(1, min(most, rows // (warpgroups * LEAST_ROWS)))
            for splits, share in sorted({-(-most // share): share for share in (4, 2, 1)}.items()):
                yield share, splits, unit_blocks, at_once, slabs


def _moved(of_block, whole, kept, inputs, again, outputs):
    """Bytes that a block moves, of so many in each array, for its part of whole arrays of so many."""
    cached = CACHED_BYTES / (whole * again)
    missing = max(0, 1 - kept - cached) + min(1 - kept, cached) / 2
    return of_block * (inputs + outputs + again * missing)


def _cost(plan, rows, channels, itemsize, cores, inputs, again, outputs, sums):
    """Bytes that a multiprocessor moves, or could have moved while it waits and merges."""
    splits = plan.members // (-(-plan.fold * channels // plan.columns) if plan.fold > 1 else 1)
    of_block = -(-rows // (plan.fold * splits)) * plan.columns * itemsize
    whole = of_block * plan.members * plan.at_once * plan.slabs
    share = of_block * max(plan.members * plan.at_once / cores, 1 / AHEAD)
    moved = _moved(share, whole, plan.kept, inputs, again, outputs)
    alone = plan.warpgroups == 1 and (plan.kept < 1 or plan.slabs > 1)
    # Every block reads the parts of all of them.
    copies = 1 if plan.fold * channels == plan.columns else plan.fold
    parts = splits * copies * sums * plan.columns * 4 * (0.2 + 0.8 / plan.warpgroups)
    meeting = MEETING_BYTES + parts if plan.members > 1 else MEETING_BYTES / 4
    return plan.slabs * (moved * (1 + ALONE * alone) + meeting + EXCHANGE_BYTES * (plan.warpgroups - 1))


def one_launch_tiling(plan, groups, rows, channels, itemsize, inputs):
    """What a `OneLaunch` makes of `inputs` arrays [groups, rows, channels].

    ValueError where it (one given by hand) does not fit them; whether it fits the chip, `not_co_resident` says.
    """
    p = plan
    width, folded = p.fold * channels, rows // p.fold
    blocks = -(-width // p.columns)
    unit_blocks = blocks if p.fold > 1 else 1
    splits = p.members // unit_blocks
    tiling = OneLaunchTiling(
        groups, folded, width, channels, p.fold, p.columns, splits, p.warpgroups, p.stages, p.tile_rows, p.at_once,
        p.cluster,
    )  # fmt: skip
    fits = (
        can_cut(rows, channels, itemsize, p.fold, p.columns, splits, p.warpgroups)
        and p.members == splits * unit_blocks
        and 1 <= p.at_once <= tiling.units
        and p.slabs == -(-tiling.units // p.at_once)
        and 1 <= p.tile_rows <= min(LONGEST_TILE, tiling.worker_range(splits - 1, p.warpgroups - 1).rows)
        and min(LEAST_STAGES, p.tiles) <= p.stages <= MOST_STAGES
        and tiling.worker_range(0, 0).tiles == p.tiles
    )
    if not fits:
        raise ValueError(f"{p} does not fit {inputs} arrays [{groups}, {rows}, {channels}] of {itemsize} bytes")
    return tiling


def not_co_resident(plan, chip, itemsize, inputs, sums):
    """None, or one sentence: why the blocks of a `OneLaunch` may not all be on the chip at the same time.

    Blocks that wait for each other would then wait for ever. A multiprocessor takes one block of such a kernel at
    least, whose registers the compiler keeps within what a multiprocessor has, if its shared memory has room.
    """
    p = plan
    asked = p.warpgroups * p.stages * p.tile_rows * p.columns * itemsize * inputs
    room = ring_bytes(chip, p.columns, p.warpgroups, sums + EXCHANGED)
    if asked > room:
        return f"a block has {asked} bytes of tiles, and {chip.name} has room for {room}"
    if p.cluster:
        return (
            None if p.members <= LARGEST_CLUSTER else f"{p.members} blocks are more than a cluster's {LARGEST_CLUSTER}"
        )
    blocks = p.members * p.at_once
    if blocks > chip.cores:
        return f"{blocks} blocks wait for each other, and {chip.name} has {chip.cores} multiprocessors for one each"
    return None
