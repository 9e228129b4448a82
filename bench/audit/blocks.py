"""What the audit compiles: a BatchNorm alone or inside a network block, forward and backward, ours and its rivals.

A block puts the function `apply` of a layer (see `providers`) between two convolutions or two linear maps.
`make_program` gives the function of a pass and the shapes of its arguments: nothing is computed here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bn_fused.bench.providers import (
    EQUINOX,
    EQUINOX_EMA,
    FLAX,
    FLAX_TWO_PASS,
    NO_NORM,
    Provider,
    bn_fused_layer,
    forward_backward,
    pull_back,
)
from bn_fused.bench.workloads import Arranged


@dataclasses.dataclass(frozen=True)
class Setting(Arranged):
    """What is normalised, and what follows.

    - `shape`: examples, channels, then the spatial sizes, whatever the layout.
    - `layout`: "nchw" (channels second) or "nhwc" (channels last) in the program.
    - `activation`, `residual`: applied and added after the normalisation; inside a block the activation is relu if none
        is named.
    - `block`: a name of `BLOCKS`, or None for the layer alone.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "nchw"
    activation: str | None = None
    residual: bool = False
    block: str | None = None

    @property
    def compiled(self) -> "Setting":
        """The setting as it is compiled: inside a block with relu if no activation is named."""
        if self.block is not None and self.activation is None:
            return dataclasses.replace(self, activation="relu")
        return self


# The rivals that `--against` takes, each with the forms in which it is compiled. Our own backend `jnp` is the rival
# that XLA compiles from plain jnp: the least that a kernel must beat.
RIVALS: Mapping[str, tuple[Provider, ...]] = MappingProxyType(
    {
        "equinox": (dataclasses.replace(EQUINOX, name="equinox batch"), EQUINOX_EMA),
        "flax": (FLAX, FLAX_TWO_PASS),
        "jnp": (),
    }
)
# Each form of a rival under its own name, where it is not the rival's.
FORMS: Mapping[str, tuple[Provider, ...]] = MappingProxyType(
    {provider.name: (provider,) for forms in RIVALS.values() for provider in forms if provider.name not in RIVALS}
)
_NAMED = {provider.name: provider for providers in ((NO_NORM,), *RIVALS.values()) for provider in providers}


def layer_named(name: str) -> Provider:
    """The provider with this name: a rival's, `NO_NORM`, or else ours with the backend of this name."""
    return _NAMED.get(name) or bn_fused_layer(name)


# ------------------------------------------------------------------------------------------------------- blocks


def _convolution(setting):
    """A convolution 3 x ... x 3 that keeps channels and positions, and the shape of its weight."""
    spatial = len(setting.shape) - 2
    letters = "DHW"[-spatial:]
    lhs = f"NC{letters}" if setting.layout == "nchw" else f"N{letters}C"
    kernel = f"OI{letters}" if setting.layout == "nchw" else f"{letters}IO"
    sizes = {"O": setting.channels, "I": setting.channels}

    def convolve(x, weight):
        return jax.lax.conv_general_dilated(x, weight, (1,) * spatial, "SAME", dimension_numbers=(lhs, kernel, lhs))

    return convolve, tuple(sizes.get(letter, 3) for letter in kernel)


def _linear(setting):
    """A linear map that keeps the number of channels, and the shape of its weight."""
    return jnp.matmul, (setting.channels, setting.channels)


@dataclasses.dataclass(frozen=True)
class Block:
    """Two linear maps with BatchNorm and an activation between them.

    `linear(setting)` gives the map's function of (x, weight) and the weight's shape; `ranks` are the ranks of x it
    takes, `takes` says so in words.
    """

    linear: Callable[[Setting], tuple[Callable, tuple[int, ...]]]
    ranks: tuple[int, ...]
    takes: str

    def wrap(self, setting: Setting, apply: Callable) -> tuple[Callable, Any]:
        """The block's `apply`, whose parameters are (those of the norm, both weights), and the weights' shapes."""
        linear, weight_shape = self.linear(setting)

        def block(parameters, state, x, residual):
            norm, first, second = parameters
            h, state = apply(norm, state, linear(x, first), residual)
            # Some layers return float32 for 16-bit inputs; the next map takes the network's dtype.
            return linear(h.astype(x.dtype), second), state

        weight = jax.ShapeDtypeStruct(weight_shape, setting.dtype)
        return block, (weight, weight)


