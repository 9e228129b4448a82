"""What the audit compiles: a BatchNorm alone or inside a network block, forward and backward, ours and its rivals.

A layer makes, for a `Setting`, a function `apply(parameters, state, x, residual) -> (y, state)`: one training step,
with x in the setting's layout, `parameters` the pair (weight, bias) and `state` a pytree of arrays; and the first
state. A block puts such a function between two convolutions or two linear maps. `make_program` gives the function of
a pass and the shapes of its arguments: nothing is computed here.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

import bn_fused
from bn_fused.kernels.activations import ACTIVATIONS

LAYOUTS = ("nchw", "nhwc")
PASSES = ("fwd", "bwd", "fwd+bwd")
AXIS = "batch"


@dataclasses.dataclass(frozen=True)
class Setting:
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
    def channels(self) -> int:
        """The size of the channel axis."""
        return self.shape[1]

    @property
    def channel_axis(self) -> int:
        """Where the channels are in an array of this setting."""
        return 1 if self.layout == "nchw" else len(self.shape) - 1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """`shape` with the channels where the layout has them."""
        examples, channels, *spatial = self.shape
        return (examples, channels, *spatial) if self.layout == "nchw" else (examples, *spatial, channels)

    @property
    def elements(self) -> int:
        """Elements of one array of this shape."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one array of this shape and dtype: what one pass over it moves."""
        return self.elements * jnp.dtype(self.dtype).itemsize


# ------------------------------------------------------------------------------------------------------- layers


@dataclasses.dataclass(frozen=True)
class Layer:
    """One way to normalise.

    - `name`: for the tables.
    - `make(setting, backend)`: `apply` and the first state (see the module's text); `backend` matters to ours only.
    - `module`: the package it needs, if it is not always there.
    """

    name: str
    make: Callable[[Setting, str], tuple[Callable, Any]]
    module: str | None = None

    @property
    def missing(self) -> str | None:
        """None where it can be compiled, else one sentence that says what to install."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed: pip install {self.module}"


def _with_parameters(layer, parameters):
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, parameters)


def _ours(setting, backend):
    """The layer where it takes the array as it lies, channels first; the function for channels last."""
    options = dict(approach="batch", activation=setting.activation, backend=backend)

    def function(parameters, stats, x, residual):
        return bn_fused.batch_norm(x, stats, *parameters, residual=residual, channel_axis=-1, **options)

    if setting.layout == "nhwc":
        return function, bn_fused.RunningStats.init(setting.channels)
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(setting.channels, AXIS, **options)
    state, rest = eqx.partition(state, eqx.is_array)

    def under_vmap(parameters, state, x, residual):
        moved, state = _with_parameters(layer, parameters), eqx.combine(state, rest)
        step = jax.vmap(lambda x, residual: moved(x, state, residual=residual), axis_name=AXIS, out_axes=(0, None))
        y, new = step(x, residual)
        return y, eqx.filter(new, eqx.is_array)

    return under_vmap, state


def _finish(setting, y, residual):
    """What follows another library's BatchNorm: the residual and the activation."""
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y if setting.activation is None else ACTIVATIONS[setting.activation].definition(y)


def _equinox(mode):
    def make(setting, backend):
        del backend
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(setting.channels, AXIS, mode=mode)
        state, rest = eqx.partition(state, eqx.is_array)
        last = setting.layout == "nhwc"

        def apply(parameters, state, x, residual):
            moved, state = _with_parameters(layer, parameters), eqx.combine(state, rest)
            # It takes channels first: who has them last moves them there and back.
            y, new = jax.vmap(moved, axis_name=AXIS, in_axes=(0, None), out_axes=(0, None))(
                jnp.moveaxis(x, -1, 1) if last else x, state
            )
            y = jnp.moveaxis(y, 1, -1) if last else y
            return _finish(setting, y, residual), eqx.filter(new, eqx.is_array)

        return apply, state

    return make


def _flax(fast):
    def make(setting, backend):
        import flax.linen

        del backend
        layer = flax.linen.BatchNorm(
            use_running_average=False,
            axis=setting.channel_axis,
            momentum=0.99,
            epsilon=1e-5,
            dtype=setting.dtype,
            use_fast_variance=fast,
        )
        stats = {"mean": jnp.zeros(setting.channels), "var": jnp.ones(setting.channels)}

        def apply(parameters, stats, x, residual):
            scale, bias = parameters
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return _finish(setting, y, residual), new["batch_stats"]

        return apply, stats

    return make


def _no_norm(setting, backend):
    """Nothing but what follows: what a block costs without a BatchNorm."""
    del backend
    return lambda parameters, state, x, residual: (_finish(setting, x, residual), state), ()


