"""`from_equinox` and `to_equinox`: whole models, with what was trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.models import with_fields

from support.over_batch import over_batch
from support.tolerances import tol
from support.versions import also_on_the_newest_jax

CHANNELS = 4


class Residual(eqx.Module):
    conv: eqx.nn.Conv2d
    norms: dict
    spectral: eqx.nn.SpectralNorm

    def __init__(self, make_norm, key):
        first, second, third = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, key=first)
        self.norms = {"before": make_norm(), "after": make_norm()}
        linear = eqx.nn.Linear(CHANNELS, CHANNELS, key=second)
        self.spectral = eqx.nn.SpectralNorm(linear, "weight", key=third)

    def __call__(self, x, state):
        h, state = self.norms["before"](x, state)
        h, state = self.norms["after"](self.conv(jax.nn.relu(h)), state)
        y, state = self.spectral(jnp.mean(x + h, (1, 2)), state)
        return y, state


def equinoxs(mode, **settings):
    return lambda: eqx.nn.BatchNorm(CHANNELS, "batch", mode=mode, **settings)


def make(make_norm, seed=0):
    return eqx.nn.make_with_state(Residual)(make_norm, jax.random.key(seed))


over_batch = eqx.filter_jit(over_batch)


def data(seed):
    x = 2 + 3 * np.random.default_rng(seed).standard_normal((16, CHANNELS, 5, 5))
    return jnp.asarray(x, jnp.float32)


def clone(state):
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))


def trained(model, state, steps):
    for step in range(steps):
        _, state = over_batch(model, data(step), state)
    return state


def inferred(model, state):
    return over_batch(eqx.nn.inference_mode(model), data(99), clone(state))[0]


def assert_infers_alike(one, other):
    wanted = np.asarray(inferred(*one))
    # A few layers, sums of up to 36 products; the moments are divided by 1 - zero_frac.
    np.testing.assert_allclose(inferred(*other), wanted, rtol=0, atol=tol(np.float32, n=100) * abs(wanted).max())


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("ema", 1),
        ("batch", 0),
        *also_on_the_newest_jax(("ema", 0), ("ema", 5), ("batch", 5)),
        pytest.param("batch", 1, marks=pytest.mark.slow),
    ],
)
def test_inference_and_training_go_on_as_with_equinox(mode, steps):
    old, old_state = make(equinoxs(mode, momentum=0.9, eps=1e-3))
    old_state = trained(old, old_state, steps)
    new, state = bn_fused.from_equinox(old, old_state)
    approach = {"ema": "ema_compatibility", "batch": "batch"}[mode]
    for norm in new.norms.values():
        assert isinstance(norm, bn_fused.BatchNorm)
        assert (norm.approach, norm.debias, norm.momentum, norm.eps) == (approach, "none", 0.9, 1e-3)
    if steps or mode == "batch":  # of a layer that was never trained Equinox's "ema" gives what memory held
        assert_infers_alike((old, old_state), (new, state))
    for step in (10, 11):
        y, state = over_batch(new, data(step), state)
        wanted, old_state = over_batch(old, data(step), old_state)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=tol(np.float32, n=100) * float(abs(wanted).max()))
    if steps:  # else the start at one of Equinox's running variance is left out
        assert_infers_alike((old, old_state), (new, state))


def test_other_settings_and_what_else_is_in_the_model():
    old, old_state = make(equinoxs("batch"))
    old_state = trained(old, old_state, 2)
    new, state = bn_fused.from_equinox(old, old_state, approach="ema", warmup_period=10, momentum=0.5)
    assert [norm.approach for norm in new.norms.values()] == ["ema"] * 2
    np.testing.assert_allclose(state.get(new.norms["after"].zero_frac_index), 0.99**2, rtol=1e-6)
    uv = old.spectral.uv_index
    for one, other in zip(old_state.get(uv), state.get(new.spectral.uv_index), strict=True):
        np.testing.assert_array_equal(one, other)
    assert new.conv.weight is old.conv.weight
    trained(new, state, 2)


def test_parts_under_inference_and_members_of_ensembles():
    old, old_state = eqx.filter_vmap(lambda key: eqx.nn.make_with_state(Residual)(equinoxs("batch"), key))(
        jax.random.split(jax.random.key(0), 3)
    )
    step = eqx.filter_vmap(over_batch, in_axes=(eqx.if_array(0), None, eqx.if_array(0)))
    _, old_state = step(old, data(0), old_state)
    old = eqx.tree_at(lambda model: model.norms["before"].inference, old, True)
    # Without channelwise_affine Equinox computes without weight and bias, whatever is in their places.
    after = old.norms["after"]
    ignored = {"channelwise_affine": False, "weight": 2 * after.weight, "bias": 1 + after.bias}
    old.norms["after"] = with_fields(after, ignored)
    new, state = bn_fused.from_equinox(old, old_state)
    assert [new.norms[name].inference for name in ("before", "after")] == [True, False]
    assert (new.norms["after"].weight, new.norms["after"].bias) == (None, None)
    wanted, _ = step(eqx.nn.inference_mode(old), data(1), clone(old_state))
    y, _ = step(eqx.nn.inference_mode(new), data(1), state)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=tol(np.float32, n=100) * float(abs(wanted).max()))


@pytest.mark.usefixtures("standard_promotion")  # Equinox raises a float to the power of its counter
# The first step of `ema_compatibility` is its own; 300 steps leave nothing of the start.
@pytest.mark.parametrize(
    ("approach", "steps"),
    [
        ("batch", 0),
        ("ema_compatibility", 1),
        *also_on_the_newest_jax(("batch", 7), ("ema_compatibility", 0), ("ema_compatibility", 300)),
        pytest.param("batch", 1, marks=pytest.mark.slow),
        pytest.param("batch", 300, marks=pytest.mark.slow),
        pytest.param("ema_compatibility", 7, marks=pytest.mark.slow),
    ],
)
def test_and_back(approach, steps):
    def norm():
        return bn_fused.BatchNorm(CHANNELS, "batch", approach, momentum=0.9)

    ours, state = make(norm)
    state = jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, s: over_batch(ours, data(0), s)[1], state))(
        state
    )
    back, back_state = bn_fused.to_equinox(ours, state)
    assert all(isinstance(norm, eqx.nn.BatchNorm) for norm in back.norms.values())
    if steps or approach == "batch":
        assert_infers_alike((ours, state), (back, back_state))
    if approach == "batch" and steps < 100:
        assert back_state.get(back.norms["after"].batch_counter) == steps
    trained(back, back_state, 1)
    again, again_state = bn_fused.from_equinox(back, back_state)
    if steps:
        assert_infers_alike((ours, state), (again, again_state))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_a_16_bit_model_of_equinox_goes_there_and_back_and_trains_on(mode):
    x = data(0).astype(jnp.bfloat16)
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, "batch", mode=mode, dtype=jnp.bfloat16)
    _, state = over_batch(norm, x, state)
    back, back_state = bn_fused.to_equinox(*bn_fused.from_equinox(norm, state))
    arrays = [jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in ((norm, state), (back, back_state))]
    for like, value in zip(*arrays, strict=True):
        assert mode == "batch" or value.dtype == like.dtype
        np.testing.assert_allclose(np.float32(value), np.float32(like), rtol=2**-8)
    y, stepped = over_batch(back, x, clone(back_state))
    assert y.dtype == jnp.bfloat16
    assert eqx.tree_equal(*(jax.tree.map(jnp.result_type, each) for each in (stepped, back_state)))


@pytest.mark.usefixtures("standard_promotion")
def test_statistics_from_elsewhere_go_to_equinox_too():
    norm, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch")
    mean, var = jnp.arange(4.0), 1 + jnp.arange(4.0)
    state = state.set(norm.state_index, (mean, var)).set(norm.zero_frac_index, jnp.zeros(()))
    back, back_state = bn_fused.to_equinox(norm, state)
    y, _ = over_batch(eqx.nn.inference_mode(back), data(0), back_state)
    wanted = (data(0) - mean[None, :, None, None]) / jnp.sqrt(var + 1e-5)[None, :, None, None]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("use_weight", "use_bias", "mode"),
    [
        (False, True, "batch"),
        *also_on_the_newest_jax((True, False, "ema"), (False, False, "batch")),
        pytest.param(True, False, "batch", marks=pytest.mark.slow),
        pytest.param(False, True, "ema", marks=pytest.mark.slow),
        pytest.param(False, False, "ema", marks=pytest.mark.slow),
    ],
)
def test_what_a_layer_has_of_weight_and_bias_goes_to_equinox(use_weight, use_bias, mode):
    def norm():
        return bn_fused.BatchNorm(CHANNELS, "batch", mode=mode, use_weight=use_weight, use_bias=use_bias)

    make_all = eqx.filter_vmap(lambda key: eqx.nn.make_with_state(Residual)(norm, key))
    ours, state = make_all(jax.random.split(jax.random.key(0), 3))

    def parameters(model):
        pairs = [(norm.weight, norm.bias) for norm in model.norms.values()]
        return [value for pair in pairs for value in pair if value is not None]

    random = np.random.default_rng(1)
    values = [jnp.asarray(random.standard_normal(value.shape), jnp.float32) for value in parameters(ours)]
    ours = eqx.tree_at(parameters, ours, values)
    step = eqx.filter_vmap(over_batch, in_axes=(eqx.if_array(0), None, eqx.if_array(0)))
    with jax.numpy_dtype_promotion("standard"):  # Equinox raises a float to the power of its counter
        _, state = step(ours, data(0), state)
        back, back_state = bn_fused.to_equinox(ours, state)
        shape = (3, CHANNELS) if use_weight or use_bias else None
        for after in (back.norms["after"].weight, back.norms["after"].bias):
            assert (None if after is None else after.shape) == shape
        wanted, _ = step(eqx.nn.inference_mode(ours), data(1), clone(state))
        y, _ = step(eqx.nn.inference_mode(back), data(1), back_state)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=tol(np.float32, n=100) * float(abs(wanted).max()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"approach": "ema"}, "norms.after.*approach 'ema'"),
        ({"activation": "relu"}, "norms.after.*activation 'relu'.*with_settings"),
        ({"virtual_batch_size": 2}, "norms.after.*virtual_batch_size 2"),
    ],
)
def test_what_equinox_does_not_have_is_named_with_the_layer(settings, message):
    model, state = make(lambda: bn_fused.BatchNorm(CHANNELS, "batch", **{"approach": "batch", **settings}))
    with pytest.raises(ValueError, match=message):
        bn_fused.to_equinox(model, state)
    if "approach" not in settings:
        plain = bn_fused.with_settings(model, **dict.fromkeys(settings))
        bn_fused.to_equinox(plain, state)


def test_a_model_without_such_layers_is_an_error():
    model, state = make(equinoxs("batch"))
    with pytest.raises(ValueError, match="no bn_fused BatchNorm.*are equinox.nn.BatchNorm already"):
        bn_fused.to_equinox(model, state)
    with pytest.raises(TypeError, match="given is dtype"):
        bn_fused.from_equinox(model, state, dtype=jnp.float64)
    new, state = bn_fused.from_equinox(model, state)
    with pytest.raises(ValueError, match="no equinox BatchNorm.*are bn_fused.BatchNorm already"):
        bn_fused.from_equinox(new, state)
    for convert in (bn_fused.from_equinox, bn_fused.to_equinox):
        with pytest.raises(ValueError, match="that could be replaced$"):
            convert(new.conv, state)
        with pytest.raises(TypeError, match="model is an equinox.nn.State"):
            convert(state, new)


class Doubled(eqx.nn.BatchNorm):
    def __call__(self, x, state, **options):
        y, state = super().__call__(x, state, **options)
        return 2 * y, state


class Halved(bn_fused.BatchNorm):
    pass


def test_subclasses_whose_behaviour_would_be_lost_are_named():
    model, state = eqx.nn.make_with_state(lambda: [eqx.nn.Identity(), Doubled(4, "batch", mode="batch")])()
    with pytest.raises(TypeError, match="1 is a Doubled, a subclass of BatchNorm"):
        bn_fused.from_equinox(model, state)
    model, state = eqx.nn.make_with_state(Halved)(4, "batch", "batch")
    with pytest.raises(TypeError, match="model is a Halved, a subclass of BatchNorm"):
        bn_fused.to_equinox(model, state)


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        ({}, {"backend": "cudnn"}, "norms.after: backend is 'cudnn'; accepted"),
        ({}, {"momentum": "0.9"}, "norms.after: momentum is '0.9'; accepted"),
        ({"eps": 0.0}, {}, "norms.after: eps is 0.0; accepted"),
    ],
)
def test_what_our_layer_does_not_accept_is_named_with_the_layer(own, settings, message):
    model, state = make(equinoxs("batch", **own))
    with pytest.raises((TypeError, ValueError), match=message):
        bn_fused.from_equinox(model, state, **settings)


def test_a_state_of_another_model_is_named():
    model, state = eqx.nn.make_with_state(lambda: [eqx.nn.BatchNorm(4, "batch", mode="batch")])()
    _, other = eqx.nn.make_with_state(lambda: {"norm": eqx.nn.BatchNorm(4, "batch", mode="batch")})()
    with pytest.raises(ValueError, match="state holds nothing of 0; make both together(?!.*from_equinox)"):
        bn_fused.from_equinox(model, other)
    with pytest.raises(TypeError, match="state is None; accepted is the equinox.nn.State"):
        bn_fused.from_equinox(model, None)
    model, state = bn_fused.from_equinox(model, state)
    with pytest.raises(ValueError, match="state holds nothing of 0; make both together"):
        bn_fused.moments_of(model, other)
