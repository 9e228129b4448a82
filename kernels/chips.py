"""The accelerators that plans and deviceless compilation know: their memories and their cores, in one table.

Sizes in bytes, bandwidth in bytes per second. NVIDIA's figures are from its data sheets and CUDA's table of compute
capabilities; AMD's from its data sheets and from ROCm's table of hardware specifications; the TPUs' bandwidths from
Google's; how much of a TPU's VMEM a kernel gets was found by compiling.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar


@dataclass(frozen=True)
class GpuChip:
    """An NVIDIA GPU.

    - `name`: short, as in `explain(target="h200")`; `device_kind`: what JAX calls it.
    - `compute_capability`: (major, minor).
    - `cores`: streaming multiprocessors.
    - `shared_memory_per_core`: of which a block may have all but a kilobyte.
    - `memory`, `memory_bandwidth`, `l2_cache`, `clock_ghz`: None where they are not known.
    """

    name: str
    device_kind: str
    compute_capability: tuple[int, int]
    cores: int
    shared_memory_per_core: int
    l2_cache: int | None = None
    memory: int | None = None
    memory_bandwidth: int | None = None
    clock_ghz: float | None = None
    platform: str = "cuda"

    @property
    def shared_memory_per_block(self) -> int:
        """The most shared memory that one block can ask for."""
        return self.shared_memory_per_core - 1024

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 32

    @property
    def last_cache(self) -> int | None:
        """The cache before the memory."""
        return self.l2_cache


@dataclass(frozen=True)
class AmdChip:
    """An AMD GPU, as JAX shows it: one device. Of an MI250X that is one of its two dies.

    - `name`, `device_kind`: as of `GpuChip`; `device_kind` can also be the architecture, see `chip_of`.
    - `architecture`: as "gfx942", which is also what JAX calls the compute capability, without features.
    - `cores`: compute units.
    - `shared_memory_per_core`: the LDS of a compute unit, which a block may have whole.
    - `l2_cache`, `infinity_cache`, `memory`, `memory_bandwidth`, `clock_ghz`: None where they are not known.
    """

    name: str
    device_kind: str
    architecture: str
    cores: int
    shared_memory_per_core: int
    l2_cache: int | None = None
    memory: int | None = None
    memory_bandwidth: int | None = None
    clock_ghz: float | None = None
    infinity_cache: int | None = None
    platform: str = "rocm"

    @property
    def shared_memory_per_block(self) -> int:
        """The most LDS that one block can ask for."""
        return self.shared_memory_per_core

    @property
    def lanes(self) -> int:
        """Threads of a wavefront: 64 on all of GCN and CDNA, 32 since RDNA (gfx10 and later)."""
        return 64 if self.architecture.startswith("gfx9") else 32

    @property
    def last_cache(self) -> int | None:
        """The cache before the memory."""
        return self.infinity_cache or self.l2_cache


@dataclass(frozen=True)
class TpuChip:
    """A TPU generation, as JAX shows it: one device.

    - `vmem`: the on-chip memory of a core; `vmem_limit`: what a kernel gets of it unless it asks for more.
    - `cmem`: v4's larger on-chip memory, which kernels do not use and XLA does.
    - `cores`: tensor cores of a device; two share the work of one program on v4 and v5p.
    - `lanes`: columns of a vector register, of which an array in VMEM has a multiple.
    """

    name: str
    device_kind: str
    vmem: int
    vmem_limit: int
    memory_bandwidth: int
    cores: int = 1
    cmem: int = 0
    platform: str = "tpu"
    lanes: ClassVar[int] = 128

    @property
    def can_raise_vmem_limit(self) -> bool:
        """Whether a kernel can ask for more than `vmem_limit`."""
        return self.vmem > self.vmem_limit


_KIB, _MIB = 1 << 10, 1 << 20
_GIB = 1 << 30
_GB, _TB = 10**9, 10**12
Chip = GpuChip | AmdChip | TpuChip


def _table(*chips: Chip) -> Mapping[str, Chip]:
    return MappingProxyType({chip.name: chip for chip in chips})


CHIPS = _table(
    GpuChip("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * _KIB, 40 * _MIB, 85 * _GB, 2039 * _GB, 1.41),
    GpuChip("l4", "NVIDIA L4", (8, 9), 58, 100 * _KIB, 48 * _MIB, 24 * _GIB, 300 * _GB, 2.04),
    GpuChip("l40s", "NVIDIA L40S", (8, 9), 142, 100 * _KIB, 96 * _MIB, 48 * _GIB, 864 * _GB, 2.52),
    GpuChip("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 100 * _KIB, 72 * _MIB, 24 * _GIB, 1008 * _GB, 2.52),
    GpuChip("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 228 * _KIB, 50 * _MIB, 85 * _GB, 3350 * _GB, 1.98),
    GpuChip("h200", "NVIDIA H200", (9, 0), 132, 228 * _KIB, 50 * _MIB, 150 * _GB, 4800 * _GB, 1.98),
    GpuChip("b200", "NVIDIA B200", (10, 0), 148, 228 * _KIB, 126 * _MIB, 190 * _GB, 8 * _TB, 1.96),
    AmdChip("mi210", "AMD Instinct MI210", "gfx90a", 104, 64 * _KIB, 8 * _MIB, 64 * _GIB, 1638 * _GB, 1.7),
    AmdChip("mi250x", "AMD Instinct MI250X", "gfx90a", 110, 64 * _KIB, 8 * _MIB, 64 * _GIB, 1638 * _GB, 1.7),
    AmdChip(
        "mi300x", "AMD Instinct MI300X", "gfx942", 304, 64 * _KIB, 32 * _MIB, 192 * _GIB, 5300 * _GB, 2.1, 256 * _MIB
    ),
    TpuChip("v4", "TPU v4", 16 * _MIB, 16 * _MIB, 1228 * _GB, cores=2, cmem=128 * _MIB),
    TpuChip("v5e", "TPU v5 lite", 128 * _MIB, 16 * _MIB, 819 * _GB),
    TpuChip("v5p", "TPU v5", 64 * _MIB, 16 * _MIB, 2765 * _GB, cores=2),
    TpuChip("v6e", "TPU v6 lite", 128 * _MIB, 32 * _MIB, 1640 * _GB),
    TpuChip("v7x", "TPU7x", 64 * _MIB, 32 * _MIB, 3690 * _GB),
)

# Other names that JAX has for a device of the table.
_ALIASES = {"TPU v5p": "v5p", "TPU v5e": "v5e", "TPU v6e": "v6e", "TPU v7x": "v7x"}

# Shared memory per multiprocessor by compute capability: CUDA C++ Programming Guide, table of technical specifications.
_SHARED_MEMORY = {
    (7, 0): 96, (7, 2): 96, (7, 5): 64, (8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100,
    (9, 0): 228, (10, 0): 228, (10, 3): 228, (11, 0): 228, (12, 0): 100, (12, 1): 100,
}  # fmt: skip


# LDS of a compute unit, or what a block may have of it: 64 KiB but for this architecture.
_LDS = {"gfx950": 160}


def chip_of(device) -> Chip | None:
    """The chip of a JAX device, from the table or, for another GPU, from what the device says of itself.

    Where the device says that it has fewer cores than the table (a share of a GPU), it is believed. None for a CPU and
    for what is not known.

    An AMD GPU's `compute_capability` is its architecture, as "gfx90a"; where its driver has no name for it, JAX has
    the architecture with features for its `device_kind`, as "gfx90a:sramecc+:xnack-".
    """
    for chip in CHIPS.values():
        if device.device_kind == chip.device_kind:
            cores = getattr(device, "core_count", None)
            fewer = chip.platform != "tpu" and isinstance(cores, int) and 0 < cores < chip.cores
            return replace(chip, cores=cores) if fewer else chip
    if device.device_kind in _ALIASES:
        return CHIPS[_ALIASES[device.device_kind]]
    try:
        capability, cores = str(device.compute_capability), int(device.core_count)
    except (AttributeError, TypeError, ValueError):  # not a GPU: a CPU has no capability
        return None
    if capability.startswith("gfx"):
        return _amd_gpu(device.device_kind, capability, cores)
    return _nvidia_gpu(device.device_kind, capability, cores)


def _amd_gpu(device_kind, capability, cores) -> AmdChip:
    architecture = capability.split(":")[0]
    name = architecture if device_kind.startswith("gfx") else device_kind.removeprefix("AMD ").lower()
    return AmdChip(name, device_kind, architecture, cores, _LDS.get(architecture, 64) * _KIB)


def _nvidia_gpu(device_kind, capability, cores) -> GpuChip | None:
    try:
        major, minor = (int(part) for part in capability.split("."))
    except ValueError:
        return None
    shared_memory = _SHARED_MEMORY.get((major, minor))
    if shared_memory is None:
        return None
    name = device_kind.removeprefix("NVIDIA ").lower()
    return GpuChip(name, device_kind, (major, minor), cores, shared_memory * _KIB)
