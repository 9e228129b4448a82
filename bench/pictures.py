"""What the documents' pictures show of recorded results: those of a GPU, whose times are those of its kernels."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from bn_fused.bench import saved
from bn_fused.bench.run.performance import RESULTS, NoRecords, documents
from bn_fused.bench.run.records import Run, run_of
from bn_fused.bench.step.networks import NO_NORM, Setting
from bn_fused.bench.step.parts import Parts, parts
from bn_fused.bench.step.timed import Row


class Steps(NamedTuple):
    """What `bn-bench step` saved: where, on which device, and the rows that have kernels."""

    path: str
    date: str
    device: str
    jax: str
    setting: Setting
    rows: tuple[Row, ...]


class Layers(NamedTuple):
    """A run by device time, and where it lies."""

    path: str
    run: Run

    @property
    def source(self) -> str:
        """Where what is drawn is recorded."""
        return self.path


class Step(NamedTuple):
    """The parts of the newest steps' networks, by name; the last of them is that without BatchNorm.

    - `steps`: which these are; `without_norm`: those which that last one is of, the same or earlier ones.
    """

    steps: Steps
    without_norm: Steps
    parts: dict[str, Parts]

    @property
    def source(self) -> str:
        """Where what is drawn is recorded."""
        return ", ".join(dict.fromkeys((self.steps.path, self.without_norm.path)))


def _steps(path: str, content: dict) -> Steps:
    names = [field.name for field in dataclasses.fields(Setting)]
    setting = Setting(**{name: content["settings"][name] for name in names})
    rows = tuple(Row(**row) for row in content["rows"] if row["kernels"])
    return Steps(path, content["date"], content["device"], content["versions"]["jax"], setting, rows)


def _recorded(folder: pathlib.Path) -> Iterator[tuple[str, Layers | Steps]]:
    """What has kernels' times, with the device's folder; the oldest first. `UnreadableRun` for a damaged file."""
    found = []
    for name, document in documents(folder):
        (kind, version, content), one = document, None
        if kind == saved.RUN and any(row.get("timed_by") == "device" for row in content["rows"]):
            run = run_of(document, folder / name)
            one = run.date, Layers(name, run)
        elif kind == "step" and version == saved.SCHEMA:
            steps = _steps(name, content)
            one = (steps.date, steps) if steps.rows else None
        if one is not None:
            found.append((name.split("/")[0], *one))
    for device, _, one in sorted(found, key=lambda each: each[:2]):
        yield device, one


def newest(folder: str | os.PathLike = RESULTS) -> dict[str, Layers | Step]:
    """What there is to draw, by the picture's name: of every device the newest run, and the newest steps.

    The network without BatchNorm may be of earlier steps of the same setting. `NoRecords` if there is nothing.
    """
    pictures: dict[str, Layers | Step] = {}
    without: dict[tuple[str, Setting], tuple[Row, Steps]] = {}
    latest: dict[str, Steps] = {}
    for device, one in _recorded(pathlib.Path(folder)):
        if isinstance(one, Layers):
            pictures[f"{device}-layers.png"] = one
            continue
        latest[device] = one
        for row in one.rows:
            if row.name == NO_NORM:
                without[device, one.setting] = row, one
    for device, steps in latest.items():
        if (device, steps.setting) in without:
            row, there = without[device, steps.setting]
            networks = [one for one in steps.rows if one.name != NO_NORM]
            pictures[f"{device}-step.png"] = Step(steps, there, parts([*networks, row], row, steps.setting))
    if not pictures:
        raise NoRecords(f"there are no recorded times of kernels in {str(folder)!r}")
    return pictures
