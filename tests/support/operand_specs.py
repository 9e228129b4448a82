"""Shapes and dtypes of the operands of an operation, to compile or trace it with."""

import jax

from bn_fused.kernels.contract import OPERATIONS, Spec, kept_for_derivative


def operand_specs(operation, groups, rows, channels, dtype, residual, activation, state="float32"):
    """{name: `jax.ShapeDtypeStruct`} for x [groups, rows, channels]: without a mask, with a residual or without.

    `state`: the dtype of the running statistics.
    """
    kinds = {
        "x": jax.ShapeDtypeStruct((groups, rows, channels), dtype),
        "channel": jax.ShapeDtypeStruct((groups, channels), "float32"),
        "group": jax.ShapeDtypeStruct((groups,), "float32"),
        "coefficients": jax.ShapeDtypeStruct((groups, 6), "float32"),
    }
    specs = {name: kinds[kind] for name, kind in OPERATIONS[operation].operands.items() if kind in kinds}
    running = jax.ShapeDtypeStruct((groups, channels), state)
    specs |= {name: running for name in ("running_mean", "running_var") if name in specs}
    added = {"residual": kinds["x"]} if residual else {}
    if "y" in specs:
        added = kept_for_derivative(Spec("grc", activation=activation), added.get("residual"), kinds["x"])
    return {name: spec for name, spec in specs.items() if name in added or name not in ("residual", "y")}
