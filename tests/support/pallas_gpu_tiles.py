"""Arrays for the tiles of `pallas_gpu`, and their moments merged as its kernels merge them, in numpy."""

import numpy as np

from support.tolerances import assert_close

SHAPES = [
    (groups, rows, channels)
    for groups in (1, 3)
    for rows in (1, 2, 8, 49, 96, 2048, 6272, 100352, 4096 * 49 + 1)
    for channels in (1, 3, 8, 17, 24, 64, 65, 96, 128, 136, 256, 960, 1000, 2048, 8192)
]


def merged_by_hand(t, x):
    """The kernels' moments of x [rows, width] in float32, worker by worker: pivot, delta and variance per channel."""
    one = np.float32
    parts = {}
    for split in range(t.splits):
        merged = []
        for warpgroup in range(t.warpgroups):
            worker = t.worker_range(split, warpgroup)
            first = worker.tile_row(0)
            pivot = x[first : first + t.tile_rows].mean(0, dtype=one)
            sums, squares = np.zeros_like(pivot), np.zeros_like(pivot)
            for index in range(worker.tiles):
                first, skipped = worker.tile_row(index), worker.skipped(index)
                d = x[first + skipped : first + t.tile_rows] - pivot
                sums, squares = sums + d.sum(0, dtype=one), squares + (d * d).sum(0, dtype=one)
            n = one(worker.rows)
            merged.append((pivot, sums / n, np.maximum(squares - sums * (sums / n), 0), n))
        parts[split] = merge_by_hand(merged)
    columns = [np.arange(copy * t.channels, (copy + 1) * t.channels) for copy in range(t.fold)]
    entries = [
        (*(value[where] for value in parts[split]), one(t.split_rows(split)))
        for split in range(t.splits)
        for where in columns
    ]
    pivot, delta, squares = merge_by_hand(entries)
    return pivot, delta, squares / one(t.samples)


def merge_by_hand(parts):
    pivot, total = parts[0][0], sum(part[3] for part in parts)
    offsets = [(part[0] - pivot) + part[1] for part in parts]
    delta = sum(offset * (part[3] / total) for offset, part in zip(offsets, parts, strict=True))
    squares = sum(part[2] + (offset - delta) ** 2 * part[3] for offset, part in zip(offsets, parts, strict=True))
    return pivot, delta, squares


def check_merged_by_hand(t, x):
    """Compare the kernels' moments of x [rows, channels] with float64."""
    pivot, delta, var = merged_by_hand(t, x.reshape(t.rows, t.width))
    wide = x.astype(np.float64)
    std = wide.std(0) + abs(wide - wide.mean(0)).max(0)
    assert_close(pivot.astype(np.float64) + delta, wide.mean(0), std, stored=np.float32, what="mean")
    assert_close(var, wide.var(0), std**2, what="var")
