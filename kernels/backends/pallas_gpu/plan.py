"""How the backend `pallas_gpu` streams an array: the `Plan`, and what its operations keep on chip.

Pure functions of sizes: they are tested exhaustively on small sizes.
"""

import math
from dataclasses import dataclass

from bn_fused.kernels.backends.gpu.launches import launches, passes
from bn_fused.kernels.backends.pallas_gpu.resident_plan import Resident, make_resident
from bn_fused.kernels.backends.pallas_gpu.tiles import MOMENTS, SUMS, UNROLL, Tiling, can_cut, fold_of, warpgroups_of

MOST_TILE_ROWS = 64
# Of a block's shared memory: what is left for the barriers and for the exchange between warpgroups, at most 4
# warpgroups * 3 values * 256 columns * 4 bytes.
RESERVED = 16 * 1024
STAGES = 3


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
        """How an operation reads its arrays: "resident", "slab" or "streaming".

        All of them stay on chip, or one part after another does so, or they are read twice.
        """
        resident_plan = self.resident_plan(operation)
        return "streaming" if resident_plan is None else "resident" if resident_plan.slabs == 1 else "slab"

    def resident_plan(self, operation):
        """The `Resident` of an operation, or None."""
        return {"forward": self.forward, "backward": self.backward}.get(operation)

    def passes(self, operation):
        """(reads, writes) of arrays of x's size inside the kernels of an operation."""
        return passes(operation, self.residual, self.derivative, self.resident_plan(operation) is not None)

    def launches(self, operation):
        """The kernels of an operation, by name and in order."""
        return launches(operation) if self.resident_plan(operation) is None else (f"bn_fused_resident_{operation}",)


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
    fold_and_columns = fold_of(rows, channels, itemsize)
    if fold_and_columns is None:
        return None
    fold, columns = fold_and_columns
    warpgroups = warpgroups_of(rows // fold)
    blocks = groups * -(-fold * channels // columns)
    sizes = groups, rows, channels, itemsize, chip
    return Plan(
        fold=fold,
        columns=columns,
        splits=splits_of(rows // fold, blocks, warpgroups, chip.cores),
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
    p, width, folded = plan, plan.fold * channels, rows // plan.fold
    most = 0
    if can_cut(rows, channels, itemsize, p.fold, p.columns, p.splits, p.warpgroups) and p.stages >= 1:
        most = p.ring_bytes // (p.warpgroups * p.stages * inputs * p.columns * itemsize)
    if most < 1:
        raise ValueError(f"{plan} does not fit {inputs} arrays [{groups}, {rows}, {channels}] of {itemsize} bytes")
    tile_rows = min(1 << int(math.log2(most)), MOST_TILE_ROWS, folded // (p.splits * p.warpgroups))
    return Tiling(groups, folded, width, channels, p.fold, p.columns, p.splits, p.warpgroups, p.stages, tile_rows)
