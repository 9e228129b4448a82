"""Plans of `pallas_gpu` given by hand for cases on a device: every kind that the kernels of one launch have."""

import dataclasses

import jax.numpy as jnp

from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import OneLaunch
from bn_fused.kernels.backends.pallas_gpu.plan import make_plan
from bn_fused.kernels.chips import CHIPS

from support.kernel_cases import Case


def by_hand(case, members, at_once, slabs, tiles, tile_rows, stages, **changes):
    """A case and a plan for it whose forward and backward are one launch, on 132 multiprocessors."""
    fields = {"fold": 1, "columns": 128, "warpgroups": 4, "cluster": False} | changes
    both = OneLaunch(
        members=members, at_once=at_once, slabs=slabs, tiles=tiles, tile_rows=tile_rows, stages=stages, **fields
    )
    itemsize = jnp.dtype(case.dtype).itemsize
    streaming = make_plan(case.groups, case.rows, case.channels, itemsize, CHIPS["h100"])
    return case, dataclasses.replace(streaming, forward=both, backward=both)


def of(channels, dtype="bfloat16", activation="gelu", residual=True, **fields):
    return Case(**{"rows": 6272} | fields, channels=channels, dtype=dtype, activation=activation, residual=residual)


# By kind: 98 rows of a warpgroup, or 49, or 196.
DEVICE_PLANS = {
    "resident": by_hand(of(1024, activation="relu", residual=False, rows=5376), 16, 8, 1, 6, 14, 6),
    "slab": by_hand(of(1024, activation="silu", residual=False), 32, 4, 2, 2, 25, 2),
    # dz is written, and most of it read again; tiles of a number of rows that is no multiple of a fragment's.
    "partial": by_hand(of(1024), 16, 8, 1, 14, 7, 3),
    "partial, unit after unit": by_hand(of(1024, "float32", groups=2), 16, 3, 6, 7, 14, 2),
    # The last units have fewer slots.
    "partial, y": by_hand(of(1024, activation="relu"), 16, 5, 2, 7, 16, 2),
    "partial, clusters": by_hand(of(1024, "float16", None), 8, 8, 1, 13, 16, 4, cluster=True),
    "partial, folded": by_hand(of(64, activation="relu", rows=12544), 64, 1, 1, 5, 5, 2, fold=2),
    "partial, overlapping, 256 columns": by_hand(of(1000, "float16", residual=False), 32, 4, 1, 4, 13, 3, columns=256),
    # Each block has all rows of its columns, and the last tile is moved back by all but one row.
    "partial, alone": by_hand(of(1024, rows=1025), 1, 8, 1, 17, 16, 2),
}
