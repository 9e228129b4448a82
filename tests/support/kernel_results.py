"""The operations of a GPU backend, run in an interpreter, compared with float64: operands, and what is checked.

A `case` is any object with groups, rows, channels, dtype, activation, residual, coefficients and centre (around which x
lies); results are named "operation.result", as float32 arrays [groups, ...].
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from support import oracle
from support.tolerances import assert_close

BATCH = (1.0, 0.0, 0.0, 0.01, 0.01, 0.99)
BLEND = (0.7, 0.4, 0.1, 0.1, 0.15, 0.9)
ALL = ("backward", "normalise_backward", "moments_backward", "normalise", "moments")


def operands(case, parameters="float32"):
    """Random operands of `forward` and cotangents, rounded to the case's dtype; weight and bias to that of `parameters`."""
    random = np.random.default_rng(0)
    spread, per_channel = (case.groups, case.rows, case.channels), (case.groups, case.channels)

    def rounded(values, dtype=case.dtype):
        return np.array(jnp.asarray(values, dtype).astype(jnp.float32))

    found = {
        "x": rounded(case.centre + random.standard_normal(spread)),
        "dy": rounded(random.standard_normal(spread)),
        "coefficients": np.tile(np.float32(case.coefficients), (case.groups, 1)),
    }
    if case.residual:
        found["residual"] = rounded(random.standard_normal(spread))
    for name in ("weight", "bias", "running_mean", "running_var", "dmean", "dvar"):
        values = random.standard_normal(per_channel)
        found[name] = np.float32({"weight": 1 + values / 4, "running_var": 1 + abs(values)}.get(name, values))
    for name in ("weight", "bias"):
        found[name] = rounded(found[name], parameters)
    return found


def expected_rows(case, arrays):
    """The oracle's view of the operands, one for each group."""
    wide = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    return [
        oracle.Rows(
            x=wide["x"][group],
            **{key: wide[key][group] for key in ("weight", "bias", "running_mean", "running_var")},
            coefficients=oracle.Coefficients(*wide["coefficients"][group]),
            eps=1e-5,
            activation=case.activation,
            residual=wide["residual"][group] if case.residual else None,
            counting=np.ones(case.rows),
        )
        for group in range(case.groups)
    ]


def keep_from_kinks(case, arrays):
    """Set dy to zero where the activation's derivative depends on a rounding."""
    if case.activation in oracle.KINKED:
        rows = expected_rows(case, arrays)
        pre, scale = (np.stack([getattr(row, name) for row in rows]) for name in ("pre", "y_scale"))
        arrays["dy"] = np.where(abs(pre) < 1e-3 * scale, 0, arrays["dy"])


def check_results(case, arrays, results, operations):
    """Compare the results of forward, and of the other operations, with float64."""
    rows = expected_rows(case, arrays)

    def joined(get):
        return np.stack([get(row) for row in rows])

    def close(result, expected, scale, stored=np.float32):
        scale = np.broadcast_to(scale, expected.shape)
        assert_close(results[result], expected, scale, stored=stored, what=result)

    def mean_is(operation):
        mean = results[f"{operation}.pivot"].astype(np.float64) + results[f"{operation}.delta"]
        # The mean keeps what float32 would lose of it: its error is relative to the spread.
        spread = joined(lambda row: np.sqrt(row.var) + abs(row.x - row.mean).max(0))
        assert_close(mean, joined(lambda row: row.mean), spread, stored=np.float32, what=f"{operation}: mean")
        close(f"{operation}.var", joined(lambda row: row.var), joined(lambda row: row.var_scale))

    mean_is("forward")
    y, y_scale = joined(lambda row: row.y), joined(lambda row: row.y_scale)
    close("forward.y", y, y_scale, stored=case.dtype)
    for moment in ("mean", "var"):
        of = f"new_running_{moment}"
        close(f"forward.{of}", joined(lambda row, of=of: getattr(row, of)),
              joined(lambda row, of=of: getattr(row, f"{of}_scale")))  # fmt: skip
    dy, dmean, dvar = (np.asarray(arrays[key], np.float64) for key in ("dy", "dmean", "dvar"))
    zero = np.zeros(case.channels)
    for operation in operations:
        if operation == "moments":
            mean_is("moments")
        elif operation == "normalise":
            close("normalise.y", y, y_scale, stored=case.dtype)
        elif operation == "moments_backward":
            through = [
                dmean[g] / case.rows + (row.x - row.mean) * 2 * dvar[g] / case.rows for g, row in enumerate(rows)
            ]
            scale = [
                (abs(dmean[g]) + 2 * abs(dvar[g]) * (abs(row.x - row.mean) + np.sqrt(row.var))) / case.rows
                for g, row in enumerate(rows)
            ]
            close("moments_backward.dx", np.stack(through), np.stack(scale), stored=case.dtype)
        else:
            both = []
            for g, row in enumerate(rows):
                if operation == "normalise_backward":
                    frozen = row.coefficients._replace(batch=0.0)
                    held = dataclasses.replace(row, coefficients=frozen)
                    # The same normalisation, of which nothing depends on the batch.
                    for cached in ("norm_mean", "norm_var"):
                        held.__dict__[cached] = getattr(row, cached)
                    both.append(held.backward(dy[g], zero, zero))
                else:
                    both.append(row.backward(dy[g], zero, zero, dmean[g], dvar[g]))
            for result, of, stored in (
                ("dx", "x", case.dtype),
                ("sum_dz", "bias", np.float32),
                ("sum_dz_xhat", "weight", np.float32),
                ("dresidual", "residual", case.dtype),
            ):
                if result == "dresidual" and not case.residual:
                    assert f"{operation}.dresidual" not in results
                    continue
                expected = np.stack([getattr(values, of) for values, _ in both])
                close(f"{operation}.{result}", expected, np.stack([getattr(s, of) for _, s in both]), stored)
