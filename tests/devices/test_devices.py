"""Several devices: shard_map, pmap, sharded arrays under jit, explicit meshes, against one device with the whole batch.

The comparison is `backend="reference"` on one device, in float64, with the gradient of the same loss: the loss of the
outputs of every example, and once of the new running statistics. Where JAX itself differentiates inside of shard_map
without types (check_vma=False) or pmap, it counts what all devices share once for each; there the same program with the
reference is the comparison.
"""

import contextlib
import dataclasses
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import bn_fused
import bn_fused.devices
from bn_fused.approaches import APPROACHES

from support.collectives import collectives
from support.programs import (
    CASES,
    CHANNELS,
    IN_AXES,
    MORE_CASES,
    OUT_AXES,
    POSITIONS,
    Inputs,
    Outputs,
    Program,
    another,
    assert_trees_close,
    inputs_and_count,
    scalar,
    stacked,
    varied,
)
from support.tolerances import assert_close, assert_same_bits
from support.versions import AN_OLDER_JAX, ON_THE_NEWEST_JAX, also_on_the_newest_jax

DEVICES, LOCAL = 4, 2
EXAMPLES = DEVICES * LOCAL

# The programs are the same with types and without: on an older JAX most are tested with them alone.
TYPED, UNTYPED = pytest.param(True, id="check_vma"), pytest.param(False, id="no_check_vma", marks=ON_THE_NEWEST_JAX)
CHECK_VMA = pytest.mark.parametrize("check_vma", [TYPED, UNTYPED])
# There, of most the case without residual, mask and activation; around vmap, all cases both ways.
SMALLEST, *LARGER = CASES
EACH_CASE = pytest.mark.parametrize("name", [SMALLEST, *also_on_the_newest_jax(*LARGER)])
ON_DEVICES = ("dev", "batch")

IN_SPECS = Inputs(P("dev"), P("dev"), P(), P(), P(), P(), P())
OUT_SPECS = Outputs(P("dev"), P(), P(), P())


@pytest.fixture(autouse=True)
def enough_devices(x64):
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, here are {jax.device_count()}")


def make_mesh(shape=(DEVICES,), names=("dev",), axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=jax.devices()[:DEVICES])


def mask_of(case):
    """The devices have 4, 0, 2 and 2 positions that count; the last device's are all in one example."""
    rows = [[1, 1], [1, 1], [0, 0], [0, 0], [1, 0], [0, 1], [0, 0], [1, 1]]
    return jnp.asarray(rows, bool) if case.mask else None


def make(name, later=True, axis_name=ON_DEVICES, backend="auto"):
    """The program to run on devices, the program on one device, and the inputs."""
    case = {**CASES, **MORE_CASES}[name]
    inputs, count = inputs_and_count(case, later, shape=(EXAMPLES,))
    program = Program(case, backend, mask_of(case), count, axis_name=axis_name)
    return program, dataclasses.replace(program, backend="reference", axis_name="batch"), inputs


def local_step(program, inputs, mask):
    """The step on one device's examples, under the vmap with the name "batch"."""
    return jax.vmap(program.example, axis_name="batch", in_axes=(IN_AXES, 0), out_axes=OUT_AXES)(inputs, mask)


def spread(program, mesh, local=local_step, in_specs=IN_SPECS, out_specs=OUT_SPECS, **options):
    """A function of inputs: `local(program, inputs, mask)` on each device's part of them."""

    def on_device(inputs, mask):
        return local(program, inputs, mask)

    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(in_specs, in_specs.x), out_specs=out_specs, **options)
    return lambda inputs: mapped(inputs, program.mask)


def compiled(function, gradient=True):
    """The function, with the gradient of its outputs' scalar or without."""

    def call(inputs):
        if not gradient:
            return function(inputs)
        outputs, pullback = jax.vjp(function, inputs)
        return outputs, pullback(jax.grad(scalar)(outputs))

    return jax.jit(call)


def check(function, expected_function, inputs, gradient=True):
    """Outputs and the gradient of their scalar agree with those of another function."""
    actual, expected = (compiled(each, gradient)(inputs) for each in (function, expected_function))
    assert_trees_close(actual, expected, n=EXAMPLES * POSITIONS)


@functools.cache
def whole_batch(name, later):
    """What one device gives with the whole batch of a case, and the gradient."""
    _, one_device, inputs = make(name, later)
    return compiled(one_device.batch)(inputs)


def check_whole_batch(function, inputs, name, later=True):
    """Outputs and the gradient of their scalar are those of one device with the whole batch of a case."""
    assert_trees_close(compiled(function)(inputs), whole_batch(name, later), n=EXAMPLES * POSITIONS)


