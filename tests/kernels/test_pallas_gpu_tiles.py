"""The index arithmetic of the backend `pallas_gpu`: what is worked on, by whom, and with a kernel's integers the same.

The tests call the functions that the kernels call, with Python's ints on all indices of small arrays.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch, one_launch_tiling
from bn_fused.kernels.backends.pallas_gpu.plan import Plan, tiling
from bn_fused.kernels.backends.pallas_gpu.tiles import (
    FRAGMENT,
    LEAST_STAGES,
    LONGEST_TILE,
    MOST_STAGES,
    SPLITS_TOGETHER,
    WARPGROUP,
    OneLaunchTiling,
    ring_of,
)


def plan(fold=1, columns=128, splits=1, warpgroups=1, room=8, itemsize=4):
    """With room for so many rows of tiles of one array in each warpgroup's ring."""
    return Plan(fold, columns, splits, warpgroups, ring_bytes=warpgroups * room * columns * itemsize)


def small_tilings():
    """Every way to cut a few rows, with tiles as small as the shared memory that is given to them."""
    ways = itertools.product(range(1, 34), (1, 2, 3, 5), (1, 2, 4), (2, 4, 8, 20, 40), (128, 256))
    for rows, splits, warpgroups, room, columns in ways:
        if splits * warpgroups <= rows:
            yield tiling(plan(1, columns, splits, warpgroups, room), 1, rows, columns, 4, inputs=1)


def workers(t):
    return itertools.product(range(t.splits), range(t.warpgroups))


def test_every_row_is_added_up_exactly_once_and_written_from_the_workers_own_tiles():
    for t in small_tilings():
        seen = []
        for split, warpgroup in workers(t):
            worker, written = t.worker_range(split, warpgroup), set()
            own = range(worker.first, worker.first + worker.rows)
            for index in range(worker.tiles):
                first, skipped = worker.tile_row(index), worker.skipped(index)
                tile = range(first, first + t.tile_rows)
                assert own.start <= tile.start and tile.stop <= own.stop and 0 <= skipped < t.tile_rows, t
                # Only the last tile has rows of another, and only of the one before: the two are written in turn.
                assert not skipped or index == worker.tiles - 1
                seen += tile[skipped:]
                written |= set(tile)
            assert written == set(own), t
        assert seen == list(range(t.rows)), t


def test_the_rows_of_a_split_are_those_of_its_warpgroups():
    for t in small_tilings():
        for split in range(t.splits):
            of_warpgroups = [t.worker_range(split, warpgroup).rows for warpgroup in range(t.warpgroups)]
            assert t.split_rows(split) == sum(of_warpgroups)
            assert max(of_warpgroups) - min(of_warpgroups) <= 1 <= min(of_warpgroups)


def test_a_tile_is_a_number_of_whole_fragments_which_is_one_of_whole_turns():
    for t in small_tilings():
        fragments, more = divmod(t.tile_rows, t.fragment_rows)
        assert more == 0 and fragments % t.fragments_at_once == 0
        # Four neighbouring values a thread, or fewer where the rows do not suffice.
        assert WARPGROUP <= t.fragment_rows * t.columns <= FRAGMENT


