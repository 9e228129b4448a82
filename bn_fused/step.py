"""One training step or inference of BatchNorm on one example: what the layer and the function have in common."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_fused import approaches, reference
from bn_fused.arguments import Settings, check_momentum_in, warn_of_few_values, warn_of_low_precision
from bn_fused.devices import devices_of, split_names, total_size
from bn_fused.kernels.contract import Coefficients, Spec, accumulation_dtype, blend, widest
from bn_fused.kernels.jax_internals import device_axis_names, made_by, shard_like, vary_together
from bn_fused.kernels.layout import CHANNEL, ROW, as_number
from bn_fused.kernels.merging import Devices, merge_moments
from bn_fused.kernels.registry import is_reference
from bn_fused.named_axes import NOTHING, Averaged, named_mean, named_sum, position_count
from bn_fused.primitives import forward, moments, normalise
from bn_fused.running_stats import RunningStats


@dataclass(frozen=True)
class Call:
    """What is static about a call on one example: its settings, the layout of x, the names it averages over.

    - `channel_axis`: the channels' axis of the example, counted from the front.
    - `axis_names`: names of vmaps and of devices, as the user ordered them.
    - `device_groups`: `axis_index_groups` as tuples, or None; see `Devices`.
    """

    settings: Settings
    channel_axis: int
    axis_names: tuple = ()
    device_groups: tuple | None = None

    def layout(self, x):
        """Where the channels and the rows of one example x lie."""
        return "".join(CHANNEL if axis == self.channel_axis else ROW for axis in range(x.ndim))

    def spec(self, x):
        """The static part of the primitives' operands, for one example x."""
        return Spec(
            self.layout(x),
            float(self.settings.eps),
            self.settings.activation,
            self.settings.backend,
            after_convolution=made_by(x, "conv_general_dilated"),
        )


class StepScalars(NamedTuple):
    """The scalars of a training step, in the dtype in which the state is updated.

    - `momentum`, `zero_frac`, `new_zero_frac`, `fraction`, `debias`: m (which may be a Python float), z, z', f and k of
      the table in `approaches`.
    - `nothing_counts`: bool, True where the mask lets no position count; None without a mask.
    """

    momentum: jax.Array | float
    zero_frac: jax.Array
    new_zero_frac: jax.Array
    fraction: jax.Array
    debias: jax.Array
    nothing_counts: jax.Array | None

    def coefficients(self, settings):
        """The packed coefficients of the approach; where nothing counts, those of inference."""
        training = approaches.coefficients(
            settings.approach,
            self.zero_frac,
            self.new_zero_frac,
            self.fraction,
            momentum=self.momentum,
            k=self.debias,
        )
        if self.nothing_counts is not None:
            inference = approaches.inference_coefficients(self.zero_frac)
            training = Coefficients(
                *(jnp.where(self.nothing_counts, i, t) for i, t in zip(inference, training, strict=True))
            )
        return training.pack(self.zero_frac.dtype)


def infer(call, x, stats, weight, bias, residual, mask):
    """Normalise one example with the running statistics; returns y, with x's shape and dtype.

    `weight` and `bias` are [channels] or None, `residual` is None or as x, `mask` has x's shape with one channel (bool)
    or is None: it keeps padding out of the gradients.
    """
    stats, weight, bias = _with_channels_sharded(call, x, stats, weight, bias)
    state_dtype = _state_dtype(stats)
    running = (value.astype(state_dtype) for value in (stats.mean, stats.var, stats.zero_frac))
    mean, var = approaches.inference_moments(*running)
    if is_reference(call.settings.backend):
        return reference.normalise(call, x, mean, var, weight, bias, residual, mask)
    return _normalise(call, x, mean, jnp.zeros_like(mean), var, weight, bias, residual, mask)


