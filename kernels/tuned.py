"""What was measured on a kind of device: for classes of arrays the best plan of each backend, and how long it takes.

`bn-bench tune` writes a JSON file for each device kind. They are looked for in the environment variable
BN_FUSED_TUNING, which names a file or a folder of files, and then in this package, in the folder `tuned`. `auto` takes
a backend where its time is the shortest of a class; a backend takes the plan that was the fastest.

    {"format": 2, "device_kind": "NVIDIA H200", "revisions": {"pallas_gpu": 1, "triton": 2}, "versions": {...},
     "entries": [{"rows": 100352, "channels": 64, "dtype": "bfloat16", "activation": "relu", "residual": false,
                  "channels_last": true,
                  "backends": {"jnp": {"seconds": 1.1e-4, "by_rule": null, "config": null},
                               "triton": {"seconds": 1.0e-4, "by_rule": 1.1e-4, "config": {...}}, ...}}, ...]}

Seconds are the device's, of all kernels of a forward and a backward; `by_rule` those of the plan that a backend makes
where nothing was measured. A class holds for problems near it: `distance` says which, the nearest is taken. Only
programs for one device are looked up, and problems of one group without a mask: nothing else was measured.

A file that cannot be read, or is another device's, is ignored with one warning, and so is what it says of a backend
whose kernels have changed since (their `revision` is raised then), or a plan that cannot run.
"""

import functools
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp

VARIABLE = "BN_FUSED_TUNING"
FOLDER = pathlib.Path(__file__).parent / "tuned"
FORMAT = 2
# A class holds for up to that many times more or fewer rows, and channels; a plan only where the channels are the same.
MOST_ROWS, MOST_CHANNELS = 4, 2
# Activations that cost about the same, and the distance between two of them, or between the two 16-bit types.
CHEAP, SMOOTH = (None, "relu", "leaky_relu"), ("silu", "gelu")
ALIKE = 0.1
# By this share a backend must be faster than jnp for `auto` to take it: less is noise, and kernels are slower to lower.
LEAST_GAIN = 0.02
LARGEST = 1 << 60  # sizes that a file may name


class Unusable(ValueError):
    """A tuning file that cannot be used; the message says why."""


class OtherDevice(Unusable):
    """It was made on another kind of device."""


@dataclass(frozen=True)
class Class:
    """Arrays for which the same is fast.

    - `rows`, `channels`, `dtype`, `activation`, `residual`, `channels_last`: as of `target.Problem`.
    """

    rows: int
    channels: int
    dtype: str
    activation: str | None
    residual: bool
    channels_last: bool

    def __str__(self):
        words = {
            f"{self.rows} rows of {self.channels} channels": True,
            self.dtype: True,
            self.activation: self.activation is not None,
            "residual": self.residual,
            "channels first": not self.channels_last,
        }
        return ", ".join(word for word, holds in words.items() if holds)


@dataclass(frozen=True)
class Measured:
    """A backend's seconds in a class, those of its plan by rule, and the configuration of its best plan.

    The last two are None for a backend whose plans are not tuned, and the configuration also where the rule's is best.
    """

    seconds: float
    by_rule: float | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """A class and what was measured of each backend."""

    of: Class
    backends: Mapping[str, Measured]

    def share(self, name):
        """The seconds of a backend over those of jnp beside it."""
        return self.backends[name].seconds / self.backends["jnp"].seconds


@dataclass(frozen=True)
class Found:
    """What a file says of a backend: in the class nearest to a problem."""

    entry: Entry
    path: pathlib.Path
    name: str

    @property
    def measured(self) -> Measured:
        """Of the backend."""
        return self.entry.backends[self.name]

    @property
    def where(self) -> str:
        """The file and the class."""
        return f"{self.path}: {self.entry.of}"


def is_faster(share):
    """Whether a share of jnp's seconds is small enough for `auto`."""
    return share <= 1 - LEAST_GAIN


