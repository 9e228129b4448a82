"""Calls of the operations of `pallas_gpu` in a process of their own, in the interpreter or on a GPU."""

import dataclasses
import subprocess
import sys

from support.child_process import child_environment
from support.kernel_results import check_results, keep_from_kinks, load_results, operands, save_call


def computed(case, arrays, folder, plan=None, **settings):
    """The results of a child process, see `load_results`; without a plan the backend's own.

    `races`: whether the interpreter looks for them. The other settings stand in `pallas_gpu_child`.
    """
    return all_computed({"operands": (case, arrays, plan)}, folder, **settings)["operands"]


def all_computed(calls, folder, races=False, timeout=280, **settings):
    """The results of each of {name: (case, operands, plan)}, computed one after the other in one child process."""
    paths = {name: folder / f"{name}.npz" for name in calls}
    for name, (case, arrays, plan) in calls.items():
        fields = None if plan is None else dataclasses.asdict(plan)
        save_call(paths[name], case, arrays, plan=fields, races=races, **settings)
    hidden = ("XLA_FLAGS", "JAX_PLATFORMS") if settings.get("on_gpu") else ("XLA_FLAGS",)
    process = subprocess.run(
        [sys.executable, "-m", "support.pallas_gpu_child", *map(str, paths.values())],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(hidden),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return {name: load_results(f"{paths[name]}.results.npz", case) for name, (case, _, _) in calls.items()}


def operands_to_check(case):
    """A case's operands, of which everything that comes out can be compared with float64."""
    arrays = operands(case)
    keep_from_kinks(case, arrays)
    return arrays


def check(case, folder, **settings):
    """Compute a case and compare everything that comes out with float64."""
    arrays = operands_to_check(case)
    check_results(case, arrays, computed(case, arrays, folder, **settings), case.operations)
