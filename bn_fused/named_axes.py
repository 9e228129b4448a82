"""Primitives that know the names of the axes they average over, and what `vmap` does to them.

An operand carries its layout as a string of roles (`bn_fused.kernels.layout`). When `vmap` maps an axis

- whose name the primitive averages over, the axis becomes rows of the same operation: one call gets the whole
  batch, and what is per channel stays unbatched;
- with any other name or none, the axis becomes a group, with statistics of its own;
- and where neither is possible (something per channel differs along the averaged axis), a rule of the primitive
  takes the operation apart, with explicit sums over the axis.

So no collective is ever traced for a vmap's name. Names of devices never get here (`bn_fused.devices`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_fused import arguments
from bn_fused.devices import total_size
from bn_fused.kernels.contract import present_results
from bn_fused.kernels.dispatch import WITH_ROWS, bind, insert_axis, lowering_place, result_types
from bn_fused.kernels.jax_internals import (
    Primitive,
    ad,
    define_evaluation,
    fancy_primitive_batchers,
    lower_plainly,
    register_lowering,
    tell_devices,
)
from bn_fused.kernels.layout import GROUP, ROW, as_number, count_rows


class Averaged(NamedTuple):
    """The vmap axes an operation averages over: their names, and the virtual batch size along them, if any."""

    names: tuple = ()
    virtual_batch_size: int | None = None

    def without(self, name):
        """What is left once this axis is part of the operands."""
        return Averaged(tuple(other for other in self.names if other != name), None)

    @property
    def size(self):
        """How many members of these axes share their statistics: all, or those of a virtual batch."""
        return total_size(self.names) if self.virtual_batch_size is None else self.virtual_batch_size


NOTHING = Averaged()  # no axis of a vmap


@dataclass(frozen=True)
class Batched:
    """A value in a batching rule and the axis that is mapped, None if it is the same for all."""

    value: jax.Array
    dim: int | None = None


@dataclass(frozen=True)
class NamedOperation:
    """A primitive and what its rules need.

    - `operands`, `results`: name to kind, as in `bn_fused.kernels.contract.Operation`.
    - `compute(spec, averaged, operands)`: the results from operands by name, in jnp and dispatched operations.
    - `rowwise`: no result sums over rows, so that any mapped axis may become rows.
    - `folds`: an averaged axis may become rows.
    - `apart(axis, spec, averaged, operands)`: the rule for an averaged axis that cannot; None: it becomes a group.
      `averaged` still names the axis.
    """

    primitive: Primitive
    operands: dict
    results: dict
    compute: Callable
    rowwise: bool = False
    folds: bool = False
    apart: Callable | None = None

    def result_kinds(self, present):
        """Name to kind of the results there are, given the names of the operands there are."""
        return present_results(self.results, present)

    def __call__(self, spec, averaged=NOTHING, /, **operands):
        """Bind the primitive; operands that are None are left out. Returns {name: result}."""
        operands, results = bind(self.primitive, operands, spec=spec, averaged=averaged)
        return dict(zip(self.result_kinds(operands), results, strict=True))

    def batch(self, axis, spec, averaged, operands):
        """The batching rule, from {name: Batched} to {name: Batched}."""
        if axis.name not in averaged.names:
            return self.batch_other(axis, spec, averaged, operands)
        if averaged.virtual_batch_size is not None:
            return self._batch_virtual(axis, spec, averaged, operands)
        rest = averaged.without(axis.name)
        if not _mapped(operands):
            return self._bind_batched(spec, rest, _divide_count(operands, axis.size), lambda kind: None)
        if self.folds and not self._mapped_per_channel(operands):
            return self._insert(axis, spec, rest, operands, ROW)
        if self.apart is not None:
            return self.apart(axis, spec, averaged, operands)
        return self._insert(axis, spec, rest, operands, GROUP)

    def batch_other(self, axis, spec, averaged, operands):
        """The rule for an axis that is not averaged over."""
        if not _mapped(operands):
            return self._bind_batched(spec, averaged, operands, lambda kind: None)
        rows = self.rowwise and not self._mapped_per_channel(operands)
        return self._insert(axis, spec, averaged, operands, ROW if rows else GROUP)

    def batch_as_group(self, axis, spec, averaged, operands):
        """The mapped axis as a group, whatever its name: partial results for each of its members."""
        return self._insert(axis, spec, averaged.without(axis.name), operands, GROUP)

    def _mapped_per_channel(self, operands):
        return [name for name in _mapped(operands) if self.operands[name] not in WITH_ROWS]

    def _insert(self, axis, spec, averaged, operands, role):
        names, values, dims = zip(*((name, o.value, o.dim) for name, o in operands.items()), strict=True)
        kinds = [self.operands[name] for name in names]
        spec, values, result_dim = insert_axis(spec, kinds, values, dims, axis.size, role)
        operands = {name: Batched(value) for name, value in zip(names, values, strict=True)}
        return self._bind_batched(spec, averaged, operands, result_dim)

    def _bind_batched(self, spec, averaged, operands, result_dim):
        results = self(spec, averaged, **{name: operand.value for name, operand in operands.items()})
        kinds = self.result_kinds(operands)
        return {name: Batched(value, result_dim(kinds[name])) for name, value in results.items()}

    def _batch_virtual(self, axis, spec, averaged, operands):
        """Split the axis into virtual batches: a vmap over batches around the averaged vmap within each."""
        size = averaged.virtual_batch_size
        names = _mapped(operands)
        if not names:
            rest = averaged.without(axis.name)
            return self._bind_batched(spec, rest, _divide_count(operands, size), lambda kind: None)
        fixed = {name: operand.value for name, operand in operands.items() if operand.dim is None}

        def bind_named(mapped):
            return self(spec, averaged._replace(virtual_batch_size=None), **fixed, **mapped)

        split = {}
        for name in names:
            value = jnp.moveaxis(operands[name].value, operands[name].dim, 0)
            split[name] = jnp.reshape(value, (axis.size // size, size, *value.shape[1:]))
        inner = jax.vmap(bind_named, axis_name=axis.name, axis_size=size)
        results = jax.vmap(inner, axis_size=axis.size // size)(split)
        return {name: Batched(jnp.reshape(value, (axis.size, *value.shape[2:])), 0) for name, value in results.items()}


def define(name, operands, results, compute, **rules):
    """Make the primitive `bn_fused_<name>` and return its `NamedOperation`; `rules` are that class's other fields.

    The primitive gets its eager form, types, batching and lowering; `primitives` adds the derivatives.
    """
    primitive = Primitive(f"bn_fused_{name}")
    primitive.multiple_results = True
    tell_devices(primitive)
    operation = NamedOperation(primitive, operands, results, compute, **rules)

    define_evaluation(primitive)

    @primitive.def_abstract_eval
    def types(*types, names, spec, averaged):
        arguments.check_bound(averaged.names)
        return result_types(operation.result_kinds(names), spec, dict(zip(names, types, strict=True)))

    def batch(axis, values, dims, *, names, spec, averaged):
        operands = {name: Batched(value, dim) for name, value, dim in zip(names, values, dims, strict=True)}
        batched = operation.batch(axis, spec, averaged, operands)
        results = [batched[name] for name in operation.result_kinds(names)]
        return [result.value for result in results], [result.dim for result in results]

    def lower(context, *values, names, spec, averaged):
        _refuse_unbound(averaged)
        spec = replace(spec, place=lowering_place(context))

        def traced(*arrays):
            present = dict(zip(names, arrays, strict=True))
            results = compute(spec, averaged, present)
            return [results[result] for result in operation.result_kinds(names)]

        return lower_plainly(traced, context, *values)

    fancy_primitive_batchers[primitive] = batch
    register_lowering(primitive, lower)
    return operation


def _mapped(operands):
    return [name for name, operand in operands.items() if operand.dim is not None]


def _divide_count(operands, size):
    """Where everything is the same along an averaged axis, one member's sums stand for `size` of them."""
    if "count" not in operands:
        return operands
    count = operands["count"].value
    return {**operands, "count": Batched(count / as_number(size, count.dtype))}


