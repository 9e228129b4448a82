"""Tables of what was found, for people to read: on a terminal, as Markdown, and the README's."""

import math
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bn_fused import kernels
from bn_fused.bench.check import Check
from bn_fused.bench.installing import versions_text
from bn_fused.bench.run.records import Environment, Row, Run
from bn_fused.bench.workloads import Workload

NOTE = (
    "ms: the median, and the 10th and 90th percentile. / rival and of copy: medians over paired rounds; the copy reads "
    "and writes x once, GB/s counts the passes over x that none can save (fwd: read x, write y; bwd: read x and dy, "
    "write dx). error: the largest against float64, and its limit (`bn_fused.bench.check`); a rival in 16 bits is "
    "allowed more."
)

DEVICE_NOTE = (
    "On this GPU ms is the time of all kernels, copies and fills of a call on the device, as its profiler has them, "
    "and the copy is the fastest there is, the device's own or XLA's. clock ms: the median by the clock of the same "
    "calls one after the other in one program, launches and gaps included."
)

SYNC_NOTE = (
    "/ no sync: the time over that of the same layer on the same devices, each with statistics of its own, the median "
    "over the paired rounds. The parameters' gradients are summed over the devices with and without. exchanged B: "
    "bytes of the arrays that the collectives of a call have on each device."
)


def environment_lines(environment: Environment) -> list[str]:
    """Device and versions, in two lines."""
    allocator = {True: "; the allocator keeps freed memory", False: "; the allocator gives back freed memory", None: ""}
    devices = (
        f"{environment.devices} {'virtual ' if environment.virtual else ''}devices, " if environment.devices > 1 else ""
    )
    return [
        f"device: {environment.platform} ({devices}{environment.device}{allocator[environment.allocator]})",
        f"{versions_text(environment.versions)}, Python {environment.python}"
        + (f", commit {environment.commit}" if environment.commit else ""),
    ]


def empty_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table that fits into 80 columns: texts to the left, then figures to the right."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.collapse_padding = True
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def verdict(ok: bool) -> Text:
    """The word "ok" in green or "FAILED" in red."""
    return Text("ok", "green") if ok else Text("FAILED", "bold red")


def called(layer: str) -> str:
    """What a layer, or a network, is called: of ours, whose name begins with the backend's, with whose it is."""
    backend, *rest = layer.split(" ", 1)
    if backend not in (*kernels.backend_names(), "auto"):
        return layer
    return " ".join([f"bn_fused ({backend})", *rest])


def layer_name(row: Row, several_approaches: bool) -> str:
    """What the layer is called, with its approach where there are several."""
    return f"{called(row.layer)} {row.approach}" if several_approaches else called(row.layer)


def _figures(row: Row, rivals: Sequence[str], devices: Mapping[str, str]) -> list[Text]:
    error = Text("-" if row.error is None else f"{row.error:.0e} / {row.limit:.0e}")
    columns = 4 + len(rivals) + len(devices)
    if row.median is None:
        shown = {"failed": Text("FAILED", "bold red")}.get(row.status, Text(row.status, "yellow"))
        return [shown, *[Text("-")] * (columns - 1), error]
    texts = [
        f"{1e3 * row.median:.3g}",
        f"{1e3 * row.p10:.3g}-{1e3 * row.p90:.3g}",
        *(f"{row.ratios[rival]:.2f}" if rival in row.ratios and rival != row.layer else "-" for rival in rivals),
        _rate(row.bandwidth),
        f"{100 * row.of_copy:.0f} %",
    ]
    for name, _, form, unit in ON_DEVICES:
        if name in devices:
            value = getattr(row, name)
            texts.append("-" if value is None else format(value if unit == 1 else value / unit, form))
    return [*map(Text, texts), error]


# Columns that only some runs have: the row's field, the heading, the format, the unit.
ON_DEVICES = (
    ("clock", "clock ms", ".3g", 1e-3),
    ("collective_bytes", "exchanged B", "d", 1),
    ("sync_ratio", "/ no sync", ".2f", 1),
)


def on_devices(rows: Sequence[Row]) -> dict[str, str]:
    """The fields of `ON_DEVICES` that some row has, with their formats."""
    return {name: form for name, _, form, _ in ON_DEVICES if any(getattr(row, name) is not None for row in rows)}


def headings(rivals: Sequence[str], devices: Mapping[str, str]) -> list[str]:
    """The headings of the columns of figures; `devices`: those of `on_devices`."""
    columns = ["ms", "p10-p90", *(f"/ {called(rival)}" for rival in rivals), "GB/s", "of copy"]
    return [*columns, *(heading for name, heading, *_ in ON_DEVICES if name in devices), "error / limit"]


def note(rows: Sequence[Row]) -> str:
    """What the figures mean, in one paragraph."""
    there = on_devices(rows)
    notes = [NOTE, *[DEVICE_NOTE] * ("clock" in there), *[SYNC_NOTE] * ("sync_ratio" in there)]
    return " ".join(notes)


def workload_table(rows: Sequence[Row], rivals: Sequence[str], auto: str | None = None) -> Table:
    """The rows of one workload; a row whose check failed shows FAILED in place of its times."""
    devices = on_devices(rows)
    several = len({row.approach for row in rows}) > 1
    table = empty_table(str(rows[0].at), ("pass", "layer"), headings(rivals, devices))
    for row in rows:
        name = layer_name(row, several)
        table.add_row(row.pass_name, f"{name}, auto" if row.layer == auto else name, *_figures(row, rivals, devices))
    return table


