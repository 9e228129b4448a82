"""Operations on arrays that XLA partitions over devices: each device's part is computed by itself.

For code that it cannot see into XLA would gather x whole on every device, and of jnp's it makes more exchanges than
there need be. `partitioned` wraps an operation of any backend so that XLA asks how x lies on the devices, keeps it so,
and compiles the operation for a device's part:

    forward             local moments, one packed all-reduce over the devices that share the rows, local normalisation
    backward            local sums, one packed all-reduce, dx from the totals
    moments             local moments, one packed all-reduce
    normalise_backward  local, one packed all-reduce of the sums
    the others          local

Values per channel lie as x's channels do, y and dx as x does. Where no rows are shared nothing is exchanged, and
the operation is the one of one device. TPUs' compiler does not ask: kernels are refused there, and XLA partitions jnp.
"""

import hashlib
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bn_fused.kernels.contract import (
    COEFFICIENTS,
    LIKE_X,
    MASK,
    OPERATIONS,
    PER_CHANNEL,
    PER_GROUP,
    accumulation_dtype,
    blend,
    moments_cotangents,
    reciprocal_std,
    statistics_cotangents,
)
from bn_fused.kernels.jax_internals import SdyShardingRule, custom_partitioning
from bn_fused.kernels.layout import CHANNEL, GROUP, ROW, axes_of, channel_shape, count_rows, group_shape, sum_rows
from bn_fused.kernels.merging import Devices, merge_moments

# Those whose compiler asks how to partition an operation. libtpu does not: "Custom emitter for CustomSPMDPartitioning
# not found".
ASKING_PLATFORMS = ("cpu", "cuda", "rocm")


def partitioned(run, run_part, operation, spec, names, backend):
    """A function of an operation's operands (in the order of `names`) that XLA partitions as described above.

    `run(operation, spec, **operands)` computes an operation on whole arrays, `run_part` on a device's part. `backend`
    is the name of the one chosen.
    """
    kinds = [OPERATIONS[operation].operands[name] for name in names]
    result_kinds = list(OPERATIONS[operation].result_kinds(names).values())
    place_of_x, x64 = kinds.index(LIKE_X), jax.config.jax_enable_x64

    def shardings(mesh, arguments):
        x = arguments[place_of_x]
        placed = _divisible(mesh, x.shape, x.sharding)

        def of(kind):
            return NamedSharding(mesh, PartitionSpec(*_places(kind, placed, spec.layout)))

        return placed, tuple(map(of, kinds)), tuple(map(of, result_kinds))

    def infer(mesh, arguments, results):
        del results
        return shardings(mesh, arguments[:-1])[2]

    def partition(mesh, arguments, results):
        del results
        placed, operand_shardings, result_shardings = shardings(mesh, arguments[:-1])
        rows = tuple(name for axis in axes_of(spec.layout, ROW) for name in placed[axis])

        def on_a_part(*values):
            operands = dict(zip(names, values[:-1], strict=True))
            # XLA may ask from a thread of its own, which has not this one's settings; and a part lies on one device,
            # no mesh that the program is traced under says anything about it.
            with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return tuple(_compute(run_part, operation, spec, operands, rows))

        identity = NamedSharding(mesh, PartitionSpec(None))
        return mesh, on_a_part, result_shardings, (*operand_shardings, identity)

    @custom_partitioning
    def whole(*values):
        return tuple(run(operation, spec, **dict(zip(names, values[:-1], strict=True))))

    whole.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=SdyShardingRule(
            tuple(_factors(kind, spec.layout) for kind in kinds) + (("identity",),),
            tuple(_factors(kind, spec.layout) for kind in result_kinds),
        ),
    )
    # What is computed on the parts is not in the text that XLA is given, by which JAX's compilation cache knows a
    # program: two operations that differ in their eps alone would be one to it, but for this constant.
    identity = hashlib.sha256(repr((operation, names, spec, backend)).encode()).digest()
    identity = tuple(int.from_bytes(identity[place : place + 4], "little") for place in range(0, 32, 4))

    def call(*values):
        return list(whole(*values, jnp.asarray(identity, jnp.uint32)))

    return call


