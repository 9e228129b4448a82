"""Times of functions that are measured against each other, and the bandwidth they reach.

Everything that is compared runs in one process, one after the other in every round, and a ratio is the median
of the rounds' ratios: what slows the machine down for a while slows both sides of a ratio.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# A sample calls its function often enough to last this long (seconds), so that the clock and the waiting for
# the device cost little of it.
SAMPLE_SECONDS = 2e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclasses.dataclass(frozen=True)
class Timed:
    """A function to time.

    - `start()` starts work on the device and returns what it makes.
    - `calls`: how many times it does the work whose time is asked for.
    - `wait(result)` returns when the work is done.
    """

    start: Callable[[], Any]
    calls: int = 1
    wait: Callable[[Any], Any] = jax.block_until_ready


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds per call, one value per round: `seconds`; the median and the 10th and 90th percentile."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def p10(self) -> float:
        """The 10th percentile, in seconds."""
        return float(np.percentile(self.seconds, 10))

    @property
    def p90(self) -> float:
        """The 90th percentile, in seconds."""
        return float(np.percentile(self.seconds, 90))

    def ratio_to(self, other: "Samples") -> float:
        """The median over the rounds of this time divided by the other's in the same round."""
        return self.ratios_to(other, (50,))[0]

    def ratios_to(self, other: "Samples", percentiles: Sequence[float]) -> tuple[float, ...]:
        """The percentiles over the rounds of this time divided by the other's in the same round."""
        return tuple(map(float, np.percentile(self.seconds / other.seconds, percentiles)))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while `measure` was at work. `samples` are those of the rounds in which every function ran, if any did."""

    def __init__(self, samples: Mapping[Any, Samples]):
        super().__init__()
        self.samples = samples


def measure(
    functions: Mapping[Any, Timed],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[Any, Samples]:
    """Time functions in interleaved rounds for about `seconds` in all, and at least `MIN_ROUNDS` rounds.

    Each function runs twice beforehand, so that compilation and first touches of memory are not in the samples.
    `progress` is called with the share of the time that has passed. Raises `Interrupted` in place of KeyboardInterrupt.
    """
    samples: dict[Any, list[float]] = {name: [] for name in functions}
    try:
        _measure(functions, samples, seconds, clock, progress)
    except KeyboardInterrupt:
        rounds = min(map(len, samples.values()), default=0)
        # A round that was cut short is not paired.
        raise Interrupted(
            {name: Samples(np.asarray(values[:rounds])) for name, values in samples.items()} if rounds else {}
        ) from None
    return {name: Samples(np.asarray(values)) for name, values in samples.items()}


def _measure(functions, samples, seconds, clock, progress):
    """Add to the samples."""
    repeats = {}
    for name, timed in functions.items():
        timed.wait(timed.start())
        start = clock()
        timed.wait(timed.start())
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(clock() - start, 1e-9)))
    names = list(functions)
    begin = clock()
    for rounds in range(MAX_ROUNDS):
        if rounds >= MIN_ROUNDS and clock() - begin >= seconds:
            break
        # Forwards and backwards in turn, so that no function always follows the same neighbour's use of the caches.
        for name in names if rounds % 2 == 0 else reversed(names):
            timed = functions[name]
            start = clock()
            for _ in range(repeats[name]):
                result = timed.start()
            timed.wait(result)
            samples[name].append((clock() - start) / (repeats[name] * timed.calls))
        progress(min(1.0, (clock() - begin) / seconds))
