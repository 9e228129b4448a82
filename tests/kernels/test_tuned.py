"""Files of what was measured: which is used, for which arrays, and what `auto` and plans make of it."""

import dataclasses
import functools
import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.kernels import backends, registry, tuned as files
from bn_fused.kernels.backends.pallas_gpu import plan as pallas_gpu
from bn_fused.kernels.backends.triton import limits, plan as triton
from bn_fused.kernels.chips import CHIPS
from bn_fused.kernels.target import Problem, Target
from bn_fused.kernels.tuned import ALIKE, FOLDER, VARIABLE, Class, Entry, Measured, distance

from support.versions import on_the_newest_jax

H200 = Target("cuda", CHIPS["h200"])
KIND = H200.chip.device_kind
REVISIONS = {"pallas_gpu": pallas_gpu.REVISION, "triton": triton.REVISION}
CONFIG = triton.Config(row_bytes=512, values=8, warps=8, stages=3, blocks_per_core=2)
OTHER = dataclasses.replace(CONFIG, stages=1)
STREAMS = pallas_gpu.Config(None, None)


def measured(seconds, config=None):
    return Measured(seconds, 1.5 * seconds, None if config is None else dataclasses.asdict(config))


def entry(rows=100352, channels=64, *, jnp=3e-5, triton=2e-5, pallas_gpu=1e-5, config=CONFIG, ways=STREAMS, **of):
    """An entry, with these seconds and configurations."""
    found = {"jnp": Measured(jnp), "triton": measured(triton, config), "pallas_gpu": measured(pallas_gpu, ways)}
    of = dict(dtype="bfloat16", activation="relu", residual=False, channels_last=True) | of
    return Entry(Class(rows, channels, **of), found)


def text(*entries, **changes):
    document = json.loads(files.to_json(KIND, entries, REVISIONS, {"triton": "3.6.0"}))
    return json.dumps(document | changes)


def problem(rows=100352, channels=64, dtype="bfloat16", activation="relu", groups=1, **more):
    return Problem(groups, rows, channels, dtype, activation, **more)


def choose(asked, backend="auto", target=H200):
    return registry.choose(asked, target, backend)


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    monkeypatch.setattr(limits, "missing", lambda *_: None)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file for an H200 in a folder that BN_FUSED_TUNING names."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(files, "FOLDER", tmp_path / "none")
    return tmp_path / "nvidia-h200.json"


# Selection


def test_without_a_file_plans_are_made_by_rule_and_auto_takes_jnp(file):
    choice = choose(problem())
    assert choice.name == "jnp" and "nothing was measured on NVIDIA H200 yet" in choice.reason
    assert choose(problem(), "triton").plan == limits.plan(problem(), H200)


def test_auto_takes_the_fastest_and_says_by_which_figures(file):
    file.write_text(text(entry()))
    choice = choose(problem())
    assert choice.name == "pallas_gpu"
    assert f"10 us forward and backward, jnp 30 ({file}: 100352 rows of 64 channels, bfloat16, relu)" in choice.reason
    assert choice.plan.forward is None and choice.plan.backward is None and "its plan is from" in choice.reason
    file.write_text(text(entry(triton=0.9e-5)))
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution is
    choice = choose(problem())
    assert choice.name == "triton" and choice.plan == limits.plan(problem(), H200, CONFIG) != limits.plan(
        problem(), H200
    )


def test_where_the_fastest_cannot_run_auto_takes_the_next(file, monkeypatch):
    file.write_text(text(entry(triton=0.9e-5)))
    monkeypatch.setattr(limits, "missing", lambda *_: "it is not installed")
    assert choose(problem()).name == "pallas_gpu"


def test_what_is_hardly_faster_than_jnp_is_not_taken(file):
    file.write_text(text(entry(jnp=1.01e-5, pallas_gpu=1e-5, triton=1.2e-5)))
    choice = choose(problem())
    assert choice.name == "jnp" and "pallas_gpu runs by name: it is not faster here: 10 us" in choice.reason


def test_of_equal_times_the_backend_that_is_asked_first_is_taken(file):
    file.write_text(text(entry(triton=1e-5)))
    assert choose(problem()).name == "pallas_gpu"


