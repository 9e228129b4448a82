"""What is installed, which devices there are, which backends can run and which of them compute the right numbers."""

import collections
import os
from collections.abc import Callable, Sequence

import jax

from bn_fused import kernels
from bn_fused.approaches import APPROACHES
from bn_fused.bench.check import CHECKED, Check, check_approach
from bn_fused.bench.providers import RIVALS
from bn_fused.bench.run.suite import refusal
from bn_fused.kernels.kept import folder, why_not
from bn_fused.kernels.tuned import VARIABLE, in_use


def backends() -> tuple[list[str], dict[str, str]]:
    """The backends that can run `CHECKED` on this device, and the reasons of those that cannot."""
    refusals = {name: refusal(CHECKED, name) for name in kernels.backend_names()}
    return [name for name, reason in refusals.items() if reason is None], {
        name: reason for name, reason in refusals.items() if reason is not None
    }


def check_backends(
    progress: Callable[[float], None] = lambda share: None, names: Sequence[str] | None = None
) -> list[tuple[str, str, Check]]:
    """Check every backend that can run here with every approach: (backend, approach, check)."""
    pairs = [(name, approach) for name in (backends()[0] if names is None else names) for approach in APPROACHES]
    checks = []
    for done, (backend, approach) in enumerate(pairs):
        progress(done / len(pairs))
        checks.append((backend, approach, check_approach(backend, approach)))
    return checks


def rivals() -> dict[str, str]:
    """For every rival of `--against`: "installed", or what to install."""
    return {name: provider.missing or "installed" for name, provider in RIVALS.items() if not provider.ours}


def devices() -> list[str]:
    """One line for each kind of device there is, JAX's default kind first."""
    kinds = collections.Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    return [f"{count} x {kind}" for kind, count in kinds.items()]


def tuning() -> list[str]:
    """Which files of what was measured are in use on JAX's default device, one line each.

    On what is no GPU there are none to use: then only a file that somebody names is spoken of.
    """
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda", "rocm") and not os.environ.get(VARIABLE):
        return []
    return in_use(device.device_kind)


def lowered_kernels() -> list[str]:
    """Where kernels for GPUs are kept once they were lowered, or how to have them kept; nothing on what is no GPU."""
    if jax.devices()[0].platform not in ("gpu", "cuda"):
        return []
    return [f"lowered kernels are not kept: {why}" if (why := why_not()) else f"lowered kernels are kept in {folder()}"]


def compilers() -> dict[str, str]:
    """For the targets of the audit: "installed", or what to install."""
    from bn_fused.bench.deviceless import CUDA, TPU, missing

    return {platform: missing(target) or "installed" for platform, target in ((CUDA, "h200"), (TPU, "v5e"))}
