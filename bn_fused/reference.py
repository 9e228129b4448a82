"""The backend `reference` for one example: the definition, op for op, with JAX's own collectives and derivatives.

Per channel, mean = pmean(mean(x)) and var = pmean(mean((x - mean) conj(x - mean))), at least 0; the output is
(x - m)/sqrt(v + eps) w + b. Never tuned: it is what the other backends are compared with.
"""

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from bn_fused.devices import devices_of, split_names, total_size
from bn_fused.kernels.backends import reference as kernel_reference
from bn_fused.kernels.contract import accumulation_dtype, widest
from bn_fused.kernels.jax_internals import axis_size
from bn_fused.kernels.layout import as_number
from bn_fused.kernels.padding import guarded
from bn_fused.named_axes import Averaged, named_sum


def moments(call, x, mask):
    """Mean and variance per channel over the example's positions and the named axes, [channels]."""
    x = x.astype(accumulation_dtype(x.dtype))
    if mask is not None:
        # Not for the averages, which leave it out anyway: a NaN in it would get into their derivatives.
        x = jnp.where(mask, x, jnp.zeros_like(x))
        mask = jnp.moveaxis(mask, call.channel_axis, 0)[0]
    x = jnp.moveaxis(x, call.channel_axis, 0)
    return jax.vmap(lambda channel: kernel_reference.moments(channel, _average(call, mask)))(x)


def normalise(call, x, mean, var, weight, bias, residual, mask):
    """One example with these moments, weight and bias (or None), residual and activation; in x's dtype.

    A mask changes nothing but the derivatives, which padding does not get into.
    """
    dtype = widest(mean.dtype, x.dtype)
    affine = [None if value is None else value.astype(dtype) for value in (weight, bias)]
    eps, activation, axis = call.settings.eps, call.settings.activation, call.channel_axis
    positions = None if mask is None else jnp.squeeze(mask, axis)

    def of_position(values, mean, var, weight, bias):
        return kernel_reference.normalise(values, mean, var, eps, weight, bias)

    def one_channel(*operands):
        return guarded(of_position, positions)(*operands)

    in_axes = (axis, 0, 0, *(None if value is None else 0 for value in affine))
    per_channel = jax.vmap(one_channel, in_axes=in_axes, out_axes=axis)
    y = per_channel(x.astype(dtype), mean.astype(dtype), var.astype(dtype), *affine)
    if residual is not None:
        y = y + residual.astype(dtype)
    return guarded(lambda y: kernel_reference.activate(y, activation), mask)(y).astype(x.dtype)


def _average(call, mask):
    """The mean over the positions and the named axes, of the positions that count."""
    names, device_groups, size = call.axis_names, call.device_groups, call.settings.virtual_batch_size
    if size is not None:
        return lambda values: _average_in_virtual_batch(values, mask, names, size)
    if mask is None:
        vmaps, devices = split_names(names)
        members = total_size(vmaps) * devices_of(devices, device_groups).size
        return lambda values: _sum(jnp.mean(values), names, device_groups) / as_number(members, values.dtype)

    def average(values):
        total = _sum(jnp.sum(jnp.where(mask, values, jnp.zeros_like(values))), names, device_groups)
        return total / jnp.maximum(_sum(jnp.sum(mask, dtype=values.dtype), names, device_groups), 1)

    return average


def _sum(value, names, device_groups=None):
    """psum. JAX's own fails for a vmap's name on a mesh (around it in a shard_map too), or of a size left open."""
    vmaps, devices = split_names(names)
    if device_groups is not None:
        # JAX's own sum over groups fails under a vmap, and channels are mapped here.
        return _sum_of_part(value, devices_of(devices, device_groups).group, len(device_groups), names)
    on_a_mesh = not (jax.sharding.get_abstract_mesh().empty and jax.typeof(value).sharding.mesh.empty)
    if vmaps and (on_a_mesh or is_symbolic_dim(total_size(vmaps))):
        value, names = named_sum(value, Averaged(vmaps)), devices
    return jax.lax.psum(value, names) if names else value


def _sum_of_part(value, part, parts, names):
    """The sum of a scalar over those members of the named axes that have the same `part`, of 0 to parts - 1."""
    mine = jnp.arange(parts, dtype=part.dtype) == part
    totals = _sum(jnp.where(mine, value, jnp.zeros_like(value)), names)
    return jnp.sum(jnp.where(mine, totals, jnp.zeros_like(totals)))


def _average_in_virtual_batch(values, mask, names, size):
    """The mean over the positions that count of the `size` examples in this example's virtual batch."""
    ((name,), _) = split_names(names)
    batch, batches = jax.lax.axis_index(name) // size, axis_size(name) // size
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    total = _sum_of_part(jnp.sum(jnp.where(mask, values, jnp.zeros_like(values))), batch, batches, (name,))
    count = _sum_of_part(jnp.sum(mask, dtype=values.dtype), batch, batches, (name,))
    return total / jnp.maximum(count, 1)
