"""`bn-bench compare`: two saved runs, row by row."""

import click
from rich.text import Text

from bn_fused.bench.commands.common import FAILED, make_console, say, show
from bn_fused.bench.run import report
from bn_fused.bench.run.compare import NotComparable, check_comparable, differences, failed, pairs
from bn_fused.bench.run.records import UnreadableRun, load


@click.command("compare")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--force", is_flag=True, help="Compare runs of different devices too.")
@click.pass_context
def command(context, first, second, force):
    """Compare two runs that `run --json` saved: FIRST is the one before, SECOND the one after.

    Rows whose ranges from p10 to p90 do not meet are marked with *. What slowed the whole machine down is in the times,
    and not in the ratios to a rival that both runs timed. The exit status is 1 if a check fails in SECOND
    that did not in FIRST, and 2 if the runs have no row in common.
    """
    try:
        before, after = load(first), load(second)
        if not force:
            check_comparable(before, after)
    except UnreadableRun as error:
        raise click.UsageError(str(error)) from None
    except NotComparable as error:
        raise click.UsageError(f"{error}; --force compares them all the same") from None
    console = make_console()
    for line in differences(before, after):
        say(console, f"differs: {line}", "yellow")
    joined = pairs(before, after)
    if not any(pair.first and pair.second for pair in joined):
        raise click.UsageError(
            f"the runs have no row in common: {first} has {_what(before)}; {second} has {_what(after)}"
        )
    # Ratios to a rival of the same run: what slowed the whole machine down is not in them.
    rival = next((name for name in before.rivals if name in after.rivals), None)
    beside = () if rival is None else (f"/ {rival} before", "after")
    figures = ("ms before", "ms after", "after / before", *beside, "apart")
    table = report.empty_table("", ("workload", "pass", "layer"), figures)
    for pair in joined:
        row = pair.either
        ratio = Text("-" if pair.ratio is None else f"{pair.ratio:.2f}")
        ratios = [Text(_ratio(one, rival)) for one in (pair.first, pair.second)] if beside else []
        cells = [_time(pair.first), _time(pair.second), ratio, *ratios, Text("*" if pair.apart else "")]
        table.add_row(str(row.at), row.pass_name, f"{report.called(row.layer)} {row.approach}", *cells)
    show(console, table)
    apart = sum(pair.apart for pair in joined)
    if apart:
        say(console, f"{apart} of {len(joined)} rows are apart (*): their ranges from p10 to p90 do not meet")
    else:
        say(console, "no row is apart: everywhere the ranges from p10 to p90 meet")
    for pair in failed(joined):
        say(
            console, f"FAILED: {report.called(pair.second.layer)} at {pair.second.at}: {pair.second.reason}", "bold red"
        )
    context.exit(FAILED if failed(joined) else 0)


def _what(run):
    """What a run's rows are of, in few words."""
    if not run.rows:
        return "no rows"
    parts = (
        list(dict.fromkeys(str(row.at) for row in run.rows)),
        list(dict.fromkeys(f"{row.layer} {row.approach}" for row in run.rows)),
        list(dict.fromkeys(row.pass_name for row in run.rows)),
    )
    return f"{_several(parts[0])} with {_several(parts[1])} in {_several(parts[2])}"


def _several(names):
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _ratio(row, rival):
    return "-" if row is None or rival not in row.ratios else f"{row.ratios[rival]:.2f}"


def _time(row):
    if row is None:
        return Text("not run", "yellow")
    if row.median is None:
        return Text("FAILED", "bold red") if row.status == "failed" else Text(row.status, "yellow")
    return Text(f"{1e3 * row.median:.3g}")
