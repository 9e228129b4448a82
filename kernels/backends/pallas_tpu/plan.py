"""The plan of the TPU kernels: block sizes, how much of x stays in VMEM, and the VMEM that this needs.

`plan` is a pure function of the problem and the chip; nothing here imports Pallas.
"""

from dataclasses import dataclass

from bn_fused.kernels.activations import is_transcendental
from bn_fused.kernels.chips import TpuChip

LANES = TpuChip.lanes
# Rows of a block are a multiple of this: a tile has 8 rows of float32, 16 of bfloat16.
ROW_TILE = 16
# A chunk fills four vector registers of float32, more only where a row of the block is wider than that.
CHUNK_ELEMENTS = 32 * LANES
# Elements in one iteration of the inner loop, so that none of its values leaves the registers (seen in what the
# compiler makes of it): in kernels that do little; in those that read two arrays; and in those that read three or have
# an activation that takes many operations. Both together: half of that.
LIGHT_ELEMENTS, HEAVY_ELEMENTS, HEAVIEST_ELEMENTS = 256 * LANES, 128 * LANES, 64 * LANES
FEW_REGISTERS = ("v4",)  # chips with half as many registers as the others
# A block's copy must take long against the third of a microsecond that a step of the grid costs.
BLOCK_BYTES = 1 << 20
SMALLEST_BLOCK_BYTES = 1 << 18
MOST_CHANNELS = 512  # of a block: the values per channel take registers too
# What the compiler takes for itself, and the small windows with values per channel.
RESERVED_BYTES = 1 << 19


@dataclass(frozen=True)
class KernelPlan:
    """How one kernel walks over x [groups, rows, channels].

    - `block_rows`, `block_channels`: the part of x that is copied to VMEM at once.
    - `resident`: how many of the row blocks of a channel block stay in VMEM between the two phases of a kernel that
        has two, and are read from memory once and not twice: all (resident), none (streaming) or some (hybrid).
    - `whole`: whether those are all.
    - `chunk_rows`, `unroll`: the inner loop takes so many chunks of so many rows in one iteration.
    - `reads`, `writes`: passes over x, blocks at the edge counted whole.
    - `vmem_limit_bytes`: the VMEM the kernel asks for: what it needs and no more, because XLA keeps arrays of its own
        in the rest.
    """

    block_rows: int
    block_channels: int
    chunk_rows: int
    unroll: int
    resident: int
    whole: bool
    reads: float
    writes: float
    vmem_limit_bytes: int

    def __post_init__(self):
        for name, multiple in (("block_rows", ROW_TILE), ("chunk_rows", ROW_TILE), ("block_channels", LANES)):
            size = getattr(self, name)
            if size < multiple or size % multiple:
                raise ValueError(f"{name} is {size}; it must be a positive multiple of {multiple}")
        if self.unroll < 1 or self.resident < 0:
            raise ValueError(
                f"unroll is {self.unroll} and resident {self.resident}; accepted are at least 1 and at least 0"
            )


@dataclass(frozen=True)
class Plan:
    """The plans of the operations of `contract`, each of which is one kernel and one launch."""

    forward: KernelPlan
    backward: KernelPlan
    moments: KernelPlan
    moments_backward: KernelPlan
    normalise: KernelPlan
    normalise_backward: KernelPlan

    def passes(self, operation):
        """(reads, writes) of arrays of x's size inside the kernel of an operation."""
        kernel = getattr(self, operation)
        return kernel.reads, kernel.writes

    def kind(self, operation):
        """How much of x an operation keeps in VMEM: "resident", "hybrid" or "streaming"; see `KernelPlan`."""
        kernel = getattr(self, operation)
        return "streaming" if not kernel.resident else "resident" if kernel.whole else "hybrid"

    def launches(self, operation):
        """The kernels of an operation, by name and in order."""
        return (f"bn_fused_{operation}",)


