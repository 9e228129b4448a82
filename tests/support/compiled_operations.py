"""A process that compiles operations of a GPU backend for a chip that is not there: `python compiled_operations.py`.

Reads JSON from standard input: [backend, target, cases, programs], a case being [[groups, rows, channels, dtype,
activation, residual], names of operations, of which "streamed forward" and "streamed backward" take a plan of
pallas_gpu that streams], and programs {"entrances": whether to try all of them, "plans": whether to try plans of
pallas_gpu given by hand, "fills": whether to count what gives the counters of a network, "order": the [shape, dtype,
residual] of a step whose launches to list, "blocks": dtypes}. Writes what was counted in the compiled programs.

For tests: `by_operation`, `check_traffic` and `check_block` read what it writes.
"""

import dataclasses
import json
import math
import re
import sys

import jax
import jax.numpy as jnp

import bn_fused
from bn_fused import kernels
from bn_fused.bench.audit.hlo import parse
from bn_fused.bench.audit.traffic import passes
from bn_fused.bench.deviceless import compile_for
from bn_fused.kernels.contract import Spec
from bn_fused.kernels.dispatch import run

from support.operand_specs import operand_specs

S = jax.ShapeDtypeStruct


def by_operation(cases, found):
    """What was counted, by case and operation."""
    return {
        (tuple(case), name): figures
        for (case, _), operations in zip(cases, found["operations"], strict=True)
        for name, figures in operations.items()
    }


def check_traffic(counted):
    """The program reads and writes the operands and results of its kernels, the plan's passes, and partial sums."""
    for (case, name), figures in counted.items():
        assert figures["kernels"] == figures["planned_launches"], (case, name)
        groups, rows, channels, *_ = case
        assert not figures["copies"], (case, name, figures["details"])
        if groups * rows * channels >= 1 << 22:  # else the partial sums of the blocks are not small beside x
            for passes_, planned in zip((figures["reads"], figures["writes"]), figures["planned_passes"], strict=True):
                assert planned <= passes_ < planned + 0.1, (case, name, figures["details"])


def check_block(found, backend, dtype, kernels):
    """Between two convolutions a backend adds no copy or transpose, and moves no more than jnp."""
    ours, theirs = found["blocks"][dtype][backend], found["blocks"][dtype]["jnp"]
    assert len(ours["copies"]) <= len(theirs["copies"]), (ours["details"], theirs["details"])
    assert ours["kernels"] == kernels
    assert ours["reads"] <= theirs["reads"] and ours["writes"] <= theirs["writes"], (ours, theirs)


def figures(compiled, elements, nbytes):
    """What is counted in a compiled program."""
    text = compiled.as_text()
    traffic = passes(text, elements, nbytes)
    return {
        "reads": traffic.reads,
        "writes": traffic.writes,
        "launches": traffic.launches,
        "copies": traffic.copies_or_transposes,
        "details": [str(access) for access in traffic.details],
        "kernels": len(re.findall(r'custom_call_target="(?:mosaic_gpu|triton_kernel_call)', text)),
    }


def operation_of(backend, target, name, groups, rows, channels, dtype, activation, residual):
    """What is counted in one operation, and what its plan says of it."""
    plan = kernels.choose(
        kernels.Problem(groups, rows, channels, dtype, activation, residual),
        kernels.Target("cuda", kernels.chips.CHIPS[target]),
        backend,
    ).plan
    streamed, name = name.startswith("streamed "), name.removeprefix("streamed ")
    by_hand = dataclasses.replace(plan, forward=None, backward=None) if streamed else None
    plan = by_hand or plan
    operands = operand_specs(name, groups, rows, channels, dtype, residual, activation)
    spec = Spec("grc", 1e-5, activation, backend, by_hand)
    x = operands["x"]
    compiled = compile_for(target, lambda values: run(name, spec, **values), operands)
    found = figures(compiled, x.size, x.size * x.dtype.itemsize)
    found |= {"planned_launches": len(plan.launches(name)), "planned_passes": seen_passes(plan, name)}
    return found | ({"kind": plan.kind(name)} if hasattr(plan, "kind") else {})


def seen_passes(plan, name):
    """A plan's passes as the program shows them: what a launch reads a second time is one operand of it."""
    in_one_launch = getattr(plan, name, None)
    if in_one_launch is not None:
        plan = dataclasses.replace(plan, **{name: dataclasses.replace(in_one_launch, stages=in_one_launch.tiles)})
    return plan.passes(name)


def block(backend, target, dtype):
    """conv, BatchNorm, relu, conv in NCHW, forward and gradients."""
    shape, channels = (32, 64, 56, 56), 64
    stats = bn_fused.RunningStats.init(channels)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    def forward(x, first, second, weight, bias):
        y, new = bn_fused.batch_norm(
            convolve(x, first),
            stats,
            weight,
            bias,
            approach="batch",
            channel_axis=1,
            activation="relu",
            backend=backend,
        )
        return convolve(y, second), new

    def both(x, first, second, weight, bias, dy):
        y, pullback, new = jax.vjp(forward, x, first, second, weight, bias, has_aux=True)
        # As where dy comes from a loss: it is there after y.
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, new, pullback(dy)

    kernel, parameter = S((channels, channels, 3, 3), dtype), S((channels,), "float32")
    x = S(shape, dtype)
    compiled = compile_for(target, both, x, kernel, kernel, parameter, parameter, x)
    return figures(compiled, math.prod(shape), math.prod(shape) * jnp.dtype(dtype).itemsize)


