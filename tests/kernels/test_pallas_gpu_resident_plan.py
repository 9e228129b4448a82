"""The resident plans of the backend `pallas_gpu`: what is covered, who waits for whom, what is refused."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import bn_fused
from bn_fused.kernels.backends.pallas_gpu.plan import make_plan
from bn_fused.kernels.backends.pallas_gpu.resident_plan import (
    LARGEST_CLUSTER,
    MOST_TILES,
    Resident,
    kept_bytes,
    make_resident,
    not_co_resident,
    resident_tiling,
    tiles_of,
)
from bn_fused.kernels.backends.pallas_gpu.tiles import MOMENTS, SUMS
from bn_fused.kernels.chips import CHIPS, chip_of
from bn_fused.kernels.registry import check_plan, choose
from bn_fused.kernels.target import BackendError, Problem, Target

from support.described_devices import device
from support.pallas_gpu_tiles import SHAPES, merged_by_hand
from support.tolerances import assert_close

H200 = Target("cuda", CHIPS["h200"])
KINDS = [(inputs, MOMENTS) for inputs in (1, 2)] + [(inputs, SUMS) for inputs in (2, 3)]


def planned(chip, itemsize, shapes=SHAPES):
    for (groups, rows, channels), (inputs, sums) in itertools.product(shapes, KINDS):
        resident = make_resident(groups, rows, channels, itemsize, chip, inputs, sums)
        if resident is not None:
            t = resident_tiling(resident, groups, rows, channels, itemsize, inputs)
            yield (groups, rows, channels, inputs, sums), resident, t


def work_of(t):
    """What each block of threads does in each turn: {(slot, member): [(unit, group, block, split), ...]}."""
    work = {}
    for index in range(t.grid):
        slot, member = t.slot(index)
        split, within = t.member(member)
        units = [t.unit(slot, turn) for turn in range(t.turns(slot))]
        work[slot, member] = [(unit, *t.unit_place(unit, within), split) for unit in units]
    return work


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chip", ["h100", "h200", "b200"])
def test_every_plan_fits_the_chip_and_its_blocks_are_on_it_together(chip, itemsize):
    chip, found = CHIPS[chip], 0
    for (_, rows, channels, inputs, sums), resident, t in planned(chip, itemsize):
        found += 1
        assert not_co_resident(resident, chip, itemsize, inputs, sums) is None
        assert resident.cluster == (resident.members <= LARGEST_CLUSTER)
        assert resident.cluster or t.grid <= chip.cores
        # 512 threads with 128 registers each are all that a multiprocessor has.
        assert resident.warpgroups <= 4 and resident.warpgroups * resident.tiles <= 32
        tiles = resident.warpgroups * resident.tiles * resident.tile_rows * resident.columns * itemsize * inputs
        assert tiles <= kept_bytes(chip, resident.columns, resident.warpgroups, sums)
        assert t.rows * t.width == rows * channels and t.samples == rows
        assert resident.slabs == t.turns(0) and all(t.turns(slot) >= 1 for slot in range(t.at_once))
    assert found > 300


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_part_of_the_array_is_some_blocks_and_units_are_not_shared_out_differently(itemsize):
    """Each (group, block of columns, row range) is worked on once, by a unit whose members have the same turn."""
    for (groups, *_), resident, t in planned(CHIPS["h200"], itemsize):
        if t.grid * resident.slabs > 600:
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
        covered = {
            column
            for block in range(t.blocks)
            for column in range(t.block_start(block), t.block_start(block) + t.columns)
        }
        assert covered == set(range(t.width))


def test_a_part_is_all_kept_and_hardly_anything_read_twice():
    for itemsize in (2, 4):
        for (_, rows, channels, inputs, _), resident, t in planned(CHIPS["h200"], itemsize):
            fetched = 0
            for worker in range(t.workers):
                seen, part = [], t.worker_range(worker)
                assert part.tiles <= resident.tiles <= MOST_TILES
                for index in range(part.tiles):
                    first, skipped = part.tile(index)
                    assert part.first <= first and first + t.tile_rows <= part.first + part.rows
                    seen += range(first + skipped, first + t.tile_rows)
                    fetched += t.tile_rows
                assert seen == list(range(part.first, part.first + part.rows))
            if rows * channels * itemsize > 4e6:
                assert fetched / t.rows * t.blocks * t.columns / t.width <= 1.1, (
                    rows,
                    channels,
                    itemsize,
                    inputs,
                    resident,
                )


def test_tiles_of_any_number_of_rows_fit():
    for rows, workers, room in itertools.product(range(1, 150), (1, 2, 3, 8), (8, 40, 200)):
        found = tiles_of(rows, workers, room)
        if workers > rows or -(-rows // workers) > room:
            assert found is None
        elif found is not None:
            tiles, tile_rows = found
            assert tiles * tile_rows <= room and tiles <= MOST_TILES and tile_rows <= rows // workers
            assert tiles * tile_rows >= -(-rows // workers)
        else:
            assert -(-rows // workers) + MOST_TILES > room or rows // workers * MOST_TILES < -(-rows // workers)


@pytest.mark.parametrize("centre", [0.0, 1e4])
@pytest.mark.parametrize("channels", [32, 128])
def test_the_merge_of_any_parts_is_the_whole(channels, centre):
    random, fold = np.random.default_rng(0), 128 // channels
    for rows, members, warpgroups in itertools.product((1, 2, 7, 12, 31), (1, 2, 3), (1, 2, 4)):
        found = tiles_of(rows, members * warpgroups, 64)
        if found is None:
            continue
        resident = Resident(fold, 128, warpgroups, members, 1, 1, *found, cluster=True)
        t = resident_tiling(resident, 1, rows * fold, channels, 4, 1)
        x = (centre + random.standard_normal((rows * fold, channels))).astype(np.float32)
        pivot, delta, var = merged_by_hand(t, x.reshape(rows, -1))
        wide = x.astype(np.float64)
        std = wide.std(0) + abs(wide - wide.mean(0)).max(0)
        assert_close(pivot.astype(np.float64) + delta, wide.mean(0), std, stored=np.float32, what="mean")
        assert_close(var, wide.var(0), std**2, what="var")


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
        resident = Resident(fold, columns, 1, -(-width // columns), 1, 1, 1, 4, cluster=False)
        if width * 4 % 16:
            continue
        t = resident_tiling(resident, 1, rows, channels, 4, 1)
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
    resident = Resident(1, 128, 1, members, at_once, -(-units // at_once), 1, 4, cluster=False)
    return resident_tiling(resident, units, 4 * members, 128, 4, 1)


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


LARGE = Problem(1, 25088, 512, "bfloat16")  # a forward of two units of 64 blocks


@pytest.mark.parametrize(
    ("operation", "change", "words"),
    [
        ("forward", {"at_once": 3}, "192 blocks wait for each other, and h200 has 132 multiprocessors"),
        ("forward", {"members": 133, "at_once": 1}, "133 blocks wait for each other"),
        ("forward", {"cluster": True}, "64 blocks are more than a cluster's 8"),
        ("forward", {"tile_rows": 15}, "room for"),
        ("backward", {"at_once": 3}, "198 blocks wait for each other"),
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
    with pytest.raises(BackendError, match="128 blocks wait for each other, and h200 has 66 multiprocessors"):
        check_plan(here, whole.plan, LARGE, target)


@pytest.mark.parametrize(("rows", "channels", "waits"), [(25088, 512, False), (1568, 2048, True), (4096, 64, True)])
def test_on_several_devices_only_clusters_wait(rows, channels, waits):
    """A collective beside the kernel could hold the multiprocessors that its other blocks need."""
    problem, target = Problem(1, rows, channels, "bfloat16"), dataclasses.replace(H200, several_devices=True)
    alone, here = own_plan(problem, H200), own_plan(problem, target)
    assert alone.plan.forward is not None and (here.plan.forward is not None) == waits
    for resident in (here.plan.forward, here.plan.backward):
        assert resident is None or (resident.cluster and resident.members <= LARGEST_CLUSTER)
    if not waits:
        with pytest.raises(BackendError, match="collectives between devices"):
            check_plan(here, alone.plan, problem, target)


def test_a_device_that_reports_more_than_the_table_is_not_believed():
    assert chip_of(device(CHIPS["h200"].device_kind, core_count=1000)) is CHIPS["h200"]


@pytest.mark.parametrize(
    "change",
    [
        {"fold": 3}, {"columns": 96}, {"members": 0}, {"members": 10**6}, {"at_once": 3}, {"slabs": 2}, {"tiles": 6},
        {"tiles": 9}, {"tile_rows": 0}, {"tile_rows": 10**4}, {"warpgroups": 5},
    ],
)  # fmt: skip
def test_a_plan_by_hand_that_does_not_fit_the_array_is_refused(change):
    resident = make_plan(1, 25088, 512, 2, CHIPS["h200"]).forward
    assert resident_tiling(resident, 1, 25088, 512, 2, 1)
    with pytest.raises(ValueError, match="does not fit"):
        resident_tiling(dataclasses.replace(resident, **change), 1, 25088, 512, 2, 1)


# --- what is chosen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((32, 14, 14, 1024), "bfloat16", "resident", "resident"),
        ((32, 7, 7, 2048), "float32", "resident", "resident"),
        ((128, 14, 14, 1024), "bfloat16", "slab", "slab"),
        ((128, 28, 28, 512), "bfloat16", "slab", "streaming"),
        ((128, 56, 56, 256), "bfloat16", "streaming", "streaming"),
        ((32, 56, 56, 64), "float32", "streaming", "streaming"),
        ((8, 16, 16, 3), "float32", "resident", "resident"),
    ],
)
def test_explain_shows_what_stays_on_chip(shape, dtype, forward, backward):
    plan = bn_fused.explain(shape, dtype, target="h200", backend="pallas_gpu").plan
    assert (plan.kind("forward"), plan.kind("backward"), plan.kind("moments")) == (forward, backward, "streaming")
    assert plan.passes("forward") == ((2, 1) if forward == "streaming" else (1, 1))
    assert plan.passes("backward") == ((4, 1) if backward == "streaming" else (2, 1))
    assert len(plan.launches("forward")) == (3 if forward == "streaming" else 1)
    assert ("Resident(" in repr(plan)) == (forward != "streaming" or backward != "streaming")


def test_a_residual_is_read_once_too():
    plan = bn_fused.explain(
        (32, 7, 7, 2048), jnp.bfloat16, activation="relu", residual=True, target="h200", backend="pallas_gpu"
    ).plan
    assert plan.passes("forward") == (2, 1) and plan.passes("backward") == (3, 2)
    streaming = dataclasses.replace(plan, forward=None, backward=None)
    assert streaming.passes("forward") == (3, 1) and streaming.passes("backward") == (5, 2)


def test_a_merge_reads_no_more_than_a_block_keeps():
    for itemsize in (2, 4):
        for (_, _, _, inputs, sums), resident, t in planned(CHIPS["h200"], itemsize):
            tile_bytes = t.rows / t.splits * t.columns * itemsize * inputs
            assert t.splits == 1 or t.splits * t.fold * sums * t.columns * 4 <= tile_bytes * 1.001, resident
