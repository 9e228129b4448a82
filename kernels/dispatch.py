"""One primitive that stands for any operation of `contract`, and becomes a backend's code when it is lowered.

Which backend runs is known only then: the platform an operation is lowered for may be another than the default one
(jit on the CPU beside a GPU, `jax.export`, compilation for a chip that is not there). An unnamed `vmap` adds a
group to the layout. Derivatives and named axes are the business of those who bind it: `fused.fused_batch_norm`, and
the primitives of `bn_fused`.
"""

import functools
from dataclasses import replace

import jax.numpy as jnp

from bn_fused.kernels.chips import chip_of
from bn_fused.kernels.contract import LIKE_X, MASK, OPERATIONS, PER_CHANNEL, PER_GROUP, accumulation_dtype
from bn_fused.kernels.jax_internals import (
    Primitive,
    define_evaluation,
    fancy_primitive_batchers,
    is_partitioned,
    lower_plainly,
    lowering_device,
    output_type,
    partitioned_mesh,
    register_lowering,
    runs_on_several_devices,
    tell_devices,
    threads_agree_on_x64,
    vary_together,
)
from bn_fused.kernels.kept import lower_kept
from bn_fused.kernels.layout import CHANNEL, GROUP, axes_of
from bn_fused.kernels.partition import ASKING_PLATFORMS, partitioned
from bn_fused.kernels.registry import check_plan, choose, operation_of, slow_to_lower
from bn_fused.kernels.target import PLATFORMS, Target, problem_of

WITH_ROWS = (LIKE_X, MASK)  # the kinds that have x's rows, and so its rank


def bind(primitive, operands, **parameters):
    """Bind a primitive to operands by name; those that are None are left out. Returns {name: operand}, results."""
    operands = {name: jnp.asarray(value) for name, value in operands.items() if value is not None}
    values = vary_together(list(operands.values()))
    return operands, primitive.bind(*values, names=tuple(operands), **parameters)


def run(operation, spec, /, **operands):
    """Compute an operation; returns the tuple of its results."""
    _, results = bind(dispatch_p, operands, spec=spec, operation=operation)
    return tuple(results)


def result_types(results, spec, operands):
    """The abstract values of results, given {name: kind} and the operands' abstract values by name."""
    x = next(operands[name] for name in ("x", "tx", "dy") if name in operands)
    groups, channel = axes_of(spec.layout, GROUP), spec.layout.index(CHANNEL)
    types = []
    for name, kind in results.items():
        if kind == LIKE_X:
            types.append(output_type(x, x.shape, x.dtype, range(x.ndim)))
            continue
        axes = {PER_CHANNEL: (*groups, channel), PER_GROUP: groups}[kind]
        like = operands.get(name.removeprefix("new_")) if name.startswith("new_") else None
        dtype = accumulation_dtype(x.dtype) if like is None else like.dtype
        types.append(output_type(x, [x.shape[axis] for axis in axes], dtype, axes))
    return types


def insert_axis(spec, kinds, values, dims, size, role):
    """Give every operand the axis that a vmap maps, in one place of the layout.

    `dims` says where each operand has it, or None. An axis of role GROUP is given to all operands, one of role
    ROW to those of x's rank only. Returns the new spec, the operands, and where the results have the axis: a function
    of the kind.
    """
    mapped = [dim for dim, kind in zip(dims, kinds, strict=True) if kind in WITH_ROWS and dim is not None]
    place = mapped[0] if mapped else 0
    group_place = spec.layout[:place].count(GROUP)

    def with_axis(value, dim, kind):
        if kind not in WITH_ROWS and role != GROUP:
            return value
        target = place if kind in WITH_ROWS else group_place
        if dim is not None:
            return value if dim == target else jnp.moveaxis(value, dim, target)
        shape = (*value.shape[:target], size, *value.shape[target:])
        return jnp.broadcast_to(jnp.expand_dims(value, target), shape)

    values = [with_axis(value, dim, kind) for value, dim, kind in zip(values, dims, kinds, strict=True)]
    spec = replace(spec, layout=spec.layout[:place] + role + spec.layout[place:])

    def result_dim(kind):
        if kind in WITH_ROWS:
            return place
        return group_place if role == GROUP else None

    return spec, values, result_dim


