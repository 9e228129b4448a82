"""The configurations of the backend `triton`, timed on the device at hand: `tune` finds the best for each workload.

A configuration's time is that of a training step's forward and backward together, relu included, on arrays that are
not in the caches. One whose results are not those of the backend `jnp`, or that does not compile or run, is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_fused import kernels
from bn_fused.bench.run.cases import in_turn, sets_for
from bn_fused.bench.timing import Timed, measure
from bn_fused.bench.workloads import Workload
from bn_fused.kernels.backends.triton.plan import Plan, make_plan, search_set
from bn_fused.kernels.backends.triton.tuning import Entry
from bn_fused.kernels.chips import GpuChip

ACTIVATION = "relu"
BLEND = kernels.Coefficients(batch=1.0, running=0.0, constant=0.0, mean_gain=0.01, var_gain=0.01, keep=0.99)
EPS = 1e-5
# A configuration must be faster than the heuristic's by this share to take its place: less is noise.
LEAST_GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class Result:
    """What tuning a workload gave: the entry to save, how many configurations ran, and why the others did not."""

    workload: Workload
    entry: Entry | None
    ran: int
    failures: tuple[str, ...]


def sizes_of(workload: Workload) -> tuple[int, int]:
    """Rows and channels of a workload."""
    return workload.elements // workload.channels, workload.channels


def tune(
    workloads: Iterable[Workload],
    chip: GpuChip,
    timer: Callable[[Workload, Sequence[Plan]], Sequence[float | str]],
    progress: Callable[[str], None] = lambda what: None,
) -> Iterable[Result]:
    """The best configuration for each workload; `timer` gives each plan's seconds, or says why it has none."""
    for workload in workloads:
        progress(str(workload))
        rows, channels = sizes_of(workload)
        itemsize = jnp.dtype(workload.dtype).itemsize
        configs = search_set(1, rows, channels, itemsize, chip)
        # Configurations that come to the same plan for this array are timed once.
        plans = {
            make_plan(1, rows, channels, itemsize, chip, config, derivative=True): config
            for config in reversed(configs)
        }
        plans = dict(reversed(plans.items()))
        first = make_plan(1, rows, channels, itemsize, chip, configs[0], derivative=True)
        times = dict(zip(plans, timer(workload, tuple(plans)), strict=True))
        failures = tuple(f"{plans[plan]}: {time}" for plan, time in times.items() if isinstance(time, str))
        times = {plan: time for plan, time in times.items() if not isinstance(time, str)}
        if not times:
            yield Result(workload, None, 0, failures)
            continue
        best = min(times, key=times.__getitem__)
        reference = times.get(first, math.inf)
        if times[best] > (1 - LEAST_GAIN) * reference:
            best = first
        # Where the heuristic's configuration does not run at all, it has no time.
        reference = reference if math.isfinite(reference) else times[best]
        entry = Entry(1, rows, channels, workload.dtype, plans[best], times[best], reference)
        yield Result(workload, entry, len(times), failures)


def time_plans(
    workload: Workload, plans: Sequence[Any], *, seconds: float, device=None, backend: str = "triton"
) -> list[float | str]:
    """The median seconds of each plan on the device, interleaved; a sentence for one that fails."""
    rows, channels = sizes_of(workload)
    device = jax.devices()[0] if device is None else device
    random = np.random.default_rng(0)
    x, dy = (jax.device_put(random.standard_normal((rows, channels)).astype(workload.dtype), device) for _ in range(2))
    first, *more = [(x, dy)] * sets_for(workload, device, cold=device.platform != "cpu")
    sets = (first, *(tuple(map(jnp.copy, one)) for one in more))
    one = jax.device_put(jnp.ones(channels, jnp.float32), device)

    def step_with(backend, plan):
        def step(x, dy):
            def forward(x):
                y, *_ = kernels.fused_batch_norm(
                    x, one, one, one, one, BLEND, eps=EPS, activation=ACTIVATION, backend=backend, plan=plan
                )
                return y

            y, pullback = jax.vjp(forward, x)
            y, dy = jax.lax.optimization_barrier((y, dy))
            return y, *pullback(dy)

        return jax.jit(lambda sets: in_turn(step, sets))

    expected = step_with("jnp", None)(sets[:1])[0]
    times: dict[Any, float | str] = {}
    programs = {}
    for plan in plans:
        program = step_with(backend, plan)
        try:
            wrong = difference(program(sets)[0], expected)
        except Exception as error:  # whatever a compiler or a driver says of one configuration, the others go on
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if wrong is None:
            programs[plan] = Timed(lambda program=program: program(sets), calls=len(sets))
        else:
            times[plan] = wrong
    if programs:
        times |= {plan: samples.median for plan, samples in measure(programs, seconds=seconds).items()}
    return [times[plan] for plan in plans]


def difference(results, expected) -> str | None:
    """None if arrays are the expected ones but for rounding, else a sentence."""
    for name, result, wanted in zip(("y", "dx"), results, expected, strict=True):
        # The sums of both sides round differently: sqrt(rows) of the accumulation's eps, and the result's own.
        rows = wanted.shape[0]
        eps = 50 * float(jnp.finfo(jnp.float32).eps) * math.sqrt(rows) + 2 * float(jnp.finfo(wanted.dtype).eps)
        result, wanted = (np.asarray(value, np.float32) for value in (result, wanted))
        error = float(np.max(np.abs(result - wanted)))
        # At relu's kink a rounding decides between dy and nothing: a few values in a million.
        apart = np.abs(result - wanted) > eps * (1 + np.abs(wanted))
        if not np.all(np.isfinite(result)) or np.count_nonzero(apart) > 1 + apart.size * (1e-5 + eps):
            return f"its {name} is wrong by up to {error:.3g}"
    return None
