"""`RunningStats`: statistics from elsewhere, what inference makes of them, and those that contradict themselves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import RunningStats

from support.over_batch import over_batch

MEAN, VAR = np.float32([1.0, -2.0, 30.0]), np.float32([4.0, 0.25, 9.0])


def data(shape=(64, 3)):
    return (MEAN + np.sqrt(VAR) * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_statistics_from_elsewhere_are_what_inference_uses(array, dtype):
    stats = RunningStats.of(array(MEAN.astype(dtype)), array(VAR.astype(dtype)))
    assert [value.dtype for value in stats] == [np.float32] * 3 + [np.int32]
    assert stats.zero_frac == 0 and stats.count == 0
    for moment, wanted in zip(stats.moments(), (MEAN, VAR), strict=True):
        np.testing.assert_array_equal(moment, wanted)
    x = data()
    y, _ = bn_fused.batch_norm(x, stats, inference=True)
    np.testing.assert_allclose(y, (x - MEAN) / np.sqrt(VAR + 1e-5), rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_statistics_from_elsewhere():
    x, stats = data(), RunningStats.of(MEAN, VAR)
    for approach in ("batch", "ema", "ema_compatibility"):
        _, new = bn_fused.batch_norm(x, stats, approach=approach, debias="none")
        np.testing.assert_allclose(new.moments()[0], 0.99 * MEAN + 0.01 * x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(new.moments()[1], 0.99 * VAR + 0.01 * x.var(0), rtol=1e-5)


def test_what_is_given_stays_when_the_statistics_are_donated():
    mean, var = jnp.asarray(MEAN), jnp.asarray(VAR)
    step = jax.jit(lambda stats: bn_fused.batch_norm(data(), stats)[1], donate_argnums=0)
    step(RunningStats.of(mean, var))
    np.testing.assert_array_equal(mean, MEAN)
    np.testing.assert_array_equal(var, VAR)


@pytest.mark.parametrize(
    ("mean", "var", "error", "message"),
    [
        (MEAN, VAR[:2], ValueError, r"float32\[3\].*float32\[2\]"),
        (MEAN, VAR.astype(np.float16), ValueError, "float32.*float16"),
        (MEAN[None], VAR[None], ValueError, r"\[1, 3\].*\[channels\]"),
        (VAR, MEAN, ValueError, "var has the value -2.0"),
        (MEAN, VAR * np.float32([1, np.nan, 1]), ValueError, "var has the value nan; accepted are finite"),
        (MEAN + np.float32([0, 0, np.inf]), VAR, ValueError, "mean has the value inf; accepted are finite"),
        (MEAN.astype(int), VAR, TypeError, "mean has dtype int"),
        (MEAN, 1.0, TypeError, "var is 1.0"),
    ],
)
def test_what_are_no_statistics_is_named(mean, var, error, message):
    with pytest.raises(error, match=message):
        RunningStats.of(mean, var)


def test_moments_are_those_that_inference_normalises_with():
    never = RunningStats.init(3).moments()
    np.testing.assert_array_equal(never[0], 0)
    np.testing.assert_array_equal(never[1], 1)
    x = data()
    _, stats = bn_fused.batch_norm(x, RunningStats.init(3), debias="none")
    mean, var = jax.jit(RunningStats.moments)(stats)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(var, x.var(0), rtol=1e-4)
    y, _ = bn_fused.batch_norm(x, stats, inference=True)
    mean, var = np.asarray(mean), np.asarray(var)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("field", ["mean", "var"])
def test_statistics_that_zero_frac_says_are_not_there_are_refused(field, inference):
    x, stats = data(), RunningStats.init(3)._replace(**{field: jnp.asarray(VAR)})
    with pytest.raises(ValueError, match=rf"stats has zero_frac 1.*{field}.*RunningStats.of.*average"):
        bn_fused.batch_norm(x, stats, inference=inference)
    with pytest.raises(ValueError, match="RunningStats.of"):
        stats.moments()
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(3, "batch", "batch", inference=inference)
    state = state.set(layer.state_index, (stats.mean, stats.var))
    with pytest.raises(ValueError, match=rf"state has zero_frac 1.*{field}.*RunningStats.of"):
        over_batch(layer, x, state)
    state = state.set(layer.zero_frac_index, jnp.zeros(()))
    over_batch(layer, x, state)


@pytest.mark.parametrize("momentum", [0.99, 0.999])
def test_a_state_cast_to_16_bits_is_refused_in_training_where_it_would_stay_at_its_start(momentum):
    x = data()
    stats = jax.tree.map(
        lambda value: value.astype(jnp.bfloat16) if jnp.issubdtype(value.dtype, jnp.floating) else value,
        RunningStats.init(3),
    )
    if momentum == 0.999:
        with pytest.raises(ValueError, match="momentum is 0.999, which bfloat16 rounds to 1.*float32"):
            bn_fused.batch_norm(x, stats, momentum=momentum)
        return
    for _ in range(3):
        with pytest.warns(UserWarning, match="running statistics are bfloat16"):
            _, stats = bn_fused.batch_norm(x, stats, momentum=momentum)
    assert stats.zero_frac.dtype == jnp.bfloat16 and 0.9 < stats.zero_frac < 1
    np.testing.assert_allclose(stats.moments()[0], x.mean(0), rtol=0.3)


def test_a_layer_takes_statistics_from_elsewhere_and_gives_its_own():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(3, "batch", "batch")
    x, stats = data(), RunningStats.of(MEAN.astype(np.float64), VAR.astype(np.float64))
    state = layer.set_stats(state, stats)
    y, state = over_batch(layer, x, state)
    _, wanted = bn_fused.batch_norm(x, stats)
    for one, other in zip(layer.get_stats(state), wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_statistics_that_do_not_fit_a_layer_are_named():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(3, "batch", "batch")
    with pytest.raises(ValueError, match="stats has 2 channels; input_size is 3"):
        layer.set_stats(state, RunningStats.of(MEAN[:2], np.abs(VAR[:2])))
    with pytest.raises(TypeError, match="accepted is a bn_fused.RunningStats"):
        layer.set_stats(state, (MEAN, VAR))
    with pytest.raises(ValueError, match="stats has zero_frac 1"):
        layer.set_stats(state, RunningStats.init(3)._replace(var=jnp.asarray(VAR)))
    over_batch(layer, data(), state)


def test_an_averaged_count_is_named_with_what_to_do():
    """A teacher made by averaging every leaf, the counter too."""
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(3, "batch", "ema")
    _, student = over_batch(layer, data(), jax.tree.map(jnp.copy, state))
    with jax.numpy_dtype_promotion("standard"):
        teacher = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, student)
    with pytest.raises(ValueError, match="state.count is float32.*integer.*keeps the count of one"):
        over_batch(layer, data(), teacher)
