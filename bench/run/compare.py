"""Two saved runs, row by row."""

import dataclasses
from collections.abc import Sequence

from bn_fused.bench.run.records import Environment, Row, Run


class NotComparable(ValueError):
    """The runs were made on different devices; the message names both."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """The rows of the same case in two runs; None where a run has none."""

    first: Row | None
    second: Row | None

    @property
    def either(self) -> Row:
        """The row that is there."""
        return self.second or self.first

    @property
    def ratio(self) -> float | None:
        """The second time over the first; None unless both were timed."""
        if self.first is None or self.second is None or not self.first.median or not self.second.median:
            return None
        return self.second.median / self.first.median

    @property
    def apart(self) -> bool:
        """Whether the times differ by more than both spreads: the ranges from p10 to p90 do not meet."""
        return self.ratio is not None and (self.first.p90 < self.second.p10 or self.second.p90 < self.first.p10)


def pairs(first: Run, second: Run) -> list[Pair]:
    """The rows of both runs, joined by case, in the first's order and then what only the second has."""
    others = {row.key: row for row in second.rows}
    joined = [Pair(row, others.pop(row.key, None)) for row in first.rows]
    return [*joined, *(Pair(None, row) for row in others.values())]


def differences(first: Run, second: Run) -> list[str]:
    """What differs between the environments and settings of two runs, a line each."""
    lines = []
    for name in Environment.model_fields:
        one, other = getattr(first.environment, name), getattr(second.environment, name)
        if name == "versions":
            lines += [
                f"{package}: {one.get(package, 'none')} / {other.get(package, 'none')}"
                for package in sorted({*one, *other})
                if one.get(package) != other.get(package)
            ]
        elif one != other:
            lines.append(f"{name}: {one} / {other}")
    for name in ("cold", "sync"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            lines.append(f"{name}: {one} / {other}")
    return lines


def check_comparable(first: Run, second: Run) -> None:
    """Raise `NotComparable` if the runs were made on different devices."""
    devices = [f"{run.environment.devices} x {run.environment.device}" for run in (first, second)]
    if devices[0] != devices[1]:
        raise NotComparable(f"the runs are of different devices, {devices[0]!r} and {devices[1]!r}")


def failed(joined: Sequence[Pair]) -> list[Pair]:
    """The pairs whose check failed in the second run and not in the first."""
    return [
        pair
        for pair in joined
        if pair.second is not None
        and pair.second.status == "failed"
        and (pair.first is None or pair.first.status != "failed")
    ]
