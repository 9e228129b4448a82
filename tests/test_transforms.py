"""Every JAX transform around, inside and through the layer, against plain autodiff of the definition in float64.

The same program is run twice, with the fused operation and with `backend="reference"`, whose derivatives and batching
are JAX's own. A program is one way to call the layer on a batch (`STRUCTURES`) or one way to differentiate it
(`DERIVATIVES`); each is a function of all differentiable inputs, the incoming running statistics among them.
"""

import dataclasses
import functools
from typing import NamedTuple

import bn_fused
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("x64")

EXAMPLES, CHANNELS, POSITIONS = 4, 3, 2
WARMUP_PERIOD = 3


class Inputs(NamedTuple):
    """What a step is differentiated with respect to; `residual` may be None."""

    x: jax.Array
    residual: jax.Array | None
    weight: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array


class Outputs(NamedTuple):
    """What a step gives, its int32 counter apart."""

    y: jax.Array
    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array


IN_AXES = Inputs(0, 0, None, None, None, None, None)
OUT_AXES = Outputs(0, None, None, None)
EACH_ITS_OWN = Outputs(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """The static options of a layer."""

    approach: str
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    inference: bool = False
    virtual_batch_size: int | None = None


CASES = {
    "batch": Case("batch"),
    "ema-all": Case("ema", "silu", residual=True, mask=True),
    "ema_compatibility-all": Case("ema_compatibility", "relu", residual=True, mask=True),
}
MORE_CASES = {
    "batch-all": Case("batch", "gelu", residual=True, mask=True),
    "batch-leaky_relu": Case("batch", "leaky_relu", residual=True),
    "ema": Case("ema"),
    "ema_compatibility": Case("ema_compatibility"),
    "inference": Case("ema", inference=True),
    "inference-all": Case("batch", "silu", residual=True, inference=True),
    "virtual": Case("batch", virtual_batch_size=2),
    "virtual-all": Case("ema", "silu", residual=True, mask=True, virtual_batch_size=2),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A layer's step as a function of `Inputs`; the mask [examples, positions] (or None) and the counter are given."""

    case: Case
    backend: str
    mask: jax.Array | None
    count: jax.Array
    axis_name: object = "batch"

    def step(self, inputs, mask):
        """One example, under the vmap that names its axis; returns `Outputs` and the counter."""
        case = self.case
        layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
            CHANNELS,
            self.axis_name,
            case.approach,
            momentum=0.9,
            warmup_period=WARMUP_PERIOD,
            inference=case.inference,
            activation=case.activation,
            virtual_batch_size=case.virtual_batch_size,
            backend=self.backend,
        )
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (inputs.weight, inputs.bias))
        state = state.set(layer.state_index, (inputs.mean, inputs.var))
        state = state.set(layer.zero_frac_index, inputs.zero_frac)
        state = state.set(layer.count_index, self.count)
        y, state = layer(inputs.x, state, residual=inputs.residual, mask=mask)
        outputs = Outputs(y, *state.get(layer.state_index), state.get(layer.zero_frac_index))
        return outputs, state.get(layer.count_index)

    def example(self, inputs, mask):
        """One example, without the counter."""
        return self.step(inputs, mask)[0]

    def batch(self, inputs, wrap=lambda function: function, in_axes=IN_AXES, out_axes=OUT_AXES):
        """The whole batch: `wrap(example)` under the named vmap."""
        mapped = jax.vmap(
            wrap(self.example),
            in_axes=(in_axes, 0),
            out_axes=out_axes,
            axis_name=self.axis_name,
            axis_size=EXAMPLES,
        )
        return mapped(inputs, self.mask)

    def counted_batch(self, inputs):
        """The whole batch; returns `Outputs` and the program of the next step."""
        mapped = jax.vmap(self.step, axis_name=self.axis_name, in_axes=(IN_AXES, 0), out_axes=(OUT_AXES, None))
        outputs, count = mapped(inputs, self.mask)
        return outputs, dataclasses.replace(self, count=count)


