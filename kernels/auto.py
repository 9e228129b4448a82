"""Which kernels `auto` takes on which chip: one table, and what each of its lines rests on.

A line changes when figures do: for GPUs the times that `bn-bench run` records under bench/results, for TPUs the bytes
that whole network blocks move, compiled for each chip (docs/tpu-audit.md). `auto` does not take what has no line.
"""

from types import MappingProxyType

from bn_fused.kernels.backends import Verdict
from bn_fused.kernels.chips import CHIPS, GpuChip, TpuChip

UNMEASURED = Verdict(False, "its kernels never ran on this chip")
# bench/results/nvidia-h200: faster in most layers and in a whole network, slower where channels come first.
UNDECIDED = Verdict(False, "for which arrays its kernels are the fastest here is not decided yet")
FUSED_BY_XLA = Verdict(
    False, "XLA fuses jnp with the operations around it, and blocks of networks then move fewer bytes"
)
NARROW = Verdict(False, "with fewer than 128 channels XLA copies and pads x around its kernels")
VERDICTS = MappingProxyType(
    {
        ("pallas_gpu", name): UNDECIDED if name == "h200" else UNMEASURED
        for name, chip in CHIPS.items()
        if isinstance(chip, GpuChip) and chip.compute_capability >= (9, 0)
    }
    | {
        ("triton", name): UNDECIDED if name == "h200" else UNMEASURED
        for name, chip in CHIPS.items()
        if chip.platform in ("cuda", "rocm")
    }
    | {("pallas_tpu", name): FUSED_BY_XLA for name, chip in CHIPS.items() if chip.platform == "tpu"}
)


def verdict(backend, problem, target):
    """The `Verdict` on a backend that can run a problem on a target."""
    chip = None if target.chip is None else target.chip.name
    if backend == "pallas_tpu" and problem.channels < TpuChip.lanes:
        return NARROW
    return VERDICTS.get((backend, chip), Verdict(False, "nothing is known of its speed on this chip"))
