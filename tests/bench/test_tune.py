"""`bn-bench tune`: what it finds, writes and says; with processes that make up times, and one that takes them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from bn_fused import kernels
from bn_fused.bench import cli
from bn_fused.bench.child import ChildEnded
from bn_fused.bench.device_time import DeviceTime, Kernel
from bn_fused.bench.timing import Samples
from bn_fused.bench.tune import files, run, worker
from bn_fused.bench.tune.best import Program, best, seconds_of
from bn_fused.bench.tune.search import Part, classes_of, parts_of, problem_of, searched
from bn_fused.bench.workloads import SUITES, WORKLOADS, Workload
from bn_fused.kernels import tuned
from bn_fused.kernels.backends import Tuning
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.target import Target
from bn_fused.kernels.tuned import Class, Measured

from support.child_process import child_environment
from support.versions import also_on_the_newest_jax, on_the_newest_jax

pytestmark = pytest.mark.usefixtures("narrow_terminal")
H200 = Target("cuda", CHIPS["h200"])
CPU = Target("cpu")
SMALL = Class(24, 8, "float32", "relu", False, True)
# Values of a configuration with which the toy's forward does not compile, or its backward is wrong.
FAILS, WRONG = 8, 9


@dataclasses.dataclass(frozen=True)
class Config:
    """Of the toy."""

    forward: int
    backward: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of the toy."""

    forward: int
    backward: int

    def launches(self, operation):
        return (f"bn_fused_{operation}",)


RULE, OTHER, THIRD = Config(1, 1), Config(2, 2), Config(3, 3)
SEARCHED = [RULE, OTHER, Config(FAILS, 1), RULE, Config(1, WRONG), THIRD]


@pytest.fixture
def toy():
    """A backend that computes as jnp does, and whose plans are searched for; its name."""
    operations = dict(kernels.backends.jnp.BACKEND.operations)
    forward, backward = operations["forward"], operations["backward"]

    def failing(*, spec, **operands):
        if spec.plan.forward == FAILS:
            raise RuntimeError("no such tile\nand more")
        return forward(spec=spec, **operands)

    def wrong(*, spec, **operands):
        dx, *others = backward(spec=spec, **operands)
        return (2 * dx if spec.plan.backward == WRONG else dx, *others)

    tuning = Tuning(
        3,
        lambda problem, target: SEARCHED,
        lambda stored: Config(**stored),
        lambda one, other: Config(one.forward, other.backward),
    )
    backend = kernels.Backend(
        "toy",
        operations | {"forward": failing, "backward": wrong},
        plan=lambda problem, target, config=None: Plan(*dataclasses.astuple(config or RULE)),
        tuning=tuning,
    )
    kernels.register(backend)
    yield "toy"
    kernels.unregister("toy")


def program(config, seconds, forward=0.0, backward=0.0):
    return Program(config, seconds, forward, backward, by_rule=config == RULE)


def test_the_fastest_configuration_is_found():
    for fastest in (OTHER, THIRD):
        programs = [program(config, 0.5 if config == fastest else 1.0) for config in (RULE, OTHER, THIRD)]
        assert best(programs) == Measured(0.5, 1.0, dataclasses.asdict(fastest))


def test_what_is_hardly_faster_does_not_take_the_rules_place():
    assert best([program(RULE, 1.0), program(OTHER, 0.99)]) == Measured(1.0, 1.0, None)
    halves = [program(RULE, 1.0, 0.3, 0.6), program(OTHER, 0.9, 0.297, 0.5)]
    measured = best(halves, lambda one, other: Config(one.forward, other.backward))
    assert measured.config == {"forward": 1, "backward": 2} and measured.seconds == pytest.approx(0.9)


def test_forward_and_backward_are_chosen_apart_where_they_can_be_combined():
    programs = [program(RULE, 1.0, 0.4, 0.5), program(OTHER, 1.05, 0.2, 0.75), program(THIRD, 0.95, 0.5, 0.35)]
    measured = best(programs, lambda one, other: Config(one.forward, other.backward))
    assert measured.config == {"forward": 2, "backward": 3} and measured.by_rule == 1.0
    # All but the kernels of the two operations is the rule's.
    assert measured.seconds == pytest.approx(0.1 + 0.2 + 0.35)
    # By the clock, which does not know kernels, and of a backend that cannot: the fastest whole.
    assert best(programs).config == {"forward": 3, "backward": 3}
    by_clock = [dataclasses.replace(one, forward=0.0, backward=0.0) for one in programs]
    assert best(by_clock, lambda one, other: Config(one.forward, other.backward)) == best(programs)


