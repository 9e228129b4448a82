"""The raw operation `fused_batch_norm`, and how a backend plugs in and is chosen."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.kernels.activations import ACTIVATIONS, Activation
from bn_fused.kernels.backends.jnp import BACKEND
from bn_fused.kernels.backends.jnp.plan import Plan

from support.kernel_cases import BATCH, BLEND, CASES, Case
from support.kernel_results import as_given, check_step, operands
from support.tolerances import assert_close
from support.versions import ON_THE_NEWEST_JAX

ROWS, CHANNELS, GROUPS = 24, 5, 3

# The others are slow. Of two cases once more in float64.
DEFAULT = {
    "auto": (
        "far from zero", "groups", "groups far from zero", "residual without activation", "bfloat16", "float16, gelu",
        "3 channels", "65 channels", "130 channels",
    ),
    "reference": ("groups", "136 channels", "bfloat16"),
}  # fmt: skip
ON_AN_OLDER_JAX = ("far from zero", "groups", "float16, gelu", "3 channels")
DOUBLE = {"auto": "200 rows", "reference": "256 rows"}


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(
            backend,
            name,
            marks=pytest.mark.slow if name not in default else () if name in ON_AN_OLDER_JAX else ON_THE_NEWEST_JAX,
        )
        for backend, default in DEFAULT.items()
        for name in CASES
    ],
)
def test_values_and_all_gradients_agree_with_float64(backend, name):
    check_step(CASES[name], backend)


@pytest.mark.parametrize(("backend", "name"), DOUBLE.items())
def test_values_and_all_gradients_agree_in_float64(backend, name, x64):
    check_step(dataclasses.replace(CASES[name], dtype="float64"), backend)


def test_a_wrong_gradient_does_not_agree(broken_backend):
    with pytest.raises(AssertionError, match="gradient of x"):
        check_step(CASES["groups"], broken_backend)


def arrays_of(groups=1):
    """Operands of a step without coefficients and cotangents, by name."""
    case = Case(ROWS, CHANNELS, groups=groups)
    arrays = as_given(case, operands(case))
    return {name: arrays[name] for name in ("x", "weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_vmap_of_it_is_its_groups(backend):
    arrays, coefficients = arrays_of(GROUPS), kernels.Coefficients(*BLEND)

    def one(x, weight, bias, mean, var):
        return kernels.fused_batch_norm(
            x, weight, bias, mean, var, coefficients, eps=1e-5, activation="silu", backend=backend
        )

    values = list(arrays.values())
    mapped = jax.jit(jax.vmap(one))(*values)
    grouped = jax.jit(one)(*values)
    single = [jax.jit(one)(*(value[group] for value in values)) for group in range(GROUPS)]
    for index, (over_axis, over_groups) in enumerate(zip(mapped, grouped, strict=True)):
        assert_close(over_axis, np.asarray(over_groups, np.float64), 1 + np.abs(over_groups))
        apart = np.stack([np.asarray(results[index], np.float64) for results in single])
        assert_close(over_axis, apart, 1 + np.abs(apart))


def test_gradients_of_a_vmap_with_shared_parameters_sum_over_the_mapped_axis():
    arrays = arrays_of(GROUPS)
    others = [arrays[name][0] for name in ("bias", "running_mean", "running_var")]

    def one(weight, x):
        y, *_ = kernels.fused_batch_norm(x, weight, *others, kernels.Coefficients(*BATCH), eps=1e-5)
        return jnp.sum(y**3)

    def all_groups(weight, x):
        return jnp.sum(jax.vmap(one, in_axes=(None, 0))(weight, x))

    weight = arrays["weight"][0]
    together = jax.jit(jax.grad(all_groups))(weight, arrays["x"])
    of_one = jax.jit(jax.grad(one))
    apart = [np.asarray(of_one(weight, x), np.float64) for x in arrays["x"]]
    # A sum of `ROWS` cubes times xhat, each of order ten, in every group.
    assert_close(together, sum(apart), sum(map(np.abs, apart)) + 10 * ROWS * GROUPS)


def test_layers_that_are_alike_are_one_function_of_the_program_and_keep_their_names():
    stats = bn_fused.RunningStats.init(CHANNELS)

    def loss(x, layers):
        for layer in range(layers):
            with jax.named_scope(f"layer{layer}"):
                x = jnp.sin(bn_fused.batch_norm(x, stats, channel_axis=-1, backend="jnp")[0])
        return x.sum()

    def lowered(layers):
        return jax.jit(jax.grad(loss), static_argnums=1).lower(
            jax.ShapeDtypeStruct((ROWS, CHANNELS), "float32"), layers
        )

    assert lowered(2).as_text().count("stablehlo.rsqrt") == lowered(5).as_text().count("stablehlo.rsqrt") > 0
    compiled = lowered(5).compile().as_text()
    of_layers = [line for line in compiled.splitlines() if "bn_fused" in line and "layer" in line]
    assert all(any(f"layer{layer}" in line for line in of_layers) for layer in range(5))


def test_bad_arguments_are_named():
    good = {**arrays_of(), "coefficients": kernels.Coefficients(*BATCH), "eps": 1e-5}
    bad = [
        ({"x": jnp.ones(4)}, ValueError, "x"),
        ({"x": jnp.ones((0, CHANNELS))}, ValueError, "nothing to average"),
        ({"x": jnp.ones((ROWS, CHANNELS), jnp.int32)}, TypeError, "int32"),
        ({"weight": jnp.ones(2)}, ValueError, "weight"),
        ({"bias": jnp.ones((2, CHANNELS))}, ValueError, "bias"),
        ({"running_mean": jnp.ones(2)}, ValueError, "running_mean"),
        ({"running_var": jnp.ones(2)}, ValueError, "running_var"),
        ({"residual": jnp.ones((1, CHANNELS))}, ValueError, "residual"),
        ({"activation": "tanh"}, ValueError, "tanh"),
        ({"weight": None}, TypeError, "weight is None"),
        ({"running_var": jnp.ones(CHANNELS, jnp.bfloat16)}, TypeError, "running_var has dtype bfloat16.*float32"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"eps": "a"}, TypeError, "eps is 'a'"),
        ({"coefficients": (1.0, 0.0)}, TypeError, "Coefficients"),
        ({"coefficients": good["coefficients"]._replace(keep=jnp.ones(3))}, ValueError, "coefficients.keep.*(3,)"),
        ({"backend": "cudnn"}, ValueError, "cudnn"),
    ]
    for change, error, word in bad:
        with pytest.raises(error, match=word):
            kernels.fused_batch_norm(**{**good, **change})


# --- backends -----------------------------------------------------------------------------------------------


def test_the_backends_there_are():
    assert {"jnp", "reference"} <= set(kernels.backend_names())
    assert "auto" not in kernels.backend_names()


@pytest.fixture
def tpu_only():
    """A backend for TPUs only, which computes as jnp does and notes what it was asked to compute."""
    asked = []

    def counting(name, operation):
        def compute(**values):
            asked.append(name)
            return operation(**values)

        return compute

    backend = kernels.Backend(
        "fake_tpu",
        {name: counting(name, operation) for name, operation in BACKEND.operations.items()},
        refusal=lambda problem, target: None if target.platform == "tpu" else "it is written for TPUs",
        verdict=lambda problem, target: kernels.auto.Verdict(True, "a test prefers it"),
        plan=lambda problem, target: ("plan", problem.rows, problem.channels),
    )
    kernels.register(backend)
    yield types.SimpleNamespace(name="fake_tpu", asked=asked)
    kernels.unregister("fake_tpu")


def raw(backend):
    rest = arrays_of()
    x, coefficients = rest.pop("x"), kernels.Coefficients(*BATCH)

    @jax.jit
    def run(x):
        return kernels.fused_batch_norm(x, **rest, coefficients=coefficients, eps=1e-5, backend=backend)[0]

    return run, x


def through_the_function(backend):
    x = arrays_of()["x"]
    stats = bn_fused.RunningStats.init(CHANNELS)
    return jax.jit(lambda x: bn_fused.batch_norm(x, stats, backend=backend)[0]), x


def through_the_layer(backend):
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch", backend=backend)
    run = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return jax.jit(lambda x: run(x, state)[0]), arrays_of()["x"]


ENTRANCES = [raw, through_the_function, through_the_layer]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_named_backend_that_cannot_run_says_where_and_why(tpu_only, entrance):
    run, x = entrance("fake_tpu")
    with pytest.raises(bn_fused.BackendError, match=r"(?s)'fake_tpu'.* cpu.*written for TPUs"):
        run.lower(x)
    with pytest.raises(bn_fused.BackendError, match="'fake_tpu'"):
        run(x)
    assert not tpu_only.asked


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("backend", ["auto", "fake_tpu"])
def test_the_backend_is_resolved_for_the_platform_it_is_lowered_for(tpu_only, entrance, backend):
    """On this machine without a TPU: lowered for one, the TPU's backend computes."""
    run, x = entrance(backend)
    run.trace(x).lower(lowering_platforms=("tpu",))
    assert tpu_only.asked == ["forward"]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_one_lowering_for_two_platforms_resolves_each(tpu_only, entrance):
    run, x = entrance("auto")
    run.trace(x).lower(lowering_platforms=("cpu", "tpu"))
    assert tpu_only.asked == ["forward"]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_auto_passes_over_a_backend_that_cannot_run(tpu_only, entrance):
    run, x = entrance("auto")
    expected, _ = entrance("jnp")
    np.testing.assert_array_equal(run(x), expected(x))
    assert not tpu_only.asked