def class_of(problem):
    """The class that a problem of one group makes by itself."""
    return Class(
        problem.rows, problem.channels, problem.dtype, problem.activation, problem.residual, problem.channels_last
    )


def distance(one, other):
    """How far apart two classes are, infinite where what is fast for one says nothing of the other.

    The logarithms to base 2 of the ratios of rows and channels, added up, and `ALIKE` for another activation or type.
    """
    same = (one.residual, one.channels_last) == (other.residual, other.channels_last)
    sizes = {jnp.dtype(each.dtype).itemsize for each in (one, other)}
    kinds = {each.activation in CHEAP for each in (one, other)}
    rows, channels = (abs(math.log2(getattr(one, name) / getattr(other, name))) for name in ("rows", "channels"))
    if not same or len(sizes) + len(kinds) > 2 or rows > math.log2(MOST_ROWS) or channels > math.log2(MOST_CHANNELS):
        return math.inf
    return rows + channels + ALIKE * ((one.activation != other.activation) + (one.dtype != other.dtype))


def find(name, tuning, problem, target):
    """What the files say of a backend for a problem: `Found`, or one sentence why nothing.

    - `tuning`: the backend's, see `backends.Tuning`.
    """
    if target.chip is None:
        return "it is not known for which GPU it is compiled"
    if problem.groups != 1 or problem.mask or target.several_devices or target.partitioned:
        return "only unmasked arrays of one group, in programs for one device, were measured"
    paths = list(_files(target.chip.device_kind))
    if not paths:
        return f"nothing was measured on {target.chip.device_kind} yet (`bn-bench tune` does)"
    wanted = class_of(problem)
    for path in paths:
        near = []
        for entry in _entries(path, target.chip.device_kind, name, tuning.revision):
            apart = distance(entry.of, wanted)
            if apart < math.inf:
                near.append((apart, entry.of.rows, entry.of.channels, str(entry.of.activation), entry))
        if near:
            return Found(min(near, key=lambda one: one[:4])[-1], path, name)
    hint = "" if problem.channels_last else "; what a convolution made lies channels last: explain's after_convolution"
    return f"nothing near {wanted} was measured on {target.chip.device_kind}{hint}"


def config_of(found, tuning, problem):
    """The configuration that was the fastest, for a plan of a problem; None for the rule's.

    Raises `Unusable` where it is no configuration of the backend's.
    """
    stored = found.measured.config
    if stored is None or found.entry.of.channels != problem.channels:
        return None
    try:
        return tuning.parse(stored)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise Unusable(f"a configuration of {found.name} is {stored!r}") from None


def warn(path, reason):
    """Say once that something of a file is ignored."""
    if (str(path), reason) not in _said:
        _said.add((str(path), reason))
        warnings.warn(f"the tuning file {path} is ignored: {reason}", stacklevel=2)


_said: set[tuple[str, str]] = set()


# Files


def file_name(device_kind):
    """The name of a device kind's file: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def in_use(device_kind):
    """One line for each file that is looked into for a device kind, first to last; or that there is none."""
    lines, absent = [], []
    setting = os.environ.get(VARIABLE)
    if setting and _is_folder(pathlib.Path(setting)) and not _exists(pathlib.Path(setting) / file_name(device_kind)):
        absent.append(f"{setting} (by {VARIABLE}) has no {file_name(device_kind)}")
    for path in _files(device_kind):
        where = "from the package" if path.parent == FOLDER else f"by {VARIABLE}"
        try:
            lines.append(f"{path} ({where}), classes: {len(read(path, device_kind)[1])}")
        except Unusable as error:
            lines.append(f"{path} ({where}) is ignored: {error}")
    return absent + (lines or [f"no file for {device_kind}: plans are made by rule, and auto takes jnp"])


def _files(device_kind):
    """The files to look into, first to last."""
    setting = os.environ.get(VARIABLE)
    if setting:
        path = pathlib.Path(setting)
        if not _is_folder(path):
            yield path  # also if it is not there: then it is said so
        elif _exists(path / file_name(device_kind)):
            yield path / file_name(device_kind)
    packaged = FOLDER / file_name(device_kind)
    if _exists(packaged):
        yield packaged


def _is_folder(path):
    try:
        return path.is_dir()
    except OSError:  # what no path can be: too long a name
        return False


def _exists(path):
    try:
        return path.exists()
    except OSError:
        return False


def _entries(path, device_kind, name, revision):
    """The entries of a file that speak of a backend with this revision."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = None
    revisions, entries = _read_once(str(path), changed, device_kind)
    found = [entry for entry in entries if name in entry.backends]
    if found and revisions.get(name) != revision:
        warn(path, f"{name}'s kernels are at revision {revision}, and were at {revisions.get(name)!r} when it was made")
        return []
    return found


