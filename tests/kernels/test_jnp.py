"""The forms that the backend `jnp` has for XLA:CPU and, computed on a CPU, for XLA:GPU and XLA:TPU.

What those for XLA:GPU are for is counted in test_traffic, those for XLA:TPU in test_pallas_tpu_compiled; what those for
XLA:CPU are for, here, in its compiled code.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.bench.audit.hlo import parse
from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.backends.jnp import operations, sums
from bn_fused.kernels.backends.jnp.plan import Plan
from bn_fused.kernels.contract import Spec
from bn_fused.kernels.layout import axes_of, expand, merge_rows, sample_rows

from support.kernel_cases import CASES
from support.kernel_results import check_step
from support.tolerances import assert_close

ON_A_GPU = Plan(stages=True)
ON_A_TPU = Plan(expects=True, chooses=True)
# relu with y kept in float32 and bfloat16, leaky_relu, the residual kept, no residual; groups, several parts.
NAMES = ("300 rows", "bfloat16", "65 channels", "float16", "groups", "groups far from zero", "2051 rows, 24 channels")


# On a TPU a mean that is near to the running mean, and far: of y in bfloat16, of x.
ON_A_TPU_TOO = ("17 channels", "bfloat16", "groups far from zero")


@pytest.mark.parametrize(
    ("plan", "name"),
    [*((ON_A_GPU, name) for name in NAMES), *((ON_A_TPU, name) for name in ON_A_TPU_TOO)],
    ids=lambda value: {ON_A_GPU: "GPU", ON_A_TPU: "TPU"}.get(value, value),
)
def test_values_and_all_gradients_agree_with_float64(plan, name):
    check_step(CASES[name], "jnp", plan)


def test_values_and_all_gradients_agree_in_float64(x64):
    check_step(dataclasses.replace(CASES["300 rows"], dtype="float64"), "jnp", ON_A_GPU)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, activation in ACTIVATIONS.items() if activation.steps is not None])
def test_a_derivative_by_its_steps_is_the_derivative(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tiny = float(jnp.finfo(dtype).tiny)
        values = jnp.asarray([-np.inf, -3.0, -1e-30, -tiny, 0.0, tiny, 1e-30, 1.0, np.inf], dtype)
        found = operations._of_bits(values, *ACTIVATIONS[name].steps)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, ACTIVATIONS[name].derivative(values))


def test_bfloat16_is_the_same_number_by_its_bits():
    values = jnp.asarray([0.0, -0.0, 1.0, -3.140625, 1e-38, 3e38, np.inf, -np.inf, np.nan], jnp.bfloat16)
    found = operations._as_stored(values)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, values.astype(jnp.float32))


@pytest.mark.parametrize("least", [1, 7, 64, 1024])
def test_rows_are_cut_into_equal_parts_and_as_many_as_asked_for_where_these_are_long_enough(least):
    for rows in (*range(1, 700), 3136, 4099, 100352, 401408):
        parts = sums._parts(rows, least)
        divisors = [number for number in range(1, rows + 1) if rows % number == 0] if rows < 5000 else None
        assert rows % parts == 0 and parts <= max(math.isqrt(rows), rows // sums.LEAST_ROWS), rows
        if divisors is not None and parts < least:
            enough = [number for number in divisors if number >= least]
            assert not any(number <= rows // sums.LEAST_ROWS for number in enough), (rows, parts)


# ---------------------------------------------------------------------------------------------- for XLA:TPU

# mean, standard deviation, what is expected of the mean, whether that is near
CHANNELS = {
    "as expected": (0.0, 1.0, 0.0, True),
    "near": (1.9, 1.0, 0.0, True),
    "far": (2.2, 1.0, 0.0, False),
    "far from zero": (1e4, 1.0, 0.0, False),
    "far from zero, as expected": (1e4, 1.0, 1e4, True),
    "constant": (3.3, 0.0, 0.0, False),
    "constant, as expected": (3.25, 0.0, 3.25, True),
    "squares overflow": (1e20, 1e15, 0.0, False),
    "nothing that is finite expected": (0.5, 1.0, np.inf, True),
    "very far": (0.5, 1.0, 1.1e10, False),
    "so far that no digit of x is left": (0.5, 1.0, 1.7e12, False),
    "so far that squares overflow": (0.5, 1.0, 1e30, False),
}


def test_moments_far_from_what_was_expected_keep_their_digits():
    means, deviations, expected, near = map(np.array, zip(*CHANNELS.values(), strict=True))
    noise = np.random.default_rng(0).standard_normal((1000, len(means)))
    x = (means + deviations * (noise - noise.mean(0)) / noise.std(0)).astype(np.float32)

    @jax.jit
    def moments(x, expected):
        return operations.moments(x, spec=Spec("rc", plan=ON_A_TPU), expected=expected)

    expected = expected.astype(np.float32)
    pivot, delta, var = map(np.asarray, moments(x, expected))
    exact = x.astype(np.float64)
    assert_close(pivot.astype(np.float64) + delta, exact.mean(0), exact.std(0) + 1e-9, stored=np.float32, what="mean")
    assert_close(var, exact.var(0), exact.var(0) + 1e-12, what="var")
    np.testing.assert_array_equal(pivot == np.where(np.isfinite(expected), expected, 0), near)
    # What one channel has in it changes no bit of another.
    for found, alone in zip((pivot, delta, var), moments(x[:, near], expected[near]), strict=True):
        np.testing.assert_array_equal(found[near], alone)


@pytest.mark.parametrize(
    ("target", "shape", "dtype", "expects"),
    [
        (None, (2**20, 64), "float32", False),
        ("h200", (2**20, 64), "float32", False),
        ("v5e", (2**20, 64), "float32", True),
        ("v5e", (2**20, 64), "bfloat16", True),
        ("v5e", (2**20, 32), "bfloat16", False),
        ("v7x", (2**20, 32), "bfloat16", True),
        ("v4", (2**20, 32), "bfloat16", False),
    ],
)
def test_a_mean_is_expected_of_what_is_larger_than_half_of_a_tpus_memory_on_the_chip(target, shape, dtype, expects):
    plan = bn_fused.explain(shape, dtype, target=target, backend="jnp").plan
    assert (plan.expects, plan.chooses) == (expects, target not in (None, "h200"))


# ---------------------------------------------------------------------------------------------- for XLA:CPU

ON_A_CPU = Plan(fold=16)


def sizes_of(text):
    """The sizes of an array in HLO, the one whose elements lie together last: f32[8,64,2]{1,0,2} is (2, 8, 64)."""
    sizes, order = re.search(r"\[([\d,]*)\](?:\{([\d,]*))?", text).groups()
    sizes = [int(size) for size in sizes.split(",") if size]
    order = [int(axis) for axis in order.split(",") if axis] if order else list(range(len(sizes)))[::-1]
    return tuple(sizes[axis] for axis in reversed(order))


# Short maps before the channels, after them, few examples, a number of examples that 16 does not divide.
COMPILED = [(64, 256, 14, 14), (64, 64, 7, 7), (32, 14, 14, 256), (4, 32, 40, 40), (50, 64, 14, 14), (4096, 128)]


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", COMPILED)
def test_a_cpu_reads_x_once_for_two_sums_in_loops_along_long_axes(shape, dtype, pass_):
    channel_axis = 3 if shape[-1] == 256 else 1
    channels, elements = shape[channel_axis], math.prod(shape)
    stats = bn_fused.RunningStats.init(channels)

    def forward(x, weight, bias):
        options = {"channel_axis": channel_axis, "activation": "relu", "backend": "jnp"}
        return bn_fused.batch_norm(x, stats, weight, bias, **options)[0]

    def backward(x, weight, bias, dy):
        return jax.vjp(forward, x, weight, bias)[1](dy)

    x, parameter = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((channels,), jnp.float32)
    operands = (x, parameter, parameter) + ((x,) if pass_ == "backward" else ())
    module = parse(jax.jit(forward if pass_ == "forward" else backward).lower(*operands).compile().as_text())
    reduced = [
        (len(instruction.operands) // 2, sizes_of(array.text))
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "reduce"
        for array in computation[instruction.operands[0]].arrays
    ]
    # XLA's own loops, which make both sums of a forward, and of a backward.
    assert [number for number, sizes in reduced if number > 1 and math.prod(sizes) > elements / 2] == (
        [2] if pass_ == "forward" else [2, 2]
    )
    # XLA:CPU's library, which would take several times as long over x itself, or along an axis of 14 or 7 elements.
    least = min(100, channels if channel_axis == len(shape) - 1 else math.prod(shape[2:]))
    large = [sizes for number, sizes in reduced if number == 1 and math.prod(sizes) > elements / 32]
    assert all(math.prod(sizes) <= elements / 8 and sizes[-1] >= least for sizes in large), large
    loops = [
        sizes_of(array.text)
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for array in instruction.arrays
    ]
    large = [sizes for sizes in loops if math.prod(sizes) == elements]
    assert large
    if jax.__version_info__ >= (0, 11):  # XLA of before moves the reshape into the loop that writes y
        assert all(sizes[-1] >= min(least, operations.SHORT) for sizes in large), large


def test_maps_of_one_position_are_written_with_what_follows_them():
    def layer(x):
        stats = bn_fused.RunningStats.init(x.shape[1])
        return bn_fused.batch_norm(x, stats, channel_axis=1, activation="relu", backend="jnp")[0]

    def written(*shape):
        return jax.jit(layer).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).as_text().count("reduce_precision")

    assert (written(64, 16, 1, 1), written(64, 16, 7, 7)) == (1, 2)  # the pivot's sample; and y


@pytest.mark.parametrize(
    ("side", "dtype", "activation", "merged"),
    [
        (7, "float32", None, True),
        (14, "float32", None, False),
        (14, "bfloat16", None, True),
        (28, "bfloat16", None, False),
        (28, "float32", "relu", True),
        (56, "float32", "relu", False),
    ],
)
def test_short_rows_are_written_as_longer_ones(side, dtype, activation, merged):
    def backward(x, dy):
        def forward(x):
            stats = bn_fused.RunningStats.init(16)
            return bn_fused.batch_norm(x, stats, channel_axis=1, activation=activation, backend="jnp")[0]

        return jax.vjp(forward, x)[1](dy)

    x = jax.ShapeDtypeStruct((64, 16, side, side), dtype)
    text = jax.jit(backward).lower(x, x).as_text()
    written = [line for line in text.splitlines() if "reduce_precision" in line]
    assert any(f"tensor<64x16x{side**2}x" in line for line in written) is merged


LAYOUTS = {
    "rcrr": (64, 3, 14, 14),
    "rrrc": (5, 13, 11, 3),
    "rgcrr": (13, 2, 3, 7, 5),
    "grcr": (2, 3, 4, 1601),
    "rcgr": (9, 2, 3, 50),
    "rc": (4099, 3),
    "cr": (3, 100),
    "crr": (2, 3, 3),
    "c": (4,),
    "gc": (2, 3),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folded_sum_has_every_row_once(layout, masked):
    shape = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    rows, channel, groups = axes_of(layout, "r"), layout.index("c"), axes_of(layout, "g")
    centre = rng.standard_normal([shape[axis] for axis in (*groups, channel)]).astype(np.float32)
    mask = rng.random([1 if axis == channel else size for axis, size in enumerate(shape)]) < 0.7
    terms = np.where(mask if masked else True, (x - expand(jnp.asarray(centre), layout)) ** 2, 0)

    def squares_and_count(terms):
        (terms,), merged = merge_rows([terms], layout)
        return sums.sums_of((terms, jnp.ones_like(terms)), Spec(merged, plan=ON_A_CPU))

    found, count = jax.jit(squares_and_count)(terms)
    expected = np.moveaxis(terms.astype(np.float64).sum(rows), layout[:channel].count("g"), -1)
    assert_close(found, expected, what=layout)
    np.testing.assert_array_equal(count, math.prod(shape[axis] for axis in rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sample_of_a_cpu_has_about_the_root_of_every_axis_and_a_few_lines_of_memory(layout):
    (x,), merged = merge_rows((np.zeros(LAYOUTS[layout], np.float32),), layout)
    assert "rr" not in merged
    sample = sample_rows(x, merged, of_each_axis=True)
    for axis in range(x.ndim):
        whole, taken = x.shape[axis], sample.shape[axis]
        if merged[axis] == "r":
            assert math.sqrt(whole) - 1 <= taken <= max(2 * math.sqrt(whole), min(whole, 8)), (axis, whole, taken)
        else:
            assert taken == whole
