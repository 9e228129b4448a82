"""`bn-bench audit`: what each layer moves through a chip's memory, compiled for it without having it."""

import pathlib
from collections.abc import Sequence

import click
from click.core import ParameterSource
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from bn_fused.bench import deviceless
from bn_fused.bench.audit import report
from bn_fused.bench.audit.blocks import BLOCKS, FORMS, RIVALS, Setting
from bn_fused.bench.audit.compile import audit, cases_of
from bn_fused.bench.audit.rows import Case, Row, load_document, row_from_json, to_json
from bn_fused.bench.audit.summary import Unsuitable, summary
from bn_fused.bench.commands.common import (
    FAILED,
    INTERRUPTED,
    Backend,
    OutputFile,
    Shape,
    activation_option,
    activations_of,
    make_console,
    say,
    show,
)
from bn_fused.bench.commands.numbers import Number
from bn_fused.bench.installing import versions, versions_text
from bn_fused.bench.providers import timed_backends
from bn_fused.bench.saved import command_line
from bn_fused.bench.workloads import DTYPES, LAYOUTS, PASSES, SUITES, WORKLOADS, Workload


def _repeatable(name, destination, choices, default, text):
    return click.option(
        name, destination, multiple=True, type=click.Choice(tuple(choices), case_sensitive=False), default=default,
        show_default=bool(default), help=f"{text} Repeatable.",
    )  # fmt: skip


@click.command("audit")
@_repeatable("--target", "targets", deviceless.COMPILABLE, ("h200",), "The chip to compile for.")
@click.option("--suite", type=click.Choice(tuple(SUITES)), help="A named list of workloads; default: quick.")
@click.option("--workload", "names", multiple=True, type=click.Choice(tuple(WORKLOADS)), metavar="NAME",
              help="A workload by its name. Repeatable.")  # fmt: skip
@click.option("--shape", "shapes", type=Shape(), multiple=True,
              help="A shape: examples, channels, spatial sizes. Repeatable.")  # fmt: skip
@_repeatable("--layout", "layouts", LAYOUTS, ("nchw",), "Where the channels are in the program: second or last.")
@_repeatable("--dtype", "dtypes", DTYPES, (), "Of x; default: the workload's, float32.")
@_repeatable("--pass", "passes", PASSES, ("fwd", "fwd+bwd"), "What is compiled.")
@activation_option("Applied after the normalisation; in a block relu if none is named.")
@click.option("--residual", is_flag=True, help="Add an array of x's shape before the activation.")
@click.option("--backend", "backends", multiple=True, type=Backend(),
              help="Repeatable; default: all but reference.")  # fmt: skip
@_repeatable("--against", "rivals", (*RIVALS, *FORMS, "none"), (), "The rivals, or one form of a rival; default: all.")
@_repeatable("--block", "blocks", BLOCKS, (), "Put the layer inside this network block.")
@click.option("--time-limit", type=Number(min=0, min_open=True), default=120.0, show_default=True,
              help="Seconds after which a process that has not compiled its program is ended.")  # fmt: skip
@click.option("--instructions", is_flag=True,
              help="Count a TPU's kernels' instructions and spills too; in a block it takes a minute and a gigabyte of "
              "disk for a program.")  # fmt: skip
@click.option("--details", is_flag=True, help="Print the kernels' plans and every access to arrays of x's size.")
@click.option("--json", "json_file", type=OutputFile(), help="Save the rows.")
@click.option("--markdown", "markdown_file", type=OutputFile(), help="Save the tables.")
@click.option("--summary", "summary_file", type=OutputFile(),
              help="Save one document that says which layer moves the fewest bytes where.")  # fmt: skip
@click.option("--title", default="What each layer moves", show_default=True, help="Of the summary.")
@click.option("--from", "sources", multiple=True, type=click.Path(path_type=pathlib.Path),
              help="Compile nothing: take the rows that --json saved. Repeatable.")  # fmt: skip
@click.pass_context
def command(context, *, targets, suite, names, shapes, layouts, dtypes, passes, activations, residual, backends, rivals,
            blocks, time_limit, instructions, details, json_file, markdown_file, summary_file, title,
            sources):  # fmt: skip
    """Compile each layer for a chip that is not there, and count what it moves through the chip's memory.

    Every target is compiled for in a process of its own. A row that could not be compiled says why; what has to be
    installed is named with the command.

    Exit status: 0 if programs were compiled; 1 if one of ours failed to compile, or nothing at all was compiled; 2
    for input it cannot use; 130 if it was interrupted, with the finished rows printed and saved. A backend that does
    not take the case, a rival that fails and a compiler that is not installed are no failures beside rows that are
    compiled.
    """
    if sources:
        for parameter in context.command.params:
            on_command_line = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
            if on_command_line and parameter.name not in GO_WITH_FROM:
                raise click.UsageError(f"--from takes saved rows, all of them: {parameter.opts[0]} does not go with it")
        documents = [_read(path) for path in sources]
        rows = [row_from_json(values) for document in documents for values in document["rows"]]
        interrupted = any(document["interrupted"] for document in documents)
        _print_saved(rows, details=details)
    else:
        workloads = [WORKLOADS[name] for name in (*(SUITES[suite] if suite else ()), *names)] + list(shapes)
        workloads = list(dict.fromkeys(workloads)) or [WORKLOADS[name] for name in SUITES["quick"]]
        settings = [
            setting
            for activation in activations_of(activations)
            for setting in choose_settings(workloads, layouts, dtypes, activation, residual, blocks)
        ]
        layers = choose_layers(backends, rivals)
        pass_names = [name for name in PASSES if name in passes]
        cases = cases_of(list(dict.fromkeys(targets)), settings, layers, pass_names)
        rows, interrupted = run_and_print(cases, time_limit=time_limit, instructions=instructions, details=details)
        documents = [{"command": command_line(), "versions": versions()}]
    if json_file is not None:
        commands = "\n".join(dict.fromkeys(document["command"] for document in documents))
        text = to_json(rows, command=commands, versions=documents[0]["versions"], interrupted=interrupted)
        json_file.write_text(text, encoding="utf-8")
    if markdown_file is not None:
        text = report.markdown(rows, versions_text(documents[0]["versions"]))
        markdown_file.write_text(text, encoding="utf-8")
    if summary_file is not None:
        try:
            text = summary(title, rows, documents)
        except Unsuitable as error:
            raise click.UsageError(str(error)) from None
        summary_file.write_text(text, encoding="utf-8")
    context.exit(INTERRUPTED if interrupted else exit_status(rows))


