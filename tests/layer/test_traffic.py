"""Passes over x that the layer on `jnp` makes through an H200's memory, counted in its HLO, compiled without one.

The compiler runs in a process of its own, because a process compiles for one GPU only.
"""

import functools

import pytest

from support.child_process import answer
from support.compilers import skip_without_compilers
from support.versions import ON_THE_NEWEST_JAX

# On an older JAX bench/test_audit counts the passes of a shape.
pytestmark = [pytest.mark.compilers, *ON_THE_NEWEST_JAX]

# NCHW and NHWC images: examples under vmap, channels first as the layer has it, and the function with channels last.
# Few rows of many channels, which XLA sums in another way than many rows of few channels.
LAYOUTS = {"NCHW": (32, 64, 56, 56), "NHWC": (32, 56, 56, 64), "NHWC late": (64, 7, 7, 512), "no maps": (4096, 512)}
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = {"plain": None, "relu": "relu", "leaky_relu": "leaky_relu", "residual": "relu"}
CASES = [
    (layout, dtype, option)
    for layout in LAYOUTS
    for dtype in DTYPES
    for option in ACTIVATIONS
    if option != "leaky_relu" or (layout, dtype) == ("NHWC", "bfloat16")
]
# The others are slow: of each layout, by turns, one dtype is here as it is and the other one with an activation.
DEFAULT = [
    case
    for case in CASES
    if case[2] == "leaky_relu"
    or (case[1] == "bfloat16") == ((list(LAYOUTS).index(case[0]) + list(ACTIVATIONS).index(case[2])) % 2 == 0)
]

COMPILE = """
import json, math, sys
import equinox as eqx, jax, jax.numpy as jnp
import bn_fused
from bn_fused.bench.deviceless import DevicelessUnavailable, compile_for
from bn_fused.bench.audit.hlo import parse
from bn_fused.bench.audit.traffic import passes

def layer_step(shape, activation):
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
        shape[1], "batch", approach="batch", activation=activation, backend="jnp")
    def step(x, weight, bias, residual):
        moved = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
        def one(x, state, residual):
            return moved(x, state, residual=residual)
        y, new = jax.vmap(one, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(x, state, residual)
        return y, jax.tree.leaves(new)
    return shape[1], step

def function_step(shape, activation):
    stats = bn_fused.RunningStats.init(shape[-1])
    def step(x, weight, bias, residual):
        y, new = bn_fused.batch_norm(
            x, stats, weight, bias, approach="batch", activation=activation, residual=residual, backend="jnp")
        return y, jax.tree.leaves(new)
    return shape[-1], step

def count(layout, dtype, shape, activation, added):
    channels, step = (layer_step if layout == "NCHW" else function_step)(shape, activation)
    x = jax.ShapeDtypeStruct(shape, dtype)
    parameter = jax.ShapeDtypeStruct((channels,), jnp.float32)
    structure = []

    def forward(x, weight, bias, residual):
        y, pullback, state = jax.vjp(step, x, weight, bias, residual, has_aux=True)
        kept, tree = jax.tree.flatten(pullback)
        structure[:] = [tree, [0 if leaf is x else 1 if leaf is y else 2 for leaf in kept]]
        # x is kept as it lies, and so is y; returning them from here would copy them.
        return y, state, [None if leaf is x or leaf is y else leaf for leaf in kept]

    operands = x, parameter, parameter, x if added else None
    _, _, kept = jax.eval_shape(forward, *operands)
    tree, which = structure

    def backward(kept, x, y, dy):
        leaves = [(x, y, leaf)[index] for index, leaf in zip(which, kept, strict=True)]
        return jax.tree.unflatten(tree, leaves)(dy)

    nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    figures = {}
    for name, function, specs in (
        ("forward", forward, operands), ("backward", backward, (kept, x, x, x))
    ):
        traffic = passes(compile_for("h200", function, *specs).as_text(), math.prod(shape), nbytes)
        figures[name] = {
            "reads": traffic.reads,
            "writes": traffic.writes,
            "launches": traffic.launches,
            "copies": traffic.copies_or_transposes,
            "details": [str(access) for access in traffic.details],
        }
    return figures

def network():
    # Three residual blocks: what is x's size and neither bfloat16 nor an operand or result of a convolution.
    shape, kernel = (32, 28, 28, 256), jax.ShapeDtypeStruct((3, 3, 256, 256), jnp.bfloat16)
    stats = bn_fused.RunningStats.init(shape[-1])
    def blocks(kernels, weight, bias, x):
        for kernel in kernels:
            h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x, _ = bn_fused.batch_norm(
                h, stats, weight, bias, approach="batch", activation="relu", residual=x, backend="jnp")
        return x
    def gradients(dy, *operands):
        return jax.vjp(blocks, *operands)[1](dy)
    x, parameter = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    module = parse(compile_for("h200", gradients, x, [kernel] * 3, parameter, parameter, x).as_text())
    return [
        instruction.name + " " + array.text
        for instruction in module.computations[module.entry].values()
        for array in instruction.arrays
        if array.elements == math.prod(shape) and not array.text.startswith("bf16")
    ]

counts = [count(*case) for case in json.load(sys.stdin)]
try:
    compile_for("a100", jnp.sin, jnp.ones(3))
    second = None
except DevicelessUnavailable as error:
    second = str(error)
json.dump([counts, second, network()], sys.stdout)
"""