# --- shard_map -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])
@pytest.mark.parametrize("name", CASES)
def test_shard_map_around_vmap_is_one_device_with_the_whole_batch(name, check_vma):
    program, _, inputs = make(name)
    check_whole_batch(spread(program, make_mesh(), check_vma=check_vma), inputs, name)


@CHECK_VMA
@pytest.mark.parametrize("name", ["ema-all", *[pytest.param(name, marks=pytest.mark.slow) for name in CASES]])
def test_first_step_in_shard_map_is_one_device_with_the_whole_batch(name, check_vma):
    program, _, inputs = make(name, later=False)
    check_whole_batch(spread(program, make_mesh(), check_vma=check_vma), inputs, name, later=False)


@CHECK_VMA
@pytest.mark.parametrize("name", ["batch", "ema_compatibility-residual"])
def test_one_example_per_device_without_vmap_is_one_device_with_the_whole_batch(name, check_vma):
    program, one_device, inputs = make(name, axis_name="dev")

    def first(values):
        return None if values is None else values[0]

    def local(program, inputs, mask):
        one = inputs._replace(x=inputs.x[0], residual=first(inputs.residual))
        outputs = program.example(one, first(mask))
        return outputs._replace(y=outputs.y[None])

    def take(values):
        return None if values is None else values[::LOCAL]

    inputs = inputs._replace(x=take(inputs.x), residual=take(inputs.residual))
    program, one_device = (dataclasses.replace(p, mask=take(p.mask)) for p in (program, one_device))
    check(spread(program, make_mesh(), local, check_vma=check_vma), one_device.batch, inputs)


@CHECK_VMA
def test_the_functional_form_averages_over_devices(check_vma):
    case = CASES["batch"]
    inputs, count = inputs_and_count(case, later=True, shape=(EXAMPLES,))
    one_device = Program(case, "reference", None, count)

    def local(program, inputs, mask):
        stats = bn_fused.RunningStats(inputs.mean, inputs.var, inputs.zero_frac, count)
        y, stats = bn_fused.batch_norm(
            inputs.x, stats, inputs.weight, inputs.bias, channel_axis=1, axis_name="dev", momentum=0.9
        )
        return Outputs(y, stats.mean, stats.var, stats.zero_frac)

    check(spread(one_device, make_mesh(), local, check_vma=check_vma), one_device.batch, inputs)


@CHECK_VMA
def test_two_device_axes_are_one_device_with_the_whole_batch(check_vma):
    program, _, inputs = make("ema-all", axis_name=("a", "batch", "b"))
    split = IN_SPECS._replace(x=P(("a", "b")), residual=P(("a", "b")))
    out = OUT_SPECS._replace(y=P(("a", "b")))
    mesh = make_mesh((2, 2), ("a", "b"))
    check_whole_batch(spread(program, mesh, in_specs=split, out_specs=out, check_vma=check_vma), inputs, "ema-all")


def test_averaging_over_one_of_two_device_axes_leaves_the_other_its_own_statistics():
    program, one_device, inputs = make("ema-all", axis_name=("a", "batch"))

    def local(program, inputs, mask):
        outputs = local_step(program, inputs, mask)
        return outputs._replace(mean=outputs.mean[None], var=outputs.var[None])

    mesh = make_mesh((2, 2), ("b", "a"))
    split = IN_SPECS._replace(x=P(("b", "a")), residual=P(("b", "a")))
    # With the mask, zero_frac moves where anything counts, which it does for both halves: that is left out.
    out = Outputs(P(("b", "a")), P("b"), P("b"), P())

    def fields(outputs):
        return outputs.y, outputs.mean, outputs.var

    def halves(inputs):
        results = []
        for half in (slice(0, EXAMPLES // 2), slice(EXAMPLES // 2, None)):
            part = inputs._replace(x=inputs.x[half], residual=inputs.residual[half])
            results.append(fields(dataclasses.replace(one_device, mask=one_device.mask[half]).batch(part)))
        y, mean, var = zip(*results, strict=True)
        return jnp.concatenate(y), jnp.stack(mean), jnp.stack(var)

    spread_out = spread(program, mesh, local, split, out, check_vma=False)
    check(lambda inputs: fields(spread_out(inputs)), halves, inputs)


@CHECK_VMA
def test_an_ensemble_around_shard_map_is_an_ensemble_on_one_device(check_vma):
    program, one_device, inputs = make("ema-all")
    members = stacked(inputs, varied(inputs, 1.5))
    on_devices = spread(program, make_mesh(), check_vma=check_vma)
    check(jax.vmap(on_devices), jax.vmap(one_device.batch), members)


@CHECK_VMA
def test_an_ensemble_inside_shard_map_is_an_ensemble_on_one_device(check_vma):
    program, one_device, inputs = make("ema_compatibility-residual")
    members = stacked(inputs, varied(inputs, 1.5))

    def local(program, members, mask):
        return jax.vmap(lambda inputs: local_step(program, inputs, mask))(members)

    split = IN_SPECS._replace(x=P(None, "dev"), residual=P(None, "dev"))

    def on_device(members, mask):
        return local(program, members, mask)

    mapped = jax.shard_map(
        on_device,
        mesh=make_mesh(),
        in_specs=(split, P("dev")),
        out_specs=OUT_SPECS._replace(y=P(None, "dev")),
        check_vma=check_vma,
    )
    check(lambda members: mapped(members, program.mask), jax.vmap(one_device.batch), members)


@CHECK_VMA
@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit], ids=["checkpoint", "jit"])
def test_checkpoint_and_jit_inside_shard_map(wrap, check_vma):
    program, _, inputs = make("batch")

    def local(program, inputs, mask):
        return wrap(functools.partial(local_step, program))(inputs, mask)

    check_whole_batch(spread(program, make_mesh(), local, check_vma=check_vma), inputs, "batch")


