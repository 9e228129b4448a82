"""Kernels that XLA cannot see into, on arrays that it partitions: only each device's part reaches them.

The kernel is a stand-in: jnp code that writes down the shapes it is traced with. What XLA has partitioned before it is
traced has the shape of a device's part.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import bn_fused
from bn_fused import kernels

from support.child_process import answer
from support.collectives import collectives
from support.compilers import skip_without_compilers
from support.tolerances import assert_close

EXAMPLES, CHANNELS, POSITIONS = 8, 4, 6
PLACES = {
    "data": P("data"),
    "data_over_two_axes": P(("data", "model")),
    "data_and_channels": P("data", "model"),
    "data_and_positions": P("data", None, "model"),
    "channels": P(None, "model"),
    "positions": P(None, None, "data"),
    "whole": P(),
}
AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])


@pytest.fixture(autouse=True)
def enough_devices():
    if jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, here are {jax.device_count()}")


@pytest.fixture
def x64(unoptimised):
    """64-bit types for every thread: XLA asks from one of its own, and JAX 0.10 then has no thread's own settings."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def opaque():
    """The shapes of x that the operations of the backend `opaque` are traced with, by operation."""
    seen = []

    def watched(name, operation):
        @functools.wraps(operation)
        def call(**operands):
            seen.append((name, operands["x"].shape))
            return operation(**operands)

        return call

    operations = kernels.backends.jnp.BACKEND.operations
    kernels.register(kernels.Backend("opaque", {name: watched(name, of) for name, of in operations.items()}))
    yield seen
    kernels.unregister("opaque")


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])


def data(seed=0, shape=(EXAMPLES, CHANNELS, POSITIONS), mean=0.0, dtype=np.float32):
    return jnp.asarray((mean + np.random.default_rng(seed).standard_normal(shape)).astype(dtype))


def running_stats(dtype=jnp.float32):
    rng = np.random.default_rng(7)
    return bn_fused.RunningStats(
        jnp.asarray(rng.standard_normal(CHANNELS), dtype),
        jnp.asarray(rng.uniform(0.5, 2, CHANNELS), dtype),
        jnp.asarray(0.25, dtype),
        jnp.asarray(3, jnp.int32),
    )


def step(x, weight, bias, stats, residual, backend, mask=None, approach="ema", **settings):
    return bn_fused.batch_norm(
        x,
        stats,
        weight,
        bias,
        channel_axis=1,
        residual=residual,
        activation="silu",
        approach=approach,
        mask=mask,
        backend=backend,
        **settings,
    )


def with_gradients(backend, mask=None, **settings):
    """A function of (x, weight, bias, stats, residual): the results of a step and its gradients."""

    def call(x, weight, bias, stats, residual):
        def results(x, weight, bias, mean, var, residual):
            changed = stats._replace(mean=mean, var=var)
            y, after = step(x, weight, bias, changed, residual, backend, mask, **settings)
            return y, after.mean, after.var

        outputs, pullback = jax.vjp(results, x, weight, bias, stats.mean, stats.var, residual)
        return outputs, pullback(jax.tree.map(lambda leaf: 2 * leaf + 1, outputs))

    return call


def inputs(x64=True):
    dtype = np.float64 if x64 else np.float32
    rng = np.random.default_rng(3)
    weight, bias = (jnp.asarray(rng.uniform(0.5, 1.5, CHANNELS), dtype) for _ in range(2))
    return data(dtype=dtype), weight, bias, running_stats(dtype), data(1, dtype=dtype)


@functools.cache
def on_one_device():
    """What the reference gives for `inputs`."""
    return jax.jit(with_gradients("reference"))(*inputs())


def place(values, mesh, spec):
    x, weight, bias, stats, residual = values
    per_channel = P(spec[1]) if len(spec) > 1 else P()

    def put(value):
        return jax.device_put(value, NamedSharding(mesh, per_channel if value.ndim else P()))

    x, residual = (jax.device_put(value, NamedSharding(mesh, spec)) for value in (x, residual))
    return x, put(weight), put(bias), jax.tree.map(put, stats), residual


