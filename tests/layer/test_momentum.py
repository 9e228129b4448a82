"""The momentum: schedules, traced ones, and its ends."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import RunningStats
from bn_fused.approaches import APPROACHES

CHANNELS = 3


def batches(count=5):
    return np.random.default_rng(0).standard_normal((count, 16, CHANNELS)).astype(np.float32) + 2


@pytest.mark.parametrize("backend", ["jnp", "reference"])
@pytest.mark.parametrize("approach", APPROACHES)
def test_a_traced_momentum_gives_what_the_number_gives(approach, backend):
    xs = batches()
    options = dict(approach=approach, warmup_period=3, backend=backend)
    step = jax.jit(lambda x, stats, momentum: bn_fused.batch_norm(x, stats, momentum=momentum, **options))
    traced = plain = RunningStats.init(CHANNELS)
    for x, momentum in zip(xs, (0.5, 0.9, 0.0, 0.75, 0.99), strict=True):
        y, traced = step(x, traced, momentum)
        wanted, plain = bn_fused.batch_norm(x, plain, momentum=momentum, **options)
        for one, other in zip((y, *traced), (wanted, *plain), strict=True):
            assert one.dtype == other.dtype and not one.weak_type
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


def test_k_over_k_plus_one_is_the_plain_average_with_one_compilation():
    xs, stats = batches(20), RunningStats.init(CHANNELS)
    step = jax.jit(lambda x, stats, k: bn_fused.batch_norm(x, stats, momentum=k / (k + 1), debias="none")[1])
    for k, x in enumerate(xs):
        stats = step(x, stats, k)
    mean, var = stats.moments()
    exact = xs.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(var, exact.var(1).mean(0), rtol=1e-5)
    assert step._cache_size() == 1


@pytest.mark.parametrize("approach", APPROACHES)
def test_momentum_zero_keeps_the_last_batch_alone(approach):
    xs = batches(3)
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", approach, momentum=0, debias="none")
    for x in xs:
        _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    mean, var = state.get(layer.state_index)
    assert state.get(layer.zero_frac_index) == 0
    np.testing.assert_allclose(mean, xs[-1].mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, xs[-1].var(0), rtol=1e-5)


def test_the_gradient_with_respect_to_the_momentum_is_the_difference_quotient():
    x = batches(1)[0]
    stats = RunningStats.of(jnp.ones(CHANNELS), 2 * jnp.ones(CHANNELS))

    def loss(momentum):
        y, new = bn_fused.batch_norm(x, stats, approach="ema", momentum=momentum)
        return jnp.sum(jnp.sin(y)) + jnp.sum(new.mean * new.var)

    with jax.enable_x64():
        x = jnp.asarray(x, jnp.float64)
        stats = RunningStats.of(stats.mean.astype(jnp.float64), stats.var.astype(jnp.float64))
        quotient = (loss(jnp.float64(0.8 + 1e-6)) - loss(jnp.float64(0.8 - 1e-6))) / 2e-6
        np.testing.assert_allclose(jax.grad(loss)(jnp.float64(0.8)), quotient, rtol=1e-6)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_are_right_where_a_coefficient_is_zero(inner, outer):
    def new_mean(momentum, mean, x):
        stats = RunningStats.of(mean, jnp.ones(CHANNELS))
        return bn_fused.batch_norm(x, stats, momentum=momentum, debias="none")[1].mean.sum()

    # momentum * mean + (1 - momentum) * the batch's mean: what depends on both factors, in either order.
    x = batches(1)[0]
    for momentum in (0.0, 1.0):
        operands = momentum, jnp.ones(CHANNELS), x
        for operand, mixed in ((1, jnp.ones(CHANNELS)), (2, jnp.full(x.shape, -1 / len(x)))):
            for first, second in ((0, operand), (operand, 0)):
                found = jax.jit(outer(inner(new_mean, first), second))(*operands)
                np.testing.assert_allclose(found, mixed, rtol=1e-5)


def test_members_of_a_vmap_have_momenta_of_their_own():
    x, momenta = batches(1)[0], jnp.float32([0.0, 0.5, 0.9])
    _, stats = jax.vmap(lambda momentum: bn_fused.batch_norm(x, RunningStats.init(CHANNELS), momentum=momentum))(
        momenta
    )
    np.testing.assert_allclose(stats.zero_frac, momenta)
    np.testing.assert_allclose(stats.mean, np.outer(1 - momenta, x.mean(0)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_momentum_may_be_a_scalar_of_numpys_of_any_floating_type(dtype):
    momentum = jnp.dtype(dtype).type(0.75)
    _, stats = bn_fused.batch_norm(batches(1)[0], RunningStats.init(CHANNELS), momentum=momentum)
    assert stats.zero_frac == 0.75 == bn_fused.BatchNorm(CHANNELS, "batch", "batch", momentum=momentum).momentum


@pytest.mark.parametrize(
    ("momentum", "error"),
    [
        (jnp.float32(1.0), ValueError),
        (np.float64(-0.1), ValueError),
        (jnp.float32(jnp.nan), ValueError),
        (jnp.ones(2), TypeError),
        (jnp.int32(0), TypeError),
        (True, TypeError),
    ],
)
def test_a_momentum_that_is_none_is_named_where_its_value_is_known(momentum, error):
    with pytest.raises(error, match="momentum is .*accepted"):
        bn_fused.batch_norm(batches(1)[0], RunningStats.init(CHANNELS), momentum=momentum)


def test_the_layers_momentum_is_static():
    with pytest.raises(TypeError, match="momentum is .*Python number"):
        bn_fused.BatchNorm(CHANNELS, "batch", "batch", momentum=jnp.float32(0.9))
