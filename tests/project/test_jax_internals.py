"""JAX's semi-private interfaces, each probed by name: on a new JAX, this says which of them is gone or has changed.

Nothing here imports `bn_fused` before a test runs, because an interface that is gone makes that fail.
"""

import ast
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from support import ROOT

MODULE = ROOT / "kernels" / "jax_internals.py"
# Interfaces of JAX that it does not promise to keep.
SEMI_PRIVATE = ("jax._src", "jax.core", "jax.extend", "jax.interpreters", "jax.lib", "jaxlib")


def imports_of(path):
    """(module, name or None) of everything a file imports, absolutely."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def attributes_of(path):
    """The dotted names a file uses, such as jax.core.ShapedArray."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def is_semi_private(name):
    return any(name == module or name.startswith(f"{module}.") for module in SEMI_PRIVATE)


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, name in imports_of(MODULE) if module.split(".")[0] == "jax"],
)
def test_jax_still_exports(module, name):
    exporting = importlib.import_module(module)
    missing = f"jax {jax.__version__} has no {module}.{name}: bn_fused/kernels/jax_internals.py imports it"
    assert name is None or hasattr(exporting, name), missing


def test_only_one_module_uses_what_jax_does_not_promise_to_keep():
    elsewhere = {}
    for folder in ("bn_fused", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            used = {f"{module}.{name}" if name else module for module, name in imports_of(path)} | attributes_of(path)
            used = sorted(filter(is_semi_private, used))
            if used and path != MODULE:
                elsewhere[str(path.relative_to(ROOT))] = used
    assert not elsewhere
    assert is_semi_private("jax.interpreters.ad") and not is_semi_private("jax.numpy")


# --- one small probe for each name -----------------------------------------------------------------------------


def doubling(internals, name):
    """A primitive that doubles its one operand."""
    primitive = internals.Primitive(name)
    primitive.def_impl(lambda x: 2 * x)
    primitive.def_abstract_eval(lambda x: x.update(weak_type=False))
    internals.register_lowering(primitive, internals.lower_fun(lambda x: 2 * x, multiple_results=False))
    return primitive


def on_devices(function, check_vma=True):
    """Call a function of (an array split over device axis "d", an array that every device has whole)."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"in_specs": (P("d"), P()), "out_specs": P("d"), "check_vma": check_vma}
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs))(jnp.arange(4.0), jnp.ones(2))


def probe_primitive(internals):
    """a primitive of our own runs eagerly, with several results, and is traced under its name"""
    primitive = internals.Primitive("bn_fused_probe")
    primitive.multiple_results = True
    primitive.def_impl(lambda x, scale: [x, scale * x])
    primitive.def_abstract_eval(lambda x, scale: [x, x])
    assert primitive.bind(3.0, scale=2) == [3.0, 6.0]
    (equation,) = jax.make_jaxpr(lambda x: primitive.bind(x, scale=2))(3.0).eqns
    assert (equation.primitive.name, equation.params) == ("bn_fused_probe", {"scale": 2})


def probe_ad(internals):
    """ad.primitive_jvps and ad.primitive_transposes define derivatives, with ad.Zero for what is zero"""
    ad = internals.ad
    primitive, linear = (
        doubling(internals, "bn_fused_probe_square"),
        doubling(internals, "bn_fused_probe_double"),
    )
    seen = []

    def jvp(values, tangents):
        seen.append(isinstance(tangents[0], ad.Zero))
        return primitive.bind(*values), linear.bind(ad.instantiate_zeros(tangents[0]))

    def transpose(cotangent, value):
        assert ad.is_undefined_primal(value) and value.aval.shape == ()
        return [linear.bind(ad.instantiate_zeros(cotangent))]

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[linear] = transpose
    assert jax.grad(primitive.bind)(3.0) == 2.0
    assert jax.jvp(primitive.bind, (3.0,), (5.0,)) == (6.0, 10.0)
    assert seen == [False, False]


def probe_fancy_primitive_batchers(internals):
    """a batching rule gets the name and the size of the vmapped axis, also through scan"""
    primitive = doubling(internals, "bn_fused_probe_batched")
    seen = []

    def rule(axis, values, dims):
        seen.append((axis.name, axis.size))
        return primitive.bind(*values), dims[0]

    internals.fancy_primitive_batchers[primitive] = rule
    np.testing.assert_array_equal(jax.vmap(primitive.bind, axis_name="b")(jnp.arange(3.0)), 2 * np.arange(3.0))

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (primitive.bind(carry), None), x, None, length=2)[0]

    np.testing.assert_array_equal(jax.vmap(scanned, axis_name="b")(jnp.arange(3.0)), 4 * np.arange(3.0))
    assert set(seen) == {("b", 3)}
    jax.vmap(primitive.bind)(jnp.arange(2.0))
    assert seen[-1][1] == 2 and seen[-1][0] != "b"


def probe_lowering(internals):
    """register_lowering takes a rule (context, *values) for a platform, and lower_fun makes one of jnp code"""
    primitive = internals.Primitive("bn_fused_probe_lowered")
    primitive.def_abstract_eval(lambda x: x)
    seen = []

    def rule(context, value):
        seen.append([(type_.shape, type_.dtype) for type_ in (*context.avals_in, *context.avals_out)])
        return internals.lower_fun(lambda x: [x + 1], multiple_results=True)(context, value)

    internals.register_lowering(primitive, rule, platform="cpu")
    compiled = jax.jit(primitive.bind).trace(jnp.ones(2)).lower(lowering_platforms=("cpu",)).as_text()
    assert "add" in compiled
    assert seen == [[((2,), jnp.float32)] * 2]
    with pytest.raises(NotImplementedError, match="bn_fused_probe_lowered"):
        jax.jit(primitive.bind).trace(jnp.ones(2)).lower(lowering_platforms=("tpu",))


def probe_device_axis_names(internals):
    """the names of shard_map and pmap are told from those of vmap"""
    seen = []

    def look(*arrays):
        seen.append(set(internals.device_axis_names()))
        return arrays[0]

    jax.vmap(look, axis_name="b")(jnp.ones(2))
    on_devices(look)
    on_devices(look, check_vma=False)
    on_devices(lambda x, y: jax.vmap(look, axis_name="b")(x))
    jax.pmap(look, axis_name="p")(jnp.ones(2))
    assert seen == [set(), {"d"}, {"d"}, {"d"}, {"p"}]


def probe_varying_axes(internals):
    """shard_map's type system says over which device axes a value differs"""
    seen = []

    def look(split, whole):
        summed = jax.lax.psum(split, "d")
        seen.append([set(internals.varying_axes(value)) for value in (split, whole, summed)])
        return split

    on_devices(look)
    on_devices(look, check_vma=False)
    assert seen == [[{"d"}, set(), set()], [set(), set(), set()]]
    assert internals.varying_axes(jnp.ones(2)) == set()


def probe_vary_together(internals):
    """lax.pcast makes a replicated value vary, so that one primitive takes it with one that differs"""
    seen = []

    def look(split, whole):
        cast = internals.vary_together([split, whole])
        seen.append([set(internals.varying_axes(value)) for value in cast])
        return cast[0] + cast[1]

    np.testing.assert_array_equal(on_devices(look), 1 + np.arange(4.0))
    on_devices(look, check_vma=False)
    alone = [jnp.ones(2), jnp.ones(3)]
    assert all(one is other for one, other in zip(internals.vary_together(alone), alone, strict=True))
    assert seen == [[{"d"}, {"d"}], [set(), set()]]


def probe_output_type(internals):
    """an abstract value is rewritten with another shape, dtype and explicit sharding"""
    mesh = jax.make_mesh((2,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    array = jax.device_put(jnp.ones((4, 3)), jax.sharding.NamedSharding(mesh, P("e", None)))
    made = internals.output_type(jax.typeof(array), (3, 4), jnp.bfloat16, (None, 0))
    assert (made.shape, made.dtype, made.weak_type) == ((3, 4), jnp.bfloat16, False)
    assert made.sharding.spec == P(None, "e")


def probe_shard_like(internals):
    """a value gets the explicit sharding of another, and its cotangent the sharding that it had itself"""
    mesh = jax.make_mesh((2,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    like = jax.device_put(jnp.ones((3, 4)), jax.sharding.NamedSharding(mesh, P(None, "e")))
    value = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        made, pullback = jax.jit(lambda value: jax.vjp(lambda v: internals.shard_like(v, like, (1,)), value))(value)
        (cotangent,) = pullback(made)
    assert jax.typeof(made).sharding.spec == P("e") and jax.typeof(cotangent).sharding.spec == P(None)
    assert internals.shard_like(made, like, (1,)) is made
    assert internals.shard_like(value, jnp.ones((3, 4)), (1,)) is value
    np.testing.assert_array_equal(cotangent, value)


def probe_zero_tangent(internals):
    """a symbolic zero of a value's tangent type is made"""
    zero = internals.zero_tangent(jnp.ones((2, 3)))
    assert isinstance(zero, internals.ad.Zero)
    assert (zero.aval.shape, zero.aval.dtype) == ((2, 3), jnp.float32)
    assert internals.zero_tangent(jnp.ones(2, jnp.int32)).aval.dtype == jax.dtypes.float0


def probe_lower_plainly(internals):
    """below types of shardings and device axes a lowering rule traces code with plain types"""
    primitive = internals.Primitive("bn_fused_probe_plain")
    primitive.def_abstract_eval(lambda x: x)
    seen = []

    def traced(x):
        seen.append((set(internals.varying_axes(x)), jax.sharding.get_abstract_mesh().empty))
        return [x + jnp.ones(x.shape, x.dtype)]

    internals.register_lowering(primitive, lambda context, value: internals.lower_plainly(traced, context, value))
    np.testing.assert_array_equal(on_devices(lambda split, whole: primitive.bind(split)), 1 + np.arange(4.0))
    # Where a mesh with explicit axes is set, nothing is gathered that nobody asked for.
    mesh = jax.make_mesh((2,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    array = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, P("e")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: primitive.bind(x)).lower(array).compile()
    np.testing.assert_array_equal(compiled(array), 1 + np.arange(4.0))
    assert "all-gather" not in compiled.as_text()
    assert seen == [(set(), True)] * 2


def probe_threads_agree_on_x64(internals):
    """a setting of 64-bit types in this thread alone is told from one of the whole process, where that matters"""
    assert internals.threads_agree_on_x64()
    with jax.enable_x64(True):
        assert internals.threads_agree_on_x64() == (jax.__version_info__ >= (0, 11))


def asked_when_lowered(internals, name, question):
    """A primitive of one operand whose lowering asks something of its context, and the list of the answers."""
    primitive = internals.Primitive(name)
    primitive.def_abstract_eval(lambda x: x)
    answers = []

    def rule(context, value):
        answers.append(question(context))
        return [value]

    internals.register_lowering(primitive, rule)
    return primitive, answers


def probe_is_one_devices_program(internals):
    """a lowering context says whether its program is for one device of one platform, and for this process"""
    primitive, seen = asked_when_lowered(internals, "bn_fused_probe_one_device", internals.is_one_devices_program)
    program, x = jax.jit(primitive.bind), jnp.ones(4)
    program.lower(x)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    jax.jit(lambda x: primitive.bind(x)).lower(jax.device_put(x, jax.sharding.NamedSharding(mesh, P("d"))))
    on_devices(lambda split, whole: primitive.bind(split))
    jax.jit(lambda x: primitive.bind(x)).trace(x).lower(lowering_platforms=("cpu", "cuda"))
    jax.export.export(program)(x)
    assert seen[0] and len(seen) >= 5 and not any(seen[1:])


def probe_is_partitioned(internals):
    """a lowering context says whether XLA partitions the program over several devices"""
    primitive, seen = asked_when_lowered(internals, "bn_fused_probe_partitioned", internals.is_partitioned)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, P("d")))
    jax.jit(primitive.bind).lower(jnp.ones(4))
    jax.jit(lambda x: primitive.bind(x)).lower(sharded)
    for check_vma in (True, False):
        on_devices(lambda split, whole: primitive.bind(split), check_vma)
    grid = jax.make_mesh((2, 2), ("d", "e"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    partly = jax.shard_map(lambda x: primitive.bind(x), mesh=grid, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})
    jax.jit(partly).lower(jnp.ones(4))
    assert seen == [False, True, False, False, True]


def probe_runs_on_several_devices(internals):
    """a lowering context knows the number of devices of its program, under plain jit and inside shard_map"""
    primitive, seen = asked_when_lowered(internals, "bn_fused_probe_several", internals.runs_on_several_devices)
    jax.jit(primitive.bind).lower(jnp.ones(4))
    on_devices(lambda split, whole: primitive.bind(split))
    assert seen == [False, True]


def probe_lowering_device(internals):
    """a lowering context names the devices it lowers for to the primitives that asked for it"""
    primitive = internals.Primitive("bn_fused_probe_device")
    primitive.def_abstract_eval(lambda x: x)
    internals.tell_devices(primitive)
    seen = []

    def rule(context, value):
        seen.append((internals.lowering_device(context, "cpu"), internals.lowering_device(context, "tpu")))
        return [value]

    internals.register_lowering(primitive, rule)
    jax.jit(lambda x: jax.jit(primitive.bind)(x)).lower(jnp.ones(4))
    jax.jit(primitive.bind).lower(jax.device_put(jnp.ones(4), jax.devices()[1]))
    on_devices(lambda split, whole: primitive.bind(split))
    first, second = jax.devices()[:2]
    assert seen == [(first, None), (second, None), (first, None)]


def probe_axis_size(internals):
    """the size of a named axis of a vmap or of devices, and that of one which jax.export leaves open"""
    seen = []

    def one(x):
        seen.append(internals.axis_size("b"))
        return x

    jax.vmap(one, axis_name="b")(jnp.ones(3))
    on_devices(lambda split, whole: [seen.append(internals.axis_size("d")), split][1])
    (open_size,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((open_size,), jnp.float32)
    jax.export.export(jax.jit(jax.vmap(one, axis_name="b")))(shape)
    assert seen == [3, 2, open_size]
    with pytest.raises(NameError):
        internals.axis_size("b")


def probe_is_traced(internals):
    """what a transform traces is told from what is known"""
    seen = []
    for transform in (jax.jit, jax.vmap, jax.grad):
        transform(lambda x: seen.append(internals.is_traced(x)) or jnp.sum(x))(
            jnp.ones(()) if transform is jax.grad else jnp.ones(2)
        )
    assert seen == [True] * 3
    assert not internals.is_traced(jnp.ones(2)) and not internals.is_traced(np.ones(2)) and not internals.is_traced(0.5)


def probe_define_evaluation(internals):
    """a primitive is computed eagerly and under jax.disable_jit; jax.debug_nans and checkify name it"""
    from jax.experimental import checkify

    primitive = internals.Primitive("bn_fused_probe_nan")
    primitive.def_abstract_eval(lambda x: x)
    internals.define_evaluation(primitive)
    internals.register_lowering(primitive, internals.lower_fun(lambda x: x - x, multiple_results=False))
    infinity = jnp.asarray(jnp.inf)
    with jax.disable_jit():
        assert primitive.bind(jnp.ones(())) == 0
    for call in (primitive.bind, jax.jit(primitive.bind)):
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="encountered in bn_fused_probe_nan"):
            call(infinity)
        error, _ = checkify.checkify(call, errors=checkify.nan_checks)(infinity)
        assert "bn_fused_probe_nan" in error.get()
        assert checkify.checkify(call, errors=checkify.div_checks)(infinity)[0].get() is None


def probe_barrier(internals):
    """a Mosaic GPU kernel lowers with our own PTX in it, which takes the address of a counter in global memory"""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def body(x, y):
        counters = pl.get_global(plgpu.SemaphoreType.REGULAR((2,)))
        y[:] = x[:]
        internals.barrier_signal(counters.at[1])
        internals.barrier_wait(counters.at[1], 1, seconds=60)

    parameters = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    kernel = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), compiler_params=parameters)
    lowered = jax.jit(kernel).trace(jnp.ones(128)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


# JAX tells functions apart by their addresses, which may be used again: the same program would be read from the tests'
# cache, and nobody asked.
_parts = itertools.count(2)


def probe_custom_partitioning(internals):
    """XLA asks how to partition a function, with the shardings on a mesh that the lowering context knows"""
    primitive = internals.Primitive("bn_fused_probe_parts")
    primitive.def_abstract_eval(lambda x: x)
    internals.tell_devices(primitive)
    seen, meshes = [], []

    def partition(mesh, arguments, results):
        sharding = arguments[0].sharding
        seen.append(sharding.spec[0])
        return mesh, lambda x: x - jax.lax.psum(jnp.sum(x), sharding.spec[0]), sharding, (sharding,)

    @internals.custom_partitioning
    def centred(x):
        return x - jnp.sum(x)

    rule = internals.SdyShardingRule((("i",),), (("i",),))
    centred.def_partition(partition, infer_sharding_from_operands=lambda *_: _[1][0].sharding, sharding_rule=rule)

    def lower(context, value):
        meshes.append(internals.partitioned_mesh(context))
        return internals.lower_fun(centred, multiple_results=False)(context, value)

    internals.register_lowering(primitive, lower)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x = np.arange(2.0 * next(_parts), dtype=np.float32)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("d")))
    np.testing.assert_array_equal(jax.jit(lambda x: primitive.bind(x))(sharded), x - x.sum())
    assert seen == ["d"] and meshes[0].shape == {"d": 2}
    jax.jit(lambda x: primitive.bind(x)).lower(jnp.ones(4))
    jax.export.export(jax.jit(lambda x: primitive.bind(x)))(jnp.ones(4))
    assert meshes[1:] == [None, None]


def probe_made_by(internals):
    """a traced value leads to the operation that made it, under vmap and derivatives too"""
    found = []

    def function(x):
        y = jnp.sin(x)
        found.append([internals.made_by(value, "sin") for value in (x, y, 2 * y[None], jnp.sum(y))])
        return jnp.sum(y)

    x = jnp.ones((2, 3))
    jax.jit(function)(x)
    jax.jit(jax.grad(function))(x)
    jax.jit(jax.vmap(function))(x)
    jax.jit(jax.vmap(jax.grad(function)))(x)
    assert found == [[False, True, True, False]] * 4
    assert not internals.made_by(jnp.sin(x), "sin")


PROBES = {
    "Primitive": probe_primitive,
    "SdyShardingRule": probe_custom_partitioning,
    "ad": probe_ad,
    "axis_size": probe_axis_size,
    "barrier_signal": probe_barrier,
    "barrier_wait": probe_barrier,
    "custom_partitioning": probe_custom_partitioning,
    "define_evaluation": probe_define_evaluation,
    "device_axis_names": probe_device_axis_names,
    "fancy_primitive_batchers": probe_fancy_primitive_batchers,
    "is_one_devices_program": probe_is_one_devices_program,
    "is_partitioned": probe_is_partitioned,
    "is_traced": probe_is_traced,
    "lower_fun": probe_lowering,
    "lower_plainly": probe_lower_plainly,
    "lowering_device": probe_lowering_device,
    "made_by": probe_made_by,
    "output_type": probe_output_type,
    "partitioned_mesh": probe_custom_partitioning,
    "register_lowering": probe_lowering,
    "runs_on_several_devices": probe_runs_on_several_devices,
    "shard_like": probe_shard_like,
    "tell_devices": probe_lowering_device,
    "threads_agree_on_x64": probe_threads_agree_on_x64,
    "varying_axes": probe_varying_axes,
    "vary_together": probe_vary_together,
    "zero_tangent": probe_zero_tangent,
}


def names_of_the_module():
    """What jax_internals offers, read without importing it."""
    for node in ast.parse(MODULE.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{MODULE.name} has no __all__")


def test_every_name_has_its_probe():
    assert sorted(names_of_the_module()) == sorted(PROBES)


@pytest.mark.parametrize("name", PROBES)
def test_jax_still_behaves_so_that(name):
    internals = importlib.import_module("bn_fused.kernels.jax_internals")
    try:
        PROBES[name](internals)
    except Exception as error:
        promise = PROBES[name].__doc__
        raise AssertionError(
            f"on jax {jax.__version__}, bn_fused.kernels.jax_internals.{name} is not what it must be: {promise}"
        ) from error
