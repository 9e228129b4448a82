"""Tables of what was found, for people to read."""

import os
import platform
from collections.abc import Sequence

import equinox as eqx
import jax
import jaxlib
from rich import box
from rich.table import Table
from rich.text import Text

import bn_fused

from .allocator import keeps_freed_memory
from .check import Check
from .suite import ApproachRow, Row, WorkloadRows
from .timing import COPY_PASSES, PASSES, bandwidth, share_of_copy

BYTES_NOTE = (
    "GB/s counts the passes over an array of x's size that none can save: fwd reads x and writes y "
    f"({PASSES['fwd']}), bwd reads x and dy and writes dx ({PASSES['fwd+bwd'] - PASSES['fwd']} more). "
    f"A copy (x + 1, {COPY_PASSES} passes) is timed in the same rounds on the same bytes. "
    "Times are medians with the 10th and 90th percentile; ratios to equinox and to the copy are medians over "
    "the rounds; errors are against float64."
)


def processor() -> str:
    """The name of this machine's processor and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name
            )
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def environment(device: jax.Device) -> str:
    """Device and versions, in two lines."""
    what = device.device_kind
    if device.platform == "cpu":
        what = (
            f"{processor()}; the allocator {'keeps' if keeps_freed_memory() else 'gives back'} freed memory"
        )
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, equinox {eqx.__version__}"
    return (
        f"device: {device.platform} ({what})\n"
        f"bn_fused {bn_fused.__version__}, {versions}, Python {platform.python_version()}"
    )


def _verdict(check: Check) -> Text:
    return Text("ok", "green") if check.ok else Text("FAILED", "bold red")


def _error(check: Check, *quantities: str) -> Text:
    return Text("-") if check.failure is not None else Text(f"{check.worst(*quantities):.0e}")


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table that fits into 80 columns: texts to the left, then figures to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.collapse_padding = True
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def check_table(rows: Sequence[ApproachRow]) -> Table:
    """The checks of the backends: largest relative errors against float64, and the verdict."""
    columns = {
        "y": ("y",),
        "state": ("running mean", "running variance", "zero_frac", "count"),
        "dx": ("dx",),
        "dw, db": ("dweight", "dbias"),
        "inference": ("inference",),
    }
    title = "every backend against float64: largest relative errors"
    table = _table(title, ("backend", "approach"), (*columns, ""))
    for row in rows:
        errors = (_error(row.check, *quantities) for quantities in columns.values())
        table.add_row(row.backend, row.approach, *errors, _verdict(row.check))
    return table


def _figures(found: WorkloadRows, row: Row) -> list[Text]:
    error = _error(row.check, "y of fwd") if row.pass_name == "fwd" else _error(row.check)
    if row.samples is None:
        return [_verdict(row.check), *[Text("-")] * 4, error]
    rival = found.rival(row)
    gigabytes = bandwidth(PASSES[row.pass_name], found.workload.nbytes, row.samples.median) / 1e9
    texts = (
        f"{1e3 * row.samples.median:.3g}",
        f"{1e3 * row.samples.p10:.3g}-{1e3 * row.samples.p90:.3g}",
        "-" if rival is None else f"{row.samples.ratio_to(rival):.2f}",
        f"{gigabytes:.1f}",
        f"{100 * share_of_copy(row.pass_name, row.samples, found.copy):.0f} %",
    )
    return [*map(Text, texts), error]


def workload_table(found: WorkloadRows) -> Table:
    """The times at one workload; a row whose check failed shows FAILED in their place."""
    figures = ("ms", "p10-p90", "/ equinox", "GB/s", "of copy", "error")
    table = _table(str(found.workload), ("pass", "layer"), figures)
    for row in found.rows:
        layer = f"{row.layer} (auto)" if row.layer == found.auto.name else row.layer
        table.add_row(row.pass_name, layer, *_figures(found, row))
    return table


def workload_notes(found: WorkloadRows) -> list[str]:
    """What the table does not say: the copy's bandwidth, the choice of backend and who cannot run."""
    notes = [f"auto takes {found.auto.name}: {found.auto.reason}"]
    if found.copy is not None:
        speed = bandwidth(COPY_PASSES, found.workload.nbytes, found.copy.median) / 1e9
        notes.insert(0, f"copy of x: {1e3 * found.copy.median:.3g} ms, {speed:.1f} GB/s")
    return [*notes, *found.refusals.values()]


def failures(approach_rows: Sequence[ApproachRow], found: Sequence[WorkloadRows]) -> list[str]:
    """One line for every check that failed."""
    lines = [
        f"{row.backend}, approach {row.approach}: {row.check.reason}"
        for row in approach_rows
        if not row.check.ok
    ]
    for one in found:
        checks = {row.layer: row.check for row in one.rows}
        lines += [
            f"{layer} at {one.workload}: {check.reason}" for layer, check in checks.items() if not check.ok
        ]
    return lines
