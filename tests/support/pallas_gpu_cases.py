"""Calls of the operations of `pallas_gpu` and what their results must be, for the interpreter and for a GPU."""

import dataclasses
import json
import subprocess
import sys

import numpy as np

from bn_fused.kernels.backends.pallas_gpu.plan import Plan

from support.child_process import child_environment
from support.kernel_results import BATCH, check_results, keep_from_kinks, operands


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
    process = subprocess.run(
        [sys.executable, "-m", "support.pallas_gpu_child", path],
        capture_output=True,
        text=True,
        timeout=280,
        env=child_environment(hidden),
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
    arrays = operands(case, case.parameters)
    keep_from_kinks(case, arrays)
    check_results(case, arrays, computed(case, arrays, folder, **settings), case.operations)
