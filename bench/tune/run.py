"""The work of `bn-bench tune`: processes compile the programs at the same time, and are then timed one after the other.

A part is prepared by whichever process is free, the largest arrays first, in its share of the time that is left; so
every part has at least jnp's program and that of the plan by rule. A process that dies loses the part that it was at.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bn_fused.bench.child import Child, ChildEnded
from bn_fused.bench.tune.best import Program, best
from bn_fused.bench.tune.search import Part
from bn_fused.kernels.registry import tuned_backends
from bn_fused.kernels.tuned import Class, Entry, Measured

# Of the time, what compilation may take; and a part of it, in so many times its share.
COMPILATION, AHEAD = 0.6, 1.3
# Seconds that a process may take to answer after it should have stopped compiling: to start, or for one program.
LATE = 30.0
# Seconds that one part may take to be timed, and those that it needs.
MOST, LEAST = 60.0, 1.5
# Traces of a part: at first, and as many as there is time for.
ROUNDS, FEWEST, LARGEST = 3, 2, 5
NO_TIME = "no time was left to time it"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a class came to: the entry to save, if anything was measured, and what was left out, a line each."""

    of: Class
    entry: Entry | None
    left_out: tuple[str, ...]


def start(rehearse: bool) -> Child:
    """A process that answers as `worker.Worker` does. All of them share the device's memory."""
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **({"JAX_PLATFORMS": "cpu"} if rehearse else {})}
    return Child([sys.executable, "-m", "bn_fused.bench.tune.worker", "worker"], {**os.environ, **variables})


