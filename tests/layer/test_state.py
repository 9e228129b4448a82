"""The running state: what it starts as, how it moves, what it keeps, and what leaves it alone."""

import dataclasses
import functools
import inspect
import warnings

import beartype
import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES

from support import oracle
from support.tolerances import assert_close, assert_same_bits, eps, tol

CHANNELS = 3


def make(approach="batch", **settings):
    return eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", approach, **settings)


def apply(layer, state, x, mask=None, inference=None):
    def one(x, mask):
        return layer(x, state, mask=mask, inference=inference)

    return jax.vmap(one, axis_name="batch", out_axes=(0, None))(x, mask)


def apply_to_a_copy(layer, state, x, **options):
    """A State may be used once; this leaves `state` for another use."""
    return apply(layer, jax.tree.unflatten(*reversed(jax.tree.flatten(state))), x, **options)


def read(layer, state):
    mean, var = state.get(layer.state_index)
    return bn_fused.RunningStats(mean, var, state.get(layer.zero_frac_index), state.get(layer.count_index))


def data(seed=0, shape=(8, CHANNELS, 4), dtype=np.float32):
    return jnp.asarray(3 + 2 * np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_unchanged(after, before):
    for name, new, old in zip(before._fields, after, before, strict=True):
        assert_same_bits(new, old, name)


# --- what it starts as --------------------------------------------------------------------------------------


@pytest.mark.parametrize("approach", APPROACHES)
def test_state_starts_at_zero_mean_zero_variance_all_zero_frac_no_steps(approach):
    stats = read(*make(approach))
    np.testing.assert_array_equal(stats.mean, np.zeros(CHANNELS))
    np.testing.assert_array_equal(stats.var, np.zeros(CHANNELS))
    assert stats.zero_frac == 1.0 and stats.zero_frac.shape == ()
    assert stats.count == 0 and stats.count.shape == () and stats.count.dtype == jnp.int32
    for one, other in zip(stats, bn_fused.RunningStats.init(CHANNELS), strict=True):
        assert_same_bits(one, other)


def test_weight_and_bias_have_the_default_float_whatever_the_states_dtype(x64):
    layer, state = make(dtype=jnp.float32)
    assert layer.weight.dtype == layer.bias.dtype == jnp.float64
    assert all(leaf.dtype == jnp.float32 for leaf in read(layer, state)[:3])
    layer, state = make()
    assert all(leaf.dtype == jnp.float64 for leaf in read(layer, state)[:3])


def test_without_affine_there_is_no_weight_and_no_bias():
    layer, _ = make(channelwise_affine=False)
    assert layer.weight is None and layer.bias is None and not layer.channelwise_affine


@pytest.mark.parametrize(
    ("settings", "weight", "bias"),
    [
        (dict(use_bias=False), 1, None),
        (dict(use_weight=False), None, 0),
        (dict(channelwise_affine=False, use_weight=True), 1, None),
        (dict(channelwise_affine=False, use_bias=True), None, 0),
        (dict(use_weight=False, use_bias=False), None, None),
        (dict(channelwise_affine=False, use_weight=True, use_bias=True), 1, 0),
        (dict(initial_weight=0), 0, 0),
        (dict(use_bias=False, initial_weight=0.5), 0.5, None),
    ],
    ids=str,
)
def test_weight_and_bias_are_chosen_apart(settings, weight, bias):
    layer, state = make(**settings)
    for value, start in ((layer.weight, weight), (layer.bias, bias)):
        if start is None:
            assert value is None
        else:
            assert_same_bits(value, np.full(CHANNELS, start, np.float32))
    assert layer.channelwise_affine == (weight is not None or bias is not None)
    x = data(1)
    plain, plain_state = make(channelwise_affine=False)
    for inference in (False, True):
        y, _ = apply_to_a_copy(layer, state, x, inference=inference)
        wanted, _ = apply_to_a_copy(plain, plain_state, x, inference=inference)
        wanted = np.asarray(wanted) * (1 if weight is None else weight)
        assert_close(y, wanted, np.max(np.abs(wanted)))


def test_a_residual_block_whose_last_norm_starts_with_weight_zero_is_the_identity_and_learns():
    layer, state = make(initial_weight=0)
    x = data(1)

    @eqx.filter_jit
    def block(layer):
        return jax.vmap(lambda x: layer(x, state, residual=x)[0], axis_name="batch")(x)

    assert_same_bits(block(layer), x)
    gradient = eqx.filter_grad(lambda layer: jnp.sum(block(layer) ** 2))(layer)
    assert np.all(np.asarray(gradient.weight) != 0)


def test_delete_init_state_removes_exactly_the_four_state_arrays():
    layer = bn_fused.BatchNorm(CHANNELS, "batch", "batch")
    before = jax.tree.leaves(eqx.filter(layer, eqx.is_array))
    after = jax.tree.leaves(eqx.filter(eqx.nn.delete_init_state(layer), eqx.is_array))
    assert len(before) - len(after) == 4
    assert sorted(leaf.shape for leaf in after) == [(CHANNELS,), (CHANNELS,)]


# --- how it moves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("approach", APPROACHES)
def test_count_and_zero_frac_step_as_the_table_says(approach):
    layer, state = make(approach, momentum=0.9, warmup_period=3)
    zero_frac = np.float32(1)
    for step in range(1, 6):
        _, state = apply(layer, state, data(step))
        stats = read(layer, state)
        zero_frac = np.float32(0) if approach == "ema_compatibility" else zero_frac * np.float32(0.9)
        assert_same_bits(stats.zero_frac, zero_frac, "zero_frac")
        assert_close(stats.zero_frac, zero_frac and 0.9**step, what="zero_frac = momentum ** step")
        assert stats.count == (min(step, 3) if approach == "ema" else 0)


@pytest.mark.parametrize("approach", ["batch", "ema"])
def test_after_one_step_inference_uses_exactly_that_batch(approach):
    """The zero start is divided out: rm / (1 - m) is the first batch's mean, its variance likewise."""
    layer, state = make(approach, debias="none", momentum=0.99)
    x = data()
    _, state = apply(layer, state, x)
    y, after = apply(layer, state, x, inference=True)
    assert_unchanged(read(layer, after), read(layer, state))
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 2), keepdims=True), exact.var((0, 2), keepdims=True)
    expected = (exact - mean) / np.sqrt(var + 1e-5)
    # 1 - zero_frac is 0.01 with zero_frac's rounding: a hundred times its epsilon, in mean and variance.
    scale = (np.abs(expected) + 1 + np.abs(mean) / np.sqrt(var)) / (1 - 0.99)
    assert_close(y, expected, scale, c=1, what="y")


