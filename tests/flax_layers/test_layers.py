"""`bn_fused.nnx.BatchNorm` and `bn_fused.linen.BatchNorm` beside flax's own: values, variables, dtypes, errors."""

import dataclasses
import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused

from support.tolerances import assert_close, assert_same_bits, eps

pytest.importorskip("flax", reason="flax is not installed: the extra `flax`")

from flax import linen, nnx

from support.flax_layers import APIS, NAMES, checkpoint, pair

# flax promotes dtypes of parameters and inputs.
pytestmark = pytest.mark.usefixtures("standard_promotion")
CHANNELS = 5
every_api = pytest.mark.parametrize("api", APIS)


def data(seed=0, shape=(8, 3, 4, CHANNELS), dtype=np.float32):
    return jnp.asarray(2 + 3 * np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_alike(actual, expected, what="y"):
    """The same dtype, and values as close as two orders of the same operations in it."""
    assert actual.dtype == expected.dtype, what
    expected = np.asarray(expected, np.float64)
    assert_close(np.asarray(actual, np.float64), expected, np.max(np.abs(expected)), dtype=actual.dtype, what=what)


def test_importing_the_package_does_not_import_flax():
    program = "import sys, bn_fused; print([name for name in sys.modules if name.split('.')[0] == 'flax'])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_the_arguments_are_flaxs_and_ours():
    settings = ["approach", "warmup_period", "activation", "debias", "virtual_batch_size", "backend"]
    fields = {field.name: field.default for field in dataclasses.fields(bn_fused.linen.BatchNorm)}
    flaxs = {field.name: field.default for field in dataclasses.fields(linen.BatchNorm)}
    assert [name for name in fields if name not in flaxs] == settings
    assert {name: fields[name] for name in flaxs} == flaxs
    # Of nnx's every argument is in our documentation: a new one of flax is to be looked at.
    flaxs = list(inspect.signature(nnx.BatchNorm.__init__).parameters)[1:]
    assert [name for name in flaxs if f"`{name}`" not in bn_fused.nnx.BatchNorm.__init__.__doc__] == []
    own = list(inspect.signature(bn_fused.nnx.BatchNorm.__init__).parameters)[1:]
    assert own == [flaxs[0], *settings, *flaxs[1:]]
    for cls, base in ((bn_fused.nnx.BatchNorm, nnx.BatchNorm), (bn_fused.linen.BatchNorm, linen.BatchNorm)):
        ours = list(inspect.signature(cls.__call__).parameters)
        assert ours == [*inspect.signature(base.__call__).parameters, "residual"]


@every_api
@pytest.mark.parametrize("settings", [{}, {"use_scale": False}, {"use_bias": False}, {"param_dtype": jnp.bfloat16}])
def test_a_new_layer_has_flaxs_variables_and_two_scalars(api, settings):
    initialisers = {name: jax.nn.initializers.normal() for name in ("scale_init", "bias_init")}
    flaxs, ours = (layer.values() for layer in pair(api, CHANNELS, **settings, **initialisers))
    assert {name: float(ours.pop(name)) for name in ("zero_frac", "count")} == {"zero_frac": 1, "count": 0}
    assert ours.keys() == flaxs.keys()
    for name, value in flaxs.items():
        assert_same_bits(ours[name], value, name)


@every_api
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("dtype", "asked"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16")])
def test_a_checkpoint_of_flax_infers_and_trains_on_as_with_flax(api, use_scale, use_bias, dtype, asked):
    settings = dict(use_scale=use_scale, use_bias=use_bias, dtype=asked, momentum=0.9)
    flaxs, ours = pair(api, CHANNELS, **settings)
    for layer in (flaxs, ours):
        layer.load(checkpoint(CHANNELS, settings))
    assert_alike(ours(data(0, dtype=dtype), True), flaxs(data(0, dtype=dtype), True))
    for step in range(4):
        assert_alike(ours(data(step, dtype=dtype), False), flaxs(data(step, dtype=dtype), False))
    for name in ("mean", "var"):  # flax's variance is E[x²] - E[x]²
        assert_close(ours.values()[name], flaxs.values()[name], 20, what=name)
    if api == "linen":
        assert "zero_frac" not in ours.values() and "count" not in ours.values()
    else:
        assert ours.values()["zero_frac"] == 0
    assert_alike(ours(data(9, dtype=dtype), True), flaxs(data(9, dtype=dtype), True))


@every_api
@pytest.mark.parametrize("approach", ["batch", "ema", "ema_compatibility"])
def test_each_step_is_that_of_the_function(api, approach):
    settings = dict(approach=approach, warmup_period=3, activation="relu", debias="samples")
    _, ours = pair(api, CHANNELS, ours=settings, momentum=0.9, epsilon=1e-3)
    stats = bn_fused.RunningStats.init(CHANNELS)
    ones, zeros = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
    for step in range(5):
        x, residual = data(step), data(step + 10)
        y = ours(x, False, residual=residual)
        wanted, stats = bn_fused.batch_norm(
            x, stats, ones, zeros, eps=1e-3, momentum=0.9, residual=residual, **settings
        )
        assert_close(y, wanted, np.max(np.abs(wanted)))
        values = ours.values()
        # Three roundings in each step, of the mean and of what it is multiplied by and divided by.
        for name, moment in zip(("mean", "var"), stats.moments(), strict=True):
            assert_close(values[name], moment, what=name)
        assert (values["zero_frac"], values["count"]) == (stats.zero_frac, stats.count)
    y = ours(data(20), True)
    wanted, _ = bn_fused.batch_norm(data(20), stats, ones, zeros, eps=1e-3, activation="relu", inference=True)
    assert_close(y, wanted, np.max(np.abs(wanted)))


@every_api
def test_statistics_are_right_from_the_first_step_and_flax_reads_them(api):
    flaxs, ours = pair(api, CHANNELS)
    x = data()
    assert_close(ours(x, True), np.asarray(x, np.float64) / np.sqrt(1 + 1e-5), np.max(np.abs(x)))
    ours(x, False)
    values, exact = ours.values(), np.asarray(x, np.float64)
    assert_close(values["mean"], exact.mean((0, 1, 2)), 3, what="mean")
    assert_close(values["var"], exact.var((0, 1, 2)), what="var")
    flaxs.load({name: values[name] for name in NAMES})
    assert_alike(flaxs(x, True), ours(x, True))


@every_api
def test_the_warm_up_goes_on_in_what_lacks_its_counter(api):
    _, ours = pair(api, CHANNELS, ours=dict(approach="ema", warmup_period=4))
    ours.load(checkpoint(CHANNELS))
    stats = bn_fused.RunningStats.of(*(checkpoint(CHANNELS)[name] for name in ("mean", "var")))
    for step in range(3):
        ours(data(step), False)
        _, stats = bn_fused.batch_norm(data(step), stats, approach="ema", warmup_period=4, momentum=0.99)
        assert ours.values()["count"] == stats.count == step + 1
    assert_close(ours.values()["mean"], stats.mean, 3)


MASKS = {"of examples": (8, 1, 1, 1), "of positions": (8, 3, 4, 1), "of a row": (4, 1), "for all": (1,)}


@every_api
@pytest.mark.parametrize("kind", [np.bool_, np.float32])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_flaxs(api, name, kind):
    flaxs_kind = np.bool_ if api == "nnx" else kind  # flax's nnx takes bool alone
    mask = np.random.default_rng(1).random(MASKS[name]) < 0.6
    mask.flat[0] = True
    flaxs, ours = pair(api, CHANNELS)
    for layer in (flaxs, ours):
        layer.load(checkpoint(CHANNELS))
    y = ours(data(), False, mask=jnp.asarray(mask, kind))
    assert_alike(y, flaxs(data(), False, mask=jnp.asarray(mask, flaxs_kind)))
    assert_close(ours.values()["var"], flaxs.values()["var"], 20)


@every_api
@pytest.mark.parametrize("zero_frac", [1, 0.7, None])
def test_where_nothing_counts_the_variables_stay_to_the_bit(api, zero_frac):
    channels = 200  # some of which multiplying and dividing by 1 - zero_frac would change
    _, ours = pair(api, channels)
    if zero_frac != 1:
        own = {} if zero_frac is None else {"zero_frac": np.float32(zero_frac)}
        ours.load(checkpoint(channels) | own | {"count": np.float32(0)})
    before, x = ours.values(), data(7, (8, channels))
    y = ours(x, False, mask=jnp.zeros((8, 1), bool))
    if api == "nnx" and zero_frac is None:
        before["zero_frac"] = np.zeros_like(before["zero_frac"])  # it was a new layer's
    for name, value in ours.values().items():
        assert_same_bits(value, before[name], name)
    assert_alike(y, ours(x, True))


@every_api
@pytest.mark.parametrize(("axis", "shape"), [(0, (CHANNELS, 4, 6)), (1, (8, CHANNELS, 4)), (-2, (8, CHANNELS, 4))])
def test_features_on_any_axis(api, axis, shape):
    flaxs, ours = pair(api, CHANNELS, axis=axis)
    for layer in (flaxs, ours):
        layer.load(checkpoint(CHANNELS))
    x, mask_shape = data(0, shape), [*shape]
    mask_shape[axis] = 1
    mask = jnp.asarray(np.random.default_rng(1).random(mask_shape) < 0.7)
    for inference in (False, True):
        assert_alike(ours(x, inference, mask=mask), flaxs(x, inference, mask=mask))
    assert_close(ours.values()["var"], flaxs.values()["var"], 20)
    y = ours(x, True, residual=x.astype(jnp.bfloat16))
    assert_close(y, ours(x, True) + x.astype(jnp.bfloat16).astype(jnp.float32), 20)


@every_api
def test_single_examples_under_vmap_with_a_name(api):
    flaxs, ours = pair(api, CHANNELS)
    named = APIS[api](APIS[api].ours, CHANNELS, axis_name="batch")
    x = data(0, (8, CHANNELS))
    wanted = flaxs(x, False)
    if api == "linen":
        y, updated = jax.vmap(
            lambda x: named.layer.apply(named.variables, x, use_running_average=False, mutable=["batch_stats"]),
            axis_name="batch",
            out_axes=(0, None),
        )(x)
        named.variables |= updated
    else:
        axes = nnx.StateAxes({nnx.BatchStat: None, nnx.Param: None})
        y = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="batch")(named.layer, x)
    assert_alike(y, wanted)
    ours(x, False)
    for name, value in ours.values().items():
        assert_close(named.values()[name], value, 3, what=name)


@every_api
def test_gradients_are_flaxs(api):
    flaxs, ours = pair(api, CHANNELS)
    gradients = []
    for layer in (flaxs, ours):
        layer.load(checkpoint(CHANNELS))

        def loss(x, layer=layer):
            return jnp.sum(jnp.sin(layer(x, True)) * data(1))

        gradients.append(jax.grad(loss)(data()) if api == "linen" else nnx.grad(loss)(data()))
    assert_alike(*reversed(gradients))


@every_api
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"approach": "fast"}, "approach is 'fast'"),
        ({"axis": (1, 2)}, r"axis is \(1, 2\)"),
        ({"axis": 4}, "axis is 4"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"debias": None}, "debias is None"),
        ({"backend": "cuda"}, "cuda"),
        ({"activation": jax.nn.relu}, "activation is"),
        ({"axis_name": 3}, "axis_name"),
        ({"axis_index_groups": [[0], [1, 2]]}, "axis_index_groups"),
        ({"param_dtype": jnp.int32}, "param_dtype is int32; accepted are float32"),
    ],
    # A function is written with its address, which is another in each process.
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_settings_that_are_not_accepted_are_named(api, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        if api == "nnx":
            bn_fused.nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0), **settings)(data())
        else:
            bn_fused.linen.BatchNorm(**settings).init(jax.random.key(0), data(), use_running_average=False)