NO_NORM = Layer("no norm", _no_norm)
OURS = Layer("bn_fused", _ours)
# The rivals that `--against` takes, each with the forms in which it is compiled. Our own backend `jnp` is the rival
# that XLA compiles from plain jnp: the least that a kernel must beat.
RIVALS: Mapping[str, tuple[Layer, ...]] = MappingProxyType(
    {
        "equinox": (Layer("equinox batch", _equinox("batch")), Layer("equinox ema", _equinox("ema"))),
        "flax": (Layer("flax", _flax(True), "flax"), Layer("flax two-pass", _flax(False), "flax")),
        "jnp": (),
    }
)
_NAMED = {layer.name: layer for layers in ((NO_NORM,), *RIVALS.values()) for layer in layers}


def layer_named(name: str) -> tuple[Layer, str]:
    """The layer with this name and the backend for it: a rival's, `NO_NORM`'s, or else a backend of ours."""
    return (_NAMED[name], "") if name in _NAMED else (OURS, name)


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
    """A function to compile and its arguments' shapes; the bytes kept from the forward for the backward (None: "fwd").

    Kept is what JAX's derivative holds between the two: x if it is needed, and what was computed on the way, each array
    once; parameters and state, which are there anyway, are not counted.
    """

    function: Callable
    specs: tuple
    kept_bytes: int | None


def make_program(setting: Setting, layer_name: str, pass_name: str) -> Program:
    """The program of a pass; arguments as in `Setting`, `layer_named` and `PASSES`.

    - "fwd": a training step, y and the new state.
    - "fwd+bwd": the same, and the gradient with respect to x, the residual and all parameters.
    - "bwd": the gradient alone, from what the forward keeps.
    """
    if setting.block is not None and setting.activation is None:
        setting = dataclasses.replace(setting, activation="relu")
    layer, backend = layer_named(layer_name)
    apply, state = layer.make(setting, backend)
    parameter = jax.eval_shape(lambda: jnp.zeros(setting.channels))
    parameters = (parameter, parameter)
    if setting.block is not None:
        apply, weights = BLOCKS[setting.block].wrap(setting, apply)
        parameters = (parameters, *weights)
    x = jax.ShapeDtypeStruct(setting.array_shape, setting.dtype)
    operands = (parameters, state, x, x if setting.residual else None)
    if pass_name == "fwd":
        return Program(apply, operands, None)

    def pull_back(parameters, state, x, residual):
        def with_state(parameters, x, residual):
            return apply(parameters, state, x, residual)

        return jax.vjp(with_state, parameters, x, residual, has_aux=True)

    kept = _Kept(pull_back)
    dy, new_state, computed = jax.eval_shape(kept.forward, *operands)
    del new_state
    kept_bytes = kept.activation_bytes + sum(_nbytes(array) for array in computed)
    if pass_name == "bwd":
        return Program(kept.backward, (computed, operands, dy), kept_bytes)

    def forward_backward(parameters, state, x, residual, dy):
        y, pullback, new = pull_back(parameters, state, x, residual)
        # In training dy follows from y: without that, XLA computes parts of both in one kernel.
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, new, pullback(dy)

    return Program(forward_backward, (*operands, dy), kept_bytes)


def _nbytes(array) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


class _Kept:
    """Takes a derivative apart: `forward` returns what is computed and kept, `backward` goes on from there.

    What is kept as it was given is not returned from the forward, which would copy it: the backward is given it again.
    """

    def __init__(self, pull_back):
        self.pull_back = pull_back
        self.tree = None
        self.places = []  # of each kept array: ("given", index) or ("computed", index)
        self.activation_bytes = 0

    def forward(self, parameters, state, x, residual):
        y, pullback, new = self.pull_back(parameters, state, x, residual)
        leaves, self.tree = jax.tree.flatten(pullback)
        given = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves((parameters, state, x, residual)))}
        computed, order = [], {}
        for leaf in leaves:
            if id(leaf) in given:
                self.places.append(("given", given[id(leaf)]))
                continue
            if id(leaf) not in order:
                order[id(leaf)] = len(computed)
                computed.append(leaf)
            self.places.append(("computed", order[id(leaf)]))
        kept = {id(leaf) for leaf in leaves}
        self.activation_bytes = sum(_nbytes(array) for array in (x, residual) if id(array) in kept)
        return y, new, computed

    def backward(self, computed, operands, dy):
        sources = {"given": jax.tree.leaves(operands), "computed": computed}
        leaves = [sources[source][index] for source, index in self.places]
        return jax.tree.unflatten(self.tree, leaves)(dy)
