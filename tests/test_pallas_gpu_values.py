"""Numbers of the backend `pallas_gpu` in Mosaic GPU's interpreter, against float64; races and reuse of memory."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bn_fused.kernels.pallas_gpu_plan import Plan, tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from tolerances import assert_close

CHILD = pathlib.Path(__file__).with_name("pallas_gpu_interpreted.py")
BATCH = (1.0, 0.0, 0.0, 0.01, 0.01, 0.99)
BLEND = (0.7, 0.4, 0.1, 0.1, 0.15, 0.9)
ALL = ("backward", "normalise_backward", "moments_backward", "normalise", "moments")

missing = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this version of JAX has no interpreter of Mosaic GPU (0.11 has)"
)


def plan(**changes):
    """Small tiles: the rings wrap around within a few rows."""
    fields = {"fold": 1, "columns": 128, "splits": 2, "warpgroups": 2, "stages": 2} | changes
    ring_bytes = fields.pop("tile_bytes", 2 * 128 * 4) * fields["warpgroups"] * fields["stages"]
    return Plan(**fields, ring_bytes=ring_bytes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call in the interpreter: x [groups, rows, channels] around `centre`, given in the axes of `layout`."""

    rows: int
    channels: int
    plan: Plan
    groups: int = 1
    dtype: str = "float32"
    activation: str | None = None
    residual: bool = False
    coefficients: tuple = BATCH
    centre: float = 3.0
    operations: tuple = ("backward",)
    races: bool = False
    layout: str = "grc"


CASES = {
    # Tiles of 4 rows in ranges of 12 and 11 rows: the last tile of the second range is moved back.
    "far from zero": Case(
        23, 128, plan(splits=1, tile_bytes=4 * 128 * 4), centre=1e4, operations=("backward", "moments")
    ),
    "folded": Case(
        44, 32, plan(fold=4, splits=1, tile_bytes=3 * 128 * 2), dtype="bfloat16", activation="relu", residual=True,
        coefficients=BLEND, operations=ALL,
    ),
    "overlapping blocks": Case(9, 136, plan(splits=1, warpgroups=4), activation="gelu", coefficients=BLEND),
    "two columns a thread": Case(
        21, 256, plan(columns=256, splits=1, stages=3, tile_bytes=3 * 2 * 256 * 2), dtype="float16", activation="leaky_relu", residual=True
    ),
    "groups and races": Case(
        19, 128, plan(splits=1, tile_bytes=3 * 2 * 128 * 4), groups=2, activation="silu", residual=True, races=True,
        operations=("backward", "normalise_backward"),
    ),
    "images": Case(12, 128, plan(), activation="relu", layout="rcr"),
}  # fmt: skip


def operands(case):
    random = np.random.default_rng(0)
    spread, per_channel = (case.groups, case.rows, case.channels), (case.groups, case.channels)

    def rounded(values):
        return np.array(jnp.asarray(values, case.dtype).astype(jnp.float32))

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
    return found


def interpreted(case, arrays, folder):
    """The results of the child process, {operation.result: float32 array [groups, ...]}."""
    images = case.layout == "rcr"  # [4, channels, rows/4], one group

    def placed(value):
        return np.moveaxis(value.reshape(4, -1, case.channels), 1, 2) if images else value

    def back(value):
        return np.moveaxis(value, 2, 1).reshape(1, case.rows, case.channels) if images else value

    settings = {
        "layout": case.layout,
        "activation": case.activation,
        "dtype": case.dtype,
        "plan": dataclasses.asdict(case.plan),
        "races": case.races,
        "rows": case.rows,
        "operations": case.operations,
    }
    spread = ("x", "dy", "residual")
    given = {name: placed(value) if name in spread else value[0] if images else value for name, value in arrays.items()}
    path = str(folder / "operands.npz")
    np.savez(path, settings=json.dumps(settings), **given)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
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


@pytest.mark.parametrize("name", ["far from zero", "folded", "groups and races"])
def test_the_cases_use_their_tiles_more_than_once(name):
    case = CASES[name]
    for inputs in (1, 2, 3) if case.residual else (1, 2):
        t = tiling(case.plan, case.groups, case.rows, case.channels, jnp.dtype(case.dtype).itemsize, inputs)
        assert all(t.tiles(worker) > t.stages for worker in range(t.workers)), t


@missing
@pytest.mark.parametrize("name", CASES)
def test_all_results_agree_with_float64(name, tmp_path):
    case = CASES[name]
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
    results = interpreted(case, arrays, tmp_path)

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


@missing
def test_what_is_not_finite_stays_in_its_channel(tmp_path):
    case = Case(13, 128, plan(), operations=())
    arrays = operands(case)
    arrays["x"][0, 7, 3] = np.inf
    arrays["x"][0, 0, 4] = -np.inf  # in the rows that make a pivot
    arrays["x"][0, 12, 5] = np.nan
    arrays["x"][0, :, 6] *= 1e30  # its square overflows
    clean = operands(case)
    results, expected = interpreted(case, arrays, tmp_path), interpreted(case, clean, tmp_path)
    others = np.setdiff1d(np.arange(128), (3, 4, 5, 6))
    for result, value in results.items():
        if not result.endswith(".dtype"):
            np.testing.assert_array_equal(value[..., others], expected[result][..., others])
    mean = (results["forward.pivot"] + results["forward.delta"])[0]
    assert mean[3] == np.inf and mean[4] == -np.inf and np.isnan(mean[5])
    var = results["forward.var"][0]
    assert np.isnan(var[3]) and np.isnan(var[4]) and np.isnan(var[5]) and var[6] == np.inf
    assert np.isfinite(mean[6])
    assert np.isnan(results["forward.y"][0][:, 3:6]).all()


@missing
def test_two_runs_give_the_same_bits(tmp_path):
    case = CASES["two columns a thread"]
    arrays = operands(case)
    first, second = (interpreted(case, arrays, tmp_path) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