@pytest.mark.parametrize(("target", "by_name"), [("cpu", ""), ("h200", "pallas_gpu"), ("v5e", "pallas_tpu")])
def test_the_reason_of_auto_says_what_jnp_is_and_which_kernels_run_by_name(target, by_name):
    choice = bn_fused.explain((32, 64, 56, 56), jnp.bfloat16, channel_axis=1, target=target)
    assert choice.name == "jnp" and choice.reason.startswith("plain jnp, which XLA compiles for")
    assert (f"; {by_name} runs by name: " in choice.reason) if by_name else ("by name" not in choice.reason)
    # each backend that is not taken, with its reason
    for name in ("pallas_gpu", "pallas_tpu"):
        assert choice.reason.count(f"; {name} ") == 1


def test_explain_names_backend_reason_and_plan(tpu_only):
    here = bn_fused.explain((ROWS, CHANNELS), jnp.float32, target="cpu")
    assert isinstance(here, bn_fused.BackendChoice)
    assert here.name == "jnp" and here.plan.fold == 16
    assert "fake_tpu" in here.reason and "written for TPUs" in here.reason
    there = bn_fused.explain((ROWS, CHANNELS), jnp.float32, target="tpu")
    assert there.name == "fake_tpu" and there.plan == ("plan", ROWS, CHANNELS)
    assert "a test prefers it" in there.reason
    with pytest.raises(bn_fused.BackendError, match=r"(?s)fake_tpu.*cuda.*written for TPUs"):
        bn_fused.explain((ROWS, CHANNELS), jnp.float32, target="cuda", backend="fake_tpu")
    named = bn_fused.explain((ROWS, CHANNELS), jnp.float32, target="tpu", backend="jnp")
    assert named.name == "jnp" and named.reason


