"""Numbers of the backend `triton` in Triton's interpreter, against float64."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bn_fused.kernels.backends.triton.plan import Plan, make_plan
from bn_fused.kernels.chips import CHIPS

from support.child_process import child_environment
from support.kernel_results import ALL, BATCH, BLEND, check_results, keep_from_kinks, operands

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install $(python -m bn_fused.bench.deviceless triton)",
)


def plan(**changes):
    """Small tiles, so that a few rows have several ranges of several tiles, with a last one that is not full."""
    fields = {"architecture": 90, "fold": 1, "columns": 16, "tile_rows": 4, "splits": 3, "warps": 4, "stages": 1}
    return Plan(**(fields | changes))


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
    layout: str = "grc"


CASES = {
    "far from zero": Case(37, 17, plan(), centre=1e4, operations=("backward", "moments", "moments_backward")),
    "three channels": Case(29, 3, plan(columns=4), activation="relu", coefficients=BLEND, operations=ALL),
    "65 channels": Case(23, 65, plan(columns=32, tile_rows=8, splits=2), activation="gelu", residual=True),
    "folded": Case(
        44, 12, plan(fold=4, columns=32, tile_rows=2), dtype="bfloat16", activation="relu", residual=True,
        coefficients=BLEND, operations=ALL,
    ),
    "groups": Case(
        22, 24, plan(splits=4), groups=2, dtype="float16", activation="leaky_relu", residual=True, operations=ALL
    ),
    "silu": Case(33, 16, plan(tile_rows=8), activation="silu", coefficients=BLEND, operations=ALL),
    "residual without activation": Case(
        33, 16, plan(splits=1), residual=True, operations=("backward", "normalise_backward", "normalise")
    ),
    "one row": Case(1, 5, plan(splits=1), coefficients=BLEND, operations=ALL),
    "images": Case(12, 20, plan(), activation="relu", layout="rcr"),
    # Of channels, the last with fewer: 2 slabs of 32 and 16 channels; 3 of 16, 16 and 8.
    "slabs": Case(
        29, 48, plan(slabs=2), activation="gelu", residual=True, coefficients=BLEND, operations=ALL, dtype="bfloat16"
    ),
    "slabs of groups": Case(
        19, 40, plan(slabs=3, splits=2), groups=2, activation="relu", coefficients=BLEND, centre=1e3,
    ),
    "planned": Case(2051, 7, make_plan(1, 2051, 7, 4, CHIPS["h200"]), activation="relu", operations=ALL),
    "planned for an MI300X": Case(
        2051, 24, make_plan(1, 2051, 24, 4, CHIPS["mi300x"], residual=True, derivative=True), activation="gelu",
        residual=True, coefficients=BLEND, operations=ALL,
    ),
    "planned for an MI250X": Case(
        1500, 65, make_plan(2, 1500, 65, 2, CHIPS["mi250x"]), groups=2, dtype="bfloat16", centre=100.0,
        activation="relu", operations=ALL,
    ),
}  # fmt: skip


def interpreted(cases, folder):
    """The results of the child process, of each (case, arrays) {operation.result: float32 array [groups, ...]}."""
    spread = ("x", "dy", "residual")
    for name, (case, arrays) in cases.items():
        images = case.layout == "rcr"  # [4, channels, rows/4], one group
        settings = {
            field: getattr(case, field) for field in ("layout", "activation", "dtype", "rows", "operations")
        } | {"plan": dataclasses.asdict(case.plan)}

        def placed(key, value, case=case, images=images):
            if not images:
                return value
            return np.moveaxis(value.reshape(4, -1, case.channels), 1, 2) if key in spread else value[0]

        given = {key: placed(key, value) for key, value in arrays.items()}
        np.savez(folder / f"{name}.npz", settings=json.dumps(settings), **given)
    process = subprocess.run(
        [sys.executable, "-m", "support.triton_interpreted", str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        env=child_environment(),
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = {}
    for name, (case, _) in cases.items():
        results = dict(np.load(folder / f"{name}.results.npz"))
        for key in [key for key in results if not key.endswith(".dtype")]:
            of_x = key.split(".")[1] in ("y", "dx", "dresidual")
            assert str(results[f"{key}.dtype"]) == (case.dtype if of_x else "float32"), key
            if case.layout == "rcr":
                value = results[key]
                results[key] = np.moveaxis(value, 2, 1).reshape(1, case.rows, -1) if of_x else value[None]
        found[name] = results
    return found


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{name: (operands, results)} of all cases, and of some again with values that are not finite."""
    given = {}
    for name, case in CASES.items():
        arrays = operands(case)
        keep_from_kinks(case, arrays)
        given[name] = case, arrays
    # Forward and backward of some again: the same operands, and some with values that are not finite.
    for name in FINITE:
        case = dataclasses.replace(CASES[name], operations=("backward",))
        near = operands(case) | {"x": operands(case)["x"] - case.centre}
        given[f"{name}, finite"] = case, near
        given[f"{name}, not finite"] = case, spoilt({key: value.copy() for key, value in near.items()})
    # A state that is not finite, of which the approach `batch` takes nothing for its results.
    state = {"running_mean": np.full((1, 17), np.inf, np.float32), "running_var": np.full((1, 17), np.nan, np.float32)}
    given["state"] = dataclasses.replace(CASES["far from zero"], operations=()), given["far from zero"][1] | state
    whole = dataclasses.replace(CASES["slabs"], plan=dataclasses.replace(CASES["slabs"].plan, slabs=1))
    given["slabs, whole"] = dataclasses.replace(whole, operations=("backward",)), given["slabs"][1]
    given["folded, again"] = dataclasses.replace(CASES["folded"], operations=("backward",)), given["folded"][1]
    results = interpreted(given, tmp_path_factory.mktemp("interpreted"))
    return {name: (arrays, results[name]) for name, (_, arrays) in given.items()}