dispatch_p = Primitive("bn_fused_dispatch")
dispatch_p.multiple_results = True
tell_devices(dispatch_p)
define_evaluation(dispatch_p)


@dispatch_p.def_abstract_eval
def _dispatch_types(*types, names, spec, operation):
    results = OPERATIONS[operation].result_kinds(names)
    return result_types(results, spec, dict(zip(names, types, strict=True)))


def _dispatch_batch(axis_data, values, dims, *, names, spec, operation):
    kinds = [OPERATIONS[operation].operands[name] for name in names]
    spec, values, result_dim = insert_axis(spec, kinds, values, dims, axis_data.size, GROUP)
    results = dispatch_p.bind(*values, names=names, spec=spec, operation=operation)
    return results, [result_dim(kind) for kind in OPERATIONS[operation].result_kinds(names).values()]


fancy_primitive_batchers[dispatch_p] = _dispatch_batch


def lowering_place(context):
    """What tells apart the places of one program where an operation is lowered otherwise: in a shard_map and outside.

    Whether XLA partitions there, and whether in terms that parts can be computed from.

    JAX lowers what is equal in a program once, and `lower_plainly` makes the types equal by which it knows the places.
    """
    return is_partitioned(context), partitioned_mesh(context) is not None


def _planned(choice, problem, target, spec):
    """The spec with its plan: its own, which is checked, or the choice's."""
    if spec.plan is None:
        return replace(spec, plan=choice.plan)
    check_plan(choice, spec.plan, problem, target)
    return spec


def _run_choice(choice, operation, spec, operands):
    """The list of an operation's results, computed by a chosen backend after a spec with its plan."""
    results = operation_of(choice, operation)(**operands, spec=spec)
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _run_chosen(target, operation, spec, /, **operands):
    """`run` for a known target, without a primitive in between."""
    problem = problem_of(spec, operands["x"], operands, target, operation)
    choice = choose(problem, target, spec.backend)
    return _run_choice(choice, operation, _planned(choice, problem, target, spec), operands)


def _dispatch_lower(context, *values, names, spec, operation, platform):
    operands = dict(zip(names, context.avals_in, strict=True))
    device = lowering_device(context, platform)
    chip = None if device is None else chip_of(device)
    if chip is not None and chip.platform != platform:  # the code for AMD of a program for both, on an NVIDIA GPU
        chip = None
    split, in_parts = lowering_place(context)
    # Where each device's part can be computed, the backend is chosen as on one device.
    by_parts = split and in_parts and platform in ASKING_PLATFORMS and threads_agree_on_x64()
    target = Target(platform, chip, split and not by_parts, runs_on_several_devices(context))
    problem = problem_of(spec, operands["x"], names, target, operation)
    choice = choose(problem, target, spec.backend)
    if by_parts:
        run_part = functools.partial(_run_chosen, target)
        function = partitioned(run, run_part, operation, spec, names, choice.name)
        return lower_plainly(function, context, *values)

    spec = _planned(choice, problem, target, spec)

    def compute(*arrays):
        return _run_choice(choice, operation, spec, dict(zip(names, arrays, strict=True)))

    if slow_to_lower(choice):
        return lower_kept(compute, (choice.name, operation, names, spec, target), context, *values)
    return lower_plainly(compute, context, *values)


for _platform in PLATFORMS:
    _lower = functools.partial(_dispatch_lower, platform=_platform)
    # Layers that are alike call one function of the program, which XLA inlines under each one's name.
    register_lowering(dispatch_p, _lower, platform=_platform, inline=False)
