"""`bn-bench report`: the README's performance section and the documents' pictures from recorded results."""

import os
import pathlib
import shutil

import click

from bn_fused.bench.commands.common import FAILED
from bn_fused.bench.plots import plot_recorded
from bn_fused.bench.run.performance import RESULTS, NoRecords, file_name, put, recorded, section
from bn_fused.bench.run.records import UnreadableRun, load
from bn_fused.bench.step.parts import Untold


@click.command("report")
@click.option(
    "--results",
    "folder",
    type=click.Path(path_type=pathlib.Path),
    default=RESULTS,
    help="The folder of recorded runs; default: bench/results of the repository.",
)
@click.option(
    "--add",
    "added",
    type=click.Path(path_type=pathlib.Path),
    multiple=True,
    help="Record a run that `run --json` saved; repeatable.",
)
@click.option(
    "--readme",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="Write the section into this file, between its marks; default: print it.",
)
@click.option(
    "--pictures",
    "out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Draw PNGs of the newest run and the newest training step of every GPU into this folder, and no section.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if the file is not up to date.")
@click.pass_context
def command(context, folder, added, readme, out, check):
    """Make the README's performance section from the newest recorded run of every device and suite.

    Or, with --pictures, draw the device times of layers, and of a training step in three parts: convolutions and matrix
    products, BatchNorm with relu and residual, the rest. For the step a network without BatchNorm has to be recorded
    too (`bn-bench step --against no-norm`).
    """
    if check and (readme is None or added):
        raise click.UsageError("--check needs --readme, and adds nothing")
    if out is not None and readme is not None:
        raise click.UsageError("--pictures and --readme are two reports")
    try:
        for path in added:
            run = load(path)
            if run.interrupted or any(row.status == "failed" for row in run.rows):
                raise click.UsageError(f"add is {str(path)!r}: a run that was interrupted or failed is not recorded")
            place = folder / file_name(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            click.echo(f"recorded as {place}")
        if out is not None:
            for path in plot_recorded(folder, out):
                click.echo(f"drawn: {path}")
            return
        beside = readme.parent if readme is not None else pathlib.Path()
        text = section(recorded(folder), pathlib.Path(os.path.relpath(folder, beside)).as_posix())
        if readme is None:
            click.echo(text)
            return
        before = readme.read_text(encoding="utf-8")
        after = put(before, text)
    except (NoRecords, UnreadableRun, Untold) as error:
        raise click.UsageError(str(error)) from None
    if check:
        if before != after:
            click.echo(f"{readme} is not up to date: run `bn-bench report --readme {readme}`", err=True)
            context.exit(FAILED)
        return
    readme.write_text(after, encoding="utf-8")