def ceil_div(size, part):
    """How many parts it takes to cover the size."""
    return -(-size // part)


def round_up(size, multiple):
    """The size, or the next multiple above it."""
    return ceil_div(size, multiple) * multiple


@dataclass(frozen=True)
class _Traffic:
    """The arrays of x's size that a kernel reads and writes.

    - `reads`: in its first phase, or its only one. A second phase reads them again where a block did not stay in VMEM.
    - `saves`: the arrays that stay of a block that does; 0 where there is one phase.
    - `reads_late`: in the second phase alone.
    """

    reads: int
    writes: int
    saves: int = 0
    reads_late: int = 0

    @property
    def windows(self):
        return self.reads + self.reads_late + self.writes


def _traffic(residual, activation):
    # The activation's derivative needs the residual or y; without one, neither is an operand nor dresidual a result.
    inner = int(residual and activation is not None)
    return {
        "forward": _Traffic(1, 1, saves=1, reads_late=int(residual)),
        # x and dy stay, or dz in dy's place where it is a result: the third array is not needed with it.
        "backward": _Traffic(2 + inner, 1 + inner, saves=2),
        "moments": _Traffic(1, 0),
        "moments_backward": _Traffic(1, 1),
        "normalise": _Traffic(1 + residual, 1),
        "normalise_backward": _Traffic(2 + inner, 1 + inner),
    }


def plan(problem, target, config=None):
    """The `Plan` for a problem on a TPU of the table."""
    if not isinstance(target.chip, TpuChip):
        raise ValueError(f"target is {target}; a plan needs a TPU whose chip is known")
    itemsize = 2 if problem.dtype == "bfloat16" else 4
    return Plan(
        **{
            name: _kernel_plan(problem, itemsize, traffic, target.chip)
            for name, traffic in _traffic(problem.residual, problem.activation).items()
        }
    )


def _blocks(rows, channels, block_bytes, itemsize, most_channels):
    """Block sizes of about this many bytes: as many rows as there are, then more channels."""
    block_channels = LANES
    padded_rows = round_up(rows, ROW_TILE)
    while (
        2 * block_channels * padded_rows * itemsize <= block_bytes
        and block_channels < channels
        and 2 * block_channels <= most_channels
    ):
        block_channels *= 2
    most = max(block_bytes // (block_channels * itemsize) // LANES * LANES, LANES)
    return min(padded_rows, most), block_channels


def _inner_loop(block_channels, traffic, activation, chip):
    """Rows of a chunk, and chunks in one iteration."""
    elements, chunk_elements = LIGHT_ELEMENTS, CHUNK_ELEMENTS
    transcendental = is_transcendental(activation)
    if transcendental or traffic.reads > 2:
        elements = HEAVIEST_ELEMENTS // 2 if transcendental and traffic.reads > 1 else HEAVIEST_ELEMENTS
    elif traffic.reads > 1:
        elements = HEAVY_ELEMENTS
    if chip.name in FEW_REGISTERS:
        elements //= 4 if traffic.reads > 1 else 2
        chunk_elements //= 2
    chunk_rows = max(chunk_elements // block_channels, ROW_TILE)
    return chunk_rows, max(1, elements // (chunk_rows * block_channels))


def _kernel_plan(problem, itemsize, traffic, chip):
    rows, channels = problem.rows, problem.channels
    available = chip.vmem - RESERVED_BYTES
    heaviest = traffic.reads > 1 and is_transcendental(problem.activation)
    most_channels = MOST_CHANNELS // 2 if heaviest else MOST_CHANNELS
    if chip.name in FEW_REGISTERS:
        most_channels = LANES
    block_bytes = BLOCK_BYTES
    while True:
        block_rows, block_channels = _blocks(rows, channels, block_bytes, itemsize, most_channels)
        count = ceil_div(rows, block_rows)
        size = block_rows * block_channels * itemsize
        # Each window is double-buffered: one block is worked on while another is copied.
        pipeline = 2 * traffic.windows * size
        fitting = max(0, (available - pipeline) // (traffic.saves * size)) if traffic.saves else 0
        if fitting >= count or not traffic.saves or block_bytes <= SMALLEST_BLOCK_BYTES:
            break
        block_bytes //= 2
    if traffic.saves and fitting < count:
        # Not everything fits in any case: the full block size then.
        block_rows, block_channels = _blocks(rows, channels, BLOCK_BYTES, itemsize, most_channels)
        count, size = ceil_div(rows, block_rows), block_rows * block_channels * itemsize
        pipeline = 2 * traffic.windows * size
        fitting = max(0, (available - pipeline) // (traffic.saves * size))
    resident = min(count, fitting)
    reads = traffic.reads + traffic.reads_late
    if traffic.saves:
        reads += traffic.reads * (count - resident) / count
    limit = RESERVED_BYTES + pipeline + traffic.saves * resident * size
    loop = _inner_loop(block_channels, traffic, problem.activation, chip)
    return KernelPlan(block_rows, block_channels, *loop, resident, resident == count, reads, traffic.writes, limit)
