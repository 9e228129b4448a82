"""The same comparison and times as of `timed.run`, with each network in a process of its own.

They are lowered at the same time, compiled one after the other, and then timed in turn: a round asks one process after
the other for a few steps, while the others wait. XLA chooses convolutions by timing them on the device, where two
programs would disturb each other; it takes a minute and more for the first of each layout, and the next ones find the
choices in a cache. The variable JAX_COMPILATION_CACHE_DIR keeps it for another run. What one process does to the device
(a trap, memory that is not given back) does not reach the others.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import bn_fused
from bn_fused.bench.child import Child, ChildEnded, answer_requests
from bn_fused.bench.device_time import measure_device
from bn_fused.bench.step.agreement import Expected, Losses, epsilon
from bn_fused.bench.step.networks import BASELINE, Contender, Setting, contender_named
from bn_fused.bench.step.timed import TIMED, Row, RunInterrupted, compared, make_run, one_line, timed
from bn_fused.bench.timing import MAX_ROUNDS, MIN_ROUNDS, Samples, Timed

# Steps that are timed together, started one after the other, after one that brings back clocks and caches. As in
# training the next step is started while one runs: the fewer, the more the time until the first begins weighs.
STEPS = 16
# Traces of two steps each.
TRACES = 2
# Seconds for one answer once a network is compiled.
ANSWER = 120.0


def environment(cache: str) -> dict[str, str]:
    """Of the processes: they share the device's memory, and the choices of XLA's autotuning in a folder."""
    return {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
        # The programs themselves are each compiled once.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000",
    }


@dataclasses.dataclass
class Process:
    """A network and the process that holds it; `row` says why if it is not to be timed."""

    network: Contender
    child: Child
    row: Row | None = None
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def ask(self, limit: float, **request) -> Any:
        """The answer, None if there is none: then `row` is set."""
        try:
            answer = self.child.ask(request, max(0.0, limit))
        except ChildEnded as error:
            late = "time limit" in str(error) and request["do"] in ("lower", "compile")
            reason = "it was not compiled within the time there was" if late else str(error)
            self.row = Row(self.network.name, "untimed" if late else "failed", reason)
            return None
        if "status" in answer:
            self.row = Row(self.network.name, answer["status"], answer["reason"])
            return None
        self.values |= answer
        return answer

    @property
    def able(self) -> bool:
        """Whether it can be asked for more."""
        return self.row is None or self.row.status in TIMED


def run(
    setting: Setting,
    networks: Sequence[Contender],
    options: Mapping,
    *,
    seconds: float,
    time_limit: float,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> list[Row]:
    """Build, compare and time the networks; the rows in their order, as of `timed.run`.

    `time_limit`: seconds for compilation, after which the networks that are not ready are left out. `options` are the
    arguments with which `contenders` made the networks.
    """
    rows = {one.name: Row(one.name, "missing", one.missing) for one in networks if one.missing is not None}
    able = [one for one in networks if one.name not in rows]
    found, interrupted = {one.name: [] for one in able}, False
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="bn-bench-cache-"))
        command, variables = [sys.executable, "-m", "bn_fused.bench.step.apart"], environment(cache)
        processes = [Process(one, stack.enter_context(Child(command, variables))) for one in able]
        try:
            _build(processes, setting, options, time_limit, progress)
            _compare(processes, setting)
            _time([one for one in processes if one.able], found, seconds, progress)
        except KeyboardInterrupt:
            interrupted = True
    samples = _samples(found, processes)
    rows |= {one.network.name: _row(one, samples, setting) for one in processes if one.row is not None}
    finished = [rows[one.name] for one in networks if one.name in rows]
    if interrupted:
        raise RunInterrupted(finished)
    return finished


def _channels_last(network):
    return network.function is not None or network.module == "flax"


def _build(processes, setting, options, time_limit, progress):
    """Lower and compile JAX's networks, those with channels last first, and then torch's.

    torch's compiler has a process for each core: beside it nothing else would be ready in time.
    """
    deadline = time.monotonic() + time_limit

    def lower(one):
        request = {"setting": dataclasses.asdict(setting), "options": dict(options), "name": one.network.name}
        one.ask(deadline - time.monotonic(), do="lower", **request)

    torch = [one for one in processes if one.network.module == "torch"]
    others = [one for one in processes if one not in torch]
    with concurrent.futures.ThreadPoolExecutor(max(1, len(others))) as pool:
        lowering = {pool.submit(lower, one): one for one in others}
        for channels_last in (True, False):
            waiting = {done: one for done, one in lowering.items() if _channels_last(one.network) == channels_last}
            while waiting:
                concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                # Of those that are lowered the first in the table.
                first = next(done for done in waiting if done.done())
                one = waiting.pop(first)
                first.result()
                if one.able:
                    one.ask(deadline - time.monotonic(), do="compile")
    progress("compiling", 0.35)
    for one in torch:
        lower(one)
        if one.able:
            one.ask(deadline - time.monotonic(), do="compile")
    progress("compiling", 0.7)


def _compare(processes, setting):
    """Ask for the losses, the baseline's first, and set the rows."""
    platform = jax.devices()[0].platform
    baseline = next((one for one in processes if one.network.name == BASELINE and one.able), None)
    lr, expected = 1e-3, None
    if baseline is not None:
        found = baseline.ask(ANSWER, do="baseline", unit=epsilon(setting.dtype, platform))
        if found is not None:
            lr, expected = found["lr"], Expected(Losses(*found["losses"]), Losses(*found["noise"]))
    others = [one for one in processes if one.able]
    with concurrent.futures.ThreadPoolExecutor(max(1, len(others))) as pool:
        list(pool.map(lambda one: one.ask(ANSWER, do="losses", lr=lr), others))
    for one in others:
        if one.able:
            one.row = compared(one.network, Losses(*one.values["losses"]), expected, setting, platform)


