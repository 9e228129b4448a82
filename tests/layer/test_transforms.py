"""Every JAX transform around, inside and through the layer, against plain autodiff of the definition in float64.

The same program is run twice, with the fused operation and with `backend="reference"`, whose derivatives and batching
are JAX's own. A program is one way to call the layer on a batch (`STRUCTURES`) or one way to differentiate it
(`DERIVATIVES`); each is a function of all differentiable inputs, the incoming running statistics among them.
"""

import collections
import dataclasses
import functools

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree

import bn_fused
from bn_fused.kernels import contract
from bn_fused.kernels.padding import product_p

from support.programs import (
    CASES,
    EXAMPLES,
    IN_AXES,
    MORE_CASES,
    OUT_AXES,
    STATE_MAPPED,
    Function,
    Inputs,
    Outputs,
    Program,
    another,
    assert_trees_close,
    inputs_and_count,
    mask_of,
    scalar,
    stacked,
    varied,
    with_state,
)
from support.versions import AN_OLDER_JAX, ON_THE_NEWEST_JAX

pytestmark = pytest.mark.usefixtures("x64")


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
    return _nested(dataclasses.replace(program, axis_name="b"), inputs, "a", "b", STATE_MAPPED)


@structure
def outer_of_two_names(program, inputs):
    program = dataclasses.replace(program, axis_name="a")

    def pair(inputs, mask):
        many = stacked(inputs, varied(inputs, 1.5))
        mapped = jax.vmap(lambda inputs: program.example(inputs, mask), axis_name="b", in_axes=(IN_AXES,))
        return mapped(inputs._replace(x=many.x, residual=many.residual))

    return jax.vmap(pair, axis_name="a", in_axes=(IN_AXES, 0))(inputs, program.mask)


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
        many = stacked(inputs, varied(inputs, 1.5))
        mapped = jax.vmap(program.example, in_axes=(IN_AXES, None), out_axes=STATE_MAPPED)
        return mapped(inputs._replace(x=many.x, residual=many.residual), mask)

    return jax.vmap(members, axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


@structure
def ensemble_inside_with_its_own_weights_and_state(program, inputs):
    many = stacked(inputs, varied(inputs, 1.5))._replace(x=inputs.x, residual=inputs.residual)
    inside = Inputs(None, None, 0, 0, 0, 0, 0)

    def members(inputs, mask):
        return jax.vmap(program.example, in_axes=(inside, None), out_axes=STATE_MAPPED)(inputs, mask)

    return jax.vmap(members, axis_name="batch", in_axes=(IN_AXES, 0))(many, program.mask)


@structure
def ensembles_outside_and_inside(program, inputs):
    many = stacked(inputs, varied(inputs, 1.5))
    return jax.vmap(lambda inputs: ensemble_inside(program, inputs))(many)


@structure
def x_the_same_for_all(program, inputs):
    inputs = inputs._replace(x=inputs.x[1])
    return program.batch(inputs, in_axes=IN_AXES._replace(x=None), size=EXAMPLES)


@structure
def everything_the_same_for_all(program, inputs):
    inputs = inputs._replace(x=inputs.x[1], residual=None if inputs.residual is None else inputs.residual[0])
    one = dataclasses.replace(program, mask=None if program.mask is None else program.mask[1])
    axes = Inputs(*[None] * len(Inputs._fields))
    return jax.vmap(
        lambda inputs, index: one.example(inputs, one.mask),
        axis_name="batch",
        in_axes=(axes, 0),
        out_axes=OUT_AXES,
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
        _differing(inputs, *names),
        in_axes=IN_AXES._replace(mean=0, var=0, zero_frac=0),
        out_axes=STATE_MAPPED,
    )


@structure
def running_mean_of_each_example(program, inputs):
    return program.batch(_differing(inputs, "mean"), in_axes=IN_AXES._replace(mean=0), out_axes=STATE_MAPPED)


@structure
def weights_of_each_example(program, inputs):
    axes = IN_AXES._replace(weight=0, bias=0)
    return program.batch(_differing(inputs, "weight", "bias"), in_axes=axes, out_axes=STATE_MAPPED)


@structure
def bias_of_each_example(program, inputs):
    return program.batch(_differing(inputs, "bias"), in_axes=IN_AXES._replace(bias=0), out_axes=STATE_MAPPED)


@structure
def one_x_and_the_state_of_each_example(program, inputs):
    inputs = _differing(inputs, "mean", "var", "zero_frac")._replace(x=inputs.x[1])
    axes = IN_AXES._replace(x=None, mean=0, var=0, zero_frac=0)
    return program.batch(inputs, in_axes=axes, out_axes=STATE_MAPPED)


@structure
def scan_around_vmap(program, inputs):
    def body(carry, factor):
        inputs, count = carry
        outputs, after = dataclasses.replace(program, count=count).counted_batch(inputs._replace(x=inputs.x * factor))
        return (with_state(inputs, outputs), after.count), outputs.y

    (after, _), ys = jax.lax.scan(body, (inputs, program.count), jnp.asarray([1.0, 2.0, 0.5]))
    return after, ys


@structure
def scan_inside_vmap(program, inputs):
    def steps(inputs, mask):
        def body(carry, factor):
            inputs, count = carry
            outputs, count = dataclasses.replace(program, count=count).step(inputs._replace(x=inputs.x * factor), mask)
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
            gradients[name] = jax.grad(
                lambda value, name=name: scalar(program.batch(inputs._replace(**{name: value})))
            )(getattr(inputs, name))
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
                lambda value, name=name: program.batch(inputs._replace(**{name: value})),
                (value,),
                (another(value),),
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
def per_example_gradients_and_tangents_of_one_example_for_all(program, inputs):
    one = inputs._replace(x=inputs.x[1], residual=None if inputs.residual is None else inputs.residual[1])
    mask = None if program.mask is None else program.mask[1]

    def derivatives(index):
        del index
        tangents = jax.jvp(lambda inputs: program.example(inputs, mask), (one,), (another(one),))[1]
        return jax.grad(lambda inputs: scalar(program.example(inputs, mask)))(one), tangents

    return jax.vmap(derivatives, axis_name="batch")(jnp.arange(EXAMPLES))


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


def check_against_reference(function, case, program_type=Program, wrap=jax.jit):
    """Run a function of (program, inputs) on the fused operation and on the layer's reference, first and later step.

    `wrap` is of the fused operation; the reference is compiled.
    """

    def run(program_type, backend):
        def call(inputs, count):
            return function(program_type(case, backend, mask_of(case), count), inputs)

        return call

    fused, reference = wrap(run(program_type, "auto")), jax.jit(run(Program, "reference"))
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
# Each of these in every main case, the others in one of them by turns; all in all cases with -m slow. A structure comes
# with its gradient, so that this is what every case needs: its values and derivatives, of the batch and of one example.
# On an older JAX the others are in the smallest case.
IN_EVERY_CASE = ("vmap", "per_example_gradients")
# What calls nothing but whole batches, and so runs with the functional form as it is.
OF_WHOLE_BATCHES = (
    "vmap",
    "jit_around_vmap",
    "checkpoint_around_vmap",
    "ensemble_outside",
    "ensemble_outside_of_weights",
    "scan_around_vmap",
    "jvp_of_one_input_at_a_time",
    "hessian_reverse_over_forward",
    "vjp_under_vmap",
)


def grid():
    main = list(CASES)
    smallest = main[0]
    for index, name in enumerate(PROGRAMS):
        for case_name, case in {**CASES, **MORE_CASES}.items():
            if case.virtual_batch_size is not None and ("_names" in name or name == "everything_the_same_for_all"):
                continue  # several names: refused; no batch: the reference's collectives give the state an axis
            turn = smallest if AN_OLDER_JAX else main[index % len(main)]
            by_default = case_name == turn or (name in IN_EVERY_CASE and case_name in main)
            marks = () if by_default else pytest.mark.slow
            yield pytest.param(name, case, id=f"{name}-{case_name}", marks=marks)


# The operation is the layer's: what is the function's own is how it makes the operands, in every case once, and how
# it takes an axis of an ensemble, a loop's state and tangents of every order.
FUNCTIONAL_BY_DEFAULT = (
    ("vmap", "batch"),
    ("ensemble_outside_of_weights", "ema-all"),
    ("scan_around_vmap", "ema_compatibility-residual"),
    ("hessian_reverse_over_forward", "batch"),
)


def functional_grid():
    for name in OF_WHOLE_BATCHES:
        for case_name, case in {**CASES, **MORE_CASES}.items():
            by_default = FUNCTIONAL_BY_DEFAULT[::2] if AN_OLDER_JAX else FUNCTIONAL_BY_DEFAULT
            marks = () if (name, case_name) in by_default else pytest.mark.slow
            yield pytest.param(name, case, id=f"{name}-{case_name}", marks=marks)


@pytest.mark.parametrize(("name", "case"), list(grid()))
def test_agrees_with_plain_autodiff_of_the_definition(name, case):
    check_against_reference(PROGRAMS[name], case)


# The rest is in the grid above, and slow.
@pytest.mark.parametrize(
    ("case_name", "name"),
    [
        ("inference-all", "ensemble_outside"),
        pytest.param("inference-all", "hessian_reverse_over_reverse", marks=ON_THE_NEWEST_JAX),
        ("virtual-all", "vmap"),
        pytest.param("virtual-all", "ensemble_outside", marks=ON_THE_NEWEST_JAX),
        pytest.param("virtual-all", "per_example_gradients", marks=ON_THE_NEWEST_JAX),
    ],
)
def test_inference_and_virtual_batches_agree_with_plain_autodiff_of_the_definition(case_name, name):
    check_against_reference(PROGRAMS[name], MORE_CASES[case_name])


@pytest.mark.parametrize(("name", "case"), list(functional_grid()))
def test_the_functional_form_agrees_with_plain_autodiff_of_the_definition(name, case):
    check_against_reference(PROGRAMS[name], case, program_type=Function)


def test_the_functional_form_averages_over_an_outer_name_too():
    case = CASES["ema-all"]

    def run(program, inputs):
        if program.backend == "reference":
            return program.batch(inputs)

        def halves(values):
            return None if values is None else jnp.reshape(values, (2, -1, *values.shape[1:]))

        def half(inputs, mask):
            program_of_half = dataclasses.replace(program, mask=mask)
            return program_of_half.counted_batch(inputs, axis_name="half")[0]

        mapped = jax.vmap(half, axis_name="half", in_axes=(IN_AXES, 0), out_axes=OUT_AXES)
        outputs = mapped(inputs._replace(x=halves(inputs.x), residual=halves(inputs.residual)), halves(program.mask))
        return outputs._replace(y=jnp.reshape(outputs.y, inputs.x.shape))

    check_against_reference(with_gradient(run), case, program_type=Function)


@pytest.mark.parametrize("name", ["ema-all", *[pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES]])
def test_eager_agrees_with_plain_autodiff_of_the_definition(name):
    check_against_reference(value_and_grad, {**CASES, **MORE_CASES}[name], wrap=lambda function: function)


@pytest.mark.parametrize("program_type", [Program, pytest.param(Function, marks=ON_THE_NEWEST_JAX)])
def test_with_jit_disabled_it_agrees_with_plain_autodiff_of_the_definition(program_type):
    check_against_reference(value_and_grad, CASES["ema-all"], program_type=program_type, wrap=jax.disable_jit())


def test_while_loop_and_its_tangents_agree_with_plain_autodiff_of_the_definition():
    def run(program, inputs):
        def loop(inputs):
            def body(carry):
                steps, inputs = carry
                return steps + 1, with_state(inputs._replace(x=1.5 * inputs.x), program.batch(inputs))

            # How many steps there are depends on the data, so that JAX has no reverse mode of this.
            limit = jnp.where(inputs.weight[0] > 99, 99, 3)
            return jax.lax.while_loop(lambda carry: carry[0] < limit, body, (0, inputs))[1]

        return jax.jvp(loop, (inputs,), (another(inputs),))

    check_against_reference(run, CASES["ema-all"])


def test_an_unbound_axis_name_is_a_name_error_under_every_transform():
    case = CASES["batch"]
    inputs, count = inputs_and_count(case, later=True)
    program = Program(case, "auto", None, count, axis_name="nowhere")
    one = inputs._replace(x=inputs.x[0])
    for call in (
        lambda: program.example(one, None),
        lambda: jax.jit(program.example)(one, None),
        lambda: jax.grad(lambda inputs: scalar(program.example(inputs, None)))(one),
        lambda: jax.vmap(program.example, axis_name="batch", in_axes=(IN_AXES, None))(inputs, None),
        lambda: jax.vmap(program.example, in_axes=(IN_AXES, None))(inputs, None),
    ):
        with pytest.raises(NameError, match="nowhere"):
            call()


# --- how often the fused operation runs ------------------------------------------------------------------------


def fused_operations(function, *arguments):
    """How many of each of the library's primitives a function's jaxpr has, those of inner jaxprs included.

    Products of values per channel are not counted: arithmetic of the running statistics, which XLA fuses.
    """
    counts = collections.Counter()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            # Theirs is a mask of one element for all.
            if name.startswith("bn_fused_") and (name != product_p.name or equation.invars[0].aval.size > 1):
                counts[name.removeprefix("bn_fused_")] += 1
            for parameter in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
                if is_jaxpr(parameter):
                    visit(getattr(parameter, "jaxpr", parameter))

    def is_jaxpr(value):
        return isinstance(value, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return dict(counts)


FORWARD_AND_BACKWARD = {"forward": 1, "backward": 1}
OPERATIONS_OF = {
    "vmap": {"forward": 1},
    "two_names": {"forward": 1},
    "ensembles_outside_and_inside": {"forward": 1},
    "scan_around_vmap": {"forward": 1},
    "grad": FORWARD_AND_BACKWARD,
    "value_and_grad": FORWARD_AND_BACKWARD,
    "grad_of_weight_alone": FORWARD_AND_BACKWARD,
    "grad_of_an_ensemble": FORWARD_AND_BACKWARD,
    "grad_of_two_names": FORWARD_AND_BACKWARD,
    # Once to compute, once more in the backward pass: that is what checkpoint is for.
    "grad_of_checkpoint": {"forward": 2, "backward": 1},
    # Gradients of one example each differ along the batch, so what goes through the statistics is summed in between.
    "per_example_gradients": {"forward": 1, "normalise_backward": 1, "moments_backward": 1},
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
@pytest.mark.parametrize("name", OPERATIONS_OF)
def test_a_step_is_one_fused_operation_each_way(name, case):
    programs = {
        **PROGRAMS,
        **STRUCTURES,
        "grad": lambda program, inputs: gradient(program.batch)(inputs),
        "grad_of_weight_alone": lambda program, inputs: jax.grad(
            lambda weight: scalar(program.batch(inputs._replace(weight=weight)))
        )(inputs.weight),
        "grad_of_an_ensemble": lambda program, inputs: gradient(functools.partial(ensemble_outside, program))(inputs),
        "grad_of_two_names": lambda program, inputs: gradient(functools.partial(two_names, program))(inputs),
        "grad_of_checkpoint": lambda program, inputs: gradient(jax.checkpoint(program.batch))(inputs),
    }
    inputs, count = inputs_and_count(case, later=True)
    program = Program(case, "auto", mask_of(case), count)
    assert fused_operations(functools.partial(programs[name], program), inputs) == OPERATIONS_OF[name]


def test_inference_is_one_normalise_each_way():
    case = MORE_CASES["inference-all"]
    inputs, count = inputs_and_count(case, later=True)
    program = Program(case, "auto", None, count)
    assert fused_operations(program.batch, inputs) == {"normalise": 1}
    assert fused_operations(gradient(program.batch), inputs) == {"normalise": 1, "normalise_backward": 1}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_the_functional_form_is_one_fused_operation_each_way(case):
    inputs, count = inputs_and_count(case, later=True)
    program = Function(case, "auto", mask_of(case), count)
    assert fused_operations(program.batch, inputs) == {"forward": 1}
    assert fused_operations(gradient(program.batch), inputs) == FORWARD_AND_BACKWARD


def test_what_layers_of_the_same_channels_have_in_common_is_traced_once(monkeypatch):
    """The blend has many small operations and is differentiated twice: for each layer it took most of the time."""
    traced = []
    blend_channels = contract.blend_channels
    monkeypatch.setattr(contract, "blend_channels", lambda *values: traced.append(1) or blend_channels(*values))

    def loss(x, layers):
        stats = bn_fused.RunningStats.init(x.shape[-1])
        for _ in range(layers):
            x, stats = bn_fused.batch_norm(x, stats)
        return jnp.sum(x**2)

    def times_for(channels, layers):
        traced.clear()
        jax.jit(jax.grad(loss), static_argnums=1).lower(jnp.ones((8, channels)), layers)
        return len(traced)

    # Numbers of channels that no other test of this process has traced. The second layer's state has tangents.
    assert 0 < times_for(613, 2) == times_for(617, 5)
