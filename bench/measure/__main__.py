"""What `bench/measure_gpu.sh` runs: all that wants a GPU, in parts, within so many minutes.

| part | |
|---|---|
| doctor | what is here, and a check of every backend |
| numbers | the tests of the kernels on the device |
| tune | every backend's plans for a ResNet-50, tune.json, which the parts that follow take theirs from |
| layers | device times of shapes and suites, each a JSON file that `bn-bench report --add` takes |
| step | a ResNet-50's training step with every BatchNorm, step.json |

Each part is a process of its own, ended where its share of the time is over, so that it takes no other down. In the
folder: what all print in log.txt, how each part ended in summary.txt.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import click

from bn_fused.bench.commands.common import UNUSABLE, Shape
from bn_fused.bench.commands.numbers import Number
from bn_fused.kernels.tuned import VARIABLE

ROOT = pathlib.Path(__file__).resolve().parents[2]
# From SIGINT to SIGKILL, in which a part saves what it has.
GRACE = 10.0
# What the part tune writes.
TUNED = "tune.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part: its share of the time that is left when it begins, among the parts that follow, and at most `most` s."""

    name: str
    share: float
    most: float = float("inf")


PARTS = (Part("doctor", 2, 60), Part("numbers", 2, 120), Part("tune", 3, 330), Part("layers", 3), Part("step", 3))
BY_NAME = {part.name: part for part in PARTS}

PROBE = """
import json, jax
from bn_fused.bench.providers import timed_backends
from bn_fused.bench.run.suite import refusal
from bn_fused.bench.workloads import Workload
asked = Workload("probe", (128, 64, 56, 56), "bfloat16", layout="nhwc", activation="relu", residual=True)
able = [name for name in timed_backends() if refusal(asked, name) is None]
print(json.dumps({"platform": jax.devices()[0].platform, "backends": able}))
"""


def command(part: str, folder: pathlib.Path, limit: float, backends: list[str], shapes, rehearse: bool) -> list[str]:
    """The command line of a part that has so many seconds."""
    bench = [sys.executable, "-m", "bn_fused.bench"]
    if part == "doctor":
        return [*bench, "doctor"]
    if part == "numbers":
        # Without the plugins that happen to be installed; the tests fail on a warning of any of them.
        options = ["-p", "xdist", "-n", "1" if rehearse else "10", "-v", "--tb=short", "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", *options, "tests/kernels/test_gpu_device.py"]
    if part == "layers":
        options = ["--seconds", f"{limit:.0f}", *["--rehearse"] * rehearse]
        options += [word for shape in shapes for word in ("--shape", ",".join(map(str, shape.shape)))]
        return [sys.executable, "-m", "bn_fused.bench.measure.layers", str(folder), *options]
    if part == "step":
        against = ("no-norm",) if rehearse else ("flax", "torch", "torch-compile", "no-norm")
        options = ["--apart", "--layout", "nhwc", "--details", "--json", str(folder / "step.json")]
        options += [word for name in backends for word in ("--backend", name)]
        options += [word for name in against for word in ("--against", name)]
        options += ["--time-limit", f"{0.7 * limit:.0f}", "--seconds", f"{0.06 * limit:.0f}"]
        if rehearse:
            options += ["--model", "tiny", "--batch", "4", "--image", "16", "--classes", "5"]
        return [*bench, "step", *options]
    options = ["--suite", "resnet50", "--dtype", "bfloat16", "--examples", "128", "--output", str(folder / TUNED)]
    options += ["--time-limit", f"{0.9 * limit:.0f}", *(["--rehearse", "--processes", "1"] if rehearse else [])]
    return [*bench, "tune", *options]


def environment(rehearse: bool) -> dict[str, str]:
    """Of the parts: several processes share the device, and the tests run without foreign plugins."""
    settings = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **settings, **({"JAX_PLATFORMS": "cpu"} if rehearse else {})}


def ended(words: list[str], limit: float, log, variables) -> str:
    """Run a command in the repository, at most so many seconds; how it ended."""
    # What a script starts with & ignores SIGINT, and so would the part.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables,
        start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    late = False
    try:
        for number, wait in ((signal.SIGINT, limit), (signal.SIGKILL, GRACE)):
            try:
                process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                late = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return f"{'stopped at its limit, ' if late else ''}exit {status}"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.argument("parts", nargs=-1, type=click.Choice(tuple(BY_NAME)))
@click.option("--minutes", type=Number(min=0, min_open=True), default=12.0, show_default=True, help="For all parts.")
@click.option(
    "--shape",
    "shapes",
    type=Shape(),
    multiple=True,
    help="Measured first of all, in bfloat16 with channels last, jnp beside pallas_gpu; repeatable.",
)
@click.option("--rehearse", is_flag=True, help="On a CPU, with tiny sizes.")
@click.pass_context
def main(context, folder, parts, minutes, shapes, rehearse):
    """Measure all that wants a GPU into FOLDER; without PARTS all of them."""
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    variables = environment(rehearse)
    begun = [BY_NAME[name] for name in parts or BY_NAME]
    with (folder / "log.txt").open("a") as log, (folder / "summary.txt").open("a") as summary:
        found = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, env=variables, cwd=ROOT, timeout=300
        )
        log.write(found.stderr)
        if found.returncode:
            raise click.ClickException(f"bn_fused or JAX does not work here: {found.stderr.strip()[-400:]}")
        probe = json.loads(found.stdout.splitlines()[-1])
        if probe["platform"] != "gpu" and not rehearse:
            click.echo("JAX sees no GPU here; --rehearse goes through it all on a CPU, with tiny sizes", err=True)
            context.exit(UNUSABLE)
        for place, part in enumerate(begun):
            left = end - time.monotonic() - GRACE
            limit = min(part.most, left * part.share / sum(each.share for each in begun[place:]))
            if limit < 1:
                how, took = "skipped: no time is left", 0.0
            else:
                words = command(part.name, folder, limit, probe["backends"], shapes, rehearse)
                log.write(f"\n===== {part.name}, {limit:.0f} s: {' '.join(words)}\n")
                log.flush()
                start = time.monotonic()
                how = ended(words, limit, log, variables)
                took = time.monotonic() - start
            if part.name == "tune" and (folder / TUNED).exists():
                variables[VARIABLE] = str(folder / TUNED)
            line = f"{part.name}: {how} after {took:.0f} of {limit:.0f} s"
            click.echo(line)
            summary.write(line + "\n")
            summary.flush()


if __name__ == "__main__":
    main()
