"""One of several processes that train a small network together, 4 devices in all; `test_processes` starts it.

Its one argument is JSON: `address` of the coordinator, number of `processes` and which `process` this is, `approach`,
`steps`, `heartbeat` (seconds), `checkpoint` (a path), and `dies_at`: the step before which the last process ends
without a word, or null.
"""

import json
import os
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import bn_fused

settings = json.loads(sys.argv[1])
processes, process = settings["processes"], settings["process"]
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        settings["address"],
        processes,
        process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=settings["heartbeat"],
    )

DEVICES, CHANNELS, EXAMPLES = 4, 6, 8


class Network(eqx.Module):
    """[5] to [1]: two linear maps with a BatchNorm over all examples of all devices between them."""

    first: eqx.nn.Linear
    norm: bn_fused.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, approach):
        keys = jax.random.split(jax.random.key(0), 2)
        self.first = eqx.nn.Linear(5, CHANNELS, key=keys[0])
        self.norm = bn_fused.BatchNorm(CHANNELS, ("batch", "devices"), approach, activation="relu")
        self.last = eqx.nn.Linear(CHANNELS, 1, key=keys[1])

    def __call__(self, x, state):
        y, state = self.norm(self.first(x), state)
        return self.last(y), state


mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(DEVICES), ("devices",))
split, whole = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())


def everywhere(array):
    """The array, whole on every device."""
    return jax.make_array_from_callback(np.shape(array), whole, lambda index: np.asarray(array)[index])


def shared(array):
    """The array, a part of its first axis on each device."""
    return jax.make_array_from_callback(array.shape, split, lambda index: array[index])


model, state = eqx.nn.make_with_state(Network)(settings["approach"])
arrays, static = eqx.partition((model, state), eqx.is_array)
arrays = jax.tree.map(everywhere, arrays)


def loss_on_a_device(model, state, x, target):
    """The mean of all devices' losses, and the new state's arrays."""
    y, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    return jax.lax.pmean(jnp.mean((y - target) ** 2), "devices"), eqx.filter(state, eqx.is_array)


@jax.jit
def step(arrays, x, target):
    """The arrays of model and state after a step of gradient descent, and the loss before it."""

    def loss(parameters):
        model_arrays, state_arrays = parameters, arrays[1]
        spread = jax.shard_map(
            lambda m, s, x, t: loss_on_a_device(eqx.combine(m, static[0]), eqx.combine(s, static[1]), x, t),
            mesh=mesh,
            in_specs=(P(), P(), P("devices"), P("devices")),
            out_specs=(P(), P()),
        )
        return spread(model_arrays, state_arrays, x, target)

    (value, new_state), gradient = jax.value_and_grad(loss, has_aux=True)(arrays[0])
    moved = jax.tree.map(lambda p, g: p - 0.1 * g if jnp.issubdtype(p.dtype, jnp.floating) else p, arrays[0], gradient)
    return (moved, new_state), value


rng = np.random.default_rng(0)
losses = []
for number in range(settings["steps"]):
    if settings["dies_at"] == number and process == processes - 1:
        os._exit(17)
    x = rng.normal(size=(EXAMPLES, 5)).astype(np.float32)
    arrays, value = step(arrays, shared(x), shared(x[:, :1]))
    losses.append(float(value))
    if process == 0:
        path = pathlib.Path(settings["checkpoint"])
        # Written beside and moved into place: a reader finds the last whole one.
        local = jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), arrays)
        eqx.tree_serialise_leaves(path.with_suffix(".part"), local)
        os.replace(path.with_suffix(".part"), path)
print(
    json.dumps(
        {
            "losses": losses,
            "state": [np.asarray(leaf.addressable_data(0)).tolist() for leaf in jax.tree.leaves(arrays[1])],
        }
    )
)
