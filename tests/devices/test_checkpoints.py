"""Parameters and state saved on some devices and restored on another number of them, bit for bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import bn_fused
from bn_fused.approaches import APPROACHES

from support.tolerances import assert_same_bits
from support.versions import also_on_the_newest_jax

CHANNELS, EXAMPLES = 5, 8


def mesh_of(devices):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("devices",))


def make(approach):
    return eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, ("batch", "devices"), approach, warmup_period=3)


def train(layer, state, devices, steps, seed=0):
    """Layer and state after some steps of gradient descent on the affine parameters, replicated over the devices."""
    mesh = mesh_of(devices)
    split, whole = P("devices"), P()
    arrays, static = eqx.partition((layer, state), eqx.is_array)
    arrays = jax.device_put(arrays, NamedSharding(mesh, whole))

    def on_a_device(arrays, x):
        layer, state = eqx.combine(arrays, static)
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return jax.lax.pmean(jnp.mean((y - x) ** 2), "devices"), eqx.filter(state, eqx.is_array)

    @jax.jit
    def step(arrays, x):
        def loss(layer_arrays):
            spread = jax.shard_map(on_a_device, mesh=mesh, in_specs=(whole, split), out_specs=(whole, whole))
            return spread((layer_arrays, arrays[1]), x)

        (_, state), gradient = jax.value_and_grad(loss, has_aux=True, allow_int=True)(arrays[0])
        return jax.tree.map(
            lambda p, g: p - 0.1 * g if jnp.issubdtype(p.dtype, jnp.floating) else p, arrays[0], gradient
        ), state

    rng = np.random.default_rng(seed)
    for _ in range(steps):
        x = rng.normal(2, 3, (EXAMPLES, CHANNELS)).astype(np.float32)
        arrays = step(arrays, jax.device_put(x, NamedSharding(mesh, split)))
    return eqx.combine(arrays, static)


def assert_same(one, other):
    one, other = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (one, other))
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert_same_bits(np.asarray(left), np.asarray(right), "leaf")


def through_equinox(tree, like, path, sharding):
    eqx.tree_serialise_leaves(path / "leaves.eqx", tree)
    return eqx.tree_deserialise_leaves(path / "leaves.eqx", like)


def through_orbax(tree, like, path, sharding):
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    arrays, _ = eqx.partition(tree, eqx.is_array)
    like_arrays, static = eqx.partition(like, eqx.is_array)
    with checkpoint.StandardCheckpointer() as checkpointer:
        # Orbax knows dictionaries and lists; an Equinox module is neither, its leaves are.
        checkpointer.save(path / "leaves", jax.tree.leaves(arrays))
        checkpointer.wait_until_finished()
        targets = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for leaf in jax.tree.leaves(like_arrays)
        ]
        leaves = checkpointer.restore(path / "leaves", targets)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(like_arrays), leaves), static)


@pytest.mark.parametrize("through", [through_equinox, through_orbax])
@pytest.mark.parametrize(("saved_on", "restored_on"), [(4, 2), *also_on_the_newest_jax((2, 4), (4, 1), (1, 4))])
@pytest.mark.parametrize("approach", ["ema"])
def test_a_checkpoint_restores_on_another_number_of_devices(approach, saved_on, restored_on, through, tmp_path):
    trained = train(*make(approach), saved_on, steps=2)
    sharding = NamedSharding(mesh_of(restored_on), P())
    restored = through(trained, make(approach), tmp_path, sharding)
    assert_same(restored, trained)
    # And training goes on from there as it would have without the detour through a file.
    moved = jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(leaf), sharding) if eqx.is_array(leaf) else leaf, trained
    )
    assert_same(train(*restored, restored_on, steps=1, seed=1), train(*moved, restored_on, steps=1, seed=1))


@pytest.mark.parametrize("approach", APPROACHES)
def test_a_checkpoint_of_several_devices_is_one_of_one_device(approach, tmp_path):
    """Saved on 4 devices, restored into a layer that knows nothing of devices."""
    trained = train(*make(approach), 4, steps=2)
    alone = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", approach, warmup_period=3)
    restored = through_equinox(trained, alone, tmp_path, None)
    assert_same(restored, trained)
    layer, state = eqx.nn.inference_mode(restored[0]), restored[1]
    x = jnp.asarray(np.random.default_rng(3).normal(2, 3, (EXAMPLES, CHANNELS)).astype(np.float32))
    y, _ = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    assert np.all(np.isfinite(y))
