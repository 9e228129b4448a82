"""The running statistics after 1, 10, 100 and 1000 steps: right from the first."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES

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
        ("ema", "axis", 1.0),
        ("ema_compatibility", "axis", 1.0),
    ],
)
def test_inference_statistics_are_right_from_the_first_step(approach, debias, factor):
    means, vars_, zero_fracs = train(approach, debias)
    batch_means, batch_vars = batch_moments()
    for steps in STEPS:
        zero_frac = zero_fracs[steps - 1]
        mean, var = (values[steps - 1] / max(1 - zero_frac, EPS) for values in (means, vars_))
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
        zero_fracs = train(approach, "axis")[2]
        # One rounding a step, and momentum itself is rounded: that many times eps/2 at most.
        expected = MOMENTUM ** np.arange(1, max(STEPS) + 1)
        assert np.all(abs(zero_fracs / expected - 1) <= np.arange(1, max(STEPS) + 1) * tol(np.float32, c=1))
    assert np.all(train("ema_compatibility", "axis")[2] == 0)


def test_running_state_follows_the_oracle_for_a_hundred_steps():
    """Each step from the float32 state of the step before: only that step's rounding is allowed."""
    for approach in APPROACHES:
        definition = oracle.Definition(approach=approach, momentum=MOMENTUM, channel_axis=1)
        means, vars_, zero_fracs = train(approach, "axis")
        for step in (0, 1, 2, 9, 99):
            before = oracle.State.initial(CHANNELS)
            if step:
                before = oracle.State(means[step - 1], vars_[step - 1], zero_fracs[step - 1], 1)
            after = oracle.batch_norm(definition, batches()[step], before)
            np.testing.assert_allclose(means[step], after.state.mean, rtol=0, atol=tol(np.float32) * (MEAN + 3))
            np.testing.assert_allclose(vars_[step], after.state.var, rtol=tol(np.float32))
            np.testing.assert_allclose(zero_fracs[step], after.state.zero_frac, rtol=tol(np.float32))
