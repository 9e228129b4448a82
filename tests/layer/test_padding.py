"""Padding: what a mask leaves out and no loss uses may hold anything, and reaches neither values nor derivatives.

Nothing is added where padding is, so all that is compared here has the same bits as with zeros in it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused import kernels
from bn_fused.approaches import APPROACHES
from bn_fused.kernels.activations import ACTIVATIONS

from support.programs import (
    CASES,
    IN_AXES,
    MORE_CASES,
    Program,
    assert_trees_close,
    inputs_and_count,
    mask_of,
    scalar,
    stacked,
    varied,
)
from support.tolerances import assert_same_bits
from support.versions import ON_THE_NEWEST_JAX, also_on_the_newest_jax

BACKENDS = ("jnp", "reference")
# What JAX makes of the reference says the same on each version of it.
EACH_BACKEND = pytest.mark.parametrize("backend", ["jnp", *also_on_the_newest_jax("reference")])
PHASES = (*APPROACHES, "inference")
BAD = (np.nan, np.inf, 1e38)
EXAMPLES, CHANNELS, POSITIONS = 6, 3, 4


def compiled(function):
    """Most of the time here is LLVM's, which has nothing to do with what is compared."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def padded_mask():
    """[examples, positions]: single positions, and the two examples of a virtual batch."""
    mask = np.ones((EXAMPLES, POSITIONS), bool)
    mask[0, 0] = mask[1, 3] = mask[2:4] = False
    return mask


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of the function as one of all that it is differentiated with respect to."""

    backend: str
    phase: str
    activation: str | None = "silu"
    residual: bool = True
    channels_first: bool = True
    dtype: str = "float32"
    virtual_batch_size: int | None = None

    def __call__(self, x, residual, weight, bias, mean, var, zero_frac, mask):
        """y and the new mean, var and zero_frac."""
        y, new = bn_fused.batch_norm(
            x,
            bn_fused.RunningStats(mean, var, zero_frac, jnp.int32(1)),
            weight,
            bias,
            approach="batch" if self.phase == "inference" else self.phase,
            inference=self.phase == "inference",
            warmup_period=3,
            channel_axis=1 if self.channels_first else -1,
            activation=self.activation,
            residual=residual if self.residual else None,
            mask=mask,
            debias="samples",
            virtual_batch_size=self.virtual_batch_size,
            backend=self.backend,
        )
        return y, new.mean, new.var, new.zero_frac

    @property
    def counts(self):
        """x's shape, bool: what is no padding."""
        mask = padded_mask()[:, None] if self.channels_first else padded_mask()[..., None]
        shape = (EXAMPLES, CHANNELS, POSITIONS) if self.channels_first else (EXAMPLES, POSITIONS, CHANNELS)
        return np.broadcast_to(mask, shape)

    def arguments(self, padding, dtype=None):
        """All arguments but the mask, with this value in the padding of x and of the residual."""
        dtype, random = self.dtype if dtype is None else dtype, np.random.default_rng(0)
        x, residual = (random.standard_normal(self.counts.shape) for _ in range(2))
        state = np.float64 if dtype == "float64" else np.float32
        per_channel = [random.uniform(0.5, 1.5, CHANNELS).astype(state) for _ in range(4)]
        with_padding = [jnp.asarray(np.where(self.counts, value, padding), dtype) for value in (x, residual)]
        return (*with_padding, *map(jnp.asarray, per_channel), jnp.asarray(0.3, state))

    def loss(self, *arguments):
        """A number to which all results contribute but y in padding."""
        y, *state = self(*arguments, padded_mask())
        return scalar((jnp.where(self.counts, y, jnp.zeros_like(y)).astype(state[0].dtype), *state))


STEPS = [
    Step(
        backend,
        phase,
        activation,
        residual=(i + j) % 3 != 2,
        channels_first=(i + j) % 2 == 0,
        dtype=("float32", "bfloat16")[(i + j // 2) % 2],
    )
    for backend in BACKENDS
    for i, activation in enumerate((None, *ACTIVATIONS))
    for j, phase in enumerate(PHASES)
    if activation == "silu" or (i + j) % 2 == 0
] + [Step(backend, "batch", virtual_batch_size=2) for backend in BACKENDS]


def describe(step):
    return "-".join(str(value) for value in dataclasses.astuple(step))


def marks_of(step):
    """The reference, which JAX differentiates, by default with the activations whose derivative has a kink and none."""
    if step.backend == "jnp":
        return ()
    return ON_THE_NEWEST_JAX if step.activation in ("relu", "silu") else pytest.mark.slow


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(
            step,
            id=describe(step),
            marks=marks_of(step),
        )
        for step in STEPS
    ],
)
def test_values_and_gradients_do_not_depend_on_what_padding_holds(step):
    @compiled
    def run(*arguments):
        gradients = jax.grad(step.loss, argnums=range(len(arguments)))(*arguments)
        return step(*arguments, padded_mask()), gradients

    (expected_y, *expected_state), expected_gradients = run(*step.arguments(0.0))
    for gradient in expected_gradients[:2] if step.residual else expected_gradients[:1]:
        assert np.all(np.asarray(gradient)[~step.counts] == 0)
    for bad in BAD:
        (y, *state), gradients = run(*step.arguments(bad))
        assert_same_bits(np.asarray(y)[step.counts], np.asarray(expected_y)[step.counts], f"y with {bad}")
        for got, expected in zip((*state, *gradients), (*expected_state, *expected_gradients), strict=True):
            assert np.all(np.isfinite(expected))
            assert_same_bits(got, expected, f"with {bad}")