def test_a_backend_asked_for_by_name_takes_its_plan_whether_or_not_it_is_the_fastest(file):
    file.write_text(text(entry(triton=9e-5)))
    choice = choose(problem(), "triton")
    assert choice.plan == limits.plan(problem(), H200, CONFIG)
    assert "auto does not take it: it is not faster here" in choice.reason and str(file) in choice.reason


def test_shares_of_jnps_time_are_compared_and_not_seconds_of_different_classes(file):
    """The nearest class of each backend may be another: here one of a third of the rows, where all take less."""
    exact, other = entry(jnp=14e-5, pallas_gpu=11e-5), entry(33450, jnp=5e-5, triton=4.8e-5)
    without = {name: dict(one.backends) for name, one in (("exact", exact), ("other", other))}
    del without["exact"]["triton"], without["other"]["pallas_gpu"]
    file.write_text(text(Entry(exact.of, without["exact"]), Entry(other.of, without["other"])))
    assert choose(problem()).name == "pallas_gpu"


def test_a_configuration_that_does_not_fit_is_not_said_to_be_the_plans_origin(file):
    far = pallas_gpu.Way(fold=3, columns=128, warpgroups=64, slabs=1, share=1)
    file.write_text(text(entry(ways=pallas_gpu.Config(far, far))))
    choice = choose(problem(), "pallas_gpu")
    assert choice.plan.forward is not None and "its plan is from" not in choice.reason


def test_the_nearest_class_decides(file):
    file.write_text(text(entry(1024, config=OTHER), entry(8192)))
    plans = {rows: choose(problem(rows), "triton").plan for rows in (256, 1024, 2048, 8192, 32768)}
    assert plans == {
        rows: limits.plan(problem(rows), H200, OTHER if rows <= 2048 else CONFIG)
        for rows in (256, 1024, 2048, 8192, 32768)
    }
    for far in (problem(255), problem(32769), problem(1024, 31), problem(1024, 129)):
        assert choose(far).name == "jnp" and "nothing near" in choose(far).reason


def test_a_class_of_other_channels_decides_who_computes_but_gives_no_plan(file):
    file.write_text(text(entry(channels=128)))
    choice = choose(problem(channels=256))
    assert choice.name == "pallas_gpu" and choice.plan == choose(problem(channels=256), "pallas_gpu").plan
    assert choice.plan.forward is not None and "its plan is from" not in choice.reason


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "float32"},
        {"activation": "gelu"},
        {"residual": True},
        {"channels_last": False},
        {"groups": 2},
        {"mask": True},
    ],
    ids=str,
)
def test_what_was_not_measured_is_left_to_jnp(file, other):
    file.write_text(text(entry()))
    assert choose(problem(**other)).name == "jnp"


@pytest.mark.parametrize("operation", ["normalise", "normalise_backward", "moments", "moments_backward"])
def test_auto_takes_kernels_for_the_forward_and_backward_that_were_measured_alone(file, operation):
    file.write_text(text(entry()))
    assert choose(problem(operation="backward")).name == "pallas_gpu"
    choice = choose(problem(operation=operation))
    assert choice.name == "jnp" and "only the forward and backward of training" in choice.reason
    assert choose(problem(operation=operation), "triton").plan == limits.plan(problem(), H200, CONFIG)


def test_at_inference_auto_takes_jnp(file):
    file.write_text(text(entry()))
    asked = dict(shape=(100352, 64), dtype="bfloat16", activation="relu", target="h200")
    assert bn_fused.explain(**asked).name == "pallas_gpu" and bn_fused.explain(**asked, inference=True).name == "jnp"


@pytest.mark.parametrize("target", [dataclasses.replace(H200, several_devices=True), Target("cuda", CHIPS["h100"])])
def test_neither_other_devices_nor_several_were_measured(file, target):
    file.write_text(text(entry()))
    assert choose(problem(), target=target).name == "jnp"


def test_activations_that_cost_the_same_and_the_other_type_of_16_bits_are_near():
    one = entry().of
    for changes, apart in (
        ({"activation": None}, ALIKE),
        ({"dtype": "float16", "activation": "leaky_relu"}, 2 * ALIKE),
        ({"rows": 2 * one.rows, "channels": 32}, 2),
    ):
        assert distance(one, dataclasses.replace(one, **changes)) == apart


