"""Every semi-private JAX interface the library stands on, one import each.

`tests/project/test_jax_internals.py` probes each name, so that a JAX release which changes one of them is reported by
that name and not by a failure somewhere inside a transform.
"""

import concurrent.futures
import functools
import types

import jax
import jax.numpy as jnp
from jax._src.checkify import error_checks, nan_error_check  # what checkify looks at in a primitive's results
from jax._src.core import get_axis_env  # the sizes of the named axes around a traced operation
from jax._src.dispatch import prim_requires_devices_during_lowering  # primitives whose lowering is told the devices
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning  # code for a device's part
from jax.extend.core import Primitive  # a primitive of our own
from jax.interpreters import ad  # derivative rules: primitive_jvps, primitive_transposes, Zero
from jax.interpreters.batching import fancy_primitive_batchers  # batching rules that see the axis name
from jax.interpreters.mlir import lower_fun, register_lowering  # lowering through traced jnp code
from jax.interpreters.xla import apply_primitive  # compiles and runs one primitive

__all__ = [
    "Primitive",
    "SdyShardingRule",
    "ad",
    "axis_size",
    "barrier_signal",
    "barrier_wait",
    "custom_partitioning",
    "define_evaluation",
    "device_axis_names",
    "fancy_primitive_batchers",
    "is_one_devices_program",
    "is_partitioned",
    "is_traced",
    "lower_fun",
    "lower_plainly",
    "lowering_device",
    "made_by",
    "output_type",
    "partitioned_mesh",
    "register_lowering",
    "runs_on_several_devices",
    "shard_like",
    "tell_devices",
    "threads_agree_on_x64",
    "varying_axes",
    "vary_together",
    "zero_tangent",
]

ShapedArray = jax.core.ShapedArray


def define_evaluation(primitive):
    """Have a primitive computed outside of `jax.jit`, and looked at by JAX's debuggers, as JAX's own ones are.

    It is compiled once per parameters and operand types, under `jax.disable_jit` too. `jax.debug_nans` and
    `jax.debug_infs` name it where its results hold such values; so does `checkify`, of NaN.
    """
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    error_checks[primitive] = functools.partial(nan_error_check, primitive)


def axis_size(name):
    """The size of a named axis, an int, or what `jax.export` has for one that it leaves open. NameError if unbound.

    `jax.lax.axis_size` is for ints.
    """
    return get_axis_env().axis_size(name)


def is_traced(value):
    """Whether a value is one that a transform traces, which nobody knows yet."""
    return isinstance(value, jax.core.Tracer)


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


def shard_like(value, like, axes):
    """A value with the sharding that `like` has in its type: on meshes with explicit axes; elsewhere types have none.

    `axes` has one entry per axis of the value, the axis of `like` that it goes with, or None for one of its own.
    """
    sharding, own = jax.typeof(like).sharding, jax.typeof(value).sharding
    if sharding.mesh.empty:
        return value
    spec = jax.sharding.PartitionSpec(*(None if axis is None else sharding.spec[axis] for axis in axes))
    if own.spec == spec:
        # An array that a function in a shard_map closes over has another mesh in its type than what is traced there.
        meshes_differ = own.mesh != sharding.mesh and not own.mesh.empty
        return jnp.copy(value) if meshes_differ and not is_traced(value) else value
    return jax.sharding.reshard(value, jax.sharding.NamedSharding(sharding.mesh, spec))


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


def runs_on_several_devices(context):
    """Whether a lowering context is that of a program for several devices, whoever partitions it."""
    axes = context.module_context.axis_context
    return (axes.num_devices if hasattr(axes, "num_devices") else axes.mesh.size) > 1


def is_one_devices_program(context):
    """Whether a lowering context is that of a program for one device of one platform, which runs in this process."""
    module = context.module_context
    several = runs_on_several_devices(context) or len(module.platforms) > 1
    return not several and not module.lowering_parameters.for_export


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


def first_amd_architecture():
    """The architecture of the process's first AMD GPU, as "gfx942", which jax-triton compiles for; None without one."""
    from jaxlib import gpu_triton

    try:
        return gpu_triton.get_arch_details(0).split(":")[0]
    except (AttributeError, RuntimeError):  # neither of JAX's GPU plugins, or the one for NVIDIA, or no device
        return None


