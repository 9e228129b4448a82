"""A process that compiles operations of `pallas_tpu` for a TPU that is not there: `python pallas_tpu_compiled.py`.

Reads JSON from standard input: [chip, cases, extras], cases being {name: [shape, dtype, activation, residual]} of
training steps, and extras of "halves" (the operations of which a step over devices consists, that step, and virtual
batches) and "convolutions". Writes what was counted in the compiled programs, by name.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import bn_fused
from bn_fused import kernels
from bn_fused.bench import deviceless
from bn_fused.bench.audit.hlo import parse
from bn_fused.bench.audit.traffic import passes
from bn_fused.kernels.dispatch import run

from support.operand_specs import operand_specs

S = jax.ShapeDtypeStruct


def figures(compiled, elements, nbytes):
    """What is counted in a compiled program."""
    text = compiled.as_text()
    traffic = passes(text, elements, nbytes)
    instructions = [each for computation in parse(text).computations.values() for each in computation.values()]
    calls = [each.name for each in instructions if each.opcode == "custom-call"]
    return {
        "launches": sorted(name.split(".")[0] for name in calls if name.startswith("bn_fused")),
        "reads": traffic.reads,
        "writes": traffic.writes,
        "copies": traffic.copies_or_transposes,
        "details": [str(access) for access in traffic.details],
        "all_reduces": sum(each.opcode in ("all-reduce", "all-reduce-start") for each in instructions),
    }


def step(chip, shape, dtype, activation, residual):
    """A training step and its gradients."""
    x, channel, group = S(shape, dtype), S((*shape[:-2], shape[-1]), jnp.float32), S(shape[:-2], jnp.float32)

    def both(x, weight, bias, mean, var, coefficients, residual, dy, others):
        def of(x, weight, bias, residual):
            return kernels.fused_batch_norm(
                x,
                weight,
                bias,
                mean,
                var,
                kernels.Coefficients(*coefficients),
                eps=1e-5,
                activation=activation,
                residual=residual,
                backend="pallas_tpu",
            )

        results, pullback = jax.vjp(of, x, weight, bias, residual)
        return results, pullback((dy, *others))

    arguments = (x, *[channel] * 4, (group,) * 6, x if residual else None, x, (channel,) * 4)
    elements = math.prod(shape)
    return figures(deviceless.compile_for(chip, both, *arguments), elements, elements * jnp.dtype(dtype).itemsize)


def half(chip, operation):
    """One operation, with relu."""
    spec = kernels.Spec("grc", activation="relu", backend="pallas_tpu")
    operands = operand_specs(operation, 2, 65536, 256, "float32", residual=False, activation="relu")
    compiled = deviceless.compile_for(chip, lambda operands: run(operation, spec, **operands), operands)
    return figures(compiled, operands["x"].size, 4 * operands["x"].size)


def between_convolutions(chip, backend):
    """conv, BatchNorm, relu, conv in NHWC, forward."""
    shape = (128, 28, 28, 128)
    stats = bn_fused.RunningStats.init(128)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def block(x, first, second):
        y, new = bn_fused.batch_norm(convolve(x, first), stats, approach="batch", activation="relu", backend=backend)
        return convolve(y, second), new

    x, kernel = S(shape, jnp.bfloat16), S((3, 3, 128, 128), jnp.bfloat16)
    return figures(deviceless.compile_for(chip, block, x, kernel, kernel), x.size, 2 * x.size)


def residual_block(chip):
    """conv, BatchNorm with a residual, relu, on `jnp`, and the gradients.

    How many sums the kernels make that have a convolution in them, and what is large and not bfloat16.
    """
    shape = (64, 28, 28, 1024)
    stats = bn_fused.RunningStats.init(shape[-1])

    def block(kernel, x, residual):
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return bn_fused.batch_norm(h, stats, approach="batch", activation="relu", residual=residual, backend="jnp")

    def gradients(dy, *operands):
        y, pullback, new = jax.vjp(block, *operands, has_aux=True)
        return y, new, pullback(dy)

    x, kernel, like_y = S((*shape[:-1], 64), jnp.bfloat16), S((1, 1, 64, 1024), jnp.bfloat16), S(shape, jnp.bfloat16)
    compiled = deviceless.compile_for(chip, gradients, like_y, kernel, x, like_y)
    module = parse(compiled.as_text())
    opcodes = [[each.opcode for each in computation.values()] for computation in module.computations.values()]
    others = [
        f"{instruction.name} {array.text}"
        for instruction in module.computations[module.entry].values()
        for array in instruction.arrays
        if array.elements == like_y.size and not array.text.startswith("bf16")
    ]
    return {"sums": sum(kernel.count("reduce") for kernel in opcodes if "convolution" in kernel), "others": others}


def gradients_of(**options):
    """A function of x: a training step with these options and its gradients."""
    stats = bn_fused.RunningStats.init(256)

    def both(x):
        y, pullback, new = jax.vjp(
            lambda x: bn_fused.batch_norm(x, stats, backend="pallas_tpu", **options), x, has_aux=True
        )
        return y, pullback(y)[0], new

    return both


def virtual_batches(chip):
    """A step in virtual batches and its gradients."""
    x = S((4096, 256), jnp.float32)
    return figures(deviceless.compile_for(chip, gradients_of(virtual_batch_size=512), x), x.size, 4 * x.size)


def over_four_chips(chip):
    """A step over four chips and its gradients."""
    mesh = Mesh(np.array(deviceless._tpu_topology(kernels.CHIPS[chip]).devices[:4]), ("d",))
    local = gradients_of(axis_name="d", approach="batch")
    whole = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P("d"), P()))
    x = S((4 * 4096, 256), jnp.float32, sharding=NamedSharding(mesh, P("d")))
    compiled = jax.jit(whole).trace(x).lower(lowering_platforms=("tpu",)).compile()
    return figures(compiled, 4096 * 256, 4 * 4096 * 256)


def main():
    chip, cases, extras = json.load(sys.stdin)
    counted = {name: step(chip, *case) for name, case in cases.items()}
    if "halves" in extras:
        for operation in ("moments", "moments_backward", "normalise", "normalise_backward"):
            counted[operation] = half(chip, operation)
        counted["four chips"] = over_four_chips(chip)
        counted["virtual batches"] = virtual_batches(chip)
    if "convolutions" in extras:
        for backend in ("pallas_tpu", "jnp"):
            counted[f"conv {backend}"] = between_convolutions(chip, backend)
        counted["residual block"] = residual_block(chip)
    json.dump(counted, sys.stdout)


if __name__ == "__main__":
    main()