class Function(Program):
    """The same for the functional form, which takes the whole batch."""

    def counted_batch(self, inputs, axis_name=None):
        case = self.case
        stats = bn_fused.RunningStats(inputs.mean, inputs.var, inputs.zero_frac, self.count)
        y, stats = bn_fused.batch_norm(
            inputs.x,
            stats,
            inputs.weight,
            inputs.bias,
            approach=case.approach,
            momentum=0.9,
            warmup_period=WARMUP_PERIOD,
            channel_axis=1,
            axis_name=axis_name,
            activation=case.activation,
            residual=inputs.residual,
            mask=self.mask,
            virtual_batch_size=case.virtual_batch_size,
            inference=case.inference,
            backend=self.backend,
        )
        return Outputs(y, stats.mean, stats.var, stats.zero_frac), dataclasses.replace(self, count=stats.count)

    def batch(self, inputs):
        return self.counted_batch(inputs)[0]


# --- data ------------------------------------------------------------------------------------------------------


def inputs_and_count(case, later, shape=(EXAMPLES,)):
    """The inputs of a layer's first step, or of a later one with running statistics from elsewhere."""
    rng = np.random.default_rng(later)
    shape = (*shape, CHANNELS, POSITIONS)
    inputs = Inputs(
        x=2 * rng.standard_normal(shape) + 1,
        residual=rng.standard_normal(shape) if case.residual else None,
        weight=1 + 0.3 * rng.standard_normal(CHANNELS),
        bias=rng.standard_normal(CHANNELS),
        mean=rng.standard_normal(CHANNELS) if later else np.zeros(CHANNELS),
        var=1 + rng.random(CHANNELS) if later else np.zeros(CHANNELS),
        zero_frac=np.asarray(0.3 if later else 1.0),
    )
    return jax.tree.map(jnp.asarray, inputs), jnp.asarray(1 if later else 0, jnp.int32)


def mask_of(case):
    """One example counts whole, one in part, one not at all."""
    mask = [[True, True], [False, True], [False, False], [True, True]]
    return jnp.asarray(mask) if case.mask else None


def scalar(outputs):
    """A number to which every value contributes, none of them linearly and no two alike."""

    def total(values):
        return jnp.sum(jnp.reshape(jnp.cos(jnp.arange(values.size, dtype=values.dtype)), values.shape) * values + values**2)

    return sum(total(values) for values in jax.tree.leaves(outputs))


