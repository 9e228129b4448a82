"""`bn-bench step`: the networks, the comparison of their losses, the table, the audit, and what it refuses."""

import dataclasses
import importlib.util
import json
import math
import signal
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import bn_fused
from bn_fused import kernels
from bn_fused.bench import deviceless, installing, timing
from bn_fused.bench.commands.step import command
from bn_fused.bench.run.report import called
from bn_fused.bench.step import agreement, audit, compile_time, resnet, timed
from bn_fused.bench.step.networks import (
    BASELINE,
    Program,
    Setting,
    contenders,
    default_backends,
    default_layouts,
    equinox_model,
    refusal,
)

from support.compilers import skip_without_compilers
from support.versions import ON_THE_NEWEST_JAX, on_the_newest_jax

SMALL = ("--batch", "4", "--image", "16", "--classes", "5", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """resnet18 is a network of two narrow blocks, the second with a shortcut convolution."""
    monkeypatch.setitem(resnet.ARCHITECTURES, "resnet18", resnet.Architecture((1, 1), bottleneck=False, width=4))


def setting(**changes):
    """A small one."""
    return Setting(**(dict(model="resnet18", batch=4, image=16, dtype="float32", classes=5) | changes))


def run(*arguments):
    """The result of a command line."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


# The networks


@pytest.mark.parametrize(
    ("depths", "bottleneck", "parameters", "norms"),
    [((2, 2, 2, 2), False, 11_689_512, 20), ((3, 4, 6, 3), True, 25_557_032, 53)],
)
def test_the_networks_have_the_sizes_of_the_published_ones(depths, bottleneck, parameters, norms):
    architecture = resnet.Architecture(depths, bottleneck)
    assert architecture in (*resnet.ARCHITECTURES.values(), resnet.Architecture((2, 2, 2, 2), False))

    def make():
        model, _ = eqx.nn.make_with_state(resnet.ResNet)(
            architecture, 1000, lambda channels, activation: bn_fused.BatchNorm(channels, "batch", "batch"),
            jax.random.key(0),
        )  # fmt: skip
        return eqx.filter(model, eqx.is_inexact_array)

    assert sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make))) == parameters
    shapes = resnet.norm_shapes(architecture, 224)
    assert len(shapes) == norms
    assert shapes[0] == (64, 112, 112) and shapes[-1] == (2048 if bottleneck else 512, 7, 7)


@on_the_newest_jax
def test_the_weights_do_not_depend_on_the_norm():
    models = [equinox_model(setting(), one.norm(setting()))[0] for one in contenders() if one.norm]
    first = [np.asarray(each.weight) for each in resnet.named_convolutions(models[0]).values()]
    assert len(first) == 1 + 4 + 1
    for model in models[1:]:
        for one, other in zip(first, resnet.named_convolutions(model).values(), strict=True):
            np.testing.assert_array_equal(one, other.weight)


def test_bfloat16_is_for_convolutions_and_the_last_layer_and_not_for_the_norms():
    model, _ = equinox_model(setting(), contenders()[0].norm(setting()))
    cast = resnet.cast(model, "bfloat16")
    assert cast.stem.weight.dtype == cast.head.bias.dtype == jnp.bfloat16
    assert cast.stem_norm.weight.dtype == cast.blocks[1].shortcut_norm.bias.dtype == jnp.float32


@pytest.mark.parametrize("fusion", ["fused", "plain"])
@on_the_newest_jax
def test_residual_and_relu_are_the_layers_own_where_they_are_fused(fusion):
    model, _ = equinox_model(setting(), contenders(fusion=fusion)[0].norm(setting()))
    layer = model.blocks[0].norms[-1]
    assert isinstance(layer, resnet.Apart) == (fusion == "plain")
    assert layer.activation == "relu" and model.blocks[1].shortcut_norm.activation is None


# The comparison


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float32", marks=ON_THE_NEWEST_JAX), pytest.param("bfloat16", marks=pytest.mark.slow)],
)
def test_every_network_agrees_with_equinoxs(dtype):
    networks = contenders(rivals=("equinox",), approaches=("batch",), fusion="both" if dtype == "float32" else "fused")
    if dtype == "float32":
        networks += contenders(("jnp",), (), approaches=("ema",), fusion="fused")[:-1]
    networks += contenders(("jnp",), (), fusion="fused", layouts=("nhwc",))[:-1]
    rows = timed.run(setting(dtype=dtype), networks, seconds=0.01)
    assert [row.name for row in rows] == [one.name for one in networks]
    # Kernels for chips that are not here are named, and keep nobody from running.
    elsewhere = [row for row in rows if row.status == "refused"]
    assert all(row.name.startswith(("pallas", "triton")) and "cannot run on" in row.reason for row in elsewhere)
    rows = [row for row in rows if row not in elsewhere]
    assert len(rows) >= {"float32": 5, "bfloat16": 3}[dtype] and all(row.status == "ok" for row in rows), rows
    assert all(row.median > 0 and row.rounds >= 5 and row.memory > 0 for row in rows)
    by_name = {row.name: row for row in rows}
    assert by_name[BASELINE].ratio == 1
    for row in rows:
        assert abs(row.loss - row.loss_after) > 0.01
        assert row.images_per_second == pytest.approx(4 / row.median)


@on_the_newest_jax
def test_the_network_in_flax_agrees_too():
    pytest.importorskip("flax", reason="flax is not installed")
    networks = contenders(backends=("jnp",), rivals=("flax",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flax's own
        rows = {row.name: row for row in timed.run(setting(), networks, seconds=0.01)}
    assert rows["flax"].status == "ok", rows["flax"].reason
    assert rows["flax"].loss_after == pytest.approx(rows[BASELINE].loss_after, rel=1e-5)


def test_the_network_in_torch_agrees_too():
    pytest.importorskip("torch", reason="torch is not installed")
    networks = contenders(backends=("jnp",), rivals=("torch",))
    rows = {row.name: row for row in timed.run(setting(), networks, seconds=0.01)}
    assert rows["torch"].status == "ok", rows["torch"].reason


def test_a_wrong_gradient_shows_FAILED_is_not_timed_and_the_status_is_1(broken_backend, tmp_path):
    record = tmp_path / "rows.json"
    done = run(*SMALL, "--backend", broken_backend, "--against", "none", "--json", record)
    assert done.exit_code == 1, done.output
    assert "broken batch, fused: FAILED: the loss after a step is" in done.output
    failed, baseline = json.loads(record.read_text())["rows"]
    assert failed["status"] == "failed" and failed["median"] is None
    assert baseline["status"] == "ok" and baseline["median"] > 0


@on_the_newest_jax
def test_a_network_that_raises_fails_in_one_line_and_the_others_run(monkeypatch):
    operations = kernels.backends.jnp.BACKEND.operations

    def broken(**operands):
        raise ArithmeticError("no such instruction\nand a long story")

    kernels.register(kernels.Backend("raising", operations | {"forward": broken}))
    try:
        done = run(*SMALL, "--backend", "raising", "--against", "none")
    finally:
        kernels.unregister("raising")
    assert done.exit_code == 1
    assert "FAILED: ArithmeticError: no such instruction\n" in done.output
    assert "equinox batch" in done.output and "long story" not in done.output


@on_the_newest_jax
def test_a_backend_that_cannot_run_here_is_named_and_refused_if_it_was_asked_for():
    operations = kernels.backends.jnp.BACKEND.operations
    kernels.register(kernels.Backend("elsewhere", operations, refusal=lambda problem, target: "it needs a chip"))
    try:
        done = run(*SMALL, "--against", "none")
        asked = run(*SMALL, "--backend", "elsewhere", "--against", "none")
    finally:
        kernels.unregister("elsewhere")
    assert done.exit_code == 0, done.output
    assert "elsewhere batch, fused" in done.output and "refused: " in done.output and "it needs a chip" in done.output
    assert asked.exit_code == 2 and "--backend elsewhere: " in asked.output and "it needs a chip" in asked.output


@pytest.mark.parametrize(
    ("calls", "statuses", "rounds"),
    [
        # while the first network is built: none is finished
        (1, [], 0),
        # while the second is: the first one's losses are kept
        (3, ["untimed"], 0),
        # in the warm-up, and in the first round
        (4, ["untimed", "untimed"], 0),
        (9, ["untimed", "untimed"], 0),
        # in the third round: two whole ones are kept
        (13, ["ok", "ok"], 2),
    ],
)
def test_an_interrupted_run_prints_and_saves_what_is_finished(
    calls, statuses, rounds, monkeypatch, interruptible, tmp_path
):
    left = iter(range(calls))

    def call():
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)

    class Run:
        """In place of `JaxRun`: one call to build it, one for its losses, one for a step."""

        def __init__(self, contender, setting):
            call()

        def compile(self):
            pass

        def losses(self, lr):
            call()
            return agreement.Losses(2.0, 1.0)

        def learning_rate(self):
            return 0.1

        def expected(self, lr, losses, unit):
            return agreement.Expected(losses, agreement.Losses(0.0, 0.0))

        def once(self):
            call()

        def memory(self):
            return None

    monkeypatch.setattr(timed, "JaxRun", Run)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    record = tmp_path / "rows.json"
    done = run(*SMALL, "--backend", "jnp", "--against", "none", "--json", record)
    assert done.exit_code == 130, done.output
    saved = json.loads(record.read_text())
    assert saved["interrupted"] and [row["status"] for row in saved["rows"]] == statuses
    for row in saved["rows"]:
        assert row["loss"] > 0 and row["rounds"] == rounds and (row["median"] is not None) == (rounds > 0)
        assert called(row["name"]) in done.output
    assert f"interrupted: {statuses.count('ok')} of 2 rows are finished" in done.output


def expected(before=2.0, after=1.0, noise=(0.0, 0.0)):
    return agreement.Expected(agreement.Losses(before, after), agreement.Losses(*noise))


def test_losses_agree_only_within_the_tolerance():
    allowed = agreement.Tolerance(1e-3, 1e-2)

    def disagreement(before, after, wanted):
        return agreement.disagreement(agreement.Losses(before, after), wanted, allowed, "the other")

    assert disagreement(2.0, 1.0, expected()) == ""
    assert disagreement(2.0015, 1.010, expected()) == ""
    assert disagreement(2.003, 1.0, expected()).startswith("the loss is 2.003, of the other 2")
    assert disagreement(2.0, 1.012, expected()).startswith("the loss after a step is 1.012")
    assert "nan" in disagreement(math.nan, 1.0, expected())
    assert "nothing to compare" in disagreement(2.0, 1.0, None)
    # what rounding was seen to do counts four times
    assert disagreement(2.0055, 1.0, expected(noise=(1e-3, 0.0))) == ""
    assert disagreement(2.0065, 1.0, expected(noise=(1e-3, 0.0))).startswith("the loss is")
    assert disagreement(2.0, 1.0145, expected(noise=(0.0, 1e-3))) == ""


def test_where_rounding_explains_everything_losses_prove_nothing():
    allowed = agreement.tolerance("float32", 20, "cpu")
    assert agreement.incomparable(expected(), allowed, 8) == ""
    assert agreement.incomparable(expected(noise=(5e-3, 5e-3)), allowed, 8) == ""
    for noise in ((0.02, 0.0), (0.0, 0.2)):
        assert "2 values" in agreement.incomparable(expected(noise=noise), allowed, 2)
    assert agreement.incomparable(expected(2.0, 2.0), allowed, 2)


def test_the_tolerance_is_float32s_on_a_cpu_and_coarser_where_products_are():
    float32, gpu, tpu = (agreement.tolerance("float32", 20, platform).loss for platform in ("cpu", "gpu", "tpu"))
    assert float32 < 1e-5 < gpu < tpu
    assert agreement.tolerance("bfloat16", 20, "cpu").loss == tpu


@on_the_newest_jax
def test_a_network_that_rounding_decides_about_is_timed_and_said_to_be_not_compared(monkeypatch):
    monkeypatch.setattr(timed, "incomparable", lambda expected, allowed, values: f"no loss tells, {values} values")
    done = run(*SMALL, "--backend", "jnp", "--against", "none")
    assert done.exit_code == 0, done.output
    # the smallest norm sees 2x2 positions of 4 images
    assert f"jnp batch, fused, {BASELINE}: not compared: no loss tells, 16 values\n" in done.output
    assert "FAILED" not in done.output and done.output.count("1.00") >= 1


def test_the_compared_step_changes_the_loss_by_a_tenth():
    built = timed.JaxRun(contenders(rivals=())[-1], setting())
    built.compile()
    losses = built.losses(built.learning_rate())
    assert losses.after == pytest.approx((1 - agreement.STEP_SHARE) * losses.before, rel=0.05)
    assert losses == built.losses(built.learning_rate()), "the first weights are kept"
    noise = built.expected(built.learning_rate(), losses, 2.0**-12).noise
    assert 0 < noise.before < 0.01 * losses.before


# The command


@on_the_newest_jax
def test_rivals_that_are_not_installed_are_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("flax", "torch") else find_spec(name, *rest)
    )
    done = run(*SMALL, "--against", "flax", "--against", "torch")
    assert done.exit_code == 0, done.output
    for name in ("flax", "torch"):
        assert f"{name}: missing: {name} is not installed: {installing.pip_install(name)}\n" in done.output


def test_auto_runs_beside_the_backends_where_several_can_run(broken_backend):
    names = [one.name for one in contenders(default_backends(setting()), rivals=())]
    assert {"broken batch, fused", "jnp batch, fused", "auto batch, fused", BASELINE} <= set(names)
    assert not any("reference" in name for name in names)


def test_auto_does_not_run_beside_the_one_backend_that_can():
    every = [name for name in kernels.backend_names() if name != "reference"]
    assert default_backends(setting()) == every
    assert default_backends(setting(), "v5e") == [*every, "auto"]


def test_flax_is_compared_with_a_network_of_its_layout(monkeypatch):
    for there, layouts in ((True, ("nchw", "nhwc")), (False, ("nchw",))):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there or None)
        assert default_layouts(("equinox", "flax")) == layouts
        assert default_layouts(("equinox",)) == ("nchw",)


def test_the_norm_that_a_backend_cannot_run_is_named():
    assert refusal("jnp", setting()) is None and refusal("pallas_tpu", setting(), "v5e") is None
    assert "cannot run on tpu (v5e)" in refusal("pallas_gpu", setting(), "v5e")

    def refuses_eight_channels(problem, target):
        return "there are eight channels" if problem.channels == 8 else None

    operations = kernels.backends.jnp.BACKEND.operations
    kernels.register(kernels.Backend("picky", operations, refusal=refuses_eight_channels))
    try:
        reason = refusal("picky", setting())
    finally:
        kernels.unregister("picky")
    # The stem's, two of the first block; the second block's first is the fourth.
    assert reason.startswith("norm 3, 8 channels of 2x2: ") and reason.endswith("there are eight channels")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "resnet34"), "'resnet34'"),
        (("--batch", 1), "--batch"),
        (("--image", 8), "--image"),
        (("--dtype", "int8"), "'int8'"),
        (("--classes", 1), "--classes"),
        (("--approach", "best"), "'best'"),
        (("--backend", "cudnn"), "'cudnn'"),
        (("--against", "mxnet"), "'mxnet'"),
        (("--fusion", "half"), "'half'"),
        (("--seconds", 0), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--audit", "h300"), "'h300'"),
        (("--json", "/no/such/folder/rows.json"), "'/no/such/folder/rows.json'"),
    ],
)
def test_input_it_cannot_use_is_named_with_status_2(arguments, named, monkeypatch):
    monkeypatch.setattr("bn_fused.bench.commands.step.run", lambda *_, **__: pytest.fail("it began"))
    done = run(*arguments)
    assert done.exit_code == 2 and named in done.output.splitlines()[-1]


# The audit


class FakeChild:
    """In place of a compiling process; the first network ends it."""

    started = 0

    def __init__(self, arguments, environment):
        FakeChild.started += 1
        assert environment["JAX_PLATFORMS"] == "cpu" and "bn_fused.bench.step.audit" in arguments

    def ask(self, request, time_limit):
        assert (request["target"], time_limit) == ("h200", 7.0)
        request = json.loads(json.dumps(request))
        asked = Setting(**request["setting"])
        assert (asked.model, asked.batch, asked.image, asked.dtype) == ("resnet50", 128, 224, "bfloat16")
        if request["name"] not in [one.name for one in contenders(**request["options"])]:
            pytest.fail("the child would not know the network")
        if request["name"].startswith("jnp"):
            raise audit.ChildEnded("stopped at the time limit of 7 s")
        row = audit.AuditRow(request["name"], "ok", "", 3 * 10**9, 10**9, 2.5, None, 5 * 10**8, 42, 6 * 10**8)
        return dataclasses.asdict(row)

    def close(self):
        pass


def test_the_audit_compiles_what_is_trained_elsewhere_and_outlives_a_compiler(
    monkeypatch, no_compiler_needed, tmp_path
):
    monkeypatch.setattr(audit, "Child", FakeChild)
    monkeypatch.setattr(FakeChild, "started", 0)
    record = tmp_path / "rows.json"
    done = run("--audit", "h200", "--time-limit", 7, "--against", "torch", "--json", record)
    assert done.exit_code == 1 and FakeChild.started == 2
    assert "jnp batch, fused: FAILED: stopped at the time limit of 7 s" in done.output
    assert "torch: " in done.output and "0.600" in done.output  # seldom
    rows = {row["name"]: row for row in json.loads(record.read_text())["rows"]}
    assert rows[BASELINE]["launches"] == 42 and rows["torch"]["status"] in ("missing", "refused")


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(deviceless, "missing", lambda target: "the compiler for h200 is not installed: pip install it")
    row = audit.audit_one("h200", contenders()[0], setting())
    assert row.status == "missing" and "pip install" in row.reason


def test_the_passes_are_over_what_the_norms_take():
    # stem and pooled: 4 channels of 8x8, 4x4 twice; then 8 channels of 2x2, main path twice and shortcut
    assert audit.norm_bytes(setting()) == 4 * 4 * (4 * 64 + 2 * 4 * 16 + 3 * 8 * 4)
    assert audit.norm_bytes(setting(dtype="bfloat16")) == audit.norm_bytes(setting()) // 2


# How long it takes to compile


class FakeCompiler:
    """In place of the process that compiles; Flax takes twice as long in each round, and jnp ends it in the second."""

    asked: list[str] = []

    def __init__(self, arguments, environment):
        assert "bn_fused.bench.step.compile_time" in arguments
        assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"

    def ask(self, request, time_limit):
        request = json.loads(json.dumps(request))
        assert request["target"] == "h200" and Setting(**request["setting"]).model == "resnet50"
        name = request["name"]
        self.asked.append(name)
        if name.startswith("jnp") and self.asked.count(name) == 2:
            raise compile_time.ChildEnded(f"stopped at the time limit of {time_limit:g} s")
        if name == "pallas_gpu batch, fused":
            return {"status": "refused", "reason": "it needs a chip"}
        number = self.asked.count(name) * (2.0 if name == "flax" else 1.0)
        return {"seconds": [number, number, 3 * number], "cpu": 2 * number}

    def close(self):
        pass


def test_compile_times_are_of_paired_rounds_and_over_those_of_flax(monkeypatch, no_compiler_needed, tmp_path):
    monkeypatch.setattr(compile_time, "Child", FakeCompiler)
    monkeypatch.setattr(FakeCompiler, "asked", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "flax" or None)
    record = tmp_path / "rows.json"
    against = ("--against", "flax", "--against", "torch", "--layout", "nchw")
    ours = ("--backend", "jnp", "--backend", "pallas_gpu")
    limits = ("--seconds", "1e-6", "--time-limit", 7)
    done = run("--compile-time", "--audit", "h200", *ours, *against, *limits, "--json", record)
    assert done.exit_code == 1 and "jnp batch, fused: FAILED: stopped at the time limit of 7 s" in done.output
    assert "/ flax" in done.output and "it needs a chip" in done.output
    saved = json.loads(record.read_text())
    rows = {row["name"]: row for row in saved["rows"]}
    assert saved["kind"] == "step compile time" and rows["torch"]["status"] == "missing"
    # Every second round goes backwards; who is left out is not asked again.
    first, second = FakeCompiler.asked[:4], FakeCompiler.asked[4:7]
    assert first == ["jnp batch, fused", "pallas_gpu batch, fused", BASELINE, "flax"]
    assert second == ["flax", BASELINE, "jnp batch, fused"] and FakeCompiler.asked[7:] == [BASELINE, "flax"]
    assert [rows["flax"][name] for name in ("tracing", "lowering", "compilation", "total", "cpu")] == [4, 4, 12, 20, 8]
    assert rows["flax"]["ratio"] == 1 and rows[BASELINE]["rounds"] == compile_time.MIN_ROUNDS
    assert [rows[BASELINE][name] for name in ("ratio", "ratio_p10", "ratio_p90", "cpu_ratio")] == [0.5] * 4


@pytest.mark.parametrize(("rounds", "statuses"), [(0, ["untimed", "untimed"]), (2, ["ok", "ok"])])
def test_interrupted_compile_times_are_those_of_whole_rounds(rounds, statuses, monkeypatch, interruptible):
    asked = []

    class Interrupted(FakeCompiler):
        def ask(self, request, time_limit):
            asked.append(request["name"])
            if len(asked) > 2 * rounds + 1:
                signal.raise_signal(signal.SIGINT)
            return {"seconds": [1.0, 1.0, 1.0], "cpu": 1.0}

    monkeypatch.setattr(compile_time, "Child", Interrupted)
    done = run(*SMALL, "--compile-time", "--backend", "jnp", "--against", "none")
    assert done.exit_code == 130 and f"{statuses.count('ok')} of 2 rows are finished" in done.output
    assert ("interrupted before a round was finished" in done.output) == (rounds == 0)


def test_a_sample_of_the_compile_time_is_fresh(monkeypatch):
    done = []

    def make(one, asked):
        if one.ours:
            raise bn_fused.BackendError("it needs a chip")
        return Program(lambda carry, *arguments: done.append("trace") or (carry, jnp.sin(carry)), jnp.ones(3))

    monkeypatch.setattr(compile_time, "program", make)
    monkeypatch.setattr(jax, "clear_caches", lambda: done.append("clear"))
    request = {"target": None, "setting": dataclasses.asdict(setting()), "options": {"backends": ["jnp"]}}
    sampler = compile_time.Sampler()
    samples = [sampler.answer(request | {"name": BASELINE}) for _ in range(2)]
    assert done == ["trace", "clear", "trace", "clear", "trace"]
    for sample in samples:
        assert len(sample["seconds"]) == 3 and min(sample["seconds"]) > 0 and sample["cpu"] >= 0
    refused = sampler.answer(request | {"name": "jnp batch, fused"})
    assert refused == {"status": "refused", "reason": "it needs a chip"}


@pytest.mark.compilers
@pytest.mark.slow
def test_the_step_compiles_for_an_h200_and_equinox_moves_more():
    skip_without_compilers("h200")
    options = dict(backends=("jnp",), rivals=())
    asked = setting(model="resnet50", batch=32, image=64, dtype="bfloat16")
    rows = list(audit.audit("h200", asked, contenders(**options), options, time_limit=400))
    assert [row.status for row in rows] == ["ok", "ok"], rows
    ours, equinox = rows
    assert ours.read < equinox.read and ours.launches < equinox.launches
    # three passes of a convolution at the least: it reads its input, and its gradients read input and output's
    assert 3 < ours.passes < equinox.passes
    assert ours.temporary > 0
