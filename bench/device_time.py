"""How long kernels take on a GPU: the sum of their durations, and each of them by name.

`jax.profiler.trace` writes them down and `jax.profiler.ProfileData` reads them back: of the planes `/device:GPU*` the
lines `Stream*` have an event for every kernel, copy and fill, whichever library launched it. What lies between them,
launches and waiting, is not in the sum; a time by the clock has it. Kernels that run side by side are added up.

Mosaic's own profiler (`jax.experimental.mosaic.gpu.profiler`) asks the same source, CUPTI, but leaves out copies and
fills, and takes a function of JAX's alone.
"""

import collections
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_fused.bench.timing import Samples, Timed

ROUNDS = 5
# Of each function in a round.
STARTS = 2
# Between functions nothing runs for as long (seconds): far more than the clocks of device and host differ by.
PAUSE = 2e-3
MARK = "bn_bench:"
# Of the names of kernels, which a compiler may make very long.
LONGEST_NAME = 120


class Kernel(NamedTuple):
    """All kernels, copies or fills of one name: launches in a call, and seconds that one takes.

    The mean in a round, the median over the rounds: the product of both is the time in a call.
    """

    launches: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """Of a function: the seconds of all kernels in a call, one value a round, and the kernels by name, longest first.

    - `span`: seconds from the first kernel's begin to the last one's end, in a call, the median.
    """

    samples: Samples
    kernels: dict[str, Kernel]
    span: float

    @property
    def launches(self) -> float:
        """Kernels, copies and fills in a call."""
        return sum(kernel.launches for kernel in self.kernels.values())


class Event(NamedTuple):
    """A kernel that ran: times in nanoseconds."""

    start: float
    duration: float
    name: str


class Unmeasured(RuntimeError):
    """The trace holds no kernels, or others in every round; the message is one line."""


def read(data: Any) -> tuple[list[Event], dict[int, float]]:
    """The kernels of a `ProfileData`, in the order of time, and when the marked parts began, by number."""
    events, began = [], {}
    for plane in data.planes:
        on_gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if on_gpu and line.name.startswith("Stream"):
                events += [Event(event.start_ns, event.duration_ns, event.name) for event in line.events]
            elif plane.name.startswith("/host:"):
                marks = [(event.name, event.start_ns) for event in line.events if event.name.startswith(MARK)]
                began |= {int(name.removeprefix(MARK)): start for name, start in marks}
    return sorted(events), began


def shared_out(events: Sequence[Event], began: Mapping[int, float]) -> dict[int, list[Event]]:
    """The events of each marked part: those after its begin, which the pause before it keeps apart."""
    numbers = sorted(began, key=began.__getitem__)
    borders = np.asarray([began[number] - PAUSE * 1e9 / 2 for number in numbers])
    parts = {number: [] for number in numbers}
    for event in events:
        place = int(np.searchsorted(borders, event.start, side="right")) - 1
        if place >= 0:
            parts[numbers[place]].append(event)
    return parts


def _traced(functions: Sequence[Timed]) -> list[list[Event]]:
    """Run functions one after the other under the profiler: the events of each."""
    options = jax.profiler.ProfileOptions()
    # No call of a Python function; of the host the marks alone are of interest.
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with tempfile.TemporaryDirectory(prefix="bn-bench-trace-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for number, timed in enumerate(functions):
                time.sleep(PAUSE)
                with jax.profiler.TraceAnnotation(f"{MARK}{number}"):
                    for _ in range(STARTS):
                        result = timed.start()
                    timed.wait(result)
                del result
        paths = list(pathlib.Path(folder).rglob("*.xplane.pb"))
        if not paths:
            raise Unmeasured("JAX's profiler wrote no trace")
        events, began = read(jax.profiler.ProfileData.from_file(str(paths[0])))
    if len(functions) == 1:
        return [events]
    parts = shared_out(events, began)
    return [parts.get(number, []) for number in range(len(functions))]


def _named(events):
    return collections.Counter(event.name for event in events)


def _consistent(rounds: Sequence[Sequence[Event]]) -> bool:
    """Whether every round has the same kernels, and some."""
    first = _named(rounds[0])
    return bool(first) and all(_named(events) == first for events in rounds[1:])


def summary(rounds: Sequence[Sequence[Event]], calls: int) -> DeviceTime:
    """What rounds with the same kernels say; `calls`: how many are in a round."""
    totals = [sum(event.duration for event in events) / calls / 1e9 for events in rounds]
    spans = [(max(e.start + e.duration for e in events) - events[0].start) / calls / 1e9 for events in rounds]
    durations = [collections.defaultdict(list) for _ in rounds]
    for times, events in zip(durations, rounds, strict=True):
        for event in events:
            times[event.name[:LONGEST_NAME]].append(event.duration / 1e9)
    kernels = {
        name: Kernel(len(times) / calls, float(np.median([np.mean(each[name]) for each in durations])))
        for name, times in durations[0].items()
    }
    kernels = dict(sorted(kernels.items(), key=lambda item: -item[1].launches * item[1].seconds))
    return DeviceTime(Samples(np.asarray(totals)), kernels, float(np.median(spans)))


def measure_device(
    functions: Mapping[Any, Timed],
    *,
    rounds: int = ROUNDS,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[Any, DeviceTime]:
    """The device times of functions, in interleaved rounds; without those that the profiler shows no kernels of.

    Every function has to have run before. A round is one trace; a function whose kernels are not the same in all rounds
    (another process's clock, an event that was lost) is traced alone instead.
    """
    names = list(functions)
    found = {name: [] for name in names}
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        for name, events in zip(order, _traced([functions[name] for name in order]), strict=True):
            found[name].append(events)
        progress((number + 1) / rounds)
    times = {}
    for name, timed in functions.items():
        if not _consistent(found[name]):
            found[name] = [_traced([timed])[0] for _ in range(rounds)]
        if _consistent(found[name]):
            times[name] = summary(found[name], STARTS * timed.calls)
    return times
