"""A network under inference as ONNX, by jax2onnx: with `backend="reference"`, or with its norms folded away."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.kernels.activations import ACTIVATIONS

from support.over_batch import over_batch
from support.tolerances import assert_close

jax2onnx = pytest.importorskip("jax2onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# jax2onnx promotes dtypes and ranks as JAX does by default.
pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
]


def network(key, activation=None):
    first, second = jax.random.split(key)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, use_bias=False, key=first),
            bn_fused.BatchNorm(4, "batch", "batch", activation=activation),
            eqx.nn.Conv2d(4, 5, 3, key=second),
            bn_fused.BatchNorm(5, "batch", "batch", channelwise_affine=False),
        ]
    )


def trained(activation=None):
    model, state = eqx.nn.make_with_state(network)(jax.random.key(0), activation)
    _, state = over_batch(model, images(), state)
    return eqx.nn.inference_mode(model), state


def images(n=8):
    return jnp.asarray(2 + 3 * np.random.default_rng(n).standard_normal((n, 3, 9, 9)), jnp.float32)


def of_batch(model, state):
    return lambda x: jax.vmap(lambda x: model(x, state)[0])(x)


def run(function, x):
    """What onnxruntime makes of the function, exported for any number of examples."""
    with jax.numpy_rank_promotion("allow"):
        program = jax2onnx.to_onnx(function, [("B", *x.shape[1:])])
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    return result, [node.op_type for node in program.graph.node]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_the_reference_backend_is_exported(activation):
    model, state = trained(activation)
    plain = bn_fused.with_settings(model, backend="reference")
    result, _ = run(of_batch(plain, state), images(2))
    assert_close(result, np.asarray(of_batch(model, state)(images(2)), np.float64), 20.0)


def test_what_is_folded_is_convolutions_alone():
    model, state = trained()
    layers = [bn_fused.fold(model.layers[place], model.layers[place + 1], state) for place in (0, 2)]
    result, operations = run(jax.vmap(lambda x: layers[1](layers[0](x))), images(2))
    assert "Sqrt" not in operations
    assert_close(result, np.asarray(of_batch(model, state)(images(2)), np.float64), 20.0)


def test_other_backends_are_named_by_the_exporter():
    model, state = trained()
    with pytest.raises(NotImplementedError, match="bn_fused_normalise"):
        run(of_batch(model, state), images(2))