BLOCKS: Mapping[str, Block] = MappingProxyType(
    {
        "conv-bn-relu-conv": Block(_convolution, (3, 4, 5), "one to three spatial axes"),
        "mlp": Block(_linear, (2,), "no spatial axes"),
    }
)


# ------------------------------------------------------------------------------------------------------- programs


class Program(NamedTuple):
    """A function to compile, its arguments' shapes, and the bytes that the forward saves for the backward.

    The bytes are None for the pass "fwd". Counted is what JAX's derivative holds between the two: x if it is needed,
    and what was computed on the way, each array once; parameters and state, which are there anyway, are not.
    """

    function: Callable
    specs: tuple
    kept_bytes: int | None


def make_program(setting: Setting, layer_name: str, pass_name: str) -> Program:
    """The program of a pass; arguments as in `Setting`, `layer_named` and `PASSES`.

    - "fwd": a training step, y and the new state.
    - "fwd+bwd": the same, and the gradient with respect to x, the residual and all parameters.
    - "bwd": the gradient alone, from what the forward saves.
    """
    setting = setting.compiled
    apply, state = layer_named(layer_name).make(setting, "batch", ())
    parameter = jax.eval_shape(lambda: jnp.zeros(setting.channels))
    parameters = (parameter, parameter)
    if setting.block is not None:
        apply, weights = BLOCKS[setting.block].wrap(setting, apply)
        parameters = (parameters, *weights)
    x = jax.ShapeDtypeStruct(setting.array_shape, setting.dtype)
    operands = (parameters, state, x, x if setting.residual else None)
    if pass_name == "fwd":
        return Program(apply, operands, None)

    halves = _Halves(functools.partial(pull_back, apply))
    dy, new_state, computed = jax.eval_shape(halves.forward, *operands)
    del new_state
    kept_bytes = halves.activation_bytes + sum(_nbytes(array) for array in computed)
    if pass_name == "bwd":
        return Program(halves.backward, (computed, operands, dy), kept_bytes)

    return Program(functools.partial(forward_backward, apply), (*operands, dy), kept_bytes)


def _nbytes(array) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


class _Halves:
    """Takes a derivative apart: `forward` returns what it computes and saves, `backward` goes on from there.

    An operand that is saved is not returned from the forward, which would copy it: the backward takes it again.
    """

    def __init__(self, pull_back):
        self.pull_back = pull_back
        self.tree = None
        self.places = []  # of each saved array: ("operands", index) or ("computed", index)
        self.activation_bytes = 0

    def forward(self, parameters, state, x, residual):
        y, pullback, new = self.pull_back(parameters, state, x, residual)
        leaves, self.tree = jax.tree.flatten(pullback)
        operands = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves((parameters, state, x, residual)))}
        computed, order = [], {}
        for leaf in leaves:
            if id(leaf) in operands:
                self.places.append(("operands", operands[id(leaf)]))
                continue
            if id(leaf) not in order:
                order[id(leaf)] = len(computed)
                computed.append(leaf)
            self.places.append(("computed", order[id(leaf)]))
        saved = {id(leaf) for leaf in leaves}
        self.activation_bytes = sum(_nbytes(array) for array in (x, residual) if id(array) in saved)
        return y, new, computed

    def backward(self, computed, operands, dy):
        sources = {"operands": jax.tree.leaves(operands), "computed": computed}
        leaves = [sources[source][index] for source, index in self.places]
        return jax.tree.unflatten(self.tree, leaves)(dy)