@every_api
def test_calls_that_are_not_accepted_are_named(api):
    _, ours = pair(api, CHANNELS)
    for shape in ((8, 3, 4, CHANNELS), (CHANNELS,), (8, 1, 1, CHANNELS)):
        with pytest.raises(ValueError, match="mask has shape .* a value for each feature on axis 3"):
            ours(data(), False, mask=jnp.ones(shape, bool))
    for shape in ((7, 1, 1, 1), (1, 8, 3, 4, 1)):
        with pytest.raises(ValueError, match="mask has shape .* broadcasts to x's"):
            ours(data(), False, mask=jnp.ones(shape, bool))
    with pytest.raises(ValueError, match=r"residual has shape \(8, 5\)"):
        ours(data(), False, residual=jnp.ones((8, 5)))
    with pytest.raises(TypeError, match="^x has dtype complex64: complex"):
        ours(data().astype(jnp.complex64), False)
    for call in (bn_fused.with_settings, lambda model: bn_fused.from_equinox(model, None)):
        for model in (ours.layer, {"norm": ours.layer}):
            with pytest.raises(ValueError, match="model has no .*flax's, and .* for Equinox models"):
                call(model)
    for x in (None, "x"):
        with pytest.raises(TypeError, match=f"x is {x!r}; accepted is an array"):
            ours(x, False)
    named = APIS[api](APIS[api].ours, CHANNELS, axis_name="data")
    with pytest.raises(NameError, match="'data'.*examples of x need no name"):
        named(data(), False)
    if api == "linen":
        with pytest.raises(ValueError, match="force_float32_reductions is False"):
            bn_fused.linen.BatchNorm(force_float32_reductions=False, use_running_average=True).init(
                jax.random.key(0), data()
            )
    else:
        with pytest.raises(ValueError, match="9 features on axis 1; the layer has 5"):
            ours(data(0, (8, 9)), True)
        for name in ("scale", "bias"):
            changed = bn_fused.nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))
            setattr(changed, name, nnx.Param(jnp.ones(CHANNELS + 1)))
            with pytest.raises(ValueError, match=rf"{name} has shape \(6,\); accepted is \(5,\)"):
                changed(data())
        with pytest.raises(ValueError, match="use_running_average is None"):
            bn_fused.nnx.BatchNorm(CHANNELS, use_running_average=None, rngs=nnx.Rngs(0))(data())


