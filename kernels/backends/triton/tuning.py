"""Configurations of the backend `triton` that were timed on a device: JSON files, one for each device kind.

`bn-bench tune` writes them; the versions in them are for the record, `revision` says for which kernels they are: see
`plan.REVISION`. They are looked for in the environment variable BN_FUSED_TUNING, which names a file or a folder of
files, and then in this package, in the folder `tuned`. A file that cannot be read, or that was made for other kernels
than these, is ignored with one warning, and `plan.heuristic` is used.

    {"format": 1, "backend": "triton", "revision": 2, "device_kind": "NVIDIA H200", "versions": {...},
     "entries": [{"groups": 1, "rows": 100352, "channels": 64, "dtype": "bfloat16", "config": {...},
                  "seconds": 1e-4, "heuristic_seconds": 1.1e-4}, ...]}
"""

import functools
import json
import math
import os
import pathlib
import re
import warnings
from dataclasses import asdict, dataclass, fields

import jax.numpy as jnp

from bn_fused.kernels.backends.triton.plan import BY_RULE, MOST_STAGES, REVISION, Config, make_plan

VARIABLE = "BN_FUSED_TUNING"
FOLDER = pathlib.Path(__file__).parent / "tuned"
FORMAT = 1
# A configuration is taken for arrays with up to that many times more or fewer rows than the one it was timed with.
NEAR = 2
# What a file may say: whole numbers within these bounds, and some powers of two.
BOUNDS = {
    "row_bytes": (16, 4096),
    "values": (1, 256),
    "warps": (1, 32),
    "stages": (1, MOST_STAGES),
    "blocks_per_core": (1, 64),
    "slab_bytes": (0, 1 << 40),
}
POWERS_OF_TWO = ("row_bytes", "values", "warps")


class Unusable(ValueError):
    """A tuning file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """The best configuration for arrays of one size and dtype, its time, and the heuristic's (seconds)."""

    groups: int
    rows: int
    channels: int
    dtype: str
    config: Config
    seconds: float
    heuristic_seconds: float

    @property
    def key(self):
        """What the configuration is for."""
        return self.groups, self.rows, self.channels, self.dtype


def file_name(device_kind):
    """The name of a device kind's file: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def plan(problem, target):
    """The `Plan` for a problem: with the configuration that was timed on this kind of chip, if there is one."""
    sizes = (problem.groups, problem.rows, problem.channels)
    config, path = config_for(target.chip.device_kind, *sizes, problem.dtype)
    return make_plan(
        *sizes,
        jnp.dtype(problem.dtype).itemsize,
        target.chip,
        config,
        residual=problem.residual,
        derivative=problem.activation is not None,
        tuning=BY_RULE if path is None else str(path),
    )


def config_for(device_kind, groups, rows, channels, dtype):
    """The `Config` that was best on this device kind for an array of about this size, and its file; or two Nones."""
    for path in _files(device_kind):
        distances = {
            entry: abs(math.log2(entry.rows / rows))
            for entry in _entries(path, device_kind)
            if (entry.groups, entry.channels, entry.dtype) == (groups, channels, dtype)
        }
        near = [entry for entry, distance in distances.items() if distance <= math.log2(NEAR)]
        if near:
            return min(near, key=lambda entry: (distances[entry], entry.rows)).config, path
    return None, None


def in_use(device_kind):
    """One line for each file that is looked into for a device kind, first to last; or that there is none."""
    lines, absent = [], []
    setting = os.environ.get(VARIABLE)
    if setting and _is_folder(pathlib.Path(setting)) and not _exists(pathlib.Path(setting) / file_name(device_kind)):
        absent.append(f"{setting} (by {VARIABLE}) has no {file_name(device_kind)}")
    for path in _files(device_kind):
        where = "from the package" if path.parent == FOLDER else f"by {VARIABLE}"
        try:
            lines.append(f"{path} ({where}), entries: {len(read(path, device_kind))}")
        except Unusable as error:
            lines.append(f"{path} ({where}) is ignored: {error}")
    return absent + (lines or [f"no file for {device_kind}: plans are made by rule"])


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


def _entries(path, device_kind):
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = None
    return _read_once(str(path), changed, device_kind)


@functools.cache
def _read_once(path, changed, device_kind):
    """The entries of a file; none, and a warning, if it cannot be used. Read again only when it has changed."""
    del changed
    try:
        return read(path, device_kind)
    except Unusable as error:
        warnings.warn(f"the tuning file {path} is ignored: {error}; plans are made by rule", stacklevel=2)
        return ()


def read(path, device_kind):
    """The entries of a file, made by these kernels on this device kind; raises `Unusable`."""
    try:
        document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Unusable("it is not JSON") from None
    if not isinstance(document, dict) or document.get("backend") != "triton":
        raise Unusable('it is not one of the backend "triton"')
    expected = {"format": FORMAT, "revision": REVISION, "device_kind": device_kind}
    for name, value in expected.items():
        if document.get(name) != value:
            raise Unusable(f"its {name} is {document.get(name)!r}, not {value!r}; `bn-bench tune` makes a new one")
    if not isinstance(document.get("entries"), list):
        raise Unusable("it has no entries")
    return tuple(_entry(stored) for stored in document["entries"])


def _entry(stored):
    try:
        config = Config(**stored["config"])
        entry = Entry(**(stored | {"config": config}))
    except (TypeError, KeyError):
        raise Unusable(f"an entry is {stored!r}") from None
    for name, accepted in {
        **dict.fromkeys(("groups", "rows", "channels"), lambda value: type(value) is int and value >= 1),
        "dtype": lambda value: isinstance(value, str),
        **dict.fromkeys(
            ("seconds", "heuristic_seconds"), lambda value: isinstance(value, float) and 0 < value < math.inf
        ),
    }.items():
        if not accepted(getattr(entry, name)):
            raise Unusable(f"an entry's {name} is {getattr(entry, name)!r}")
    for name, (least, most) in BOUNDS.items():
        value = getattr(config, name)
        if type(value) is not int or not least <= value <= most or (name in POWERS_OF_TWO and value & (value - 1)):
            raise Unusable(f"an entry's {name} is {value!r}")
    return entry


def to_json(device_kind, entries, versions):
    """The text of a file."""
    assert {field.name for field in fields(Config)} == set(BOUNDS)
    document = {
        "format": FORMAT,
        "backend": "triton",
        "revision": REVISION,
        "device_kind": device_kind,
        "versions": dict(versions),
        "entries": [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.key)],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
