"""The `OneLaunch` plans of the backend `pallas_gpu`: what is covered, who waits for whom, what is refused."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import (
    EXCHANGED,
    LARGEST_CLUSTER,
    OneLaunch,
    not_co_resident,
    one_launch_tiling,
    ways,
)
from bn_fused.kernels.backends.pallas_gpu.plan import make_plan
from bn_fused.kernels.backends.pallas_gpu.tiles import BARRIERS, LEAST_STAGES, MOMENTS, ROWS_AT_ONCE, SUMS, ring_of
from bn_fused.kernels.chips import CHIPS, chip_of
from bn_fused.kernels.registry import check_plan, choose
from bn_fused.kernels.target import BackendError, Problem, Target

from support.described_devices import device
from support.pallas_gpu_plans import DEVICE_PLANS
from support.pallas_gpu_tiles import SHAPES, check_merged_by_hand
from support.versions import on_the_newest_jax

H200 = Target("cuda", CHIPS["h200"])
# Arrays that are read, again where they are not kept, and written, and the values per column that are merged: forward
# without and with a residual, backward without and with the third array of a derivative.
KINDS = [(1, 1, 1, MOMENTS), (2, 1, 1, MOMENTS), (2, 2, 1, SUMS), (3, 2, 2, SUMS)]


def first(found):
    """What is taken by rule."""
    return next(iter(found.values()))


@functools.cache
def planned(chip, itemsize, clusters_only=False):
    """(groups, rows, channels, inputs, sums), plan and tiling of every shape and kind that has one."""
    found = []
    for sizes, (inputs, again, outputs, sums) in itertools.product(SHAPES, KINDS):
        plan = first(ways(*sizes, itemsize, CHIPS[chip], inputs, again, outputs, sums, clusters_only))
        if plan is not None:
            found.append(((*sizes, inputs, sums), plan, one_launch_tiling(plan, *sizes, itemsize, inputs)))
    return found


def workers(t):
    return itertools.product(range(t.splits), range(t.warpgroups))


def work_of(t):
    """What each block of threads does in each turn: {(slot, member): [(unit, group, block, split), ...]}."""
    work = {}
    for index in range(t.grid):
        slot, member = t.slot(index)
        split, within = t.member(member)
        units = [t.unit(slot, turn) for turn in range(t.turns(slot))]
        work[slot, member] = [(unit, *t.unit_place(unit, within), split) for unit in units]
    return work


# Plain integers, to which no version of JAX comes: so the longer of these tests run beside the newest alone.


@on_the_newest_jax
@pytest.mark.parametrize("clusters_only", [False, True], ids=["", "clusters only"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_every_plan_fits_the_chip_and_its_blocks_are_on_it_together(chip, itemsize, clusters_only):
    plans, chip = planned(chip, itemsize, clusters_only), CHIPS[chip]
    for (_, rows, channels, inputs, sums), plan, t in plans:
        assert not_co_resident(plan, chip, itemsize, inputs, sums) is None
        assert plan.cluster == clusters_only
        assert plan.members * plan.at_once == t.grid <= chip.cores
        assert not plan.cluster or plan.members <= LARGEST_CLUSTER
        # 512 threads with 128 registers each are all that a multiprocessor has.
        assert plan.warpgroups <= 4 and plan.warpgroups * plan.stages <= 32
        tiles = plan.warpgroups * plan.stages * plan.tile_rows * plan.columns * itemsize * inputs
        exchanged = (sums + EXCHANGED) * plan.warpgroups * plan.columns * 4
        fragments = ROWS_AT_ONCE * plan.warpgroups * t.fragment_rows * plan.columns * 4
        copies = sums * 2 * plan.columns * 4 if t.copies_in_block > 1 else 0
        assert tiles + exchanged + fragments + copies + BARRIERS <= chip.shared_memory_per_block
        assert t.rows * t.width == rows * channels and t.samples == rows
        assert plan.slabs == t.turns(0) and all(t.turns(slot) >= 1 for slot in range(t.at_once))
    assert len(plans) > (500 if clusters_only else 700)


def test_an_h100_gets_the_plans_of_an_h200():
    """So that what holds of an H200's plans need not be asked of both."""
    for sizes, kind in itertools.product(SHAPES[::20], KINDS[1::2]):
        one, other = (first(ways(*sizes, 2, CHIPS[chip], *kind, False)) for chip in ("h100", "h200"))
        streaming, other_streaming = (make_plan(*sizes, 2, CHIPS[chip]) for chip in ("h100", "h200"))
        assert one == other and streaming == other_streaming, sizes
    assert all(
        getattr(CHIPS["h100"], name) == getattr(CHIPS["h200"], name)
        for name in ("compute_capability", "cores", "shared_memory_per_block")
    )