def another(inputs, seed=7):
    """Inputs of the same shapes that point elsewhere: a tangent."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda value: jnp.asarray(rng.standard_normal(value.shape)), inputs)


def stacked(inputs, *others):
    """Several inputs along a new leading axis."""
    return jax.tree.map(lambda *values: jnp.stack(values), inputs, *others)


def varied(inputs, scale):
    """Inputs of the same kind with other values; the variance stays positive, zero_frac what it is."""
    changed = jax.tree.map(lambda value: value * scale + 0.1, inputs)
    return changed._replace(var=inputs.var * scale, zero_frac=inputs.zero_frac)


def with_state(inputs, outputs):
    """The inputs of the step after the one that gave these outputs."""
    return inputs._replace(mean=outputs.mean, var=outputs.var, zero_frac=outputs.zero_frac)


# --- ways to call the layer ------------------------------------------------------------------------------------

STRUCTURES = {}


def structure(function):
    STRUCTURES[function.__name__] = function
    return function


@structure
def vmap(program, inputs):
    return program.batch(inputs)


@structure
def jit_around_vmap(program, inputs):
    return jax.jit(program.batch)(inputs)


@structure
def jit_inside_vmap(program, inputs):
    return program.batch(inputs, wrap=jax.jit)


@structure
def checkpoint_around_vmap(program, inputs):
    return jax.checkpoint(program.batch)(inputs)


@structure
def checkpoint_inside_vmap(program, inputs):
    return program.batch(inputs, wrap=jax.checkpoint)


@structure
def filter_checkpoint_around_vmap(program, inputs):
    return eqx.filter_checkpoint(program.batch)(inputs)


@structure
def filter_checkpoint_inside_vmap(program, inputs):
    return program.batch(inputs, wrap=eqx.filter_checkpoint)


@structure
def examples_on_other_axes(program, inputs):
    moved = inputs._replace(
        x=jnp.moveaxis(inputs.x, 0, 2),
        residual=None if inputs.residual is None else jnp.moveaxis(inputs.residual, 0, 1),
    )
    return program.batch(moved, in_axes=IN_AXES._replace(x=2, residual=1), out_axes=OUT_AXES._replace(y=-1))


def _nested(program, inputs, outer, inner, out_axes):
    """Two nested named vmaps of two examples each."""

    def split(values):
        return None if values is None else jnp.reshape(values, (2, 2, *values.shape[1:]))

    inputs = inputs._replace(x=split(inputs.x), residual=split(inputs.residual))
    one = program.example
    for name, out in ((inner, OUT_AXES), (outer, out_axes)):
        one = jax.vmap(one, axis_name=name, in_axes=(IN_AXES, 0), out_axes=out)
    return one(inputs, split(program.mask))


@structure
def two_names(program, inputs):
    return _nested(dataclasses.replace(program, axis_name=("a", "b")), inputs, "a", "b", OUT_AXES)


@structure
def two_names_in_the_other_order(program, inputs):
    return _nested(dataclasses.replace(program, axis_name=("a", "b")), inputs, "b", "a", OUT_AXES)


@structure
def inner_of_two_names(program, inputs):
    return _nested(dataclasses.replace(program, axis_name="b"), inputs, "a", "b", EACH_ITS_OWN)


@structure
def outer_of_two_names(program, inputs):
    program = dataclasses.replace(program, axis_name="a")
    paired = stacked(inputs, varied(inputs, 1.5))

    def pair(inputs, mask):
        in_axes = Inputs(0, 0, None, None, None, None, None)
        return jax.vmap(lambda inputs: program.example(inputs, mask), axis_name="b", in_axes=(in_axes,))(inputs)

    shared = inputs._replace(x=jnp.moveaxis(paired.x, 0, 1), residual=paired.residual)
    if inputs.residual is not None:
        shared = shared._replace(residual=jnp.moveaxis(paired.residual, 0, 1))
    return jax.vmap(pair, axis_name="a", in_axes=(IN_AXES, 0))(shared, program.mask)


@structure
def ensemble_outside(program, inputs):
    return jax.vmap(program.batch)(stacked(inputs, varied(inputs, 1.5)))


@structure
def ensemble_outside_on_one_batch(program, inputs):
    members = stacked(inputs, varied(inputs, 1.5))._replace(x=inputs.x, residual=inputs.residual)
    return jax.vmap(program.batch, in_axes=(Inputs(None, None, 0, 0, 0, 0, 0),))(members)


@structure
def ensemble_outside_with_one_state(program, inputs):
    many = stacked(inputs, varied(inputs, 1.5))
    return jax.vmap(program.batch, in_axes=(IN_AXES,))(inputs._replace(x=many.x, residual=many.residual))


@structure
def ensemble_outside_of_weights(program, inputs):
    many = stacked(inputs, varied(inputs, 1.5))
    axes = Inputs(None, None, 0, 0, None, None, None)
    return jax.vmap(program.batch, in_axes=(axes,))(inputs._replace(weight=many.weight, bias=many.bias))


@structure
def ensemble_inside(program, inputs):
    def members(inputs, mask):
        return jax.vmap(program.example, in_axes=(IN_AXES, None), out_axes=EACH_ITS_OWN)(
            inputs._replace(**{
                name: jnp.stack([value, 1.5 * value])
                for name, value in (("x", inputs.x), ("residual", inputs.residual))
                if value is not None
            }),
            mask,
        )

    return jax.vmap(members, axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@structure
def ensemble_inside_with_its_own_weights_and_state(program, inputs):
    many = stacked(inputs, varied(inputs, 1.5))._replace(x=inputs.x, residual=inputs.residual)
    inside = Inputs(None, None, 0, 0, 0, 0, 0)

    def members(inputs, mask):
        return jax.vmap(program.example, in_axes=(inside, None), out_axes=EACH_ITS_OWN)(inputs, mask)

    return jax.vmap(members, axis_name="batch", in_axes=(IN_AXES, 0))(many, program.mask)


@structure
def ensembles_outside_and_inside(program, inputs):
    many = stacked(inputs, varied(inputs, 1.5))
    return jax.vmap(lambda inputs: ensemble_inside(program, inputs))(many)


@structure
def x_the_same_for_all(program, inputs):
    inputs = inputs._replace(x=inputs.x[1])
    return program.batch(inputs, in_axes=IN_AXES._replace(x=None))


@structure
def everything_the_same_for_all(program, inputs):
    inputs = inputs._replace(x=inputs.x[1], residual=None if inputs.residual is None else inputs.residual[0])
    one = dataclasses.replace(program, mask=None if program.mask is None else program.mask[1])
    axes = Inputs(*[None] * len(Inputs._fields))
    return jax.vmap(
        lambda inputs, index: one.example(inputs, one.mask), axis_name="batch", in_axes=(axes, 0), out_axes=OUT_AXES
    )(inputs, jnp.arange(EXAMPLES))


def _differing(inputs, *names):
    """These inputs made different for every example, along a new leading axis."""
    factors = jnp.linspace(1.0, 1.6, EXAMPLES)

    def differ(value):
        return jnp.stack([value * factor for factor in factors])

    return inputs._replace(**{name: differ(getattr(inputs, name)) for name in names})


@structure
def state_of_each_example(program, inputs):
    names = ("mean", "var", "zero_frac")
    return program.batch(
        _differing(inputs, *names), in_axes=IN_AXES._replace(mean=0, var=0, zero_frac=0), out_axes=EACH_ITS_OWN
    )


@structure
def running_mean_of_each_example(program, inputs):
    return program.batch(_differing(inputs, "mean"), in_axes=IN_AXES._replace(mean=0), out_axes=EACH_ITS_OWN)


@structure
def weights_of_each_example(program, inputs):
    axes = IN_AXES._replace(weight=0, bias=0)
    return program.batch(_differing(inputs, "weight", "bias"), in_axes=axes, out_axes=EACH_ITS_OWN)


@structure
def bias_of_each_example(program, inputs):
    return program.batch(_differing(inputs, "bias"), in_axes=IN_AXES._replace(bias=0), out_axes=EACH_ITS_OWN)


@structure
def one_x_and_the_state_of_each_example(program, inputs):
    inputs = _differing(inputs, "mean", "var", "zero_frac")._replace(x=inputs.x[1])
    axes = IN_AXES._replace(x=None, mean=0, var=0, zero_frac=0)
    return program.batch(inputs, in_axes=axes, out_axes=EACH_ITS_OWN)


@structure
def scan_around_vmap(program, inputs):
    def body(carry, factor):
        inputs, count = carry
        outputs, after = dataclasses.replace(program, count=count).counted_batch(
            inputs._replace(x=inputs.x * factor)
        )
        return (with_state(inputs, outputs), after.count), outputs.y

    (after, _), ys = jax.lax.scan(body, (inputs, program.count), jnp.asarray([1.0, 2.0, 0.5]))
    return after, ys


@structure
def scan_inside_vmap(program, inputs):
    def steps(inputs, mask):
        def body(carry, factor):
            inputs, count = carry
            outputs, count = dataclasses.replace(program, count=count).step(
                inputs._replace(x=inputs.x * factor), mask
            )
            return (with_state(inputs, outputs), count), outputs.y

        (after, _), ys = jax.lax.scan(body, (inputs, program.count), jnp.asarray([1.0, 2.0, 0.5]))
        return Outputs(ys, after.mean, after.var, after.zero_frac)

    return jax.vmap(steps, axis_name="batch", in_axes=(IN_AXES, 0), out_axes=OUT_AXES)(inputs, program.mask)


@structure
def scan_over_layers(program, inputs):
    def layers(inputs, mask):
        def body(x, layer):
            outputs = program.example(layer._replace(x=x, residual=inputs.residual), mask)
            return outputs.y, outputs

        stack = stacked(inputs, varied(inputs, 0.7), varied(inputs, 1.2))._replace(x=None, residual=None)
        return jax.lax.scan(body, inputs.x, stack)[1]

    return jax.vmap(layers, axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@structure
def map_over_batches(program, inputs):
    return jax.lax.map(program.batch, stacked(inputs, varied(inputs, 1.5)))


@structure
def fori_loop_around_vmap(program, inputs):
    def body(index, inputs):
        return with_state(inputs._replace(x=inputs.x + index), program.batch(inputs))

    return jax.lax.fori_loop(0, 3, body, inputs)


@structure
def cond_around_vmap(program, inputs):
    other = dataclasses.replace(program, case=dataclasses.replace(program.case, activation="gelu"))
    return [jax.lax.cond(inputs.weight[0] > limit, program.batch, other.batch, inputs) for limit in (-9.0, 9.0)]


@structure
def cond_inside_vmap(program, inputs):
    def one(inputs, mask):
        def apply(inputs):
            return program.example(inputs, mask).y

        return [jax.lax.cond(inputs.weight[0] > limit, apply, lambda i: i.x, inputs) for limit in (-9.0, 9.0)]

    return jax.vmap(one, axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@structure
def cond_on_each_example(program, inputs):
    def one(inputs, mask):
        return jax.lax.cond(inputs.x[0, 0] > 1, lambda i: program.example(i, mask).y, lambda i: 2 * i.x, inputs)

    return jax.vmap(one, axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@structure
def beside_the_users_own_collectives(program, inputs):
    def one(inputs, mask):
        outputs = program.example(inputs._replace(x=inputs.x + jax.lax.pmean(inputs.x, "batch")), mask)
        total = jax.lax.psum(outputs.y, "batch") / EXAMPLES
        return outputs._replace(y=outputs.y * total)

    return jax.vmap(one, axis_name="batch", in_axes=(IN_AXES, 0), out_axes=OUT_AXES)(inputs, program.mask)


# --- ways to differentiate it ----------------------------------------------------------------------------------

DERIVATIVES = {}


def derivative(function):
    DERIVATIVES[function.__name__] = function
    return function


def gradient(function):
    """The gradient of `scalar` of a function's outputs, with respect to all its inputs."""
    return jax.grad(lambda inputs: scalar(function(inputs)))