def _rate(bandwidth: float) -> str:
    """In GB/s, small ones too."""
    return f"{bandwidth / 1e9:.1f}" if bandwidth >= 1e8 else f"{bandwidth / 1e9:.1g}"


def timing_lines(rows: Sequence[Row], cold: bool) -> list[str]:
    """How one workload was timed: the copy's bandwidth, the caches, the rounds; nothing if nothing was timed."""
    timed = next((row for row in rows if row.copy_bandwidth is not None), None)
    if timed is None:
        return []
    caches = "cold" if cold else "warm"
    on_device = timed.timed_by == "device"
    lines = [
        f"{timed.copied_by if on_device else 'copy'} of x: {_rate(timed.copy_bandwidth)} GB/s; {caches} caches; "
        f"{timed.rounds} rounds{' on the device' if on_device else ''}"
    ]
    if timed.rounds < FEW_ROUNDS and not on_device:
        lines.append("so few rounds say little: --seconds allows more")
    lines += [
        f"{called(row.layer)} {row.pass_name}: more than a copy moves is a wrong measurement"
        for row in rows
        if on_device and row.of_copy is not None and row.of_copy > 1
    ]
    if math.prod(timed.shape) < SMALL and not on_device:
        lines.append("so small an array takes no time: what it costs to start a program is what is compared")
    return lines


def kernel_lines(rows: Sequence[Row]) -> list[str]:
    """For every row that was timed on the device, its kernels: launches in a call, microseconds of one."""
    return [
        f"{row.pass_name} {called(row.layer)}: "
        + "; ".join(
            f"{name} x{launches:.3g} {1e6 * seconds:.1f} us" for name, (launches, seconds) in row.kernels.items()
        )
        for row in rows
        if row.kernels
    ]


# Below this, a median over rounds moves by more than what is mostly compared.
FEW_ROUNDS = 10
# Elements that any memory delivers in less time than it takes to start a program.
SMALL = 1 << 14


# Of rows that were neither checked nor timed.
ABSENT = ("refused", "missing", "skipped")


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why rows are absent, each reason once."""
    return list(dict.fromkeys(row.reason for row in rows if row.status in ABSENT))


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for every row whose check failed."""
    return [
        f"{called(row.layer)}, {row.approach}, {row.pass_name} at {row.at}: {row.reason}"
        for row in rows
        if row.status == "failed"
    ]


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """A line for every backend that does not run here, with the reason."""
    return [f"{name} is skipped: {reason}" for name, reason in skipped.items()]


def passed(rows: Sequence[Row], skipped: Sequence[str] = ()) -> str:
    """What is said where no check failed; who was not compared is named, with the backends that were `skipped`."""
    absent = dict.fromkeys((row.layer, row.status) for row in rows if row.status in ABSENT)
    absent |= dict.fromkeys((name, "skipped") for name in skipped)
    text = "every check passed" if any(row.status == "ok" for row in rows) else "nothing was checked"
    if not absent:
        return text
    # A backend may run at one workload and be refused at another.
    partly = {row.layer for row in rows if row.status == "ok"}
    names = [f"{layer} ({status}{' at some workloads' if layer in partly else ''})" for layer, status in absent]
    return f"{text}; not compared: {', '.join(names)}"


# What a pass is called in the sentence at the end.
IN_WORDS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both ways"}


def sentence(rows: Sequence[Row], rivals: Sequence[str], auto: Callable[[Workload], str]) -> str:
    """What a run found, for people to quote: how many times as fast as each rival our layer is, the one `auto` takes.

    The geometric mean over the workloads, in each pass; empty if there is nothing to compare.
    """
    ours = [row for row in rows if row.status == "ok" and row.layer == auto(row.at)]
    found = []
    for rival in rivals:
        parts = []
        for pass_name in dict.fromkeys(row.pass_name for row in ours):
            ratios = [row.ratios[rival] for row in ours if row.pass_name == pass_name and rival in row.ratios]
            if ratios and rival not in {row.layer for row in ours}:
                times = math.exp(-sum(map(math.log, ratios)) / len(ratios))
                parts.append(f"{times:.2f} times {IN_WORDS[pass_name]}")
        if parts:
            found.append(f"{' and '.join(parts)} as fast as {called(rival)}")
    if not found:
        return ""
    number = len({(row.at, row.approach) for row in ours})
    where = "at this workload" if number == 1 else f"(the geometric mean of {number} workloads)"
    return f"Here bn_fused is {'; '.join(found)} {where}, and every number was checked against float64."


def check_table(checks: Sequence[tuple[str, str, Check]]) -> Table:
    """The checks of (backend, approach, check): the largest error as a share of its limit, and the verdict."""
    table = empty_table("every step of a small batch, against float64", ("backend", "approach"), ("error / limit", ""))
    for backend, approach, check in checks:
        share = max((error.share for error in check.errors), default=None)
        table.add_row(backend, approach, "-" if share is None else f"{share:.2f}", verdict(check.ok))
    return table


def markdown(run: Run) -> str:
    """The run as a Markdown table, with what it ran on above it."""
    devices = on_devices(run.rows)
    several = len({row.approach for row in run.rows}) > 1
    columns = ["workload", "pass", "layer", *headings(run.rivals, devices)]
    lines = [*environment_lines(run.environment), "", f"{run.date}, `{run.command}`", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * 3 + "---:|" * (len(columns) - 3)]
    for row in run.rows:
        cells = [str(row.at), row.pass_name, layer_name(row, several), *map(str, _figures(row, run.rivals, devices))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", note(run.rows), ""])
