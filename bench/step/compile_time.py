"""How long the training step of each network takes to trace, to lower and to compile.

Every sample is fresh: JAX's caches are cleared, and the step is jitted anew. One process takes a sample of each network
in every round, so that what slows the machine down slows all of a round. Nothing is run, and no cache on disk is read.
"""

import dataclasses
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import bn_fused
from bn_fused.bench import deviceless
from bn_fused.bench.child import Child, ChildEnded, answer_requests
from bn_fused.bench.step.audit import why_left_out
from bn_fused.bench.step.networks import (
    BASELINE,
    Contender,
    Program,
    Setting,
    argument_types,
    contender_named,
    program,
)
from bn_fused.bench.step.timed import RunInterrupted, one_line
from bn_fused.bench.timing import Samples

MIN_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class CompileRow:
    """The step of one network.

    - `status`, `reason`: as of `Row`; "untimed" if no round was finished.
    - `tracing`, `lowering`, `compilation`, `total`: seconds by the clock, the medians over the `rounds`.
    - `cpu`: seconds of all of the process's threads, the median of their sums.
    - `compared_with`: the network with which it is: Flax's where that was compiled, else `BASELINE`.
    - `ratio`, `ratio_p10`, `ratio_p90`: total over that one's in the same round, the median and percentiles;
        `cpu_ratio`: the median of cpu's.
    """

    name: str
    status: str
    reason: str = ""
    tracing: float | None = None
    lowering: float | None = None
    compilation: float | None = None
    total: float | None = None
    cpu: float | None = None
    rounds: int = 0
    compared_with: str | None = None
    ratio: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    cpu_ratio: float | None = None


def environment(target: str | None) -> dict[str, str]:
    """Of the process: for the device here, or for a chip that is not."""
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return os.environ | variables | ({} if target is None else {"JAX_PLATFORMS": "cpu"})


def run(
    target: str | None,
    setting: Setting,
    networks: Sequence[Contender],
    options: Mapping,
    *,
    seconds: float,
    time_limit: float,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> list[CompileRow]:
    """Trace, lower and compile every network in rounds; the rows in their order.

    There are `MIN_ROUNDS` rounds, and more until `seconds` have passed.
    `target` is a chip's name, None for JAX's default device; `options` are the arguments with which `contenders` made
    the networks. One that takes longer than `time_limit` seconds once, or ends the process, is left out from then on.
    Raises `RunInterrupted` in place of KeyboardInterrupt.
    """
    rows = {one.name: CompileRow(one.name, *why) for one in networks if (why := why_left_out(one)) is not None}
    found = {one.name: [] for one in networks if one.name not in rows}
    request = {"target": target, "setting": dataclasses.asdict(setting), "options": dict(options)}
    command, child, interrupted = [sys.executable, "-m", "bn_fused.bench.step.compile_time"], None, False
    try:
        begin, rounds = time.monotonic(), 0
        while rounds < MIN_ROUNDS or time.monotonic() - begin < seconds:
            able = [name for name in found if name not in rows]
            if not able:
                break
            for place, name in enumerate(able if rounds % 2 == 0 else able[::-1]):
                progress(f"round {rounds + 1}: {name}", _share(rounds + place / len(able), begin, seconds))
                child = child or Child(command, environment(target))
                try:
                    answer = child.ask(request | {"name": name}, time_limit)
                except ChildEnded as error:
                    child, answer = None, {"status": "failed", "reason": str(error)}
                if "status" in answer:
                    rows[name] = CompileRow(name, **answer)
                else:
                    found[name].append(answer)
            rounds += 1
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if child is not None:
            child.close()
    rows |= _rows({name: samples for name, samples in found.items() if name not in rows})
    finished = [rows[one.name] for one in networks]
    if interrupted:
        raise RunInterrupted(finished)
    return finished


def _share(rounds, begin, seconds):
    """The share of the work that is done."""
    return min(rounds / MIN_ROUNDS, max((time.monotonic() - begin) / seconds, rounds / (rounds + 1)))


def _rows(found: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> dict[str, CompileRow]:
    """The rows of the networks with these samples, of the rounds that all of them finished."""
    rounds = min(map(len, found.values()), default=0)
    if not rounds:
        return {name: CompileRow(name, "untimed", "interrupted before a round was finished") for name in found}
    clock = {name: np.asarray([one["seconds"] for one in samples[:rounds]]) for name, samples in found.items()}
    total = {name: Samples(stages.sum(1)) for name, stages in clock.items()}
    cpu = {name: Samples(np.asarray([one["cpu"] for one in samples[:rounds]])) for name, samples in found.items()}
    reference = next((name for name in ("flax", BASELINE) if name in found), None)
    rows = {}
    for name, stages in clock.items():
        row = CompileRow(
            name, "ok", "", *map(float, np.median(stages, 0)), total[name].median, cpu[name].median, rounds, reference
        )  # fmt: skip
        if reference is not None:
            p10, ratio, p90 = total[name].ratios_to(total[reference], (10, 50, 90))
            cpu_ratio = cpu[name].ratio_to(cpu[reference])
            row = dataclasses.replace(row, ratio=ratio, ratio_p10=p10, ratio_p90=p90, cpu_ratio=cpu_ratio)
        rows[name] = row
    return rows


# In the process


class Sampler:
    """What answers requests. A network is made, and lowered once, before its first sample."""

    def __init__(self):
        self.programs: dict[str, Program] = {}

    def answer(self, request: Mapping) -> dict[str, Any]:
        """Seconds of the stages of one network, and of all threads together; or status and reason."""
        target, name, setting = request["target"], request["name"], Setting(**request["setting"])
        try:
            if name not in self.programs:
                self.programs[name] = program(contender_named(name, request["options"]), setting)
                _lower(target, _trace(target, self.programs[name], setting))
            return _sample(target, self.programs[name], setting)
        except bn_fused.BackendError as error:
            return {"status": "refused", "reason": str(error)}
        except deviceless.DevicelessUnavailable as error:
            return {"status": "missing", "reason": str(error)}
        except Exception as error:  # a compiler may fail in any way
            return {"status": "failed", "reason": one_line(error)}


def _trace(target, training, setting):
    def step(*arguments):  # a new function, which no cache knows
        return training.step(*arguments)

    arguments = argument_types(training, setting)
    if target is None:
        return jax.jit(step, donate_argnums=0).trace(*arguments)
    return deviceless.trace_for(target, step, *arguments)


def _lower(target, traced):
    return traced.lower() if target is None else deviceless.lower_traced(target, traced)


def _sample(target, training, setting):
    jax.clear_caches()
    gc.collect()
    cpu, clock = _cpu_seconds(), [time.perf_counter()]
    traced = _trace(target, training, setting)
    clock.append(time.perf_counter())
    lowered = _lower(target, traced)
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    return {"seconds": list(map(float, np.diff(clock))), "cpu": _cpu_seconds() - cpu}


def _cpu_seconds():
    """Of all threads, and of the processes that were waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    answer_requests(Sampler().answer)
