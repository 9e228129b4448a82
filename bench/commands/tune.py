"""`bn-bench tune`: the best configurations of the backend `triton` on the device at hand."""

import click
from rich import box
from rich.table import Table

from bn_fused.bench import tune
from bn_fused.bench.commands.common import (
    FAILED,
    INTERRUPTED,
    OutputFile,
    check_room,
    choose_workloads,
    first_device,
    make_console,
    progress_bar,
    say,
    show,
    size_options,
)
from bn_fused.bench.commands.numbers import Number
from bn_fused.bench.installing import versions
from bn_fused.bench.run.suite import refusal
from bn_fused.kernels.backends.triton import tuning
from bn_fused.kernels.chips import chip_of


@click.command("tune")
@size_options
@click.option("--seconds", type=Number(min=0, min_open=True), default=10.0, show_default=True,
              help="Time for the samples of each workload, without compilation and checks.")  # fmt: skip
@click.option("--output", type=OutputFile(".json"),
              help="Where to write; default: into the package, where it is found without more.")  # fmt: skip
@click.pass_context
def command(context, *, seconds, output, **sizes):
    """Time the configurations of the backend triton on JAX's default device, and save the best for each workload.

    What the file has from earlier is kept, but for the workloads timed anew. A file that is not in the package is used
    if BN_FUSED_TUNING names it, or the folder in which it has the device's name, as nvidia-h200.json.

    Exit status: 0; 1 if a workload has no configuration that runs; 2 for input it cannot use; 130 if it was
    interrupted.
    """
    # A configuration depends on rows, channels and dtype alone.
    workloads = choose_workloads(**sizes)
    device = first_device()
    check_room(workloads, device)
    for workload in workloads:
        sentence = refusal(workload, "triton")
        if sentence is not None:
            raise click.UsageError(sentence)
    chip = chip_of(device)
    if output is None:
        output = default_output(chip.device_kind, context)
    console = make_console()
    say(console, f"{chip.device_kind}: {len(workloads)} workloads")
    entries = earlier(output, chip.device_kind, console)
    results, interrupted = [], False
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(workloads))
        try:
            for result in tune.tune(
                workloads,
                chip,
                lambda workload, plans: tune.time_plans(workload, plans, seconds=seconds, device=device),
                lambda what: progress.update(task, description=what),
            ):
                results.append(result)
                progress.update(task, completed=len(results))
        except KeyboardInterrupt:
            interrupted = True
    entries |= {result.entry.key: result.entry for result in results if result.entry is not None}
    if any(result.entry for result in results):
        output.write_text(tuning.to_json(chip.device_kind, entries.values(), versions()), encoding="utf-8")
    if results:
        show(console, table(results))
    for result in results:
        for failure in result.failures:
            say(console, f"{result.workload}: {failure}", "yellow")
    if any(result.entry for result in results):
        say(console, f"written to {output}")
    if interrupted:
        say(console, f"interrupted: {len(results)} of {len(workloads)} workloads are finished", "yellow")
        context.exit(INTERRUPTED)
    context.exit(FAILED if any(result.entry is None for result in results) else 0)


def default_output(device_kind, context):
    """The package's file for a device kind; one line if it cannot be written."""
    folder = tuning.FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{folder} cannot be made ({error.strerror}): choose a file with --output") from None
    return OutputFile(".json").convert(folder / tuning.file_name(device_kind), None, context)


def earlier(output, device_kind, console):
    """What the file has already, {key: entry}; nothing if it cannot be used."""
    if not output.exists():
        return {}
    try:
        return {entry.key: entry for entry in tuning.read(output, device_kind)}
    except tuning.Unusable as error:
        say(console, f"{output} is replaced: {error}", "yellow")
        return {}


def table(results) -> Table:
    """The best configurations."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("workload", no_wrap=True)
    for name in ("ms", "/ by rule", "row bytes", "values", "warps", "stages", "blocks", "slab MiB", "ran"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        entry = result.entry
        cells = ["-"] * 8
        if entry is not None:
            ratio = entry.seconds / entry.heuristic_seconds
            *numbers, slab_bytes = vars(entry.config).values()
            slab = f"{slab_bytes / (1 << 20):.3g}" if slab_bytes else "-"
            cells = [f"{1e3 * entry.seconds:.4g}", f"{ratio:.2f}", *map(str, numbers), slab]
        table.add_row(str(result.workload), *cells, str(result.ran))
    return table