@derivative
def value_and_grad(program, inputs):
    return jax.value_and_grad(lambda inputs: scalar(program.batch(inputs)))(inputs)


@derivative
def grad_of_one_input_at_a_time(program, inputs):
    gradients = {}
    for name in Inputs._fields:
        if getattr(inputs, name) is not None:
            gradients[name] = jax.grad(lambda value, name=name: scalar(program.batch(inputs._replace(**{name: value}))))(
                getattr(inputs, name)
            )
    return gradients


@derivative
def grad_of_one_output_at_a_time(program, inputs):
    return [
        jax.grad(lambda inputs, name=name: scalar(getattr(program.batch(inputs), name)))(inputs)
        for name in Outputs._fields
    ]


@derivative
def jvp_of_one_input_at_a_time(program, inputs):
    tangents = {}
    for name in Inputs._fields:
        value = getattr(inputs, name)
        if value is not None:
            tangents[name] = jax.jvp(
                lambda value, name=name: program.batch(inputs._replace(**{name: value})), (value,), (another(value),)
            )
    return tangents


@derivative
def jacobian_forward(program, inputs):
    return jax.jacfwd(program.batch)(inputs)


@derivative
def jacobian_reverse(program, inputs):
    return jax.jacrev(program.batch)(inputs)


def _hessian(outer, inner, program, inputs):
    flat, unravel = ravel_pytree(inputs)
    return outer(inner(lambda flat: scalar(program.batch(unravel(flat)))))(flat)


