"""How the backend `pallas_gpu` streams an array: the `Plan`, and what its operations keep on chip.

Pure functions of sizes: they are tested exhaustively on small sizes.
"""

import functools
import itertools
from dataclasses import dataclass

from bn_fused.kernels.backends.gpu.launches import launches, passes
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch, Way, ways
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

# Raised with every change to the kernels or their plans that makes earlier timings meaningless: see `kernels.tuned`.
REVISION = 1
# Ways of each operation that `bn-bench tune` times, beside streaming.
TIMED = 5


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


@dataclass(frozen=True)
class Config:
    """What of a plan is a matter of speed alone: the `Way`s of a forward and a backward, None to stream."""

    forward: Way | None
    backward: Way | None


def combine(forward, backward):
    """The configuration with the forward of one and the backward of another."""
    return Config(forward.forward, backward.backward)


def parse(stored):
    """A configuration of what was stored of one."""

    def way(fields):
        if fields is None:
            return None
        if any(type(value) is not int or value < 1 for value in fields.values()):
            raise ValueError(fields)
        return Way(**fields)

    return Config(**{name: way(fields) for name, fields in stored.items()})


@functools.lru_cache(maxsize=256)  # a choice asks several times, and each layer of a shape again
def ways_of(groups, rows, channels, itemsize, chip, residual=False, derivative=False, clusters_only=False):
    """The `Way`s of a forward and of a backward, each as of `one_launch_plan.ways`."""
    sizes = groups, rows, channels, itemsize, chip
    # A backward whose derivative needs a third array writes dz for it, and reads that in dy's place.
    third = int(residual and derivative)
    return (
        ways(*sizes, 1 + residual, 1, 1, MOMENTS, clusters_only),
        ways(*sizes, 2 + third, 2, 1 + third, SUMS, clusters_only),
    )


def make_plan(
    groups, rows, channels, itemsize, chip, residual=False, derivative=False, clusters_only=False, config=None
):
    """The plan for x [groups, rows, channels] on a chip, or None if there is none (see `fold_of`).

    By a `Config`, each of whose ways is taken where it fits these sizes, else by rule.
    """
    fold_and_columns = fold_of(rows, channels, itemsize)
    if fold_and_columns is None:
        return None
    fold, columns = fold_and_columns
    warpgroups = warpgroups_of(rows // fold)
    blocks = groups * -(-fold * channels // columns)
    forward, backward = ways_of(groups, rows, channels, itemsize, chip, residual, derivative, clusters_only)
    wanted = (None, None) if config is None else (config.forward, config.backward)
    one_launch = [
        found[way] if config is not None and way in found else next(iter(found.values()))
        for found, way in zip((forward, backward), wanted, strict=True)
    ]
    return Plan(
        fold=fold,
        columns=columns,
        splits=splits_of(rows // fold, blocks, warpgroups, chip.cores),
        warpgroups=warpgroups,
        ring_bytes=ring_bytes(chip, columns, warpgroups, MOMENTS),
        residual=residual,
        derivative=derivative,
        forward=one_launch[0],
        backward=one_launch[1],
    )


def search_set(groups, rows, channels, itemsize, chip, residual=False, derivative=False):
    """The `Config`s to time for an array: by rule the best `TIMED` ways of each operation, in pairs."""
    found = [
        list(dict.fromkeys([*itertools.islice(each, TIMED), None]))
        for each in ways_of(groups, rows, channels, itemsize, chip, residual, derivative)
    ]
    longest = max(map(len, found))
    return tuple(Config(*(each[place if place < len(each) else 0] for each in found)) for place in range(longest))


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
