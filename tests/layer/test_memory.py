"""What is kept between forward and backward: x itself and a few values per channel, nothing else of x's size."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import bn_fused
from bn_fused.approaches import APPROACHES
from bn_fused.kernels import activations

EXAMPLES, CHANNELS, SIZE = 6, 5, 8
SHAPES = {"NCHW": (EXAMPLES, CHANNELS, SIZE, SIZE), "NHWC": (EXAMPLES, SIZE, SIZE, CHANNELS)}
ELEMENTS = EXAMPLES * CHANNELS * SIZE * SIZE
ACTIVATIONS = (None, *activations.ACTIVATIONS)
# Per channel the backward reads about a dozen vectors (statistics, their cotangents' factors, weight, bias).
PER_CHANNEL = 32 * CHANNELS


def layer_step(**settings):
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(CHANNELS, "batch", **settings)

    def step(x, weight, bias, residual=None, mask=None):
        moved = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))

        def example(x, residual, mask):
            return moved(x, state, residual=residual, mask=mask)

        return jax.vmap(example, axis_name="batch", out_axes=(0, None))(x, residual, mask)

    return step


def function_step(layout, **settings):
    stats = bn_fused.RunningStats.init(CHANNELS)

    def step(x, weight, bias, residual=None, mask=None):
        return bn_fused.batch_norm(
            x, stats, weight, bias, channel_axis=layout.index("C"), residual=residual, mask=mask, **settings
        )

    return step


STEPS = {
    "layer": layer_step,
    "function": lambda **settings: function_step("NCHW", **settings),
    "channels last": lambda **settings: function_step("NHWC", **settings),
    "jitted function": lambda **settings: jax.jit(function_step("NCHW", **settings)),
}


def shape_of(form):
    return SHAPES["NHWC" if form == "channels last" else "NCHW"]


def kept(step, *arrays, **constants):
    """What the pullback of `step` holds: the positions of those of its arguments that it keeps as they are ("y" for its
    result), and the types of everything else.
    """

    def forward(*arrays):
        y, pullback, _ = jax.vjp(lambda *arrays: step(*arrays, **constants), *arrays, has_aux=True)
        return y, pullback

    jaxpr = jax.make_jaxpr(forward)(*arrays).jaxpr
    y, *held = jaxpr.outvars
    assert held, "a pullback that holds nothing is not a gradient's"
    known = [*jaxpr.invars, y]
    names = [*range(len(jaxpr.invars)), "y"]
    return {names[known.index(var)] for var in held if var in known}, [var.aval for var in held if var not in known]


def parameters():
    return jnp.ones(CHANNELS), jnp.zeros(CHANNELS)


def elements(types):
    return sum(math.prod(type_.shape) for type_ in types)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("form", STEPS)
def test_the_backward_keeps_x_in_its_own_dtype_and_values_per_channel(form, approach, activation, dtype):
    x = jnp.ones(shape_of(form), dtype)
    arguments, others = kept(STEPS[form](approach=approach, activation=activation), x, *parameters())
    assert 0 in arguments, "x is read by the backward and was not kept as it is"
    assert elements(others) <= PER_CHANNEL < ELEMENTS / 10, others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_residual_is_kept_only_where_an_activation_needs_more_than_the_sign_of_y(inference, form, activation, dtype):
    x = jnp.ones(shape_of(form), dtype)
    step = STEPS[form](approach="batch", activation=activation, inference=inference)
    arguments, others = kept(step, x, *parameters(), jnp.ones_like(x))
    # float16 rounds what is small to zero, which has no sign.
    if activation in ("relu", "leaky_relu") and dtype != "float16":
        needed = {"y"}
    else:
        needed = {3} if activation is not None else set()
    assert arguments & {"y", 3} == needed
    assert 0 in arguments
    assert elements(others) <= PER_CHANNEL, others


@pytest.mark.parametrize("form", STEPS)
def test_a_mask_adds_itself_without_the_channels(form):
    x = jnp.ones(shape_of(form))
    step = STEPS[form](approach="batch", activation="relu")
    mask = jnp.arange(ELEMENTS // CHANNELS).reshape(EXAMPLES, SIZE, SIZE) % 3 > 0
    arguments, others = kept(step, x, *parameters(), mask=mask)
    assert 0 in arguments
    large = [type_ for type_ in others if math.prod(type_.shape) >= ELEMENTS // CHANNELS]
    assert all(type_.dtype == bool and math.prod(type_.shape) == ELEMENTS // CHANNELS for type_ in large), large
    assert len(large) <= 1
    assert elements(others) <= PER_CHANNEL + elements(large)


@pytest.mark.parametrize("form", STEPS)
def test_inference_keeps_x_and_values_per_channel(form):
    x = jnp.ones(shape_of(form), jnp.bfloat16)
    settings = {"approach": "batch", "activation": "silu", "inference": True}
    arguments, others = kept(STEPS[form](**settings), x, *parameters())
    assert 0 in arguments
    assert elements(others) <= PER_CHANNEL, others


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_raw_operation_keeps_x_and_values_per_channel(activation):
    x = jnp.ones((ELEMENTS // CHANNELS, CHANNELS), jnp.bfloat16)
    coefficients = bn_fused.kernels.Coefficients(*(jnp.float32(value) for value in (1, 0, 0, 0.1, 0.1, 0.9)))

    def step(x, weight, bias):
        y, *statistics = bn_fused.kernels.fused_batch_norm(
            x,
            weight,
            bias,
            jnp.zeros(CHANNELS),
            jnp.ones(CHANNELS),
            coefficients,
            eps=1e-5,
            activation=activation,
        )
        return y, statistics

    arguments, others = kept(step, x, *parameters())
    # The operation adds an axis of groups to x: a view, which has x's dtype and elements and no copy behind it.
    views = [type_ for type_ in others if math.prod(type_.shape) == ELEMENTS]
    assert (0 in arguments) + len(views) == 1
    assert all(view.dtype == x.dtype for view in views)
    assert elements(others) <= PER_CHANNEL + elements(views), others


def test_the_definition_differentiated_by_jax_keeps_more():
    # That the measure sees what it should: autodiff of the same formulas keeps further arrays of x's size.
    step = STEPS["function"](approach="batch", activation="relu", backend="reference")
    _, others = kept(step, jnp.ones(SHAPES["NCHW"]), *parameters())
    assert elements(others) >= ELEMENTS
