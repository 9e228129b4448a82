"""Numbers of the backend `pallas_gpu` in Mosaic GPU's interpreter, against float64; races and reuse of memory."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bn_fused.kernels.backends.pallas_gpu.plan import Plan, tiling
from bn_fused.kernels.backends.pallas_gpu.resident_plan import Resident

from support.kernel_results import ALL, BLEND, operands
from support.pallas_gpu_cases import Case, check, computed

missing = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this version of JAX has no interpreter of Mosaic GPU (0.11 has)"
)


def plan(**changes):
    """Small tiles: the rings wrap around within a few rows."""
    fields = {"fold": 1, "columns": 128, "splits": 2, "warpgroups": 2, "stages": 2} | changes
    ring_bytes = fields.pop("tile_bytes", 2 * 128 * 4) * fields["warpgroups"] * fields["stages"]
    return Plan(**fields, ring_bytes=ring_bytes)


def resident(**fields):
    """A plan whose forward and backward read once. The interpreter needs its blocks as clusters, however many."""
    both = Resident(**{"fold": 1, "columns": 128, "warpgroups": 2, "at_once": 1, "slabs": 1} | fields, cluster=True)
    streaming = plan(fold=both.fold, columns=both.columns, splits=1, tile_bytes=3 * 2 * both.columns * 4)
    return dataclasses.replace(streaming, forward=both, backward=both)


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
        21, 256, plan(columns=256, splits=1, stages=3, tile_bytes=3 * 2 * 256 * 2), dtype="float16",
        activation="leaky_relu", residual=True,
    ),
    "groups and races": Case(
        19, 128, plan(splits=1, tile_bytes=3 * 2 * 128 * 4), groups=2, activation="silu", residual=True, races=True,
        operations=("backward", "normalise_backward"),
    ),
    "images": Case(12, 128, plan(), activation="relu", layout="rcr"),
    # Ranges of 8, 8 and 7 rows (twice) in tiles of 3.
    "resident, far from zero": Case(23, 128, resident(members=3, warpgroups=1, tiles=3, tile_rows=3), centre=1e4),
    "resident, folded": Case(
        44, 32, resident(members=1, fold=4, tiles=2, tile_rows=3), dtype="bfloat16", activation="relu", residual=True,
        coefficients=BLEND,
    ),
    "resident, folded, several blocks": Case(
        40, 65, resident(members=6, fold=4, warpgroups=1, tiles=2, tile_rows=3), activation="leaky_relu",
        coefficients=BLEND, parameters="bfloat16",
    ),
    "slabs and races": Case(
        17, 384, resident(members=2, at_once=2, slabs=3, tiles=2, tile_rows=3), groups=2, activation="silu",
        residual=True, races=True,
    ),
    "slabs, overlapping, two columns a thread": Case(
        19, 520, resident(columns=256, members=2, warpgroups=1, slabs=3, tiles=2, tile_rows=6), dtype="float16",
        activation="gelu", coefficients=BLEND,
    ),
}  # fmt: skip


# The default ones have each path once.
DEFAULT = (
    "folded",
    "groups and races",
    "resident, far from zero",
    "resident, folded, several blocks",
    "slabs and races",
)

# Channels that are a multiple of nothing, under every operation; and each activation with and without a residual.
ODD = {
    channels: Case(
        rows * fold, channels, resident(members=members, fold=fold, warpgroups=1, tiles=2, tile_rows=2, slabs=slabs),
        dtype=dtype, activation=activation, coefficients=BLEND, parameters=dtype, operations=ALL,
    )
    for channels, fold, rows, members, slabs, dtype, activation in (
        (3, 128, 4, 3, 1, "float32", "silu"),
        (17, 16, 8, 6, 1, "bfloat16", "relu"),
        (64, 2, 7, 2, 1, "float16", None),
        (65, 4, 4, 3, 1, "float32", "gelu"),
        (96, 4, 4, 3, 1, "bfloat16", "leaky_relu"),
        (1000, 1, 8, 2, 8, "float16", "relu"),
    )
}  # fmt: skip
GRID = [
    Case(
        11, 128, resident(members=2, warpgroups=1, tiles=3, tile_rows=2), dtype=dtype, parameters="bfloat16",
        activation=activation, residual=residual, coefficients=BLEND, operations=ALL,
    )
    for activation, dtype in itertools.product(
        (None, "relu", "silu", "gelu", "leaky_relu"), ("float32", "bfloat16", "float16")
    )
    for residual in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("name", ["far from zero", "folded", "groups and races"])
def test_the_cases_use_their_tiles_more_than_once(name):
    case = CASES[name]
    for inputs in (1, 2, 3) if case.residual else (1, 2):
        t = tiling(case.plan, case.groups, case.rows, case.channels, jnp.dtype(case.dtype).itemsize, inputs)
        assert all(t.worker_range(worker).tiles > t.stages for worker in range(t.workers)), t


@missing
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow]) for name in CASES]
)
def test_all_results_agree_with_float64(name, tmp_path):
    check(CASES[name], tmp_path)


@missing
@pytest.mark.slow
@pytest.mark.parametrize("channels", ODD)
def test_channels_that_are_a_multiple_of_nothing(channels, tmp_path):
    check(ODD[channels], tmp_path)


@missing
@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=lambda case: f"{case.activation}-{case.dtype}-{case.residual}")
def test_every_activation_with_and_without_a_residual(case, tmp_path):
    check(case, tmp_path)


@missing
def test_blocks_that_do_not_wait_for_each_other_are_seen_as_a_race(tmp_path):
    """The cases with `races` would find a barrier that is missing."""
    case = CASES["slabs and races"]
    # The interpreter of JAX 0.12 raises the first one that it sees; before, they are counted in the end.
    with pytest.raises(AssertionError, match="has a race|RACE DETECTED"):
        computed(dataclasses.replace(case, operations=()), operands(case), tmp_path, waits=False)


@missing
@pytest.mark.parametrize("kind", [pytest.param("streaming", marks=pytest.mark.slow), "resident"])
def test_what_is_not_finite_stays_in_its_channel(kind, tmp_path):
    tiles = plan() if kind == "streaming" else resident(members=3, warpgroups=1, tiles=2, tile_rows=3)
    case = Case(13, 128, tiles, operations=())
    arrays = operands(case)
    arrays["x"][0, 7, 3] = np.inf
    arrays["x"][0, 0, 4] = -np.inf  # in the rows that make a pivot
    arrays["x"][0, 12, 5] = np.nan
    arrays["x"][0, :, 6] *= 1e30  # its square overflows
    clean = operands(case)
    results, expected = computed(case, arrays, tmp_path), computed(case, clean, tmp_path)
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
@pytest.mark.slow
@pytest.mark.parametrize("name", ["two columns a thread", "resident, folded"])
def test_two_runs_give_the_same_bits(name, tmp_path):
    case = CASES[name]
    arrays = operands(case)
    first, second = (computed(case, arrays, tmp_path) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
