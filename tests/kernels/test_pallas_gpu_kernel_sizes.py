"""The length of the kernels of `pallas_gpu`, in operations on vectors: what their lowering and compilation takes goes
with it. Traced only, with every version of JAX.
"""

import dataclasses
import functools

import jax
import pytest

from bn_fused.kernels.backends.pallas_gpu import operations as pallas_gpu
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch
from bn_fused.kernels.backends.pallas_gpu.plan import Plan
from bn_fused.kernels.contract import OPERATIONS, Spec

from support.operand_specs import operand_specs

# The most of each kernel, some more than they have now.
MOST = {
    "bn_fused_forward": 465,
    "bn_fused_backward": 555,
    "bn_fused_moments": 185,
    "bn_fused_merge_moments": 375,
    "bn_fused_normalise": 115,
    "bn_fused_moments_backward": 65,
    "bn_fused_normalise_backward": 315,
    "bn_fused_backward_sums": 300,
    "bn_fused_merge_sums": 195,
    "bn_fused_backward_dx": 210,
}

# Four warpgroups, and tiles of so many rows that no fragment and no turn of a loop is short.
FULL = Plan(1, 128, 8, 4, ring_bytes=4 * 3 * 128 * 128 * 4)
KEPT = OneLaunch(1, 128, 4, members=8, at_once=1, slabs=1, tiles=2, tile_rows=64, stages=2, cluster=False)
SMALL = (1, 4096, 128), dataclasses.replace(FULL, forward=KEPT, backward=KEPT)
# Three groups of eight units, slab after slab, in parts, in ranges of unequal length.
IN_PARTS = dataclasses.replace(KEPT, members=11, at_once=10, slabs=3, tiles=373, stages=5)
LARGE = (3, (1 << 20) + 1, 1024), dataclasses.replace(FULL, splits=77, forward=IN_PARTS, backward=IN_PARTS)
SETTINGS = [("float32", None, False), ("bfloat16", "gelu", False), ("bfloat16", "gelu", True)]


def inside(equation):
    """The programs that are parameters of an equation."""
    values = [value if isinstance(value, (tuple, list)) else [value] for value in equation.params.values()]
    programs = [getattr(value, "jaxpr", value) for several in values for value in several]
    return [program for program in programs if hasattr(program, "eqns")]


def leaves(program):
    """The equations of a program and of all that are inside of it, each once, but for those that have others inside."""
    for equation in program.eqns:
        programs = inside(equation)
        yield from (each for one in programs for each in leaves(one)) if programs else [equation]


def kernels_of(program):
    """(name, program) of the kernels."""
    for equation in program.eqns:
        name = str(equation.params.get("name", ""))
        for one in inside(equation):
            yield from [(name, one)] if name.startswith("bn_fused_") else kernels_of(one)


def of_vectors(equation):
    values = [result.aval for result in equation.outvars]
    return any(isinstance(value, jax.core.ShapedArray) and value.size > 1 for value in values)


def texts(sizes, plan, dtype, activation, residual):
    """(name of a kernel, its operations) of all operations."""
    streaming = dataclasses.replace(plan, forward=None, backward=None)
    for operation, taken in [("forward", plan), ("backward", plan), *((name, streaming) for name in OPERATIONS)]:
        spec = Spec("grc", activation=activation, plan=taken)
        operands = operand_specs(operation, *sizes, dtype, residual, activation)
        function = functools.partial(getattr(pallas_gpu, operation), spec=spec)
        traced = jax.make_jaxpr(lambda given, function=function: function(**given))(operands)
        for name, kernel in kernels_of(traced.jaxpr):
            yield name, list(leaves(kernel))


def vector_operations(*case):
    """{name of a kernel: the operations on vectors in its text, the most where several operations launch it}."""
    found = {}
    for name, operations in texts(*case):
        found[name] = max(found.get(name, 0), sum(map(of_vectors, operations)))
    return found


def conversions_of_bools(equation):
    return equation.primitive.name == "convert_element_type" and equation.invars[0].aval.dtype == bool


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
def test_a_kernels_text_is_short_for_every_array(setting):
    small, large = vector_operations(*SMALL, *setting), vector_operations(*LARGE, *setting)
    # They differ in what a merge holds: a few partial results, or as many as it can.
    for found in small, large:
        assert found.keys() == MOST.keys()
        assert {name: number for name, number in found.items() if not 20 < number <= MOST[name]} == {}


@pytest.mark.parametrize("sizes_and_plan", [SMALL, LARGE], ids=["small", "large"])
def test_no_kernel_converts_a_bool_for_which_mosaic_starts_ptxas(sizes_and_plan):
    for name, operations in texts(*sizes_and_plan, "bfloat16", "gelu", True):
        assert [str(one) for one in operations if conversions_of_bools(one)] == [], name