@pytest.mark.parametrize("approach", APPROACHES)
def test_state_keeps_dtype_and_strong_type_through_a_scan(approach):
    layer, state = make(approach)

    def step(state, x):
        y, state = apply(layer, state, x)
        return state, y

    xs = jnp.stack([data(seed) for seed in range(4)])
    last, _ = jax.jit(lambda state: jax.lax.scan(step, state, xs))(state)
    for before, after in zip(read(layer, state), read(layer, last), strict=True):
        assert before.dtype == after.dtype and before.shape == after.shape
        assert not before.weak_type and not after.weak_type


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_step_returns_the_type_of_the_state_it_was_given(x_dtype):
    stats = bn_fused.RunningStats.init(CHANNELS)
    for inference in (False, True):
        run = functools.partial(bn_fused.batch_norm, stats=stats, channel_axis=1, inference=inference)
        old, new = jax.eval_shape(lambda: stats), jax.eval_shape(run, data(dtype=x_dtype))[1]
        for before, after in zip(old, new, strict=True):
            assert (before.shape, before.dtype) == (after.shape, after.dtype) and not after.weak_type


def test_a_float32_state_serves_float64_inputs_and_stays_float32(x64):
    x = data(dtype=np.float64)
    y, stats = bn_fused.batch_norm(x, bn_fused.RunningStats.init(CHANNELS), channel_axis=1, debias="none")
    assert y.dtype == jnp.float64 and stats.mean.dtype == stats.var.dtype == stats.zero_frac.dtype == jnp.float32
    expected = oracle.batch_norm(
        oracle.Definition(debias="none", channel_axis=1), np.asarray(x), oracle.State.initial(CHANNELS)
    )
    assert_close(y, expected.y, expected.y_scale, dtype=np.float64, what="y")
    assert_close(stats.var, expected.state.var, expected.state_scale.var, what="running var")


