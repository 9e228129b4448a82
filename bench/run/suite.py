"""The work of `bn-bench run`: which layers run at which workloads, their checks, and the rows of times."""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import bn_fused
from bn_fused.bench.check import Check, failure_of
from bn_fused.bench.providers import DEVICES, RIVALS, Provider, bn_fused_layer, explain, timed_backends
from bn_fused.bench.run.cases import Case, Inputs, check_case, copy_program, make_inputs, make_oracle, sets_for
from bn_fused.bench.run.jax_case import jax_case
from bn_fused.bench.run.records import Row
from bn_fused.bench.timing import Timed, measure
from bn_fused.bench.workloads import COPY_PASSES, Workload


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does at every workload.

    - `approaches`, `backends`, `rivals`, `passes`: names; no backends: all that can run there.
    - `seconds`: for the samples of one workload, without compilation and checks.
    - `cold`: whether the caches are made cold; see `bench.run.cases`.
    - `devices`: over how many the examples are split; `sync`: whether they share their statistics. Every layer that
        does is also checked and timed without, for the row's `sync_ratio`.
    """

    approaches: Sequence[str] = ("batch",)
    backends: Sequence[str] = ()
    rivals: Sequence[str] = ("equinox",)
    passes: Sequence[str] = ("fwd", "fwd+bwd")
    seconds: float = 10.0
    cold: bool = False
    devices: int = 1
    sync: bool = False

    @property
    def syncs(self) -> tuple[bool, ...]:
        """The ways in which every layer runs: as asked, and beside the one that shares its statistics without."""
        return (True, False) if self.sync else (False,)


class Key(NamedTuple):
    """What tells the programs of a workload apart; `sync`: whether the devices share their statistics."""

    layer: str
    approach: str
    pass_name: str
    sync: bool

    @property
    def alone(self) -> "Key":
        """The same, each device with statistics of its own."""
        return self._replace(sync=False)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A layer that is to run at a workload with an approach, or the reason why it does not."""

    provider: Provider
    approach: str
    status: str = "ok"
    reason: str = ""


def refusal(workload: Workload, backend: str) -> str | None:
    """Why a backend cannot run a workload on JAX's default device; None if it can."""
    try:
        explain(workload, backend)
    except bn_fused.BackendError as error:
        return str(error)
    return None


def with_backends(workloads: Sequence[Workload], settings: Settings) -> tuple[Settings, dict[str, str]]:
    """The settings with the backends named that run here, and of the others the reason why they do not.

    A backend that some workloads can run is kept; where it cannot run, its row is refused. Those that were asked for by
    name all stay.
    """
    if settings.backends:
        return settings, {}
    able, skipped = [], {}
    for name in timed_backends():
        refusals = [refusal(workload, name) for workload in workloads]
        if all(refusals):
            skipped[name] = refusals[0]
        else:
            able.append(name)
    return dataclasses.replace(settings, backends=tuple(able)), skipped


def plan(workload: Workload, settings: Settings) -> list[Planned]:
    """The layers that run at a workload, ours first; those that cannot run say why."""
    asked = settings.backends or timed_backends()
    planned = []
    for approach in settings.approaches:
        for name in asked:
            reason = refusal(workload, name)
            planned.append(Planned(bn_fused_layer(name), approach, "refused" if reason else "ok", reason or ""))
    for name in settings.rivals:
        provider = RIVALS[name]
        for approach in settings.approaches:
            # The other libraries but equinox know only the batch's statistics.
            comparable = provider.ours or name == "equinox" or approach == settings.approaches[0]
            if provider.ours and name in asked or not comparable:
                continue
            missing = provider.missing
            if missing is None and name == "torch" and settings.devices > 1:
                missing = "torch runs on one device here"
            planned.append(Planned(provider, approach, "missing" if missing else "ok", missing or ""))
    return planned


def make_case(provider: Provider, inputs: Inputs, approach: str, passes: Sequence[str], sync: bool = False) -> Case:
    """Compile a layer's passes at a workload."""
    if provider.name == "torch":
        from bn_fused.bench.run.torch_case import torch_case

        return torch_case(inputs, passes)
    return jax_case(provider, inputs, approach, passes, sync)


