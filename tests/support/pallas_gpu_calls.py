"""Calls of the operations of `pallas_gpu` in a process of their own, in the interpreter or on a GPU."""

import dataclasses
import subprocess
import sys

from support.child_process import child_environment
from support.kernel_results import check_results, keep_from_kinks, load_results, operands, save_call


def computed(case, arrays, folder, plan=None, races=False, **settings):
    """The results of the child process, see `load_results`; without a plan the backend's own.

    `races`: whether the interpreter looks for them. The other settings stand in `pallas_gpu_child`.
    """
    path = folder / "operands.npz"
    settings["plan"] = None if plan is None else dataclasses.asdict(plan)
    save_call(path, case, arrays, races=races, **settings)
    hidden = ("XLA_FLAGS", "JAX_PLATFORMS") if settings.get("on_gpu") else ("XLA_FLAGS",)
    process = subprocess.run(
        [sys.executable, "-m", "support.pallas_gpu_child", str(path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=child_environment(hidden),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return load_results(f"{path}.results.npz", case)


def check(case, folder, **settings):
    """Compute a case and compare everything that comes out with float64."""
    arrays = operands(case)
    keep_from_kinks(case, arrays)
    check_results(case, arrays, computed(case, arrays, folder, **settings), case.operations)