def test_a_float64_state_keeps_its_digits_for_float32_inputs(x64):
    stats = bn_fused.RunningStats.init(CHANNELS, jnp.float64)
    _, stats = bn_fused.batch_norm(data(), stats, channel_axis=1, debias="none", momentum=0.99)
    assert stats.mean.dtype == stats.var.dtype == stats.zero_frac.dtype == jnp.float64
    assert stats.zero_frac == 0.99


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inference", [False, True])
def test_only_a_zero_frac_of_exactly_one_is_never_trained(backend, inference):
    """One bit less is an ordinary value: no first step of `ema_compatibility`, no mean 0 and variance 1."""
    zero_frac = jnp.nextafter(jnp.float32(1), jnp.float32(0))
    stats = bn_fused.RunningStats(jnp.ones(CHANNELS), 4 * jnp.ones(CHANNELS), zero_frac, jnp.array(0))
    settings = dict(approach="ema_compatibility", channel_axis=1, inference=inference)
    x = data()
    y, new = bn_fused.batch_norm(x, stats, backend=backend, **settings)
    expected = oracle.batch_norm(oracle.Definition(**settings), x, stats)
    assert_close(y, expected.y, expected.y_scale, what="y")
    assert_close(new.mean, expected.state.mean, expected.state_scale.mean, what="running mean")
    assert_close(new.var, expected.state.var, expected.state_scale.var, what="running var")


# --- what leaves it alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("trained", [False, True])
def test_inference_leaves_the_state_bit_for_bit(approach, trained):
    layer, state = make(approach)
    if trained:
        _, state = apply(layer, state, data())
    _, after = apply(layer, state, data(1), inference=True)
    assert_unchanged(read(layer, after), read(layer, state))
    _, after = apply(eqx.nn.inference_mode(layer), state, data(1))
    assert_unchanged(read(layer, after), read(layer, state))


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_layer_that_was_never_trained_infers_with_mean_zero_and_variance_one(approach, backend):
    layer, state = make(approach, backend=backend)
    x = data()
    y, after = apply(layer, state, x, inference=True)
    exact = np.asarray(x, np.float64)
    assert_close(y, exact / np.sqrt(1 + 1e-5), what="y")
    assert_unchanged(read(layer, after), read(layer, state))


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mask_in_which_nothing_counts_leaves_the_state_and_infers(approach, trained, backend):
    layer, state = make(approach, warmup_period=5, backend=backend)
    if trained:
        for seed in (0, 1):
            _, state = apply(layer, state, data(seed))
    x = data(2)
    y, after = apply_to_a_copy(layer, state, x, mask=jnp.zeros((8, 4), bool))
    assert_unchanged(read(layer, after), read(layer, state))
    wanted, _ = apply(layer, state, x, inference=True)
    scale = 1 + np.abs(wanted) + (np.abs(np.asarray(x)).max() if trained else 0)
    assert_close(y, np.asarray(wanted, np.float64), scale, what="y")


def test_axis_debias_counts_the_examples_with_a_position_that_counts():
    x = data(shape=(6, CHANNELS, 4))
    mask = np.zeros((6, 4), bool)
    mask[0, :] = mask[2, 1] = mask[5, 2:] = True  # three examples
    stats = bn_fused.RunningStats.init(CHANNELS)

    def var(debias):
        return bn_fused.batch_norm(x, stats, channel_axis=1, mask=jnp.asarray(mask), debias=debias)[1].var

    exact = np.asarray(x, np.float64)
    plain = np.array([exact[:, channel][mask].var() for channel in range(CHANNELS)]) * 0.01
    assert_close(var("none"), plain, what="not debiased")
    assert_close(var("axis"), plain * 3 / 2, what="debiased over three examples")
    assert_close(var("samples"), plain * 7 / 6, what="debiased over seven positions")


def test_a_mask_broadcasts_over_positions_and_all_true_is_no_mask():
    x, stats = data(shape=(6, CHANNELS, 4, 5)), bn_fused.RunningStats.init(CHANNELS)

    def new(mask):
        return bn_fused.batch_norm(x, stats, channel_axis=1, mask=mask, debias="none")

    y, plain = new(None)
    masked_y, masked = new(jnp.ones((6, 4, 5), bool))
    assert_close(masked_y, np.asarray(y, np.float64), 1 + np.abs(y), what="y")
    assert_close(masked.var, np.asarray(plain.var, np.float64), what="running var")
    whole = new(jnp.broadcast_to(jnp.arange(6).reshape(6, 1, 1) < 4, (6, 4, 5)))
    for mask in (jnp.arange(6).reshape(6, 1, 1) < 4,):
        for one, other in zip(jax.tree.leaves(new(mask)), jax.tree.leaves(whole), strict=True):
            assert_same_bits(one, other)
    columns = jnp.arange(5) < 3
    for one, other in zip(
        jax.tree.leaves(new(columns)), jax.tree.leaves(new(jnp.broadcast_to(columns, (6, 4, 5)))), strict=True
    ):
        assert_same_bits(one, other)


