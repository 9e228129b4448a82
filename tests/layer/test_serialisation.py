"""What a layer and its state go through besides computing: files, pickles, exported programs, Equinox's own tools."""

import io
import itertools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES
from bn_fused.kernels import Coefficients, fused_batch_norm, layout as layout_module

from support.tolerances import assert_close, assert_same_bits
from support.versions import ON_THE_NEWEST_JAX

CHANNELS = 3


def make(approach="ema", **settings):
    return eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", approach, activation="silu", **settings)


@eqx.filter_jit
def apply(layer, state, x):
    return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def data(seed=0, channels=CHANNELS):
    return jnp.asarray(3 + 2 * np.random.default_rng(seed).standard_normal((8, channels, 4)), jnp.float32)


def trained(approach="ema", **settings):
    """A layer and its state after two steps."""
    layer, state = make(approach, **settings)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.asarray([0.5, 1.0, 2.0]))
    for seed in range(2):
        _, state = apply(layer, state, data(seed))
    return layer, state


def assert_trees_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_same_bits(one, other)


def assert_trees_close(actual, expected, n=1):
    """As other programs compute the same: within c * eps * sqrt(n) of a leaf's largest value, n the summands."""
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(want.dtype, jnp.integer):
            assert_same_bits(got, want)
        else:
            assert_close(got, want, np.sqrt(n) * (1 + np.max(np.abs(want))))


def roundtrip_pickle(tree):
    return pickle.loads(pickle.dumps(tree))


def roundtrip_file(tree, like):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, tree)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


