"""Groups of devices with statistics of their own, as JAX's `axis_index_groups` has them.

`test_devices` has those that are axes of a mesh.
"""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bn_fused

from support.programs import CHANNELS, assert_trees_close, scalar
from support.tolerances import assert_same_bits
from support.versions import also_on_the_newest_jax

DEVICES, GROUPS = 4, ((0, 2), (3, 1))


@pytest.fixture(autouse=True)
def enough_devices(x64):
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, here are {jax.device_count()}")


def make_mesh():
    return jax.make_mesh(
        (DEVICES,), ("dev",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )


def group_inputs(masked):
    """x [devices, examples, positions, channels], weight, bias, and a mask or None."""
    keys = jax.random.split(jax.random.key(3), 4)
    x = 3 + 2 * jax.random.normal(keys[0], (DEVICES, 6, 5, CHANNELS))
    weight, bias = (jax.random.normal(key, (CHANNELS,)) for key in keys[1:3])
    return x, weight, bias, jax.random.bernoulli(keys[3], 0.7, x.shape[:3]) if masked else None


def in_groups(x, weight, bias, mask, **settings):
    """One device's y and new statistics."""
    stats = bn_fused.RunningStats.init(CHANNELS, x.dtype)
    return bn_fused.batch_norm(
        x, stats, weight, bias, mask=mask, axis_name="dev", axis_index_groups=GROUPS, activation="gelu", **settings
    )


def without_types(function):
    """Under shard_map with check_vma=False, on what has the devices' axis in front."""

    def on_a_device(*values):
        results = function(*jax.tree.map(lambda value: value[0], values))
        return jax.tree.map(lambda value: value[None], results)

    def run(*values):
        specs = jax.tree.map(lambda _: P("dev"), values)
        return jax.shard_map(on_a_device, mesh=make_mesh(), in_specs=specs, out_specs=P("dev"), check_vma=False)(
            *values
        )

    return jax.jit(run)


@pytest.mark.parametrize(
    ("approach", "masked"),
    [
        ("ema", True),
        *also_on_the_newest_jax(("batch", False)),
        pytest.param("ema", False, marks=pytest.mark.slow),
        pytest.param("batch", True, marks=pytest.mark.slow),
    ],
)
def test_each_group_of_devices_has_the_statistics_of_its_own_batch(approach, masked):
    x, weight, bias, mask = group_inputs(masked)

    def call(x, mask):
        return in_groups(x, weight, bias, mask, approach=approach)

    for run in (functools.partial(jax.pmap, axis_name="dev"), without_types):
        y, stats = run(call)(x, mask)
        for group in GROUPS:
            members = np.array(group)
            whole_x = jnp.concatenate(list(x[members]))
            whole_mask = None if mask is None else jnp.concatenate(list(mask[members]))
            fresh = bn_fused.RunningStats.init(CHANNELS, x.dtype)
            expected = bn_fused.batch_norm(
                whole_x, fresh, weight, bias, mask=whole_mask, approach=approach, activation="gelu"
            )
            of_group = jax.tree.map(lambda value, first=group[0]: value[first], stats)
            y_expected, stats_expected = expected
            assert of_group.count == stats_expected.count
            assert_trees_close((jnp.concatenate(list(y[members])), of_group[:3]), (y_expected, stats_expected[:3]))
            for member in group:
                for ours, first in zip(stats, of_group, strict=True):
                    assert_same_bits(ours[member], first)


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_in_groups_are_those_of_the_same_program_with_jaxs_own_sums(masked):
    x, weight, bias, mask = group_inputs(masked)

    def loss(x, weight, bias, mask, backend):
        y, stats = in_groups(x, weight, bias, mask, backend=backend)
        return scalar(y) + scalar((stats.mean, stats.var))

    def both(x, mask, backend):
        values = x, weight, bias
        gradient = jax.grad(loss, argnums=(0, 1, 2))(*values, mask, backend)
        tangents = tuple(map(jnp.cos, values))
        return gradient, jax.jvp(lambda *values: in_groups(*values, mask, backend=backend)[0], values, tangents)

    fused, expected = (
        jax.pmap(functools.partial(both, backend=backend), axis_name="dev")(x, mask)
        for backend in ("auto", "reference")
    )
    assert_trees_close(fused, expected)


def test_groups_exchange_once_each_way_among_themselves():
    x, weight, bias, _ = group_inputs(False)

    def step(x):
        y, pullback = jax.vjp(lambda x: in_groups(x, weight, bias, None)[0], x)
        return pullback(y)[0]

    text = without_types(step).lower(x).compile().as_text()
    exchanged = re.findall(r" all-reduce(?:-start)?\(.*", text)
    assert len(exchanged) == 2 and "all-gather" not in text and "collective-permute" not in text
    assert all("replica_groups={{0,2},{3,1}}" in line for line in exchanged), exchanged


def test_a_layer_takes_groups_beside_the_name_of_its_examples():
    x, *_ = group_inputs(False)
    x = jnp.moveaxis(x, -1, 2)
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        CHANNELS, ("batch", "dev"), "batch", axis_index_groups=GROUPS, dtype=x.dtype
    )
    assert layer.axis_index_groups == GROUPS
    arrays, rest = eqx.partition(state, eqx.is_array)

    def on_a_device(x, arrays):
        mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return mapped(x, eqx.combine(arrays, rest))[0]

    y = jax.pmap(on_a_device, axis_name="dev", in_axes=(0, None))(x, arrays)
    stats = bn_fused.RunningStats.init(CHANNELS, x.dtype)
    for group in GROUPS:
        members = np.array(group)
        expected, _ = bn_fused.batch_norm(jnp.concatenate(list(x[members])), stats, channel_axis=1)
        assert_trees_close(jnp.concatenate(list(y[members])), expected)


def test_groups_that_jax_cannot_sum_over_are_refused_with_what_to_do_instead():
    x, weight, bias, _ = group_inputs(False)
    typed = jax.shard_map(
        lambda x: in_groups(x[0], weight, bias, None)[0][None], mesh=make_mesh(), in_specs=P("dev"), out_specs=P("dev")
    )
    with pytest.raises(
        NotImplementedError, match=r"axis_index_groups is \(\(0, 2\), \(3, 1\)\).*one axis for the groups"
    ):
        jax.jit(typed)(x)
    with pytest.raises(ValueError, match="needs exactly one axis of devices in axis_name; there are 0"):
        jax.vmap(lambda x: in_groups(x, weight, bias, None)[0], axis_name="dev")(x)
    with pytest.raises(ValueError, match="axis 'dev' has the indices 0 to 3"):
        jax.pmap(
            lambda x: bn_fused.batch_norm(
                x, bn_fused.RunningStats.init(CHANNELS), axis_name="dev", axis_index_groups=[[0, 1]]
            )[0],
            axis_name="dev",
        )(x)
