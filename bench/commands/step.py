"""`bn-bench step`: the whole training step of a residual network with each BatchNorm."""

import dataclasses
import functools

import click
from rich import box
from rich.table import Table
from rich.text import Text

from bn_fused.approaches import APPROACHES
from bn_fused.bench import deviceless, saved
from bn_fused.bench.commands.common import (
    FAILED,
    INTERRUPTED,
    Backend,
    OutputFile,
    first_device,
    make_console,
    progress_bar,
    say,
    show,
)
from bn_fused.bench.commands.numbers import Number
from bn_fused.bench.installing import versions, versions_text
from bn_fused.bench.run import records, report
from bn_fused.bench.step import apart as _apart, compile_time as _compile_time, resnet
from bn_fused.bench.step.audit import audit
from bn_fused.bench.step.networks import (
    BASELINE,
    CHANNELS_LAST,
    DTYPES,
    MORE_RIVALS,
    RIVALS,
    Setting,
    contenders,
    default_backends,
    default_layouts,
    refusal,
)
from bn_fused.bench.step.timed import TIMED, RunInterrupted, run
from bn_fused.bench.workloads import LAYOUTS

# What is taken for an option that is not given: small on a CPU, what is usually trained elsewhere.
ON_CPU = dict(model="resnet18", batch=8, image=32, dtype="float32")
ELSEWHERE = dict(model="resnet50", batch=128, image=224, dtype="bfloat16")
# Below this the last stage has nothing left to normalise but single positions of few examples.
SMALLEST_IMAGE = 16


