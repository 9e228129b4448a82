"""JAX's debuggers find what BatchNorm makes or passes on, by the operation's name, and nothing where all is well."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import bn_fused
from bn_fused.kernels import Coefficients, fused_batch_norm
from bn_fused.kernels.activations import ACTIVATIONS

from support.versions import also_on_the_newest_jax

EXAMPLES, CHANNELS, POSITIONS = 8, 3, 4
FRESH, TRAINED = "never trained", "trained"


def statistics(kind=TRAINED):
    """Running statistics before the first step, or after some."""
    if kind == FRESH:
        return bn_fused.RunningStats.init(CHANNELS)
    values = (np.full(CHANNELS, 0.7), np.full(CHANNELS, 1.4), np.asarray(0.3))
    return bn_fused.RunningStats(*(jnp.asarray(value, jnp.float32) for value in values), jnp.asarray(1, jnp.int32))


def healthy():
    return jnp.asarray(np.random.default_rng(0).standard_normal((EXAMPLES, CHANNELS, POSITIONS)), jnp.float32)


def with_one(value):
    return healthy().at[2, 1, 3].set(value)


def function(x, stats, mask=None, **settings):
    """The function's y and new running statistics, of x with the channels on axis 1."""
    weight, bias = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
    return bn_fused.batch_norm(x, stats, weight, bias, channel_axis=1, mask=mask, **settings)


def layer(x, stats, mask=None, **settings):
    """The same with the layer under a vmap."""
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", **{"approach": "batch", **settings})
    state = state.set(layer.state_index, (stats.mean, stats.var)).set(layer.zero_frac_index, stats.zero_frac)
    state = state.set(layer.count_index, stats.count)
    call = jax.vmap(
        lambda x, state, mask: layer(x, state, mask=mask),
        axis_name="batch",
        in_axes=(0, None, 0),
        out_axes=(0, None),
    )
    y, state = call(x, state, mask)
    return y, jax.tree.leaves(state)


def gradient(call):
    """The pullback of y to x, with a cotangent of y's shape in front."""
    return lambda dy, x, *others: jax.vjp(lambda x: call(x, *others)[0], x)[1](dy)


def jitted_or_not(call, jitted):
    return jax.jit(call) if jitted else call


both_calls = pytest.mark.parametrize("call", [function, layer], ids=["function", "layer"])
eager_and_jitted = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
training_and_inference = pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])


# --- jax.debug_nans and jax.debug_infs ---------------------------------------------------------------------------


def check_found(debugger, name, run, *arguments):
    """The debugger says that the primitive of this name has such a result."""
    with debugger(True), pytest.raises(FloatingPointError, match=rf"encountered in {name}\b"):
        run(*arguments)


@both_calls
@eager_and_jitted
@training_and_inference
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_debug_nans_names_the_forward(call, jitted, inference, value):
    run = jitted_or_not(functools.partial(call, inference=inference), jitted)
    name = "bn_fused_normalise" if inference else "bn_fused_forward"
    # An infinity has the batch's statistics make a NaN; at inference it is passed on.
    what = jax.debug_infs if inference and np.isinf(value) else jax.debug_nans
    check_found(what, name, run, with_one(value), statistics())


@both_calls
@eager_and_jitted
@training_and_inference
def test_debug_nans_names_the_backward(call, jitted, inference):
    run = jitted_or_not(gradient(functools.partial(call, inference=inference)), jitted)
    name = "bn_fused_normalise_backward" if inference else "bn_fused_backward"
    check_found(jax.debug_nans, name, run, with_one(np.nan), healthy(), statistics())


@both_calls
@eager_and_jitted
def test_debug_infs_names_the_operation_whose_variance_overflows(call, jitted):
    run = jitted_or_not(call, jitted)
    check_found(jax.debug_infs, "bn_fused_forward", run, 1e30 * healthy(), statistics())


@eager_and_jitted
def test_debug_nans_names_the_raw_operation(jitted):
    def raw(x):
        ones = jnp.ones(CHANNELS)
        return fused_batch_norm(x, ones, ones, ones, ones, Coefficients(1.0, 0.0, 0.0, 0.1, 0.1, 0.9), eps=1e-5)

    x = jnp.reshape(jnp.moveaxis(with_one(np.inf), 1, -1), (-1, CHANNELS))
    check_found(jax.debug_nans, "bn_fused_dispatch", jitted_or_not(raw, jitted), x)