@CHECK_VMA
def test_scan_inside_shard_map_carries_the_state(check_vma):
    program, one_device, inputs = make("ema-all")

    def steps(step, inputs):
        def body(stats, factor):
            outputs = step(inputs._replace(x=inputs.x * factor, mean=stats[0], var=stats[1], zero_frac=stats[2]))
            return (outputs.mean, outputs.var, outputs.zero_frac), outputs.y

        stats, ys = jax.lax.scan(body, (inputs.mean, inputs.var, inputs.zero_frac), jnp.asarray([1.0, 2.0, 0.5]))
        return Outputs(ys, *stats)

    def local(program, inputs, mask):
        return steps(lambda inputs: local_step(program, inputs, mask), inputs)

    on_devices = spread(
        program, make_mesh(), local, out_specs=OUT_SPECS._replace(y=P(None, "dev")), check_vma=check_vma
    )
    check(on_devices, lambda inputs: steps(one_device.batch, inputs), inputs)


# Of the two sums, which differ in what they exchange and not in their types, one of the two ways by default.
@pytest.mark.parametrize(
    ("path", "check_vma"),
    [
        ("packed", True),
        *also_on_the_newest_jax(("packed", False), ("two_sums", True)),
        pytest.param("two_sums", False, marks=pytest.mark.slow),
    ],
)
def test_tangents_and_second_derivatives_through_shard_map(path, check_vma, monkeypatch):
    if path == "two_sums":  # what more than 64 devices do
        monkeypatch.setattr(bn_fused.kernels.merging, "PACKED_DEVICES", 1)
    program, one_device, inputs = make("ema-all")

    def derivatives(function):
        def gradient(inputs):
            return jax.grad(lambda inputs: scalar(function(inputs)))(inputs)

        direction = another(inputs)
        return lambda inputs: (
            jax.jvp(function, (inputs,), (direction,)),
            jax.jvp(gradient, (inputs,), (direction,)),
            jax.grad(lambda inputs: scalar(jax.jvp(function, (inputs,), (direction,))[1]))(inputs),
        )

    on_devices = spread(program, make_mesh(), check_vma=check_vma)
    check(derivatives(on_devices), derivatives(one_device.batch), inputs, gradient=False)


@pytest.mark.parametrize("name", [SMALLEST, *also_on_the_newest_jax(*LARGER, "inference-all", "virtual-all")])
def test_the_reference_in_typed_shard_map_is_one_device_with_the_whole_batch(name):
    program, _, inputs = make(name, backend="reference")
    check_whole_batch(spread(program, make_mesh()), inputs, name)


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("inference-all", False),
        *also_on_the_newest_jax(("virtual-all", True)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("inference-all", True), ("virtual-all", False))),
    ],
)
def test_inference_and_virtual_batches_in_shard_map(name, check_vma):
    program, _, inputs = make(name)
    check_whole_batch(spread(program, make_mesh(), check_vma=check_vma), inputs, name)