def test_without_a_time_of_the_rules_plan_the_fastest_takes_its_place():
    measured = best([program(OTHER, 1.0), program(THIRD, 0.99)])
    assert measured == Measured(0.99, None, dataclasses.asdict(THIRD))


def test_kernels_are_told_apart_by_the_names_of_the_plans_launches():
    names = {
        "bn_fused_normalise": 1.0, "bn_fused_normalise_backward": 2.0, "bn_fused_forward_mosaic_gpu_kernel": 4.0,
        "loop_fusion": 8.0,
    }  # fmt: skip
    time = DeviceTime(Samples(np.asarray([1.0])), {name: Kernel(2.0, value) for name, value in names.items()}, 1.0)
    assert seconds_of(time, ("bn_fused_normalise", "bn_fused_forward")) == 10.0


def test_classes_are_shapes_with_and_without_a_residual_the_largest_first():
    workloads = [Workload("a", (2, 8, 3)), Workload("b", (6, 8)), Workload("c", (4, 16, 5))]
    classes = classes_of(workloads, ["relu"], [False, True])
    assert [(one.rows, one.channels, one.residual) for one in classes] == [
        (20, 16, False), (20, 16, True), (6, 8, False), (6, 8, True),
    ]  # fmt: skip
    assert all(one.channels_last and one.activation == "relu" for one in classes)