def _refuse_unbound(averaged):
    if averaged.names:
        raise NameError(f"unbound axis name: {averaged.names[0]}")


def map_batched(axis, function, *operands):
    """Apply a function of per-channel values under the mapped axis; its results are mapped only if an operand is."""
    dims = [operand.dim for operand in operands]
    values = [operand.value for operand in operands]
    if all(dim is None for dim in dims):
        return jax.tree.map(Batched, function(*values))
    results = jax.vmap(function, in_axes=tuple(dims), axis_size=axis.size)(*values)
    return jax.tree.map(lambda value: Batched(value, 0), results)


def sum_batched(operand, size):
    """The sum over a mapped axis of this size, of a value that may be the same for all of it."""
    if operand.dim is None:
        dtype = operand.value.dtype
        return Batched(operand.value * jnp.asarray(as_number(size, dtype), dtype))
    return Batched(jnp.sum(operand.value, operand.dim))


# Sums and means of small values over named vmap axes: what lax.psum and lax.pmean are, but traced as explicit sums.

named_sum_p, named_mean_p = Primitive("bn_fused_named_sum"), Primitive("bn_fused_named_mean")


def named_sum(value, averaged):
    """Sum a small value over the vmap axes of `averaged`, within the virtual batch if there is one."""
    return named_sum_p.bind(value, averaged=averaged) if averaged.names else value


