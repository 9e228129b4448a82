"""Shapes and dtypes of the operands of an operation, to compile or trace it with."""

import jax

from bn_fused.kernels.contract import OPERATIONS


def operand_specs(operation, groups, rows, channels, dtype, residual):
    """{name: `jax.ShapeDtypeStruct`} for x [groups, rows, channels]: without a mask, with a residual or without."""
    kinds = {
        "x": jax.ShapeDtypeStruct((groups, rows, channels), dtype),
        "channel": jax.ShapeDtypeStruct((groups, channels), "float32"),
        "group": jax.ShapeDtypeStruct((groups,), "float32"),
        "coefficients": jax.ShapeDtypeStruct((groups, 6), "float32"),
    }
    left_out = ("mask",) if residual else ("mask", "residual")
    return {name: kinds[kind] for name, kind in OPERATIONS[operation].operands.items() if name not in left_out}