@click.command("step")
@click.option("--model", type=click.Choice(tuple(resnet.ARCHITECTURES)),
              help="Default: resnet18 on a CPU, else resnet50.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=2), help="Images in a batch; default: 8 on a CPU, else 128.")
@click.option("--image", type=click.IntRange(min=SMALLEST_IMAGE),
              help="Height and width of an image; default: 32 on a CPU, else 224.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES),
              help="Of images and activations; default: float32 on a CPU, else bfloat16.")  # fmt: skip
@click.option("--classes", type=click.IntRange(min=2), default=1000, show_default=True)
@click.option("--approach", "approaches", type=click.Choice(APPROACHES), multiple=True, default=("batch",),
              show_default=True, help="Of bn_fused; repeatable.")  # fmt: skip
@click.option("--backend", "backends", type=Backend("auto"), multiple=True,
              help="Repeatable; default: all that can run but the reference.")  # fmt: skip
@click.option("--against", "rivals", type=click.Choice((*RIVALS, *MORE_RIVALS, "none")), multiple=True,
              help=f"Repeatable; default: {', '.join(RIVALS)}. equinox's mode \"batch\" always runs: the others are "
              "compared with it.")  # fmt: skip
@click.option("--fusion", type=click.Choice(("fused", "plain", "both")), default="fused", show_default=True,
              help="Whether bn_fused is given residual and relu, or they follow it.")  # fmt: skip
@click.option("--layout", "layouts", type=click.Choice(LAYOUTS, case_sensitive=False), multiple=True,
              help="nchw: our layer in the Equinox network; nhwc: our function in the same network with channels last, "
              "as Flax's is. Repeatable; default: nchw, and nhwc beside an installed Flax.")  # fmt: skip
@click.option("--seconds", type=Number(min=0, min_open=True), default=20.0, show_default=True,
              help="Time for the samples of all rows, without compilation; with --compile-time for its rounds, "
              f"{_compile_time.MIN_ROUNDS} at least.")  # fmt: skip
@click.option("--audit", "target", type=click.Choice(deviceless.COMPILABLE),
              help="Compile for this chip, without having it, and count what is moved; nothing is timed. A ResNet-50 "
              "takes minutes, for a TPU many; --model, --batch and --image make it smaller.")  # fmt: skip
@click.option("--compile-time", is_flag=True,
              help="Time how long the step takes to trace, lower and compile, and run nothing; with --audit for that "
              "chip. Compared with flax, or with equinox where there is none.")  # fmt: skip
@click.option("--time-limit", type=Number(min=0, min_open=True), default=600.0, show_default=True,
              help="With --audit or --compile-time: seconds after which a compilation is ended. With --apart: for all "
              "compilations; who is not ready then is left out.")  # fmt: skip
@click.option("--apart/--together", default=None,
              help="Each network in a process of its own, lowered at the same time and timed in turn; default: apart "
              "on a GPU, where the rows have their kernels too.")  # fmt: skip
@click.option("--details", is_flag=True, help="On a GPU: the kernels of every row that take most, by name.")
@click.option("--json", "json_file", type=OutputFile(), help="Save the rows.")
@click.pass_context
def command(context, *, approaches, backends, rivals, fusion, layouts, seconds, target, compile_time, time_limit,
            apart, details, json_file, **sizes):  # fmt: skip
    """Time the training step of a ResNet, optimiser included, with bn_fused and with other BatchNorms.

    The networks have the same weights and must give the same loss, before and after a step: a row that differs by more
    than rounding explains shows FAILED, is not timed, and makes the exit status 1. Where rounding explains everything
    (few values to normalise, many layers, bfloat16), rows are timed and marked as not compared.

    Exit status: 0; 1 if a row failed, or with --audit nothing was compiled; 2 for input it cannot use; 130 if it was
    interrupted: then the networks that were built and the rounds that were finished are printed and saved.
    """
    console = make_console()
    device = None if target else first_device()
    defaults = ON_CPU if device is not None and device.platform == "cpu" else ELSEWHERE
    setting = Setting(**(defaults | {name: size for name, size in sizes.items() if size is not None}))
    against = tuple(dict.fromkeys(rivals)) or RIVALS
    options = dict(
        backends=tuple(dict.fromkeys(backends)) or tuple(default_backends(setting, target)),
        rivals=against,
        approaches=tuple(dict.fromkeys(approaches)),
        fusion=fusion,
        layouts=tuple(dict.fromkeys(layouts)) or default_layouts(against),
    )
    networks = contenders(**options)
    for name in dict.fromkeys(backends):
        refused = refusal(name, setting, target)
        if refused is not None:
            raise click.UsageError(f"--backend {name}: {refused}")
    uncompiled = deviceless.missing(target) if target else None
    if uncompiled is not None:
        say(console, uncompiled)
        context.exit(FAILED)
    if device is None:
        say(console, versions_text(versions()))
        say(console, f"{setting}, compiled for {target}")
    else:
        for line in report.environment_lines(records.environment()):
            say(console, line)
        say(console, str(setting))
    if compile_time:
        how = functools.partial(_compile_time.run, target, options=options, time_limit=time_limit)
        rows, interrupted = _measure(console, setting, networks, seconds, how)
        if rows:
            show(console, compile_table(rows))
            console.print(Text(COMPILE_NOTE, "dim"))
    elif device is None:
        rows, interrupted = _audit(console, target, setting, networks, options, time_limit)
    else:
        if apart is None:
            apart = device.platform == "gpu"
        how = functools.partial(_apart.run, options=options, time_limit=time_limit) if apart else run
        rows, interrupted = _time(console, setting, networks, seconds, how, details)
    for line, style in _reasons(rows):
        say(console, line, style)
    if json_file is not None:
        settings = dataclasses.asdict(setting) | {name: value for name, value in options.items() if name != "backends"}
        where = target if device is None else device.device_kind
        what = "step compile time" if compile_time else "step audit" if device is None else "step"
        json_file.write_text(saved.to_json(what, where, settings, rows, interrupted=interrupted), encoding="utf-8")
    if interrupted:
        finished = sum(row.status != "untimed" for row in rows)
        say(console, f"interrupted: {finished} of {len(networks)} rows are finished", "yellow")
        context.exit(INTERRUPTED)
    nothing = all(row.status not in TIMED for row in rows)
    context.exit(FAILED if nothing or any(row.status == "failed" for row in rows) else 0)


def _reasons(rows):
    """Why rows are not ok: each reason once, with the names of its rows, and its style."""
    for status, reason in dict.fromkeys((row.status, row.reason) for row in rows if row.status != "ok"):
        names = ", ".join(row.name for row in rows if (row.status, row.reason) == (status, reason))
        failed = status == "failed"
        yield f"{names}: {status.upper() if failed else status}: {reason}", "bold red" if failed else ""


def _measure(console, setting, networks, seconds, how):
    """The rows of `how`, with a bar for the progress, and whether it was interrupted."""
    rows, interrupted = [], False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=1)
        try:
            rows = how(
                setting,
                networks,
                seconds=seconds,
                progress=lambda what, share: progress.update(task, description=what, completed=share),
            )
        except RunInterrupted as stopped:
            rows, interrupted = stopped.rows, True
    return rows, interrupted


