"""Inputs that are not JAX's own, and those that are empty."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import RunningStats

from support.over_batch import over_batch

CHANNELS = 3


def numpy_inputs(dtype):
    random = np.random.default_rng(0)
    x, residual = random.standard_normal((2, 8, CHANNELS, 5)).astype(dtype)
    stats = RunningStats(
        np.ones(CHANNELS, dtype), np.full(CHANNELS, 2, dtype), np.asarray(0.5, dtype), np.asarray(1, np.int64)
    )
    weight, bias = random.standard_normal((2, CHANNELS)).astype(dtype)
    mask = random.random((8, 5)) < 0.7
    return x, stats, weight, bias, residual, mask


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("backend", ["jnp", "reference"])
def test_the_function_takes_float64_numpy_arrays_eagerly_as_under_jit(backend, inference):
    def step(x, stats, weight, bias, residual, mask):
        options = dict(channel_axis=1, activation="silu", approach="ema", backend=backend, inference=inference)
        return bn_fused.batch_norm(x, stats, weight, bias, residual=residual, mask=mask, **options)

    inputs = numpy_inputs(np.float64)
    eager, jitted = step(*inputs), jax.jit(step)(*inputs)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert eager[0].dtype == jnp.float32
    if inference:
        assert eager[1] is inputs[1]
    else:
        assert all(value.dtype in (jnp.float32, jnp.int32) for value in eager[1])


def test_the_layer_takes_float64_numpy_arrays_and_state():
    x, stats, weight, bias, residual, mask = numpy_inputs(np.float64)
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "ema")
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
    state = state.set(layer.state_index, (jnp.asarray(stats.mean), jnp.asarray(stats.var)))
    state = state.set(layer.zero_frac_index, jnp.asarray(stats.zero_frac))
    state = state.set(layer.count_index, jnp.asarray(stats.count))
    as_numpy = jax.tree.map(np.asarray, state)

    def step(state):
        def one(x, residual, mask, state):
            return layer(x, state, residual=residual, mask=mask)

        return jax.vmap(one, axis_name="batch", in_axes=(0, 0, 0, None), out_axes=(0, None))(x, residual, mask, state)

    y, new = step(as_numpy)
    wanted, wanted_new = bn_fused.batch_norm(
        x, stats, weight, bias, residual=residual, mask=mask, channel_axis=1, approach="ema"
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.get(layer.state_index)[0], wanted_new.mean, rtol=1e-5)


def make(**settings):
    return eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch", **settings)


@pytest.mark.parametrize("shape", [(0, CHANNELS), (0, CHANNELS, 4), (5, CHANNELS, 0)])
@pytest.mark.parametrize("virtual_batch_size", [None, 2])
def test_an_empty_batch_in_training_is_an_error_of_layer_and_function(shape, virtual_batch_size):
    x = jnp.zeros(shape)
    with pytest.raises(ValueError, match="empty"):
        bn_fused.batch_norm(x, RunningStats.init(CHANNELS), channel_axis=1, virtual_batch_size=virtual_batch_size)
    layer, state = make(virtual_batch_size=virtual_batch_size)
    with pytest.raises(ValueError, match="empty"):
        over_batch(layer, x, state)


@pytest.mark.parametrize("backend", ["auto", "jnp", "triton", "pallas_gpu", "pallas_tpu", "reference"])
@pytest.mark.parametrize("shape", [(0, CHANNELS), (0, CHANNELS, 4), (5, CHANNELS, 0)])
def test_an_empty_batch_at_inference_gives_an_empty_result_and_gradients_of_zero(shape, backend):
    x, stats = jnp.zeros(shape, jnp.bfloat16), RunningStats.init(CHANNELS)

    def infer(weight):
        y, _ = bn_fused.batch_norm(x, stats, weight, channel_axis=1, inference=True, backend=backend, activation="relu")
        return jnp.sum(y.astype(jnp.float32)), y

    gradient, y = jax.grad(infer, has_aux=True)(jnp.ones(CHANNELS))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(gradient, 0)
    layer, state = make(inference=True, backend=backend)
    y, _ = over_batch(layer, x, state)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_gradient_of_a_map_over_nothing_compiles_for_every_platform(platform, inference):
    def infer_or_train(x):
        y, _ = bn_fused.batch_norm(x, RunningStats.init(CHANNELS), inference=inference, activation="relu")
        return jnp.sum(y)

    program = jax.jit(jax.vmap(jax.grad(infer_or_train)))
    lowered = program.trace(jnp.zeros((0, 8, CHANNELS))).lower(lowering_platforms=(platform,))
    assert lowered.out_info.shape == (0, 8, CHANNELS)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_gradient_of_an_empty_batch_at_inference_compiles_for_every_platform(platform):
    def infer(x):
        y, _ = bn_fused.batch_norm(x, RunningStats.init(CHANNELS), inference=True, activation="relu")
        return jnp.sum(y)

    lowered = jax.jit(jax.grad(infer)).trace(jnp.zeros((0, CHANNELS))).lower(lowering_platforms=(platform,))
    assert lowered.out_info.shape == (0, CHANNELS)
