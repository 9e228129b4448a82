"""The layers that are checked and timed on the same work: ours with each backend, and its rivals."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax

import bn_fused


class Functions(NamedTuple):
    """The two jitted functions of a layer. `arrays` holds its parameters and state.

    - `forward(arrays, x) -> (y, arrays)`: a training step, or inference if the layer is in inference mode.
    - `forward_backward(arrays, x, dy) -> (y, arrays, (dx, dweight, dbias))`: the same and its gradient; y is
      returned because the next layer of a network reads it.
    """

    forward: Callable
    forward_backward: Callable


@dataclasses.dataclass(frozen=True)
class Provider:
    """A layer to run: `name` for the tables, `make(channels)` gives the layer and its state."""

    name: str
    make: Callable[[int], tuple[Any, eqx.nn.State]]


def bn_fused_layer(backend: str, approach: str = "batch", **arguments) -> Provider:
    """`bn_fused.BatchNorm` with the given backend, approach and further arguments."""

    def make(channels):
        return eqx.nn.make_with_state(bn_fused.BatchNorm)(
            channels, "batch", approach=approach, backend=backend, **arguments
        )

    return Provider(backend, make)


def _equinox(channels):
    return eqx.nn.make_with_state(eqx.nn.BatchNorm)(channels, "batch", mode="batch")


EQUINOX = Provider("equinox", _equinox)


def functions(layer, state) -> tuple[Any, Functions]:
    """The arrays of a layer and its state, and the functions that take them; see `Functions`.

    The layer runs as it does in a network: under `jax.vmap` with its axis name, x [examples, channels,
    *spatial].
    """
    arrays, static = eqx.partition((layer, state), eqx.is_array)

    def step(layer, state, x):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    def keep(layer, state):
        return eqx.filter((layer, state), eqx.is_array)

    @jax.jit
    def forward(arrays, x):
        layer, state = eqx.combine(arrays, static)
        y, state = step(layer, state, x)
        return y, keep(layer, state)

    @jax.jit
    def forward_backward(arrays, x, dy):
        layer, state = eqx.combine(arrays, static)

        def output(x, weight, bias):
            moved = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
            return step(moved, state, x)

        y, pullback, new_state = jax.vjp(output, x, layer.weight, layer.bias, has_aux=True)
        return y, keep(layer, new_state), pullback(dy)

    return arrays, Functions(forward, forward_backward)
