"""What the commands share: the device, the console, and files to write."""

import io
import pathlib

import click
import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130


class OutputFile(click.Path):
    """A file to write; refused before the work begins if its folder is not there."""

    def __init__(self):
        super().__init__(dir_okay=False, writable=True, path_type=pathlib.Path)

    def convert(self, value, param, ctx):
        """The path."""
        path = super().convert(value, param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"the folder of {str(path)!r} does not exist", param, ctx)
        return path


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
    wide = Console(width=width, highlight=False, file=io.StringIO(), force_terminal=True, color_system="standard")
    wide.print(table)
    console.print(Text.from_ansi(wide.file.getvalue()), soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar for a whole of 1; nothing where the output is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
