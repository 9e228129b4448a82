"""The work of `bn-bench run`: which layers run at which workloads, their checks, and the rows of times.

On a GPU workloads are prepared together, which compiles many programs at once, and then timed one after the other; a
row's time is that of its kernels on the device (`bench.device_time`), with the time by the clock beside it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import bn_fused
from bn_fused.bench.check import Check, failure_of
from bn_fused.bench.device_time import DeviceTime, measure_device
from bn_fused.bench.providers import DEVICES, RIVALS, Provider, bn_fused_layer, explain, timed_backends
from bn_fused.bench.run.cases import (
    Case,
    Inputs,
    Oracle,
    check_case,
    copy_program,
    device_copy,
    make_inputs,
    make_oracle,
    sets_for,
)
from bn_fused.bench.run.jax_case import jax_case
from bn_fused.bench.run.records import Row
from bn_fused.bench.timing import Samples, Timed, measure
from bn_fused.bench.workloads import COPY_PASSES, Workload


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does at every workload.

    - `approaches`, `backends`, `rivals`, `passes`: names; no backends: all that can run there.
    - `seconds`: for the samples of one workload, without compilation and checks.
    - `cold`: whether the caches are made cold; see `bench.run.cases`.
    - `devices`: over how many the examples are split; `sync`: whether they share their statistics. Every layer that
        does is also checked and timed without, for the row's `sync_ratio`.
    - `deadline`: of `time.monotonic()`, after which no layer is compiled any more.
    - `threads`: that compile on a GPU; default: one for each core.
    """

    approaches: Sequence[str] = ("batch",)
    backends: Sequence[str] = ()
    rivals: Sequence[str] = ("equinox",)
    passes: Sequence[str] = ("fwd", "fwd+bwd")
    seconds: float = 10.0
    cold: bool = False
    devices: int = 1
    sync: bool = False
    deadline: float = math.inf
    threads: int | None = None

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


# What is copied, by names that a row's `copied_by` takes.
COPY, DEVICE_COPY = "copy", "device copy"


@dataclasses.dataclass
class Prepared:
    """A workload with its layers compiled and checked.

    - `work`: what is to be timed: copies by name, passes that are right by `Key`.
    - `checks`, `exchanged`: of every pass; a pass without a check was not compiled in time.
    """

    workload: Workload
    planned: Sequence[Planned]
    inputs: Inputs
    oracles: dict[tuple[str, bool], Oracle]
    work: dict[Any, Timed]
    checks: dict[Key, Check] = dataclasses.field(default_factory=dict)
    exchanged: dict[Key, int | None] = dataclasses.field(default_factory=dict)

    @property
    def variants(self) -> list[tuple[Planned, bool]]:
        """The layers that run, each with every way in which it does."""
        return [(layer, sync) for layer in self.planned if layer.status == "ok" for sync in self.syncs]

    @property
    def syncs(self) -> tuple[bool, ...]:
        """See `Settings.syncs`."""
        return tuple(dict.fromkeys(sync for _, sync in self.oracles)) or (False,)


def _on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def begin(workload: Workload, settings: Settings) -> Prepared:
    """Make the inputs and the right results of a workload."""
    planned = plan(workload, settings)
    mesh = None
    if settings.devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: settings.devices]), (DEVICES,))
    inputs = make_inputs(workload, sets=sets_for(workload, jax.devices()[0], settings.cold), mesh=mesh)
    oracles = {
        (approach, sync): make_oracle(inputs, approach, 1 if sync else settings.devices)
        for approach in {layer.approach for layer in planned if layer.status == "ok"}
        for sync in settings.syncs
    }
    copies = {COPY: copy_program(inputs)}
    if mesh is None and _on_gpu():
        copies[DEVICE_COPY] = device_copy(inputs)
    return Prepared(workload, planned, inputs, oracles, copies)


def compile_and_check(prepared: Prepared, layer: Planned, sync: bool, settings: Settings) -> None:
    """Compile and check the passes of one layer; a failure becomes a failed check."""
    keys = {name: Key(layer.provider.name, layer.approach, name, sync) for name in settings.passes}
    try:
        case = make_case(layer.provider, prepared.inputs, layer.approach, settings.passes, sync)
    except Exception as error:  # a layer that does not compile fails, and the others go on
        prepared.checks |= {key: Check(failure=failure_of(error)) for key in keys.values()}
        return
    # In a first step all approaches normalise with the batch's statistics, the other libraries do so in every one.
    for pass_name, key in keys.items():
        oracle = prepared.oracles[layer.approach, sync]
        check = check_case(case, pass_name, oracle, prepared.workload, layer.provider.ours)
        prepared.exchanged[key] = case.collective_bytes.get(pass_name)
        if check.ok:
            prepared.work[key] = case.programs[pass_name]
        prepared.checks[key] = check