@pytest.mark.parametrize(
    ("inference", "check_vma"),
    [
        (False, True),
        *also_on_the_newest_jax((True, False)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((False, False), (True, True))),
    ],
)
def test_statistics_on_the_devices_may_be_closed_over(inference, check_vma):
    x = jnp.asarray(float32_data())
    stats = bn_fused.RunningStats.init(CHANNELS)._replace(zero_frac=jnp.float32(0.5))
    weight = jnp.arange(1.0, 1 + CHANNELS, dtype=jnp.float32)
    on_mesh, weight_on_mesh = jax.device_put((stats, weight), NamedSharding(make_mesh(), P()))

    def step(x, stats, weight, axis_name):
        settings = {"approach": "ema", "channel_axis": 1, "inference": inference}
        return bn_fused.batch_norm(x, stats, weight, axis_name=axis_name, **settings)[0]

    y = in_shard_map(lambda x: step(x, on_mesh, weight_on_mesh, "dev"), P("dev"), P("dev"), check_vma)(x)
    expected = step(x, stats, weight, None)
    assert_close(y, expected, scale=float(weight[-1]) + abs(expected))


def test_what_does_not_fit_the_mesh_is_said_with_the_mesh_in_mind():
    program, _, inputs = make("batch", axis_name=("dve", "batch"))
    with pytest.raises(NameError, match="'dve'.*the axes of devices are 'dev'"):
        jax.eval_shape(spread(program, make_mesh()), inputs)
    program, _, inputs = make("virtual-all")
    case = dataclasses.replace(program.case, virtual_batch_size=EXAMPLES)
    with pytest.raises(ValueError, match=f"{EXAMPLES}.*batch of {LOCAL} examples on each device"):
        jax.eval_shape(spread(dataclasses.replace(program, case=case), make_mesh()), inputs)


def test_some_axes_manual_and_others_automatic():
    program, _, inputs = make("ema-all")
    mesh = make_mesh((2, 2), ("dev", "rest"))
    on_devices = spread(program, mesh, axis_names={"dev"})
    check_whole_batch(on_devices, inputs, "ema-all")


# --- differentiated inside of shard_map ------------------------------------------------------------------------


def loss_inside(outputs, shared_once):
    """The loss of all devices' examples, and of the running statistics once or as often as there are devices."""
    y, *state = outputs
    return (jax.lax.psum(jnp.sum(y**2), "dev") if shared_once else jnp.sum(y**2)) + scalar(state)


@EACH_CASE
def test_a_gradient_inside_typed_shard_map_is_that_of_one_device(name):
    program, one_device, inputs = make(name)

    def local(program, inputs, mask):
        return jax.grad(lambda inputs: loss_inside(local_step(program, inputs, mask), shared_once=True))(inputs)

    def expected(inputs):
        y, *state = one_device.batch(inputs)
        return jnp.sum(y**2) + scalar(state)

    check(spread(program, make_mesh(), local, out_specs=IN_SPECS), jax.grad(expected), inputs, gradient=False)


@EACH_CASE
def test_a_gradient_inside_untyped_shard_map_is_that_of_the_reference_there(name):
    program, _, inputs = make(name)

    def local(program, inputs, mask):
        gradient = jax.grad(lambda inputs: loss_inside(local_step(program, inputs, mask), shared_once=False))(inputs)
        # Gradients of what all devices share differ, and are stacked.
        return jax.tree.map(lambda leaf: leaf[None], gradient)

    def on_devices(backend):
        run = dataclasses.replace(program, backend=backend)
        return spread(run, make_mesh(), local, out_specs=P("dev"), check_vma=False)

    check(on_devices("auto"), on_devices("reference"), inputs, gradient=False)


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("ema_compatibility-residual", False),
        pytest.param("batch", True, marks=() if AN_OLDER_JAX else pytest.mark.slow),
        *also_on_the_newest_jax(("ema-all", True)),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (("batch", False), ("ema-all", False), ("ema_compatibility-residual", True))
        ),
    ],
)
def test_per_example_gradients_inside_shard_map_are_those_of_one_device(name, check_vma):
    program, one_device, inputs = make(name)
    every_example = P("dev")

    def per_example(program, inputs, mask):
        loss = jax.grad(lambda inputs, mask: scalar(program.example(inputs, mask)))
        return jax.vmap(loss, axis_name="batch", in_axes=(IN_AXES, 0))(inputs, mask)

    def local(program, inputs, mask):
        # Weights and state that vary, so that each example keeps its own gradient of them.
        if check_vma:
            shared = {field: jax.lax.pcast(getattr(inputs, field), "dev", to="varying") for field in inputs._fields[2:]}
            inputs = inputs._replace(**shared)
        return per_example(program, inputs, mask)

    on_devices = spread(program, make_mesh(), local, out_specs=every_example, check_vma=check_vma)
    check(
        on_devices,
        lambda inputs: per_example(one_device, inputs, one_device.mask),
        inputs,
        gradient=check_vma,
    )


