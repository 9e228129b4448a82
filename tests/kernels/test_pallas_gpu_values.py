"""Numbers of the backend `pallas_gpu` in Mosaic GPU's interpreter, against float64; races and reuse of memory."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch
from bn_fused.kernels.backends.pallas_gpu.plan import Plan, tiling

from support.kernel_cases import ALL, CASES, Case, grid
from support.kernel_results import check_results, check_spoilt, operands, spoilt
from support.pallas_gpu_calls import all_computed, check, computed, operands_to_check

missing = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this version of JAX has no interpreter of Mosaic GPU (0.11 has)"
)


def plan(**changes):
    """Small tiles: the rings wrap around within a few rows. `ring` is the bytes of a warpgroup's."""
    fields = {"fold": 1, "columns": 128, "splits": 2, "warpgroups": 2, "ring": 4 * 128 * 4} | changes
    return Plan(**fields | {"ring_bytes": fields.pop("ring") * fields["warpgroups"]})


def one_launch(**fields):
    """A plan whose forward and backward are one launch. The interpreter needs its blocks as clusters, however many."""
    defaults = {"fold": 1, "columns": 128, "warpgroups": 2, "at_once": 1, "slabs": 1, "stages": fields["tiles"]}
    both = OneLaunch(**defaults | fields, cluster=True)
    streaming = plan(
        fold=both.fold,
        columns=both.columns,
        splits=1,
        warpgroups=both.warpgroups,
        ring=6 * 3 * both.columns * 4,
    )
    return dataclasses.replace(streaming, forward=both, backward=both)


def call(name, plan, **changes):
    """A case of the table, with changes, and a plan for it."""
    return dataclasses.replace(CASES[name], **changes), plan


TURNS = Case(87, 128, dtype="bfloat16", activation="gelu", residual=True)
BACKWARD = {"operations": ("backward",)}  # with `forward`, the operations that may be one launch
CALLS = {
    # Tiles of 4 rows in ranges of 12 and 11 rows: the last tile of the second range is moved back.
    "far from zero": call("far from zero", plan(splits=1, ring=9 * 128 * 4)),
    "folded": call("bfloat16", plan(fold=4, splits=1, warpgroups=1, ring=9 * 128 * 2)),
    # dz is rounded where it is written, and not where it is added up.
    "folded, dz of 16 bits": call(
        "bfloat16", plan(fold=4, splits=1, warpgroups=1, ring=9 * 128 * 2), activation="gelu", **BACKWARD
    ),
    "overlapping blocks": call("136 channels", plan(splits=1, warpgroups=4)),
    "256 columns": call("float16", plan(columns=256, splits=1, ring=18 * 256 * 2)),
    "groups and races": call("groups", plan(splits=1, ring=9 * 128 * 4)),
    "images": call("images", plan()),
    # A merge of more fragments of partial results than it holds, whose first ones are not full.
    "many parts, far from zero": (
        Case(8 * 27, 17, centre=1e4, operations=("moments",)), plan(fold=8, splits=9, warpgroups=1, ring=9 * 128 * 4)
    ),
    # Ranges of 8, 8 and 7 rows (twice) in tiles of 3.
    "resident, far from zero": call(
        "far from zero", one_launch(members=3, warpgroups=1, tiles=3, tile_rows=3), **BACKWARD
    ),
    "resident, folded": call("bfloat16", one_launch(members=1, fold=4, tiles=2, tile_rows=3), **BACKWARD),
    "resident, folded, several blocks": call(
        "65 channels", one_launch(members=6, fold=4, warpgroups=1, tiles=2, tile_rows=3), **BACKWARD
    ),
    "partial, far from zero": call(
        "far from zero", one_launch(members=3, warpgroups=1, tiles=4, tile_rows=2, stages=2), **BACKWARD
    ),
    # Two thousand values for a thread to add up.
    "partial, many rows": (
        Case(8192, 128, dtype="bfloat16", operations=()),
        one_launch(members=1, warpgroups=1, tiles=128, tile_rows=64, stages=2),
    ),
    # dz is written, and most of it read again.
    "partial and races": call(
        "groups", one_launch(members=2, warpgroups=1, tiles=5, tile_rows=2, stages=2, slabs=2)
    ),
    # Fragments and turns that are whole: of a last tile that begins 9 rows early, the third fragment counts in part,
    # and the second turn whole. dz has 16 bits.
    "partial, whole turns": (TURNS, one_launch(members=1, warpgroups=1, tiles=3, tile_rows=32, stages=2)),
    "whole turns": (TURNS, plan(splits=1, warpgroups=1, ring=2 * 3 * 32 * 128 * 2)),
    "partial, overlapping, 256 columns": call(
        "float16, gelu", one_launch(columns=256, members=1, warpgroups=2, slabs=3, tiles=5, tile_rows=2, stages=2)
    ),
    "partial, folded": call(
        "65 channels",
        one_launch(members=3, fold=4, warpgroups=1, tiles=4, tile_rows=3, stages=3),
        residual=True,
        **BACKWARD,
    ),
    "one row": call("one row", one_launch(members=1, warpgroups=1, tiles=1, tile_rows=1), channels=128),
    "slabs and races": call("384 channels", one_launch(members=2, at_once=2, slabs=3, tiles=2, tile_rows=3)),
    "slabs, overlapping, 256 columns": call(
        "float16, gelu", one_launch(columns=256, members=2, warpgroups=1, slabs=3, tiles=2, tile_rows=6)
    ),
}  # fmt: skip
RACES = ("groups and races", "partial and races", "slabs and races")