# --- files and pickles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("approach", APPROACHES)
def test_a_pickled_layer_and_state_go_on_as_if_nothing_had_happened(approach):
    layer, state = trained(approach)
    expected = apply(layer, state, data(5))
    actual = apply(*roundtrip_pickle(trained(approach)), data(5))
    assert_trees_same_bits(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_pickled_running_stats_are_running_stats():
    stats = bn_fused.RunningStats.init(CHANNELS)
    _, stats = bn_fused.batch_norm(data(), stats, channel_axis=1)
    again = roundtrip_pickle(stats)
    assert isinstance(again, bn_fused.RunningStats)
    assert_trees_same_bits(again, stats)


@pytest.mark.parametrize("approach", APPROACHES)
def test_leaves_written_to_a_file_and_read_into_a_new_layer_go_on_as_if_nothing_had_happened(approach):
    layer, state = trained(approach)
    expected = apply(layer, state, data(5))
    read = roundtrip_file(trained(approach), make(approach))
    actual = apply(*read, data(5))
    assert_trees_same_bits(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_leaves_are_read_into_a_layer_that_was_never_made():
    like = eqx.filter_eval_shape(make)
    layer, state = roundtrip_file(trained(), like)
    assert_trees_same_bits(jax.tree.leaves(apply(layer, state, data(5))), jax.tree.leaves(apply(*trained(), data(5))))


# --- exported programs -----------------------------------------------------------------------------------------


def exported(function, *arguments):
    """The function after jax.export, to bytes and back."""
    serialised = jax.export.export(jax.jit(function))(*arguments).serialize()
    return jax.export.deserialize(serialised).call


def step_on_arrays(approach, inference=False):
    """A layer's step as a function of arrays alone, and its arguments after two steps of training."""
    layer, state = trained(approach)
    layer = eqx.nn.inference_mode(layer, inference)
    arrays, static = eqx.partition((layer, state), eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def step(leaves, x):
        layer, state = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        y, state = apply(layer, state, x)
        return y, jax.tree.leaves(state)

    return step, (leaves, data(5))


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("approach", APPROACHES)
def test_an_exported_step_gives_the_bits_of_the_step(approach, inference):
    step, arguments = step_on_arrays(approach, inference)
    assert_trees_same_bits(exported(step, *arguments)(*arguments), jax.jit(step)(*arguments))


def test_an_exported_gradient_gives_the_bits_of_the_gradient():
    step, (leaves, x) = step_on_arrays("batch")

    def gradient(leaves, x):
        return jax.grad(lambda x: jnp.sum(step(leaves, x)[0] ** 2))(x)

    assert_trees_same_bits(exported(gradient, leaves, x)(leaves, x), jax.jit(gradient)(leaves, x))


def test_a_gradient_taken_of_an_exported_step_is_the_steps():
    step, (leaves, x) = step_on_arrays("batch")

    def loss(step):
        return lambda x: jnp.sum(step(leaves, x)[0] ** 2)

    serialised = jax.export.export(jax.jit(step))(leaves, x).serialize(vjp_order=1)
    actual = jax.grad(loss(jax.export.deserialize(serialised).call))(x)
    expected = jax.grad(loss(jax.jit(step)))(x)
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_step_is_exported_for_a_platform_that_is_not_here(platform, inference):
    step, arguments = step_on_arrays("ema", inference)
    program = jax.export.export(jax.jit(step), platforms=[platform])(*arguments)
    assert program.platforms == (platform,)
    # StableHLO alone, which needs neither bn_fused nor JAX where it runs.
    assert "custom_call" not in program.mlir_module()
    assert jax.export.deserialize(program.serialize()).platforms == (platform,)


def test_a_step_exported_for_several_platforms_runs_here():
    step, arguments = step_on_arrays("ema")
    program = jax.export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu", "rocm"])(*arguments)
    # The program for several platforms is another one, with a choice in it.
    assert_trees_close(jax.export.deserialize(program.serialize()).call(*arguments), jax.jit(step)(*arguments))


def test_a_function_with_running_stats_is_exported():
    stats = bn_fused.RunningStats.init(CHANNELS)

    def step(x, *stats):
        y, stats = bn_fused.batch_norm(x, bn_fused.RunningStats(*stats), channel_axis=1, approach="ema")
        return y, tuple(stats)

    arguments = (data(), *stats)
    assert_trees_same_bits(exported(step, *arguments)(*arguments), jax.jit(step)(*arguments))


# --- exported programs that leave sizes open ---------------------------------------------------------------------


def layer_call(x, mask, **settings):
    """y and the new state's arrays of a trained layer."""
    layer, state = trained("batch", **settings)
    call = jax.vmap(
        lambda x, state, mask: layer(x, state, mask=mask), axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None)
    )
    y, state = call(x, state, mask)
    return y, jax.tree.leaves(state)


def function_call(x, mask, **settings):
    """The same of the function, with the channels on axis 1."""
    mean, var, zero_frac = jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([0.4, 0.5, 0.6]), jnp.asarray(0.5)
    stats = bn_fused.RunningStats(mean, var, zero_frac, jnp.asarray(1, jnp.int32))
    y, stats = bn_fused.batch_norm(
        x, stats, jnp.asarray([0.5, 1.0, 2.0]), jnp.ones(CHANNELS), channel_axis=1, mask=mask, **settings
    )
    return y, tuple(stats)


def raw_call(x, mask):
    """The raw operation's results, of x as rows and channels."""
    assert mask is None
    ones, coefficients = jnp.ones(CHANNELS), Coefficients(1.0, 0.0, 0.0, 0.1, 0.1, 0.9)
    return fused_batch_norm(x, ones, ones, ones, ones, coefficients, eps=1e-5, activation="gelu")


def gradient_of(call, **settings):
    """The gradient of x of a sum that weights every y, as a function of x and mask."""

    def loss(x, mask):
        return jnp.sum(jnp.sin(call(x, mask, **settings)[0]))

    return jax.grad(loss)


def step_of(call, **settings):
    return lambda x, mask: call(x, mask, **settings)


def open_arguments(shape, masked):
    """x and mask for an export whose shape, as "b, 3, 4", has sizes that are open."""
    sizes = jax.export.symbolic_shape(shape)
    mask = jax.ShapeDtypeStruct((sizes[0], *sizes[2:]), jnp.bool_) if masked else None
    return jax.ShapeDtypeStruct(sizes, jnp.float32), mask


def check_open(program, shape, closed_shapes, masked=False):
    """The exported program gives what the program does, for every one of some shapes."""
    call = exported(program, *open_arguments(shape, masked))
    for closed in closed_shapes:
        rng = np.random.default_rng(sum(closed))
        x = jnp.asarray(3 + 2 * rng.standard_normal(closed), jnp.float32)
        mask = jnp.asarray(rng.random((closed[0], *closed[2:])) < 0.6) if masked else None
        assert_trees_close(call(x, mask), jax.jit(program)(x, mask), n=x.size // CHANNELS)


CALLS = {"layer": (layer_call, "auto"), "function": (function_call, "auto"), "reference": (function_call, "reference")}
OF = {"step": step_of, "gradient": gradient_of}


def any_number_of_examples():
    """By default every call in every case, by turns as a step and as a gradient; the rest is slow.

    On an older JAX the case with a mask, which has most operands.
    """
    cases = ["training", "masked", "inference"]
    for number, (call, case) in enumerate(itertools.product(CALLS, cases)):
        for of in OF:
            turn = (of == "gradient") == (number % 2 == 0)
            marks = pytest.mark.slow if not turn else () if case == "masked" else ON_THE_NEWEST_JAX
            yield pytest.param(*CALLS[call], case, OF[of], id=f"{case}-{of}-{call}", marks=marks)


@pytest.mark.parametrize(("call", "backend", "case", "of"), list(any_number_of_examples()))
def test_a_program_is_exported_for_any_number_of_examples(call, backend, case, of):
    program = of(call, backend=backend, inference=case == "inference")
    check_open(program, f"b, {CHANNELS}, 4", [(3, CHANNELS, 4), (40, CHANNELS, 4)], masked=case == "masked")


@pytest.mark.parametrize(
    ("shape", "closed", "of"),
    [
        pytest.param(shape, closed, of, id=f"{name}-{shape}", marks=marks)
        for shape, closed, default, marks in (
            ("b, 3, h, w", [(5, 3, 3, 7), (33, 3, 2, 1)], "gradient", ()),
            ("8, 3, h, w", [(8, 3, 3, 7), (8, 3, 2, 1)], "step", ON_THE_NEWEST_JAX),
            ("b, 3", [(5, 3), (33, 3)], "step", ()),
            ("2*b, 3, 16", [(10, 3, 16), (66, 3, 16)], "gradient", ON_THE_NEWEST_JAX),
        )
        for name, of in OF.items()
        for marks in [marks if name == default else pytest.mark.slow]
    ],
)
def test_a_training_program_is_exported_for_any_sizes(shape, closed, of):
    check_open(of(function_call, approach="ema", activation="silu", momentum=0.9), shape, closed)


@pytest.mark.parametrize("of", [step_of, gradient_of], ids=["step", "gradient"])
def test_the_raw_operation_is_exported_for_any_number_of_rows(of):
    check_open(of(raw_call), "n, 3", [(3, CHANNELS), (100, CHANNELS)])


@pytest.mark.parametrize("of", [step_of, gradient_of], ids=["step", "gradient"])
def test_an_ensembles_program_is_exported_for_any_number_of_members_and_examples(of):
    program = jax.vmap(of(function_call))
    check_open(program, "e, b, 3, 4", [(2, 5, CHANNELS, 4), (3, 20, CHANNELS, 4)])


def test_virtual_batches_that_divide_an_open_number_of_examples_are_exported_and_others_are_not():
    program = step_of(function_call, virtual_batch_size=2)
    check_open(program, "2*b, 3, 4", [(2, CHANNELS, 4), (6, CHANNELS, 4)])
    with pytest.raises(ValueError, match="virtual_batch_size is 2; it must divide the batch of b examples"):
        jax.export.export(jax.jit(program))(*open_arguments("b, 3, 4", masked=False))


def test_the_variance_of_an_open_number_of_rows_keeps_its_digits_far_from_zero():
    call = exported(step_of(function_call), *open_arguments("b, 3, h", masked=False))
    x = 1e4 + np.random.default_rng(0).standard_normal((64, CHANNELS, 50))
    x[::15] += 3  # what the pivot is made of
    x = jnp.asarray(x, jnp.float32)
    y, _ = call(x, None)
    exact = np.asarray(x, np.float64)
    xhat = (exact - exact.mean((0, 2), keepdims=True)) / np.sqrt(exact.var((0, 2), keepdims=True) + 1e-5)
    weight = np.asarray([0.5, 1.0, 2.0])[:, None]
    # The variance's rounding counts 15 times: see the backend `jnp`.
    assert_close(y, xhat * weight + 1, 15 * (1 + abs(xhat)) * weight)


@pytest.mark.parametrize("shape", ["n, 3", "n, 3, 4", "2, 3, n"])
def test_the_pivot_of_open_sizes_is_the_mean_of_a_fifteenth_of_the_rows_at_least(shape):
    layout = "rcr"[: len(shape.split(","))]
    sizes = jax.export.symbolic_shape(shape)
    sample = jax.eval_shape(lambda x: layout_module.sample_rows(x, layout), jax.ShapeDtypeStruct(sizes, jnp.float32))
    rows, sampled = (layout_module.count_rows(shape, layout) for shape in (sizes, sample.shape))
    assert 15 * sampled >= rows


@pytest.mark.parametrize("platforms", [("cuda", "tpu"), ("cpu", "cuda", "rocm", "tpu")], ids="-".join)
def test_a_training_step_for_any_number_of_examples_is_exported_for_other_platforms(platforms):
    program = jax.export.export(jax.jit(gradient_of(layer_call)), platforms=platforms)
    exported = program(*open_arguments("b, 3, 4", masked=False))
    assert jax.export.deserialize(exported.serialize()).platforms == platforms


def test_a_gradient_for_any_number_of_members_of_closed_batches_is_exported_for_other_platforms():
    program = jax.vmap(gradient_of(function_call, activation="relu"))
    platforms = ("cuda", "rocm", "tpu")
    exported = jax.export.export(jax.jit(program), platforms=platforms)(*open_arguments("e, 8, 3", masked=False))
    assert exported.platforms == platforms


@pytest.mark.parametrize(("backend", "platform"), [("pallas_gpu", "cuda"), ("triton", "cuda"), ("pallas_tpu", "tpu")])
def test_kernels_asked_for_by_name_refuse_sizes_that_are_left_open(backend, platform):
    program = jax.export.export(jax.jit(step_of(function_call, backend=backend)), platforms=[platform])
    with pytest.raises(bn_fused.BackendError, match=f"'{backend}' cannot run on {platform}: .* leaves rows .4.b. open"):
        program(*open_arguments("b, 3, 4", masked=False))


# --- Equinox's tools -------------------------------------------------------------------------------------------


def make_sequential():
    key = jax.random.key(0)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv1d(CHANNELS, 5, 3, key=key),
            bn_fused.BatchNorm(5, "batch", "batch", activation="relu"),
            eqx.nn.Lambda(jnp.abs),
            eqx.nn.Sequential([bn_fused.BatchNorm(5, "batch", "ema")]),
        ]
    )


def test_sequential_hands_the_state_through_every_layer():
    model, state = eqx.nn.make_with_state(make_sequential)()
    conv, first, _, inner = model.layers
    y, after = apply(model, state, data())

    hidden, expected = apply(first, state, eqx.filter_jit(eqx.filter_vmap(conv))(data()))
    expected_y, expected = apply(inner.layers[0], expected, hidden)
    assert_trees_close((y, after), (expected_y, expected), n=9)  # what a convolution sums
    for layer in (first, inner.layers[0]):
        assert jnp.any(after.get(layer.state_index)[0] != 0)


def test_inference_mode_reaches_the_layer_inside_a_model_and_back():
    model, state = eqx.nn.make_with_state(make_sequential)()
    _, state = apply(model, state, data())
    frozen = eqx.nn.inference_mode(model)
    assert frozen.layers[1].inference is True
    y, after = apply(frozen, state, data(1))
    assert_trees_same_bits(after, state)
    # One example alone gives what the batch gives, up to the order in which a convolution sums.
    alone, _ = eqx.filter_jit(frozen)(data(1)[0], state)
    assert_trees_close(alone, y[0], n=9)
    assert eqx.nn.inference_mode(frozen, False).layers[1].inference is False


def test_filter_jit_takes_the_layer_and_compiles_once_for_both_steps():
    traces = []

    @eqx.filter_jit
    def step(layer, state, x):
        traces.append(x.shape)
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    layer, state = make()
    for seed in range(3):
        y, state = step(layer, state, data(seed))
    assert len(traces) == 1
    assert y.shape == data().shape


def test_inference_is_a_leaf_and_everything_else_that_is_no_array_is_static():
    layer, _ = make()
    not_arrays = [leaf for leaf in jax.tree.leaves(layer) if not eqx.is_array(leaf)]
    assert not_arrays == [False]


def test_filter_eval_shape_gives_the_shapes_of_layer_and_step():
    layer, state = eqx.filter_eval_shape(make)
    assert layer.weight.shape == (CHANNELS,)
    y, after = eqx.filter_eval_shape(apply, layer, state, jax.ShapeDtypeStruct((8, CHANNELS, 4), jnp.bfloat16))
    assert (y.shape, y.dtype) == ((8, CHANNELS, 4), jnp.bfloat16)
    layer, state = make()
    kinds = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == kinds


def test_make_with_state_keeps_the_layers_initial_state_out_of_the_layer():
    bare = bn_fused.BatchNorm(CHANNELS, "batch", "batch")
    layer, _ = make("batch")
    assert len(jax.tree.leaves(eqx.filter(bare, eqx.is_array))) == 6
    assert len(jax.tree.leaves(eqx.filter(layer, eqx.is_array))) == 2


def test_filter_grad_and_filter_vmap_make_and_train_an_ensemble():
    @eqx.filter_vmap
    def make_member(key):
        return eqx.nn.make_with_state(
            lambda: eqx.nn.Sequential(
                [
                    eqx.nn.Conv1d(CHANNELS, 5, 3, key=key),
                    bn_fused.BatchNorm(5, "batch", "batch", activation="relu"),
                ]
            )
        )()

    def loss(model, state, x):
        y, state = apply(model, state, x)
        return jnp.sum(y**2), state

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), eqx.if_array(0), None))
    def gradient(model, state, x):
        return eqx.filter_grad(loss, has_aux=True)(model, state, x)

    models, states = make_member(jax.random.split(jax.random.key(0), 2))
    gradients, after = gradient(models, states, data())

    def member_of(tree, index):
        return jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, tree)

    for index in range(2):
        member, state = member_of((models, states), index)
        expected = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(member, state, data())
        assert_trees_close(member_of((gradients, after), index), expected, n=16)  # the examples times the positions


def test_a_layer_is_hashed_and_compared_by_its_static_fields():
    first, second = make("batch")[0], make("ema")[0]
    assert jax.tree.structure(first) == jax.tree.structure(make("batch")[0])
    assert jax.tree.structure(first) != jax.tree.structure(second)


def test_a_layer_with_other_settings_takes_over_the_arrays_and_goes_on_with_the_state():
    layer, state = trained("batch")
    settings = {"approach": "ema", "momentum": 0.5, "activation": "relu"}
    y, after = apply(bn_fused.with_settings(layer, **settings), state, data(5))

    mean, var = state.get(layer.state_index)
    stats = bn_fused.RunningStats(mean, var, state.get(layer.zero_frac_index), state.get(layer.count_index))
    expected_y, expected = bn_fused.batch_norm(data(5), stats, layer.weight, layer.bias, channel_axis=1, **settings)
    assert_trees_close(y, expected_y, n=32)
    assert_trees_close(after.get(layer.state_index), (expected.mean, expected.var), n=32)
    assert_same_bits(after.get(layer.zero_frac_index), expected.zero_frac)
