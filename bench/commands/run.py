"""`bn-bench run`: check and time the layer with every backend, against its rivals."""

import contextlib
import os
from collections.abc import Sequence

import click
import jax
from rich.console import Console
from rich.text import Text

from bn_fused.bench.commands.common import (
    FAILED,
    INTERRUPTED,
    Backend,
    OutputFile,
    approach_option,
    check_room,
    choose_workloads,
    first_device,
    make_console,
    progress_bar,
    say,
    show,
    workload_options,
)
from bn_fused.bench.commands.numbers import Number
from bn_fused.bench.doctor import devices
from bn_fused.bench.providers import RIVALS, explain
from bn_fused.bench.run import records, report
from bn_fused.bench.run.suite import Settings, plan, refusal, run, with_backends
from bn_fused.bench.saved import command_line, now
from bn_fused.bench.workloads import PASSES, SUITES, WORKLOADS, Workload


@click.command("run")
@workload_options
@approach_option
@click.option(
    "--backend", "backends", multiple=True, type=Backend(), help="Repeatable; default: all that can run here."
)
@click.option(
    "--against", "rivals", multiple=True, type=click.Choice(tuple(RIVALS)), help="Repeatable; default: equinox."
)
@click.option(
    "--pass", "passes", multiple=True, type=click.Choice(PASSES), help="Repeatable; default: fwd and fwd+bwd."
)
@click.option(
    "--seconds",
    type=Number(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time for the samples of each workload, without compilation and checks.",
)
@click.option("--cold/--warm", default=None, help="Caches; default: cold on an accelerator, warm on a CPU.")
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Split the examples over this many devices (on a CPU: virtual ones).",
)
@click.option("--sync", is_flag=True, help="The devices share their statistics; shows what that costs, and the bytes.")
@click.option("--json", "json_file", type=OutputFile(), help="Save the run.")
@click.option("--csv", "csv_file", type=OutputFile(), help="Save the rows.")
@click.option("--markdown", "markdown_file", type=OutputFile(), help="Save the rows as a table.")
@click.option("--plot", "plot_file", type=OutputFile(".png"), help="Draw a PNG of the times over the copy's.")
@click.option("--details", is_flag=True, help="On a GPU: every kernel of a row, by name.")
@click.option("--list", "listing", is_flag=True, help="Print the suites and their workloads, and end.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and end.")
@click.pass_context
def command(context, *, approaches, backends, rivals, passes, seconds, cold, devices, sync, json_file, csv_file,
            markdown_file, plot_file, details, listing, dry_run, **workload_settings):  # fmt: skip
    """Check every layer against float64, then time it, and its rivals, on JAX's default device.

    A row whose check fails shows FAILED, is not timed, and makes the exit status 1. An interrupted run keeps the
    workloads that are finished, in the files too.
    """
    if listing:
        _list(make_console())
        context.exit(0)
    workloads = choose_workloads(**workload_settings)
    device = use_devices(devices)
    check_room(workloads, device)
    for workload in workloads:
        if workload.shape[0] % devices:
            raise click.UsageError(
                f"devices is {devices}: it must divide the {workload.shape[0]} examples of {workload}"
            )
        if workload.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
    if sync and devices == 1:
        raise click.UsageError("--sync needs --devices 2 or more: one device has nobody to share its statistics with")
    settings = Settings(
        approaches=tuple(dict.fromkeys(approaches)),
        backends=tuple(dict.fromkeys(backends)),
        rivals=tuple(dict.fromkeys(rivals)) or ("equinox",),
        passes=tuple(name for name in PASSES if name in (passes or ("fwd", "fwd+bwd"))),
        seconds=seconds,
        cold=device.platform != "cpu" if cold is None else cold,
        devices=devices,
        sync=sync,
    )
    files = [file for file in (json_file, csv_file, markdown_file, plot_file) if file is not None]
    for file in files:
        if files.count(file) > 1:
            raise click.UsageError(f"{str(file)!r} is the file of several options: each writes one of its own")
    for name in settings.backends:
        refusals = [refusal(workload, name) for workload in workloads]
        if all(refusals):
            raise click.UsageError(refusals[0])
    console = make_console()
    if dry_run:
        _dry_run(console, workloads, settings)
        context.exit(0)
    record = run_and_print(console, workloads, settings, suite=workload_settings["suite"] or "", details=details)
    for path, text in ((json_file, records.to_json), (csv_file, records.to_csv), (markdown_file, report.markdown)):
        if path is not None:
            path.write_text(text(record), encoding="utf-8")
    if plot_file is not None:
        from bn_fused.bench.plots import plot_run

        plot_run(record, str(plot_file))
    context.exit(exit_status(record))