@derivative
def hessian_forward_over_forward(program, inputs):
    return _hessian(jax.jacfwd, jax.jacfwd, program, inputs)


@derivative
def hessian_forward_over_reverse(program, inputs):
    return _hessian(jax.jacfwd, jax.jacrev, program, inputs)


@derivative
def hessian_reverse_over_forward(program, inputs):
    return _hessian(jax.jacrev, jax.jacfwd, program, inputs)


@derivative
def hessian_reverse_over_reverse(program, inputs):
    return _hessian(jax.jacrev, jax.jacrev, program, inputs)


@derivative
def linearize_reused(program, inputs):
    outputs, linear = jax.linearize(program.batch, inputs)
    return outputs, [linear(another(inputs, seed)) for seed in (1, 2)]


@derivative
def vjp_reused(program, inputs):
    outputs, pullback = jax.vjp(program.batch, inputs)
    return outputs, [pullback(another(outputs, seed)) for seed in (1, 2)]


@derivative
def vjp_under_vmap(program, inputs):
    outputs, pullback = jax.vjp(program.batch, inputs)
    return jax.vmap(pullback)(stacked(another(outputs, 1), another(outputs, 2)))


def _per_example_gradients(program, inputs, transform=lambda function: function):
    def loss(inputs, mask):
        return scalar(program.example(inputs, mask))

    return jax.vmap(transform(jax.grad(loss)), axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@derivative
def per_example_gradients(program, inputs):
    return _per_example_gradients(program, inputs)


@derivative
def per_example_gradients_of_jit(program, inputs):
    return _per_example_gradients(program, inputs, jax.jit)


@derivative
def per_example_gradients_of_an_ensemble(program, inputs):
    return jax.vmap(functools.partial(_per_example_gradients, program))(stacked(inputs, varied(inputs, 1.5)))


@derivative
def per_example_gradients_with_the_state_of_each_example(program, inputs):
    def loss(inputs, mask):
        return scalar(program.example(inputs, mask))

    axes = IN_AXES._replace(mean=0, var=0, zero_frac=0, weight=0)
    inputs = _differing(inputs, "mean", "var", "zero_frac", "weight")
    return jax.vmap(jax.grad(loss), axis_name="batch", in_axes=(axes, 0))(inputs, program.mask)


@derivative
def per_example_gradients_of_checkpoint(program, inputs):
    def loss(inputs, mask):
        return scalar(jax.checkpoint(program.example)(inputs, mask))

    return jax.vmap(jax.grad(loss), axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@derivative
def per_example_gradients_with_two_names(program, inputs):
    program = dataclasses.replace(program, axis_name=("a", "b"))

    def split(values):
        return None if values is None else jnp.reshape(values, (2, 2, *values.shape[1:]))

    one = jax.grad(lambda inputs, mask: scalar(program.example(inputs, mask)))
    for name in ("b", "a"):
        one = jax.vmap(one, axis_name=name, in_axes=(IN_AXES, 0))
    return one(inputs._replace(x=split(inputs.x), residual=split(inputs.residual)), split(program.mask))


@derivative
def per_example_tangents(program, inputs):
    def one(inputs, tangents, mask):
        return jax.jvp(lambda inputs: program.example(inputs, mask), (inputs,), (tangents,))

    in_axes = (IN_AXES, IN_AXES, 0)
    return jax.vmap(one, axis_name="batch", in_axes=in_axes)(inputs, another(inputs), program.mask)


@derivative
def grad_of_per_example_gradients(program, inputs):
    return gradient(functools.partial(_per_example_gradients, program))(inputs)


@derivative
def jvp_of_per_example_gradients(program, inputs):
    return jax.jvp(functools.partial(_per_example_gradients, program), (inputs,), (another(inputs),))[1]


@derivative
def per_example_hessian_vector_products(program, inputs):
    def one(inputs, tangents, mask):
        return jax.jvp(jax.grad(lambda inputs: scalar(program.example(inputs, mask))), (inputs,), (tangents,))[1]

    in_axes = (IN_AXES, IN_AXES, 0)
    return jax.vmap(one, axis_name="batch", in_axes=in_axes)(inputs, another(inputs), program.mask)


@derivative
def grad_of_jvp(program, inputs):
    return gradient(lambda inputs: jax.jvp(program.batch, (inputs,), (another(inputs),))[1])(inputs)


@derivative
def third_derivative(program, inputs):
    def along(function):
        return lambda inputs: jax.jvp(function, (inputs,), (another(inputs),))[1]

    return along(gradient(along(program.batch)))(inputs)


# --- the comparison --------------------------------------------------------------------------------------------


def assert_trees_close(actual, expected):
    """Every leaf agrees to c * eps * sqrt(n) of the largest number in its result, n the values of a channel.

    Both sides compute the same sums of up to n terms in float64, in another order. The sizes of the terms are not those
    of the results, which may cancel (a gradient of x sums to zero): the largest of all results stands for them.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(expected)
    assert leaves
    scale = max(1.0, *(float(jnp.max(jnp.abs(leaf))) for leaf in leaves)) * np.sqrt(EXAMPLES * POSITIONS)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(actual), leaves, strict=True):
        assert got.dtype == want.dtype == jnp.float64, jax.tree_util.keystr(path)
        assert_close(got, want, scale, dtype=np.float64, what=jax.tree_util.keystr(path))


def compare(function, case, program_type=Program, compiled=True):
    """Run a function of (program, inputs) with the fused operation and with the reference, first and later step."""

    def run(backend):
        def call(inputs, count):
            return function(program_type(case, backend, mask_of(case), count), inputs)

        # Most of the time here is LLVM's, which has nothing to do with what is compared.
        return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0}) if compiled else call

    fused, reference = run("auto"), run("reference")
    for later in (False, True):
        arguments = inputs_and_count(case, later)
        assert_trees_close(fused(*arguments), reference(*arguments))


def with_gradient(structure):
    """A structure's outputs, and the gradient of their `scalar`."""

    def both(program, inputs):
        outputs, pullback = jax.vjp(functools.partial(structure, program), inputs)
        return outputs, pullback(jax.grad(scalar)(outputs))

    return both


PROGRAMS = {**{name: with_gradient(build) for name, build in STRUCTURES.items()}, **DERIVATIVES}
# Each of these in every case, the others in one of the three main ones by turns; all of them in all with -m slow.
IN_EVERY_CASE = ("vmap", "value_and_grad", "per_example_gradients", "hessian_forward_over_reverse")


def grid():
    main = list(CASES)
    for index, name in enumerate(PROGRAMS):
        for case_name, case in {**CASES, **MORE_CASES}.items():
            if case.virtual_batch_size is not None and ("_names" in name or name == "everything_the_same_for_all"):
                continue  # virtual batches are consecutive examples of one vmap
            by_default = name in IN_EVERY_CASE or case_name == main[index % len(main)]
            marks = () if by_default else pytest.mark.slow
            yield pytest.param(name, case, id=f"{name}-{case_name}", marks=marks)


@pytest.mark.parametrize(("name", "case"), list(grid()))
def test_agrees_with_plain_autodiff_of_the_definition(name, case):
    compare(PROGRAMS[name], case)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_eager_agrees_with_plain_autodiff_of_the_definition(case):
    compare(value_and_grad, case, compiled=False)