# The parameters that choose nothing to compile.
GO_WITH_FROM = ("sources", "details", "json_file", "markdown_file", "summary_file", "title")


def _read(path):
    """A saved audit; one line if it cannot be read."""
    try:
        return load_document(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"from is {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise click.UsageError(f"from is {str(path)!r}: {error}") from None


def _print_saved(rows, *, details):
    console = make_console()
    for group in dict.fromkeys(row.case.group for row in rows):
        _print_table(console, [row for row in rows if row.case.group == group], details)
    say(console)
    console.print(Text(report.NOTE, "dim"))


def _print_table(console, rows, details):
    say(console)
    if any(row.status != "missing" for row in rows):
        show(console, report.table(rows))
    else:
        say(console, report.title(*rows[0].case.group))
    for note in report.notes(rows, details=details):
        say(console, note)


def choose_settings(
    workloads: Sequence[Workload],
    layouts: Sequence[str],
    dtypes: Sequence[str],
    activation: str | None,
    residual: bool,
    blocks: Sequence[str],
) -> list[tuple[str, Setting]]:
    """The name and setting of all that the options ask for; a block takes those workloads that have its rank."""
    settings = []
    for block in dict.fromkeys(blocks) or (None,):
        fitting = [w for w in workloads if block is None or len(w.shape) in BLOCKS[block].ranks]
        if not fitting:
            listed = ", ".join(str(workload) for workload in workloads)
            raise click.UsageError(
                f"block {block!r} takes workloads with {BLOCKS[block].takes}; none is among {listed}"
            )
        for workload in fitting:
            # Without spatial axes both layouts are one.
            for layout in dict.fromkeys(layouts) if len(workload.shape) > 2 else layouts[:1]:
                for dtype in dict.fromkeys(dtypes) or (workload.dtype,):
                    setting = Setting(workload.shape, dtype, layout, activation, residual, block)
                    settings.append((workload.name, setting))
    return settings


def choose_layers(backends: Sequence[str], rivals: Sequence[str]) -> list[str]:
    """The names of the layers: backends, then the forms of the rivals."""
    ours = list(backends) or timed_backends()
    against = rivals or tuple(RIVALS)
    if "jnp" in rivals:
        ours.append("jnp")
    theirs = [layer.name for rival in against if rival != "none" for layer in RIVALS.get(rival) or FORMS.get(rival, ())]
    return list(dict.fromkeys([*ours, *theirs]))


def run_and_print(
    cases: Sequence[Case], *, time_limit: float, instructions: bool, details: bool
) -> tuple[list[Row], bool]:
    """Compile all cases and print each table as soon as it is there; the rows, and whether it was interrupted."""
    console = make_console()
    say(console, versions_text(versions()))
    rows: list[Row] = []
    waiting: list[Row] = []
    interrupted = False

    def print_table():
        _print_table(console, waiting, details)
        waiting.clear()

    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))

        def before(case):
            text = f"{case.target}: {case.workload}, {case.layer}, {case.pass_name}"
            progress.update(task, description=text, completed=len(rows))

        try:
            for row in audit(cases, time_limit=time_limit, instructions=instructions, before=before):
                if waiting and waiting[0].case.group != row.case.group:
                    print_table()
                rows.append(row)
                waiting.append(row)
        except KeyboardInterrupt:
            interrupted = True
        if waiting:
            print_table()
    say(console)
    if any(row.status == "compiled" for row in rows):
        console.print(Text(report.NOTE, "dim"))
    if interrupted:
        say(console, f"interrupted: {len(rows)} of {len(cases)} rows are finished", "yellow")
    for row in rows:
        if row.status == "failed" and row.case.ours:
            say(console, f"FAILED: {row.case.layer}, {row.case.pass_name} for {row.case.target}", "bold red")
    return rows, interrupted


def exit_status(rows: Sequence[Row]) -> int:
    """0, or 1 if a program of ours failed to compile or none was compiled at all."""
    failed = any(row.status == "failed" and row.case.ours for row in rows)
    return FAILED if failed or not any(row.status == "compiled" for row in rows) else 0