def compile_cases(cases):
    skip_without_compilers("h200")
    given = [
        (layout, dtype, LAYOUTS[layout], ACTIVATIONS[option], option == "residual") for layout, dtype, option in cases
    ]
    counts, *others = answer(["-c", COMPILE], given, timeout=300)
    return dict(zip(cases, counts, strict=True)), *others


@pytest.fixture(scope="module")
def compiled():
    """What the process that compiles found: each case's traffic, forward and backward, how it refused an A100, and what
    is large and not bfloat16 in a network.
    """
    return compile_cases(DEFAULT)


@functools.cache
def slow_cases():
    """The traffic of the other cases."""
    return compile_cases([case for case in CASES if case not in DEFAULT])[0]


@pytest.fixture(
    params=[
        pytest.param(case, id="-".join(case), marks=[] if case in DEFAULT else [pytest.mark.slow]) for case in CASES
    ]
)
def case(request):
    return request.param


@pytest.fixture
def counted(case, compiled):
    """The traffic of a case, forward and backward."""
    return (compiled[0] if case in DEFAULT else slow_cases())[case]


def test_forward_reads_x_twice_and_a_residual_once_and_writes_y(counted, case):
    forward, added = counted["forward"], "residual" in case
    assert forward["reads"] <= 2 + added and forward["writes"] <= 1, forward["details"]


def test_backward_reads_at_most_four_times_and_writes_once_and_with_a_residual_once_more_each(counted, case):
    backward, added = counted["backward"], "residual" in case
    # The sums of parts are 2 * 2**16 float32 with an activation: up to an eighth of the smaller arrays.
    sums = 0 if "plain" in case else 1 / 8
    assert backward["reads"] <= 4 + added + sums and backward["writes"] <= 1 + added + sums, backward["details"]


def test_nothing_of_the_size_of_x_is_copied_or_transposed(counted):
    assert counted["forward"]["copies"] == []
    assert counted["backward"]["copies"] == []


def test_the_counts_are_not_empty(counted):
    # No implementation reads x less than once in the forward, x and dy less than once in the backward.
    assert counted["forward"]["reads"] >= 1 and counted["forward"]["writes"] >= 1
    assert counted["backward"]["reads"] >= 2 and counted["backward"]["writes"] >= 1


def test_between_forward_and_backward_of_residual_blocks_no_mask_and_nothing_in_float32_is_written(compiled):
    assert compiled[2] == []


def test_a_second_gpu_is_refused_in_the_same_process(compiled):
    assert "compiles for h200" in compiled[1]
    assert "a100" in compiled[1]