def zero_tangent(value):
    """The symbolic zero tangent of a primal value."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


MOST_FOLLOWED = 64  # values
_WITHOUT_PARENT = types.SimpleNamespace(parent=None)


def made_by(value, primitive):
    """Whether a value was traced, in the same program, from a result of a primitive by what keeps its sizes.

    False where that is not known: of an array, of an argument of the program, or of a part that is traced by itself (a
    jit or checkpoint inside it, the body of a loop).
    """
    shape = None
    seen, waiting = set(), [value]
    while waiting and len(seen) < MOST_FOLLOWED:
        tracer = waiting.pop()
        # Of a vmap and of derivatives: what they work on.
        while not hasattr(tracer, "parent"):
            tracer = getattr(tracer, "val", getattr(tracer, "primal", _WITHOUT_PARENT))
        equation = tracer.parent
        if equation is None or id(tracer) in seen:
            continue
        sizes = [size for size in tracer.shape if size != 1]
        if sizes != (shape := sizes if shape is None else shape):
            continue
        seen.add(id(tracer))
        if equation.primitive.name == primitive:
            return True
        waiting += equation.in_tracers
    return False


def lower_plainly(function, context, *values):
    """Lower a function of arrays, which returns a list, with types that carry no explicit sharding and no device axes.

    So any code traces in it, wherever it stands; and no sharding is written down that nobody asked for (a mesh that is
    set would have all that is traced replicated).
    """

    def plain(types):
        return [ShapedArray(type_.shape, type_.dtype) for type_ in types]

    context = context.replace(avals_in=plain(context.avals_in), avals_out=plain(context.avals_out))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return lower_fun(function, multiple_results=True)(context, *values)


def threads_agree_on_x64():
    """Whether the threads from which XLA asks back have this one's setting of 64-bit types.

    With JAX 0.10 `with jax.enable_x64()` holds in its own thread alone, and what XLA asks for has other types.
    """
    if jax.__version_info__ >= (0, 11):
        return True
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: jax.config.jax_enable_x64).result() == jax.config.jax_enable_x64


def barrier_signal(counter):
    """In a Mosaic GPU kernel: add one to a counter in global memory, behind all that the warpgroup has written."""
    import jax.experimental.mosaic.gpu as mgpu
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, counter):
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            _inline(llvm, None, [_address(counter)], "red.release.gpu.global.add.u32 [$0], 1;", "l")

    signal(counter)


def barrier_wait(counter, number, seconds):
    """In a Mosaic GPU kernel: wait until a counter in global memory is at least `number`; see what stood behind it.

    The kernel ends by a trap if that takes longer than these seconds.
    """
    import jax.experimental.mosaic.gpu as mgpu
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import cf, llvm

    # $0: 1 if the counter got there in time. Labels and registers in braces belong to this text alone.
    wait_for = f"""{{
        .reg .pred there, patient;
        .reg .b32 seen;
        .reg .b64 begin, now;
        mov.u64 begin, %globaltimer;
        WAIT:
        ld.acquire.gpu.global.u32 seen, [$1];
        setp.ge.u32 there, seen, {number};
        @there bra DONE;
        nanosleep.u32 20;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, begin;
        setp.lt.u64 patient, now, {seconds * 10**9};
        @patient bra WAIT;
        DONE:
        selp.u32 $0, 1, 0, there;
    }}"""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, counter):
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            i32 = ir.IntegerType.get_signless(32)
            in_time = _inline(llvm, i32, [_address(counter)], wait_for, "=r,l")
            in_time = llvm.trunc(ir.IntegerType.get_signless(1), in_time, 0)
            cf.assert_(in_time, "bn_fused: not all blocks of a kernel are on the device at the same time")
        mgpu.warpgroup_barrier()

    wait(counter)


def _address(reference):
    from jax.experimental.mosaic.gpu.utils import memref_ptr

    return memref_ptr(reference)


def _inline(llvm, result, operands, text, constraints):
    # ~{memory}: no load or store of the kernel's own is moved past it.
    constraints = f"{constraints},~{{memory}}"
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True)