@functools.cache
def _read_once(path, changed, device_kind):
    """What is in a file; nothing, and a warning, if it cannot be used. Read again only when it has changed."""
    del changed
    try:
        return read(path, device_kind)
    except Unusable as error:
        warn(path, str(error))
        return {}, ()


def read(path, device_kind):
    """The revisions of the backends and the entries of a file that was made on this device kind; raises `Unusable`."""
    path = pathlib.Path(path)
    if _exists(path) and not path.is_file():
        raise Unusable("it is no file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Unusable("it is not JSON") from None
    if not isinstance(document, dict) or "entries" not in document:
        raise Unusable("it is not a tuning file")
    for name, value, error in (("format", FORMAT, Unusable), ("device_kind", device_kind, OtherDevice)):
        if document.get(name) != value:
            raise error(f"its {name} is {document.get(name)!r}, not {value!r}; `bn-bench tune` makes a new one")
    revisions = document.get("revisions")
    if not isinstance(revisions, dict) or not isinstance(document["entries"], list):
        raise Unusable("its revisions or entries are missing")
    return revisions, tuple(map(_entry, document["entries"]))


def _is_time(value):
    return isinstance(value, float) and 0 < value < math.inf


def _is_size(value):
    return type(value) is int and 1 <= value <= LARGEST


# What a class's fields and a measurement's may be.
_FIELDS = {
    "rows": _is_size,
    "channels": _is_size,
    "dtype": lambda value: value in ("float32", "bfloat16", "float16"),
    "activation": lambda value: value in CHEAP + SMOOTH,
    "residual": lambda value: isinstance(value, bool),
    "channels_last": lambda value: isinstance(value, bool),
}
_MEASURED = {
    "seconds": _is_time,
    "by_rule": lambda value: value is None or _is_time(value),
    "config": lambda value: value is None or isinstance(value, dict),
}


def _checked(stored, accepted, what):
    if not isinstance(stored, dict) or set(stored) != set(accepted):
        raise Unusable(f"{what} is {stored!r}")
    for name, accepts in accepted.items():
        if not accepts(stored[name]):
            raise Unusable(f"the {name} of {what} is {stored[name]!r}")
    return stored


def _entry(stored):
    if not isinstance(stored, dict) or not isinstance(stored.get("backends"), dict) or not stored["backends"]:
        raise Unusable(f"an entry is {stored!r}")
    backends = {
        name: Measured(**_checked(measured, _MEASURED, f"a measurement of {name}"))
        for name, measured in stored["backends"].items()
    }
    of = {name: value for name, value in stored.items() if name != "backends"}
    return Entry(Class(**_checked(of, _FIELDS, "an entry")), backends)


def to_json(device_kind, entries, revisions, versions):
    """The text of a file."""
    rows = [
        {**asdict(entry.of), "backends": {name: asdict(measured) for name, measured in entry.backends.items()}}
        for entry in sorted(entries, key=lambda entry: str(entry.of))
    ]
    document = {
        "format": FORMAT,
        "device_kind": device_kind,
        "revisions": dict(revisions),
        "versions": dict(versions),
        "entries": rows,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