# The default ones have each path once.
DEFAULT = (
    "many parts, far from zero",
    "folded",
    "folded, dz of 16 bits",
    "groups and races",
    "resident, far from zero",
    "resident, folded",
    "resident, folded, several blocks",
    "partial, far from zero",
    "partial and races",
    "partial, whole turns",
    "slabs and races",
)

# Channels that are a multiple of nothing, under every operation.
ODD = {
    name: call(name, one_launch(fold=fold, members=members, warpgroups=1, tiles=2, tile_rows=tile_rows, slabs=slabs))
    for name, fold, members, tile_rows, slabs in (
        ("3 channels, 512 rows", 128, 3, 2, 1),
        ("17 channels", 16, 6, 2, 1),
        ("64 channels", 2, 2, 2, 1),
        ("65 channels", 4, 6, 3, 1),
        ("96 channels", 4, 3, 2, 1),
        ("1000 channels", 1, 2, 2, 8),
    )
}
GRID = grid([(11, 128)], ("float32", "bfloat16", "float16"), parameters="bfloat16", operations=ALL)
GRID_PLAN = one_launch(members=2, warpgroups=1, tiles=3, tile_rows=2)


@pytest.mark.parametrize("name", ["far from zero", "folded", "groups and races"])
def test_the_cases_use_their_tiles_more_than_once(name):
    case, used = CALLS[name]
    for inputs in (1, 2, 3) if case.residual else (1, 2):
        t = tiling(used, case.groups, case.rows, case.channels, jnp.dtype(case.dtype).itemsize, inputs)
        workers = itertools.product(range(t.splits), range(t.warpgroups))
        assert all(t.worker_range(*worker).tiles > t.stages for worker in workers), t


def far_apart():
    """Many parts for a thread to merge, of rows in order and of a first row that is far from all others."""
    case = Case(288, 8, operations=())
    arrays = operands(case)
    arrays["x"][..., :4] = np.sort(arrays["x"][..., :4], -2)
    arrays["x"][..., 0, 4:] += 1e4
    return case, arrays, one_launch(members=9, fold=32, columns=256, warpgroups=1, tiles=1, tile_rows=1)


# Three partial results, of a fragment of four that they are merged in.
NOT_FINITE = Case(12, 128, operations=()), one_launch(members=3, warpgroups=1, tiles=1, tile_rows=4)


@pytest.fixture(scope="module")
def by_default(tmp_path_factory):
    """{name: (case, operands, results)} of the default calls without races: one process, which imports JAX once.

    Where races are looked for each call has a process of its own, for the interpreter keeps what it has seen.
    """
    calls = {
        name: (CALLS[name][0], operands_to_check(CALLS[name][0]), CALLS[name][1])
        for name in DEFAULT
        if name not in RACES
    }
    calls["far apart"] = far_apart()
    case, used = NOT_FINITE
    clean = operands(case)
    calls |= {"finite": (case, clean, used), "not finite": (case, spoilt(clean), used)}
    results = all_computed(calls, tmp_path_factory.mktemp("interpreted"), timeout=580)
    return {name: (case, arrays, results[name]) for name, (case, arrays, _) in calls.items()}


@missing
@pytest.mark.parametrize("name", [name for name in DEFAULT if name not in RACES])
def test_all_results_agree_with_float64(name, by_default):
    case, arrays, results = by_default[name]
    check_results(case, arrays, results, case.operations)


@missing
@pytest.mark.parametrize("name", RACES)
def test_all_results_agree_with_float64_and_nothing_races(name, tmp_path):
    case, used = CALLS[name]
    check(case, tmp_path, plan=used, races=True)


@missing
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CALLS if name not in DEFAULT])
def test_all_results_of_more_cases_agree_with_float64(name, tmp_path):
    case, used = CALLS[name]
    check(case, tmp_path, plan=used)


@missing
def test_parts_that_lie_far_from_each_other_are_merged(by_default):
    case, arrays, results = by_default["far apart"]
    check_results(case, arrays, results, ())


@missing
@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_channels_that_are_a_multiple_of_nothing(name, tmp_path):
    case, used = ODD[name]
    check(case, tmp_path, plan=used)


@missing
@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_every_activation_with_and_without_a_residual(name, tmp_path):
    check(GRID[name], tmp_path, plan=GRID_PLAN)


@missing
def test_blocks_that_do_not_wait_for_each_other_are_seen_as_a_race(tmp_path):
    """The calls of `RACES` would find a barrier that is missing."""
    case, used = CALLS["slabs and races"]
    case = dataclasses.replace(case, operations=())
    # The interpreter of JAX 0.12 raises the first one that it sees; before, they are counted in the end.
    with pytest.raises(AssertionError, match="has a race|RACE DETECTED"):
        computed(case, operands(case), tmp_path, plan=used, races=True, waits=False)


@missing
def test_what_is_not_finite_stays_in_its_channel(by_default):
    check_spoilt(by_default["not finite"][-1], by_default["finite"][-1])


@missing
@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_channel_in_a_stream(tmp_path):
    case, _ = NOT_FINITE
    clean = operands(case)
    results, expected = (computed(case, arrays, tmp_path, plan=plan()) for arrays in (spoilt(clean), clean))
    check_spoilt(results, expected)


@missing
@pytest.mark.slow
@pytest.mark.parametrize("name", ["256 columns", "resident, folded"])
def test_two_runs_give_the_same_bits(name, tmp_path):
    case, used = CALLS[name]
    arrays = operands(case)
    first, second = (computed(case, arrays, tmp_path, plan=used) for _ in range(2))
    for result, value in first.items():
        np.testing.assert_array_equal(value, second[result], err_msg=result)