# --- pmap ------------------------------------------------------------------------------------------------------


def on_pmap(function, out_axes):
    """Run a function of (inputs, mask) on every device's examples; x, residual, mask and y are split by device."""
    return jax.pmap(function, axis_name="dev", in_axes=(IN_AXES, 0), out_axes=out_axes)


def by_device(values):
    return None if values is None else jnp.reshape(values, (DEVICES, LOCAL, *values.shape[1:]))


@EACH_CASE
def test_pmap_is_one_device_with_the_whole_batch(name):
    program, _, inputs = make(name)
    split = inputs._replace(x=by_device(inputs.x), residual=by_device(inputs.residual))
    outputs = on_pmap(functools.partial(local_step, program), OUT_AXES)(split, by_device(program.mask))
    outputs = outputs._replace(y=jnp.reshape(outputs.y, inputs.x.shape))
    assert_trees_close(outputs, whole_batch(name, later=True)[0], n=EXAMPLES * POSITIONS)


@EACH_CASE
def test_pmap_of_a_gradient_is_that_of_the_reference_there(name):
    program, _, inputs = make(name)
    split = inputs._replace(x=by_device(inputs.x), residual=by_device(inputs.residual))

    def gradient(backend):
        def local(inputs, mask):
            run = dataclasses.replace(program, backend=backend)
            return jax.grad(lambda inputs: scalar(local_step(run, inputs, mask)))(inputs)

        return on_pmap(local, 0)(split, by_device(program.mask))

    assert_trees_close(gradient("auto"), gradient("reference"), n=EXAMPLES * POSITIONS)


def test_a_gradient_through_pmap_is_that_of_one_device():
    program, _, inputs = make("batch")

    def on_devices(inputs):
        split = inputs._replace(x=by_device(inputs.x))
        outputs = on_pmap(functools.partial(local_step, program), OUT_AXES)(split, None)
        return outputs._replace(y=jnp.reshape(outputs.y, inputs.x.shape))

    actual = jax.grad(lambda inputs: scalar(on_devices(inputs)))(inputs)
    assert_trees_close(actual, whole_batch("batch", later=True)[1][0], n=EXAMPLES * POSITIONS)


# --- sharded arrays under jit, without names of devices --------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@EACH_CASE
def test_jit_over_sharded_arrays_is_one_device_with_the_whole_batch(name, axis_type):
    program, one_device, inputs = make(name, axis_name="batch")
    mesh = make_mesh(axis_type=axis_type)
    placed = jax.device_put(inputs, jax.tree.map(lambda spec: NamedSharding(mesh, spec), IN_SPECS))
    mask = None if program.mask is None else jax.device_put(program.mask, NamedSharding(mesh, P("dev")))
    program = dataclasses.replace(program, mask=mask)

    def both(program):
        def call(inputs):
            outputs, pullback = jax.vjp(program.batch, inputs)
            return outputs, pullback(jax.tree.map(lambda leaf: 2 * leaf + 1, outputs))

        return jax.jit(call)

    with jax.set_mesh(mesh):
        outputs, gradients = both(program)(placed)
    assert_trees_close((outputs, gradients), both(one_device)(inputs), n=EXAMPLES * POSITIONS)
    if axis_type == AxisType.Explicit:
        assert jax.typeof(outputs.y).sharding.spec[0] == "dev"
        assert jax.typeof(gradients[0].x).sharding.spec[0] == "dev"
        assert outputs.mean.sharding.is_fully_replicated


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_the_functional_form_over_sharded_arrays_is_one_device_with_the_whole_batch(axis_type):
    inputs, count = inputs_and_count(CASES["batch"], later=True, shape=(EXAMPLES,))
    stats = bn_fused.RunningStats(inputs.mean, inputs.var, inputs.zero_frac, count)
    mesh = make_mesh(axis_type=axis_type)

    def step(x, backend):
        y, after = bn_fused.batch_norm(
            x, stats, inputs.weight, inputs.bias, channel_axis=1, activation="silu", backend=backend
        )
        return Outputs(y, after.mean, after.var, after.zero_frac)

    def both(backend):
        def call(x):
            outputs, pullback = jax.vjp(lambda x: step(x, backend), x)
            return outputs, pullback(jax.tree.map(lambda leaf: 2 * leaf + 1, outputs))

        return jax.jit(call)

    with jax.set_mesh(mesh):
        actual = both("auto")(jax.device_put(inputs.x, NamedSharding(mesh, P("dev"))))
    assert_trees_close(actual, both("reference")(inputs.x), n=EXAMPLES * POSITIONS)


