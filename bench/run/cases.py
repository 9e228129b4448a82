"""A layer at a workload, ready to be checked and timed: its inputs, the programs of its passes, the right results.

`jax_case` and `torch_case`, in modules of their own, make the programs.

A program works on several sets of inputs one after the other, each with arrays of its own: with enough of them, what
one set has left in the caches is gone before its turn comes again ("cold"), and the launch of a program is shared.
One set alone finds in the caches what fits there ("warm").
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bn_fused.bench.check import (
    ELEMENTS_COMPARED,
    EPS,
    Check,
    Limits,
    draw,
    draw_parameters,
    failure_of,
    step_errors,
    stored_mean_factor,
)
from bn_fused.bench.oracle import OracleStep, initial_state, train_oracle
from bn_fused.bench.providers import DEVICES
from bn_fused.bench.timing import Timed
from bn_fused.bench.workloads import Workload
from bn_fused.kernels.chips import chip_of

# Where the size of the last cache is not known, bytes: larger than most.
UNKNOWN_CACHE = 64 << 20
MOST_SETS = 16


def sets_for(workload: Workload, device, cold: bool) -> int:
    """How many sets of inputs a program works on: enough to fill the last cache twice, at most `MOST_SETS`."""
    if not cold:
        return 1
    chip = chip_of(device)
    cache = getattr(chip, "last_cache", None) or UNKNOWN_CACHE
    # Each set is at least an input and an output.
    return min(MOST_SETS, max(2, math.ceil(cache / workload.nbytes)))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every layer gets at a workload: on the host for the oracle, on the device(s) for the layers.

    `sets` holds (x, residual or None, dy) in the workload's layout; all sets have the same values. `weight`, `bias`:
    [channels], float32.
    """

    workload: Workload
    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray | None
    weight: np.ndarray
    bias: np.ndarray
    parameters: tuple[jax.Array, jax.Array]
    sets: Sequence[tuple[jax.Array, jax.Array | None, jax.Array]]
    mesh: jax.sharding.Mesh | None = None


def make_inputs(workload: Workload, *, sets: int, mesh: jax.sharding.Mesh | None = None) -> Inputs:
    """Draw the inputs of a workload and put them on the device, the examples split over the mesh if there is one."""
    x, dy = (array.astype(workload.dtype) for array in draw(workload.array_shape))
    residual = draw(workload.array_shape, seed=1)[1].astype(workload.dtype) if workload.residual else None
    weight, bias = draw_parameters(workload.channels)
    placements = [None, None]
    if mesh is not None:
        placements = [NamedSharding(mesh, spec) for spec in (PartitionSpec(DEVICES), PartitionSpec())]

    def put(array, placement=placements[0]):
        return None if array is None else jax.device_put(array, placement)

    first = tuple(map(put, (x, residual, dy)))
    more = [jax.tree.map(jnp.copy, first) for _ in range(sets - 1)]
    parameters = (put(weight, placements[1]), put(bias, placements[1]))
    return Inputs(workload, x, dy, residual, weight, bias, parameters, (first, *more), mesh)


@dataclasses.dataclass
class Case:
    """A layer at a workload.

    - `programs[pass_name]`: the function to time.
    - `results(pass_name, outputs)`: of what a program returns, the first set's, by name, in the workload's layout.
    - `collective_bytes[pass_name]`: bytes that the devices exchange in a pass; empty on one device.
    """

    programs: dict[str, Timed]
    results: Callable[[str, Any], dict[str, Any]]
    collective_bytes: dict[str, int] = dataclasses.field(default_factory=dict)


