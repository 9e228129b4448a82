"""Numbers of the backend `triton` in Triton's interpreter, against float64."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from bn_fused.kernels.backends.triton.plan import Plan, make_plan
from bn_fused.kernels.chips import CHIPS

from support.child_process import child_environment
from support.compilers import skip_without_triton
from support.kernel_cases import CASES
from support.kernel_results import (
    check_results,
    check_spoilt,
    keep_from_kinks,
    load_results,
    operands,
    save_call,
    spoilt,
)
from support.versions import ON_THE_NEWEST_JAX

# What the interpreter runs is Triton's, whose version is the same beside every JAX; on an older one
# test_triton_compiled lowers and compiles the kernels.
pytestmark = [pytest.mark.compilers, *ON_THE_NEWEST_JAX]


def plan(**changes):
    """Small tiles, so that a few rows have several ranges of several tiles, with a last one that is not full."""
    fields = {"architecture": 90, "fold": 1, "columns": 16, "tile_rows": 4, "splits": 3, "warps": 4, "stages": 1}
    return Plan(**(fields | changes))


PLANS = {
    "far from zero": plan(columns=64),
    "groups": plan(columns=128, splits=2),
    # Of channels, the last slab with fewer: 3 slabs of 16, 16 and 8 channels.
    "groups far from zero": plan(slabs=3, splits=2),
    "images": plan(columns=128),
    "silu": plan(tile_rows=8),
    "residual without activation": plan(splits=1),
    "bfloat16": plan(fold=4, columns=64, tile_rows=2),
    "bfloat16, gelu": plan(slabs=2),  # of 32 and 16 channels
    "float16": plan(columns=128, splits=2),
    "one row": plan(splits=1),
    "3 channels": plan(columns=4),
    "65 channels": plan(columns=32, tile_rows=8),
    # The backend's own.
    "300 rows, bfloat16": make_plan(2, 300, 65, 2, CHIPS["mi250x"]),
    "2051 rows": make_plan(1, 2051, 7, 4, CHIPS["h200"]),
    "300 rows": plan(columns=32, tile_rows=64, slabs=3),  # of 96, 96 and 64 channels
    "2051 rows, 24 channels": make_plan(1, 2051, 24, 4, CHIPS["mi300x"], residual=True, derivative=True),
}
SEVERAL_TILES = ("far from zero", "groups", "bfloat16", "float16", "3 channels")
FINITE = ("bfloat16", "far from zero")  # folded, and not
SLABS = ("bfloat16, gelu", "300 rows")  # the derivative is computed of the residual, and of y


def interpreted(calls, folder):
    """The results of the process that computes {name: (case, operands, plan)}, by name; see `load_results`."""
    for name, (case, arrays, used) in calls.items():
        save_call(folder / f"{name}.npz", case, arrays, plan=dataclasses.asdict(used))
    process = subprocess.run(
        [sys.executable, "-m", "support.triton_interpreted", str(folder)],
        capture_output=True,
        text=True,
        timeout=580,
        env=child_environment(),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return {name: load_results(folder / f"{name}.results.npz", case) for name, (case, _, _) in calls.items()}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{name: (operands, results)} of all cases, and of variants of some."""
    skip_without_triton()
    calls = {}
    for name, used in PLANS.items():
        arrays = operands(CASES[name])
        keep_from_kinks(CASES[name], arrays)
        calls[name] = CASES[name], arrays, used

    def add(variant, name, arrays=None, operations=("backward",), **changes):
        """The case again, with other operands or a change to its plan."""
        case, before, used = calls[name]
        case = dataclasses.replace(case, operations=operations)
        calls[variant] = case, before if arrays is None else arrays, dataclasses.replace(used, **changes)

    for name in FINITE:
        arrays = operands(dataclasses.replace(CASES[name], centre=0.0))
        add(f"{name}, finite", name, arrays)
        add(f"{name}, not finite", name, spoilt(arrays))
    # A state that is not finite, of which the approach `batch` takes nothing for its results.
    arrays = calls["far from zero"][1]
    state = {
        name: np.full_like(arrays[name], value) for name, value in (("running_mean", np.inf), ("running_var", np.nan))
    }
    add("state", "far from zero", arrays | state, operations=())
    for name in SLABS:
        add(f"{name}, one slab", name, slabs=1)
    add("again", "bfloat16")
    results = interpreted(calls, tmp_path_factory.mktemp("interpreted"))
    return {name: (arrays, results[name]) for name, (_, arrays, _) in calls.items()}


@pytest.mark.parametrize("name", PLANS)
def test_all_results_agree_with_float64(name, computed):
    case = CASES[name]
    check_results(case, *computed[name], case.operations)


@pytest.mark.parametrize("name", FINITE)
def test_what_is_not_finite_stays_in_its_channel(name, computed):
    (_, expected), (_, results) = computed[f"{name}, finite"], computed[f"{name}, not finite"]
    check_spoilt(results, expected)


def test_a_state_that_is_not_finite_is_kept_out_of_what_does_not_depend_on_it(computed):
    (_, expected), (_, results) = computed["far from zero"], computed["state"]
    for name in ("y", "pivot", "delta", "var", "offset", "rstd"):
        np.testing.assert_array_equal(results[f"forward.{name}"], expected[f"forward.{name}"], err_msg=name)
    assert np.isinf(results["forward.new_running_mean"]).all() and np.isnan(results["forward.new_running_var"]).all()


def test_two_runs_give_the_same_bits(computed):
    (_, first), (_, second) = computed["bfloat16"], computed["again"]
    assert len(second) > 15
    for result, value in second.items():
        np.testing.assert_array_equal(value, first[result], err_msg=result)


@pytest.mark.parametrize("name", SLABS)
def test_slabs_give_the_same_bits_as_none(name, computed):
    (_, slabs), (_, whole) = computed[name], computed[f"{name}, one slab"]
    assert len(whole) > 15
    for result, value in whole.items():
        np.testing.assert_array_equal(value, slabs[result], err_msg=result)


def test_the_cases_have_several_ranges_of_several_tiles_and_the_last_is_not_full():
    for name in SEVERAL_TILES:
        used, rows = PLANS[name], CASES[name].rows // PLANS[name].fold
        for inputs in (1, 2):
            assert used.splits > 1 and rows // used.splits > used.rows_of(inputs), name
        assert rows % used.splits, name