def run(
    parts: Sequence[Part],
    make_child: Callable[[], Any],
    *,
    processes: int,
    time_limit: float,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[Result]:
    """Compile and time parts in about `time_limit` seconds: a result for each class, as soon as it is there."""
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        pool = Pool(lambda: stack.enter_context(make_child()), processes, begin + COMPILATION * time_limit)
        pool.prepare(parts, lambda share: progress(COMPILATION * share))
        programs = sum(pool.programs.values())
        say(f"{programs} programs were compiled by {processes} processes in {time.monotonic() - begin:.0f} s")
        of_class = collections.defaultdict(list)
        for part in parts:
            of_class[part.of].append(part)
        timer = Timer(pool, begin + time_limit, len(pool.programs))
        for done, (of, own) in enumerate(of_class.items()):
            progress(COMPILATION + (1 - COMPILATION) * done / len(of_class))
            yield result(of, {part.backend: timer.time(part) for part in own}, pool.left_out)
    say(f"done after {time.monotonic() - begin:.0f} s")


class Pool:
    """Processes, and which of them has which part ready. In place of one that is lost another is started.

    - `programs`: how many each part has that is ready.
    - `left_out`: what was not compiled or not timed, and why, by part.
    """

    def __init__(self, start: Callable[[], Any], processes: int, deadline: float):
        self.children, self.deadline = [start() for _ in range(processes)], deadline
        self.programs: dict[Part, int] = {}
        self.left_out: dict[Part, list[str]] = collections.defaultdict(list)
        # The process that has a part, and the number by which it knows it.
        self._where: dict[Part, tuple[int, int]] = {}
        self._lost: dict[int, str] = {}
        self._lock = threading.Lock()
        self._start, self._stopped = start, False

    def prepare(self, parts: Sequence[Part], progress: Callable[[float], None]) -> None:
        """Let the processes compile all parts, each the next one as soon as it is free."""
        queue = collections.deque(enumerate(parts))
        executor = concurrent.futures.ThreadPoolExecutor(len(self.children))
        try:
            futures = [executor.submit(self._serve, index, queue) for index in range(len(self.children))]
            while (waiting := concurrent.futures.wait(futures, timeout=0.2).not_done) or queue:
                progress(1 - (len(queue) + len(waiting)) / (len(parts) + len(futures)))
                if not waiting:  # all processes are lost
                    break
            for future in futures:
                future.result()
        finally:
            self._stopped = True  # after an interruption no thread begins another part
            queue.clear()
            executor.shutdown(wait=False, cancel_futures=True)
        for part in parts:
            if part not in self._where and part not in self.left_out:
                self.left_out[part].append("no process is left to compile it")

    def _serve(self, index, queue):
        while True:
            with self._lock:
                if not queue:
                    return
                turns = math.ceil(len(queue) / (len(self.children) - len(self._lost)))
                number, part = queue.popleft()
            left = self.deadline - time.monotonic()
            request = {
                "do": "prepare", "number": number, "of": dataclasses.asdict(part.of), "backend": part.backend,
                "seconds": max(0.0, min(left, AHEAD * left / turns)),
            }  # fmt: skip
            try:
                answer = self.children[index].ask(request, max(0.0, left) + LATE)
            except ChildEnded as error:
                with self._lock:
                    self.left_out[part].append(str(error))
                    if self._stopped or time.monotonic() >= self.deadline:
                        self._lost[index] = str(error)
                        return
                    # What it had ready is compiled anew.
                    again = [one for one, (place, _) in self._where.items() if place == index]
                    queue.extend((self._where.pop(one)[1], one) for one in again)
                    self.children[index] = self._start()
                    for one in again:
                        del self.programs[one], self.left_out[one]
                continue
            with self._lock:
                self.left_out[part] += answer["left_out"]
                if answer["programs"]:
                    self._where[part], self.programs[part] = (index, number), answer["programs"]

    def time(self, part: Part, rounds: int, limit: float) -> Mapping[str, Any] | None:
        """The times of a part; None, and a line in `left_out`, where there are none."""
        index, number = self._where[part]
        if index in self._lost:
            self.left_out[part].append(f"its process is lost: {self._lost[index]}")
            return None
        try:
            answer = self.children[index].ask({"do": "time", "number": number, "rounds": rounds}, limit)
        except ChildEnded as error:
            self._lost[index] = str(error)
            self.left_out[part].append(str(error))
            return None
        self.left_out[part] += answer["left_out"]
        return answer


class Timer:
    """Times parts one after the other until the time is over, with as many rounds as there is time for."""

    def __init__(self, pool: Pool, end: float, parts: int):
        self._pool, self._end, self._left, self._round = pool, end, parts, None

    def time(self, part: Part) -> Mapping[str, Any] | None:
        """The times of a part; None where there are none."""
        if part not in self._pool.programs:
            return None
        begin = time.monotonic()
        left = self._end - begin
        if left < LEAST:
            self._pool.left_out[part].append(NO_TIME)
            return None
        rounds = ROUNDS
        if self._round is not None:
            rounds = int(min(max(left / self._left / self._round, FEWEST), LARGEST))
        answer = self._pool.time(part, rounds, min(MOST, left + LATE))
        self._left -= 1
        took = (time.monotonic() - begin) / rounds
        # Of the parts so far, the next ones' most likely; at the first a profiler has to start.
        self._round = took if self._round is None else (self._round + took) / 2
        return answer


def result(of: Class, answers: Mapping[str | None, Any], left_out: Mapping[Part, Sequence[str]]) -> Result:
    """What the times of a class's parts come to."""
    answers = {name: answer for name, answer in answers.items() if answer is not None and answer["jnp"] is not None}
    lines = [
        f"{part.backend or 'jnp'}: {line}" for part, said in list(left_out.items()) if part.of == of for line in said
    ]
    backends = {}
    if answers:
        # Each of the processes has timed it.
        backends["jnp"] = Measured(float(np.mean([answer["jnp"] for answer in answers.values()])))
    for name, answer in answers.items():
        if answer["programs"]:
            tuning = tuned_backends()[name].tuning
            programs = [Program(**{**one, "config": tuning.parse(one["config"])}) for one in answer["programs"]]
            backends[name] = best(programs, tuning.combine)
    # A class in which a backend was asked for and none has a time says nothing.
    measured = len(backends) > 1 or (backends and set(answers) == {None})
    return Result(of, Entry(of, backends) if measured else None, tuple(lines))
