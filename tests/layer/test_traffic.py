"""Passes over x that the layer makes through a GPU's memory, counted in its HLO compiled for an H200, without one.

The compiler runs in a process of its own, because a process compiles for one GPU only.
"""

import pytest

from support.child_process import answer
from support.compilers import skip_without_compilers

# NCHW and NHWC images: examples under vmap, channels first as the layer has it, and the function with channels last.
# Few rows of many channels, which XLA sums in another way than many rows of few channels.
LAYOUTS = {"NCHW": (32, 64, 56, 56), "NHWC": (32, 56, 56, 64), "NHWC late": (64, 7, 7, 512), "no maps": (4096, 512)}
DTYPES = ("float32", "bfloat16")
OPTIONS = {"plain": {}, "relu": {"activation": "relu"}}
# Channels last with an activation is left out: there XLA writes its derivative to memory, 5 to 6 reads in all.
CASES = [
    (layout, dtype, option)
    for layout in LAYOUTS
    for dtype in DTYPES
    for option in OPTIONS
    if layout == "NCHW" or option == "plain"
]

COMPILE = """
import json, math, sys
import equinox as eqx, jax, jax.numpy as jnp
import bn_fused
from bn_fused.bench.deviceless import DevicelessUnavailable, compile_for
from bn_fused.bench.audit.traffic import passes

def layer_step(shape, options):
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(shape[1], "batch", approach="batch", **options)
    def step(x, weight, bias):
        moved = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
        y, new = jax.vmap(moved, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y, jax.tree.leaves(new)
    return shape[1], step

def function_step(shape, options):
    stats = bn_fused.RunningStats.init(shape[-1])
    def step(x, weight, bias):
        y, new = bn_fused.batch_norm(x, stats, weight, bias, approach="batch", **options)
        return y, jax.tree.leaves(new)
    return shape[-1], step

def count(layout, dtype, shape, options):
    channels, step = (layer_step if layout == "NCHW" else function_step)(shape, options)
    x = jax.ShapeDtypeStruct(shape, dtype)
    parameter = jax.ShapeDtypeStruct((channels,), jnp.float32)
    structure = []

    def forward(x, weight, bias):
        y, pullback, state = jax.vjp(step, x, weight, bias, has_aux=True)
        kept, tree = jax.tree.flatten(pullback)
        structure[:] = [tree, [leaf is x for leaf in kept]]
        # x is kept as it lies; returning it from here would copy it.
        return y, state, [None if leaf is x else leaf for leaf in kept]

    _, _, kept = jax.eval_shape(forward, x, parameter, parameter)
    tree, is_x = structure

    def backward(kept, x, dy):
        return jax.tree.unflatten(tree, [x if mine else leaf for mine, leaf in zip(is_x, kept, strict=True)])(dy)

    nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    figures = {}
    for name, function, specs in (
        ("forward", forward, (x, parameter, parameter)), ("backward", backward, (kept, x, x))
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

counts = [count(*case) for case in json.load(sys.stdin)]
try:
    compile_for("a100", jnp.sin, jnp.ones(3))
    second = None
except DevicelessUnavailable as error:
    second = str(error)
json.dump([counts, second], sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    """What the process that compiles found: each case's traffic, forward and backward, and how it refused an A100."""
    skip_without_compilers("h200")
    cases = [(layout, dtype, LAYOUTS[layout], OPTIONS[option]) for layout, dtype, option in CASES]
    return answer(["-c", COMPILE], cases, timeout=300)


@pytest.fixture(scope="module")
def counted(compiled):
    """The traffic of every case."""
    return dict(zip(CASES, compiled[0], strict=True))


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_forward_reads_x_twice_and_writes_it_once(counted, case):
    forward = counted[case]["forward"]
    assert forward["reads"] <= 2 and forward["writes"] <= 1, forward["details"]


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_backward_reads_at_most_four_times_and_writes_once(counted, case):
    backward = counted[case]["backward"]
    assert backward["reads"] <= 4 and backward["writes"] <= 1, backward["details"]


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_nothing_of_the_size_of_x_is_copied_or_transposed(counted, case):
    assert counted[case]["forward"]["copies"] == []
    assert counted[case]["backward"]["copies"] == []


@pytest.mark.compilers
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_counts_are_not_empty(counted, case):
    # No implementation reads x less than once in the forward, x and dy less than once in the backward.
    assert counted[case]["forward"]["reads"] >= 1 and counted[case]["forward"]["writes"] >= 1
    assert counted[case]["backward"]["reads"] >= 2 and counted[case]["backward"]["writes"] >= 1


@pytest.mark.compilers
def test_a_second_gpu_is_refused_in_the_same_process(compiled):
    assert "compiles for h200" in compiled[1]
    assert "a100" in compiled[1]
