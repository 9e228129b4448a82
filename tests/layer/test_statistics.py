"""The running statistics after 1, 10, 100 and 1000 steps: right from the first."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import bn_fused
from bn_fused.approaches import APPROACHES, inference_coefficients, inference_moments

from support import oracle
from support.tolerances import tol

MEAN, VAR, MOMENTUM = 2.0, 9.0, 0.99
EXAMPLES, CHANNELS, SPATIAL = 16, 8, (4, 4)
N_POS = EXAMPLES * math.prod(SPATIAL)
STEPS = (1, 10, 100, 1000)
EPS = 1e-5


@functools.cache
def batches():
    """[steps, examples, channels, *spatial], float32."""
    shape = (max(STEPS), EXAMPLES, CHANNELS, *SPATIAL)
    return (MEAN + math.sqrt(VAR) * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@functools.cache
def batch_moments():
    """Mean and variance of every batch, [steps, channels], float64."""
    x = batches().astype(np.float64)
    return x.mean((1, 3, 4)), x.var((1, 3, 4))


@functools.cache
def train(approach, debias):
    """The running mean, variance and zero_frac after every step."""
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        CHANNELS, "batch", approach, momentum=MOMENTUM, eps=EPS, debias=debias
    )

    def step(state, x):
        _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        mean, var = state.get(layer.state_index)
        return state, (mean, var, state.get(layer.zero_frac_index))

    _, history = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))(state, jnp.asarray(batches()))
    return [np.asarray(values, np.float64) for values in history]


def average_weights(approach, steps):
    """The weight of each of the first `steps` batches in the statistics that inference then uses."""
    ages = np.arange(steps)[::-1]
    weights = (1 - MOMENTUM) * MOMENTUM**ages
    if approach == "ema_compatibility":
        weights[0] = MOMENTUM ** (steps - 1)  # the first batch fills the statistics
        return weights
    return weights / (1 - MOMENTUM**steps)


@pytest.mark.parametrize(
    ("approach", "debias", "factor"),
    [
        ("batch", "axis", EXAMPLES / (EXAMPLES - 1)),
        ("batch", "samples", N_POS / (N_POS - 1)),
        ("batch", "none", 1.0),
        ("ema", "samples", 1.0),
        ("ema_compatibility", "samples", 1.0),
    ],
)
def test_inference_statistics_are_right_from_the_first_step(approach, debias, factor):
    means, vars_, zero_fracs = train(approach, debias)
    batch_means, batch_vars = batch_moments()
    for steps in STEPS:
        zero_frac = zero_fracs[steps - 1]
        mean, var = (values[steps - 1] / (1 - zero_frac) for values in (means, vars_))
        weights = average_weights(approach, steps)

        # Against the same weighted mean of the batches' own moments: one rounding of the state a step, of
        # which each later step forgets a hundredth; and 1 - m, off by eps/2 in float32, is summed as often.
        rounding = tol(np.float32, n=min(steps, 1 / (1 - MOMENTUM))) / (1 - zero_frac)
        np.testing.assert_allclose(mean, weights @ batch_means[:steps], rtol=0, atol=rounding * (MEAN + VAR**0.5))
        np.testing.assert_allclose(var, factor * weights @ batch_vars[:steps], rtol=rounding)

        # Against theory: the mean of all channels is within five standard deviations of the estimator.
        spread = math.sqrt(np.sum(weights**2) / CHANNELS / N_POS)
        assert abs(mean.mean() - MEAN) < 5 * math.sqrt(VAR) * spread
        expected_var = factor * VAR * (1 - 1 / N_POS)
        assert abs(var.mean() - expected_var) < 5 * math.sqrt(2) * VAR * factor * spread


def test_zero_frac_is_the_momentum_to_the_power_of_the_steps():
    for approach in ("batch", "ema"):
        zero_fracs = train(approach, "samples")[2]
        # One rounding a step, and momentum itself is rounded: that many times eps/2 at most.
        expected = MOMENTUM ** np.arange(1, max(STEPS) + 1)
        assert np.all(abs(zero_fracs / expected - 1) <= np.arange(1, max(STEPS) + 1) * tol(np.float32, c=1))
    assert np.all(train("ema_compatibility", "samples")[2] == 0)


def test_running_state_follows_the_oracle_for_a_hundred_steps():
    """Each step from the float32 state of the step before: only that step's rounding is allowed."""
    for approach in APPROACHES:
        definition = oracle.Definition(approach=approach, momentum=MOMENTUM, channel_axis=1)
        means, vars_, zero_fracs = train(approach, "samples")
        for step in (0, 1, 2, 9, 99):
            before = oracle.State.initial(CHANNELS)
            if step:
                before = oracle.State(means[step - 1], vars_[step - 1], zero_fracs[step - 1], 1)
            after = oracle.batch_norm(definition, batches()[step], before)
            np.testing.assert_allclose(means[step], after.state.mean, rtol=0, atol=tol(np.float32) * (MEAN + 3))
            np.testing.assert_allclose(vars_[step], after.state.var, rtol=tol(np.float32))
            np.testing.assert_allclose(zero_fracs[step], after.state.zero_frac, rtol=tol(np.float32))


