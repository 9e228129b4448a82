"""Data that breaks a BatchNorm: large means, constants, overflow, denormals, NaN, odd sizes, outliers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES

from support import oracle
from support.tolerances import assert_close, assert_same_bits, tol
from support.versions import also_on_the_newest_jax

FAST = "jnp"


@functools.cache
def step(approach="batch", backend=FAST, debias="samples", **settings):
    """A jitted (x, dy) -> y, new statistics, (dx, dweight, dbias), from the initial state."""

    @jax.jit
    def run(x, dy):
        channels = x.shape[1]
        stats = bn_fused.RunningStats.init(channels)

        def of(x, weight, bias):
            return bn_fused.batch_norm(
                x,
                stats,
                weight,
                bias,
                approach=approach,
                backend=backend,
                channel_axis=1,
                debias=debias,
                **settings,
            )

        (y, new), pullback = jax.vjp(of, x, jnp.ones(channels), jnp.zeros(channels))
        zeros = new._replace(count=np.zeros((), jax.dtypes.float0))  # integers have no cotangent
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), zeros)
        return y, new, pullback((dy, zeros))

    return run


def check_against_oracle(x, dy, *, activation=None, approach="batch", c=50):
    """Compare a step on the fast backend with the oracle."""
    channels = x.shape[1]
    definition = oracle.Definition(approach=approach, activation=activation, channel_axis=1, debias="samples")
    weight, bias = np.ones(channels), np.zeros(channels)
    expected = oracle.batch_norm(definition, x, oracle.State.initial(channels), weight, bias)
    if activation in oracle.KINKED:
        dy = np.where(abs(expected.pre) < 1e-3 * expected.y_scale, 0, dy).astype(dy.dtype)
    y, new, gradients = step(approach, activation=activation)(x, dy)
    assert_close(y, expected.y, expected.y_scale, c=c, what="y")
    assert_close(new.mean, expected.state.mean, expected.state_scale.mean, c=c, what="running mean")
    assert_close(new.var, expected.state.var, expected.state_scale.var, c=c, what="running var")
    zeros = np.zeros(channels)
    wanted, scales = expected.backward(dy, zeros, zeros, 0.0)
    for name, gradient in zip(("x", "weight", "bias"), gradients, strict=True):
        assert_close(gradient, getattr(wanted, name), getattr(scales, name), c=c, what=f"gradient of {name}")


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("ratio", "shape", "activation"),
    [
        pytest.param(ratio, shape, activation, marks=[] if ratio == 1e4 or activation is None else pytest.mark.slow)
        for ratio, shape, activation in itertools.product((1e2, 1e4), ((512, 4), (16, 3, 16, 16)), (None, "silu"))
    ],
)
def test_a_mean_far_above_the_spread_costs_no_digits(ratio, shape, activation):
    for spread in (1e-2, 1.0, 100.0):
        x = (spread * (normal(shape) + ratio)).astype(np.float32)
        check_against_oracle(x, normal(shape, 1), activation=activation)


def test_channels_with_very_different_means_do_not_disturb_each_other():
    centre = np.array([0, 1e4, -1e4, 1e-4, 100]).reshape(1, 5, 1)
    spread = np.array([1, 1, 10, 1e-4, 1e-2]).reshape(1, 5, 1)
    shape = (32, 5, 10)
    check_against_oracle((centre + spread * normal(shape)).astype(np.float32), normal(shape, 1), activation="relu")


def test_low_precision_inputs_do_not_lose_the_mean_to_rounding():
    """The mean is subtracted in float32: rounded to bfloat16 first, it would be off by up to 0.25 here."""
    x = jnp.asarray(100 + normal((64, 3, 8, 8)), jnp.bfloat16)
    expected = oracle.batch_norm(oracle.Definition(channel_axis=1, debias="none"), x, oracle.State.initial(3))
    y, new, _ = step(debias="none")(x, jnp.zeros_like(x))
    assert y.dtype == jnp.bfloat16 and new.mean.dtype == jnp.float32
    assert_close(y, expected.y, expected.y_scale, what="y")
    assert_close(new.var, expected.state.var, expected.state_scale.var, what="running var")


@pytest.mark.parametrize("value", [0.0, 1.0, 3.3, -31.4, -1e4 / 3, 1e-20, 1e20])
def test_a_constant_channel_is_normalised_to_the_bias(value):
    x = np.concatenate([np.full((24, 1, 7), value), normal((24, 2, 7))], 1).astype(np.float32)
    y, new, (dx, dweight, _) = step()(x, np.ones_like(x))
    y, dx, var = np.asarray(y), np.asarray(dx), np.asarray(new.var)
    # The least standard deviation, sqrt(eps), magnifies the mean's rounding 300 times. Up to |mean|/std = 1e4
    # it is kept in two parts and costs nothing; beyond, it is no worse than the definition's rounded mean.
    size = abs(np.float32(value)) / np.sqrt(1e-5)
    assert np.max(abs(y[:, 0])) <= (tol(np.float32) if size <= 1e4 else np.finfo(np.float32).eps * size)
    assert var[0] <= (np.finfo(np.float32).eps * abs(np.float32(value))) ** 2
    assert np.all(np.isfinite(dx)) and np.isfinite(np.asarray(dweight)).all()
    check_against_oracle(x[:, 1:], np.ones_like(x[:, 1:]))


def pattern(tree):
    """Where numbers are finite (0), NaN, or an infinity of which sign."""
    arrays = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree))
    return [np.where(np.isfinite(array), 0, array) for array in arrays]


def overflowing(size):
    x = normal((8, 3, 5))
    x[:, 1] *= np.float32(size)
    return x, normal(x.shape, 1)


@pytest.mark.parametrize("approach", [APPROACHES[0], *also_on_the_newest_jax(*APPROACHES[1:])])
@pytest.mark.parametrize("size", [1e30, 1e19, 3e18])
def test_where_float32_overflows_the_pattern_is_the_definitions(approach, size):
    x, dy = overflowing(size)
    fast = pattern(step(approach, warmup_period=2)(x, dy))
    reference = pattern(step(approach, warmup_period=2, backend="reference")(x, dy))
    for ours, definition in zip(fast, reference, strict=True):
        np.testing.assert_array_equal(ours, definition)


def test_a_finished_warm_up_does_not_multiply_infinity_by_zero():
    """With f = 1 the definition's (1 - f) * var is 0 * inf, NaN; in coefficients the term is not there."""
    x, dy = overflowing(1e30)
    (defined, *_), (fused, *_) = (step("ema", backend=backend)(x, dy) for backend in ("reference", FAST))
    assert np.all(np.isnan(np.asarray(defined)[:, 1])) and np.all(np.asarray(fused)[:, 1] == 0)


