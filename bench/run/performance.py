"""What is recorded in `results/<device>/`, and the README's performance section, made of its runs."""

import os
import pathlib
import re
from collections.abc import Iterator

from bn_fused.bench import saved
from bn_fused.bench.run.records import Run, read, run_of
from bn_fused.bench.run.report import environment_lines
from bn_fused.kernels.registry import is_reference

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
BEGIN, END = "<!-- made by `bn-bench report`: begin -->", "<!-- made by `bn-bench report`: end -->"


class NoRecords(ValueError):
    """There is nothing to report, or nowhere to put it; the message is one line."""


def documents(folder: str | os.PathLike = RESULTS) -> Iterator[tuple[str, saved.Document]]:
    """What is recorded, each by its path relative to the folder, in which devices have folders of their own.

    Raises `UnreadableRun` for a damaged file.
    """
    for path in sorted(pathlib.Path(folder).glob("*/**/*.json")):
        yield path.relative_to(folder).as_posix(), read(path)


def recorded(folder: str | os.PathLike = RESULTS) -> dict[str, Run]:
    """The newest run of every device and suite, by path relative to the folder; `UnreadableRun` for a damaged one."""
    newest: dict[tuple[str, str], tuple[str, Run]] = {}
    for name, document in documents(folder):
        if document.kind != saved.RUN:
            continue
        run = run_of(document, pathlib.Path(folder) / name)
        key, entry = (file_name(run).split("/")[0], run.suite), (name, run)
        if key not in newest or newest[key][1].date <= run.date:
            newest[key] = entry
    if not newest:
        raise NoRecords(
            f"there are no recorded runs in {str(folder)!r}: save one with `bn-bench run --json FILE` and record it "
            "with `bn-bench report --add FILE`"
        )
    return dict(newest[key] for key in sorted(newest))


def file_name(run: Run) -> str:
    """Where a run is recorded, relative to the folder of results."""
    device = re.sub(r"[^a-z0-9]+", "-", f"{run.environment.platform}-{run.environment.device}".lower()).strip("-")
    return f"{device}/{run.date[:10]}-{run.suite or 'shapes'}.json"


def section(runs: dict[str, Run], folder: str) -> str:
    """The section in Markdown: for every run what it ran on, and the ratios of our layers; records lie in `folder`."""
    parts = [_table(f"{folder}/{path}", run) for path, run in runs.items()]
    note = (
        "Each figure is the median over paired rounds in one process: the time over that of another library's layer "
        '(above 1, bn_fused is slower; equinox is in mode "batch"), and the share of the bandwidth of a copy of x in '
        "the same rounds, counting the passes over x that none can save."
    )
    return "\n\n".join([*parts, note])


def _table(path: str, run: Run) -> str:
    rivals = [name for name in run.rivals if name != "jnp"]
    rows = [row for row in run.rows if row.layer not in rivals and not is_reference(row.layer)]
    passes = list(dict.fromkeys(row.pass_name for row in rows))
    columns = [f"{name} / {rival}" for rival in rivals for name in passes] + [f"{name}, of copy" for name in passes]
    lines = [f"{line}  " for line in environment_lines(run.environment)]
    lines += [f"{run.date[:10]}, `{run.command}` ([record]({path}))", ""]
    lines += ["| workload | backend | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    cases = dict.fromkeys((str(row.at), row.layer, row.approach) for row in rows)
    for at, layer, approach in cases:
        by_pass = {
            row.pass_name: row for row in rows if (str(row.at), row.layer, row.approach) == (at, layer, approach)
        }
        cells = [_ratio(by_pass.get(name), rival) for rival in rivals for name in passes]
        cells += [_share(by_pass.get(name)) for name in passes]
        lines.append(f"| {at} | {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(row, rival):
    if row is not None and row.status == "failed":
        return "FAILED"
    return "-" if row is None or rival not in row.ratios else f"{row.ratios[rival]:.2f}"


def _share(row):
    return "-" if row is None or row.of_copy is None else f"{100 * row.of_copy:.0f} %"


def put(readme: str, text: str) -> str:
    """The README with the text between its two marks; `NoRecords` if it lacks them."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise NoRecords(f"the README has no place for it: it needs the lines {BEGIN} and {END}, once each")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