def _row(workload: Workload, planned: Planned, pass_name: str, **values) -> Row:
    return Row(
        workload=workload.name,
        shape=workload.shape,
        dtype=workload.dtype,
        layout=workload.layout,
        activation=workload.activation,
        residual=workload.residual,
        layer=planned.provider.name,
        approach=planned.approach,
        pass_name=pass_name,
        **values,
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def run_workload(
    workload: Workload, settings: Settings, progress: Callable[[float], None] = lambda share: None
) -> list[Row]:
    """Check and time every layer at a workload; a pass whose check fails is not timed.

    `progress` is called with the share of the work that is done.
    """
    planned = plan(workload, settings)
    able = [layer for layer in planned if layer.status == "ok"]
    mesh = None
    if settings.devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: settings.devices]), (DEVICES,))
    sets = sets_for(workload, jax.devices()[0], settings.cold)
    inputs = make_inputs(workload, sets=sets, mesh=mesh)
    oracles = {
        (approach, sync): make_oracle(inputs, approach, 1 if sync else settings.devices)
        for approach in {layer.approach for layer in able}
        for sync in settings.syncs
    }
    checks: dict[Key, Check] = {}
    exchanged: dict[Key, int | None] = {}
    work: dict[Any, Timed] = {"copy": copy_program(inputs)}
    variants = [(layer, sync) for layer in able for sync in settings.syncs]
    for done, (layer, sync) in enumerate(variants):
        progress(0.4 * done / len(variants))
        keys = {name: Key(layer.provider.name, layer.approach, name, sync) for name in settings.passes}
        try:
            case = make_case(layer.provider, inputs, layer.approach, settings.passes, sync)
        except Exception as error:  # a layer that does not compile fails, and the others go on
            checks |= {key: Check(failure=failure_of(error)) for key in keys.values()}
            continue
        # In a first step all approaches normalise with the batch's statistics, the other libraries do so in every one.
        for pass_name, key in keys.items():
            oracle = oracles[layer.approach, sync]
            checks[key] = check_case(case, pass_name, oracle, workload, layer.provider.ours)
            exchanged[key] = case.collective_bytes.get(pass_name)
            if checks[key].ok:
                work[key] = case.programs[pass_name]
    samples = measure(work, seconds=settings.seconds, progress=lambda share: progress(0.4 + 0.6 * share))
    rows = []
    for pass_name in settings.passes:
        for layer in planned:
            if layer.status != "ok":
                rows.append(_row(workload, layer, pass_name, status=layer.status, reason=layer.reason))
                continue
            key = Key(layer.provider.name, layer.approach, pass_name, settings.sync)
            check, reason = checks[key], checks[key].reason
            if check.ok and not checks[key.alone].ok:
                check = checks[key.alone]
                reason = f"without --sync: {check.reason}"
            values = {"status": "ok" if check.ok else "failed", "reason": reason}
            if check.errors:
                nearest = max(check.errors, key=lambda error: np.nan_to_num(error.share, nan=np.inf))
                values |= {"error": _finite(nearest.value), "limit": nearest.limit}
            if check.ok:
                values |= _times(workload, samples, key, settings) | {"collective_bytes": exchanged[key]}
            rows.append(_row(workload, layer, pass_name, **values))
    return rows


def _times(workload, samples, key, settings):
    """What the samples of a layer's pass say, as fields of a row."""
    times, copy, passes = samples[key], samples["copy"], workload.passes(key.pass_name)
    ratios = {}
    for rival in settings.rivals:
        # A rival that knows one way to train runs once, for all approaches.
        names = (key._replace(layer=rival, approach=approach) for approach in (key.approach, settings.approaches[0]))
        other = next((samples[name] for name in names if name in samples), None)
        if other is not None:
            ratios[rival] = times.ratio_to(other)
    return {
        "median": times.median,
        "p10": times.p10,
        "p90": times.p90,
        "rounds": len(times.seconds),
        "nbytes": passes * workload.nbytes,
        "bandwidth": passes * workload.nbytes / times.median,
        "copy_bandwidth": COPY_PASSES * workload.nbytes / copy.median,
        "of_copy": passes / COPY_PASSES / times.ratio_to(copy),
        "ratios": ratios,
        "sync_ratio": times.ratio_to(samples[key.alone]) if key.sync else None,
    }


def run(
    workloads: Sequence[Workload], settings: Settings, progress: Callable[[str, float], None] = lambda name, share: None
) -> Iterator[tuple[Workload, list[Row]]]:
    """The rows of each workload as soon as they are there; `progress` gets the share of the whole."""
    for done, workload in enumerate(workloads):
        yield (
            workload,
            run_workload(
                workload,
                settings,
                lambda share, done=done, name=workload.name: progress(name, (done + share) / len(workloads)),
            ),
        )
        gc.collect()