# Channels that are not finite, in a plan with and in one without folded rows.
FINITE = ("folded", "far from zero")


def spoilt(arrays):
    arrays["x"][0, 7, 3] = np.inf
    arrays["x"][0, 0, 4] = -np.inf  # in the rows that make a pivot
    arrays["x"][0, -1, 5] = np.nan
    arrays["x"][0, :, 6] *= 1e30  # its square overflows
    return arrays


@pytest.mark.parametrize("name", CASES)
def test_all_results_agree_with_float64(name, computed):
    case = CASES[name]
    check_results(case, *computed[name], case.operations)


@pytest.mark.parametrize("name", FINITE)
def test_what_is_not_finite_stays_in_its_channel(name, computed):
    case, (_, expected) = CASES[name], computed[f"{name}, finite"]
    _, results = computed[f"{name}, not finite"]
    others = np.setdiff1d(np.arange(case.channels), (3, 4, 5, 6))
    for result, value in results.items():
        if not result.endswith(".dtype"):
            np.testing.assert_array_equal(value[..., others], expected[result][..., others], err_msg=result)
    mean = (results["forward.pivot"] + results["forward.delta"])[0]
    assert mean[3] == np.inf and mean[4] == -np.inf and np.isnan(mean[5])
    var = results["forward.var"][0]
    assert np.isnan(var[3]) and np.isnan(var[4]) and np.isnan(var[5]) and var[6] == np.inf
    assert np.isfinite(mean[6])
    assert np.isnan(results["forward.y"][0][:, 3:6]).all()


def test_a_state_that_is_not_finite_is_kept_out_of_what_does_not_depend_on_it(computed):
    (_, expected), (_, results) = computed["far from zero"], computed["state"]
    for name in ("y", "pivot", "delta", "var"):
        np.testing.assert_array_equal(results[f"forward.{name}"], expected[f"forward.{name}"], err_msg=name)
    assert np.isinf(results["forward.new_running_mean"]).all() and np.isnan(results["forward.new_running_var"]).all()


def test_two_runs_give_the_same_bits(computed):
    (_, first), (_, second) = computed["folded"], computed["folded, again"]
    assert len(second) > 15
    for result, value in second.items():
        np.testing.assert_array_equal(value, first[result], err_msg=result)


def test_slabs_give_the_same_bits_as_none(computed):
    (_, slabs), (_, whole) = computed["slabs"], computed["slabs, whole"]
    assert len(whole) > 15
    for result, value in whole.items():
        np.testing.assert_array_equal(value, slabs[result], err_msg=result)


def test_the_cases_have_several_ranges_of_several_tiles_and_the_last_is_not_full():
    for case in (CASES[name] for name in ("far from zero", "three channels", "folded", "groups")):
        rows = case.rows // case.plan.fold
        for inputs in (1, 2):
            tile = case.plan.rows_of(inputs)
            assert case.plan.splits > 1 and rows // case.plan.splits > tile, case
            assert rows % case.plan.splits, case
        assert jnp.dtype(case.dtype).itemsize in (2, 4)
