"""Device times of layers alone: named shapes, then suites, each saved as a run after every workload.

Several processes compile at the same time, each its share of the workloads; then they are asked for one workload after
the other, so that nothing else runs on the device. A process that dies takes its own workloads with it and no others.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import time

import click
import jax

from bn_fused.bench.child import Child, ChildEnded, answer_requests
from bn_fused.bench.commands.common import Shape, make_console, say, show
from bn_fused.bench.commands.numbers import Number
from bn_fused.bench.run import records, report, suite
from bn_fused.bench.saved import now
from bn_fused.bench.workloads import SUITES, WORKLOADS, Workload

# Of the time, what compilation may take.
COMPILATION = 0.55
# Seconds that one workload may take to be timed, and those that it needs.
MOST, LEAST = 60.0, 4.0
WORKERS, THREADS = 6, 3
RIVALS = ("equinox", "flax")
# Seconds of samples by the clock at a workload.
CLOCK = 0.3


@dataclasses.dataclass(frozen=True)
class Asked:
    """Workloads that are saved together under a name, and who runs there, in the order in which they are compiled."""

    name: str
    workloads: tuple[Workload, ...]
    backends: tuple[str, ...] = ("jnp", "pallas_gpu", "triton")
    rivals: tuple[str, ...] = RIVALS

    def settings(self, deadline: float) -> suite.Settings:
        """Of a run that stops compiling at this `time.monotonic()`."""
        cold = jax.devices()[0].platform != "cpu"
        return suite.Settings(
            backends=self.backends, rivals=self.rivals, passes=("fwd", "bwd"), seconds=CLOCK, cold=cold,
            deadline=deadline, threads=THREADS,
        )  # fmt: skip


def asked(shapes: tuple[Workload, ...], rehearse: bool) -> list[Asked]:
    """What is measured, in this order."""

    def named(name, **changes):
        workloads = tuple(dataclasses.replace(WORKLOADS[one], **changes) for one in SUITES[name])
        return Asked(name, tuple(map(_tiny, workloads[:1])) if rehearse else workloads)

    last = dict(dtype="bfloat16", layout="nhwc")
    found = []
    if shapes:
        own = tuple(dataclasses.replace(shape, **last) for shape in shapes)
        found.append(Asked("shapes", own, ("pallas_gpu", "jnp"), ()))
    return [*found, named("resnet50", **last), named("mlp", **last), named("quick")]


def _tiny(workload):
    """A few elements in place of a workload's."""
    return dataclasses.replace(workload, shape=(4, 4, *[3] * (len(workload.shape) - 2)))


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=pathlib.Path))
@click.option("--seconds", type=Number(min=0, min_open=True), required=True)
@click.option("--shape", "shapes", type=Shape(), multiple=True)
@click.option("--rehearse", is_flag=True)
def main(folder, seconds, shapes, rehearse):
    """Measure shapes and suites into FOLDER within so many seconds."""
    begin = time.monotonic()
    end = begin + seconds
    console = make_console()
    names = [(one.name, index) for one in asked(shapes, rehearse) for index in range(len(one.workloads))]
    number = 1 if rehearse else min(WORKERS, len(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        line = [sys.executable, "-m", "bn_fused.bench.measure.layers", "worker"]
        workers = [stack.enter_context(Child(line, os.environ)) for _ in range(number)]
        share = {index: names[index::number] for index in range(number)}
        compiling = COMPILATION * seconds
        said, lost = {}, {}

        def prepare(index):
            request = {
                "do": "prepare", "shapes": [shape.shape for shape in shapes], "rehearse": rehearse,
                "names": share[index], "seconds": compiling,
            }  # fmt: skip
            try:
                said[index] = workers[index].ask(request, compiling + 20)
            except ChildEnded as error:
                lost[index] = str(error)

        with concurrent.futures.ThreadPoolExecutor(number) as pool:
            list(pool.map(prepare, range(number)))
        for index, why in lost.items():
            say(console, f"FAILED: process {index}: {why}; without {share[index]}", "bold red")
        for index, answer in said.items():
            for failure in answer["failures"]:
                say(console, f"FAILED: process {index}: {failure}", "bold red")
        say(console, f"compiled after {time.monotonic() - begin:.0f} s")
        environment = next((answer["environment"] for answer in said.values()), None)
        if environment is None:
            raise click.ClickException("no process could prepare its workloads")
        environment = records.Environment.model_validate(environment)
        where = {tuple(name): index for index in said for name in said[index]["prepared"]}
        for one in asked(shapes, rehearse):
            rows = []
            for place, workload in enumerate(one.workloads):
                index = where.get((one.name, place))
                if index is None or index in lost or time.monotonic() > end - LEAST:
                    say(console, f"{one.name}: {workload} is skipped: {_why(index, lost)}", "yellow")
                    continue
                try:
                    answer = workers[index].ask({"do": "time", "name": [one.name, place]}, MOST)
                except ChildEnded as error:
                    lost[index] = str(error)
                    say(console, f"FAILED: {workload}: {error}", "bold red")
                    continue
                if "failure" in answer:
                    say(console, f"FAILED: {workload}: {answer['failure']}", "bold red")
                    continue
                new = [records.Row.model_validate(row) for row in answer["rows"]]
                rows += new
                _print(console, new, one)
                _save(folder, one, rows, environment, unfinished=len({row.at for row in rows}) < len(one.workloads))
    say(console, f"done after {time.monotonic() - begin:.0f} s")


def _why(index, lost):
    if index is None:
        return "it was not prepared"
    return f"its process is lost: {lost[index]}" if index in lost else "no time is left"


def _print(console, rows, one):
    say(console)
    show(console, report.workload_table(rows, one.rivals))
    for line in (
        *report.timing_lines(rows, True), *report.kernel_lines(rows), *report.reasons(rows), *report.failures(rows)
    ):  # fmt: skip
        say(console, line)


def _save(folder, one, rows, environment, unfinished):
    run = records.Run(
        command=shlex.join(["bench/measure_gpu.sh", *sys.argv[2:]]),
        date=now(),
        environment=environment,
        suite="" if one.name == "shapes" else one.name,
        cold=environment.platform != "cpu",
        sync=False,
        rivals=one.rivals,
        interrupted=unfinished,
        rows=tuple(rows),
    )
    path = folder / f"{one.name}.json"
    path.with_suffix(".part").write_text(records.to_json(run), encoding="utf-8")
    path.with_suffix(".part").replace(path)


# In the processes


class _Worker:
    """The workloads of one process, by the name of what was asked for and their place in it."""

    def __init__(self):
        self.prepared = {}

    def prepare(self, shapes, rehearse, names, seconds):
        """Compile and check them; what failed altogether is said."""
        deadline = time.monotonic() + seconds
        failures = []
        own = tuple(Workload("shape", tuple(shape)) for shape in shapes)
        for one in asked(own, rehearse):
            places = [place for name, place in names if name == one.name]
            if time.monotonic() >= deadline:
                failures.append(f"{one.name}: no time was left to begin it")
                continue
            try:
                settings = one.settings(deadline)
                ready = suite.prepare([one.workloads[place] for place in places], settings)
            except Exception as error:  # the others are still worth having
                failures.append(f"{one.name}: {suite.failure_of(error)}")
                continue
            self.prepared |= {
                (one.name, place): (prepared, settings) for place, prepared in zip(places, ready, strict=True)
            }
        environment = records.environment().model_dump(mode="json")
        return {"prepared": list(self.prepared), "failures": failures, "environment": environment}

    def time(self, name):
        """The rows of one workload, which is forgotten afterwards."""
        prepared, settings = self.prepared.pop(tuple(name))
        try:
            rows = suite.time_prepared(prepared, settings)
        except Exception as error:
            return {"failure": suite.failure_of(error)}
        return {"rows": [row.model_dump(mode="json") for row in rows]}


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        worker = _Worker()
        answer_requests(lambda request: getattr(worker, request.pop("do"))(**request))
    else:
        main()
