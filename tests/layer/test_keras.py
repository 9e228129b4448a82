"""What Keras trained, taken over as docs/migrate.md says: inference and further training are Keras'."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused

from support.tolerances import assert_close

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' variables
@pytest.mark.usefixtures("standard_promotion")
def test_inference_and_training_go_on_as_with_keras():
    random = np.random.default_rng(0)
    layer = keras.layers.BatchNormalization(momentum=0.8)
    batches = [(2 + 3 * random.standard_normal((4, 3, 3, 5))).astype(np.float32) for _ in range(3)]
    with jax.numpy_rank_promotion("allow"):
        layer.build((None, 3, 3, 5))
        layer.set_weights([random.uniform(0.5, 2, 5).astype(np.float32) for _ in range(4)])
        gamma, beta, mean, var = layer.get_weights()
        before = np.asarray(layer(batches[0], training=False), np.float64)
        trained = [np.asarray(layer(x, training=True), np.float64) for x in batches]
        new_mean, new_var = (np.asarray(value, np.float64) for value in layer.get_weights()[2:])
    stats = bn_fused.RunningStats.of(mean, var)
    x = jnp.asarray(batches[0])
    y, _ = bn_fused.batch_norm(x, stats, gamma, beta, eps=1e-3, inference=True)
    assert_close(y, before, 20.0)
    for x, wanted in zip(batches, trained, strict=True):
        y, stats = bn_fused.batch_norm(jnp.asarray(x), stats, gamma, beta, eps=1e-3, momentum=0.8, debias="none")
        assert_close(y, wanted, 20.0)
    assert_close(stats.mean, new_mean, 10.0)
    assert_close(stats.var, new_var, 20.0)
