"""`backend="reference"` is the definition, bit for bit: as written out below, and as Equinox writes it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bn_fused
from bn_fused.approaches import APPROACHES

from support.tolerances import assert_close, assert_same_bits
from support.versions import also_on_the_newest_jax

CHANNELS = 5
SHAPES = {"maps": (6, CHANNELS, 3, 7), "rows": (12, CHANNELS)}
EPS, MOMENTUM, WARMUP = 1e-5, 0.99, 3


def definition(approach, x, stats, weight, bias, debias, axis_name):
    """The formulas as they stand: one training step on one example x [channels, *spatial]."""
    m, (rm, rv, z, c) = MOMENTUM, stats

    def moments(y):
        mean = lax.pmean(jnp.mean(y), axis_name)
        var = lax.pmean(jnp.mean((y - mean) * jnp.conj(y - mean)), axis_name)
        return mean, jnp.maximum(0.0, var)

    def normalise(y, mean, var, w, b):
        out = (y - mean) / jnp.sqrt(var + EPS)
        return out if w is None else out * w + b

    mu, var = jax.vmap(moments)(x)
    if approach == "batch":
        n_axis = lax.psum(jnp.ones((), x.dtype), axis_name)
        n_pos = n_axis * (x.size // CHANNELS)
        k = {
            "axis": n_axis / jnp.maximum(n_axis - 1, EPS),
            "samples": n_pos / (n_pos - 1),
            "none": jnp.ones((), x.dtype),
        }[debias]
        new = ((1 - m) * mu + m * rm, (1 - m) * k * var + m * rv, z * m, c)
        norm_mean, norm_var = mu, var
    elif approach == "ema":
        new_z, new_c = z * m, jnp.minimum(c + 1, WARMUP)
        new = ((1 - m) * mu + m * rm, (1 - m) * var + m * rv, new_z, new_c)
        f = new_c.astype(x.dtype) / WARMUP
        norm_mean = (1 - f) * mu + f * (new_z * mu + new[0])
        norm_var = (1 - f) * var + f * (new_z * var + new[1])
    else:
        norm_mean = jnp.where(z == 1, mu, (1 - m) * mu + m * rm)
        norm_var = jnp.where(z == 1, var, (1 - m) * var + m * rv)
        new = (norm_mean, norm_var, 0.0 * z, c)
    y = jax.vmap(normalise)(x, norm_mean, norm_var, weight, bias)
    return y, bn_fused.RunningStats(*new)


def inference(x, stats, weight, bias):
    denominator = jnp.maximum(1 - stats.zero_frac, EPS)
    mean, var = stats.mean / denominator, stats.var / denominator

    def normalise(y, mean, var, w, b):
        out = (y - mean) / jnp.sqrt(var + EPS)
        return out if w is None else out * w + b

    return jax.vmap(normalise)(x, mean, var, weight, bias)


def inputs(shape, dtype, affine, steps):
    random = np.random.default_rng(0)
    xs = [jnp.asarray(3 + 2 * random.standard_normal(shape), dtype) for _ in range(steps)]
    if not affine:
        return xs, None, None
    weight, bias = (jnp.asarray(1 + random.standard_normal(CHANNELS), dtype) for _ in range(2))
    return xs, weight, bias


def layer_step(approach, weight, bias, debias, axis_name="batch"):
    """Our layer on the reference backend, as a function of a batch and RunningStats."""
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        CHANNELS,
        axis_name,
        approach,
        eps=EPS,
        momentum=MOMENTUM,
        warmup_period=WARMUP,
        debias=debias,
        channelwise_affine=weight is not None,
        backend="reference",
    )
    layer = eqx.tree_at(lambda tree: (tree.weight, tree.bias), layer, (weight, bias), is_leaf=lambda v: v is None)

    def step(x, stats):
        # A State may be updated once; the initial one is used again at every step.
        before = jax.tree.unflatten(*reversed(jax.tree.flatten(state)))
        before = before.set(layer.state_index, (stats.mean, stats.var))
        before = before.set(layer.zero_frac_index, stats.zero_frac).set(layer.count_index, stats.count)
        y, after = jax.vmap(layer, axis_name=axis_name, in_axes=(0, None), out_axes=(0, None))(x, before)
        mean, var = after.get(layer.state_index)
        return y, bn_fused.RunningStats(mean, var, after.get(layer.zero_frac_index), after.get(layer.count_index))

    return step


def function_step(approach, weight, bias, debias):
    def step(x, stats):
        return bn_fused.batch_norm(
            x,
            stats,
            weight,
            bias,
            approach=approach,
            eps=EPS,
            momentum=MOMENTUM,
            warmup_period=WARMUP,
            debias=debias,
            channel_axis=1,
            backend="reference",
        )

    return step


def plain_step(approach, weight, bias, debias):
    def step(x, stats):
        def one(x):
            return definition(approach, x, stats, weight, bias, debias, "batch")

        return jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)

    return step


def assert_same_steps(ours, plain, xs, dtype):
    ours_stats = plain_stats = bn_fused.RunningStats.init(CHANNELS, dtype)
    for number, x in enumerate(xs):
        y, ours_stats = ours(x, ours_stats)
        expected, plain_stats = plain(x, plain_stats)
        assert_same_bits(y, expected, f"y of step {number}")
        for name, got, wanted in zip(ours_stats._fields, ours_stats, plain_stats, strict=True):
            assert_same_bits(got, wanted, f"{name} after step {number}")


@pytest.mark.parametrize(
    ("shape", "dtype", "jitted"),
    [
        ("maps", np.float64, True),
        ("rows", np.float32, True),
        *also_on_the_newest_jax(
            ("maps", np.float32, True),
            ("rows", np.float64, True),
            # Eager steps take five times as long.
            ("maps", np.float64, False),
            ("rows", np.float32, False),
        ),
        pytest.param("maps", np.float32, False, marks=pytest.mark.slow),
        pytest.param("rows", np.float64, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("approach", APPROACHES)
def test_reference_gives_the_bits_of_the_definition(shape, approach, dtype, jitted):
    with jax.enable_x64(dtype == np.float64):
        wrap = jax.jit if jitted else lambda function: function
        affine = shape == "maps"
        xs, weight, bias = inputs(SHAPES[shape], dtype, affine, steps=4)
        plain = wrap(plain_step(approach, weight, bias, "axis"))
        assert_same_steps(wrap(layer_step(approach, weight, bias, "axis")), plain, xs, dtype)
        assert_same_steps(wrap(function_step(approach, weight, bias, "axis")), plain, xs, dtype)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("debias", ["samples", "none"])
def test_reference_gives_the_bits_of_each_debias(debias, jitted):
    wrap = jax.jit if jitted else lambda function: function
    xs, weight, bias = inputs(SHAPES["maps"], np.float32, True, steps=3)
    plain = wrap(plain_step("batch", weight, bias, debias))
    assert_same_steps(wrap(layer_step("batch", weight, bias, debias)), plain, xs, np.float32)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("approach", APPROACHES)
def test_reference_gives_the_bits_of_the_inference_formula(approach, dtype, jitted):
    with jax.enable_x64(dtype == np.float64):
        wrap = jax.jit if jitted else lambda function: function
        (x, other), weight, bias = inputs(SHAPES["maps"], dtype, True, steps=2)
        _, stats = function_step(approach, weight, bias, "axis")(x, bn_fused.RunningStats.init(CHANNELS, dtype))

        @wrap
        def ours(x, stats):
            options = dict(approach=approach, eps=EPS, channel_axis=1, inference=True, backend="reference")
            return bn_fused.batch_norm(x, stats, weight, bias, **options)[0]

        @wrap
        def plain(x, stats):
            return jax.vmap(lambda x: inference(x, stats, weight, bias))(x)

        assert_same_bits(ours(other, stats), plain(other, stats), "y")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("approach", APPROACHES)
def test_references_gradients_are_those_of_the_definition(approach, dtype):
    """Differentiated by JAX through the same operations: it may add cotangents in another order."""
    with jax.enable_x64(dtype == np.float64):
        xs, weight, bias = inputs(SHAPES["maps"], dtype, True, steps=2)
        dy = jnp.asarray(np.random.default_rng(3).standard_normal(SHAPES["maps"]), dtype)
        _, stats = function_step(approach, weight, bias, "axis")(xs[0], bn_fused.RunningStats.init(CHANNELS, dtype))

        def gradients(make):
            @jax.jit
            def of(x, mean, var, zero_frac, weight, bias):
                def loss(x, mean, var, zero_frac, weight, bias):
                    old = bn_fused.RunningStats(mean, var, zero_frac, stats.count)
                    y, new = make(approach, weight, bias, "axis")(x, old)
                    return jnp.sum(y * dy) + jnp.sum(new.mean) + jnp.sum(new.var) + new.zero_frac

                return jax.grad(loss, tuple(range(6)))(x, mean, var, zero_frac, weight, bias)

            return of(xs[1], *stats[:3], weight, bias)

        names = ("x", "mean", "var", "zero_frac", "weight", "bias")
        for name, ours, plain in zip(names, gradients(function_step), gradients(plain_step), strict=True):
            # Sums of some hundred terms, none larger than the largest result or one.
            plain = np.asarray(plain, np.float64)
            assert_close(ours, plain, 1 + np.max(np.abs(plain)), dtype=dtype, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("jitted", "steps"), [(True, 50), (False, 5)], ids=["jitted", "eager"])
@pytest.mark.parametrize("affine", [False, True])
def test_ema_compatibility_gives_the_bits_of_equinox(affine, jitted, steps, dtype):
    with jax.enable_x64(dtype == np.float64):
        wrap = eqx.filter_jit if jitted else lambda function: function
        xs, weight, bias = inputs(SHAPES["maps"], dtype, affine, steps=steps)
        settings = dict(eps=EPS, momentum=MOMENTUM, channelwise_affine=affine)
        ours = eqx.nn.make_with_state(bn_fused.BatchNorm)(
            CHANNELS, "batch", "ema_compatibility", backend="reference", **settings
        )
        theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, "batch", mode="ema", **settings)

        @wrap
        def step(layer, state, x, inference):
            def one(x):
                return layer(x, state, inference=inference)

            return jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)

        layers, states = zip(ours, theirs, strict=True)
        if affine:
            layers = [eqx.tree_at(lambda t: (t.weight, t.bias), layer, (weight, bias)) for layer in layers]
        indices = layers[0].state_index, layers[1].ema_state_index
        for number, x in enumerate(xs):
            results = [step(layer, state, x, False) for layer, state in zip(layers, states, strict=True)]
            (y, expected), states = zip(*results, strict=True)
            assert_same_bits(y, expected, f"y of step {number}")
            running, wanted = (state.get(index) for state, index in zip(states, indices, strict=True))
            assert_same_bits(running[0], wanted[0], f"running mean after step {number}")
            assert_same_bits(running[1], wanted[1], f"running variance after step {number}")
        inferred = [step(layer, state, xs[0], True)[0] for layer, state in zip(layers, states, strict=True)]
        assert_same_bits(*inferred, "y at inference")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weight_and_bias_can_be_given_one_without_the_other(name, backend):
    x = jnp.arange(24.0).reshape(6, 4) ** 1.5
    stats, values = bn_fused.RunningStats.init(4), np.linspace(0.5, 2.0, 4, dtype=np.float32)
    y, _ = bn_fused.batch_norm(x, stats, **{name: values}, backend=backend)
    plain, _ = bn_fused.batch_norm(x, stats, backend=backend)
    plain = np.asarray(plain)
    expected = plain * values if name == "weight" else plain + values
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    frozen, _ = bn_fused.batch_norm(x, stats, **{name: values}, inference=True, backend=backend)
    plain, _ = bn_fused.batch_norm(x, stats, inference=True, backend=backend)
    plain = np.asarray(plain)
    np.testing.assert_allclose(frozen, plain * values if name == "weight" else plain + values, rtol=1e-5, atol=1e-6)