def assert_equal(actual, expected):
    """Within the rounding of float64 sums over the rows, whose terms and derivatives are of the size of 100."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, 100 + abs(np.asarray(other)), dtype=np.float64)


def part(spec, mesh):
    return NamedSharding(mesh, spec).shard_shape((EXAMPLES, CHANNELS, POSITIONS))


@AXIS_TYPES
@pytest.mark.parametrize("where", PLACES)
def test_a_kernel_computes_each_devices_part_and_the_results_are_those_of_one_device(where, axis_type, opaque, x64):
    mesh, spec = make_mesh(axis_type), PLACES[where]
    with jax.set_mesh(mesh):
        placed = place(inputs(), mesh, spec)
        actual = jax.jit(with_gradients("opaque"))(*placed)
    assert {shape for _, shape in opaque} == {part(spec, mesh)}
    sharding = NamedSharding(mesh, spec)
    for array in (actual[0][0], actual[1][0], actual[1][-1]):
        assert array.sharding.is_equivalent_to(sharding, 3), array.sharding
    assert_equal(actual, on_one_device())


@pytest.mark.parametrize("where", PLACES)
def test_one_all_reduce_forward_and_one_backward_and_none_where_no_rows_are_shared(where, opaque):
    mesh, spec = make_mesh(), PLACES[where]
    shares_rows = where not in ("channels", "whole")
    x, weight, bias, stats, residual = place(inputs(x64=False), mesh, spec)

    def forward(x):
        return step(x, weight, bias, stats, residual, "opaque")

    def gradient(x, dy):
        return jax.vjp(lambda x: forward(x)[0], x)[1](dy)

    for function, operands, exchanges in ((forward, (x,), 1), (gradient, (x, x), 2)):
        opaque.clear()
        reduced = collectives(jax.jit(function).lower(*operands).compile())
        assert [operation for operation, _ in reduced] == ["all-reduce"] * (exchanges if shares_rows else 0), reduced
        assert {shape for _, shape in opaque} == {part(spec, mesh)}
    if not shares_rows:
        assert {name for name, _ in opaque} == {"forward", "backward"}


def test_masked_rows_count_exactly_where_devices_have_unequal_shares(opaque, x64):
    mask = np.ones((EXAMPLES, POSITIONS), bool)
    mask[: EXAMPLES // 2] = False
    mask[-1, 2:] = False
    mesh = make_mesh()
    placed = place(inputs(), mesh, P("data"))
    sharded = jax.device_put(jnp.asarray(mask), NamedSharding(mesh, P("data")))
    actual = jax.jit(with_gradients("opaque", sharded))(*placed)
    assert_equal(actual, jax.jit(with_gradients("reference", jnp.asarray(mask)))(*inputs()))


def test_a_mean_of_ten_thousand_standard_deviations_keeps_its_variance(opaque):
    mesh, stats = make_mesh(), bn_fused.RunningStats.init(CHANNELS)
    x = data(mean=1e4)
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    y, _ = jax.jit(lambda x: bn_fused.batch_norm(x, stats, channel_axis=1, backend="opaque"))(placed)
    exact = np.asarray(x, np.float64)
    mu, var = (f(exact, (0, 2), keepdims=True) for f in (np.mean, np.var))
    expected = (exact - mu) / np.sqrt(var + 1e-5)
    assert_close(y, expected, 1 + abs(expected))


def test_parts_that_are_not_equally_large_give_the_right_numbers(opaque, x64):
    """7 examples on 2 devices: XLA would pad a part, and what is padded must not count."""
    mesh = make_mesh()
    x = data(shape=(7, CHANNELS, POSITIONS), dtype=np.float64)
    stats = running_stats(jnp.float64)

    def call(x, backend):
        x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P("data")))
        return bn_fused.batch_norm(x, stats, channel_axis=1, backend=backend)[0]

    whole = jax.device_put(x, NamedSharding(mesh, P()))
    actual = jax.jit(lambda x: call(x, "opaque"))(whole)
    expected = bn_fused.batch_norm(2 * x, stats, channel_axis=1, backend="reference")[0]
    assert_equal(actual, expected)


def test_two_settings_are_two_programs_to_the_compilation_cache(opaque):
    """The cache knows a program by its text, in which the code for the parts is not."""
    mesh, stats = make_mesh(), bn_fused.RunningStats.init(CHANNELS)
    x = jax.device_put(data(), NamedSharding(mesh, P("data")))

    def text(eps):
        step = jax.jit(lambda x: bn_fused.batch_norm(x, stats, channel_axis=1, eps=eps, backend="opaque")[0])
        lowered = step.lower(x).as_text()
        assert "CustomSPMDPartitioning" in lowered
        return [line for line in lowered.splitlines() if "CustomSPMDPartitioning" not in line]

    assert text(1e-5) == text(1e-5)
    assert text(1e-5) != text(1e-3)


@pytest.mark.parametrize("how", ["vmap", "scan", "remat", "jvp", "shard_map", "inference", "virtual"])
def test_transforms_around_a_partitioned_kernel(how, opaque, x64):
    mesh = make_mesh()
    x, weight, bias, stats, residual = inputs()
    expected_x, sharding = x, P("data")
    if how in ("vmap", "scan"):
        x = expected_x = jnp.stack([x, x + 1])
        residual = jnp.stack([residual, residual])
        sharding = P(None, "data")

    def call(x, residual, backend):
        def one(x, residual):
            return step(x, weight, bias, stats, residual, backend, inference=how == "inference")[0]

        if how == "vmap":
            return jax.grad(lambda x: jnp.sum(jax.vmap(one)(x, residual) ** 2))(x)
        if how == "scan":
            return jax.grad(lambda x: jnp.sum(jax.lax.map(lambda pair: one(*pair), (x, residual)) ** 2))(x)
        if how == "remat":
            return jax.grad(lambda x: jnp.sum(jax.checkpoint(one)(x, residual) ** 2))(x)
        if how == "jvp":
            return jax.jvp(lambda x: one(x, residual), (x,), (x**2,))
        if how == "virtual":
            settings = {"virtual_batch_size": 2, "backend": "jnp" if backend == "reference" else backend}
            function = functools.partial(bn_fused.batch_norm, channel_axis=1, **settings)
            return jax.grad(lambda x: jnp.sum(function(x, stats, weight, bias)[0] ** 3))(x)
        return jax.grad(lambda x: jnp.sum(one(x, residual) ** 2))(x)

    expected = jax.jit(functools.partial(call, backend="reference"))(expected_x, residual)
    run = functools.partial(call, backend="opaque")
    if how == "shard_map":
        # A device's part is then a batch of its own.
        run = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        halves = [call(*pair, "reference") for pair in zip(jnp.split(x, 2), jnp.split(residual, 2), strict=True)]
        expected = jnp.concatenate(halves)
    placed = [jax.device_put(value, NamedSharding(mesh, sharding)) for value in (x, residual)]
    compiled = jax.jit(run).lower(*placed).compile()
    assert all(operation == "all-reduce" for operation, _ in collectives(compiled))
    assert_equal(compiled(*placed), expected)
    assert opaque
    assert all(EXAMPLES not in shape for _, shape in opaque), opaque


@pytest.mark.parametrize("first", ["in a shard_map", "outside"])
def test_of_two_layers_that_are_alike_one_is_in_a_shard_map(first, opaque):
    mesh, stats = make_mesh(), bn_fused.RunningStats.init(CHANNELS)

    def layer(x):
        return bn_fused.batch_norm(x, stats, channel_axis=1, backend="opaque")[0]

    inputs = {"in a shard_map": data(), "outside": data(1)[: EXAMPLES // 2]}
    layers = {"in a shard_map": jax.shard_map(layer, mesh=mesh, in_specs=P("data"), out_specs=P("data"))}
    with jax.set_mesh(mesh):
        placed = jax.device_put(inputs, NamedSharding(mesh, P("data")))
        order = sorted(inputs, key=lambda place: place != first)
        results = jax.jit(lambda xs: {place: layers.get(place, layer)(xs[place]) for place in order})(placed)
    # Their x has the same shape, and one of them is all that a device has.
    assert set(opaque) == {
        ("forward", (EXAMPLES // 2, CHANNELS, POSITIONS)),
        ("moments", (EXAMPLES // 4, CHANNELS, POSITIONS)),
        ("normalise", (EXAMPLES // 4, CHANNELS, POSITIONS)),
    }
    step = functools.partial(bn_fused.batch_norm, channel_axis=1, virtual_batch_size=EXAMPLES // 2, backend="jnp")
    for place, x in inputs.items():
        assert_close(results[place], step(x, stats)[0], 10)


def test_a_tpu_kernel_is_refused_by_a_sentence_where_it_cannot_be_given_parts():
    target = kernels.Target("tpu", kernels.CHIPS["v5e"], partitioned=True)
    problem = kernels.Problem(1, 1024, 128, "float32")
    with pytest.raises(kernels.BackendError, match="name the devices in a shard_map"):
        kernels.choose(problem, target, "pallas_tpu")


ON_FOUR_GPUS = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
import bn_fused
from bn_fused import kernels
from bn_fused.bench import deviceless
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(platform="cuda", topology_name="h200", topology="1x1x4",
                                       target_config=deviceless.gpu_description(kernels.CHIPS["h200"])).devices
mesh = Mesh(np.array(devices), ("data",))
stats = bn_fused.RunningStats.init(256)
def step(x, dy):
    y, pullback, new = jax.vjp(lambda x: bn_fused.batch_norm(x, stats, backend="pallas_gpu"), x, has_aux=True)
    return y, pullback(dy)[0], new
x = jax.ShapeDtypeStruct((4 * 4096, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
text = jax.jit(step).trace(x, x).lower(lowering_platforms=("cuda",)).compile().as_text()
json.dump({
    "kernels": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
    "all_reduces": len(re.findall(r" all-reduce(?:-start)?\\(", text)),
    "gathers": len(re.findall(r"all-gather|all-to-all|collective-permute", text)),
}, sys.stdout)
"""


@pytest.mark.compilers
def test_the_kernels_for_gpus_run_on_four_of_them_with_one_all_reduce_each_way():
    skip_without_compilers("h200")
    counted = answer(["-c", ON_FOUR_GPUS], None, timeout=300)
    # moments and their merge, normalise; normalise_backward and the merge of its sums, moments_backward
    assert counted == {"kernels": 6, "all_reduces": 2, "gathers": 0}
