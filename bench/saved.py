"""What `stability` and `step` save as JSON: the settings and rows of a run, and what decides about them."""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping

from bn_fused.bench.run import records

SCHEMA = 1


def command_line() -> str:
    """How this process was started, as a shell would take it."""
    return shlex.join(["bn-bench", *sys.argv[1:]])


def to_json(kind: str, device: str, settings: Mapping, rows: Iterable, *, interrupted: bool = False) -> str:
    """A run as JSON. `rows` are mappings or dataclasses. A number that is not finite becomes null: JSON has none."""
    document = {
        "schema_version": SCHEMA,
        "kind": kind,
        "command": command_line(),
        "date": records.now(),
        "device": device,
        "versions": records.versions(),
        "settings": dict(settings),
        "interrupted": interrupted,
        "rows": [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else dict(row) for row in rows],
    }
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def _finite(value):
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