def exit_status(record: records.Run) -> int:
    """0, or 1 if a check failed, or 130 if the run was interrupted."""
    if record.interrupted:
        return INTERRUPTED
    return FAILED if any(row.status == "failed" for row in record.rows) else 0


# The flag of XLA that makes several devices of a CPU.
FLAG = "xla_force_host_platform_device_count"


def use_devices(devices: int) -> jax.Device:
    """Have as many devices, virtual ones if the platform is a CPU; one line if they are not there."""
    if devices > 1 and FLAG not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started; what it has is what there is
            jax.config.update("jax_num_cpu_devices", devices)
    device = first_device()
    if len(jax.devices()) < devices:
        here = f"there are {len(jax.devices())} ({device.platform})"
        flags = "; XLA_FLAGS asks for that many" if FLAG in os.environ.get("XLA_FLAGS", "") else ""
        raise click.UsageError(f"devices is {devices}: {here}{flags}")
    return device


def run_and_print(
    console: Console,
    workloads: Sequence[Workload],
    settings: Settings,
    *,
    suite: str,
    heading: bool = True,
    details: bool = False,
) -> records.Run:
    """Run the workloads and print each one's table as soon as it is there; what was found, as it is saved."""
    started = now()
    environment = records.environment(settings.devices)
    settings, skipped = with_backends(workloads, settings)
    for line in (*report.environment_lines(environment), *report.skipped_lines(skipped)) if heading else ():
        say(console, line)
    rows: list[records.Row] = []
    said: dict[str, None] = {}
    interrupted = False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=1.0)
        try:
            for workload, workload_rows in run(
                workloads,
                settings,
                lambda name, share: progress.update(task, completed=share, description=name),
            ):
                rows += workload_rows
                print_workload(console, workload, workload_rows, settings, said, details)
        except KeyboardInterrupt:
            interrupted = True
    say(console)
    failures = report.failures(rows)
    for line in failures:
        say(console, f"FAILED: {line}", "bold red")
    if interrupted:
        say(console, f"interrupted: {len(rows)} rows are finished", "yellow")
    elif not failures:
        sentence = report.sentence(rows, settings.rivals, lambda workload: explain(workload).name)
        if sentence:
            say(console, sentence, "bold")
        say(console, report.passed(rows, skipped), "green")
    say(console)
    console.print(Text(report.note(rows), "dim"))
    return records.Run(
        command=command_line(),
        date=started,
        environment=environment,
        suite=suite,
        cold=settings.cold,
        sync=settings.sync,
        rivals=settings.rivals,
        interrupted=interrupted,
        rows=tuple(rows),
    )


def print_workload(
    console: Console,
    workload: Workload,
    rows: Sequence[records.Row],
    settings: Settings,
    said: dict[str, None],
    details: bool = False,
) -> None:
    """The table of a workload, and below it how it was timed, the backend that `auto` takes, and who cannot run.

    `said`: what the workloads before had below their tables, to which this one's is added; it is not said again.
    """
    auto = explain(workload)
    say(console)
    show(console, report.workload_table(rows, settings.rivals, auto.name))
    for line in (*report.timing_lines(rows, settings.cold), *(report.kernel_lines(rows) if details else ())):
        say(console, line)
    lines = [f"auto takes {auto.name}: {auto.reason}", *report.reasons(rows)]
    for line in lines:
        if line not in said:
            say(console, line)
    said |= dict.fromkeys(lines)


def _list(console: Console) -> None:
    for suite, names in SUITES.items():
        table = report.empty_table(suite, ("workload", "N,C,spatial", "purpose"), ())
        for name in names:
            table.add_row(name, ",".join(map(str, WORKLOADS[name].shape)), WORKLOADS[name].purpose)
        show(console, table)
        say(console)


def _dry_run(console: Console, workloads: Sequence[Workload], settings: Settings) -> None:
    where = f"{settings.devices} of {', '.join(devices())}"
    if settings.devices > 1:
        where += ", which share their statistics (--sync)" if settings.sync else ", each with statistics of its own"
    settings, skipped = with_backends(workloads, settings)
    caches = "cold" if settings.cold else "warm"
    say(console, f"on {where}; caches {caches}; {settings.seconds:g} s of samples for each workload")
    for line in report.skipped_lines(skipped):
        say(console, line)
    say(console)
    for workload in workloads:
        table = report.empty_table(str(workload), ("layer", "approach", "runs"), ())
        for layer in plan(workload, settings):
            table.add_row(
                report.called(layer.provider.name), layer.approach, Text(layer.reason or ", ".join(settings.passes))
            )
        show(console, table)
        say(console)
