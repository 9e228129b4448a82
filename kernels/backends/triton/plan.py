"""How the backend `triton` cuts an array into tiles: the `Config`s there are, and the `Plan` that one makes of it.

Pure functions of sizes, without JAX or Triton. A `Config` says what of a plan is a matter of speed alone and does not
depend on the array; `heuristic` chooses one for an array, `search_set` lists those that `bn-bench tune` times.
"""

import math
from dataclasses import dataclass, fields, replace

from bn_fused.kernels.backends.gpu.launches import launches, passes

# Raised with every change to the kernels that makes earlier timings meaningless: see `kernels.tuned`.
REVISION = 2

VECTOR = 16  # bytes: the widest load of a thread
# More neighbouring rows than that are not folded into one: their columns have to be merged again.
MOST_FOLDED = 16
# A block of threads has at least this many tiles, and bytes of each column, where there are enough rows: what it does
# once (values per channel, sums across its threads) and its partial results, 12 bytes a column, are small beside that.
LEAST_TILES = 2
LEAST_BYTES = 192
# Of a merge's block of threads: 8 neighbouring float32 are the smallest piece of memory that a GPU reads, and the fewer
# channels a block has, the more blocks share the work.
MERGE_COLUMNS = 8
MERGE_TILE = 2048  # values: with 4096 there are not enough registers
MOST_STAGES = 8
# Of slabs: the least that a slab has of a row, a line of the cache; and what its three launches are taken to cost, in
# seconds, beside reading it once more.
LEAST_ROW_BYTES = 128
SLAB_SECONDS = 9e-6
# With 16-bit values on Hopper: tiles in flight in shared memory, and up to what size of an array two blocks of threads
# a multiprocessor are enough. From what was measured on an H200, see `kernels/tuned`.
HOPPER, HOPPER_STAGES, SMALL_BYTES = 9, 4, 1 << 24