def entrances(backend, target):
    """The number of kernels that a training step lowers to, through every way in, and with 64-bit types on."""
    import equinox as eqx

    rows, channels = 4096, 64
    x, many = S((rows, channels), "float32"), S((3, rows, channels), "float32")
    stats = bn_fused.RunningStats.init(channels)
    layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(channels, "batch", "batch", backend=backend)
    mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    blend = kernels.Coefficients(1.0, 0.0, 0.0, 0.1, 0.1, 0.9)

    def raw(x):
        one = jnp.ones(channels, "float32")
        return kernels.fused_batch_norm(x, one, one, one, one, blend, eps=1e-5, backend=backend)[0]

    def function(x, inference=False):
        return bn_fused.batch_norm(x, stats, backend=backend, inference=inference)[0]

    ways = {
        "layer": (lambda x: mapped(x, state)[0], x),
        "function": (function, x),
        "raw": (raw, x),
        "ensemble": (jax.vmap(function), many),
        "inference": (lambda x: function(x, inference=True), x),
    }
    found = {name: figures(compile_for(target, *way), 1, 1)["kernels"] for name, way in ways.items()}
    with jax.enable_x64(True):
        found["x64"] = figures(compile_for(target, raw, x), 1, 1)["kernels"]

    def virtual_batches(x):
        y, pullback, new = jax.vjp(
            lambda x: bn_fused.batch_norm(x, stats, virtual_batch_size=rows // 8, backend=backend), x, has_aux=True
        )
        return y, pullback(y), new

    counted = figures(compile_for(target, virtual_batches, x), x.size, 4 * x.size)
    found["virtual batches, both ways"] = counted["kernels"]
    found["copies for virtual batches"] = len(counted["copies"])
    return found


def fills(backend, target):
    """How many kernels and copies give the counters of the blocks in a network of three layers, both ways."""
    stats = bn_fused.RunningStats.init(128)

    def network(x):
        for _ in range(3):
            x, _ = bn_fused.batch_norm(x, stats, activation="relu", backend=backend)
        return x

    def step(x, dy):
        y, pullback = jax.vjp(network, x)
        return y, pullback(dy)

    x = S((4096, 128), "bfloat16")
    compiled = compile_for(target, step, x, x)
    entry = compiled.as_text().split("\nENTRY")[1]
    given = re.findall(r"^  %[\w.-]+ = \(?s32\[\d+\]\S*.* (?:fusion|copy)\(", entry, re.MULTILINE)
    return {"kernels": figures(compiled, 1, 1)["kernels"], "fills": len(given)}


def plans(target):
    """Of plans of pallas_gpu given by hand: the kernels of one that streams, what is said of one that cannot run."""
    rows, channels = 4096, 64
    one, blend = jnp.ones(channels, "float32"), kernels.Coefficients(1.0, 0.0, 0.0, 0.1, 0.1, 0.9)

    def compile_with(plan):
        def raw(x):
            return kernels.fused_batch_norm(x, one, one, one, one, blend, eps=1e-5, backend="pallas_gpu", plan=plan)[0]

        return compile_for(target, raw, S((rows, channels), "float32"))

    plan = bn_fused.explain((rows, channels), "float32", target=target, backend="pallas_gpu").plan
    streaming = dataclasses.replace(plan, forward=None, backward=None)
    waiting = dataclasses.replace(plan, forward=dataclasses.replace(plan.forward, members=200, cluster=False))
    found = {"streaming": figures(compile_with(streaming), 1, 1)["kernels"]}
    try:
        compile_with(waiting)
    except bn_fused.BackendError as error:
        found["refused"] = str(error)
    return found


def order(backend, target, shape, dtype, residual):
    """The launches of a training step in the order in which they run, and its copies of arrays of x's size.

    Of a launch: its name, the names of those, or of the constants and parameters, that its operands are from, and
    whether a result takes the place of an operand.
    """
    stats = bn_fused.RunningStats.init(shape[-1])

    def step(dy, *operands):
        y, pullback, new = jax.vjp(
            lambda x, residual=None: bn_fused.batch_norm(
                x, stats, residual=residual, activation="relu", backend=backend
            ),
            *operands,
            has_aux=True,
        )
        return y, new, pullback(dy)

    x = S(shape, dtype)
    text = compile_for(target, step, x, x, *[x] * residual).as_text()
    module = parse(text)
    instructions = module.computations[module.entry]

    def source(name):
        while instructions[name].opcode in ("bitcast", "get-tuple-element"):
            (name,) = instructions[name].operands
        return name

    launches = [
        [each.name, [source(operand) for operand in each.operands], "output_to_operand_aliasing" in each.attributes]
        for each in instructions.values()
        if each.opcode == "custom-call"
    ]
    copies = passes(text, math.prod(shape), math.prod(shape) * jnp.dtype(dtype).itemsize).copies_or_transposes
    return {"scheduled": "is_scheduled=true" in text, "launches": launches, "copies": copies}


def main():
    backend, target, cases, programs = json.load(sys.stdin)
    found = {
        "operations": [{name: operation_of(backend, target, name, *case) for name in names} for case, names in cases]
    }
    if programs.get("entrances"):
        found["entrances"] = entrances(backend, target)
    if programs.get("order"):
        found["order"] = order(backend, target, *programs["order"])
    if programs.get("fills"):
        found["fills"] = fills(backend, target)
    if programs.get("plans"):
        found["plans"] = plans(target)
    found["blocks"] = {
        dtype: {name: block(name, target, dtype) for name in ("jnp", backend)} for dtype in programs.get("blocks", ())
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