def test_the_variance_that_is_kept_is_unbiased_by_default_however_few_the_examples():
    x = np.random.default_rng(3).standard_normal((2, 8, 8, 3)).astype(np.float32)
    unbiased = x.astype(np.float64).var((0, 1, 2), ddof=1)
    _, stats = bn_fused.batch_norm(x, bn_fused.RunningStats.init(3))
    np.testing.assert_allclose(stats.moments()[1], unbiased, rtol=tol(np.float32) / (1 - MOMENTUM))
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(3, "batch", "batch")
    _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(np.moveaxis(x, -1, 1), state)
    np.testing.assert_allclose(state.get(layer.state_index)[1], stats.var, rtol=tol(np.float32))


@pytest.mark.parametrize("backend", ["jnp", "reference"])
@pytest.mark.parametrize("approach", APPROACHES)
def test_inference_after_one_step_normalises_that_batch_whatever_momentum_and_eps(approach, backend):
    x = (3 + 2 * np.random.default_rng(4).standard_normal((64, 5))).astype(np.float32)
    options = dict(approach=approach, eps=1e-3, momentum=0.9997, backend=backend)
    _, stats = bn_fused.batch_norm(x, bn_fused.RunningStats.init(5), debias="none", **options)
    y, _ = bn_fused.batch_norm(x, stats, inference=True, **options)
    # What is left of m's rounding in the written-out definition: eps/2 in 1 - m.
    error = tol(np.float32) / (1 - 0.9997)
    exact = x.astype(np.float64)
    wanted = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-3)
    np.testing.assert_allclose(y, wanted, rtol=error, atol=error * 3 / 2)
    assert error < 0.02


def test_the_first_step_is_exact_though_the_mean_is_a_thousand_standard_deviations():
    x = (1000 + np.random.default_rng(5).standard_normal((256, 6))).astype(np.float32)
    _, stats = bn_fused.batch_norm(x, bn_fused.RunningStats.init(6), momentum=0.9999)
    mean, var = stats.moments()
    exact = x.astype(np.float64)
    # Three roundings of the mean: of itself, of its product with 1 - m, and of the quotient.
    np.testing.assert_allclose(mean, exact.mean(0), rtol=3 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(var, exact.var(0, ddof=1), rtol=tol(np.float32))


def test_what_float32_leaves_of_the_running_mean_is_what_the_layers_docstring_says():
    """eps/(1 - m), in every step: the rounding of each weighs as much as that step does."""
    x = (1000 + np.random.default_rng(6).standard_normal((64, 4))).astype(np.float32)

    @jax.jit
    def train(stats):
        def step(stats, _):
            stats = bn_fused.batch_norm(x, stats, momentum=0.9999)[1]
            return stats, (stats.mean, stats.zero_frac)

        return jax.lax.scan(step, stats, length=3000)[1]

    means, zero_fracs = (np.asarray(values, np.float64) for values in train(bn_fused.RunningStats.init(4)))
    error = abs(means / (1 - zero_fracs[:, None]) / x.astype(np.float64).mean(0) - 1)
    bound = np.finfo(np.float32).eps / (1 - 0.9999)
    assert bound / 50 < error.max() <= bound


def test_never_trained_statistics_have_finite_gradients_without_a_division_by_zero():
    def loss(mean, var, zero_frac):
        return sum(jnp.sum(value) for value in inference_moments(mean, var, zero_frac)) + jnp.sum(
            jnp.stack(inference_coefficients(zero_frac))
        )

    checked = checkify.checkify(jax.grad(loss, argnums=(0, 1, 2)), errors=checkify.float_checks)
    error, gradients = checked(jnp.zeros(3), jnp.zeros(3), jnp.ones(()))
    error.throw()
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


@pytest.mark.parametrize(("rate", "first", "after_hundred"), [(0.999, 2e-3, 1e-4), (0.9999, 2e-2, 1e-3)])
def test_an_averaged_state_is_off_by_what_the_docstring_says(rate, first, after_hundred):
    """A teacher of a student with momentum .99 on a constant batch, so that every average is that batch's mean."""
    x = (5 + 2 * np.random.default_rng(7).standard_normal((64, 4))).astype(np.float32)

    def average(old, new):
        return rate * old + (1 - rate) * new if jnp.issubdtype(old.dtype, jnp.floating) else new

    @jax.jit
    def train(student, teacher):
        student = bn_fused.batch_norm(x, student)[1]
        return student, jax.tree.map(average, teacher, student)

    student = teacher = bn_fused.RunningStats.init(4)
    errors = []
    for _ in range(100):
        student, teacher = train(student, teacher)
        errors.append(np.max(abs(teacher.moments()[0] / x.astype(np.float64).mean(0) - 1)))
    assert max(errors) < first and errors[-1] < after_hundred
