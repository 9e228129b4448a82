"""What is said once about all layers of a model: their settings, their moments, and folding them away."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused

from support.over_batch import over_batch
from support.tolerances import tol
from support.versions import also_on_the_newest_jax


class Block(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: bn_fused.BatchNorm

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(3, 3, 3, padding=1, key=key)
        self.norm = bn_fused.BatchNorm(3, "batch", "batch", activation="relu")

    def __call__(self, x, state):
        return self.norm(self.conv(x), state)


class Network(eqx.Module):
    blocks: list
    last: eqx.nn.Linear

    def __init__(self, key):
        first, second, last = jax.random.split(key, 3)
        self.blocks = [Block(first), Block(second)]
        self.last = eqx.nn.Linear(3, 2, key=last)

    def __call__(self, x, state):
        for block in self.blocks:
            x, state = block(x, state)
        return self.last(jnp.mean(x, (1, 2))), state


over_batch = eqx.filter_jit(over_batch)


def data(seed=0, shape=(16, 3, 5, 5)):
    return jnp.asarray(2 + 3 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture
def network():
    return eqx.nn.make_with_state(Network)(jax.random.key(0))


def test_all_layers_get_other_settings_and_keep_weights_and_state(network):
    model, state = network
    y, state = over_batch(model, data(), state)
    changed = bn_fused.with_settings(model, axis_name="other", momentum=0.5, approach="ema", warmup_period=7)
    for block in changed.blocks:
        norm = block.norm
        assert (norm.axis_name, norm.momentum, norm.approach, norm.warmup_period) == ("other", 0.5, "ema", 7)
        assert (norm.activation, norm.eps, norm.debias) == ("relu", 1e-5, "samples")
    arrays = [jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in (model, changed)]
    assert all(one is other for one, other in zip(*arrays, strict=True))
    _, state = over_batch(changed, data(1), state, "other")
    np.testing.assert_allclose(state.get(changed.blocks[0].norm.zero_frac_index), 0.99 * 0.5, rtol=1e-6)
    assert model.blocks[0].norm.momentum == 0.99
    assert eqx.tree_equal(
        bn_fused.with_settings(changed, axis_name="batch", momentum=0.99, approach="batch", warmup_period=1), model
    )


def test_a_part_of_the_layers_is_frozen(network):
    model, state = network
    frozen = bn_fused.with_settings(model, where=lambda path, layer: path == "blocks.0.norm", inference=True)
    assert [block.norm.inference for block in frozen.blocks] == [True, False]
    _, state = over_batch(frozen, data(), state)
    assert [float(state.get(block.norm.zero_frac_index)) < 1 for block in frozen.blocks] == [False, True]


@pytest.mark.parametrize(("use_weight", "use_bias"), [(True, False), (False, True)])
def test_a_layer_with_one_of_weight_and_bias_keeps_it_alone(use_weight, use_bias):
    norm = bn_fused.BatchNorm(3, "batch", "batch", use_weight=use_weight, use_bias=use_bias)
    changed = bn_fused.with_settings(norm, momentum=0.5)
    assert (changed.weight is norm.weight, changed.bias is norm.bias) == (True, True)
    assert (norm.weight is None, norm.bias is None) == (not use_weight, not use_bias)


def test_layers_of_an_ensemble_and_of_subclasses_stay_what_they_are():
    class Mine(bn_fused.BatchNorm):
        pass

    models, states = eqx.filter_vmap(eqx.nn.make_with_state(Network))(jax.random.split(jax.random.key(0), 4))
    changed = bn_fused.with_settings(models, momentum=0.5)
    assert changed.blocks[1].norm.weight.shape == (4, 3)
    step = eqx.filter_vmap(over_batch, in_axes=(eqx.if_array(0), None, eqx.if_array(0)))
    _, states = step(changed, data(), states)
    moments = bn_fused.moments_of(changed, states)["blocks.0.norm"]
    assert [moment.shape for moment in moments] == [(4, 3)] * 2
    single = jax.tree.map(lambda value: value[2] if eqx.is_array(value) else value, (models, states))
    for one, other in zip(bn_fused.moments_of(*single)["blocks.0.norm"], moments, strict=True):
        np.testing.assert_array_equal(one, other[2])
    # Methods of a layer take one of them.
    layers, one = changed.blocks[0].norm, bn_fused.RunningStats.of(jnp.zeros(3), jnp.ones(3))
    for call in (
        lambda: layers.get_stats(states),
        lambda: layers.set_stats(states, one),
        lambda: over_batch(layers, data(), states),
        lambda: bn_fused.fold(eqx.nn.Linear(2, 3, key=KEY), bn_fused.with_settings(layers, activation=None), states),
    ):
        with pytest.raises(ValueError, match=r"shape \(4, 3\).*is an ensemble.*equinox.filter_vmap\("):
            call()
    states = eqx.filter_vmap(lambda layer, state: layer.set_stats(state, one))(layers, states)
    np.testing.assert_array_equal(bn_fused.moments_of(layers, states)[""], [np.zeros((4, 3)), np.ones((4, 3))])
    mine = Mine(3, "batch", "batch")
    assert type(bn_fused.with_settings(mine, momentum=0.5)) is Mine


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dtype": jnp.float64}, TypeError, "axis_name, approach.*given is dtype"),
        ({"momentum": 2.0}, ValueError, "blocks.0.norm: momentum is 2.0"),
        ({"where": lambda path, layer: False, "momentum": 0.5}, ValueError, "where takes no .*'blocks.0.norm'"),
        ({"where": "blocks.0", "momentum": 0.5}, TypeError, "where is 'blocks.0'; accepted are None and a function"),
    ],
)
def test_settings_that_cannot_be_changed_are_named(network, settings, error, message):
    with pytest.raises(error, match=message):
        bn_fused.with_settings(network[0], **settings)
    with pytest.raises(ValueError, match=r"model has no bn_fused.BatchNorm$"):
        bn_fused.with_settings(eqx.nn.Linear(2, 2, key=jax.random.key(0)), momentum=0.5)


def test_equinoxs_layers_are_answered_with_how_to_convert_them():
    model, state = eqx.nn.make_with_state(lambda: {"norm": eqx.nn.BatchNorm(6, "batch", mode="batch")})()
    for call in (
        lambda: bn_fused.with_settings(model, momentum=0.5),
        lambda: bn_fused.moments_of(model, state),
        lambda: bn_fused.recalibrate(model, state, [data()], over_batch),
    ):
        with pytest.raises(ValueError, match="model has no bn_fused.BatchNorm; equinox.nn.BatchNorm.*from_equinox"):
            call()
    with pytest.raises(TypeError, match="norm is a BatchNorm; .*from_equinox"):
        bn_fused.fold(eqx.nn.Linear(4, 6, key=KEY), model["norm"], state)
    ours, _ = bn_fused.from_equinox(model, state)
    with pytest.raises(ValueError, match="state holds nothing of norm.*from_equinox"):
        bn_fused.moments_of(ours, state)


def test_a_momentum_is_checked_in_the_dtype_of_the_layer(x64):
    momentum = 1 - 1e-9

    def make(dtype):
        return {"norm": bn_fused.with_settings(bn_fused.BatchNorm(3, "batch", "batch", dtype=dtype), momentum=momentum)}

    with pytest.raises(ValueError, match="momentum is 0.999999999, which float32 rounds to 1"):
        eqx.nn.make_with_state(make)(jnp.float32)
    assert eqx.nn.make_with_state(make)(jnp.float64)[0]["norm"].momentum == momentum
    # Of a layer without its start the state alone knows the dtype.
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(3, "batch", "batch", dtype=jnp.float32)
    with pytest.raises(ValueError, match="momentum is 0.999999999, which float32 rounds to 1"):
        over_batch(bn_fused.with_settings(norm, momentum=momentum), data(), state)


def test_layers_frozen_by_a_setting_train_again_out_of_inference_mode(network):
    frozen = bn_fused.with_settings(network[0], where=lambda path, layer: path == "blocks.0.norm", inference=True)
    unfrozen = eqx.nn.inference_mode(eqx.nn.inference_mode(frozen), value=False)
    assert [[block.norm.inference for block in model.blocks] for model in (frozen, unfrozen)] == [
        [True, False],
        [False, False],
    ]


def test_the_moments_of_all_layers_by_their_path(network):
    model, state = network
    for mean, var in bn_fused.moments_of(model, state).values():
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(var, 1)
    _, state = over_batch(model, data(), state)
    moments = bn_fused.moments_of(model, state)
    assert list(moments) == ["blocks.0.norm", "blocks.1.norm"]
    between = np.asarray(jax.vmap(model.blocks[0].conv)(data()), np.float64)
    np.testing.assert_allclose(moments["blocks.0.norm"][0], between.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(moments["blocks.0.norm"][1], between.var((0, 2, 3), ddof=1), rtol=1e-4)


def with_parameters(norm, values):
    """The layer with other values of its weight and bias, where it has them."""
    for name, value in zip(("weight", "bias"), values, strict=True):
        if getattr(norm, name) is not None:
            norm = eqx.tree_at(operator.attrgetter(name), norm, value)
    return norm


KEY = jax.random.key(3)
FOLDED = {
    "linear": (eqx.nn.Linear(4, 6, key=KEY), (4,)),
    "linear without bias": (eqx.nn.Linear(4, 6, use_bias=False, key=KEY), (4,)),
    "conv1d": (eqx.nn.Conv1d(4, 6, 3, key=KEY), (4, 9)),
    "conv2d, groups, no bias": (eqx.nn.Conv2d(4, 6, 3, groups=2, use_bias=False, padding=1, key=KEY), (4, 7, 5)),
    "conv2d, circular": (eqx.nn.Conv2d(4, 6, 3, padding="SAME", padding_mode="CIRCULAR", key=KEY), (4, 7, 5)),
    "transposed, groups": (eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, key=KEY), (4, 5, 5)),
}


@pytest.mark.parametrize(
    ("use_weight", "use_bias"), [(True, True), *also_on_the_newest_jax((True, False), (False, True), (False, False))]
)
@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_layer_gives_what_layer_and_norm_give(name, use_weight, use_bias):
    layer, shape = FOLDED[name]
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        6, "batch", "batch", use_weight=use_weight, use_bias=use_bias
    )
    norm = with_parameters(norm, jnp.asarray(np.random.default_rng(1).standard_normal((2, 6)), jnp.float32))
    x = data(2, (16, *shape))
    _, state = over_batch(norm, jax.vmap(layer)(x), state)
    wanted, _ = over_batch(eqx.nn.inference_mode(norm), jax.vmap(layer)(x), state)
    folded = bn_fused.fold(layer, norm, state)
    assert type(folded) is type(layer) and folded.use_bias
    got = jax.vmap(folded)(x)
    # Sums of up to 36 products, of inputs whose mean is of the size of their deviation.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tol(np.float32, n=36) * float(jnp.max(abs(wanted))))


def test_folding_keeps_16_bits_and_computes_in_float32():
    layer = eqx.nn.Linear(4, 6, use_bias=False, dtype=jnp.bfloat16, key=KEY)
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(6, "batch", "batch")
    mean, var = np.float32([1, 2, 3, 4, 5, 6]), np.float32([1, 4, 9, 16, 25, 36])
    state = state.set(norm.state_index, (jnp.asarray(mean), jnp.asarray(var)))
    state = state.set(norm.zero_frac_index, jnp.zeros(()))
    folded = bn_fused.fold(layer, norm, state)
    assert folded.weight.dtype == folded.bias.dtype == jnp.bfloat16
    scale = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
    exact = np.asarray(layer.weight, np.float64) * scale[:, None]
    np.testing.assert_allclose(np.asarray(folded.weight, np.float64), exact, rtol=2**-8)
    np.testing.assert_allclose(np.asarray(folded.bias, np.float64), -mean * scale, rtol=2**-8)


def test_arrays_with_their_channels_last_are_folded_as_those_with_channels_first():
    random = np.random.default_rng(4)
    weight, mean, scale, shift = (random.standard_normal(shape).astype(np.float32) for shape in [(6, 4, 3), 6, 6, 6])
    var = np.abs(random.standard_normal(6)).astype(np.float32)
    first = bn_fused.fold_arrays(weight, None, mean, var, scale, shift)
    last = bn_fused.fold_arrays(np.moveaxis(weight, 0, -1), None, mean, var, scale, shift, axis=-1)
    np.testing.assert_array_equal(first[0], np.moveaxis(last[0], -1, 0))
    np.testing.assert_array_equal(first[1], last[1])


def test_what_cannot_be_folded_is_named():
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(6, "batch", "batch", activation="silu")
    layer = eqx.nn.Linear(4, 6, key=KEY)
    with pytest.raises(ValueError, match="activation 'silu'.*with_settings"):
        bn_fused.fold(layer, norm, state)
    plain = bn_fused.with_settings(norm, activation=None)
    bn_fused.fold(layer, plain, state)
    with pytest.raises(ValueError, match=r"mean has shape \(6,\).*5 output channels"):
        bn_fused.fold(eqx.nn.Linear(4, 5, key=KEY), plain, state)
    with pytest.raises(TypeError, match="layer is a MLP.*fold_arrays"):
        bn_fused.fold(eqx.nn.MLP(4, 6, 2, 1, key=KEY), plain, state)
    with pytest.raises(TypeError, match="norm is a LayerNorm"):
        bn_fused.fold(layer, eqx.nn.LayerNorm(6), state)


ARRAYS = {
    "weight": np.ones((3, 2), np.float32),
    "bias": None,
    "mean": np.zeros(3, np.float32),
    "var": np.ones(3, np.float32),
}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"weight": np.ones((3, 2), int)}, TypeError, "weight is int64; accepted is a floating array"),
        ({"weight": [[1.0, 2.0]]}, TypeError, "weight is list; accepted is a floating array"),
        ({"bias": 1.0}, TypeError, "bias is float; accepted is a floating array or None"),
        ({"var": np.asarray([1.0, -1.0, 1.0], np.float32)}, ValueError, "var is .*; accepted are variances of 0"),
        ({"eps": -1}, ValueError, "eps is -1; accepted is a finite number above 0"),
        ({"axis": 2}, ValueError, r"axis is 2; a weight of shape \(3, 2\) has axes 0 to 1"),
        ({"axis": "x"}, ValueError, "axis is 'x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arrays_that_cannot_be_folded_are_named(given, error, message):
    with pytest.raises(error, match=message):
        bn_fused.fold_arrays(**ARRAYS | given)


def test_float64_arrays_are_folded_in_what_jax_has():
    weight, bias = bn_fused.fold_arrays(np.eye(3), None, np.zeros(3), np.full(3, 4.0), eps=1e-5)
    assert (weight.dtype, bias.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(np.asarray(weight), np.eye(3) / 2, rtol=1e-5)
    assert bn_fused.fold_arrays(jnp.eye(3), None, jnp.zeros(3), jnp.ones(3), eps=1e-5)[0].dtype == jnp.float32


def test_a_norm_of_a_subclass_is_not_folded():
    class Own(bn_fused.BatchNorm):
        pass

    norm, state = eqx.nn.make_with_state(Own)(6, "batch", "batch")
    with pytest.raises(TypeError, match="norm is a Own; accepted is a bn_fused.BatchNorm itself"):
        bn_fused.fold(eqx.nn.Linear(4, 6, key=KEY), norm, state)