def in_turn(function, sets):
    """`function(*operands)` for each of the sets, one after the other, in one program."""
    # Jitted, it is traced and lowered once for all sets.
    function = jax.jit(function)
    results, previous = [], ()
    for operands in sets:
        # Without the barrier XLA may interleave what belongs to different sets.
        operands, previous = jax.lax.optimization_barrier((operands, previous))
        result = function(*operands)
        results.append(result)
        previous = jax.tree.leaves(result)[:1]
    return results


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The right results of a workload for some of its channels, one step of the oracle for each part of the batch."""

    channels: np.ndarray
    parts: tuple[OracleStep, ...]
    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    activation: str | None
    factor: float


def make_oracle(inputs: Inputs, approach: str, parts: int = 1) -> Oracle:
    """Compute the results that a check compares with; `parts` of the batch have statistics of their own."""
    workload = inputs.workload
    rows = math.prod(workload.shape) // workload.channels
    number = min(workload.channels, max(2, ELEMENTS_COMPARED // rows))
    channels = np.unique(np.linspace(0, workload.channels - 1, number).astype(int))

    def take(array):
        if array is None:
            return None
        array = np.take(array, channels, workload.channel_axis)
        return np.moveaxis(array, workload.channel_axis, 1).astype(np.float64)

    x, dy, residual = map(take, (inputs.x, inputs.dy, inputs.residual))
    weight, bias = (array[channels].astype(np.float64) for array in (inputs.weight, inputs.bias))
    steps = [
        train_oracle(
            *(np.split(array, parts)[part] for array in (x, dy)), weight, bias, initial_state(len(channels)),
            approach=approach, momentum=0.99, eps=EPS, warmup_period=1, activation=workload.activation,
            residual=None if residual is None else np.split(residual, parts)[part],
        )
        for part in range(parts)
    ]  # fmt: skip
    factor = max(stored_mean_factor(part, approach) for part in np.split(x, parts))
    return Oracle(channels, tuple(steps), x, dy, weight, workload.activation, factor)


def check_results(results: dict[str, Any], oracle: Oracle, workload: Workload, ours: bool) -> Check:
    """Compare what a pass made with the oracle."""
    limits = Limits.of(workload.dtype, ours, oracle.factor)

    def take(name, value):
        value = np.asarray(value)
        if name in ("dweight", "dbias"):
            return value[oracle.channels].astype(np.float64)
        value = np.take(value, oracle.channels, workload.channel_axis)
        return np.moveaxis(value, workload.channel_axis, 1).astype(np.float64)

    got = {name: take(name, value) for name, value in results.items()}
    steps = oracle.parts
    # The batch's arrays one part after the other; the parameters' gradients are the sums over all parts.
    want = OracleStep(
        **{name: np.concatenate([getattr(step, name) for step in steps]) for name in ("y", "dx", "dresidual", "z")},
        normalised=np.concatenate([step.normalised for step in steps]),
        dweight=sum(step.dweight for step in steps),
        dbias=sum(step.dbias for step in steps),
        rstd=np.max([step.rstd for step in steps], axis=0),
        state=steps[0].state,
    )
    return Check(step_errors(got, want, oracle.dy, oracle.weight, limits, oracle.activation))


def check_case(case: Case, pass_name: str, oracle: Oracle, workload: Workload, ours: bool) -> Check:
    """Run a pass once and compare what it made; a failure is reported, not raised."""
    try:
        timed = case.programs[pass_name]
        outputs = timed.start()
        timed.wait(outputs)
        return check_results(case.results(pass_name, outputs), oracle, workload, ours)
    except Exception as error:  # whatever a kernel raises must show as a failed check
        return Check(failure=failure_of(error))


def device_copy(inputs: Inputs) -> Timed:
    """Copy x of every set, one call each: on a GPU its own copy of memory, which no kernel is faster than."""
    xs = [x for x, _, _ in inputs.sets]
    return Timed(lambda: [jnp.copy(x) for x in xs], calls=len(xs))


def copy_program(inputs: Inputs) -> Timed:
    """Read x and write an array of its size, elementwise, for every set: the roofline for all others.

    A bit of each value is turned over: XLA leaves out what only copies, and an addition costs a CPU that has none for
    16 bits more than the memory does.
    """
    bits = jnp.dtype(f"uint{8 * jnp.dtype(inputs.workload.dtype).itemsize}")

    def turned(x):
        return (jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, bits) ^ bits.type(1), x.dtype),)

    @jax.jit
    def copies(xs):
        return in_turn(turned, [(x,) for x in xs])

    return Timed(functools.partial(copies, [x for x, _, _ in inputs.sets]), calls=len(inputs.sets))
