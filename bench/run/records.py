"""What a run found, as it is saved: `Run` and its rows, with JSON and CSV.

Times are in seconds, sizes in bytes. A run that was interrupted holds the rows that were finished.
"""

import csv
import io
import os
import pathlib
import platform
import subprocess
from typing import Literal

import jax
import pydantic

from bn_fused.bench import saved
from bn_fused.bench.allocator import keeps_freed_memory
from bn_fused.bench.installing import versions
from bn_fused.bench.workloads import Workload


class Frozen(pydantic.BaseModel):
    """A record that is not changed, and takes no field it does not know."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Environment(Frozen):
    """What a run ran on.

    - `platform`, `device`, `devices`: JAX's name of the platform, the device's kind, how many took part.
    - `virtual`: whether they are parts of one CPU.
    - `allocator`: on a CPU, whether freed memory is kept (`bench.allocator`); else None.
    - `commit`: of the repository that bn_fused runs from, "+" appended if files are changed; None outside of one.
    """

    platform: str
    device: str
    devices: int = 1
    virtual: bool = False
    allocator: bool | None = None
    python: str
    versions: dict[str, str]
    commit: str | None = None


class Row(Frozen):
    """One layer in one pass at one workload.

    - `status`: "ok"; "failed": its check failed; "refused": it cannot run that; "missing": it is not installed;
        "skipped": there was no time for it.
    - `reason`: why it is not ok.
    - `error`, `limit`: of the quantity that comes closest to its limit; see `bench.check`.
    - `median`, `p10`, `p90`: seconds for one call, of `rounds` rounds.
    - `timed_by`: whether these are by the "clock", or the sum of the kernels on the "device"; then `clock` is the
        median by the clock, and `kernels` has for each kernel, copy and fill its launches in a call and the seconds of
        one.
    - `nbytes`: bytes of the passes that none can save (`Workload.passes`); `bandwidth`: those bytes per second.
    - `of_copy`: that bandwidth over the copy's, the median over paired rounds; `copied_by`: which copy was fastest.
    - `ratios`: the time over each rival's, the median over paired rounds.
    - `collective_bytes`: what the devices exchange in a call; None on one device.
    - `sync_ratio`: where devices share their statistics, the time over that of the same layer on the same devices, each
        with statistics of its own, the median over paired rounds; else None.
    """

    workload: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    activation: str | None
    residual: bool
    layer: str
    approach: str
    pass_name: Literal["fwd", "bwd", "fwd+bwd"]
    status: Literal["ok", "failed", "refused", "missing", "skipped"]
    reason: str = ""
    error: float | None = None
    limit: float | None = None
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    rounds: int = 0
    timed_by: Literal["clock", "device"] = "clock"
    clock: float | None = None
    kernels: dict[str, tuple[float, float]] = {}
    nbytes: int = 0
    bandwidth: float | None = None
    copy_bandwidth: float | None = None
    copied_by: str | None = None
    of_copy: float | None = None
    ratios: dict[str, float] = {}
    collective_bytes: int | None = None
    sync_ratio: float | None = None

    @pydantic.model_validator(mode="after")
    def _timed_if_ok(self):
        if self.status == "ok" and None in (self.median, self.p10, self.p90, self.of_copy):
            raise ValueError("a row that is ok has times")
        return self

    @property
    def key(self) -> tuple:
        """What tells rows of one run apart, and joins rows of two."""
        case = (self.workload, self.shape, self.dtype, self.layout, self.activation, self.residual)
        return (*case, self.layer, self.approach, self.pass_name)

    @property
    def at(self) -> Workload:
        """The workload."""
        return Workload(self.workload, self.shape, self.dtype, "", self.layout, self.activation, self.residual)


# Of the CSV's columns.
UNITS = {
    "median": "s",
    "p10": "s",
    "p90": "s",
    "clock": "s",
    "bandwidth": "bytes_per_s",
    "copy_bandwidth": "bytes_per_s",
}


class Run(Frozen):
    """A run of `bn-bench run`: how it was started, on what, with which settings, and its rows in order."""

    schema_version: Literal[1] = saved.SCHEMA
    command: str
    date: str
    environment: Environment
    suite: str
    cold: bool
    sync: bool
    rivals: tuple[str, ...]
    interrupted: bool = False
    rows: tuple[Row, ...] = ()


class UnreadableRun(ValueError):
    """A file that is no run that this version can read; the message is one line."""


def to_json(run: Run) -> str:
    """The run as JSON."""
    content = run.model_dump(exclude={"schema_version"})
    command, interrupted, rows = (content.pop(name) for name in ("command", "interrupted", "rows"))
    return saved.envelope(saved.RUN, content, rows, command=command, interrupted=interrupted)


def read(path: str | os.PathLike) -> saved.Document:
    """What a command saved; `UnreadableRun` if the file cannot be read or is not JSON."""
    try:
        return saved.read(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise UnreadableRun(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UnreadableRun(f"{path} is {error}") from None


def load(path: str | os.PathLike) -> Run:
    """Read a saved run; `UnreadableRun` if it is none, or another version's."""
    return run_of(read(path), path)


def run_of(document: saved.Document, path: str | os.PathLike) -> Run:
    """The run that was read from this path; `UnreadableRun` as of `load`."""
    kind, version, content = document
    if kind not in (saved.RUN, None):
        raise UnreadableRun(f"{path} was saved by bn-bench {kind}, and not by bn-bench run")
    if version != saved.SCHEMA:
        what = "no run of bn-bench" if version is None else f"a run in version {version!r} of the format"
        raise UnreadableRun(f"{path} is {what}; this bn-bench reads version {saved.SCHEMA}")
    try:
        return Run.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UnreadableRun(f"{path} is damaged: {where}: {first['msg']}") from None


def to_csv(run: Run) -> str:
    """The rows as CSV: a column for every field but the kernels, with its unit, and for every rival's ratio.

    Shapes are written as `--shape` takes them.
    """
    columns = {
        name: f"{name}_{UNITS[name]}" if name in UNITS else name
        for name in Row.model_fields
        if name not in ("ratios", "kernels")
    }
    text = io.StringIO()
    headings = [*columns.values(), *(f"ratio_to_{rival}" for rival in run.rivals)]
    writer = csv.DictWriter(text, headings, lineterminator="\n")
    writer.writeheader()
    for row in run.rows:
        values = {column: getattr(row, name) for name, column in columns.items()}
        values["shape"] = ",".join(map(str, row.shape))
        writer.writerow(values | {f"ratio_to_{rival}": row.ratios.get(rival) for rival in run.rivals})
    return text.getvalue()


def processor() -> str:
    """The name of this machine's processor and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def commit() -> str | None:
    """The commit of the repository that bn_fused is run from; see `Environment`."""
    folder = pathlib.Path(__file__).resolve().parent

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed copy may lie in somebody else's repository.
        if not (pathlib.Path(git("rev-parse", "--show-toplevel")) / "bn_fused" / "approaches.py").is_file():
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(devices: int = 1) -> Environment:
    """What this process runs on."""
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    return Environment(
        platform=device.platform,
        device=processor() if cpu else device.device_kind,
        devices=devices,
        virtual=cpu and devices > 1,
        allocator=keeps_freed_memory() if cpu else None,
        python=platform.python_version(),
        versions=versions(),
        commit=commit(),
    )
