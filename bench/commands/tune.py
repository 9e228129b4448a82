"""`bn-bench tune`: what is the fastest for classes of arrays on the device at hand, saved where `auto` finds it."""

import dataclasses
import functools
import math
import os

import click
from rich import box
from rich.table import Table

from bn_fused.bench.commands.common import (
    FAILED,
    INTERRUPTED,
    OutputFile,
    activations_of,
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
from bn_fused.bench.run.cases import sets_for
from bn_fused.bench.tune import run
from bn_fused.bench.tune.files import File
from bn_fused.bench.tune.search import classes_of, parts_of, refusal, searched, target_of
from bn_fused.kernels import tuned
from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.registry import tuned_backends
from bn_fused.kernels.target import Target


@click.command("tune")
@size_options
@click.option("--activation", "activations", type=click.Choice(("none", *ACTIVATIONS)), multiple=True,
              default=("relu",), show_default=True, help="What follows the normalisation. Repeatable.")  # fmt: skip
@click.option("--residual/--no-residual", default=None,
              help="With, or without an array that is added before the activation; default: both.")  # fmt: skip
@click.option("--time-limit", type=Number(min=0, min_open=True), default=300.0, show_default=True,
              help="Seconds for all; what is not compiled or timed by then is left out, and said.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1),
              help="That compile at the same time; default: one for every core but two.")  # fmt: skip
@click.option("--output", type=OutputFile(".json"),
              help="Where to write; default: into the package, where it is found without more.")  # fmt: skip
@click.option("--resume", is_flag=True,
              help="Leave out what the file has already, from the same kernels and packages.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="List the classes and the number of configurations of each backend.")
@click.option("--target", type=click.Choice([name for name, chip in CHIPS.items() if chip.platform != "tpu"]),
              help="With --dry-run: for this GPU, which need not be here.")  # fmt: skip
@click.option("--rehearse", is_flag=True,
              help="Go through it all on a CPU, with tiny arrays and times by the clock; needs --output.")  # fmt: skip
@click.pass_context
def command(
    context, *, activations, residual, time_limit, processes, output, resume, dry_run, target, rehearse, **sizes
):
    """Time every backend's plans on JAX's default device, and save what is the fastest for each class of arrays.

    A class is a shape, seen as rows of channels, with what follows the normalisation; jnp is timed beside it. What the
    file has from earlier is kept, but for the classes timed anew. `auto` and the backends look into the package, and
    into the file that BN_FUSED_TUNING names, or the folder in which it has the device's name, as nvidia-h200.json.

    Exit status: 0; 1 if a class has no result; 2 for input it cannot use; 130 if it was interrupted.
    """
    workloads = choose_workloads(**sizes)
    if any(workload.dtype == "float64" for workload in workloads):
        raise click.UsageError("--dtype float64: its plans are not tuned")
    if target is not None and not dry_run:
        raise click.UsageError("--target is for --dry-run: times are those of the device that is here")
    if rehearse:
        if output is None and not dry_run:
            raise click.UsageError("--rehearse needs --output: its times are nothing to keep")
        workloads = [_tiny(workload) for workload in workloads]
    classes = classes_of(workloads, activations_of(activations), (False, True) if residual is None else (residual,))
    console = make_console()
    # The processes that it starts have the device's memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    device = None if rehearse or target is not None else first_device()
    where = Target("cpu") if rehearse else target_of(device) if target is None else _target(target)
    kind = "cpu" if where.chip is None else where.chip.device_kind
    parts = parts_of(classes, where)
    if dry_run:
        show(console, search_table(classes, where))
        return
    if not rehearse and not any(part.backend for part in parts):
        why = "; ".join(refusal(name, classes[0], where) for name in tuned_backends())
        raise click.UsageError(f"{why}; --rehearse goes through it all on a CPU")
    if device is not None:
        check_room(workloads, device)
    if output is None:
        output = default_output(kind, context)
    try:
        file = File(output, kind, functools.partial(say, console, style="yellow"))
    except tuned.OtherDevice as error:
        raise click.UsageError(f"--output {output}: {error}; it is left as it is") from None
    if resume:
        kept = {of for of in classes if file.has([part for part in parts if part.of == of])}
        say(console, f"{len(kept)} of {len(classes)} classes are in {output} already")
        parts = [part for part in parts if part.of not in kept]
    results, interrupted = [], False
    number = min(len(parts), processes or default_processes(workloads, device))
    say(console, f"{kind}: {len({part.of for part in parts})} classes, {len(parts)} parts, {number} processes")
    if parts:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=1.0)
            try:
                for result in run.run(
                    parts,
                    functools.partial(run.start, rehearse),
                    processes=number,
                    time_limit=time_limit,
                    say=functools.partial(say, console),
                    progress=lambda share: progress.update(task, completed=share),
                ):
                    results.append(result)
                    if result.entry is not None:
                        file.add(result.entry)
                    say(console, f"{result.of}: {times_of(result.entry)}")
            except KeyboardInterrupt:
                interrupted = True
    _report(console, results, output)
    if interrupted:
        expected = len({part.of for part in parts})
        say(console, f"interrupted: {len(results)} of {expected} classes are finished", "yellow")
        context.exit(INTERRUPTED)
    context.exit(FAILED if any(result.entry is None for result in results) else 0)


def _report(console, results, output):
    """Print what was found, what was left out, and what it gained."""
    entries = [result.entry for result in results if result.entry is not None]
    if entries:
        say(console)
        show(console, table(entries))
    for result in results:
        for line in result.left_out:
            say(console, f"{result.of}: {line}", "yellow")
        if result.entry is None:
            say(console, f"FAILED: {result.of}: nothing was timed", "bold red")
    if entries:
        for line in gains(entries):
            say(console, line)
        say(console, f"written to {output}")


def _tiny(workload):
    """A few elements in place of a workload's."""
    return dataclasses.replace(workload, shape=(4, 4, *[3] * (len(workload.shape) - 2)))


def _target(name):
    return Target(CHIPS[name].platform, CHIPS[name])


def default_processes(workloads, device):
    """One for every core but two, as long as all of them have room for a class's arrays on the device."""
    most = max(1, len(os.sched_getaffinity(0)) - 2)
    room = None if device is None else (device.memory_stats() or {}).get("bytes_limit")
    if room:
        # x, dy, the residual and as many results, for every set of inputs and to compare with.
        need = max(6 * workload.nbytes * (1 + sets_for(workload, device, cold=True)) for workload in workloads)
        most = max(1, min(most, int(room // need)))
    return most


def default_output(device_kind, context):
    """The package's file for a device kind; one line if it cannot be written."""
    folder = tuned.FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{folder} cannot be made ({error.strerror}): choose a file with --output") from None
    return OutputFile(".json").convert(folder / tuned.file_name(device_kind), None, context)


def winner(entry) -> str:
    """The backend that `auto` takes in a class: jnp where none is faster by more than noise."""
    fastest = min(entry.backends, key=entry.share)
    return fastest if tuned.is_faster(entry.share(fastest)) else "jnp"


def times_of(entry) -> str:
    """The microseconds of all backends in a line."""
    if entry is None:
        return "nothing was timed"
    return ", ".join(f"{name} {1e6 * measured.seconds:.4g} us" for name, measured in entry.backends.items())


def table(entries) -> Table:
    """Which backend is the fastest in each class, in microseconds, and what that gains."""
    names = [name for name in dict.fromkeys(name for entry in entries for name in entry.backends) if name != "jnp"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("us of forward and backward", no_wrap=True)
    table.add_column("fastest", no_wrap=True)
    for name in ("jnp", *names, *(f"{name} by rule" for name in names), "jnp / fastest"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        taken, measured = winner(entry), entry.backends
        cells = [_us(measured[name].seconds if name in measured else None) for name in ("jnp", *names)]
        cells += [_us(measured[name].by_rule if name in measured else None) for name in names]
        table.add_row(str(entry.of), taken, *cells, f"{1 / entry.share(taken):.2f}")
    return table


def _us(seconds):
    return "-" if seconds is None else f"{1e6 * seconds:.4g}"


def gains(entries) -> list[str]:
    """What was gained, in a sentence each: over jnp, and of every backend over its plans by rule."""
    fastest = [1 / entry.share(winner(entry)) for entry in entries]
    lines = [f"with the fastest of each class a forward and backward is {_mean(fastest):.3f} times as fast as jnp's"]
    for name in dict.fromkeys(name for entry in entries for name in entry.backends):
        own = [entry.backends[name] for entry in entries if name in entry.backends]
        ratios = [one.by_rule / one.seconds for one in own if one.by_rule is not None]
        if ratios:
            changed = sum(one.config is not None for one in own)
            lines.append(
                f"{name}: tuned plans are {_mean(ratios):.3f} times as fast as those by rule, which stay in "
                f"{len(own) - changed} of {len(own)} classes"
            )
    return [f"{line} (geometric mean)" for line in lines]


def _mean(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def search_table(classes, target) -> Table:
    """The classes, and how many configurations of each backend would be timed on a target."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, caption=f"configurations for {target}")
    table.add_column("class", no_wrap=True)
    for name in tuned_backends():
        table.add_column(name, justify="right", no_wrap=True)
    reasons = {}
    for of in classes:
        cells = []
        for name in tuned_backends():
            reason = refusal(name, of, target)
            if reason is not None:
                reasons[name] = reason
            cells.append("-" if reason is not None else str(len(searched(name, of, target))))
        table.add_row(str(of), *cells)
    table.caption = "; ".join([table.caption, *reasons.values()])
    return table
