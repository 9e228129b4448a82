"""What the commands save as JSON: one envelope around the rows, written and read in this module.

| key | |
|---|---|
| `schema_version` | the version of the form, `SCHEMA`; an audit says `audit_schema_version` |
| `kind` | the command, such as "step audit"; a run and an audit have none: their versions tell |
| `command` | the command line |
| what a command adds | the date, the device or the environment, versions, settings |
| `interrupted` | whether `rows` are those that were finished before Ctrl-C |
| `rows` | what the command is about |
"""

import dataclasses
import datetime
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bn_fused.bench.installing import versions

# Goes up when the form changes.
SCHEMA = 1
RUN, AUDIT = "run", "audit"
# The keys under which the version stands; those kinds are told by it.
VERSION_KEYS = {AUDIT: "audit_schema_version", RUN: "schema_version"}


def command_line() -> str:
    """How this process was started, as a shell would take it."""
    return shlex.join(["bn-bench", *sys.argv[1:]])


def now() -> str:
    """The date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def envelope(kind: str, added: Mapping, rows: Iterable, *, command: str, interrupted: bool) -> str:
    """Rows and what stands around them, as JSON. A number that is not finite becomes null: JSON has none.

    `added` is what the command adds; `rows` are mappings or dataclasses.
    """
    document = {
        **({VERSION_KEYS[kind]: SCHEMA} if kind in VERSION_KEYS else {"schema_version": SCHEMA, "kind": kind}),
        "command": command,
        **added,
        "interrupted": interrupted,
        "rows": [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows],
    }
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def to_json(kind: str, device: str, settings: Mapping, rows: Iterable, *, interrupted: bool = False) -> str:
    """What `stability` and `step` save: the settings and rows of this process's run, see `envelope`."""
    added = {"date": now(), "device": device, "versions": versions(), "settings": settings}
    return envelope(kind, added, rows, command=command_line(), interrupted=interrupted)


def _finite(value):
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Document(NamedTuple):
    """A saved file: its kind and version, None where it has none, and all that is in it."""

    kind: str | None
    version: Any
    content: dict[str, Any]


def read(text: str | bytes) -> Document:
    """The document that `envelope` made; ValueError, in one line, if the text is not JSON or the bytes not UTF-8."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        return Document(None, None, {})
    kind = next((kind for kind, key in VERSION_KEYS.items() if key in content), None)
    version = None if kind is None else content[VERSION_KEYS[kind]]
    return Document(content.get("kind", kind), version, content)
