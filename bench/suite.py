"""The work behind the command line: which backends there are, their checks, and the rows of times."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import bn_fused
from bn_fused import kernels

from .check import CHECKED, Check, check_approach, check_workload
from .providers import EQUINOX, Provider, bn_fused_layer
from .timing import PASSES, Samples, copy, measure
from .workloads import Workload

APPROACHES = ("batch", "ema", "ema_compatibility")
# It is the definition itself, kept slow and plain, to be checked against and not to be timed.
UNTIMED = ("reference",)


@dataclasses.dataclass(frozen=True)
class ApproachRow:
    """One backend with one approach, and its check."""

    backend: str
    approach: str
    check: Check


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer in one pass ("fwd" or "fwd+bwd") at one workload; no samples when its check failed."""

    layer: str
    pass_name: str
    check: Check
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True)
class WorkloadRows:
    """What was found at one workload.

    - `auto`: what `backend="auto"` takes there, and why.
    - `refusals`: the backends that cannot run there, each with its reason.
    - `copy`: the samples of the copy, taken in the same rounds as those of the rows.
    """

    workload: Workload
    auto: bn_fused.BackendChoice
    refusals: Mapping[str, str]
    rows: Sequence[Row]
    copy: Samples

    def rival(self, row: Row) -> Samples | None:
        """The samples of equinox's layer in the same pass; None where it was not timed."""
        return next(
            (
                one.samples
                for one in self.rows
                if one.layer == EQUINOX.name and one.pass_name == row.pass_name
            ),
            None,
        )


def backends_at(workload: Workload) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends that can run a workload on this device, and the reasons of those that cannot."""
    able, refusals = [], {}
    for name in kernels.backend_names():
        try:
            bn_fused.explain(workload.shape, workload.dtype, channel_axis=1, backend=name)
        except bn_fused.BackendError as error:
            refusals[name] = str(error)
        else:
            able.append(name)
    return tuple(able), refusals


def timed_layers(workload: Workload) -> tuple[tuple[Provider, ...], dict[str, str]]:
    """The layers to time at a workload, equinox's last, and the reasons of the backends that cannot run."""
    able, refusals = backends_at(workload)
    ours = tuple(bn_fused_layer(name) for name in able if name not in UNTIMED)
    return (*ours, EQUINOX), refusals


def run_workload(workload: Workload, *, seconds: float, progress: Callable[[float], None]) -> WorkloadRows:
    """Check and time every layer at a workload; a layer whose check fails is not timed.

    `seconds` is the time for the samples; building, compiling and checking come before it. `progress` is
    called with the share of the work that is done.
    """
    auto = bn_fused.explain(workload.shape, workload.dtype, channel_axis=1)
    layers, refusals = timed_layers(workload)
    checks, work = {}, {}
    for done, provider in enumerate(layers):
        progress(0.3 * done / len(layers))
        checks[provider.name], built = check_workload(provider, workload)
        if checks[provider.name].ok:
            arrays, run, x, dy = built
            work["copy", ""] = lambda x=x: copy(x)
            work[provider.name, "fwd"] = lambda arrays=arrays, run=run, x=x: run.forward(arrays, x)
            work[provider.name, "fwd+bwd"] = lambda arrays=arrays, run=run, x=x, dy=dy: run.forward_backward(
                arrays, x, dy
            )
    samples = measure(work, seconds=seconds, progress=lambda share: progress(0.3 + 0.7 * share))
    rows = [
        Row(provider.name, pass_name, checks[provider.name], samples.get((provider.name, pass_name)))
        for pass_name in PASSES
        for provider in layers
    ]
    return WorkloadRows(workload, auto, refusals, rows, samples.get(("copy", "")))


def check_backends(progress: Callable[[float], None]) -> list[ApproachRow]:
    """Check every backend that can run here with every approach; `progress` as in `run_workload`."""
    pairs = [(backend, approach) for backend in backends_at(CHECKED)[0] for approach in APPROACHES]
    rows = []
    for done, (backend, approach) in enumerate(pairs):
        progress(done / len(pairs))
        rows.append(ApproachRow(backend, approach, check_approach(backend, approach)))
    return rows