def _time(console, setting, networks, seconds, how, details):
    rows, interrupted = _measure(console, setting, networks, seconds, how)
    if rows:
        show(console, time_table(rows))
        if any(row.busy is not None for row in rows):
            show(console, kernel_table(rows))
            console.print(Text(KERNEL_NOTE, "dim"))
        for line in kernel_lines(rows) if details else ():
            say(console, line)
        rounds = max(row.rounds for row in rows)
        if rounds:
            few = "; so few say little: --seconds allows more" if rounds < report.FEW_ROUNDS else ""
            say(console, f"{rounds} rounds{few}")
        console.print(Text(_with_layouts(TIME_NOTE, rows), "dim"))
    return rows, interrupted


def _audit(console, target, setting, networks, options, time_limit):
    rows, interrupted = [], False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(networks))
        try:
            for row in audit(
                target, setting, networks, options, time_limit=time_limit,
                before=lambda name: progress.update(task, description=f"compiling {name}"),
            ):  # fmt: skip
                rows.append(row)
                progress.update(task, completed=len(rows))
        except KeyboardInterrupt:
            interrupted = True
    if rows:
        show(console, audit_table(rows))
        console.print(Text(_with_layouts(AUDIT_NOTE, rows), "dim"))
    return rows, interrupted


LAYOUT_NOTE = (
    "Flax's network has channels last, as rows marked nhwc have, the others channels first: compare within a kind. "
    "Between Equinox's order of a convolution's weights and the compiler's, their gradients, velocities and the "
    "weights themselves may have to be transposed in every step, and on a CPU convolutions themselves are faster with "
    "channels last. "
)
TIME_NOTE = (
    f"ms: the median. / equinox: time over that of {BASELINE}, the median over paired rounds, and their 10th and 90th "
    "percentile; where these lie on both sides of 1, nothing is decided. loss, after: of the same initial weights, "
    'and after one step, with initial statistics (with those every layer normalises by the batch, "ema" too). memory: '
    "what the compiled step holds at once, arrays included; peak: what the device had in use at most in the row's "
    "first step, - where an earlier row needed more or the device does not tell. While it is timed the learning rate "
    "is 0."
)
KERNEL_NOTE = (
    "busy: all kernels, copies and fills of a step; span: from the first one's begin to the last one's end, under the "
    "profiler. lowered beside the others, compiled one after the other."
)
COMPILE_NOTE = (
    "Seconds by the clock, medians: of a step that is jitted anew, with JAX's caches cleared. CPU: of all threads. The "
    "ratios: to the row that has 1.00, medians over paired rounds, with their 10th and 90th percentile; where other "
    "programs share the machine, read that of the CPU seconds. Flax's network has channels last, as rows marked nhwc "
    "have. ok: it was compiled."
)
AUDIT_NOTE = (
    "read, written: bytes of all kernels through the chip's memory, counted in the compiled program, convolutions and "
    "optimiser included; passes: these over the bytes that all BatchNorms of the network take. seldom: what would be "
    "added if every layer of jnp summed its moments twice, as on a TPU each does where a channel's mean lies far from "
    "its running mean. XLA: its own estimate "
    "of the bytes, - where it gives none (NVIDIA). temporary: memory beside arguments and results. launches: kernels, "
    "copies and library calls."
)