# Each activation in each dtype, in training and at inference by turns; the rest is slow.
@pytest.mark.parametrize(
    ("inference", "activation", "below", "dtype"),
    [
        pytest.param(
            inference,
            *activation,
            dtype,
            marks=[] if (i + j) % 2 == inference else pytest.mark.slow,
        )
        for i, dtype in enumerate(("float16", "bfloat16", "float32"))
        for j, activation in enumerate((("relu", 0.0), ("leaky_relu", 0.01)))
        for inference in (False, True)
    ],
)
def test_what_is_rounded_to_zero_after_a_residual_keeps_its_sign(inference, activation, below, dtype):
    # A last norm of a block may start with a weight of almost zero: y is zero in float16, z is not.
    x, dy = (normal((64, 4), seed).astype(dtype) for seed in range(2))
    weight, stats = jnp.full(4, 1e-9), bn_fused.RunningStats.of(jnp.zeros(4), jnp.ones(4))

    def of(x, residual):
        return bn_fused.batch_norm(
            x, stats, weight, activation=activation, residual=residual, inference=inference, backend="jnp"
        )[0]

    y, pullback = jax.vjp(of, x, jnp.zeros_like(x))
    assert not y.any() if dtype == "float16" else y.any()
    mean = 0 if inference else np.mean(np.asarray(x, np.float64), 0)
    positive = np.asarray(x, np.float64) > mean
    expected = np.where(positive, np.asarray(dy, np.float64), below * np.asarray(dy, np.float64))
    np.testing.assert_allclose(np.asarray(pullback(dy)[1], np.float64), expected, rtol=float(jnp.finfo(dtype).eps))


