"""A process of `bn-bench tune`: it compiles and checks the programs of its parts, and times them when it is asked to.

A program is a training step's forward and backward of a class, on arrays that are not in the caches. What is not right,
beside jnp, or does not compile or run, is left out. Between compiling and timing no arrays are kept.
"""

import dataclasses
import functools
import gc
import math
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from bn_fused import kernels
from bn_fused.bench.check import EPS, draw_parameters, failure_of
from bn_fused.bench.child import answer_requests
from bn_fused.bench.device_time import measure_device
from bn_fused.bench.run.cases import in_turn, sets_for
from bn_fused.bench.timing import Timed, measure
from bn_fused.bench.tune.best import Program, seconds_of
from bn_fused.bench.tune.search import Part, searched, target_of
from bn_fused.bench.workloads import Workload
from bn_fused.kernels.tuned import Class

BLEND = kernels.Coefficients(batch=1.0, running=0.0, constant=0.0, mean_gain=0.01, var_gain=0.01, keep=0.99)
# Seconds by the clock for each round of a part, where there are no device times.
CLOCK = 0.05


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled forward and backward: `config` None for jnp's; `launches` of the forward and of the backward."""

    config: Any
    compiled: Any
    launches: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    by_rule: bool = False


@functools.partial(jax.jit, static_argnums=0)
def _drawn(of):
    """x, residual or None, and dy of a class, as `check.draw` has them; drawn on the device."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, residual, dy = (jax.random.normal(key, (of.rows, of.channels), jnp.float32) for key in keys)
    x, residual, dy = (value.astype(of.dtype) for value in (2 * x + 1, residual, dy))
    return x, residual if of.residual else None, dy


def inputs(of: Class):
    """((weight, bias, running mean and variance), sets of x, residual and dy), enough sets that caches are cold."""
    weight, bias = map(jnp.asarray, draw_parameters(of.channels))
    device = jax.devices()[0]
    workload = Workload("class", (of.rows, of.channels), of.dtype)
    first = _drawn(of)
    number = sets_for(workload, device, cold=device.platform != "cpu")
    sets = [first, *(jax.tree.map(jnp.copy, first) for _ in range(number - 1))]
    return (weight, bias, jnp.zeros_like(weight), jnp.ones_like(weight)), sets


def steps_of(of: Class, backend: str, plan: Any):
    """The function that runs a step for each set of inputs: y, dx, the residual's gradient, and what is per channel."""

    def step(parameters, x, residual, dy):
        weight, bias, *running = parameters

        def forward(x, weight, bias, residual):
            y, _, _, *new = kernels.fused_batch_norm(
                x, weight, bias, *running, BLEND, eps=EPS, activation=of.activation, residual=residual,
                backend=backend, plan=plan,
            )  # fmt: skip
            return y, new

        y, pullback, new = jax.vjp(forward, x, weight, bias, residual, has_aux=True)
        # The backward begins when y is there, as it does in a network.
        y, dy = jax.lax.optimization_barrier((y, dy))
        dx, dweight, dbias, dresidual = pullback(dy)
        # Without an activation it is dy, of which a program would return a copy.
        return y, dx, None if of.activation is None else dresidual, (dweight, dbias, new)

    def steps(parameters, sets):
        return in_turn(functools.partial(step, parameters), sets)

    return steps


def compiled(of: Class, backend: str, plan: Any, operands):
    """The program of `steps_of` for these operands."""
    return jax.jit(steps_of(of, backend, plan)).lower(*operands).compile()


@jax.jit
def _apart(result, wanted):
    """Whether a result is finite, how far it is from what is wanted, and in how many places further than rounding."""
    limit = _limit(wanted)
    result, wanted = (value.astype(jnp.float32) for value in (result, wanted))
    error = jnp.abs(result - wanted)
    return jnp.all(jnp.isfinite(result)), jnp.max(error), jnp.count_nonzero(error > limit * (1 + jnp.abs(wanted)))


def _limit(wanted):
    """The sums of both sides round differently: sqrt(rows) of the accumulation's eps, and the result's own."""
    return 50 * float(jnp.finfo(jnp.float32).eps) * math.sqrt(wanted.shape[0]) + 2 * float(jnp.finfo(wanted.dtype).eps)


def difference(results, expected) -> str | None:
    """None if y, dx and the residual's gradient are the expected ones but for rounding, else a sentence."""
    for name, result, wanted in zip(("y", "dx", "dresidual"), results, expected, strict=True):
        if wanted is None:
            continue
        finite, error, places = _apart(result, wanted)
        # At the activation's kink a rounding decides between dy and nothing: a few values in a million.
        if not finite or int(places) > 1 + wanted.size * (1e-5 + _limit(wanted)):
            return f"its {name} is wrong by up to {float(error):.3g}"
    return None