def _with_layouts(note, rows):
    last = any(row.name.endswith(CHANNELS_LAST) or (row.name == "flax" and row.status != "missing") for row in rows)
    return f"{note} {LAYOUT_NOTE}" if last else note


def _empty(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _verdict(row) -> str:
    return "[bold red]FAILED[/]" if row.status == "failed" else row.status


def _number(value, scale=1, form=".3g") -> str:
    if value is None:
        return "-"
    return f"{value if scale == 1 else value * scale:{form}}"


def time_table(rows) -> Table:
    """The times of a run."""
    table = _empty(
        "BatchNorm", "ms / step", "images / s", "/ equinox", "p10-p90", "memory MB", "peak MB", "loss", "after", ""
    )
    for row in rows:
        percentiles = "-" if row.ratio is None else f"{row.ratio_p10:.2f}-{row.ratio_p90:.2f}"
        table.add_row(
            report.called(row.name), _number(row.median, 1e3, ".4g"), _number(row.images_per_second, form=".4g"),
            _number(row.ratio, form=".2f"), percentiles, _number(row.memory, 1e-6, ".0f"),
            _number(row.peak, 1e-6, ".0f"), _number(row.loss, form=".4f"), _number(row.loss_after, form=".4f"),
            _verdict(row),
        )  # fmt: skip
    return table


# Kernels of a row that are printed.
MOST_KERNELS = 25


def kernel_table(rows) -> Table:
    """What the rows' kernels take on the device."""
    table = _empty("BatchNorm", "busy ms", "span ms", "kernels", "lowered in s", "compiled in s")
    for row in rows:
        table.add_row(
            report.called(row.name), _number(row.busy, 1e3, ".2f"), _number(row.span, 1e3, ".2f"),
            _number(row.launches, form=".0f"),
            _number(row.lowering, form=".0f"), _number(row.compilation, form=".0f"),
        )  # fmt: skip
    return table


def kernel_lines(rows) -> list[str]:
    """The kernels that take most of each row's step: launches, microseconds of one."""
    lines = []
    for row in rows:
        for name, (launches, seconds) in list(row.kernels.items())[:MOST_KERNELS]:
            lines.append(f"{row.name}: {1e3 * launches * seconds:.3f} ms, {launches:g} x {1e6 * seconds:.1f} us {name}")
    return lines


def compile_table(rows) -> Table:
    """How long networks take to compile."""
    reference = next((row.compared_with for row in rows if row.compared_with is not None), "-")
    table = _empty(
        "BatchNorm", "traced in s", "lowered in s", "compiled in s", "together s", f"/ {reference}", "p10-p90", "CPU s",
        f"CPU / {reference}", "rounds", "",
    )  # fmt: skip
    for row in rows:
        percentiles = "-" if row.ratio is None else f"{row.ratio_p10:.2f}-{row.ratio_p90:.2f}"
        table.add_row(
            report.called(row.name), _number(row.tracing, form=".2f"), _number(row.lowering, form=".2f"),
            _number(row.compilation, form=".2f"), _number(row.total, form=".2f"), _number(row.ratio, form=".2f"),
            percentiles, _number(row.cpu, form=".2f"), _number(row.cpu_ratio, form=".2f"), str(row.rounds),
            _verdict(row),
        )  # fmt: skip
    return table


def audit_table(rows) -> Table:
    """What was compiled."""
    table = _empty(
        "BatchNorm", "read GB", "written GB", "passes", "seldom GB", "XLA GB", "temporary GB", "launches", ""
    )
    for row in rows:
        table.add_row(
            report.called(row.name), _number(row.read, 1e-9, ".3f"), _number(row.written, 1e-9, ".3f"),
            _number(row.passes, 1, ".2f"), _number(row.seldom or None, 1e-9, ".3f"),
            _number(row.accessed, 1e-9, ".3f"), _number(row.temporary, 1e-9, ".3f"), _number(row.launches, 1, "d"),
            _verdict(row),
        )  # fmt: skip
    return table