@every_api
def test_integers_are_promoted_as_flax_does(api):
    flaxs, ours = pair(api, CHANNELS)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 255, (8, CHANNELS)), jnp.uint8)
    assert_alike(ours(x, False), flaxs(x, False))


@every_api
def test_inference_of_the_reference_is_in_jaxs_own_operations(api):
    """Which exporters translate one by one."""
    programs = []
    for backend in ("auto", "reference"):
        layer = APIS[api](APIS[api].ours, CHANNELS, backend=backend, activation="relu").layer
        if api == "linen":
            variables = layer.init(jax.random.key(0), data(), use_running_average=True)
            infer = functools.partial(layer.apply, variables, use_running_average=True)
        else:
            infer = functools.partial(layer, use_running_average=True)
        programs.append("bn_fused" in str(jax.make_jaxpr(infer)(data())))
    assert programs == [True, False]


def test_rounding_of_the_stored_moments_does_not_grow():
    """Multiplied and divided by 1 - zero_frac in each step, they stay the exact average to its own rounding."""
    layer = bn_fused.nnx.BatchNorm(2, momentum=0.99, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda layer, x: layer(x))
    sums, weight = np.zeros((2, 2)), 0.0
    for seed in range(150):
        x = data(seed, (16, 2))
        step(layer, x)
        exact = np.asarray(x, np.float64)
        m = np.float64(np.float32(0.99))
        sums = m * sums + (1 - m) * np.stack([exact.mean(0), exact.var(0)])
        weight = m * weight + (1 - m)
    stored = np.stack([layer.mean[...], layer.var[...]]).astype(np.float64)
    np.testing.assert_allclose(stored, sums / weight, rtol=3 * eps(np.float32) / (1 - 0.99))