@on_the_newest_jax
def test_a_network_whose_layers_take_different_backends_agrees_with_float64():
    """Each layer the backend whose seconds are the fewest for it; one takes another backward than forward."""
    ran = []

    def watched(name):
        def watching(operation):
            compute = backends.jnp.BACKEND.operations[operation]

            def run(*operands, **more):
                ran.append((name, operation))
                return compute(*operands, **more)

            return run

        return {operation: watching(operation) for operation in backends.jnp.BACKEND.operations}

    def seconds(name, asked, target):
        order = {("one", 8): 1.0, ("two", 8): 2.0, ("one", 16): 3.0, ("two", 16): 2.0, ("one", 4): 1.0, ("two", 4): 2.0}
        value = order[name, asked.channels]
        return backends.Verdict(True, "in a test", 5.0 if (name, asked.operation) == ("one", "backward") else value)

    for name in ("one", "two"):
        registry.register(
            dataclasses.replace(
                backends.jnp.BACKEND,
                name=name,
                operations=watched(name),
                verdict=functools.partial(seconds, name),
            )
        )
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(size) for size in ((4, 8), (8, 16), (16, 4))]
    x = rng.standard_normal((32, 4))

    def loss(weights, x, backend):
        for weight in weights:
            x = x @ weight
            stats = bn_fused.RunningStats.init(x.shape[-1], x.dtype)
            x, _ = bn_fused.batch_norm(x, stats, approach="batch", activation="silu", backend=backend)
        return jnp.sum(x**3)

    try:
        single = [jnp.asarray(weight, jnp.float32) for weight in weights]
        found = jax.jit(jax.value_and_grad(loss), static_argnums=2)(single, jnp.asarray(x, jnp.float32), "auto")
    finally:
        for name in ("one", "two"):
            registry.unregister(name)
    # One jnp operation of either name may run several times while it is lowered.
    assert set(ran) == {("one", "forward"), ("two", "forward"), ("two", "backward")}
    with jax.enable_x64(True):
        wanted = jax.value_and_grad(loss)([jnp.asarray(weight) for weight in weights], jnp.asarray(x), "reference")
    for got, value in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, value, rtol=2e-4, atol=2e-4 * float(np.max(np.abs(value))))


# Where channels lie


def test_channels_first_are_told_apart_by_whether_a_convolution_made_them(file):
    file.write_text(text(entry(), entry(dtype="float32")))
    shape = dict(shape=(32, 64, 56, 56), dtype="bfloat16", channel_axis=1, activation="relu", target="h200")
    assert bn_fused.explain(**shape).name == "jnp"
    assert bn_fused.explain(**shape, after_convolution=True).name == "pallas_gpu"
    assert bn_fused.explain(**shape | {"dtype": "float32"}, after_convolution=True).name == "pallas_gpu"
    assert bn_fused.explain((100352, 64), "bfloat16", activation="relu", target="h200").name == "pallas_gpu"
    assert bn_fused.explain((100352, 64, 1), "bfloat16", channel_axis=1, activation="relu", target="h200").name != "jnp"


@pytest.fixture
def specs(monkeypatch):
    """The `after_convolution` of every operation that is lowered."""
    found = []
    run = backends.jnp.BACKEND.operations["forward"]

    def forward(*, spec, **operands):
        found.append(spec.after_convolution)
        return run(spec=spec, **operands)

    spy = dataclasses.replace(
        backends.jnp.BACKEND, name="spy", operations={**backends.jnp.BACKEND.operations, "forward": forward}
    )
    registry.register(spy)
    yield found
    registry.unregister("spy")


STATS = bn_fused.RunningStats.init(4)


def normalised(x):
    return bn_fused.batch_norm(x, STATS, channel_axis=1, backend="spy")[0]


def convolved(x):
    return jax.lax.conv_general_dilated(x, jnp.ones((4, 4, 3, 3)), (1, 1), "SAME")