@pytest.mark.parametrize("phase", ["ema", "inference"])
@EACH_BACKEND
def test_second_derivatives_do_not_depend_on_what_padding_holds(backend, phase):
    step = Step(backend, phase)

    @compiled
    def run(*arguments):
        def derivative(*arguments):
            return jax.jvp(step.loss, arguments, tangents)[1]

        every = range(len(arguments))
        # The direction moves padding too, by ordinary numbers.
        tangents = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in arguments)
        gradient = jax.grad(step.loss, argnums=every)
        forward_over_reverse = jax.jvp(gradient, arguments, tangents)[1]
        reverse_over_forward = jax.grad(derivative, argnums=every)(*arguments)
        return derivative(*arguments), forward_over_reverse, reverse_over_forward

    expected = jax.tree.leaves(run(*step.arguments(0.0)))
    for bad in BAD:
        for got, wanted in zip(jax.tree.leaves(run(*step.arguments(bad))), expected, strict=True):
            assert np.all(np.isfinite(wanted))
            assert_same_bits(got, wanted, f"with {bad}")


@pytest.mark.parametrize("phase", ["batch", "inference"])
@EACH_BACKEND
def test_a_cotangent_that_is_zero_at_a_point_is_no_padding_to_its_own_derivative(backend, phase, x64):
    """Of s * sum(y), at s = 0: d/ds of the gradient is what the gradient is at s = 1."""
    step = Step(backend, phase)
    arguments = step.arguments(2.0, dtype="float64")

    def gradients(s):
        return jax.grad(lambda *a: s * scalar(step(*a, padded_mask())[0]), argnums=(0, 1, 2, 3))(*arguments)

    one = jnp.ones(())
    derivative = compiled(lambda s: jax.jvp(gradients, (s,), (one,))[1])(0 * one)
    assert_trees_close(derivative, compiled(gradients)(one), n=EXAMPLES * POSITIONS)


@EACH_BACKEND
def test_at_inference_a_mask_changes_neither_values_nor_gradients(backend, x64):
    """Where masked outputs are used they count, as in training: all depends on them."""
    step = Step(backend, "inference")

    @functools.partial(jax.jit, static_argnums=1)
    def run(arguments, masked):
        def of(*arguments):
            return step(*arguments, padded_mask() if masked else None)

        results, pullback = jax.vjp(of, *arguments)
        return results, pullback(jax.tree.map(lambda value: 2 * value + 1, results))

    arguments = step.arguments(2.0, dtype="float64")
    assert_trees_close(run(arguments, True), run(arguments, False), n=EXAMPLES * POSITIONS)


def test_a_backend_that_takes_no_mask_refuses_it_at_inference_too():
    def refusal(problem, target):
        return "its kernels take no mask" if problem.mask else None

    kernels.register(kernels.Backend("maskless", kernels.backends.jnp.BACKEND.operations, refusal=refusal))
    try:
        step = Step("maskless", "inference")
        step(*step.arguments(0.0), None)
        with pytest.raises(bn_fused.BackendError, match="maskless.*its kernels take no mask"):
            step(*step.arguments(0.0), padded_mask())
    finally:
        kernels.unregister("maskless")


# --- the layer, under transforms -------------------------------------------------------------------------------


def loss_of_one(program):
    def loss(inputs, mask):
        outputs = program.example(inputs, mask)
        return scalar(outputs._replace(y=jnp.where(mask, outputs.y, 0.0)))

    return loss


def gradient_of_batch(program, inputs, wrap=lambda function: function):
    def loss(inputs):
        outputs = program.batch(inputs, wrap)
        return scalar(outputs._replace(y=jnp.where(program.mask[:, None], outputs.y, 0.0)))

    return jax.grad(loss)(inputs)


def ensemble(program, inputs):
    return jax.vmap(functools.partial(gradient_of_batch, program))(stacked(inputs, varied(inputs, 0.5)))


def ensemble_of_weights(program, inputs):
    """The examples are the same for all members: what differs per channel meets rows that do not."""

    def member(weight):
        return gradient_of_batch(program, inputs._replace(weight=weight))

    return jax.vmap(member)(jnp.stack([inputs.weight, 2 * inputs.weight]))


def per_example(program, inputs):
    return jax.vmap(jax.grad(loss_of_one(program)), axis_name="batch", in_axes=(IN_AXES, 0))(inputs, program.mask)


def remat(program, inputs):
    return gradient_of_batch(program, inputs, jax.checkpoint)


def scan(program, inputs):
    def step(weight, factor):
        gradient = gradient_of_batch(program, inputs._replace(weight=weight))
        return weight - factor * gradient.weight, gradient

    return jax.lax.scan(step, inputs.weight, jnp.array([0.01, 0.02]))


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("ema-all", ensemble),
        ("ema-all", per_example),
        ("ema-all", scan),
        ("inference-all", ensemble_of_weights),
        ("inference-all", per_example),
        ("inference-all", remat),
    ],
)
@EACH_BACKEND
def test_under_transforms_gradients_do_not_depend_on_what_padding_holds(backend, name, transform, x64):
    case = {**CASES, **MORE_CASES}[name]
    inputs, count = inputs_and_count(case, later=True)
    program = Program(case, backend, mask_of(case), count)
    run = compiled(functools.partial(transform, program))

    def result(padding):
        x, residual = (jnp.where(program.mask[:, None], value, padding) for value in (inputs.x, inputs.residual))
        return jax.tree.leaves(run(inputs._replace(x=x, residual=residual)))

    for got, expected in zip(result(np.nan), result(0.0), strict=True):
        assert np.all(np.isfinite(expected))
        assert_same_bits(got, expected)
