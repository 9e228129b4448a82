"""What cannot be computed says so: argument, value, what is accepted; and nothing is left half-updated."""

import importlib
import re
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES

from support.tolerances import assert_same_bits

CHANNELS = 3


def make(**settings):
    return eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", **{"approach": "batch", **settings})


def apply(layer, state, x, **options):
    return jax.vmap(lambda x: layer(x, state, **options), axis_name="batch", out_axes=(0, None))(x)


def function(x=None, channels=CHANNELS, **settings):
    x = jnp.ones((4, CHANNELS, 5)) if x is None else x
    return bn_fused.batch_norm(x, bn_fused.RunningStats.init(channels), **{"channel_axis": 1, **settings})


def names(*parts):
    """A pattern that finds all of these in a message, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


# --- settings: the layer and the function refuse the same ---------------------------------------------------

BAD_SETTINGS = [
    ("warmup_period", 0, ValueError),
    ("warmup_period", -3, ValueError),
    ("warmup_period", 1.5, TypeError),
    ("approach", "legacy", ValueError),
    ("approach", 3, (ValueError, TypeError)),
    ("activation", "tanh", ValueError),
    ("debias", "sample", ValueError),
    ("debias", True, (ValueError, TypeError)),
    ("backend", "cudnn", ValueError),
    ("momentum", 1.0, ValueError),
    ("momentum", 1 - 1e-9, ValueError),  # 1 in float32
    ("momentum", -0.1, ValueError),
    ("momentum", float("nan"), ValueError),
    ("momentum", "0.9", TypeError),
    ("eps", 0.0, ValueError),
    ("eps", -1e-5, ValueError),
    ("eps", float("nan"), ValueError),
    ("eps", None, TypeError),
    ("virtual_batch_size", 0, ValueError),
    ("virtual_batch_size", 2.0, TypeError),
    ("axis_index_groups", [[0, 1], [2]], ValueError),
    ("axis_index_groups", [[0, 0], [1, 2]], ValueError),
    ("axis_index_groups", [[1, 2]], ValueError),
    ("axis_index_groups", [], ValueError),
    ("axis_index_groups", [0, 1], TypeError),
]


@pytest.mark.parametrize("call", [make, function], ids=["layer", "function"])
@pytest.mark.parametrize(("name", "value", "error"), BAD_SETTINGS)
def test_a_bad_setting_is_named_with_its_value(call, name, value, error):
    with pytest.raises(error, match=names(name, repr(value), "accepted")):
        call(**{name: value})


@pytest.mark.parametrize("name", ["approach", "activation", "debias", "backend"])
def test_the_message_of_an_unknown_name_lists_the_known_ones(name):
    known = {
        "approach": ("batch", "ema", "ema_compatibility"),
        "activation": ("relu", "silu", "gelu", "leaky_relu"),
        "debias": ("axis", "samples", "none"),
        "backend": ("auto", "jnp", "reference"),
    }[name]
    with pytest.raises(ValueError, match=names("unheard of", *known)):
        function(**{name: "unheard of"})


def test_mode_and_approach_exclude_each_other():
    with pytest.raises(ValueError, match=names("mode", "approach", "'ema'", "'batch'")):
        bn_fused.BatchNorm(CHANNELS, "batch", "batch", mode="ema")
    with pytest.raises(ValueError, match=names("mode", "'legacy'", "'ema'", "'batch'")):
        bn_fused.BatchNorm(CHANNELS, "batch", mode="legacy")


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("3", TypeError)])
def test_a_bad_number_of_channels_is_named(value, error):
    with pytest.raises(error, match=names("input_size", repr(value))):
        bn_fused.BatchNorm(value, "batch", "batch")
    with pytest.raises(error, match=names("num_channels", repr(value))):
        bn_fused.RunningStats.init(value)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_a_state_that_is_not_float_is_refused(dtype):
    with pytest.raises((ValueError, TypeError), match=names("dtype", jnp.dtype(dtype).name)):
        make(dtype=dtype)


# --- inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "x", [[1.0], [1.0, 2.0]]], ids=repr)
def test_what_is_no_array_is_named(value):
    for call in (lambda: bn_fused.batch_norm(value, bn_fused.RunningStats.init(3)), lambda: make()[0](value, None)):
        with pytest.raises(TypeError, match=names(f"x is {value!r}", "accepted is an array")):
            call()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (jnp.ones(CHANNELS + 1), ValueError, "has shape (4,); accepted is (3,)"),
        (jnp.ones(()), ValueError, "has shape (); accepted is (3,)"),
        (jnp.ones((CHANNELS, 1)), ValueError, "has shape (3, 1); accepted is (3,)"),
        (jnp.ones(CHANNELS, jnp.int32), TypeError, "has dtype int32; accepted are float32"),
        (1.0, TypeError, "is 1.0; accepted is an array"),
    ],
    ids=str,
)
def test_a_weight_that_was_put_in_and_does_not_fit_is_named(value, error, said, inference):
    layer, state = make()
    for name in ("weight", "bias"):
        other = eqx.tree_at(lambda layer, name=name: getattr(layer, name), layer, value)
        with pytest.raises(error, match=names(f"{name} {said}")):
            apply(other, state, jnp.ones((4, CHANNELS, 5)), inference=inference)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_input_that_is_not_real_and_floating_is_refused(dtype):
    x = jnp.ones((4, CHANNELS, 5), dtype)
    for run in (lambda: function(x), lambda: apply(*make(), x)):
        with pytest.raises(TypeError, match=names("x", jnp.dtype(dtype).name, "float32", "bfloat16")):
            run()


@pytest.mark.parametrize("inference", [False, True])
def test_a_wrong_number_of_channels_is_named(inference):
    x = jnp.ones((4, 5, 7))
    with pytest.raises(ValueError, match=names("x", "(4, 5, 7)", "3")):
        function(x, inference=inference)
    with pytest.raises(ValueError, match=names("x", "(5, 7)", "3")):
        apply(*make(), x, inference=inference)


def test_weight_and_bias_of_the_wrong_shape_are_named():
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=names(name, "(5,)", "(3,)")):
            function(**{name: jnp.ones(5)})


@pytest.mark.parametrize("axis", [0, -3, 3, -4])
def test_channel_axis_is_any_axis_of_x_but_the_first(axis):
    with pytest.raises(ValueError, match=names("channel_axis", repr(axis), "(4, 3, 5)")):
        function(channel_axis=axis)


def test_channel_axis_is_an_integer():
    with pytest.raises(TypeError, match=names("channel_axis", "1.0")):
        function(channel_axis=1.0)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_batch_needs_examples_and_channels(shape):
    with pytest.raises(ValueError, match=names("x", repr(shape), "axes")):
        function(jnp.ones(shape), channel_axis=-1)


def test_an_example_needs_channels():
    with pytest.raises(ValueError, match=names("x", "()")):
        apply(*make(), jnp.ones((4,)))


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (0, 3)])
def test_an_empty_batch_or_map_has_nothing_to_average(shape):
    with pytest.raises(ValueError, match=names("x", repr(shape), "nothing")):
        function(jnp.ones(shape))


def test_an_empty_map_is_refused_by_the_layer():
    with pytest.raises(ValueError, match=names("x", "(3, 0)", "nothing")):
        apply(*make(), jnp.ones((4, 3, 0)))


@pytest.mark.parametrize("inference", [False, True])
def test_a_residual_is_as_x(inference):
    x = jnp.ones((4, CHANNELS, 5))
    with pytest.raises(ValueError, match=names("residual", "(4, 3, 1)", "(4, 3, 5)")):
        function(x, residual=jnp.ones((4, 3, 1)), inference=inference)
    with pytest.raises((ValueError, TypeError), match=names("residual", "bfloat16", "float32")):
        function(x, residual=x.astype(jnp.bfloat16), inference=inference)
    with pytest.raises(ValueError, match=names("residual", "(3,)", "(3, 5)")):
        apply(*make(), x, residual=jnp.ones(3), inference=inference)


def test_a_mask_is_bool_and_broadcasts_to_x_without_its_channels():
    for shape in [(4, 3, 5), (3, 5), (4, 2), (1, 4, 5), (4,)]:
        with pytest.raises(ValueError, match=names("mask", repr(shape), "(4, 5)")):
            function(mask=jnp.ones(shape, bool))
    with pytest.raises(TypeError, match=names("mask", "float32", "bool")):
        function(mask=jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=names("mask", "(4,)", "(5,)")):
        apply(*make(), jnp.ones((4, 3, 5)), mask=jnp.ones(4, bool))


def test_stats_are_running_stats():
    with pytest.raises(TypeError, match=names("stats", "tuple", "RunningStats.of(mean, var)")):
        bn_fused.batch_norm(jnp.ones((4, 3)), (jnp.zeros(3), jnp.ones(3)))


@pytest.mark.parametrize(
    ("field", "value", "error", "said"),
    [
        ("mean", jnp.zeros(()), ValueError, "()"),
        ("mean", jnp.zeros((2, 3)), ValueError, "(2, 3)"),
        ("mean", None, TypeError, "None"),
        ("var", jnp.zeros(4), ValueError, "float32[4]"),
        ("zero_frac", jnp.zeros(3), ValueError, "float32[3]"),
        ("zero_frac", 1.0, TypeError, "1.0"),
        ("count", jnp.zeros(()), ValueError, "float32[]"),
        ("count", jnp.zeros(3, jnp.int32), ValueError, "int32[3]"),
    ],
)
def test_running_statistics_of_other_shapes_or_kinds_are_refused_by_their_name(field, value, error, said):
    stats = bn_fused.RunningStats.init(CHANNELS)._replace(**{field: value})
    with pytest.raises(error, match=names(f"stats.{field} ", said)):
        bn_fused.batch_norm(jnp.ones((4, CHANNELS, 5)), stats, channel_axis=1)


def test_running_statistics_may_be_what_numpy_has():
    stats = bn_fused.RunningStats(np.zeros(3, np.float32), np.zeros(3, np.float32), np.float32(1), np.int32(0))
    x = jnp.arange(4.0 * CHANNELS * 5).reshape(4, CHANNELS, 5)
    found, expected = (
        bn_fused.batch_norm(x, each, channel_axis=1) for each in (stats, bn_fused.RunningStats.init(CHANNELS))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_state_of_a_layer_with_other_channels_is_refused(channels, inference):
    layer, _ = make(inference=inference)
    _, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(channels, "batch", "batch")
    with pytest.raises(ValueError, match=names("state", f"({channels},)", f"({CHANNELS},)", "input_size")):
        apply(layer, state, jnp.ones((4, CHANNELS, 5)))


def test_a_virtual_batch_divides_the_batch():
    x = jnp.ones((4, CHANNELS, 5))
    with pytest.raises(ValueError, match=names("virtual_batch_size", "3", "4")):
        function(x, virtual_batch_size=3)
    with pytest.raises(ValueError, match=names("virtual_batch_size", "8", "4")):
        apply(*make(virtual_batch_size=8), x)


# --- names and backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_missing_axis_name_is_a_name_error(backend):
    layer, state = make(backend=backend)
    with pytest.raises(NameError, match="batch"):
        layer(jnp.ones((CHANNELS, 5)), state)
    with pytest.raises(NameError, match="batch"):
        jax.vmap(lambda x: layer(x, state), axis_name="other", out_axes=(0, None))(jnp.ones((4, CHANNELS, 5)))
    with pytest.raises(NameError, match=names("axis_name='batch', in_axes=(0, None)", "vmap", "shard_map")):
        layer(jnp.ones((CHANNELS, 5)), state)
    with pytest.raises(NameError, match=names("devices", "examples of x need no name")) as caught:
        function(axis_name="devices", backend=backend)
    assert "layer" not in str(caught.value)
    both, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, ("batch", "devices"), "batch", backend=backend)
    with pytest.raises(NameError, match=names("'devices'", "shard_map", "with_settings")) as caught:
        apply(both, state, jnp.ones((4, CHANNELS, 5)))
    assert "in_axes" not in str(caught.value)
    with pytest.raises(NameError, match=names("axis_name='batch', in_axes=(0, None)")):
        both(jnp.ones((CHANNELS, 5)), state)


def test_a_whole_batch_given_to_the_layer_is_named_as_such():
    layer, state = make()
    with pytest.raises(ValueError, match=names("(4, 3, 5)", "input_size is 3", "one example")):
        apply(layer, state, jnp.ones((2, 4, CHANNELS, 5)))


def test_a_state_that_is_none_of_this_layers_is_refused_with_how_to_make_it():
    layer, _ = make()
    other = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, "batch", mode="batch")[1]
    with pytest.raises(TypeError, match=names("state is None", "make_with_state")):
        apply(layer, None, jnp.ones((4, CHANNELS)))
    for state in (other, eqx.nn.State(eqx.nn.Identity())):
        with pytest.raises(ValueError, match=names("state holds nothing of this layer", "make_with_state")):
            apply(layer, state, jnp.ones((4, CHANNELS)))


def test_an_axis_of_the_mesh_over_which_only_x_differs_is_named():
    layer, state = make()
    arrays, rest = eqx.partition(state, eqx.is_array)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))

    def step(x, arrays):
        y, new = apply(layer, eqx.combine(arrays, rest), x)
        return y, eqx.filter(new, eqx.is_array)

    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    with pytest.raises(ValueError, match=names("axis_name lacks 'data'", "(\"batch\", 'data')")):
        jax.shard_map(step, mesh=mesh, in_specs=(split, whole), out_specs=(split, whole))(
            jnp.ones((4, CHANNELS)), arrays
        )


@pytest.mark.parametrize("name", ["use_weight", "use_bias"])
def test_flags_that_may_be_left_out_are_true_or_false_otherwise(name):
    with pytest.raises(TypeError, match=names(name, "'yes'", "True or False")):
        make(**{name: "yes"})


def test_initial_weights_are_finite_numbers_of_a_weight_that_is_there():
    for value in ("zeros", None, jnp.zeros(CHANNELS)):
        with pytest.raises(TypeError, match=names("initial_weight is", "number")):
            make(initial_weight=value)
    with pytest.raises(ValueError, match=names("initial_weight is nan", "finite")):
        make(initial_weight=float("nan"))
    for settings in ({"use_weight": False}, {"channelwise_affine": False}):
        with pytest.raises(ValueError, match=names("initial_weight is 0", "use_weight")):
            make(initial_weight=0, **settings)


@pytest.mark.parametrize("value", ["yes", 1, None], ids=repr)
def test_flags_are_true_or_false(value):
    for name in ("inference", "channelwise_affine"):
        with pytest.raises(TypeError, match=names(name, repr(value), "True or False")):
            make(**{name: value})
    with pytest.raises(TypeError, match=names("inference", repr(value))):
        function(inference=value)


def test_a_traced_flag_is_refused_and_a_known_array_is_not():
    with pytest.raises(TypeError, match=names("inference", "known when it is traced")):
        jax.jit(lambda inference: function(inference=inference))(True)
    assert function(inference=jnp.asarray(True))[1].zero_frac == 1


def test_equinoxs_order_of_arguments_is_answered_with_a_hint():
    with pytest.raises(TypeError, match=names("approach is 0.001", "eps", "by keyword")):
        bn_fused.BatchNorm(CHANNELS, "batch", 1e-3, True, 0.9)


def test_without_an_axis_name_the_layer_infers_and_does_not_train():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, None, "batch")
    x = jnp.ones((CHANNELS, 5))
    with pytest.raises(ValueError, match=names("axis_name", "None")):
        layer(x, state)
    y, _ = layer(x, state, inference=True)
    assert y.shape == x.shape


def test_a_name_stands_once_in_axis_name():
    with pytest.raises(ValueError, match=names("axis_name", "'batch'")):
        bn_fused.BatchNorm(CHANNELS, ("batch", "batch"), "batch")


def test_explain_refuses_what_the_function_refuses():
    for options in (
        {"activation": "tanh"},
        {"backend": "cudnn"},
        {"target": "gpu3"},
        {"channel_axis": 0},
        {"groups": 0},
    ):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=names(name, repr(value))):
            bn_fused.explain((4, 3), jnp.float32, **options)
    for dtype in ("int32", "float31"):
        with pytest.raises(TypeError, match=names("dtype", dtype, "bfloat16")):
            bn_fused.explain((4, 3), dtype)
    with pytest.raises(TypeError, match=names("shape is an array of shape (4, 3)")):
        bn_fused.explain(jnp.ones((4, 3)), jnp.float32)
    for name in ("residual", "mask"):
        with pytest.raises(TypeError, match=name):
            bn_fused.explain((4, 3), jnp.float32, **{name: jnp.ones((4, 3))})


# --- warnings -----------------------------------------------------------------------------------------------


def caught(call):
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        result = call()
    return result, [message for message in messages if issubclass(message.category, UserWarning)]


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("shape", [(1, CHANNELS), (1, CHANNELS, 1, 1)])
def test_a_single_value_per_channel_is_the_definitions_answer_with_one_warning(approach, shape):
    x = jnp.arange(1.0, 4.0).reshape(shape)
    (y, stats), messages = caught(lambda: function(x, approach=approach))
    assert len(messages) == 1 and "single value" in str(messages[0].message)
    assert np.all(np.asarray(stats.var) == 0)
    assert np.max(np.abs(np.asarray(y))) < 1e-3
    assert np.all(np.isfinite(np.asarray(stats.mean)))


def test_one_example_keeps_its_variance_under_axis_debias_with_one_warning():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, CHANNELS, 5)), jnp.float32)
    plain = np.asarray(x, np.float64).var((0, 2))
    for debias, factor, warned in (("axis", 1, 1), ("samples", 5 / 4, 0), ("none", 1, 0)):
        (_, stats), messages = caught(lambda debias=debias: function(x, debias=debias))
        assert len(messages) == warned
        assert all(re.search(names("debias", "axis", "samples"), str(message.message)) for message in messages)
        np.testing.assert_allclose(stats.var, 0.01 * plain * factor, rtol=1e-5)
    for approach in ("ema", "ema_compatibility"):
        assert not caught(lambda approach=approach: function(x, approach=approach, debias="axis"))[1]
    assert not caught(lambda: function(x, inference=True, debias="axis"))[1]


@pytest.mark.parametrize("size", [None, 3])
def test_a_mask_that_lets_one_example_count_keeps_its_variance_under_axis_debias_with_one_warning(size):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, CHANNELS, 5)), jnp.float32)
    # One example of six, or of one of two virtual batches.
    mask = jnp.asarray([False, True, False] + [False, size is not None, size is not None])[:, None]
    options = dict(mask=mask, debias="axis", virtual_batch_size=size)
    (_, stats), messages = caught(lambda: function(x, **options))
    assert len(messages) == 1 and re.search(names("mask", "one example", "samples"), str(messages[0].message))
    parts = [x[1:2]] if size is None else [x[1:2], x[4:6]]
    wanted = np.mean([np.asarray(part, np.float64).var((0, 2)) * len(part) for part in parts], 0)
    np.testing.assert_allclose(stats.var, 0.01 * wanted, rtol=1e-5)
    assert not caught(lambda: function(x, **{**options, "debias": "samples"}))[1]
    assert not caught(lambda: function(x, **{**options, "mask": jnp.ones((6, 1), bool)}))[1]
    # Under jit nobody knows the mask; the values are the same.
    (_, traced), messages = caught(lambda: jax.jit(lambda mask: function(x, **{**options, "mask": mask}))(mask))
    assert not messages
    np.testing.assert_allclose(traced.var, stats.var, rtol=1e-6)


def test_ordinary_calls_do_not_warn():
    assert not caught(lambda: function())[1]
    layer, state = make()
    assert not caught(lambda: apply(layer, state, jnp.ones((4, CHANNELS, 5))))[1]


# --- after an error -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        dict(x=np.ones((4, CHANNELS + 1, 5), np.float32)),
        dict(x=np.ones((4, CHANNELS, 0), np.float32)),
        dict(x=np.ones((4, CHANNELS, 5), np.int32)),
        dict(x=np.ones((4, CHANNELS, 5), np.float32), mask=np.ones((4,), bool)),
        dict(x=np.ones((4, CHANNELS, 5), np.float32), residual=np.ones((2,), np.float32)),
    ],
    ids=["channels", "empty", "dtype", "mask", "residual"],
)
def test_an_error_leaves_the_state_as_it_was_and_usable(bad):
    layer, state = make()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, CHANNELS, 5)), jnp.float32)
    _, state = apply(layer, state, x)
    before = jax.tree.map(np.asarray, (state.get(layer.state_index), state.get(layer.zero_frac_index)))
    options = {name: jnp.asarray(value) for name, value in bad.items() if name != "x"}
    with pytest.raises((ValueError, TypeError)):
        apply(layer, state, jnp.asarray(bad["x"]), **options)
    after = (state.get(layer.state_index), state.get(layer.zero_frac_index))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert_same_bits(one, other)
    _, state = apply(layer, state, x)
    assert state.get(layer.zero_frac_index) < 1


def test_a_name_error_leaves_the_state_usable():
    layer, state = make()
    with pytest.raises(NameError):
        layer(jnp.ones((CHANNELS, 5)), state)
    assert state.get(layer.zero_frac_index) == 1
    _, state = apply(layer, state, jnp.ones((4, CHANNELS, 5)))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"var": jnp.ones(3, jnp.bfloat16)}, "stats.var is bfloat16"),
        ({"mean": jnp.ones(3, jnp.float16)}, "stats.mean is float16"),
        ({"var": jnp.ones(4)}, "stats.var is float32[4]"),
    ],
)
def test_statistics_that_do_not_fit_each_other_are_refused(change, shown):
    stats = bn_fused.RunningStats.init(3)
    with pytest.raises(ValueError, match=names("stats.var", shown, "stats.mean", "same shape and dtype")):
        bn_fused.batch_norm(jnp.ones((4, 3)), stats._replace(**change))


@pytest.mark.parametrize("module", ["nnx", "linen"])
def test_without_flax_the_extra_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"bn_fused.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=names(f"bn_fused.{module} needs flax", "bn_fused[flax]")):
        importlib.import_module(f"bn_fused.{module}")
