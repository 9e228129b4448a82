"""The command line `bn-bench`: options and order; the work is in `suite`, the tables in `report`."""

import os
import sys

import click
import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import bn_fused

from . import report, suite
from .workloads import SUITES, WORKLOADS, Workload, parse_shape

# Where the output is not a terminal there is no width to ask for; the tables need this one (characters).
PLAIN_WIDTH = 110
# The checks' part of the progress bar, counted in workloads.
CHECKS_WEIGHT = 0.5


class Shape(click.ParamType):
    """A workload given by its shape, as in `--shape 32,64,56,56`."""

    name = "N,C,..."

    def convert(self, value, param, ctx):
        """The workload; a shape that does not parse ends the program with one line."""
        if isinstance(value, Workload):
            return value
        try:
            return parse_shape(value)
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from None


def _first_device() -> jax.Device:
    try:
        return jax.devices()[0]
    except Exception as error:  # JAX raises RuntimeError, and AssertionError where a plugin failed to load
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise click.ClickException(f"JAX finds no device: {first}") from None


def _console() -> Console:
    plain = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PLAIN_WIDTH if plain else None, highlight=False)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--shape",
    "workloads",
    type=Shape(),
    multiple=True,
    help="Time this float32 shape (examples, channels, spatial sizes), not the quick suite; repeatable.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time for the samples of each shape, without compilation and checks.",
)
@click.version_option(bn_fused.__version__, message="%(version)s")
@click.pass_context
def group(context: click.Context, workloads: tuple[Workload, ...], seconds: float) -> None:
    """Check every backend against float64, then time the layer against equinox.nn.BatchNorm(mode="batch").

    It runs on JAX's first device. A row whose check fails shows FAILED, is not timed, and makes the exit
    status 1.
    """
    if context.invoked_subcommand is None:
        context.exit(check_and_time(workloads or tuple(WORKLOADS[name] for name in SUITES["quick"]), seconds))


def check_and_time(workloads: tuple[Workload, ...], seconds: float) -> int:
    """The main job: the checks, then each workload's table as soon as it is there; the exit status."""
    device, console = _first_device(), _console()
    console.print(Text(report.environment(device)))
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking backends", total=CHECKS_WEIGHT + len(workloads))
        checks = suite.check_backends(lambda share: progress.update(task, completed=CHECKS_WEIGHT * share))
        console.print()
        console.print(report.check_table(checks))
        for done, workload in enumerate(workloads):
            progress.update(task, description=f"timing {workload.name}")
            before = CHECKS_WEIGHT + done
            found.append(
                suite.run_workload(
                    workload,
                    seconds=seconds,
                    progress=lambda share, before=before: progress.update(task, completed=before + share),
                )
            )
            console.print()
            console.print(report.workload_table(found[-1]))
            for note in report.workload_notes(found[-1]):
                console.print(Text(note))
    console.print()
    console.print(Text(report.BYTES_NOTE, "dim"))
    failures = report.failures(checks, found)
    for line in failures:
        console.print(Text(f"FAILED: {line}", "bold red"))
    if not failures:
        console.print(Text("every check passed", "green"))
    return 1 if failures else 0


def run(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's own) and return the exit status.

    0: every check passed; 1: one failed; 2: input it cannot use, said in one line; 130: interrupted.
    """
    try:
        return group.main(arguments, prog_name="bn-bench", standalone_mode=False) or 0
    except click.ClickException as error:
        print(f"bn-bench: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    except click.Abort:
        print("bn-bench: interrupted", file=sys.stderr)
        return 130
