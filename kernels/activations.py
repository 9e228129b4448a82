"""The activations that can follow the normalisation in the same pass: one table with everything a backend asks.

A line of `ACTIVATIONS` is all that an activation needs: whoever offers a choice, or checks one, reads the table. Only
the backend `triton` has functions of its own, in another language, and refuses by name what those do not know.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAKY_RELU_SLOPE = 0.01


class Activation(NamedTuple):
    """An elementwise function, its derivative, and what it costs.

    - `definition`: JAX's own function of that name, which the reference backend differentiates with JAX. It is looked
        up when it is called, where exporters (jax2onnx) put their own.
    - `function`, `derivative`: what kernels compute, both of the value before the activation.
    - `transcendental`: they have an exponential or a tanh in them, which takes many operations.
    - `steps`: where the derivative is 1 above zero, its values (below zero, at zero), else None. It depends on the sign
      alone then, which the function keeps, and can be computed of the result.
    """

    definition: Callable
    function: Callable
    derivative: Callable
    transcendental: bool
    steps: tuple[float, float] | None = None


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
        definition=lambda x: jax.nn.relu(x),
        function=lambda x: jnp.maximum(x, jnp.zeros((), x.dtype)),
        derivative=lambda x: jax.lax.select(x > 0, jnp.ones_like(x), jnp.zeros_like(x)),
        transcendental=False,
        steps=(0.0, 0.0),
    ),
    "silu": Activation(
        definition=lambda x: jax.nn.silu(x),
        function=lambda x: x * jax.nn.sigmoid(x),
        derivative=_silu_derivative,
        transcendental=True,
    ),
    "gelu": Activation(
        definition=lambda x: jax.nn.gelu(x),
        function=jax.nn.gelu,
        derivative=_gelu_derivative,
        transcendental=True,
    ),
    "leaky_relu": Activation(
        definition=lambda x: jax.nn.leaky_relu(x, LEAKY_RELU_SLOPE),
        function=lambda x: jnp.where(x >= 0, x, LEAKY_RELU_SLOPE * x),
        derivative=lambda x: jnp.where(x >= 0, jnp.ones_like(x), jnp.full_like(x, LEAKY_RELU_SLOPE)),
        transcendental=False,
        steps=(LEAKY_RELU_SLOPE, 1.0),
    ),
}


def activate(x, name):
    """Apply the activation of this name; None is the identity."""
    return x if name is None else ACTIVATIONS[name].function(x)


def is_transcendental(name):
    """Whether the activation of this name takes many operations; None does not."""
    return name is not None and ACTIVATIONS[name].transcendental


def derivative_from_result(name, dtype):
    """Whether the derivative can be computed of the result in this dtype, in place of the value before the activation.

    Not in float16: what is small but not zero before (below 6e-8 after relu) is rounded to zero there, and has lost its
    sign. The others have the range of float32, in which the value before is computed; there that happens to leaky_relu
    alone, of what is within 1.2e-36 of zero, where subnormal numbers are flushed.
    """
    return (
        name is not None
        and ACTIVATIONS[name].steps is not None
        and jnp.finfo(dtype).minexp <= jnp.finfo(jnp.float32).minexp
    )
