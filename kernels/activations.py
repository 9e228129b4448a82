"""The activations that can follow the normalisation in the same pass: one table of functions and derivatives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAKY_RELU_SLOPE = 0.01


class Activation(NamedTuple):
    """An elementwise function and its derivative, both of the value before the activation.

    `definition` is JAX's own function of that name, which the reference backend differentiates with JAX;
    `function` and `derivative` are what kernels compute.
    """

    definition: Callable
    function: Callable
    derivative: Callable


def _silu_derivative(x):
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _gelu_derivative(x):
    # d/dx of x/2 * (1 + tanh(inner)), inner = scale * (x + cubic * x^3): Hendrycks & Gimpel, arXiv:1606.08415.
    tanh = jnp.tanh(_GELU_SCALE * (x + _GELU_CUBIC * (x * x * x)))
    inner_derivative = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * (x * x))
    # Where tanh is saturated the second term is zero, also where x * inner' overflows.
    slope = (1 - tanh) * (1 + tanh)
    return 0.5 * (1 + tanh) + jnp.where(slope == 0, jnp.zeros_like(x), 0.5 * x * slope * inner_derivative)


ACTIVATIONS = {
    "relu": Activation(
        jax.nn.relu,
        lambda x: jnp.maximum(x, jnp.zeros((), x.dtype)),
        lambda x: (x > 0).astype(x.dtype),
    ),
    "silu": Activation(jax.nn.silu, lambda x: x * jax.nn.sigmoid(x), _silu_derivative),
    "gelu": Activation(jax.nn.gelu, jax.nn.gelu, _gelu_derivative),
    "leaky_relu": Activation(
        lambda x: jax.nn.leaky_relu(x, LEAKY_RELU_SLOPE),
        lambda x: jnp.where(x >= 0, x, LEAKY_RELU_SLOPE * x),
        lambda x: jnp.where(x >= 0, jnp.ones_like(x), jnp.full_like(x, LEAKY_RELU_SLOPE)),
    ),
}


def activate(x, name):
    """Apply the activation of this name; None is the identity."""
    return x if name is None else ACTIVATIONS[name].function(x)
