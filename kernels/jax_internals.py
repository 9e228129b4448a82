"""Every semi-private JAX interface the library stands on, one import each.

`tests/test_jax_internals.py` probes each name, so that a JAX release which changes one of them is reported by
that name and not by a failure somewhere inside a transform.
"""

import jax
from jax._src.dispatch import prim_requires_devices_during_lowering  # primitives whose lowering is told the devices
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning  # code for a device's part
from jax.extend.core import Primitive  # a primitive of our own
from jax.interpreters import ad  # derivative rules: primitive_jvps, primitive_transposes, Zero
from jax.interpreters.batching import fancy_primitive_batchers  # batching rules that see the axis name
from jax.interpreters.mlir import lower_fun, register_lowering  # lowering through traced jnp code

__all__ = [
    "Primitive",
    "SdyShardingRule",
    "ad",
    "custom_partitioning",
    "device_axis_names",
    "drop_sharding_and_manual_axes",
    "fancy_primitive_batchers",
    "is_partitioned",
    "lower_fun",
    "lowering_device",
    "output_type",
    "partitioned_mesh",
    "register_lowering",
    "tell_devices",
    "varying_axes",
    "vary_together",
    "zero_tangent",
]

ShapedArray = jax.core.ShapedArray


def device_axis_names():
    """The axis names bound to devices here (shard_map, pmap); every other bound name belongs to a vmap."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(array_or_type):
    """The device axes over which shard_map's type system says that a value differs."""
    return jax.typeof(array_or_type).manual_axis_type.varying


def vary_together(arrays):
    """Cast values to vary over the union of the device axes any of them varies over (shard_map, check_vma=True)."""
    union = frozenset().union(*(varying_axes(array) for array in arrays))

    def cast(array):
        missing = tuple(sorted(union - varying_axes(array), key=str))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return [cast(array) for array in arrays] if union else list(arrays)


def output_type(like, shape, dtype, axes):
    """The abstract value of an output: as `like`, with `axes` naming for each of its axes the one it comes from.

    `axes` has one entry per output axis, the index of the axis of `like` whose sharding it inherits, or None.
    """
    sharding = like.sharding
    spec = tuple(None if axis is None else sharding.spec[axis] for axis in axes)
    return like.update(
        shape=tuple(shape),
        dtype=dtype,
        weak_type=False,
        sharding=sharding.update(spec=jax.sharding.PartitionSpec(*spec)),
    )


def is_partitioned(context):
    """Whether a lowering context is that of a program which XLA itself partitions over several devices."""
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices > 1
    # Inside shard_map: the axes that it leaves to XLA.
    return any(size > 1 and name not in axes.manual_axes for name, size in axes.mesh.shape.items())


def partitioned_mesh(context):
    """The mesh over which XLA partitions a program in terms that `custom_partitioning` can decode; else None.

    There is none inside of a shard_map that leaves axes to XLA, where the arrays lie on no mesh with named axes (or
    on several), and under `jax.export`, whose programs cannot hold a process's callbacks.
    """
    module = context.module_context
    axes = module.axis_context
    devices, mesh = getattr(axes, "device_assignment", None), getattr(axes, "abstract_mesh", None)
    if module.lowering_parameters.for_export or not devices or mesh is None or mesh.empty:
        return None
    return mesh


def tell_devices(primitive):
    """Have JAX say in a primitive's lowering contexts for which devices it lowers; see `lowering_device`."""
    prim_requires_devices_during_lowering.add(primitive)


def lowering_device(context, platform):
    """A device of those that a context lowers for, if it is one of the platform; None where that is not known.

    It is not known under `jax.export` for another platform than this process's.
    """
    axes = context.module_context.axis_context
    devices = getattr(axes, "device_assignment", None)
    if devices is None and isinstance(getattr(axes, "mesh", None), jax.sharding.Mesh):
        devices = tuple(axes.mesh.devices.flat)
    if not devices:
        return None
    canonical = {"cuda": "gpu", "rocm": "gpu"}
    is_one = canonical.get(devices[0].platform, devices[0].platform) == canonical.get(platform, platform)
    return devices[0] if is_one else None


def zero_tangent(value):
    """The symbolic zero tangent of a primal value."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def drop_sharding_and_manual_axes(context):
    """A lowering context whose types carry neither explicit sharding nor device axes, so that any code traces in it."""

    def plain(types):
        return [ShapedArray(type_.shape, type_.dtype) for type_ in types]

    return context.replace(avals_in=plain(context.avals_in), avals_out=plain(context.avals_out))