# Where x and the values per channel lie on a mesh of data and model axes.
PLACES = [
    (P("data", "model"), P()),
    (P("data", "model"), P("model")),
    (P(None, "model"), P()),
    (P("data"), P("model")),
    (P("data", None, "model"), P()),
]


def two_steps(backend):
    """The gradients of two steps in a loop with respect to x, residual, weight and bias, the last y and the state."""

    def steps(x, residual, weight, bias, stats, mask):
        def step(stats, _):
            settings = {"channel_axis": 1, "approach": "ema", "warmup_period": 4, "activation": "silu"}
            y, stats = bn_fused.batch_norm(
                x, stats, weight, bias, residual=residual, mask=mask, backend=backend, **settings
            )
            return stats, y

        stats, y = jax.lax.scan(step, stats, None, length=2)
        return jnp.sum(y[-1] ** 3) + jnp.sum(stats.mean * stats.var), (y[-1], stats)

    return jax.jit(jax.grad(steps, argnums=(0, 1, 2, 3), has_aux=True))


@functools.cache
def inputs_and_results_of_two_steps():
    """Arguments of `two_steps` on one device, and what the reference gives there."""
    rng = np.random.default_rng(3)
    shape = (EXAMPLES, 6, 8)
    x, residual = (jnp.asarray(rng.standard_normal(shape)) for _ in range(2))
    weight, bias = (jnp.asarray(rng.standard_normal(6)) for _ in range(2))
    mask = jnp.asarray(rng.random((EXAMPLES, 8)) > 0.3)
    stats = bn_fused.RunningStats.init(6, jnp.float64)
    stats = stats._replace(mean=stats.mean + 0.5, var=stats.var + 0.7, zero_frac=stats.zero_frac * 0.4)
    inputs = (x, residual, weight, bias, stats, mask)
    return inputs, two_steps("reference")(*inputs)


@pytest.mark.parametrize(
    ("place", "channels", "backend"),
    [
        pytest.param(*where, backend, id=f"{where[0]}-{where[1]}-{backend}", marks=marks)
        for index, where in enumerate(PLACES)
        for backend, marks in (
            ("auto", ON_THE_NEWEST_JAX if index > 1 else ()),
            ("reference", pytest.mark.slow if index > 1 else ON_THE_NEWEST_JAX),
        )
    ],
)
def test_types_on_explicit_meshes_are_those_of_the_operands_wherever_those_lie(place, channels, backend):
    """Gradients fit what they are gradients of, and the new running state may be carried through a loop."""
    mesh = make_mesh((2, 2), ("data", "model"), AxisType.Explicit)
    specs = (place, place, channels, channels, bn_fused.RunningStats(channels, channels, P(), P()), P("data"))
    inputs, expected = inputs_and_results_of_two_steps()
    placed = jax.device_put(inputs, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    with jax.set_mesh(mesh):
        gradient, (y, new) = two_steps(backend)(*placed)
    assert_trees_close((gradient, y, *new[:3]), (expected[0], expected[1][0], *expected[1][1][:3]), n=EXAMPLES * 8)
    for result, operand in zip((*gradient, y, *new), (*placed[:4], placed[0], *placed[4]), strict=True):
        assert jax.typeof(result) == jax.typeof(operand)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("set_mesh", [False, True], ids=["mesh_not_set", "mesh_set"])
def test_statistics_may_lie_outside_of_an_explicit_mesh(set_mesh, backend):
    x = jnp.asarray(np.random.default_rng(3).standard_normal((EXAMPLES, DEVICES, POSITIONS)))
    stats = bn_fused.RunningStats.init(DEVICES, jnp.float64)
    mesh = make_mesh(axis_type=AxisType.Explicit)

    def step(x, stats, backend):
        return bn_fused.batch_norm(x, stats, channel_axis=1, approach="ema", backend=backend)

    expected, expected_after = step(x, stats, "reference")
    for place in (P("dev"), P(None, "dev")):
        placed = jax.device_put(x, NamedSharding(mesh, place))
        with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
            y, after = jax.jit(functools.partial(step, backend=backend))(placed, stats)
        assert_trees_close((y, *after[:3]), (expected, *expected_after[:3]), n=EXAMPLES * POSITIONS)
        assert jax.typeof(y).sharding.spec == jax.typeof(placed).sharding.spec


def test_a_layers_state_outside_of_an_explicit_mesh_is_refused_with_what_to_do():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch")
    mesh = make_mesh(axis_type=AxisType.Explicit)
    x = jax.device_put(jnp.ones((EXAMPLES, CHANNELS, POSITIONS)), NamedSharding(mesh, P("dev")))

    @eqx.filter_jit
    def step(layer, state, x):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    with pytest.raises(ValueError, match="state does not lie on x's mesh.*device_put"):
        step(layer, state, x)
    arrays, static = eqx.partition((layer, state), eqx.is_array)
    layer, state = eqx.combine(jax.device_put(arrays, NamedSharding(mesh, P())), static)
    y, _ = step(layer, state, x)
    assert jax.typeof(y).sharding.spec[0] == "dev"


def test_channels_sharded_under_jit():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((EXAMPLES, DEVICES, POSITIONS)))
    stats = bn_fused.RunningStats.init(DEVICES, jnp.float64)
    mesh = make_mesh()

    def step(backend):
        return jax.jit(lambda x: bn_fused.batch_norm(x, stats, channel_axis=1, approach="ema", backend=backend))

    y, after = step("auto")(jax.device_put(x, NamedSharding(mesh, P(None, "dev"))))
    expected, expected_after = step("reference")(x)
    assert_trees_close((y, *after[:3]), (expected, *expected_after[:3]), n=EXAMPLES * POSITIONS)


