"""Which kernels `auto` takes: on GPUs those that were measured as the fastest, see `tuned`; on TPUs a table.

A line of the table rests on the bytes that whole network blocks move, compiled for each chip (docs/tpu-audit.md).
`auto` does not take what nothing speaks for.
"""

from types import MappingProxyType

from bn_fused.kernels import tuned
from bn_fused.kernels.backends import Verdict
from bn_fused.kernels.chips import CHIPS, TpuChip

FUSED_BY_XLA = Verdict(
    False, "XLA fuses jnp with the operations around it, and blocks of networks then move fewer bytes"
)
NARROW = Verdict(False, "with fewer than 128 channels XLA copies and pads x around its kernels")
VERDICTS = MappingProxyType(
    {("pallas_tpu", name): FUSED_BY_XLA for name, chip in CHIPS.items() if chip.platform == "tpu"}
)


def by_table(backend, problem, target):
    """The `Verdict` on a TPU's backend that can run a problem on a target."""
    if problem.channels < TpuChip.lanes:
        return NARROW
    chip = None if target.chip is None else target.chip.name
    return VERDICTS.get((backend, chip), Verdict(False, "nothing is known of its speed on this chip"))


def by_measurement(backend, tuning, problem, target):
    """The `Verdict` on a GPU's backend that can run a problem on a target; `tuning` as of the backend."""
    if problem.operation not in ("forward", "backward"):
        # At inference, where XLA fuses jnp with what is around it; where moments of several devices are merged.
        return Verdict(False, "only the forward and backward of training on one device were measured")
    found = tuned.find(backend, tuning, problem, target)
    if isinstance(found, str):
        return Verdict(False, found)
    plain = found.entry.backends.get("jnp")
    if plain is None:
        return Verdict(False, f"jnp was not measured beside it ({found.where})")
    ours, share = found.measured.seconds, found.entry.share(backend)
    times = f"{1e6 * ours:.3g} us forward and backward, jnp {1e6 * plain.seconds:.3g} ({found.where})"
    if not tuned.is_faster(share):
        return Verdict(False, f"it is not faster here: {times}")
    return Verdict(True, f"it was measured as faster than jnp: {times}", share)
