"""What a process that runs kernels does with a case: compute forward, and from its results other operations."""

import json

import jax.numpy as jnp
import numpy as np

from bn_fused.kernels import contract


def read_call(path):
    """What `kernel_results.save_call` has written: the operands in their dtypes, and the settings."""
    stored = dict(np.load(path))
    settings = json.loads(str(stored.pop("settings")))
    dtypes = dict.fromkeys(("x", "dy", "residual"), settings["dtype"])
    dtypes |= dict.fromkeys(("weight", "bias"), settings["parameters"])
    return {name: jnp.asarray(value, dtypes.get(name, "float32")) for name, value in stored.items()}, settings


def compute_all(compute, spec, operands, rows, operations):
    """The results as {"operation.result": float32 array, "operation.result.dtype": name}.

    `compute(operation, arguments)` runs one; `operands` are those of `forward` and the cotangents, of x's dtype and
    float32. The statistics for the other operations come from the forward's results.
    """
    results = {}

    def run(operation, given):
        names = [name for name in contract.OPERATIONS[operation].operands if given.get(name) is not None]
        found = compute(operation, {name: given[name] for name in names})
        found = found if isinstance(found, (tuple, list)) else (found,)
        for name, value in zip(contract.OPERATIONS[operation].result_kinds(names), found, strict=True):
            results[f"{operation}.{name}"] = np.asarray(value.astype(jnp.float32))
            results[f"{operation}.{name}.dtype"] = str(value.dtype)
        return found

    done = dict(zip(contract.OPERATIONS["forward"].results, run("forward", operands), strict=True))
    coefficients = operands["coefficients"]
    statistics = {name: done[name] for name in ("pivot", "delta", "offset", "rstd")}
    statistics["batch"] = coefficients[..., 0]
    statistics["count"] = jnp.full(coefficients.shape[:-1], rows, jnp.float32)
    residual = operands.get("residual")
    kept = {"residual": None, **contract.kept_for_derivative(spec, residual, done["y"])}
    for operation in operations:
        run(operation, operands | statistics | (kept if "dy" in contract.OPERATIONS[operation].operands else {}))
    return results