def train(call, momentum, x, stats, weight, bias, residual, mask):
    """One step on one example, averaged over the named axes; returns y and the new RunningStats.

    Arguments as of `infer`, and `momentum` a Python float or a scalar array. ValueError for an empty batch, and for a
    `virtual_batch_size` or `device_groups` that do not fit the axes.
    """
    settings, state_dtype = call.settings, _state_dtype(stats)
    vmaps, device_names = split_names(call.axis_names)
    devices = devices_of(device_names, call.device_groups)
    averaged = Averaged(vmaps, settings.virtual_batch_size)
    _check_virtual(settings, vmaps)
    # Virtual batches stay on one device: what they count is not summed over devices.
    sharing = devices if settings.virtual_batch_size is None else Devices()
    layout = call.layout(x)
    examples = averaged.size * sharing.size
    positions = position_count(x, None, layout, averaged, state_dtype) * sharing.size
    if 0 in (positions, total_size(vmaps)):
        raise ValueError(f"the batch over axis_name {call.axis_names!r} is empty: there is nothing to average over")
    warn_of_few_values(settings, positions, examples)
    for value in (stats.mean, stats.zero_frac):
        check_momentum_in(value.dtype, momentum)
    positions, examples = as_number(positions, state_dtype), as_number(examples, state_dtype)
    warn_of_low_precision(stats.mean.dtype)
    if not isinstance(momentum, float):
        momentum = jnp.asarray(momentum, state_dtype)

    old = stats
    stats, weight, bias = _with_channels_sharded(call, x, stats, weight, bias)
    zero_frac, count = stats.zero_frac.astype(state_dtype), stats.count
    new_zero_frac, new_count = approaches.advance(
        settings.approach, zero_frac, count, momentum=momentum, warmup_period=settings.warmup_period
    )
    if mask is not None:
        own = position_count(x, mask, layout, NOTHING, state_dtype)
        positions = _sum_over(own, averaged, sharing)
        examples = _sum_over((own > 0).astype(state_dtype), averaged, sharing)
    scalars = StepScalars(
        momentum=momentum,
        zero_frac=zero_frac,
        new_zero_frac=new_zero_frac,
        fraction=approaches.warmup_fraction(new_count, settings.warmup_period, state_dtype),
        debias=approaches.debias_factor(settings.debias, positions, examples, settings.eps, state_dtype),
        nothing_counts=None if mask is None else positions == 0,
    )
    step = _reference_step if is_reference(settings.backend) else _fused_step
    y, new_mean, new_var = step(call, scalars, averaged, devices, x, stats, weight, bias, residual, mask)
    if settings.virtual_batch_size is not None:
        new_mean, new_var = _mean_of_virtual_batches(scalars, vmaps, devices, (new_mean, new_var), stats)
    if mask is not None:
        unchanged = scalars.nothing_counts
        if settings.virtual_batch_size is not None:
            unchanged = _sum_over(1 - unchanged.astype(state_dtype), Averaged(vmaps), devices) == 0
        new_zero_frac = jnp.where(unchanged, zero_frac, new_zero_frac)
        new_count = jnp.where(unchanged, count, new_count)
    new = zip((new_mean, new_var, new_zero_frac, new_count), old, strict=True)
    return y, RunningStats(*(shard_like(value.astype(was.dtype), was, range(was.ndim)) for value, was in new))


def count_positions(call, x, mask, dtype):
    """How many positions of the whole batch count, a scalar: over all that is averaged but for virtual batches."""
    vmaps, device_names = split_names(call.axis_names)
    averaged, devices = Averaged(vmaps), devices_of(device_names, call.device_groups)
    count = position_count(x, mask, call.layout(x), averaged, dtype)
    if mask is None:
        return jnp.asarray(as_number(count * devices.size, dtype), dtype)
    return devices.sum(count)


def _fused_step(call, scalars, averaged, devices, x, stats, weight, bias, residual, mask):
    """y and the new running mean and variance: one `forward`, or moments, their exchange over devices, `normalise`."""
    spec = call.spec(x)
    packed = scalars.coefficients(call.settings)
    if not devices.names or averaged.virtual_batch_size is not None:
        weight, bias = _affine(x, call, weight, bias)
        results = forward(
            spec,
            averaged,
            x=x,
            weight=weight,
            bias=bias,
            running_mean=stats.mean,
            running_var=stats.var,
            coefficients=packed,
            residual=residual,
            mask=mask,
        )
        return results["y"], results["new_running_mean"], results["new_running_var"]
    local, dtype = moments(spec, averaged, x=x, mask=mask), accumulation_dtype(x.dtype)
    count = jnp.asarray(as_number(position_count(x, mask, spec.layout, averaged, dtype), dtype), dtype)
    pivot, *merged, _ = merge_moments(local["pivot"], local["delta"], local["var"], count, devices)
    # The mean is what it is, as pivot + delta, whatever the pivot: all of its gradient is delta's.
    pivot = jax.lax.stop_gradient(pivot)
    # Each example's own gradient of these goes into the sum of all of them. The mean has that summed on the device,
    # before devices exchange it, in one array; under check_vma they do where its type changes to varying.
    merged = named_mean(jnp.stack(merged), averaged)
    own = named_mean(vary_together([merged, x])[0], averaged)

    def mixed(delta, var):
        return blend(pivot, delta, var, stats.mean, stats.var, packed)

    new, here = mixed(*merged), mixed(*own)
    y = _normalise(call, x, pivot, here.offset, here.norm_var, weight, bias, residual, mask)
    return y, new.new_running_mean, new.new_running_var


