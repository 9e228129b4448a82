"""Calls of the operations of `pallas_gpu` and what their results must be, for the interpreter and for a GPU."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import oracle
from bn_fused.kernels.pallas_gpu_plan import Plan
from tolerances import assert_close

CHILD = pathlib.Path(__file__).with_name("pallas_gpu_child.py")
BATCH = (1.0, 0.0, 0.0, 0.01, 0.01, 0.99)
BLEND = (0.7, 0.4, 0.1, 0.1, 0.15, 0.9)
ALL = ("backward", "normalise_backward", "moments_backward", "normalise", "moments")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: x [groups, rows, channels] around `centre`, given in the axes of `layout`; weight and bias in
    `parameters`; with a plan, or None for the backend's own.
    """

    rows: int
    channels: int
    plan: Plan | None = None
    groups: int = 1
    dtype: str = "float32"
    activation: str | None = None
    residual: bool = False
    coefficients: tuple = BATCH
    centre: float = 3.0
    operations: tuple = ("backward",)
    races: bool = False
    layout: str = "grc"
    parameters: str = "float32"


def operands(case):
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
        found[name] = rounded(found[name], case.parameters)
    return found


def computed(case, arrays, folder, **settings):
    """The results of the child process, {operation.result: float32 array [groups, ...]}; see there for its settings."""
    images = case.layout == "rcr"  # [4, channels, rows/4], one group

    def placed(value):
        return np.moveaxis(value.reshape(4, -1, case.channels), 1, 2) if images else value

    def back(value):
        return np.moveaxis(value, 2, 1).reshape(1, case.rows, case.channels) if images else value

    settings = {
        "layout": case.layout,
        "activation": case.activation,
        "dtype": case.dtype,
        "plan": None if case.plan is None else dataclasses.asdict(case.plan),
        "races": case.races,
        "rows": case.rows,
        "operations": case.operations,
        "parameters": case.parameters,
        **settings,
    }
    spread = ("x", "dy", "residual")
    given = {name: placed(value) if name in spread else value[0] if images else value for name, value in arrays.items()}
    path = str(folder / "operands.npz")
    np.savez(path, settings=json.dumps(settings), **given)
    hidden = ("XLA_FLAGS", "JAX_PLATFORMS") if settings.get("on_gpu") else ("XLA_FLAGS",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.run(
        [sys.executable, str(CHILD), path], capture_output=True, text=True, timeout=280, env=environment
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = dict(np.load(path + ".results.npz"))
    for name, value in results.items():
        if name.endswith(".dtype"):
            continue
        of_x = name.split(".")[1] in ("y", "dx", "dresidual")
        assert str(results[f"{name}.dtype"]) == (case.dtype if of_x else "float32"), name
        results[name] = back(value) if of_x else value[None] if images else value
    return results


def check(case, folder, **settings):
    """Compute a case and compare everything that comes out with float64."""
    arrays = operands(case)
    wide = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    rows = [
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

    def joined(get):
        return np.stack([get(row) for row in rows])

    if case.activation in oracle.KINKED:
        # At the kink the derivative depends on a rounding.
        near = abs(joined(lambda row: row.pre)) < 1e-3 * joined(lambda row: row.y_scale)
        arrays["dy"] = np.where(near, 0, arrays["dy"])
    results = computed(case, arrays, folder, **settings)

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
    for operation in case.operations:
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
