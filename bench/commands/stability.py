"""`bn-bench stability`: how stably a network trains with each BatchNorm, as a table and a picture."""

import dataclasses
import importlib.util
import pathlib
import textwrap

import click
from rich import box
from rich.table import Table
from rich.text import Text

from bn_fused.bench import digits, plots, saved, stability
from bn_fused.bench.commands.common import (
    INTERRUPTED,
    OutputFile,
    first_device,
    make_console,
    progress_bar,
    say,
    show,
)
from bn_fused.bench.commands.numbers import Number
from bn_fused.bench.installing import versions

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
DEFAULTS = stability.Settings()


@click.command("stability")
@click.option("--steps", type=click.IntRange(min=2), default=DEFAULTS.steps, show_default=True)
@click.option("--lr", type=Number(min=0, min_open=True), default=DEFAULTS.lr, show_default=True, help="Learning rate.")
@click.option("--seeds", type=click.IntRange(min=1), default=DEFAULTS.seeds, show_default=True,
              help="How many runs of each, with different weights and batches.")  # fmt: skip
@click.option("--momentum", type=Number(min=0, max=1, min_open=True, max_open=True), default=DEFAULTS.momentum,
              show_default=True, help="Of BatchNorm's running averages.")  # fmt: skip
@click.option("--warmup-period", type=click.IntRange(min=1), default=DEFAULTS.warmup_period, show_default=True,
              help='Steps of the warm-up of "ema".')  # fmt: skip
@click.option("--norm", "norms", type=click.Choice(tuple(stability.NORMS)), multiple=True,
              help="Repeatable; default: all.")  # fmt: skip
@click.option(
    "--out", type=OutputFile(".png"), default=pathlib.Path("stability.png"), show_default=True, help="The picture."
)
@click.option("--json", "json_file", type=OutputFile(), help="Save the figures and the curves.")
@click.pass_context
def command(context, *, norms, out, json_file, **options):
    """Train a network on scikit-learn's digits with each approach and with equinox.nn.BatchNorm in both modes.

    Prints a table and draws the loss and the gradient's norm at every step. About two minutes on two cores.

    Exit status: 0; 2 for input it cannot use; 130 if it was interrupted, with the finished rows kept.
    """
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise click.UsageError(f'stability needs {" and ".join(missing)}: pip install "bn_fused[bench]"')
    settings = stability.Settings(**options)
    norms = tuple(dict.fromkeys(norms)) or tuple(stability.NORMS)
    device, console = first_device(), make_console()
    say(console, f"scikit-learn's digits, {settings}")
    finished, interrupted = [], False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=1)
        try:
            for curves in stability.run(
                settings, norms, lambda what, share: progress.update(task, description=what, completed=share)
            ):
                finished.append(curves)  # noqa: PERF402 those before an interruption stay
        except KeyboardInterrupt:
            interrupted = True
    if finished:
        show(console, table(finished))
        console.print(Text(note(settings), "dim"))
        where = f"jax {versions()['jax']}, {device.platform}"
        plots.plot_stability(finished, caption(settings, where), out, saved.command_line())
        say(console, f"picture: {out}")
    if json_file is not None:
        rows = [curves.figures() for curves in finished]
        text = saved.to_json(
            "stability", device.device_kind, dataclasses.asdict(settings), rows, interrupted=interrupted
        )
        json_file.write_text(text, encoding="utf-8")
    if interrupted:
        say(console, f"interrupted: {len(finished)} of {len(norms)} rows are finished", "yellow")
    context.exit(INTERRUPTED if interrupted else 0)


def table(finished) -> Table:
    """A row for each norm."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("BatchNorm", no_wrap=True)
    for heading in ("median loss", "worst seed", "largest loss", "largest gradient", "trained"):
        table.add_column(heading, justify="right", no_wrap=True)
    for curves in finished:
        figures = curves.figures()
        trained = f"{figures['trained']} of {figures['seeds']}"
        table.add_row(
            curves.norm if curves.norm.startswith("equinox") else f"bn_fused {curves.norm}",
            f"{figures['median_loss_last']:.3f}",
            f"{figures['worst_loss_last']:.3f}",
            f"{figures['largest_loss']:.4g}",
            f"{figures['largest_gradient']:.4g}",
            trained,
            style="" if figures["trained"] == figures["seeds"] else "red",
        )
    return table


def note(settings: stability.Settings) -> str:
    """What the columns mean."""
    last = min(stability.LAST, settings.steps)
    return (
        f"median loss: of a seed's last {last} losses, the median seed and the worst; largest: of all steps and seeds; "
        f"trained: seeds whose median is below {stability.TRAINED_BELOW:g} (guessing costs 2.3)"
    )


def caption(settings: stability.Settings, where: str) -> str:
    """What stands below the picture."""
    text = (
        f"scikit-learn's digits, {digits.DEPTH} times (convolution, BatchNorm, relu) of width {digits.WIDTH}, SGD with "
        f"momentum {digits.SGD_MOMENTUM:g}, {settings}; {where}. Lines are medians, bands reach from the smallest to "
        "the largest value, over the seeds and, later on, neighbouring steps."
    )
    return "\n".join(textwrap.wrap(text, 125))