def test_denormals_are_normalised_to_almost_nothing():
    x = (1e-40 * normal((16, 2, 9))).astype(np.float32)
    assert np.any(x != 0)
    y, new, (dx, *_) = step()(x, normal(x.shape, 1))
    expected = oracle.batch_norm(oracle.Definition(channel_axis=1, debias="samples"), x, oracle.State.initial(2))
    np.testing.assert_allclose(y, expected.y, rtol=0, atol=tol(np.float32))
    assert np.all(np.asarray(new.var) <= 1e-38) and np.all(np.isfinite(np.asarray(dx)))


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(approach, inference, bad):
    x, dy = normal((6, 3, 4)), normal((6, 3, 4), 1)
    spoiled = x.copy()
    spoiled[2, 1, 3] = bad
    run = step(approach, inference=inference, activation="relu")
    clean, dirty = run(x, dy), run(spoiled, dy)
    others = np.array([0, 2])

    def channels(result):
        y, new, (dx, dweight, dbias) = result
        spread = [np.asarray(array)[:, others] for array in (y, dx)]
        return spread + [np.asarray(array)[others] for array in (new.mean, new.var, dweight, dbias)]

    for got, expected in zip(channels(dirty), channels(clean), strict=True):
        assert_same_bits(got, expected)
    if not inference:
        assert not np.isfinite(np.asarray(dirty[1].mean)[1])
    assert dirty[1].zero_frac == clean[1].zero_frac


def test_sizes_that_fit_no_tile():
    x = 5 + normal((2, 65, 100, 100))
    check_against_oracle(x, normal(x.shape, 1), activation="relu")


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_row_has_variance_zero_and_normalises_to_the_bias(approach):
    x = 3 * normal((1, 5)) + 7
    y, new, (dx, _, dbias) = step(approach)(x, np.ones_like(x))
    # `batch` normalises with the value itself; the others with a mean that went through float32.
    allowed = tol(np.float32) * (1 if approach == "batch" else np.abs(x) / np.sqrt(1e-5))
    assert np.all(np.abs(np.asarray(y)) <= allowed)
    gain = 1.0 if approach == "ema_compatibility" else 0.01
    assert_close(new.mean, gain * x[0], what="running mean")
    assert np.all(np.asarray(new.var) == 0)
    np.testing.assert_array_equal(np.asarray(dbias), np.ones(5, np.float32))
    # The gradient of a value that is its own mean vanishes, up to the rounding of 1/sqrt(eps).
    assert np.all(np.abs(np.asarray(dx)) <= tol(np.float32) / np.sqrt(1e-5))


def test_one_channel_and_many_rows():
    x = 30 + normal((100_000, 1))
    check_against_oracle(x, normal(x.shape, 1))


@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("shape", [(4096, 2), (8, 2, 32, 32)])
def test_one_outlier_does_not_spoil_the_other_values(shape, place):
    """A pivot taken from the first rows must not carry an outlier there into all the others.

    In the end it is sqrt(rows) standard deviations away, so that much of its rounding is unavoidable.
    """
    x = normal(shape)
    x[place] += np.float32(1e6)
    check_against_oracle(x, normal(shape, 1))


@pytest.mark.parametrize("place", [0, 3, 10, 31, 63])
def test_one_example_that_is_far_off_does_not_spoil_the_others(place):
    """Nor may a pivot be of one example, or of so few that this one pulls it far from the mean of all."""
    x = normal((64, 2, 14, 14))
    x[place] += np.float32(1e6)
    check_against_oracle(x, normal(x.shape, 1))


@pytest.mark.parametrize("shape", [(4096, 2), (8, 2, 32, 32)])
@pytest.mark.parametrize("period", [2, 8, 16, 32, 64, 128, 512])
def test_a_pattern_that_a_sample_of_rows_may_hit_costs_no_digits(shape, period):
    """Every `period`-th row is far off: rows that are sampled at a stride may all be such."""
    x = np.moveaxis(normal(shape), 1, -1).reshape(-1, 2)
    x[::period] += np.float32(1e4)
    x = np.ascontiguousarray(np.moveaxis(x.reshape(shape[0], *shape[2:], 2), -1, 1))
    check_against_oracle(x, normal(shape, 1))


@pytest.mark.parametrize(
    ("approach", "backend"),
    [
        ("batch", "jnp"),
        *also_on_the_newest_jax(("ema", "jnp"), ("ema", "reference")),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (("ema_compatibility", "jnp"), ("batch", "reference"), ("ema_compatibility", "reference"))
        ),
    ],
)
def test_two_runs_give_the_same_bits(approach, backend):
    x, dy = 3 + normal((32, 6, 13, 7)), normal((32, 6, 13, 7), 1)
    first = step(approach, backend=backend)(x, dy)
    jax.clear_caches()
    second = step(approach, backend=backend)(x, dy)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert_same_bits(one, other)