class DeviceLost(RuntimeError):
    """A program has left the device in a state in which no other runs in this process."""


def _runs(program, operands) -> bool:
    try:
        jax.block_until_ready(program(*operands))
    except Exception:  # what an error leaves behind has no type of its own
        return False
    return True


def prepare(part: Part, deadline: float) -> tuple[list[Step], list[str]]:
    """Compile and check jnp's program and those of a part's backend, and why some are left out.

    What is not begun at the deadline, a `time.monotonic()`, is left out, but for jnp's and the first.
    """
    operands = inputs(part.of)
    plain = compiled(part.of, "jnp", None, operands)
    expected = plain(*operands)[0][:3]
    steps, left_out = [Step(None, plain)], []
    tried = [] if part.backend is None else searched(part.backend, part.of, target_of(jax.devices()[0]))
    late = 0
    for place, (config, plan) in enumerate(tried):
        if place and time.monotonic() >= deadline:
            late += 1
            continue
        try:
            program = compiled(part.of, part.backend, plan, operands)
            wrong = difference(program(*operands)[0][:3], expected)
        except Exception as error:  # whatever a compiler or a driver says of one configuration, the others go on
            wrong = failure_of(error)
            if not _runs(plain, operands):
                raise DeviceLost(f"the device is lost after {config}: {wrong}") from error
        if wrong is None:
            launches = getattr(plan, "launches", lambda operation: ())
            steps.append(Step(config, program, (launches("forward"), launches("backward")), place == 0))
        else:
            left_out.append(f"{config}: {wrong}")
    if late:
        left_out.append(f"{late} of {len(tried)} configurations: no time was left to compile them")
    return steps, left_out


def _on_gpu():
    return jax.devices()[0].platform == "gpu"


def times(of: Class, steps: list[Step], rounds: int) -> tuple[float | None, list[Program], list[str]]:
    """jnp's seconds, the programs with theirs, and which have none; on a GPU the device's, else by the clock."""
    operands = inputs(of)
    functions = {
        place: Timed(functools.partial(step.compiled, *operands), calls=len(operands[1]))
        for place, step in enumerate(steps)
    }
    if _on_gpu():
        for timed in functions.values():
            timed.wait(timed.start())
        found = measure_device(functions, rounds=rounds)
        seconds = {place: found[place].samples.median for place in found}
        halves = {place: [seconds_of(found[place], launches) for launches in steps[place].launches] for place in found}
    else:
        seconds = {place: each.median for place, each in measure(functions, seconds=CLOCK * rounds).items()}
        halves = dict.fromkeys(seconds, (0.0, 0.0))
    untimed = [f"{step.config or 'jnp'}: the profiler shows no kernels of it" for place, step in enumerate(steps)
               if place not in seconds]  # fmt: skip
    programs = [
        Program(step.config, seconds[place], *halves[place], by_rule=step.by_rule)
        for place, step in enumerate(steps)
        if place and place in seconds
    ]
    return seconds.get(0), programs, untimed


class Worker:
    """The parts of one process, by their numbers."""

    def __init__(self):
        self.prepared = {}

    def prepare(self, number, of, backend, seconds):
        """Compile a part in so many seconds: how many programs there are, and what was left out."""
        deadline = time.monotonic() + seconds
        part = Part(Class(**of), backend)
        try:
            steps, left_out = prepare(part, deadline)
        except DeviceLost:  # this process is of no more use: it ends
            raise
        except Exception as error:  # without jnp's results there is nothing to compare with
            return {"programs": 0, "left_out": [failure_of(error)]}
        self.prepared[number] = part.of, steps
        gc.collect()
        return {"programs": len(steps), "left_out": left_out}

    def time(self, number, rounds):
        """The times of a part, which is forgotten afterwards."""
        of, steps = self.prepared.pop(number)
        try:
            seconds, programs, untimed = times(of, steps, rounds)
        except Exception as error:
            return {"jnp": None, "programs": [], "left_out": [failure_of(error)]}
        finally:
            gc.collect()
        return {"jnp": seconds, "programs": list(map(dataclasses.asdict, programs)), "left_out": untimed}

    def answer(self, request):
        """The answer to a request."""
        return getattr(self, request.pop("do"))(**request)


if __name__ == "__main__":
    if sys.argv[1:] != ["worker"]:
        sys.exit("it is started by `bn-bench tune`")
    try:
        answer_requests(Worker().answer)
    except DeviceLost as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # whatever a driver waits for