def test_a_plan_overrides_the_backends_own_and_must_be_of_its_type():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, CHANNELS)), jnp.float32)
    ones, zeros = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
    coefficients = kernels.Coefficients(1.0, 0.0, 0.0, 0.1, 0.1, 0.9)

    def compiled_with(plan):
        def run(x):
            return kernels.fused_batch_norm(x, ones, zeros, zeros, ones, coefficients, eps=1e-5, plan=plan)

        return jax.jit(run).lower(x).as_text()

    folded, plain = compiled_with(Plan(fold=16)), compiled_with(Plan())
    assert compiled_with(None) == folded
    assert "reduce_precision" in folded and "reduce_precision" not in plain
    with pytest.raises(TypeError, match=r"plan.*3.*jnp.*Plan"):
        compiled_with(3)


def test_explain_counts_rows_without_the_channel_axis(tpu_only):
    choice = bn_fused.explain((8, CHANNELS, 4, 6), jnp.bfloat16, channel_axis=1, target="tpu")
    assert choice.plan == ("plan", 8 * 4 * 6, CHANNELS)


def test_explain_defaults_to_where_jax_computes():
    assert bn_fused.explain((4, 3), jnp.float32) == bn_fused.explain((4, 3), jnp.float32, target=jax.default_backend())


def test_explain_and_the_function_agree(tpu_only):
    """What `explain` says is what is lowered."""
    choice = bn_fused.explain((ROWS, CHANNELS), jnp.float32, target="tpu")
    run, x = through_the_function("auto")
    run.trace(x).lower(lowering_platforms=("tpu",))
    assert (choice.name == "fake_tpu") == bool(tpu_only.asked)


