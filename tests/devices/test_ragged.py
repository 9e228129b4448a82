"""Ragged batches on several devices: what padding holds reaches nothing, and a device may have nothing else.

All that is compared is the same program's with zeros in padding, to the bit: `test_devices` has its values.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import bn_fused
from bn_fused.approaches import APPROACHES

from support.programs import scalar
from support.tolerances import assert_same_bits
from support.versions import ON_THE_NEWEST_JAX

DEVICES, LOCAL, CHANNELS, POSITIONS = 4, 2, 3, 5
SHAPE = (DEVICES * LOCAL, CHANNELS, POSITIONS)
STATE = bn_fused.RunningStats(P(), P(), P(), P())


@pytest.fixture(autouse=True)
def enough_devices():
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, here are {jax.device_count()}")


def padded_mask():
    mask = np.ones((SHAPE[0], POSITIONS), bool)
    mask[LOCAL : 2 * LOCAL] = False  # a whole device
    mask[-1, 3:] = False
    return mask


COUNTS = np.broadcast_to(padded_mask()[:, None], SHAPE)


def arguments(padding):
    """x, residual, weight, bias and the running statistics but for their counter."""
    random = np.random.default_rng(0)
    x, residual = (jnp.asarray(np.where(COUNTS, random.standard_normal(SHAPE), padding), jnp.float32) for _ in range(2))
    per_channel = (jnp.asarray(random.uniform(0.5, 1.5, CHANNELS), jnp.float32) for _ in range(4))
    return (x, residual, *per_channel, jnp.float32(0.3))


def step(axis_name, backend, phase, **settings):
    def call(x, residual, mask, weight, bias, mean, var, zero_frac):
        stats = bn_fused.RunningStats(mean, var, zero_frac, jnp.zeros_like(zero_frac, dtype=jnp.int32) + 1)
        return bn_fused.batch_norm(
            x,
            stats,
            weight,
            bias,
            channel_axis=1,
            axis_name=axis_name,
            residual=residual,
            mask=mask,
            activation="silu",
            approach="batch" if phase == "inference" else phase,
            inference=phase == "inference",
            warmup_period=3,
            debias="samples",
            backend=backend,
            **settings,
        )

    return call


def make_mesh():
    return jax.make_mesh((DEVICES,), ("dev",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def in_shard_map(check_vma):
    def wrap(*settings, **more):
        specs = (P("dev"), P("dev"), P("dev"), *(P(),) * 5)
        return jax.shard_map(
            step("dev", *settings, **more),
            mesh=make_mesh(),
            in_specs=specs,
            out_specs=(P("dev"), STATE),
            check_vma=check_vma,
        )

    return wrap


def in_pmap(*settings):
    mapped = jax.pmap(step("dev", *settings), axis_name="dev", in_axes=(0, 0, 0, *(None,) * 5), out_axes=(0, None))

    def call(*operands):
        split = [jnp.reshape(value, (DEVICES, LOCAL, *value.shape[1:])) for value in operands[:3]]
        y, stats = mapped(*split, *operands[3:])
        return jnp.reshape(y, SHAPE), stats

    return call


def partitioned(*settings):
    """Plain jit: XLA partitions what lies on several devices."""
    call, split = step(None, *settings), NamedSharding(make_mesh(), P("dev"))

    def on_devices(x, residual, mask, *others):
        placed = (jax.lax.with_sharding_constraint(value, split) for value in (x, residual, jnp.asarray(mask)))
        return call(*placed, *others)

    return on_devices


PATHS = {
    "check_vma": in_shard_map(check_vma=True),
    "no_check_vma": in_shard_map(check_vma=False),
    "pmap": in_pmap,
    "partitioned": partitioned,
}


REFERENCE_BY_DEFAULT = [
    ("check_vma", "reference", "ema"),
    ("no_check_vma", "reference", "inference"),
    ("partitioned", "reference", "ema"),
]


def check(function, compiled=True):
    """y where it counts, the new statistics and every gradient of what a loss makes of them."""

    def loss(*arguments):
        x, residual, *others = arguments
        y, new = function(x, residual, padded_mask(), *others)
        return scalar((jnp.where(COUNTS, y, 0.0), *new[:3])), (y, new)

    run = jax.grad(loss, argnums=range(7), has_aux=True)
    if compiled:
        run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    expected_gradients, (expected_y, expected_new) = run(*arguments(0.0))
    gradients, (y, new) = run(*arguments(np.nan))
    assert_same_bits(np.asarray(y)[COUNTS], np.asarray(expected_y)[COUNTS], "y")
    for got, expected in zip((*new, *gradients), (*expected_new, *expected_gradients), strict=True):
        assert np.all(np.isfinite(expected))
        assert_same_bits(got, expected)


# The reference is the same code on every path, and by default on one with types, one without and one of XLA's own.
def default_or_not(each):
    """Of the reference a few by default, and on an older JAX none."""
    if each[1] == "jnp":
        return ()
    return ON_THE_NEWEST_JAX if each in REFERENCE_BY_DEFAULT else pytest.mark.slow


@pytest.mark.parametrize(
    ("path", "backend", "phase"),
    [
        pytest.param(*each, marks=default_or_not(each))
        for each in itertools.product(PATHS, ("jnp", "reference"), ("ema", "inference"))
    ],
)
def test_nothing_depends_on_what_padding_holds(path, backend, phase):
    check(PATHS[path](backend, phase), compiled=path != "pmap")


@pytest.mark.parametrize("approach", APPROACHES)
def test_nothing_depends_on_it_where_more_devices_than_are_packed_share_their_moments(approach, monkeypatch):
    monkeypatch.setattr(bn_fused.kernels.merging, "PACKED_DEVICES", 1)
    check(PATHS["check_vma"]("jnp", approach))


@pytest.mark.parametrize("backend", ["jnp", "reference"])
def test_nothing_depends_on_it_where_virtual_batches_lie_on_each_device(backend):
    check(PATHS["no_check_vma"](backend, "ema", virtual_batch_size=1))
