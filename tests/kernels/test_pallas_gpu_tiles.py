"""The index arithmetic of the backend `pallas_gpu`: what is worked on, by whom, and with a kernel's integers the same.

The tests call the functions that the kernels call, with Python's ints on all indices of small arrays.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_fused.kernels.backends.pallas_gpu.merges import MERGE_WARPGROUPS
from bn_fused.kernels.backends.pallas_gpu.plan import Plan, tiling
from bn_fused.kernels.backends.pallas_gpu.resident_plan import Resident, resident_tiling, tiles_of
from bn_fused.kernels.backends.pallas_gpu.tiles import WARPGROUP, ResidentTiling, share


def small_tilings():
    """Every way to cut a few rows, with tiles as small as the shared memory that is given to them."""
    for rows, splits, warpgroups, most_rows in itertools.product(range(1, 34), (1, 2, 3, 5), (1, 2, 4), (1, 2, 4, 8)):
        if splits * warpgroups <= rows:
            plan = Plan(1, 128, splits, warpgroups, 2, ring_bytes=warpgroups * 2 * most_rows * 128 * 4)
            yield tiling(plan, 1, rows, 128, 4, inputs=1)


def test_every_row_is_worked_on_exactly_once():
    for t in small_tilings():
        seen = []
        for split, warpgroup in itertools.product(range(t.splits), range(t.warpgroups)):
            worker = t.worker_range(t.worker(split, warpgroup))
            for index in range(worker.tiles):
                first, skipped = worker.tile(index)
                assert first >= 0 and first + t.tile_rows <= t.rows and 0 <= skipped < t.tile_rows, t
                seen += range(first + skipped, first + t.tile_rows)
        assert seen == list(range(t.rows)), t


def test_a_worker_reads_no_rows_but_its_own():
    for t in small_tilings():
        for number in range(t.workers):
            worker = t.worker_range(number)
            assert worker.rows == t.worker_rows(number) >= t.tile_rows
            for index in range(worker.tiles):
                first, _ = worker.tile(index)
                assert worker.first <= first and first + t.tile_rows <= worker.first + worker.rows


def test_the_rows_of_a_split_are_those_of_its_warpgroups():
    for t in small_tilings():
        for split in range(t.splits):
            workers = [t.worker(split, warpgroup) for warpgroup in range(t.warpgroups)]
            assert t.split_rows(split) == sum(t.worker_rows(worker) for worker in workers)


def test_every_part_of_an_array_is_one_blocks():
    for groups, rows, channels, splits, columns in itertools.product(
        (1, 3), (5, 9), (128, 300, 512), (1, 5), (128, 256)
    ):
        if columns <= channels:
            t = tiling(Plan(1, columns, splits, 1, 1, ring_bytes=1 << 16), groups, rows, channels, 4, inputs=1)
            parts = itertools.product(range(groups), range(t.blocks), range(splits))
            assert [t.place(index) for index in range(t.grid)] == list(parts)
            merged = [t.merge_place(index) for index in range(groups * t.merge_blocks)]
            assert merged == list(itertools.product(range(groups), range(t.merge_blocks)))


def test_every_partial_result_is_added_up_once():
    for parts, number in itertools.product((1, 2, 4, MERGE_WARPGROUPS), range(1, 100)):
        shares = [share(number, index, parts) for index in range(parts)]
        assert [entry for first, end in shares for entry in range(first, end)] == list(range(number))
    for splits, fold in itertools.product((1, 2, 5), (1, 2, 8)):
        t = tiling(Plan(fold, 128, splits, 1, 1, ring_bytes=1 << 16), 1, 8 * fold, 128, 4, inputs=1)
        entries = [t.entry(index) for index in range(t.entries)]
        assert entries == list(itertools.product(range(splits), range(fold)))


def test_a_merge_meets_every_copy_of_its_channels_once():
    for channels, fold in ((8, 16), (24, 16), (65, 3), (96, 4), (136, 2), (1, 200)):
        plan = Plan(fold, 128, 1, 1, 2, ring_bytes=2 * 4 * 128 * 4)
        t = tiling(plan, 1, 4 * fold, channels, 4, 1) if fold * channels % 4 == 0 else None
        for block in range(t.merge_blocks if t else 0):
            start = t.merge_start(block)
            # What the stream's kernel has written: the row, and the first block's columns once more.
            padded = np.arange(t.padded_width) % t.width
            windows = [padded[t.copy_start(start, copy) :][:WARPGROUP] for copy in range(fold)]
            for lane, column in enumerate(range(start, start + WARPGROUP)):
                met = sorted(window[lane] for window in windows)
                assert met == list(range(column % channels, t.width, channels))


# --- with a kernel's integers ---------------------------------------------------------------------------------


def calls(t):
    """The functions of indices that the kernels call, each with all arguments that it is called with there."""
    workers, splits, blocks, copies = range(t.workers), range(t.splits), range(t.blocks), range(t.fold)
    starts = [t.block_start(block) for block in blocks]
    most_tiles = range(t.worker_range(0).tiles)

    def worker_range(worker):
        part = t.worker_range(worker)
        return part.first, part.rows, part.tiles

    yield t.worker, itertools.product(splits, range(t.warpgroups))
    yield t.worker_rows, zip(workers)
    yield worker_range, zip(workers)
    yield lambda worker, index: t.worker_range(worker).tile(index), itertools.product(workers, most_tiles)
    yield t.split_rows, zip(splits)
    yield t.block_start, zip(blocks)
    yield t.entry, zip(range(t.entries))
    if isinstance(t, ResidentTiling):
        slots, members, units = range(t.at_once), range(t.members), range(t.units)
        yield lambda warpgroup: share(t.entries, warpgroup, t.warpgroups), zip(range(t.warpgroups))
        yield t.slot, zip(range(t.grid))
        yield t.member, zip(members)
        yield t.turns, zip(slots)
        yield t.unit, itertools.product(slots, range(t.turns(0)))
        yield t.unit_place, itertools.product(units, range(t.unit_blocks))
        yield t.copy_start, itertools.product(map(t.partial_start, starts), copies)
    else:
        yield lambda warpgroup: share(t.entries, warpgroup, MERGE_WARPGROUPS), zip(range(MERGE_WARPGROUPS))
        yield t.place, zip(range(t.grid))
        yield t.merge_place, zip(range(t.groups * t.merge_blocks))
        yield t.merge_start, zip(range(t.merge_blocks))
        yield t.copy_start, itertools.product(map(t.merge_start, range(t.merge_blocks)), copies)


def numbers_of(result):
    return result if isinstance(result, tuple) else (result,)


# Groups, rows, channels, fold, columns, splits, warpgroups, and the rows of a tile that there is room for.
CUTS = [
    (1, 23, 128, 1, 128, 2, 2, 4),
    (3, 33, 300, 1, 256, 5, 4, 2),
    (2, 31, 65, 4, 128, 3, 1, 8),
    (1, 24, 24, 16, 256, 2, 4, 8),
]


@pytest.mark.parametrize("resident", [False, True], ids=["streaming", "resident"])
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
def test_a_kernels_integers_give_the_same_numbers_in_32_bits(cut, x64, resident):
    groups, rows, channels, fold, columns, splits, warpgroups, most_rows = cut
    sizes = groups, rows * fold, channels, 4
    blocks = -(-channels * fold // columns)
    if resident:
        members, units = (splits, groups * blocks) if fold == 1 else (splits * blocks, groups)
        tiles, tile_rows = tiles_of(rows, splits * warpgroups, 64)
        plan = Resident(
            fold, columns, warpgroups, members, 2 if units > 1 else 1, -(-units // 2), tiles, tile_rows, False
        )
        t = resident_tiling(plan, *sizes, inputs=1)
    else:
        ring_bytes = warpgroups * 2 * most_rows * columns * 4
        t = tiling(Plan(fold, columns, splits, warpgroups, 2, ring_bytes), *sizes, inputs=1)
    functions, arguments = zip(*((function, list(each)) for function, each in calls(t)), strict=True)
    expected = [
        [numbers_of(function(*one)) for one in each] for function, each in zip(functions, arguments, strict=True)
    ]
    assert all(type(number) is int for each in expected for one in each for number in one)

    @jax.jit
    def traced(arguments):
        pairs = zip(functions, arguments, strict=True)
        return [numbers_of(jax.vmap(function)(*columns)) for function, columns in pairs]

    with jax.enable_x64(x64):
        found = traced([[jnp.asarray(one, jnp.int32) for one in zip(*each, strict=True)] for each in arguments])
    for function, results, numbers in zip(functions, found, expected, strict=True):
        assert all(result.dtype == jnp.int32 for result in results), function
        np.testing.assert_array_equal(np.stack(results, -1), numbers, err_msg=str(function))