# --- state of low precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, "bfloat16"])
def test_a_16_bit_state_is_refused_with_the_reason(dtype):
    for construct in (lambda: make(dtype=dtype), lambda: bn_fused.RunningStats.init(CHANNELS, dtype)):
        with pytest.raises(ValueError, match=r"dtype is b?float16.*epsilon|dtype is bfloat16.*epsilon"):
            construct()


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_state_cast_later_is_computed_in_float32_kept_in_its_type_and_warned_about(approach, dtype):
    stats = bn_fused.RunningStats(
        jnp.array([1.5, -2.25, 0.75], dtype),
        jnp.array([1.25, 2.5, 0.5], dtype),
        jnp.array(0.5, dtype),
        jnp.array(1),
    )
    x = data()
    with pytest.warns(UserWarning, match="float16") as caught:
        y, new = bn_fused.batch_norm(x, stats, approach=approach, channel_axis=1, debias="none", momentum=0.9)
    assert len(caught) == 1
    assert y.dtype == jnp.float32 and all(leaf.dtype == dtype for leaf in new[:3])
    definition = oracle.Definition(approach=approach, channel_axis=1, debias="none", momentum=0.9)
    expected = oracle.batch_norm(definition, x, oracle.State(*(np.asarray(leaf, np.float64) for leaf in stats)))
    assert_close(y, expected.y, expected.y_scale, what="y")
    for name in ("mean", "var", "zero_frac"):
        scale = getattr(expected.state_scale, name)
        assert_close(getattr(new, name), getattr(expected.state, name), scale, what=name)


# --- RunningStats -------------------------------------------------------------------------------------------


def test_running_stats_is_a_pytree_of_four_arrays():
    stats = bn_fused.RunningStats.init(CHANNELS)
    leaves, structure = jax.tree.flatten(stats)
    assert len(leaves) == 4
    assert isinstance(jax.tree.unflatten(structure, leaves), bn_fused.RunningStats)
    doubled = jax.tree.map(lambda leaf: leaf + leaf, stats)
    assert doubled.zero_frac == 2


def test_gradients_reach_running_stats_under_jax_grad():
    stats = bn_fused.RunningStats(jnp.ones(CHANNELS), 2 * jnp.ones(CHANNELS), jnp.array(0.5), jnp.array(1))
    x = data()

    def loss(stats):
        y, _ = bn_fused.batch_norm(x, stats, approach="ema", channel_axis=1, inference=True)
        return jnp.sum(y * y)

    gradient = jax.grad(loss, allow_int=True)(stats)
    assert isinstance(gradient, bn_fused.RunningStats)
    definition = oracle.Definition(approach="ema", channel_axis=1, inference=True)
    expected = oracle.batch_norm(definition, x, stats)
    zeros = np.zeros(CHANNELS)
    wanted, scales = expected.backward(2 * expected.y, zeros, zeros, 0.0)
    # The cotangent 2y has y's own rounding.
    for name in ("mean", "var", "zero_frac"):
        assert_close(getattr(gradient, name), getattr(wanted, name), 2 * getattr(scales, name), what=name)


# --- spellings ----------------------------------------------------------------------------------------------


def test_mode_is_equinoxs_spelling():
    ema = bn_fused.BatchNorm(CHANNELS, "batch", mode="ema")
    assert ema.approach == "ema_compatibility"
    batch = bn_fused.BatchNorm(CHANNELS, "batch", mode="batch")
    assert (batch.approach, batch.debias) == ("batch", "none")


@pytest.mark.parametrize("debias", ["samples", "axis", "none"])
def test_a_debias_that_is_given_counts_under_mode_too(debias):
    assert bn_fused.BatchNorm(CHANNELS, "batch", mode="batch", debias=debias).debias == debias
    default = bn_fused.BatchNorm(CHANNELS, "batch", approach="batch").debias
    assert default == "samples" and type(default) is str


def test_no_approach_warns_and_is_equinoxs_default():
    with pytest.warns(UserWarning, match='ema_compatibility.*approach="batch" or approach="ema"') as caught:
        layer = bn_fused.BatchNorm(CHANNELS, "batch")
    assert len(caught) == 1 and layer.approach == "ema_compatibility"