def _reference_step(call, scalars, averaged, devices, x, stats, weight, bias, residual, mask):
    """What `_fused_step` returns, by the definition."""
    del averaged, devices
    state_dtype = scalars.zero_frac.dtype
    # Widened once for both uses, so that the gradient of a 16-bit x is added up before it is rounded.
    dtype, x = x.dtype, x.astype(accumulation_dtype(x.dtype))
    mean, var = reference.moments(call, x, mask)
    running_mean, running_var = stats.mean.astype(state_dtype), stats.var.astype(state_dtype)
    step = approaches.definition(
        call.settings.approach,
        mean.astype(state_dtype),
        var.astype(state_dtype),
        running_mean,
        running_var,
        scalars.zero_frac,
        scalars.new_zero_frac,
        scalars.fraction,
        momentum=scalars.momentum,
        k=scalars.debias,
    )
    if scalars.nothing_counts is not None:
        norm_mean, norm_var = approaches.inference_moments(running_mean, running_var, scalars.zero_frac)
        unchanged = approaches.Step(norm_mean, norm_var, running_mean, running_var)
        step = approaches.Step(
            *(jnp.where(scalars.nothing_counts, old, new) for old, new in zip(unchanged, step, strict=True))
        )
    y = reference.normalise(call, x, step.norm_mean, step.norm_var, weight, bias, residual, mask)
    return y.astype(dtype), step.running_mean, step.running_var


def _normalise(call, x, pivot, offset, norm_var, weight, bias, residual, mask):
    weight, bias = _affine(x, call, weight, bias)
    dtype = accumulation_dtype(x.dtype)
    pivot, offset, norm_var = (value.astype(dtype) for value in (pivot, offset, norm_var))
    return normalise(
        call.spec(x),
        NOTHING,
        x=x,
        pivot=pivot,
        offset=offset,
        norm_var=norm_var,
        weight=weight,
        bias=bias,
        residual=residual,
        mask=mask,
    )["y"]


def _with_channels_sharded(call, x, stats, weight, bias):
    """The values per channel, sharded as x's channels are where types say so: on meshes with explicit axes."""

    def place(value):
        return None if value is None else shard_like(value, x, (call.channel_axis,))

    return stats._replace(mean=place(stats.mean), var=place(stats.var)), place(weight), place(bias)


def _affine(x, call, weight, bias):
    """Weight and bias, 1 and 0 where there are none."""
    channels, dtype = x.shape[call.channel_axis], accumulation_dtype(x.dtype)
    weight = jnp.ones((channels,), dtype) if weight is None else weight
    return weight, jnp.zeros((channels,), dtype) if bias is None else bias


def _state_dtype(stats):
    """The dtype in which the state is updated: its own, but float32 at least."""
    return widest(stats.mean.dtype)


def _sum_over(value, averaged, devices):
    return devices.sum(named_sum(value, averaged))


def _check_virtual(settings, vmaps):
    """ValueError unless virtual batches, if there are any, divide the one vmap's axis."""
    size = settings.virtual_batch_size
    if size is None:
        return
    if len(vmaps) != 1:
        raise ValueError(
            f"virtual_batch_size is {size}, which needs exactly one averaged axis that is a vmap's; there are "
            f"{len(vmaps)}: {vmaps!r}"
        )
    batch = total_size(vmaps)
    if batch % size:
        here = " on each device" if device_axis_names() else ""
        raise ValueError(f"virtual_batch_size is {size}; it must divide the batch of {batch} examples{here}")


def _mean_of_virtual_batches(scalars, vmaps, devices, new, stats):
    """The running statistics as the mean over those virtual batches in which anything counts."""
    averaged = Averaged(vmaps)
    if scalars.nothing_counts is None:
        size = as_number(total_size(vmaps) * devices.size, scalars.zero_frac.dtype)
        return tuple(_sum_over(value, averaged, devices) / size for value in new)
    counted = 1 - scalars.nothing_counts.astype(scalars.zero_frac.dtype)
    size = _sum_over(counted, averaged, devices)
    means = (_sum_over(counted * value, averaged, devices) / jnp.maximum(size, 1) for value in new)
    return tuple(jnp.where(size == 0, old, mean) for old, mean in zip((stats.mean, stats.var), means, strict=True))
