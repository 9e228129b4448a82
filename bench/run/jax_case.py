"""A layer that is JAX's at a workload."""

import functools
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from bn_fused.bench.audit.hlo import parse
from bn_fused.bench.providers import DEVICES, Provider, forward_backward, pull_back
from bn_fused.bench.run.cases import Case, Inputs, in_turn
from bn_fused.bench.timing import Timed

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def jax_case(provider: Provider, inputs: Inputs, approach: str, passes: Sequence[str], sync: bool) -> Case:
    """The programs of a layer that is JAX's."""
    mesh, workload = inputs.mesh, inputs.workload
    apply, state = provider.make(workload, approach, (DEVICES,) if sync else ())
    if mesh is not None:
        split, whole = PartitionSpec(DEVICES), PartitionSpec()
        apply = jax.shard_map(
            apply, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=(split, whole), check_vma=False
        )

    @jax.jit
    def forward_sets(parameters, state, sets):
        return in_turn(functools.partial(apply, parameters, state), [(x, residual) for x, residual, _ in sets])

    @jax.jit
    def both_sets(parameters, state, sets):
        return in_turn(functools.partial(forward_backward, apply, parameters, state), sets)

    @jax.jit
    def backward_sets(pullbacks, dys):
        return in_turn(lambda pullback, dy: pullback(dy), list(zip(pullbacks, dys, strict=True)))

    if mesh is not None:
        state = jax.device_put(state, NamedSharding(mesh, whole))
    fixed = (inputs.parameters, state)
    y_dtype = jax.eval_shape(apply, *fixed, *inputs.sets[0][:2])[0].dtype
    # A layer that returns another dtype than x's gets a gradient of that dtype.
    sets = [(x, residual, dy if dy.dtype == y_dtype else dy.astype(y_dtype)) for x, residual, dy in inputs.sets]
    calls = {"fwd": (forward_sets, (*fixed, sets)), "fwd+bwd": (both_sets, (*fixed, sets))}
    if "bwd" in passes:
        before = jax.jit(lambda *operands: pull_back(apply, *operands)[1])
        pullbacks = [before(*fixed, x, residual) for x, residual, _ in sets]
        calls["bwd"] = (backward_sets, (pullbacks, [dy for _, _, dy in sets]))

    def results(pass_name, outputs):
        if pass_name == "fwd":
            return {"y": outputs[0][0]}
        (dweight, dbias), dx, dresidual = outputs[0] if pass_name == "bwd" else outputs[0][2]
        named = {"y": outputs[0][0]} if pass_name == "fwd+bwd" else {}
        named |= {"dx": dx, "dweight": dweight, "dbias": dbias}
        return named if dresidual is None else named | {"dresidual": dresidual}

    programs, exchanged = {}, {}
    for pass_name in passes:
        function, arguments = calls[pass_name]
        compiled = function.lower(*arguments).compile()
        programs[pass_name] = Timed(functools.partial(compiled, *arguments), calls=len(sets))
        if mesh is not None:
            exchanged[pass_name] = collective_bytes(compiled.as_text()) // len(sets)
    return Case(programs, results, exchanged)


def collective_bytes(hlo_text: str) -> int:
    """Bytes of the arrays that a program's collectives exchange, per device, counted in its optimised HLO."""
    total = 0
    for computation in parse(hlo_text).computations.values():
        for instruction in computation.values():
            # Of one that is started and awaited apart, the end: the start lists what goes in beside what comes out.
            if instruction.opcode.removesuffix("-done") in COLLECTIVES:
                total += sum(array.nbytes for array in instruction.arrays)
    return total