# --- what is exchanged, and numbers across devices -------------------------------------------------------------


def float32_data(mean=0.0, dtype=np.float32):
    rng = np.random.default_rng(5)
    return (mean + rng.standard_normal((EXAMPLES, CHANNELS, 16))).astype(dtype)


def float32_step(x, approach="batch", inference=False, **settings):
    """One example's step of the functional form on a device's examples, from the initial state."""
    stats = bn_fused.RunningStats.init(CHANNELS)
    return bn_fused.batch_norm(
        x,
        stats,
        channel_axis=1,
        axis_name="dev",
        approach=approach,
        inference=inference,
        **settings,
    )


def in_shard_map(function, in_specs, out_specs, check_vma=True):
    return jax.jit(
        jax.shard_map(function, mesh=make_mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    )


@CHECK_VMA
@pytest.mark.parametrize("approach", [APPROACHES[0], *also_on_the_newest_jax(*APPROACHES[1:])])
def test_forward_is_one_small_all_reduce_and_backward_another(approach, check_vma):
    x = jnp.asarray(float32_data())
    packed = DEVICES * (3 * CHANNELS + 1)

    def forward(x):
        return float32_step(x, approach=approach)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(forward(x)[0] ** 3))(x)

    state = bn_fused.RunningStats(P(), P(), P(), P())
    compiled = in_shard_map(forward, P("dev"), (P("dev"), state), check_vma).lower(x).compile()
    assert collectives(compiled) == [("all-reduce", packed)]
    both = collectives(in_shard_map(gradient, P("dev"), P("dev"), check_vma).lower(x).compile())
    assert [operation for operation, _ in both] == ["all-reduce", "all-reduce"], both
    assert all(values <= packed for _, values in both)


def test_inference_exchanges_nothing():
    x = jnp.asarray(float32_data())
    step = in_shard_map(lambda x: float32_step(x, inference=True)[0], P("dev"), P("dev"))
    assert collectives(step.lower(x).compile()) == []


SHARDED = {"rows": P("dev"), "positions": P(None, None, "dev"), "channels": P(None, "dev")}


# A mesh that is set matters where its axes are explicit; elsewhere one place must do by default.
@pytest.mark.parametrize(
    ("place", "axis_type", "set_mesh"),
    [
        pytest.param(
            place,
            axis_type,
            set_mesh,
            id=f"{name}-{axis_type.name}-{'mesh_set' if set_mesh else 'mesh_not_set'}",
            marks=[pytest.mark.slow]
            if set_mesh and axis_type == AxisType.Auto and name != "rows"
            else ON_THE_NEWEST_JAX
            if set_mesh or name == "positions"
            else [],
        )
        for (name, place), axis_type, set_mesh in itertools.product(
            SHARDED.items(), (AxisType.Auto, AxisType.Explicit), (False, True)
        )
    ],
)
def test_jit_over_sharded_arrays_exchanges_moments_and_sums_alone(place, axis_type, set_mesh):
    """One all-reduce each way where rows are shared, none where channels are split; y and dx lie as x does."""
    with jax.enable_x64(False):  # JAX 0.10 cannot be asked back under `with jax.enable_x64()`
        check_exchanges_under_jit(place, axis_type, set_mesh)


