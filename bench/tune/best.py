"""What the times of a backend's plans come to: its best configuration in a class."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bn_fused.bench.device_time import DeviceTime
from bn_fused.kernels.tuned import LEAST_GAIN, Measured

# What Pallas adds to the name of a kernel.
SUFFIX = "_mosaic_gpu_kernel"


@dataclasses.dataclass(frozen=True)
class Program:
    """A forward and a backward with a configuration, timed: seconds of all kernels, and of those of the two operations.

    `by_rule`: its plan is the one that is made where nothing was measured.
    """

    config: Any
    seconds: float
    forward: float = 0.0
    backward: float = 0.0
    by_rule: bool = False


def seconds_of(time: DeviceTime, launches: Iterable[str]) -> float:
    """The seconds in a call of the kernels with these names."""
    wanted = set(launches)
    return sum(
        kernel.launches * kernel.seconds for name, kernel in time.kernels.items() if name.removesuffix(SUFFIX) in wanted
    )


def best(programs: Sequence[Program], combine: Callable | None = None) -> Measured:
    """The fastest configuration; with `combine` the fastest forward with the fastest backward.

    What is not faster by `LEAST_GAIN` does not take the rule's place. Where the rule's plan has no time, the fastest
    program takes its place.
    """
    rule = next((one for one in programs if one.by_rule), None)
    first = rule or min(programs, key=lambda one: one.seconds)

    def fastest(what):
        least = min(programs, key=lambda one: getattr(one, what))
        return least if getattr(least, what) <= (1 - LEAST_GAIN) * getattr(first, what) else first

    # By the clock nothing is known of kernels.
    if combine is None or not all(one.forward > 0 and one.backward > 0 for one in programs):
        taken = fastest("seconds")
        config, seconds = taken.config, taken.seconds
    else:
        forward, backward = fastest("forward"), fastest("backward")
        config = combine(forward.config, backward.config)
        saved = first.forward - forward.forward + first.backward - backward.backward
        seconds = first.seconds - saved
    same = rule is not None and config == rule.config
    return Measured(
        rule.seconds if same else seconds,
        None if rule is None else rule.seconds,
        None if same else dataclasses.asdict(config),
    )
