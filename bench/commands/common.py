"""What the commands share: the device, the console, the choice of workloads, and files to write."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Sequence

import click
import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bn_fused import kernels
from bn_fused.approaches import APPROACHES
from bn_fused.bench.workloads import DTYPES, LAYOUTS, SUITES, WORKLOADS, Workload, parse_shape
from bn_fused.kernels.activations import ACTIVATIONS

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130


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


class Backend(click.ParamType):
    """The name of a registered backend, or one of these names."""

    name = "backend"

    def __init__(self, *more: str):
        self.more = more

    def convert(self, value, param, ctx):
        """The name, if it is registered."""
        accepted = (*kernels.backend_names(), *self.more)
        if value not in accepted:
            self.fail(f"{value!r}: accepted are {', '.join(accepted)}", param, ctx)
        return value


class OutputFile(click.Path):
    """A file to write, with this suffix if one is given; refused before the work begins if it cannot be written."""

    def __init__(self, suffix: str = ""):
        super().__init__(dir_okay=False, writable=True, path_type=pathlib.Path)
        self.suffix = suffix

    def convert(self, value, param, ctx):
        """The path."""
        path = super().convert(value, param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"the folder of {str(path)!r} does not exist", param, ctx)
        if self.suffix and path.suffix.lower() != self.suffix:
            self.fail(f"{str(path)!r} does not end in {self.suffix}", param, ctx)
        try:
            there = path.exists()
            path.open("a").close()
            if not there:
                path.unlink()
        except OSError as error:
            self.fail(f"{str(path)!r} cannot be written: {error.strerror}", param, ctx)
        return path


def size_options(function: Callable) -> Callable:
    """The options that choose workloads by their sizes; `choose_workloads` takes them."""
    options = (
        click.option("--suite", type=click.Choice(tuple(SUITES)),
                     help="A named list of workloads, beside others that are named; default without any: quick."),
        click.option("--workload", "names", multiple=True, type=click.Choice(tuple(WORKLOADS)), metavar="NAME",
                     help="A workload by its name (`bn-bench run --list` has them); repeatable."),
        click.option("--shape", "shapes", type=Shape(), multiple=True,
                     help="A shape: examples, channels, spatial sizes; repeatable."),
        click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, default=("float32",),
                     show_default=True, help="Repeatable."),
        click.option("--examples", type=click.IntRange(min=1), help="Examples, in place of the workloads' own number."),
    )  # fmt: skip
    return _with(options, function)


def activation_option(text: str) -> Callable:
    """`--activation`, described by this text: "none", or a name of the table of activations; repeatable."""
    return click.option(
        "--activation", "activations", type=click.Choice(("none", *ACTIVATIONS)), multiple=True, default=("none",),
        show_default=True, help=f"{text} Repeatable.",
    )  # fmt: skip


def workload_options(function: Callable) -> Callable:
    """Those of `size_options`, and what is to be done with the workloads; `choose_workloads` takes them."""
    options = (
        click.option("--layout", "layouts", type=click.Choice(LAYOUTS, case_sensitive=False), multiple=True,
                     default=("nchw",), show_default=True,
                     help="Where the channels are in memory: second or last. Repeatable."),
        activation_option("Applied after the normalisation."),
        click.option("--residual", is_flag=True, help="Add an array of x's shape before the activation."),
    )  # fmt: skip
    return size_options(_with(options, function))


def _with(options, function):
    for option in reversed(options):
        function = option(function)
    return function


def choose_workloads(
    *,
    suite: str | None,
    names: Sequence[str],
    shapes: Sequence[Workload],
    examples: int | None,
    dtypes: Sequence[str],
    layouts: Sequence[str] = ("nchw",),
    activations: Sequence[str] = ("none",),
    residual: bool = False,
) -> list[Workload]:
    """The workloads that the options of `workload_options` ask for; the quick suite if they name none.

    Each with all combinations of dtypes, layouts and activations.
    """
    chosen = [WORKLOADS[name] for name in (*(SUITES[suite] if suite else ()), *names)]
    chosen += shapes
    chosen = chosen or [WORKLOADS[name] for name in SUITES["quick"]]
    workloads = [
        dataclasses.replace(workload, dtype=dtype, layout=layout, activation=activation, residual=residual)
        for workload in dict.fromkeys(chosen)
        for dtype in dict.fromkeys(dtypes)
        for layout in dict.fromkeys(layouts)
        for activation in activations_of(activations)
    ]
    if examples is not None:
        workloads = [dataclasses.replace(workload, shape=(examples, *workload.shape[1:])) for workload in workloads]
    return workloads


def activations_of(names: Sequence[str]) -> list[str | None]:
    """The activations that `--activation` names, None for "none"."""
    return [None if name == "none" else name for name in dict.fromkeys(names)]


def check_room(workloads: Sequence[Workload], device: jax.Device) -> None:
    """End the program with one line if the memory here cannot hold a workload's arrays."""
    rooms = {"this machine": _memory(), "the device": (device.memory_stats() or {}).get("bytes_limit")}
    for workload in workloads:
        # x, y and dy.
        need = 3 * workload.nbytes
        for where, room in rooms.items():
            if room and need > room:
                raise click.UsageError(
                    f"{workload}: x, y and dy alone take {need / 1e9:.3g} GB, and {where} has {room / 1e9:.3g}"
                )


def _memory() -> int | None:
    """The bytes of this machine's memory, None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def approach_option(function: Callable) -> Callable:
    """`--approach`, repeatable."""
    return click.option(
        "--approach", "approaches", multiple=True, type=click.Choice(APPROACHES), default=("batch",), show_default=True
    )(function)


def first_device() -> jax.Device:
    """JAX's default device; one line if there is none."""
    try:
        return jax.devices()[0]
    except Exception as error:  # JAX raises RuntimeError, and AssertionError where a plugin failed to load
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise click.ClickException(f"JAX finds no device: {first}") from None


def make_console() -> Console:
    """The terminal, or plain text."""
    return Console(highlight=False)


def say(console: Console, text: str = "", style: str = "") -> None:
    """Print a line, which the terminal may wrap but a file keeps whole."""
    console.print(Text(text, style), soft_wrap=True)


def show(console: Console, table: Table) -> None:
    """Print a table at its full width, which the terminal may wrap: a column that is cut off says nothing."""
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    full_width = Console(width=width, highlight=False, file=io.StringIO(), force_terminal=True, color_system="standard")
    full_width.print(table)
    console.print(Text.from_ansi(full_width.file.getvalue()), soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar for a whole of 1; nothing where the output is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