MADE = {
    "argument": (normalised, False),
    "computed": (lambda x: normalised(2 * x), False),
    "convolution": (lambda x: normalised(convolved(x)), True),
    "bias and activation": (lambda x: normalised(jax.nn.relu(convolved(x) + 1)), True),
    "sum": (lambda x: normalised(jnp.cumsum(convolved(x), 0)[:, :, :3]), False),
    "a jit of its own": (lambda x: jax.jit(normalised)(convolved(x)), False),
    "in a checkpoint": (lambda x: jax.checkpoint(lambda x: normalised(convolved(x)))(x), True),
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_convolution_made_is_known_where_it_is_traced(name, specs):
    function, made = MADE[name]
    x = jnp.ones((2, 4, 6, 6))
    jax.jit(function)(x)
    jax.jit(jax.grad(lambda x: jnp.sum(function(x))))(x)
    assert specs and set(specs) == {made}


def test_an_array_that_is_there_was_made_by_nothing(specs):
    normalised(convolved(jnp.ones((2, 4, 6, 6))))
    assert specs == [False]


def test_the_layer_knows_what_a_convolution_made(specs):
    import equinox as eqx

    conv = eqx.nn.Conv2d(4, 4, 3, padding=1, key=jax.random.key(0))
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(4, "batch", "batch", backend="spy")

    def network(x, state):
        return norm(conv(x), state)

    jax.jit(jax.vmap(network, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))(jnp.ones((2, 4, 6, 6)), state)
    assert specs == [True]


# Files


@pytest.mark.parametrize("where", ["file", "folder", "package"])
def test_a_file_is_used_wherever_it_is(where, tmp_path, monkeypatch):
    path = tmp_path / ("mine.json" if where == "file" else "nvidia-h200.json")
    path.write_text(text(entry()))
    monkeypatch.setattr(files, "FOLDER", tmp_path if where == "package" else tmp_path / "none")
    if where == "package":
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, str(path if where == "file" else tmp_path))
    assert choose(problem()).name == "pallas_gpu"


def test_the_users_file_is_asked_before_the_packages(file, monkeypatch):
    packaged = file.parent / "package" / file.name
    packaged.parent.mkdir()
    packaged.write_text(text(entry(), entry(10)))
    monkeypatch.setattr(files, "FOLDER", packaged.parent)
    file.write_text(text(entry(pallas_gpu=2.9e-5)))
    assert choose(problem()).name == "triton" and choose(problem(10)).name == "pallas_gpu"
    assert files.in_use(KIND) == [
        f"{file} (by BN_FUSED_TUNING), classes: 1",
        f"{packaged} (from the package), classes: 2",
    ]
    file.write_text("{")
    assert files.in_use(KIND)[0] == f"{file} (by BN_FUSED_TUNING) is ignored: it is not JSON"
    assert files.in_use("Some GPU")[1:] == ["no file for Some GPU: plans are made by rule, and auto takes jnp"]


def stored(**changes):
    """The text of a file whose one entry has these changes."""
    one = json.loads(text(entry()))["entries"][0]
    return text(entries=[one | changes])


def measurement(**changes):
    one = json.loads(text(entry()))["entries"][0]["backends"]
    return stored(backends=one | {"triton": one["triton"] | changes})