@pytest.mark.parametrize("columns", [128, 256])
def test_a_ring_has_room_for_its_tiles_and_as_many_as_it_takes_to_use_one_while_another_comes(columns):
    for least, more, room in itertools.product([*range(1, 70), 255, 256, 257, 600, 3000], (0, 1), range(90)):
        most, found = least + more, ring_of(least, least + more, room, columns)
        if room < min(LEAST_STAGES, most):
            assert found is None
            continue
        tiles, tile_rows, stages = found
        assert stages * tile_rows <= room and 1 <= tile_rows <= min(least, LONGEST_TILE)
        assert tiles == -(-most // tile_rows)
        assert min(LEAST_STAGES, tiles) <= stages <= min(tiles, MOST_STAGES)


def test_every_part_of_an_array_is_one_blocks():
    for groups, rows, channels, splits, columns in itertools.product(
        (1, 3), (5, 9), (128, 300, 512), (1, 5), (128, 256)
    ):
        if columns <= channels:
            t = tiling(plan(1, columns, splits, room=64), groups, rows, channels, 4, inputs=1)
            parts = itertools.product(range(groups), range(t.blocks), range(splits))
            assert [t.place(index) for index in range(t.grid)] == list(parts)
            merged = [t.merge_place(index) for index in range(groups * t.merge_blocks)]
            assert merged == list(itertools.product(range(groups), range(t.merge_blocks)))


def test_every_partial_result_is_added_up_once():
    for splits, fold, together in itertools.product(range(1, 14), (1, 2, 8), (1, 2, SPLITS_TOGETHER)):
        t = tiling(plan(fold, splits=splits), 1, 16 * fold, 128, 4, inputs=1)
        seen = []
        for first, copy in (t.entry(index, together) for index in range(t.entries(together))):
            # The rows of a fragment that stand behind the last partial result are in memory, and not added up.
            assert first + together <= t.padded_splits
            seen += [(split, copy) for split in range(first, first + together) if split < t.splits]
        assert sorted(seen) == list(itertools.product(range(splits), range(fold)))


def test_a_merge_meets_every_copy_of_its_channels_once():
    for channels, fold in ((8, 16), (24, 16), (65, 3), (96, 4), (136, 2), (1, 200)):
        t = tiling(plan(fold), 1, 4 * fold, channels, 4, 1) if fold * channels % 4 == 0 else None
        for block in range(t.merge_blocks if t and t.copies > 1 else 0):
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
    splits, warpgroups, blocks, copies = range(t.splits), range(t.warpgroups), range(t.blocks), range(t.fold)
    starts = [t.block_start(block) for block in blocks]
    most_tiles = range(t.worker_range(0, 0).tiles)

    def worker_range(split, warpgroup):
        part = t.worker_range(split, warpgroup)
        return part.first, part.rows, part.tiles

    def merges(together):
        entries = t.entries(together)
        yield lambda index: t.entry(index, together), zip(range(entries))
        yield t.split_rows, zip(range(t.padded_splits))

    yield worker_range, workers(t)
    for warpgroup in warpgroups:  # as where the partial results of a block are merged
        yield functools.partial(worker_range, warpgroup=warpgroup), zip(splits)
    every_tile = list(itertools.product(splits, warpgroups, most_tiles))
    yield lambda *worker: t.worker_range(*worker[:2]).tile_row(worker[2]), every_tile
    yield lambda *worker: t.worker_range(*worker[:2]).skipped(worker[2]), every_tile
    yield t.block_start, zip(blocks)
    if isinstance(t, OneLaunchTiling):
        slots, members, units = range(t.at_once), range(t.members), range(t.units)
        yield from merges(t.fragment_rows)
        yield t.slot, zip(range(t.grid))
        yield t.member, zip(members)
        yield t.turns, zip(slots)
        yield t.unit, itertools.product(slots, range(t.turns(0)))
        yield t.unit_place, itertools.product(units, range(t.unit_blocks))
        yield t.copy_start, itertools.product(map(t.partial_start, starts), copies)
    else:
        yield from merges(SPLITS_TOGETHER)
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


@pytest.mark.parametrize("launches", ["one launch", "streaming"])
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
def test_a_kernels_integers_give_the_same_numbers_in_32_bits(cut, x64, launches):
    groups, rows, channels, fold, columns, splits, warpgroups, room = cut
    sizes = groups, rows * fold, channels, 4
    blocks = -(-channels * fold // columns)
    if launches == "one launch":
        members, units = (splits, groups * blocks) if fold == 1 else (splits * blocks, groups)
        at_once = 2 if units > 1 else 1
        ring = ring_of(rows // (splits * warpgroups), -(-rows // (splits * warpgroups)), room, columns)
        one = OneLaunch(fold, columns, warpgroups, members, at_once, -(-units // at_once), *ring, cluster=False)
        t = one_launch_tiling(one, *sizes, inputs=1)
    else:
        t = tiling(plan(fold, columns, splits, warpgroups, room), *sizes, inputs=1)
    functions, arguments = zip(*((function, list(each)) for function, each in calls(t)), strict=True)
    expected = [
        [numbers_of(function(*one)) for one in each] for function, each in zip(functions, arguments, strict=True)
    ]
    assert all(type(number) is int for each in expected for one in each for number in one)

    @jax.jit
    def traced(arguments):
        pairs = zip(functions, arguments, strict=True)
        return [
            numbers_of(jax.vmap(lambda *given, f=function: as_arrays(f(*given)))(*columns))
            for function, columns in pairs
        ]

    def as_arrays(result):
        # What does not depend on the indices stays a Python int in a kernel, of no width of its own.
        return jax.tree.map(lambda number: jnp.int32(number) if isinstance(number, int) else number, result)

    with jax.enable_x64(x64):
        found = traced([[jnp.asarray(one, jnp.int32) for one in zip(*each, strict=True)] for each in arguments])
    for function, results, numbers in zip(functions, found, expected, strict=True):
        assert all(result.dtype == jnp.int32 for result in results), function
        np.testing.assert_array_equal(np.stack(results, -1), numbers, err_msg=str(function))