@pytest.mark.parametrize("clusters_only", [False, True], ids=["", "clusters only"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_part_of_the_array_is_some_blocks_and_units_are_not_shared_out_differently(itemsize, clusters_only):
    """Each (group, block of columns, row range) is worked on once, by a unit whose members have the same turn."""
    for (groups, *_), plan, t in planned("h200", itemsize, clusters_only):
        if t.grid * plan.slabs > 600:
            continue
        work = work_of(t)
        parts = sorted((group, block, split) for turns in work.values() for _, group, block, split in turns)
        assert parts == list(itertools.product(range(groups), range(t.blocks), range(t.splits)))
        units = {}
        for (slot, _), turns in work.items():
            for turn, (unit, *_) in enumerate(turns):
                units.setdefault(unit, []).append((slot, turn))
        assert sorted(units) == list(range(t.units))
        assert all(len(where) == t.members and len(set(where)) == 1 for where in units.values())
        starts = [t.block_start(block) for block in range(t.blocks)]
        assert all(start >= 0 and start + t.columns <= t.width for start in starts)
        assert {column for start in starts for column in range(start, start + t.columns)} == set(range(t.width))


@on_the_newest_jax
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_worker_has_its_own_rows_in_its_tiles_and_as_many_of_these_as_the_plan_says(itemsize):
    for _, plan, t in planned("h200", itemsize):
        end, tiles = 0, []
        for worker in workers(t):
            part = t.worker_range(*worker)
            assert part.first == end and part.rows >= t.tile_rows
            end = part.first + part.rows
            tiles.append(part.tiles)
            before = part.first
            for index in {0, part.tiles - 2, part.tiles - 1} & set(range(part.tiles)):
                first, skipped = part.tile_row(index), part.skipped(index)
                assert before <= first and first + t.tile_rows <= end and 0 <= skipped < t.tile_rows
            for index in range(min(part.tiles, 50)):  # all of the rows once, in order
                first, skipped = part.tile_row(index), part.skipped(index)
                assert first + skipped == before
                before = first + t.tile_rows
            assert before == end or part.tiles > 50
        assert end == t.rows
        assert max(tiles) == plan.tiles and min(tiles) >= plan.tiles - 1
        assert min(LEAST_STAGES, plan.tiles) <= plan.stages <= plan.tiles
        assert plan.kept == min(1, plan.stages / plan.tiles)


def test_hardly_anything_is_read_twice_because_two_tiles_or_two_blocks_have_it():
    for itemsize in (2, 4):
        for (_, rows, channels, *_), plan, t in planned("h200", itemsize):
            if rows * channels * itemsize > 4e6:
                fetched = sum(t.worker_range(*worker).tiles * t.tile_rows for worker in workers(t))
                twice = fetched / t.rows * t.blocks * t.columns / t.width
                assert twice <= 1.1, (rows, channels, itemsize, plan)


def test_large_arrays_keep_the_whole_chip_busy():
    """Blocks for at least 85 % of the cores in each turn, and enough bytes in flight on each."""
    chip, numbers, channel_numbers = CHIPS["h200"], (6272, 25088, 100352, 401408), (64, 128, 256, 512, 1024, 2048)
    for rows, channels, itemsize, kind in itertools.product(numbers, channel_numbers, (2, 4), KINDS):
        if rows * channels * itemsize < 8e6:
            continue
        inputs, again, outputs, sums = kind
        sizes = 1, rows, channels, itemsize
        plan = first(ways(*sizes, chip, inputs, again, outputs, sums))
        t = one_launch_tiling(plan, *sizes, inputs)
        assert t.units * t.members >= 0.85 * plan.slabs * chip.cores, (rows, channels, itemsize, plan)
        if plan.kept < 1:
            in_flight = inputs * t.warpgroups * t.stages * t.tile_rows * t.columns * itemsize
            assert in_flight >= 96 * 1024, (rows, channels, itemsize, plan)


def test_clusters_that_would_leave_most_of_the_chip_without_work_are_not_made():
    for rows, channels in ((401408, 64), (100352, 256)):
        assert first(ways(1, rows, channels, 2, CHIPS["h200"], 1, 1, 1, MOMENTS, clusters_only=True)) is None


@pytest.mark.parametrize("centre", [0.0, 1e4])
@pytest.mark.parametrize("channels", [32, 128])
def test_the_merge_of_any_parts_is_the_whole(channels, centre):
    random, fold = np.random.default_rng(0), 128 // channels
    for rows, members, warpgroups in itertools.product((1, 2, 7, 12, 31), (1, 2, 3), (1, 2, 4)):
        if members * warpgroups > rows:
            continue
        workers = members * warpgroups
        ring = ring_of(rows // workers, -(-rows // workers), 6, 128)
        plan = OneLaunch(fold, 128, warpgroups, members, 1, 1, *ring, cluster=True)
        t = one_launch_tiling(plan, 1, rows * fold, channels, 4, 1)
        x = (centre + random.standard_normal((rows * fold, channels))).astype(np.float32)
        check_merged_by_hand(t, x)


def test_the_partial_results_hold_every_copy_of_a_merges_channels():
    for channels, fold, columns in (
        (8, 16, 128),
        (24, 16, 256),
        (65, 3, 128),
        (96, 4, 128),
        (136, 2, 128),
        (3, 128, 256),
    ):
        rows = 4 * fold
        width = fold * channels
        plan = OneLaunch(fold, columns, 1, -(-width // columns), 1, 1, 1, 4, 1, cluster=False)
        if width * 4 % 16:
            continue
        t = one_launch_tiling(plan, 1, rows, channels, 4, 1)
        if t.blocks == 1:  # it merges all copies itself
            assert t.copies == 1 and t.partial_width == columns
            continue
        # What the blocks write: their columns, and the first one its own once more behind the row.
        padded = np.full(t.partial_width, -1)
        starts = [t.partial_start(t.block_start(block)) for block in range(t.blocks)]
        for start in starts:
            padded[start : start + columns] = np.arange(start, start + columns)
        padded[t.width :] = np.arange(columns)
        for start in starts:
            windows = [padded[t.copy_start(start, copy) :][:columns] for copy in range(fold)]
            for lane, column in enumerate(range(start, start + columns)):
                assert sorted(window[lane] for window in windows) == list(range(column % channels, width, channels))


# --- the barrier ----------------------------------------------------------------------------------------------


def explore(t, cores, patience=100_000):
    """Every order in which blocks can start, signal, see their unit's counter and end, `cores` of them at a time.

    A state is how many steps each block has made: 0 not started, then for each turn one for its signal and one for its
    wait. Returns whether every order ends with all blocks done. Asserts that nobody passes a unit's barrier before all
    of its members have signalled, and that a counter never gets beyond their number.
    """
    work = [turns for _, turns in sorted(work_of(t).items())]
    last = [1 + 2 * len(turns) for turns in work]
    start = (0,) * len(work)
    seen, todo, all_end = {start}, [start], True
    while todo:
        state = todo.pop()
        assert len(seen) < patience
        counters = dict.fromkeys(range(t.units), 0)
        for block, steps in enumerate(state):
            for turn, (unit, *_) in enumerate(work[block]):
                counters[unit] += steps >= 2 + 2 * turn
        assert max(counters.values()) <= t.members
        for block, steps in enumerate(state):
            for turn, (unit, *_) in enumerate(work[block]):
                if steps >= 3 + 2 * turn:  # it has passed the barrier of that unit
                    assert counters[unit] == t.members
        running = sum(0 < steps < last[block] for block, steps in enumerate(state))
        following = []
        for block, steps in enumerate(state):
            if steps == last[block] or (steps == 0 and running == cores):
                continue
            if steps and steps % 2 == 0 and counters[work[block][steps // 2 - 1][0]] < t.members:
                continue  # it waits
            following.append((*state[:block], steps + 1, *state[block + 1 :]))
        if not following and any(steps != last[block] for block, steps in enumerate(state)):
            all_end = False
        for one in following:
            if one not in seen:
                seen.add(one)
                todo.append(one)
    return all_end


def small(members, at_once, units):
    plan = OneLaunch(1, 128, 1, members, at_once, -(-units // at_once), 1, 4, 1, cluster=False)
    return one_launch_tiling(plan, units, 4 * members, 128, 4, 1)


@pytest.mark.parametrize(
    ("members", "at_once", "units"), [(1, 1, 2), (2, 1, 3), (3, 1, 2), (2, 2, 3), (2, 2, 4), (4, 1, 1)]
)
def test_in_every_order_of_events_nobody_passes_early_and_all_end_if_all_are_on_the_chip(members, at_once, units):
    t = small(members, at_once, units)
    assert explore(t, cores=t.grid)


@pytest.mark.parametrize(("members", "at_once", "units"), [(2, 2, 2), (3, 1, 1), (2, 2, 4)])
def test_with_one_core_fewer_some_order_of_events_waits_for_ever(members, at_once, units):
    """What the refusal below is for."""
    t = small(members, at_once, units)
    assert not explore(t, cores=members - 1)


# --- refusals -------------------------------------------------------------------------------------------------


def own_plan(problem, target):
    return choose(problem, target, "pallas_gpu")


LARGE = Problem(1, 25088, 512, "bfloat16")  # four units of 33 blocks, of which a backward keeps half


@pytest.mark.parametrize(
    ("operation", "change", "words"),
    [
        ("forward", {"at_once": 5}, "165 blocks wait for each other, and h200 has 132 multiprocessors"),
        ("forward", {"members": 133, "at_once": 1}, "133 blocks wait for each other"),
        ("forward", {"cluster": True}, "33 blocks are more than a cluster's 8"),
        ("forward", {"tile_rows": 120}, "room for"),
        ("forward", {"stages": 9}, "room for"),
        ("backward", {"at_once": 5}, "165 blocks wait for each other"),
    ],
)
def test_a_plan_whose_blocks_may_not_be_on_the_chip_together_is_refused(operation, change, words):
    choice = own_plan(LARGE, H200)
    check_plan(choice, choice.plan, LARGE, H200)
    changed = dataclasses.replace(getattr(choice.plan, operation), **change)
    with pytest.raises(BackendError, match=f"cannot run .* on cuda .h200.*{words}"):
        check_plan(choice, dataclasses.replace(choice.plan, **{operation: changed}), LARGE, H200)


def test_a_plan_that_asks_for_too_much_shared_memory_is_refused():
    choice = own_plan(LARGE, H200)
    with pytest.raises(BackendError, match="ring_bytes"):
        check_plan(choice, dataclasses.replace(choice.plan, ring_bytes=300 * 1024), LARGE, H200)


def test_a_plan_of_a_whole_chip_is_refused_on_a_part_of_one():
    """A device that reports fewer multiprocessors than the chip has: the plan is made for those, or refused."""
    part = chip_of(device(CHIPS["h200"].device_kind, core_count=66))
    assert part.cores == 66
    target = Target("cuda", part)
    whole, here = own_plan(LARGE, H200), own_plan(LARGE, target)
    assert here.plan.forward.members * here.plan.forward.at_once <= 66
    with pytest.raises(BackendError, match="132 blocks wait for each other, and h200 has 66 multiprocessors"):
        check_plan(here, whole.plan, LARGE, target)


@pytest.mark.parametrize(("rows", "channels"), [(25088, 512), (1568, 2048), (4096, 64), (2048 * 9, 65)])
def test_on_several_devices_only_clusters_wait(rows, channels):
    """A collective beside the kernel could hold the multiprocessors that its other blocks need."""
    problem, target = Problem(1, rows, channels, "bfloat16"), dataclasses.replace(H200, several_devices=True)
    alone, here = own_plan(problem, H200), own_plan(problem, target)
    for plan in (here.plan.forward, here.plan.backward):
        assert plan is None or (plan.cluster and plan.members <= LARGEST_CLUSTER)
    assert alone.plan.forward is not None
    with pytest.raises(BackendError, match="collectives between devices"):
        check_plan(here, alone.plan, problem, target)


def test_a_device_that_reports_more_than_the_table_is_not_believed():
    assert chip_of(device(CHIPS["h200"].device_kind, core_count=1000)) is CHIPS["h200"]


@pytest.mark.parametrize(
    "change",
    [
        {"fold": 3}, {"columns": 96}, {"members": 0}, {"members": 10**6}, {"at_once": 3}, {"slabs": 2}, {"tiles": 5},
        {"tiles": 7}, {"tile_rows": 0}, {"tile_rows": 10**4}, {"warpgroups": 5}, {"stages": 0}, {"stages": 1},
        {"stages": 9},
    ],
)  # fmt: skip
def test_a_plan_by_hand_that_does_not_fit_the_array_is_refused(change):
    plan = make_plan(1, 25088, 512, 2, CHIPS["h200"]).forward
    assert one_launch_tiling(plan, 1, 25088, 512, 2, 1)
    with pytest.raises(ValueError, match="does not fit"):
        one_launch_tiling(dataclasses.replace(plan, **change), 1, 25088, 512, 2, 1)


@pytest.mark.parametrize("name", DEVICE_PLANS)
def test_the_plans_by_hand_for_a_device_are_what_their_names_say_and_run_on_the_smallest(name):
    case, plan = DEVICE_PLANS[name]
    problem = Problem(case.groups, case.rows, case.channels, case.dtype, case.activation, case.residual)
    choice = own_plan(problem, Target("cuda", CHIPS["h100"]))
    check_plan(choice, plan, problem, Target("cuda", CHIPS["h100"]))
    for operation, inputs in (
        ("forward", 1 + case.residual),
        ("backward", 2 + (case.residual and case.activation is not None)),
    ):
        sizes = case.groups, case.rows, case.channels, jnp.dtype(case.dtype).itemsize
        assert one_launch_tiling(plan.one_launch(operation), *sizes, inputs).grid <= 132
        assert plan.kind(operation) == name.split(",")[0]


# --- what is chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((32, 14, 14, 1024), "bfloat16", "resident", "resident"),
        ((32, 7, 7, 2048), "float32", "resident", "resident"),
        ((128, 7, 7, 4096), "float32", "slab", "slab"),
        ((128, 7, 7, 8192), "float32", "slab", "partial"),
        ((128, 28, 28, 512), "bfloat16", "partial", "partial"),
        ((32, 56, 56, 64), "float32", "resident", "partial"),
        ((8, 16, 16, 3), "float32", "resident", "resident"),
    ],
)
def test_explain_shows_what_stays_on_chip(shape, dtype, forward, backward):
    plan = bn_fused.explain(shape, dtype, target="h200", backend="pallas_gpu").plan
    assert (plan.kind("forward"), plan.kind("backward"), plan.kind("moments")) == (forward, backward, "streaming")
    for operation, kind, fewest in (("forward", forward, 1), ("backward", backward, 2)):
        (reads, writes), kept = plan.passes(operation), plan.one_launch(operation).kept
        assert writes == 1 and plan.launches(operation) == (f"bn_fused_{operation}",)
        assert (reads == fewest) == (kept == 1) == (kind != "partial")
        # What is not kept is read twice, as all of it is in a stream.
        assert reads == pytest.approx(fewest * (2 - kept)) and reads < 2 * fewest
    assert repr(plan).count("OneLaunch(") == 2
    streaming = dataclasses.replace(plan, forward=None, backward=None)
    assert streaming.passes("forward") == (2, 1) and streaming.passes("backward") == (4, 1)
    assert {streaming.kind("forward"), streaming.kind("backward")} == {"streaming"}
    assert len(streaming.launches("forward")) == len(streaming.launches("backward")) == 3


def test_a_residual_is_read_once_too():
    plan = bn_fused.explain(
        (32, 7, 7, 2048), jnp.bfloat16, activation="relu", residual=True, target="h200", backend="pallas_gpu"
    ).plan
    assert plan.passes("forward") == (2, 1) and plan.passes("backward") == (3, 2)
    streaming = dataclasses.replace(plan, forward=None, backward=None)
    assert streaming.passes("forward") == (3, 1) and streaming.passes("backward") == (5, 2)


def test_of_a_residual_or_what_a_derivative_needs_nothing_is_read_twice_where_a_part_is_kept():
    shape = (128, 28, 28, 512)
    bare, added = (
        bn_fused.explain(
            shape, "bfloat16", activation="relu", residual=residual, target="h200", backend="pallas_gpu"
        ).plan
        for residual in (False, True)
    )
    assert {plan.kind(operation) for plan in (bare, added) for operation in ("forward", "backward")} == {"partial"}
    assert added.passes("forward") == (3 - added.forward.kept, 1)
    # dz is written in the first pass, and read again with x.
    assert bare.passes("backward") == (4 - 2 * bare.backward.kept, 1)
    assert added.passes("backward") == (5 - 2 * added.backward.kept, 2)