DAMAGED = {
    "nothing": (None, "it cannot be read"),
    "not JSON": ("{", "it is not JSON"),
    "JSON too deep": ("[" * 200_000, "it is not JSON"),
    "not text": (b"\xff\xfe\x00", "it is not JSON"),
    "a list": ("[]", "not a tuning file"),
    "another format": (text(entry(), format=1), "its format is 1"),
    "of another device": (text(entry(), device_kind="NVIDIA A100-SXM4-80GB"), "its device_kind is 'NVIDIA A100"),
    "no entries": (text(entries=None), "entries are missing"),
    "no revisions": (text(entry(), revisions=None), "revisions or entries are missing"),
    "an entry that is none": (text(entries=[3]), "an entry is 3"),
    "no backend": (stored(backends={}), "an entry is"),
    "a field too many": (stored(more=1), "an entry is"),
    "a size of text": (stored(rows="100352"), "the rows of an entry is '100352'"),
    "a size that no number of 64 bits has": (stored(rows=10**400), "the rows of an entry is 1000"),
    "a size of 0": (stored(rows=0), "the rows of an entry is 0"),
    "an unknown activation": (stored(activation="tanh"), "the activation of an entry is 'tanh'"),
    "a time that is none": (measurement(seconds=-1.0), "the seconds of a measurement of triton is -1"),
    "a time of text": (measurement(by_rule="1"), "the by_rule of a measurement of triton is '1'"),
}
# These the backend finds, and the rest of the file stands.
CONFIGURATIONS = {
    "seven warps": {"warps": 7},
    "slabs of half a byte": {"slab_bytes": 0.5},
    "slabs of less than nothing": {"slab_bytes": -1},
    "too many stages": {"stages": 9},
    "a field too many": {"more": 1},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_is_no_use_is_ignored_with_one_warning(name, tmp_path, monkeypatch):
    content, reason = DAMAGED[name]
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr(files, "FOLDER", tmp_path / "none")
    with pytest.warns(UserWarning, match=f"tuning.json is ignored: .*{reason}") as warned:
        assert choose(problem()).name == "jnp"
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(problem()).name == "jnp" and choose(problem(50176)).name == "jnp"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_is_none_is_ignored_with_one_warning(name, file):
    file.write_text(measurement(config=dataclasses.asdict(CONFIG) | CONFIGURATIONS[name]))
    with pytest.warns(UserWarning, match="a configuration of triton is") as warned:
        assert choose(problem(), "triton").plan == limits.plan(problem(), H200)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(problem(), "triton").plan == limits.plan(problem(), H200)
        assert choose(problem()).name == "pallas_gpu"


def test_a_plan_that_cannot_run_is_ignored_with_one_warning(file, monkeypatch):
    file.write_text(text(entry()))
    refusing = dataclasses.replace(
        registry._BACKENDS["triton"], plan_refusal=lambda plan, problem, target: "there is no room"
    )
    monkeypatch.setitem(registry._BACKENDS, "triton", refusing)
    with pytest.warns(UserWarning, match="its plan for 100352 rows .* cannot run: there is no room"):
        assert choose(problem(), "triton").plan == limits.plan(problem(), H200)


def test_figures_of_earlier_kernels_are_ignored_with_one_warning_and_the_others_stand(file):
    file.write_text(text(entry(), revisions=REVISIONS | {"pallas_gpu": 0}))
    with pytest.warns(UserWarning, match=r"pallas_gpu's kernels are at revision \d+, and were at 0") as warned:
        assert choose(problem()).name == "triton"
    assert len(warned) == 1


def test_what_cannot_be_a_path_is_ignored_with_a_warning(monkeypatch):
    monkeypatch.setenv(VARIABLE, "x" * 5000)
    with pytest.warns(UserWarning, match="is ignored: it cannot be read"):
        choose(problem(), "triton")


def test_a_folder_without_a_file_for_the_device_is_named(file):
    (file.parent / "nvidia-a100.json").write_text(text(entry()))
    assert files.in_use(KIND)[0] == f"{file.parent} (by BN_FUSED_TUNING) has no nvidia-h200.json"


def test_a_file_that_is_mended_is_read_again(file):
    file.write_text("{")
    with pytest.warns(UserWarning, match="is ignored"):
        choose(problem())
    file.write_text(text(entry()))
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution is
    assert choose(problem()).name == "pallas_gpu"


def test_the_files_in_the_package_are_of_these_kernels():
    for path in FOLDER.glob("*.json"):
        kind = json.loads(path.read_text())["device_kind"]
        revisions, entries = files.read(path, kind)
        assert path.name == files.file_name(kind) and revisions == {name: REVISIONS[name] for name in revisions}
        assert entries


# Configurations


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("sizes", [(100352, 64), (6272, 2048), (401408, 256), (37, 128)])
@pytest.mark.parametrize("name", ["pallas_gpu", "triton"])
def test_a_search_set_begins_with_the_rule_and_survives_being_stored(name, sizes, residual):
    backend = registry._BACKENDS[name]
    asked = problem(*sizes, residual=residual)
    found = backend.tuning.search_set(asked, H200)
    plans = [backend.plan(asked, H200, config) for config in found]
    assert plans[0] == backend.plan(asked, H200)
    assert len({json.dumps(dataclasses.asdict(config)) for config in found}) == len(found)
    for config, plan in zip(found, plans, strict=True):
        assert backend.tuning.parse(json.loads(json.dumps(dataclasses.asdict(config)))) == config
        assert backend.plan_refusal(plan, asked, H200) is None
    if name == "pallas_gpu":
        forward, backward = found[0], found[-1]
        joined = backend.plan(asked, H200, backend.tuning.combine(forward, backward))
        assert (joined.forward, joined.backward) == (plans[0].forward, plans[-1].backward)