def test_a_new_line_in_the_table_of_activations_is_all_that_a_new_activation_needs(monkeypatch):
    """For every backend but triton, which has its own functions and refuses by name what those do not know."""
    tanh = Activation(jnp.tanh, jnp.tanh, lambda x: 1 - jnp.square(jnp.tanh(x)), transcendental=True)
    monkeypatch.setitem(ACTIVATIONS, "tanh", tanh)
    x, stats = arrays_of()["x"], bn_fused.RunningStats.init(CHANNELS)

    def gradient(backend):
        return jax.grad(lambda x: jnp.sum(bn_fused.batch_norm(x, stats, activation="tanh", backend=backend)[0] ** 3))(x)

    assert_close(gradient("jnp"), np.asarray(gradient("reference"), np.float64), 10)
    for target, backend in (("h200", "pallas_gpu"), ("v5e", "pallas_tpu")):
        assert bn_fused.explain((4096, 128), jnp.float32, activation="tanh", target=target, backend=backend).plan
    with pytest.raises(bn_fused.BackendError, match="take the activations .*, not tanh"):
        bn_fused.explain((4096, 128), jnp.float32, activation="tanh", target="h200", backend="triton")


def test_a_backends_name_is_new_and_its_operations_complete():
    complete = dict.fromkeys(("forward", "backward", "moments", "moments_backward", "normalise", "normalise_backward"))
    for name in ("jnp", "reference", "auto"):
        with pytest.raises(ValueError, match=name):
            kernels.register(kernels.Backend(name, complete))
    with pytest.raises(ValueError, match=r"half.*backward"):
        kernels.register(kernels.Backend("half", {"forward": None}))
    with pytest.raises(ValueError, match="unheard of"):
        kernels.unregister("unheard of")


def test_backend_error_is_a_value_error():
    assert issubclass(bn_fused.BackendError, ValueError)


@pytest.mark.parametrize("chip", kernels.CHIPS.values(), ids=lambda chip: chip.name)
def test_a_kernel_is_either_refused_on_a_chip_or_auto_knows_where_it_is_judged(chip):
    """TPUs by a line in a table, GPUs by a file that may be missing: every GPU backend can be tuned."""
    target, problem = kernels.Target(chip.platform, chip), kernels.Problem(1, 4096, 128, "float32")
    for name in ("pallas_gpu", "pallas_tpu", "triton"):
        backend = kernels.registry._BACKENDS[name]
        in_table = (name, chip.name) in kernels.auto.VERDICTS
        assert in_table == (chip.platform == "tpu" and name == "pallas_tpu")
        assert in_table or backend.tuning is not None or backend.refusal(problem, target) is not None


def test_auto_takes_what_the_table_says(monkeypatch):
    taken = kernels.auto.Verdict(True, "1.3 times as fast in a test")
    monkeypatch.setattr(kernels.auto, "VERDICTS", {("pallas_tpu", "v5e"): taken})
    choice = bn_fused.explain((4096, 128), jnp.float32, target="v5e")
    assert choice.name == "pallas_tpu" and choice.reason.startswith(taken.why)
    assert bn_fused.explain((4096, 128), jnp.float32, target="v6e").name == "jnp"
    assert bn_fused.explain((4096, 128), jnp.float64, target="v5e").name == "jnp"
