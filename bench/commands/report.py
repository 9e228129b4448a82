"""`bn-bench report`: the README's performance section from recorded runs."""

import os
import pathlib
import shutil

import click

from bn_fused.bench.commands.common import FAILED
from bn_fused.bench.run.performance import RESULTS, NoRecords, file_name, put, recorded, section
from bn_fused.bench.run.records import UnreadableRun, load


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
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if the file is not up to date.")
@click.pass_context
def command(context, folder, added, readme, check):
    """Make the README's performance section from the newest recorded run of every device and suite."""
    if check and (readme is None or added):
        raise click.UsageError("--check needs --readme, and adds nothing")
    try:
        for path in added:
            run = load(path)
            if run.interrupted or any(row.status == "failed" for row in run.rows):
                raise click.UsageError(f"add is {str(path)!r}: a run that was interrupted or failed is not recorded")
            place = folder / file_name(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            click.echo(f"recorded as {place}")
        beside = readme.parent if readme is not None else pathlib.Path()
        text = section(recorded(folder), pathlib.Path(os.path.relpath(folder, beside)).as_posix())
        if readme is None:
            click.echo(text)
            return
        before = readme.read_text(encoding="utf-8")
        after = put(before, text)
    except (NoRecords, UnreadableRun) as error:
        raise click.UsageError(str(error)) from None
    if check:
        if before != after:
            click.echo(f"{readme} is not up to date: run `bn-bench report --readme {readme}`", err=True)
            context.exit(FAILED)
        return
    readme.write_text(after, encoding="utf-8")
