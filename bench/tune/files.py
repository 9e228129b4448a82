"""The file that `bn-bench tune` writes: what was there stays, but for what was made anew or is no longer true."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping

from bn_fused.bench.installing import versions
from bn_fused.bench.tune.search import Part
from bn_fused.kernels import tuned
from bn_fused.kernels.registry import tuned_backends
from bn_fused.kernels.tuned import Class, Entry


class File:
    """A tuning file of a device kind, with the entries that it had when it was opened and that were added since."""

    def __init__(self, path: pathlib.Path, device_kind: str, say: Callable[[str], None] = lambda line: None):
        self.path, self.device_kind = path, device_kind
        self.entries: dict[Class, Entry] = {}
        # Of backends: when the file was made.
        self._revisions: dict[str, int] = {}
        self._versions: Mapping[str, str] = {}
        if path.exists():
            try:
                self._open(say)
            except tuned.OtherDevice:
                raise
            except tuned.Unusable as error:
                say(f"{path} is replaced: {error}")

    def _open(self, say):
        revisions, entries = tuned.read(self.path, self.device_kind)
        now = current_revisions()
        seen = {name for entry in entries for name in entry.backends}
        stale = {name for name, revision in now.items() if name in seen and revisions.get(name) != revision}
        if stale:
            say(f"{self.path}: what it says of {', '.join(sorted(stale))} is of earlier kernels and is left out")
        for entry in entries:
            backends = {name: measured for name, measured in entry.backends.items() if name not in stale}
            if backends:
                self.entries[entry.of] = Entry(entry.of, backends)
        self._revisions = {name: revision for name, revision in revisions.items() if name not in stale}
        self._versions = json.loads(self.path.read_text(encoding="utf-8")).get("versions", {})

    def has(self, parts: Iterable[Part]) -> bool:
        """Whether all parts of a class were measured with the packages that are installed."""
        return self._versions == versions() and all(
            part.of in self.entries and (part.backend or "jnp") in self.entries[part.of].backends for part in parts
        )

    def add(self, entry: Entry) -> None:
        """Write the file with one more entry; of a backend that it does not speak of the earlier one's is kept."""
        before = self.entries.get(entry.of)
        backends = {} if before is None else dict(before.backends)
        self.entries[entry.of] = Entry(entry.of, backends | dict(entry.backends))
        self._revisions |= {name: revision for name, revision in current_revisions().items() if name in entry.backends}
        text = tuned.to_json(self.device_kind, self.entries.values(), self._revisions, versions())
        part = self.path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self.path)


def current_revisions() -> dict[str, int]:
    """The revisions of the kernels of the backends whose plans are tuned."""
    return {name: backend.tuning.revision for name, backend in tuned_backends().items()}