def check_exchanges_under_jit(place, axis_type, set_mesh):
    mesh = make_mesh(axis_type=axis_type)
    x = jax.device_put(jnp.ones((12 * DEVICES, DEVICES, 4 * DEVICES)), NamedSharding(mesh, place))
    stats = bn_fused.RunningStats.init(DEVICES)

    def loss(x, stats):
        y, after = bn_fused.batch_norm(x, stats, channel_axis=1)
        return jnp.sum(y**3), after

    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        normalised = (
            jax.jit(lambda x, stats: bn_fused.batch_norm(x, stats, channel_axis=1)[0]).lower(x, stats).compile()
        )
        gradient = jax.jit(jax.grad(loss, has_aux=True)).lower(x, stats).compile()
    moments, sums = ("all-reduce", DEVICES * (3 * DEVICES + 1)), ("all-reduce", 2 * DEVICES)
    shared = place != P(None, "dev")
    assert collectives(normalised) == ([moments] if shared else [])
    exchanged = [entry for entry in collectives(gradient) if entry[1] > 1]  # the loss itself is summed over devices
    # Beside them, what of the new statistics lies on other devices than the old: a value for each channel.
    assert sorted(exchanged) == sorted([moments, sums] if shared else []), exchanged
    assert gradient.output_shardings[0].is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("path", ["packed", "two_sums"])
def test_a_mean_of_ten_thousand_standard_deviations_costs_no_digit_across_devices(path, monkeypatch):
    if path == "two_sums":  # what more than 64 devices do
        monkeypatch.setattr(bn_fused.kernels.merging, "PACKED_DEVICES", 1)
    mean = 1e4
    x = float32_data(mean)
    state = bn_fused.RunningStats(P(), P(), P(), P())
    y, after = in_shard_map(lambda x: float32_step(x, debias="none"), P("dev"), (P("dev"), state))(jnp.asarray(x))
    exact = x.astype(np.float64)
    mu, var = exact.mean((0, 2)), exact.var((0, 2))
    gain = 1 - 0.99
    assert_close(after.mean, gain * mu, scale=gain * abs(mu))
    assert_close(after.var, gain * var, scale=gain * var)
    expected = (exact - mu[None, :, None]) / np.sqrt(var[None, :, None] + 1e-5)
    assert_close(y, expected, scale=1 + abs(expected))


@CHECK_VMA
def test_more_devices_than_are_packed_give_the_same(check_vma, monkeypatch):
    monkeypatch.setattr(bn_fused.kernels.merging, "PACKED_DEVICES", 2)
    program, _, inputs = make("ema-all")
    check_whole_batch(spread(program, make_mesh(), check_vma=check_vma), inputs, "ema-all")


def test_a_mask_in_which_nothing_counts_on_any_device_leaves_the_state():
    stats = bn_fused.RunningStats(
        *(jnp.full(CHANNELS, v, jnp.float32) for v in (0.3, 0.8)), jnp.float32(0.5), jnp.int32(2)
    )
    mask = jnp.zeros((EXAMPLES, 16), bool)

    def step(x, mask):
        return bn_fused.batch_norm(
            x, stats, channel_axis=1, axis_name="dev", mask=mask, approach="ema", warmup_period=5
        )

    state = bn_fused.RunningStats(P(), P(), P(), P())
    y, after = in_shard_map(step, (P("dev"), P("dev")), (P("dev"), state))(jnp.asarray(float32_data()), mask)
    for one, other in zip(after, stats, strict=True):
        assert_same_bits(one, other)
    expected, _ = bn_fused.batch_norm(jnp.asarray(float32_data()), stats, channel_axis=1, inference=True)
    assert_close(y, expected, 1 + jnp.abs(expected))


@CHECK_VMA
def test_every_device_gets_the_same_bits_of_the_state(check_vma):
    x = jnp.asarray(float32_data(3.0))

    def step(x):
        _, after = float32_step(x, approach="ema")
        return jax.tree.map(lambda leaf: leaf[None], after)

    def step_varying(x):
        return jax.lax.pcast(step(x), "dev", to="varying")

    after = in_shard_map(step_varying if check_vma else step, P("dev"), P("dev"), check_vma)(x)
    for leaf in after:
        assert leaf.shape[0] == DEVICES
        for row in leaf[1:]:
            assert_same_bits(row, leaf[0])


def test_two_runs_give_the_same_bits():
    x = jnp.asarray(float32_data(3.0))
    state = bn_fused.RunningStats(P(), P(), P(), P())
    first, second = (
        in_shard_map(lambda x: float32_step(x, approach="ema"), P("dev"), (P("dev"), state))(x) for _ in range(2)
    )
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert_same_bits(one, other)