def prepare(
    workloads: Sequence[Workload], settings: Settings, progress: Callable[[float], None] = lambda share: None
) -> list[Prepared]:
    """Compile and check every layer at some workloads, on a GPU in threads.

    Those that are not ready at the deadline are left out: what is compiled then goes on in its thread.
    """
    if not _on_gpu():
        started = [begin(workload, settings) for workload in workloads]
        tasks = [(one, layer, sync) for one in started for layer, sync in one.variants]
        for done, (one, layer, sync) in enumerate(tasks):
            progress(done / len(tasks))
            if time.monotonic() >= settings.deadline:
                break
            compile_and_check(one, layer, sync, settings)
        return started
    pool = concurrent.futures.ThreadPoolExecutor(settings.threads or len(os.sched_getaffinity(0)))
    try:
        started = list(pool.map(lambda workload: begin(workload, settings), workloads))
        # The first layer of every workload, then the second: without time for all, each has something to compare.
        ranked = [(rank, one, *variant) for one in started for rank, variant in enumerate(one.variants)]
        ranked.sort(key=lambda task: task[0])
        futures = [pool.submit(compile_and_check, *task[1:], settings) for task in ranked]
        for done, future in enumerate(futures):
            progress(done / len(futures))
            with contextlib.suppress(concurrent.futures.TimeoutError):
                future.result(timeout=max(0.0, min(settings.deadline - time.monotonic(), FOR_EVER)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return started


# Seconds; a lock takes no infinity.
FOR_EVER = 1e6


def time_prepared(
    prepared: Prepared, settings: Settings, progress: Callable[[float], None] = lambda share: None
) -> list[Row]:
    """Time what was prepared; a pass whose check failed is not timed."""
    work = dict(prepared.work)  # a thread may still add to it
    checks = dict(prepared.checks)
    workload = prepared.workload
    # Of several devices the profiler has the kernels of all.
    on_gpu = _on_gpu() and prepared.inputs.mesh is None
    by_clock = {name: timed for name, timed in work.items() if name != DEVICE_COPY}
    clock = measure(by_clock, seconds=settings.seconds, progress=lambda share: progress(share * (0.5 if on_gpu else 1)))
    # Not to be divided by either.
    disturbed = {key: why for key, samples in clock.items() if (why := _disturbed(key, samples))}
    clock = {key: samples for key, samples in clock.items() if key not in disturbed}
    device = {}
    if on_gpu:
        for timed in work.values():
            timed.wait(timed.start())
        device = measure_device(work, progress=lambda share: progress(0.5 + 0.5 * share))
    rows = []
    for pass_name in settings.passes:
        for layer in prepared.planned:
            if layer.status != "ok":
                rows.append(_row(workload, layer, pass_name, status=layer.status, reason=layer.reason))
                continue
            key = Key(layer.provider.name, layer.approach, pass_name, settings.sync)
            if any(one not in checks for one in {key, key.alone if settings.sync else key}):
                rows.append(_row(workload, layer, pass_name, status="skipped", reason=NO_TIME))
                continue
            if key in disturbed:
                rows.append(_row(workload, layer, pass_name, status="refused", reason=disturbed[key]))
                continue
            check, reason = checks[key], checks[key].reason
            if check.ok and settings.sync and not checks[key.alone].ok:
                check = checks[key.alone]
                reason = f"without --sync: {check.reason}"
            values = {"status": "ok" if check.ok else "failed", "reason": reason}
            if check.errors:
                nearest = max(check.errors, key=lambda error: np.nan_to_num(error.share, nan=np.inf))
                values |= {"error": _finite(nearest.value), "limit": nearest.limit}
            if check.ok:
                values |= _times(workload, clock, device, key, settings)
                values["collective_bytes"] = prepared.exchanged[key]
            rows.append(_row(workload, layer, pass_name, **values))
    return rows


# Of torch on a CPU, beyond which its median is no time of what it computes.
MOST_OVER_SMALLEST = 10


def _disturbed(key, samples: Samples) -> str:
    """Why the times of a layer say nothing, if its threads and XLA's were in each other's way; else empty."""
    smallest = float(np.min(samples.seconds))
    if key == COPY or key.layer != "torch" or _on_gpu() or samples.median <= MOST_OVER_SMALLEST * smallest:
        return ""
    return (
        f"torch took {1e3 * smallest:.3g} ms at best and {1e3 * samples.median:.3g} in the median: its threads and "
        "XLA's were in each other's way; OMP_NUM_THREADS=1 keeps them apart"
    )


NO_TIME = "it was not compiled within the time there was"


def run_workload(
    workload: Workload, settings: Settings, progress: Callable[[float], None] = lambda share: None
) -> list[Row]:
    """Check and time every layer at a workload; a pass whose check fails is not timed.

    `progress` is called with the share of the work that is done.
    """
    (prepared,) = prepare([workload], settings, lambda share: progress(0.4 * share))
    return time_prepared(prepared, settings, lambda share: progress(0.4 + 0.6 * share))


def _times(workload, clock: dict[Any, Samples], device: dict[Any, DeviceTime], key, settings):
    """What the samples of a layer's pass say, as fields of a row."""
    passes, values = workload.passes(key.pass_name), {}
    samples = clock
    if key in device and any(name in device for name in (COPY, DEVICE_COPY)):
        samples = {name: time.samples for name, time in device.items()}
        values = {"timed_by": "device", "clock": clock[key].median, "kernels": device[key].kernels}
    copied_by = min((name for name in (COPY, DEVICE_COPY) if name in samples), key=lambda name: samples[name].median)
    times, copy = samples[key], samples[copied_by]
    ratios = {}
    for rival in settings.rivals:
        # A rival that knows one way to train runs once, for all approaches.
        names = (key._replace(layer=rival, approach=approach) for approach in (key.approach, settings.approaches[0]))
        other = next((samples[name] for name in names if name in samples), None)
        if other is not None:
            ratios[rival] = times.ratio_to(other)
    return values | {
        "median": times.median,
        "p10": times.p10,
        "p90": times.p90,
        "rounds": len(times.seconds),
        "nbytes": passes * workload.nbytes,
        "bandwidth": passes * workload.nbytes / times.median,
        "copy_bandwidth": COPY_PASSES * workload.nbytes / copy.median,
        "copied_by": copied_by,
        "of_copy": passes / COPY_PASSES / times.ratio_to(copy),
        "ratios": ratios,
        "sync_ratio": times.ratio_to(samples[key.alone]) if key.sync else None,
    }


def groups(workloads: Sequence[Workload], settings: Settings) -> list[list[Workload]]:
    """The workloads that are prepared together: on a GPU as many as have room in half of its memory."""
    if not _on_gpu():
        return [[workload] for workload in workloads]
    room = ((jax.devices()[0].memory_stats() or {}).get("bytes_limit") or 0) / 2
    grouped, used = [], 0.0
    for workload in workloads:
        # x, dy and a residual; each layer keeps about as much again for its backward.
        layers = len(settings.rivals) + (len(settings.backends) or len(timed_backends()))
        need = sets_for(workload, jax.devices()[0], settings.cold) * workload.nbytes * 3 * (1 + layers)
        if not grouped or used + need > room:
            grouped.append([])
            used = 0.0
        grouped[-1].append(workload)
        used += need
    return grouped


def run(
    workloads: Sequence[Workload], settings: Settings, progress: Callable[[str, float], None] = lambda name, share: None
) -> Iterator[tuple[Workload, list[Row]]]:
    """The rows of each workload as soon as they are there; `progress` gets the share of the whole."""
    done = 0

    def say(name, share, weight=1.0, before=0.0):
        progress(name, (done + before + weight * share) / len(workloads))

    for together in groups(workloads, settings):
        if len(together) == 1:
            (workload,) = together
            yield workload, run_workload(workload, settings, functools.partial(say, workload.name))
            done += 1
            gc.collect()
            continue
        waiting = prepare(together, settings, functools.partial(say, "compiling", weight=0.4 * len(together)))
        while waiting:
            one = waiting.pop(0)
            before = 0.4 * (len(waiting) + 1)
            rows = time_prepared(one, settings, functools.partial(say, one.workload.name, weight=0.6, before=before))
            yield one.workload, rows
            done += 1
            del one
            gc.collect()