@pytest.mark.parametrize("settings", [{"approach": "batch"}, {"mode": "ema"}, {"mode": "batch"}])
def test_a_named_approach_does_not_warn(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn_fused.BatchNorm(CHANNELS, "batch", **settings)


def test_the_arguments_stand_in_the_documented_order():
    positional = (4, ["a", "b"], "ema", 1e-3, False, 0.9, 7, True, jnp.float32)
    layer = bn_fused.BatchNorm(*positional)
    assert layer.input_size == 4
    assert layer.axis_name == ("a", "b")
    assert (layer.approach, layer.eps, layer.channelwise_affine) == ("ema", 1e-3, False)
    assert (layer.momentum, layer.warmup_period, layer.inference) == (0.9, 7, True)

    def names(function, kind):
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind == kind]

    keyword = inspect.Parameter.KEYWORD_ONLY
    options = ["activation", "debias", "virtual_batch_size", "axis_index_groups", "backend", "mode"]
    options += ["use_weight", "use_bias", "initial_weight"]
    assert names(bn_fused.BatchNorm.__init__, keyword) == options
    assert names(bn_fused.BatchNorm.__call__, keyword) == ["residual", "mask", "key", "inference"]
    defaults = {p.name: p.default for p in inspect.signature(bn_fused.BatchNorm).parameters.values()}
    expected = dict(approach=None, eps=1e-5, channelwise_affine=True, momentum=0.99, warmup_period=1, inference=False)
    assert {name: defaults[name] for name in expected} == expected

    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert names(bn_fused.batch_norm, plain) == ["x", "stats", "weight", "bias"]
    assert set(names(bn_fused.batch_norm, keyword)) == {
        "approach",
        "momentum",
        "eps",
        "warmup_period",
        "channel_axis",
        "axis_name",
        "activation",
        "residual",
        "mask",
        "debias",
        "virtual_batch_size",
        "axis_index_groups",
        "inference",
        "backend",
    }


def test_everything_but_inference_and_the_arrays_is_static():
    layer, _ = make()
    leaves = jax.tree.leaves(eqx.partition(layer, eqx.is_array)[1])
    assert leaves == [False]
    assert [layer.inference for layer in (layer, eqx.nn.inference_mode(layer))] == [False, True]
    static = {field.name for field in dataclasses.fields(layer) if field.metadata.get("static")}
    assert {
        "input_size",
        "approach",
        "eps",
        "momentum",
        "warmup_period",
        "activation",
        "debias",
        "backend",
    } <= static


def test_the_annotations_of_a_call_are_true():
    checked = jaxtyping.jaxtyped(bn_fused.BatchNorm.__call__, typechecker=beartype.beartype)
    layer, state = make()
    arrays = (data(), data(1), jnp.ones((8, 4), bool))

    def one(x, residual, mask):
        return checked(layer, x, state, residual=residual, mask=mask)

    y, _ = jax.vmap(one, axis_name="batch", out_axes=(0, None))(*arrays)
    assert y.shape == arrays[0].shape
    with pytest.raises(TypeError, match="parameter 'x'"):
        checked(layer, jnp.ones((CHANNELS, 4), jnp.int32), state)


def test_the_warm_up_moves_from_batch_to_running_statistics():
    """First step of a long warm-up: as `batch`; when it is over: as the running statistics of that step."""
    x = data()
    stats = bn_fused.RunningStats(jnp.ones(CHANNELS), 4 * jnp.ones(CHANNELS), jnp.array(0.0), jnp.array(0, jnp.int32))
    options = dict(channel_axis=1, debias="none", momentum=0.9)
    as_batch, _ = bn_fused.batch_norm(x, stats, approach="batch", **options)
    early, new = bn_fused.batch_norm(x, stats, approach="ema", warmup_period=10**6, **options)
    # f = 1e-6, times the distance between the two pairs of statistics, which is of order one.
    np.testing.assert_allclose(early, as_batch, rtol=0, atol=10 * 1e-6 + 10 * tol(np.float32))
    assert new.count == 1
    late, new = bn_fused.batch_norm(x, stats, approach="ema", warmup_period=1, **options)
    inferred, _ = bn_fused.batch_norm(x, new, approach="ema", inference=True, channel_axis=1)
    np.testing.assert_allclose(late, inferred, rtol=0, atol=10 * tol(np.float32))
    assert eps(np.float32) < 1e-6


def test_a_step_can_be_given_the_memory_of_the_state_from_the_first_step_on():
    """Training loops donate what they replace; JAX refuses an array that is given twice."""
    stats = bn_fused.RunningStats.init(8)
    kept = bn_fused.RunningStats.init(8)
    step, donating = (jax.jit(bn_fused.batch_norm, donate_argnums=donated) for donated in ((), 1))
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(8, "batch", "batch")
    mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    x, first = jnp.arange(32.0).reshape(4, 8), stats.mean
    for _ in range(2):
        _, stats = donating(x, stats)
        _, kept = step(x, kept)
        _, state = eqx.filter_jit(mapped, donate="all-except-first")(x, state)
    assert first.is_deleted()
    for given_away, other, of_layer in zip(stats, kept, state.get(layer.state_index), strict=False):
        assert_same_bits(given_away, other)
        assert_same_bits(of_layer, other)
