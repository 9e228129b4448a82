"""How the backend `pallas_gpu` streams an array: the `Plan`, and what its operations keep on chip.

Pure functions of sizes: they are tested exhaustively on small sizes.
"""

from dataclasses import dataclass

from bn_fused.kernels.backends.gpu.launches import launches, passes
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch, make_one_launch
from bn_fused.kernels.backends.pallas_gpu.tiles import (
    LEAST_ROWS,
    MOMENTS,
    SUMS,
    Tiling,
    can_cut,
    fold_of,
    ring_bytes,
    ring_of,
    warpgroups_of,
)


@dataclass(frozen=True)
class Plan:
    """Tiles and launches of the streaming kernels.

    x [groups, rows, channels] is seen as [groups, rows/fold, fold*channels]: `fold` neighbouring rows make one.

    - `fold`: so that a row is a multiple of 16 bytes, and where it can be, of the block's columns: see `fold_of`.
    - `columns`: of a block, 128 or 256. Where they do not divide the row, the last block overlaps the one before.
    - `splits`: the rows of each group are cut into that many ranges, one block (of threads) each.
    - `warpgroups`: of a block, each of which has a part of the block's rows, a ring of tiles and barriers of its own.
    - `ring_bytes`: shared memory of all the rings of a block.
    - `residual`: a residual is added; `derivative`: an activation's derivative needs it in a backward.
    - `forward`, `backward`: how these operations are one launch, or None: they stream their arrays twice.
    """

    fold: int
    columns: int
    splits: int
    warpgroups: int
    ring_bytes: int
    residual: bool = False
    derivative: bool = False
    forward: OneLaunch | None = None
    backward: OneLaunch | None = None

    def kind(self, operation):
        """How an operation reads its arrays: "resident", "partial", "slab" or "streaming".

        All of them stay on chip between the two passes of one launch, or a part of them does, or one part after another
        does so; or each pass is a launch.
        """
        plan = self.one_launch(operation)
        if plan is None:
            return "streaming"
        return "partial" if plan.kept < 1 else "resident" if plan.slabs == 1 else "slab"

    def one_launch(self, operation):
        """The `OneLaunch` of an operation, or None."""
        return {"forward": self.forward, "backward": self.backward}.get(operation)

    def passes(self, operation):
        """(reads, writes) of arrays of x's size inside the kernels of an operation."""
        plan = self.one_launch(operation)
        return passes(operation, self.residual, self.derivative, 0 if plan is None else plan.kept)

    def launches(self, operation):
        """The kernels of an operation, by name and in order."""
        return launches(operation) if self.one_launch(operation) is None else (f"bn_fused_{operation}",)


def splits_of(rows, blocks, warpgroups, cores):
    """Into how many ranges the rows are cut: so that the last wave of thread blocks leaves few cores without work.

    Every worker keeps `LEAST_ROWS` rows or more where there are that many.
    """
    most = max(1, rows // (warpgroups * LEAST_ROWS))

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
    # A backward whose derivative needs a third array writes dz for it, and reads that in dy's place.
    third = int(residual and derivative)
    return Plan(
        fold=fold,
        columns=columns,
        splits=splits_of(rows // fold, blocks, warpgroups, chip.cores),
        warpgroups=warpgroups,
        ring_bytes=ring_bytes(chip, columns, warpgroups, MOMENTS),
        residual=residual,
        derivative=derivative,
        forward=make_one_launch(*sizes, 1 + residual, 1, 1, MOMENTS, clusters_only),
        backward=make_one_launch(*sizes, 2 + third, 2, 1 + third, SUMS, clusters_only),
    )


def tiling(plan, groups, rows, channels, itemsize, inputs):
    """What a plan makes of arrays [groups, rows, channels], of which a pass reads `inputs`.

    ValueError where the plan (one given by hand) does not fit them.
    """
    p, width, folded = plan, plan.fold * channels, rows // plan.fold
    ring = None
    if can_cut(rows, channels, itemsize, p.fold, p.columns, p.splits, p.warpgroups):
        room = p.ring_bytes // (p.warpgroups * inputs * p.columns * itemsize)
        ring = ring_of(folded // (p.splits * p.warpgroups), -(-folded // (p.splits * p.warpgroups)), room, p.columns)
    if ring is None:
        raise ValueError(f"{plan} does not fit {inputs} arrays [{groups}, {rows}, {channels}] of {itemsize} bytes")
    _, tile_rows, stages = ring
    return Tiling(groups, folded, width, channels, p.fold, p.columns, p.splits, p.warpgroups, stages, tile_rows)