def _axes_of_kind(kind, layout):
    """For each axis of an operand or result the axis of x that it goes with; None for one of its own."""
    groups = axes_of(layout, GROUP)
    return {
        LIKE_X: tuple(range(len(layout))),
        MASK: tuple(None if role == CHANNEL else axis for axis, role in enumerate(layout)),
        PER_CHANNEL: (*groups, layout.index(CHANNEL)),
        PER_GROUP: groups,
        COEFFICIENTS: (*groups, None),
    }[kind]


def _factors(kind, layout):
    """How Shardy names an operand's or result's axes: axes of one name are sharded alike."""
    return tuple(f"own_{kind}" if axis is None else f"axis{axis}" for axis in _axes_of_kind(kind, layout))


def _divisible(mesh, shape, sharding):
    """For each axis of x the mesh axes it is sharded over; none where the parts would not be equally large."""
    spec = () if sharding is None else tuple(sharding.spec)
    spec = (*spec, *(None,) * (len(shape) - len(spec)))
    placed = []
    for size, names in zip(shape, spec, strict=True):
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        placed.append(names if size % math.prod(mesh.shape[name] for name in names) == 0 else ())
    return placed


def _places(kind, placed, layout):
    return [None if axis is None else (placed[axis] or None) for axis in _axes_of_kind(kind, layout)]


# ------------------------------------------------------------------------------------------ on a device's part


def _compute(run, operation, spec, operands, rows):
    """The operation's results on a part, with `rows` the names of the mesh axes that share the rows."""
    if not rows or operation in ("normalise", "moments_backward"):
        return run(operation, spec, **operands)
    return {
        "forward": _forward,
        "backward": _backward,
        "moments": _moments,
        "normalise_backward": _normalise_backward,
    }[operation](run, spec, operands, rows)


def _only(operation, operands):
    return {name: operands[name] for name in OPERATIONS[operation].operands if name in operands}


def _moments(run, spec, operands, rows):
    x, mask = operands["x"], operands.get("mask")
    pivot, delta, var = run("moments", spec, **_only("moments", operands))
    dtype = accumulation_dtype(x.dtype)
    groups, shape = group_shape(x.shape, spec.layout), channel_shape(x.shape, spec.layout)
    if mask is None:
        count = jnp.full(groups, count_rows(x.shape, spec.layout), dtype)
    else:
        count = sum_rows(mask.astype(dtype), spec.layout)[..., 0]

    def merge(pivot, delta, var, count):
        return merge_moments(pivot, delta, var, count, Devices(tuple(rows)))[:3]

    values = [jnp.reshape(value, (-1, shape[-1])) for value in (pivot, delta, var)]
    merged = jax.vmap(merge)(*values, jnp.reshape(count, (-1,)))
    return tuple(jnp.reshape(value, shape) for value in merged)


def _forward(run, spec, operands, rows):
    pivot, delta, var = _moments(run, spec, operands, rows)
    new = blend(pivot, delta, var, *(operands[name] for name in ("running_mean", "running_var", "coefficients")))
    offset, rstd = new.offset, reciprocal_std(new.norm_var, spec.eps)
    statistics = {"pivot": pivot, "offset": offset, "rstd": rstd}
    (y,) = run("normalise", spec, **_only("normalise", operands | statistics))
    return y, pivot, delta, var, offset, rstd, new.new_running_mean, new.new_running_var


def _normalise_backward(run, spec, operands, rows):
    dx, sum_dz, sum_dz_xhat, *dresidual = run("normalise_backward", spec, **_only("normalise_backward", operands))
    sum_dz, sum_dz_xhat = jax.lax.psum(jnp.stack([sum_dz, sum_dz_xhat]), rows)
    return dx, sum_dz, sum_dz_xhat, *dresidual


def _backward(run, spec, operands, rows):
    dx, sum_dz, sum_dz_xhat, *dresidual = _normalise_backward(run, spec, operands, rows)
    from_normalisation = statistics_cotangents(operands["weight"], operands["rstd"], sum_dz, sum_dz_xhat)
    dmean, dvar = moments_cotangents(operands["dmean"], operands["dvar"], *from_normalisation, operands["batch"])
    moments = {"dmean": dmean, "dvar": dvar}
    (through,) = run("moments_backward", spec, **_only("moments_backward", operands | moments))
    return dx + through, sum_dz, sum_dz_xhat, *dresidual