def _time(processes, found, seconds, progress):
    """Rounds of all processes in turn, added to what was `found` by name, then the kernels of each."""
    begin = time.monotonic()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.monotonic() - begin >= seconds:
            break
        for one in processes if number % 2 == 0 else processes[::-1]:
            if one.able and (answer := one.ask(ANSWER, do="time", steps=STEPS)) is not None:
                found[one.network.name].append(answer["seconds"])
        progress("timing", 0.7 + 0.2 * min(1.0, (time.monotonic() - begin) / seconds))
    for done, one in enumerate(processes):
        if one.able and jax.devices()[0].platform == "gpu":
            before = one.row
            if one.ask(ANSWER, do="trace") is None:
                # Its times stand: only the kernels are not known.
                one.row = dataclasses.replace(before, reason=f"kernels: {one.row.reason}")
        progress("kernels", 0.9 + 0.1 * (done + 1) / len(processes))


def _samples(found, processes):
    """The samples of the whole rounds, of the processes that were in all of them."""
    able = {one.network.name: found[one.network.name] for one in processes if one.able}
    rounds = min(map(len, able.values()), default=0)
    return {name: Samples(np.asarray(values[:rounds])) for name, values in able.items()} if rounds else {}


def _row(process, samples, setting):
    row = timed(process.row, samples, setting)
    names = ("memory", "peak", "lowering", "compilation", "busy", "span", "launches", "kernels")
    return dataclasses.replace(row, **{name: process.values[name] for name in names if name in process.values})


# In the processes


class _Network:
    """What answers requests: `answer` calls the method that a request names."""

    def lower(self, setting, options, name):
        """Make the network and lower its step."""
        begin = time.monotonic()
        self.network = contender_named(name, options)
        self.run = make_run(self.network, Setting(**setting))
        return {"lowering": time.monotonic() - begin}

    def compile(self):
        """Compile it."""
        begin = time.monotonic()
        self.run.compile()
        return {"compilation": time.monotonic() - begin, "memory": None}

    def baseline(self, unit):
        """The learning rate for all, and the losses with their noise."""
        lr = self.run.learning_rate()
        losses = self.run.losses(lr)
        expected = self.run.expected(lr, losses, unit)
        return {"lr": lr, "losses": list(losses), "noise": list(expected.noise)}

    def losses(self, lr):
        """Its losses with this learning rate, and the memory it took."""
        losses = self.run.losses(lr)
        statistics = jax.devices()[0].memory_stats() or {}
        peak = None if self.network.module == "torch" else statistics.get("peak_bytes_in_use")
        return {"losses": list(losses), "memory": self.run.memory(), "peak": peak}

    def time(self, steps):
        """Seconds of one of some steps, one after the other."""
        jax.block_until_ready(self.run.once())
        begin = time.perf_counter()
        for _ in range(steps):
            loss = self.run.once()
        jax.block_until_ready(loss)
        return {"seconds": (time.perf_counter() - begin) / steps}

    def trace(self):
        """The kernels of a step; nothing if the profiler shows none."""
        found = measure_device({"step": Timed(self.run.once)}, rounds=TRACES).get("step")
        if found is None:
            return {}
        return {
            "busy": found.samples.median, "span": found.span, "launches": found.launches, "kernels": found.kernels,
        }  # fmt: skip


def _answer(network, request):
    do = request.pop("do")
    try:
        return getattr(network, do)(**request)
    except bn_fused.BackendError as error:
        return {"status": "refused", "reason": str(error)}
    except Exception as error:  # a kernel may fail in any way; it must show, whatever it raised
        return {"status": "failed", "reason": one_line(error)}


if __name__ == "__main__":
    one = _Network()
    answer_requests(lambda request: _answer(one, request))