@dataclass(frozen=True)
class Config:
    """What of a plan is a matter of speed alone.

    - `row_bytes`: the most neighbouring bytes of a row that a tile has.
    - `values`: of each array, that each thread has of a tile where a pass reads one array; with more arrays, half.
    - `warps`: of a block of threads: of 32 threads each on NVIDIA, wavefronts of 64 on AMD.
    - `stages`: tiles in flight in shared memory, on AMD in registers; 1: a tile is loaded when it is needed.
    - `blocks_per_core`: blocks of threads in a launch, for each multiprocessor.
    - `slab_bytes`: the most that a pass reads of a slab, so that the next finds it in the cache; 0: no slabs.
    """

    row_bytes: int
    values: int
    warps: int
    stages: int
    blocks_per_core: int
    slab_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Tiles and launches of the kernels.

    x [groups, rows, channels] is seen as [groups, rows/fold, fold*channels]: `fold` neighbouring rows make one.

    - `architecture`: what the kernels are compiled for: 80 for NVIDIA's compute capability 8.0, or AMD's "gfx942".
    - `fold`: so that a row is a multiple of 16 bytes, and fills the tiles: see `fold_of`.
    - `columns`, `tile_rows`: of a tile, powers of two; a pass that reads several arrays has half the rows.
    - `splits`: the rows of each group are cut into that many ranges, one block (of threads) each.
    - `warps`, `stages`: of a block of threads; see `Config`.
    - `slabs`: forward and backward compute that many ranges of channels one after another, with launches for each.
    - `residual`: a residual is added; `derivative`: an activation follows, whose derivative needs it, or y, backward.
    """

    architecture: int | str
    fold: int
    columns: int
    tile_rows: int
    splits: int
    warps: int
    stages: int
    slabs: int = 1
    residual: bool = False
    derivative: bool = False

    @property
    def lanes(self):
        """Threads of a warp."""
        return 32 if isinstance(self.architecture, int) else 64

    def passes(self, operation):
        """(reads, writes) of arrays of x's size inside the kernels of an operation, from the cache or from memory."""
        return passes(operation, self.residual, self.derivative)

    def slabs_of(self, operation):
        """The number of slabs in which an operation walks over x: one where nothing is read twice."""
        return self.slabs if operation in ("forward", "backward") else 1

    def kind(self, operation):
        """How an operation walks over x: whole, pass after pass; or each slab twice, the second time in the cache."""
        return "slab" if self.slabs_of(operation) > 1 else "streaming"

    def launches(self, operation):
        """The kernels of an operation, by name and in order."""
        return launches(operation) * self.slabs_of(operation)

    def rows_of(self, inputs):
        """The rows of a tile in a pass that reads that many arrays."""
        return self.tile_rows if inputs == 1 else max(1, self.tile_rows // 2)


def slab_columns(plan, width):
    """The columns of each slab of a row of `width`, as many in each but the last: a multiple of a tile's, or all."""
    blocks = -(-width // plan.columns)
    return width if plan.slabs == 1 else -(-blocks // plan.slabs) * plan.columns


def merge_tile(plan, channels):
    """(partial results, channels, warps) of a tile in a merge, of `plan.splits * plan.fold` partial results."""
    columns = min(MERGE_COLUMNS, power_of_two(channels))
    entries = min(power_of_two(plan.splits * plan.fold), MERGE_TILE // columns)
    threads = 256 if entries * columns >= MERGE_TILE // 2 else 128
    return entries, columns, threads // plan.lanes


def most_threads(plan, groups, channels):
    """Threads of the largest launch."""
    streams = groups * plan.splits * -(-plan.fold * channels // plan.columns) * plan.warps
    _, columns, warps = merge_tile(plan, channels)
    return max(streams, groups * -(-channels // columns) * warps) * plan.lanes


def power_of_two(number):
    """The smallest power of two that is not less than a number above 0."""
    return 1 << (number - 1).bit_length()


def fold_of(rows, channels, itemsize, row_bytes):
    """How many neighbouring rows to see as one.

    One, if a row of channels is a multiple of 16 bytes, which a thread loads at once, and fills tiles of `row_bytes`
    well. Else the number, among those that divide the rows, with the least idle loads; where there is none, rows are
    read value by value.
    """
    candidates = []
    for fold in range(1, min(rows, MOST_FOLDED) + 1):
        width = fold * channels
        if rows % fold:
            continue
        columns = columns_of(width, itemsize, row_bytes)
        idle = -(-width // columns) * columns / width
        vector = math.gcd(width * itemsize, VECTOR) // itemsize
        # Loads of a row's values; and with the fold grow the partial results, 12 bytes for each column and split.
        loads = idle / vector
        candidates.append((loads * (1 + 0.01 * math.log2(fold) + (0.02 if fold > 1 else 0)), fold))
    return min(candidates)[1]


def columns_of(width, itemsize, row_bytes):
    """The columns of a tile: a power of two that has `row_bytes`, or less where the row is shorter."""
    return min(power_of_two(width), row_bytes // itemsize)


def heuristic(groups, rows, channels, itemsize, chip):
    """The `Config` for an array where nothing was timed.

    16 values a thread are four 16-byte loads of float32, or two of bfloat16, before the first is used; with four blocks
    of 128 threads a multiprocessor has 16 to 32 KiB in flight, what latency times bandwidth asks for on the chips of
    the table. Shared memory would only add latency. AMD's compute units have twice the registers, and more latency to
    hide: eight blocks.

    With 16-bit values on Hopper tiles go through shared memory nevertheless: measured as 13 % faster on an H200.

    Slabs where the cache before the memory is large and the memory slow: what a backward reads of a slab, x and dy, may
    take half of that cache, the rest is for what it writes. Then a quarter of the cache must take longer to read from
    memory than the launches that a slab adds. Where size and bandwidth are not known there are no slabs.
    """
    slab_bytes = (chip.last_cache or 0) // 2
    if chip.memory_bandwidth is None or slab_bytes / 2 < SLAB_SECONDS * chip.memory_bandwidth:
        slab_bytes = 0
    # Few rows: short tiles, so that every thread has some.
    warps = (128 if rows > 64 else 64) // chip.lanes
    stages, blocks = 1, 8 if chip.platform == "rocm" else 4 if itemsize == 4 else 6
    if chip.platform == "cuda" and chip.compute_capability[0] == HOPPER and itemsize == 2:
        stages, blocks = HOPPER_STAGES, 2 if groups * rows * channels * itemsize <= SMALL_BYTES else 4
    return Config(row_bytes=256, values=16, warps=warps, stages=stages, blocks_per_core=blocks, slab_bytes=slab_bytes)


def search_set(groups, rows, channels, itemsize, chip):
    """The `Config`s to time for an array: the heuristic's, and what differs from it in one or two respects."""
    first = heuristic(groups, rows, channels, itemsize, chip)
    warps = [threads // chip.lanes for threads in (64, 128, 256)]
    # On AMD they are registers.
    stages = (3, 4) if chip.platform == "cuda" else (2, 3)
    cache = chip.last_cache or 0
    changes = [
        {},
        *({"row_bytes": row_bytes} for row_bytes in (128, 512)),
        *({"values": values} for values in (8, 32)),
        *({"warps": number} for number in warps),
        *({"blocks_per_core": blocks} for blocks in (2, 4, 8, 16)),
        *({"stages": number, "blocks_per_core": blocks} for number in stages for blocks in (2, 4)),
        *({"stages": 1, "blocks_per_core": blocks} for blocks in (4, 6, 8)),
        {"warps": warps[-1], "blocks_per_core": 2},
        {"row_bytes": 128, "blocks_per_core": 8},
        *({"row_bytes": 128, "blocks_per_core": blocks, "stages": 1} for blocks in (6, 8)),
        # Slabs on chips for which the rule has none too.
        *({"slab_bytes": slab_bytes} for slab_bytes in (0, cache // 4, cache // 2)),
    ]
    return tuple(dict.fromkeys(replace(first, **change) for change in changes))


# What a stored configuration may say: whole numbers within these bounds, and some powers of two.
BOUNDS = {
    "row_bytes": (16, 4096),
    "values": (1, 256),
    "warps": (1, 32),
    "stages": (1, MOST_STAGES),
    "blocks_per_core": (1, 64),
    "slab_bytes": (0, 1 << 40),
}
POWERS_OF_TWO = ("row_bytes", "values", "warps")
assert {field.name for field in fields(Config)} == set(BOUNDS)


def parse(stored):
    """A configuration of what was stored of one; ValueError where there is none like it."""
    config = Config(**stored)
    for name, (least, most) in BOUNDS.items():
        value = getattr(config, name)
        if type(value) is not int or not least <= value <= most or (name in POWERS_OF_TWO and value & (value - 1)):
            raise ValueError(f"{name} is {value!r}")
    return config


def make_plan(groups, rows, channels, itemsize, chip, config=None, residual=False, derivative=False):
    """The plan for x [groups, rows, channels] on a chip, with a configuration, or with the heuristic's."""
    if config is None:
        config = heuristic(groups, rows, channels, itemsize, chip)
    fold = fold_of(rows, channels, itemsize, config.row_bytes)
    rows, width = rows // fold, fold * channels
    columns = columns_of(width, itemsize, config.row_bytes)
    slabs = 1
    if fold == 1:
        # Of a row, by a backward: of x, of dy, and of the residual or y.
        read = groups * rows * itemsize * (3 if residual and derivative else 2)
        slabs, columns = _slabs(width, columns, read, config.slab_bytes, LEAST_ROW_BYTES // itemsize)
    # A tile of fewer values than its block's threads load at once would leave threads idle in every step.
    tile = config.warps * chip.lanes * max(config.values, 2 * VECTOR // itemsize)
    tile_rows = max(1, min(tile // columns, power_of_two(rows)))
    blocks = -(-width // columns)
    blocks = groups * -(-blocks // slabs)
    most = max(1, rows // max(LEAST_TILES * tile_rows, LEAST_BYTES // itemsize))
    splits = min(max(1, config.blocks_per_core * chip.cores // blocks), most)
    return Plan(
        architecture=architecture_of(chip),
        fold=fold,
        columns=columns,
        tile_rows=tile_rows,
        splits=splits,
        warps=config.warps,
        stages=config.stages,
        slabs=slabs,
        residual=residual,
        derivative=derivative,
    )


def _slabs(width, columns, read, most, least):
    """(number of slabs, columns of a tile) for rows of `width` columns, of each of which `read` bytes are read.

    Of as few slabs as keep to `most` bytes; with tiles of fewer columns, but `least`, where one of these is too much.
    Where also that is too much, or all is little enough: one slab, and the tile as it is.
    """
    if read * width <= most or read * min(columns, least) > most:
        return 1, columns
    while read * columns > most:
        columns //= 2
    blocks = -(-width // columns)
    return -(-blocks // (most // (read * columns))), columns


def architecture_of(chip):
    """What the kernels are compiled for: a compute capability as 80, or the name of AMD's architecture."""
    if chip.platform == "rocm":
        return chip.architecture
    major, minor = chip.compute_capability
    return 10 * major + minor


def check(plan, rows, channels):
    """ValueError where a plan (one given by hand) does not fit an array."""
    fits = (
        plan.fold >= 1
        and rows % plan.fold == 0
        and 1 <= plan.splits <= rows // plan.fold
        and all(number >= 1 and number & (number - 1) == 0 for number in (plan.columns, plan.tile_rows, plan.warps))
        and plan.columns * plan.tile_rows <= 1 << 20
        and plan.warps * plan.lanes <= 1024
        and 1 <= plan.stages <= MOST_STAGES
        # Every slab has columns; folded rows have a channel in several places, which may lie in several slabs.
        and plan.slabs >= 1
        and (plan.slabs == 1 or (plan.fold == 1 and (plan.slabs - 1) * slab_columns(plan, channels) < channels))
    )
    if not fits:
        raise ValueError(f"{plan} does not fit {rows} rows of {channels} channels")