@eager_and_jitted
def test_debug_nans_finds_what_the_reference_makes(jitted):
    run = jitted_or_not(functools.partial(function, backend="reference"), jitted)
    check_found(jax.debug_nans, "sub", run, with_one(np.inf), statistics())


def test_a_state_is_valid_after_a_debuggers_error():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch")
    step = eqx.filter_jit(jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))
    good, bad = healthy(), with_one(np.nan)
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError):
            step(bad, state)
        step(good, state)


# --- checkify ----------------------------------------------------------------------------------------------------


def report(call, *arguments, errors=checkify.float_checks):
    """What checkify says of a call; None where it says nothing."""
    error, _ = checkify.checkify(call, errors=errors)(*arguments)
    return error.get()


@both_calls
@eager_and_jitted
@training_and_inference
@pytest.mark.parametrize("errors", [checkify.float_checks, checkify.nan_checks], ids=["float_checks", "nan_checks"])
def test_checkify_names_the_forward(call, jitted, inference, errors):
    run = jitted_or_not(functools.partial(call, inference=inference), jitted)
    name = "bn_fused_normalise" if inference else "bn_fused_forward"
    assert f"nan generated by primitive: {name}." in report(run, with_one(np.nan), statistics(), errors=errors)


@both_calls
@eager_and_jitted
@training_and_inference
def test_checkify_names_the_backward(call, jitted, inference):
    run = jitted_or_not(gradient(functools.partial(call, inference=inference)), jitted)
    name = "bn_fused_normalise_backward" if inference else "bn_fused_backward"
    assert f"nan generated by primitive: {name}." in report(run, with_one(np.nan), healthy(), statistics())


def test_checkify_is_quiet_about_nan_that_nobody_asked_it_for():
    assert report(function, with_one(np.nan), statistics(), errors=checkify.div_checks) is None


def test_checkify_finds_a_nan_inside_of_a_named_vmap():
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", "batch")
    checked = checkify.checkify(lambda x: layer(x, state)[0], errors=checkify.nan_checks)
    error, _ = jax.vmap(checked, axis_name="batch")(with_one(np.nan))
    assert "nan generated by primitive: bn_fused_forward." in error.get()


# --- no false alarms ---------------------------------------------------------------------------------------------


def healthy_inputs(inference):
    """x and mask, by name: nothing in them that BatchNorm makes NaN or infinite."""
    some = np.random.default_rng(1).random((EXAMPLES, POSITIONS)) < 0.6
    some[3] = False
    inputs = {"normal": (healthy(), None), "constant": (jnp.full_like(healthy(), 3), None)}
    if not inference:
        inputs["masked, zeros as padding"] = jnp.where(some[:, None], healthy(), 0.0), jnp.asarray(some)
        inputs["masked whole"] = jnp.zeros_like(healthy()), jnp.zeros((EXAMPLES, POSITIONS), bool)
    return inputs


def check_quiet(run, *arguments):
    with jax.debug_nans(True), jax.debug_infs(True):
        jax.block_until_ready(run(*arguments))
    assert report(run, *arguments) is None


@pytest.mark.parametrize(
    ("call", "backend"),
    [
        pytest.param(function, "auto", id="function"),
        pytest.param(layer, "auto", id="layer", marks=pytest.mark.slow),
        pytest.param(function, "reference", id="function, reference", marks=pytest.mark.slow),
    ],
)
@training_and_inference
@pytest.mark.parametrize(
    ("approach", "kind"),
    [
        ("batch", TRAINED),
        *also_on_the_newest_jax(("ema", TRAINED), ("ema_compatibility", FRESH)),
        pytest.param("batch", FRESH, marks=pytest.mark.slow),
        pytest.param("ema", FRESH, marks=pytest.mark.slow),
        pytest.param("ema_compatibility", TRAINED, marks=pytest.mark.slow),
    ],
)
def test_debuggers_are_quiet_where_all_is_well(call, backend, inference, approach, kind):
    run = functools.partial(call, approach=approach, inference=inference, backend=backend)
    for x, mask in healthy_inputs(inference).values():
        check_quiet(run, x, statistics(kind), mask)
        check_quiet(gradient(run), healthy(), x, statistics(kind), mask)


@training_and_inference
@pytest.mark.parametrize(
    "activation", ["silu", *also_on_the_newest_jax(*(name for name in ACTIVATIONS if name != "silu"))]
)
def test_debuggers_are_quiet_about_healthy_activations(inference, activation):
    run = functools.partial(layer, activation=activation, inference=inference)
    check_quiet(run, healthy(), statistics())
    check_quiet(gradient(run), healthy(), healthy(), statistics())