@pytest.mark.parametrize("name", ["triton", "pallas_gpu"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_search_begins_with_the_rules_plan_and_has_each_plan_once(name, residual):
    backend = kernels.backends.triton.BACKEND if name == "triton" else kernels.backends.pallas_gpu.BACKEND
    workloads = [dataclasses.replace(WORKLOADS[name], dtype="bfloat16") for name in SUITES["resnet50"]]
    for of in classes_of(workloads, ["relu"], [residual]):
        plans = [plan for _, plan in searched(name, of, H200)]
        assert plans[0] == backend.plan(problem_of(of), H200) and len(set(plans)) == len(plans) > 1
        for config, plan in searched(name, of, H200):
            assert backend.plan_refusal(plan, problem_of(of), H200) is None
            stored = json.loads(json.dumps(dataclasses.asdict(config)))
            assert backend.tuning.parse(stored) == config


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [
        ("bfloat16", True),
        *also_on_the_newest_jax(("float32", False)),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_a_process_compiles_checks_and_times_a_part(toy, dtype, residual):
    of = dataclasses.replace(SMALL, dtype=dtype, residual=residual)
    process = worker.Worker()

    def ask(**request):
        return json.loads(json.dumps(process.answer(request)))

    said = ask(do="prepare", number=5, of=dataclasses.asdict(of), backend=toy, seconds=100.0)
    failed, wrong = said["left_out"]
    assert said["programs"] == 4  # jnp's and three
    assert failed == f"{Config(FAILS, 1)}: RuntimeError: no such tile"
    assert wrong.startswith(f"{Config(1, WRONG)}: its dx is wrong by up to ")
    found = ask(do="time", number=5, rounds=1)
    assert 0 < found["jnp"] < 60 and found["left_out"] == []
    programs = [Program(**{**one, "config": Config(**one["config"])}) for one in found["programs"]]
    assert [(one.config, one.by_rule) for one in programs] == [(RULE, True), (OTHER, False), (THIRD, False)]
    assert all(0 < one.seconds < 60 for one in programs) and not process.prepared


def test_on_a_gpu_times_are_the_kernels(toy, monkeypatch):
    """With a profiler that makes up kernels: as of a program's place, and none of the last."""

    def measure_device(functions, rounds):
        assert rounds == 2 and all(timed.wait(timed.start()) for timed in functions.values())
        kernels_of = {
            place: {"bn_fused_forward": Kernel(1.0, place), "bn_fused_backward": Kernel(2.0, 10.0 * place)}
            for place in list(functions)[:-1]
        }
        return {
            place: DeviceTime(Samples(np.asarray([100.0 + place])), kernels, 1.0)
            for place, kernels in kernels_of.items()
        }

    monkeypatch.setattr(worker, "_on_gpu", lambda: True)
    monkeypatch.setattr(worker, "measure_device", measure_device)
    steps, _ = worker.prepare(Part(SMALL, toy), float("inf"))
    plain, programs, untimed = worker.times(SMALL, steps, 2)
    assert plain == 100.0
    assert programs == [Program(RULE, 101.0, 1.0, 20.0, True), Program(OTHER, 102.0, 2.0, 40.0)]
    assert untimed == [f"{THIRD}: the profiler shows no kernels of it"]


def test_after_the_deadline_only_jnp_and_the_rules_plan_are_compiled(toy):
    steps, left_out = worker.prepare(Part(SMALL, toy), -1.0)
    assert ([step.config for step in steps], left_out) == (
        [None, RULE],
        ["4 of 5 configurations: no time was left to compile them"],
    )


def test_a_process_whose_device_is_lost_ends(toy, monkeypatch):
    monkeypatch.setattr(worker, "_runs", lambda program, operands: False)
    with pytest.raises(worker.DeviceLost, match=r"after Config\(forward=8, backward=1\): RuntimeError: no such tile"):
        worker.Worker().prepare(0, dataclasses.asdict(SMALL), toy, 100.0)


class MadeUp:
    """In place of a process: jnp takes 2 s, the toy's forward and backward 1 s each but for the fastest, 0.5.

    `script` changes an answer: it is called with the request, and may raise what a process does.
    """

    FASTEST = OTHER
    asked: list = []
    script = staticmethod(lambda request: None)

    def __init__(self):
        self.parts = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, request, limit):
        assert limit > 0
        json.dumps(request)
        MadeUp.asked.append(request)
        changed = MadeUp.script(request)
        if changed is not None:
            return changed
        if request["do"] == "prepare":
            self.parts[request["number"]] = Class(**request["of"])
            return {"programs": 4, "left_out": [f"{THIRD}: it is wrong"]}
        del self.parts[request["number"]]
        times = {config: 0.5 if config == self.FASTEST else 1.0 for config in (RULE, OTHER)}
        programs = [
            dataclasses.asdict(Program(config, 2 * time, time, time, config == RULE)) for config, time in times.items()
        ]
        return {"jnp": 2.0, "programs": programs, "left_out": []}


@pytest.fixture
def made_up(toy, tmp_path, monkeypatch):
    """The file that is written, by processes that make up their times."""
    monkeypatch.setattr(run, "start", lambda rehearse: MadeUp())
    monkeypatch.setattr(MadeUp, "asked", [])
    monkeypatch.setattr(MadeUp, "script", staticmethod(lambda request: None))
    return tmp_path / "cpu.json"


def tune(path, *options):
    return cli.main(["tune", "--output", str(path), *options])


def read(path):
    revisions, entries = tuned.read(path, "cpu")
    assert revisions == {"toy": 3}
    return {entry.of: entry.backends for entry in entries}


BEST = {"jnp": Measured(2.0), "toy": Measured(1.0, 2.0, {"forward": 2, "backward": 2})}


def test_the_command_writes_a_file_and_says_what_was_gained(made_up, capsys):
    assert tune(made_up, "--workload", "mlp") == 0
    classes = [Class(4096, 512, "float32", "relu", residual, True) for residual in (False, True)]
    assert read(made_up) == dict.fromkeys(classes, BEST)
    out = " ".join(capsys.readouterr().out.split())
    assert "forward and backward is 2.000 times as fast as jnp's" in out
    assert "toy: tuned plans are 2.000 times as fast as those by rule, which stay in 0 of 2 classes" in out
    assert f"4096 rows of 512 channels, float32, relu: toy: {THIRD}: it is wrong" in out
    assert f"written to {made_up}" in out.replace("\n", "")


def test_the_file_is_added_to(made_up):
    assert tune(made_up, "--workload", "mlp", "--no-residual") == 0
    assert tune(made_up, "--shape", "512,24,7,7", "--workload", "mlp", "--residual", "--activation", "silu") == 0
    assert {(of.rows, of.activation, of.residual) for of in read(made_up)} == {
        (4096, "relu", False), (4096, "silu", True), (25088, "silu", True),
    }  # fmt: skip


def test_resuming_leaves_out_what_is_there(made_up, monkeypatch, capsys):
    assert tune(made_up, "--workload", "mlp") == 0
    MadeUp.asked.clear()
    assert tune(made_up, "--workload", "mlp", "--shape", "8,4", "--resume") == 0
    assert {request["of"]["rows"] for request in MadeUp.asked if request["do"] == "prepare"} == {8}
    assert "2 of 4 classes are in" in capsys.readouterr().out
    # With other packages all of them are timed again.
    monkeypatch.setattr(files, "versions", lambda: {"jax": "1"})
    MadeUp.asked.clear()
    assert tune(made_up, "--workload", "mlp", "--resume") == 0
    assert len(MadeUp.asked) == 4
    MadeUp.asked.clear()
    assert tune(made_up, "--workload", "mlp", "--resume") == 0 and MadeUp.asked == []


def test_what_the_file_says_of_earlier_kernels_is_left_out(made_up, capsys):
    assert tune(made_up, "--workload", "mlp") == 0
    document = json.loads(made_up.read_text())
    document["revisions"]["toy"] = 2
    made_up.write_text(json.dumps(document))
    assert tune(made_up, "--shape", "8,4") == 0
    assert "what it says of toy is of earlier kernels" in " ".join(capsys.readouterr().out.split())
    assert {of.rows: set(backends) for of, backends in read(made_up).items()} == {4096: {"jnp"}, 8: {"jnp", "toy"}}


@pytest.mark.parametrize("text", ["{", '{"format": 1, "entries": []}'])
def test_a_file_that_cannot_be_used_is_replaced(made_up, text, capsys):
    made_up.write_text(text)
    assert tune(made_up, "--workload", "mlp") == 0
    assert "is replaced: it" in " ".join(capsys.readouterr().out.split())
    assert len(read(made_up)) == 2


def test_the_command_writes_into_the_package_by_default(made_up, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", made_up.parent / "tuned")
    assert cli.main(["tune", "--workload", "mlp"]) == 0
    assert len(read(made_up.parent / "tuned" / "cpu.json")) == 2


@pytest.mark.parametrize("during", ["prepare", "time"])
def test_an_interrupted_command_keeps_what_is_finished(made_up, during, monkeypatch, capsys):
    def script(request):
        if request["do"] == during and len(MadeUp.asked) > (8 if during == "time" else 0):
            raise KeyboardInterrupt

    monkeypatch.setattr(MadeUp, "script", staticmethod(script))
    assert tune(made_up, "--shape", "8,4", "--shape", "8,5", "--shape", "8,6", "--processes", "1") == 130
    finished = 2 if during == "time" else 0
    assert f"interrupted: {finished} of 6 classes are finished" in capsys.readouterr().out
    assert len(read(made_up)) == finished if finished else not made_up.exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_that_dies_loses_the_part_that_it_was_at(made_up, processes, monkeypatch, capsys):
    """Another one is started, which compiles the others anew: a made-up process knows its own parts alone."""

    def script(request):
        if request["do"] == "prepare" and request["number"] == 1:
            raise ChildEnded("the process was ended by SIGSEGV")

    monkeypatch.setattr(MadeUp, "script", staticmethod(script))
    shapes = [word for rows in (8, 16, 24) for word in ("--shape", f"{rows},4")]
    assert tune(made_up, *shapes, "--no-residual", "--processes", processes) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "16 rows of 4 channels, float32, relu: toy: the process was ended by SIGSEGV" in out
    assert {of.rows: backends for of, backends in read(made_up).items()} == {24: BEST, 8: BEST}


def test_after_the_time_for_compiling_no_other_process_is_started(made_up, monkeypatch, capsys):
    def script(request):
        raise ChildEnded("stopped at the time limit of 30 s")

    monkeypatch.setattr(MadeUp, "script", staticmethod(script))
    monkeypatch.setattr(run, "COMPILATION", -1.0)
    assert tune(made_up, "--shape", "8,4", "--shape", "16,4", "--no-residual", "--processes", "1") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert len(MadeUp.asked) == 1 and "16 rows of 4 channels, float32, relu: toy: stopped at the time limit" in out
    assert "8 rows of 4 channels, float32, relu: toy: no process is left to compile it" in out


def test_a_process_that_dies_while_it_is_timed_is_not_asked_again(made_up, monkeypatch, capsys):
    def script(request):
        if request["do"] == "time":
            raise ChildEnded("stopped at the time limit of 60 s")

    monkeypatch.setattr(MadeUp, "script", staticmethod(script))
    assert tune(made_up, "--shape", "8,4", "--shape", "16,4", "--no-residual", "--processes", "1") == 1
    assert len([request for request in MadeUp.asked if request["do"] == "time"]) == 1
    assert "its process is lost: stopped at the time limit" in " ".join(capsys.readouterr().out.split())
    assert not made_up.exists()


def test_a_class_without_a_configuration_that_runs_makes_the_exit_status_1(made_up, monkeypatch, capsys):
    def script(request):
        if request["do"] == "time" and request["number"] == 1:
            return {"jnp": 1.0, "programs": [], "left_out": [f"{RULE}: the profiler shows no kernels of it"]}
        return None

    monkeypatch.setattr(MadeUp, "script", staticmethod(script))
    assert tune(made_up, "--workload", "mlp") == 1
    assert "FAILED: 4096 rows of 512 channels, float32, relu, residual" in " ".join(capsys.readouterr().out.split())
    assert [of.residual for of in read(made_up)] == [False]


def test_when_the_time_is_over_the_rest_is_left_out(made_up, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])

    def script(request):
        now[0] += 10.0 if request["do"] == "prepare" else 30.0

    monkeypatch.setattr(MadeUp, "script", staticmethod(script))
    shapes = [word for channels in (3, 4, 5, 6) for word in ("--shape", f"8,{channels}")]
    assert tune(made_up, *shapes, "--no-residual", "--processes", "1", "--time-limit", "100") == 1
    # Of the 60 s for compiling each part has its share and a little more, the largest first.
    seconds = [request["seconds"] for request in MadeUp.asked if request["do"] == "prepare"]
    assert seconds == pytest.approx([1.3 * 60 / 4, 1.3 * 50 / 3, 1.3 * 40 / 2, 30])
    # Then 60 s are left, 15 for each; the first took 10 s a round.
    assert [request["rounds"] for request in MadeUp.asked if request["do"] == "time"] == [3, 2]
    assert {of.channels for of in read(made_up)} == {6, 5}
    assert "8 rows of 4 channels, float32, relu: toy: no time was left" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_lists_classes_and_numbers_of_configurations(toy, tmp_path, capsys):
    assert cli.main(["tune", "--dry-run", "--workload", "mlp", "--no-residual"]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "4096 rows of 512 channels" in line]
    assert row.split()[-3:] == ["-", "-", "5"]  # triton, pallas_gpu, toy
    assert "it is written for GPUs" in " ".join(out.split())
    assert cli.main(["tune", "--dry-run", "--target", "mi300x", "--workload", "mlp"]) == 0
    assert "configurations for rocm (mi300x)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "backend 'triton' cannot run on cpu"),
        (["--target", "h200"], "--target is for --dry-run"),
        (["--rehearse"], "--rehearse needs --output"),
        (["--dtype", "float64"], "its plans are not tuned"),
        (["--time-limit", "0"], "--time-limit"),
    ],
)
def test_what_it_cannot_use_is_said_in_one_line(options, said, capsys):
    assert cli.main(["tune", "--workload", "mlp", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_a_backend_that_can_run_a_class_jnp_is_timed_alone():
    assert parts_of([SMALL], CPU) == [Part(SMALL, None)]


@on_the_newest_jax
def test_a_rehearsal_goes_through_a_process_and_a_file(tmp_path):
    path = tmp_path / "rehearsed.json"
    done = subprocess.run(
        [sys.executable, "-m", "bn_fused.bench", "tune", "--rehearse", "--suite", "resnet50", "--dtype", "bfloat16",
         "--processes", "1", "--time-limit", "100", "--output", str(path)],
        capture_output=True, text=True, timeout=200, env=child_environment(JAX_PLATFORMS="cpu"), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 programs were compiled by 1 processes" in done.stdout and f"written to {path}" in done.stdout
    revisions, entries = tuned.read(path, "cpu")
    assert revisions == {} and [entry.of.residual for entry in entries] == [False, True]
    assert all(set(entry.backends) == {"jnp"} for entry in entries)


def test_another_devices_file_is_left_as_it_is(tmp_path, capsys):
    path = tmp_path / "mine.json"
    entry = tuned.Entry(SMALL, {"jnp": Measured(1e-5), "triton": Measured(1e-6)})
    path.write_text(tuned.to_json(H200.chip.device_kind, [entry], {"triton": 2}, {}))
    before = path.read_text()
    assert cli.main(["tune", "--rehearse", "--shape", "4,4", "--output", str(path)]) == 2
    assert "its device_kind is 'NVIDIA H200', not 'cpu'" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == before