def named_mean(value, averaged):
    """The mean of a small value over the vmap axes of `averaged`; where it is the same for all, itself, bit for bit."""
    return named_mean_p.bind(value, averaged=averaged) if averaged.names else value


def position_count(x, mask, layout, averaged, dtype):
    """How many positions a channel's moments average, over the vmap axes of `averaged` too.

    Without a mask an int, for every group of x. With one (x's shape with one channel, bool), an array of those that
    count, [*groups] in this dtype: 0 where none does.
    """
    if mask is None:
        return count_rows(x.shape, layout) * averaged.size
    own = jnp.sum(mask, [axis for axis, role in enumerate(layout) if role != GROUP], dtype)
    return named_sum(own, averaged)


def _named_sum_batch(axis, values, dims, *, averaged):
    (value,), (dim,) = values, dims
    if axis.name not in averaged.names:
        return named_sum_p.bind(value, averaged=averaged), dim
    rest, size = averaged.without(axis.name), averaged.virtual_batch_size
    if size is None or dim is None:
        total = sum_batched(Batched(value, dim), size or axis.size).value
        return named_sum(total, rest), None
    value = jnp.moveaxis(value, dim, 0)
    total = jnp.sum(jnp.reshape(value, (axis.size // size, size, *value.shape[1:])), 1)
    return named_sum(jnp.repeat(total, size, 0), rest), 0


def _named_mean_batch(axis, values, dims, *, averaged):
    (value,), (dim,) = values, dims
    if axis.name not in averaged.names:
        return named_mean_p.bind(value, averaged=averaged), dim
    return named_mean(value if dim is None else jnp.mean(value, dim), averaged.without(axis.name)), None


def _define_linear(primitive, function, batch):
    """Give a primitive of one value, which is its own transpose, its type, lowering, batching and derivatives."""

    def value_type(value, averaged):
        arguments.check_bound(averaged.names)
        return value.update(weak_type=False)

    def lower(context, value, *, averaged):
        _refuse_unbound(averaged)
        return [value]

    def apply(value, averaged):
        return value if isinstance(value, ad.Zero) else function(value, averaged)

    define_evaluation(primitive)
    primitive.def_abstract_eval(value_type)
    register_lowering(primitive, lower)
    fancy_primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = lambda values, tangents, averaged: (
        function(values[0], averaged),
        apply(tangents[0], averaged),
    )
    ad.primitive_transposes[primitive] = lambda cotangent, value, averaged: [apply(cotangent, averaged)]


_define_linear(named_sum_p, named_sum, _named_sum_batch)
_define_linear(named_mean_p, named_mean, _named_mean_batch)
