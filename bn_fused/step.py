"""One training step or inference of BatchNorm on one example: what the layer and the function have in common."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from bn_fused import approaches, reference
from bn_fused.arguments import Settings, positive_integer, state_dtype, warn_of_few_values, warn_of_low_precision
from bn_fused.devices import devices_of, split_names, total_size
from bn_fused.kernels.contract import Coefficients, Spec, accumulation_dtype, blend, widest
from bn_fused.kernels.jax_internals import device_axis_names, shard_like, vary_together
from bn_fused.kernels.layout import CHANNEL, ROW
from bn_fused.kernels.merging import Devices, merge_moments
from bn_fused.kernels.registry import is_reference
from bn_fused.named_axes import NOTHING, Averaged, named_mean, named_sum
from bn_fused.primitives import forward, moments, normalise


class RunningStats(NamedTuple):
    """The running statistics of a BatchNorm with C channels: a pytree of four arrays.

    - `mean`, `var`: shape [C], the running averages as they are kept, from a start at zero (not yet divided by
        1 - zero_frac).
    - `zero_frac`: shape [], starts at 1: the share of those averages that is still their zero start.
    - `count`: shape [], int32, starts at 0: the steps of the warm-up of the approach "ema".
    """

    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array
    count: jax.Array

    @staticmethod
    def init(num_channels, dtype=jnp.float32):
        """The statistics before the first step. `dtype`: float32 or float64; 16-bit floats raise ValueError."""
        positive_integer("num_channels", num_channels)
        dtype = state_dtype(dtype)
        # Two arrays, not one twice: a step may be given their memory (`donate_argnums`).
        mean, var = jnp.zeros((num_channels,), dtype), jnp.zeros((num_channels,), dtype)
        return RunningStats(mean, var, jnp.ones((), dtype), jnp.zeros((), jnp.int32))


# So that an exported function may take and return them.
export.register_namedtuple_serialization(RunningStats, serialized_name="bn_fused.RunningStats")


@dataclass(frozen=True)
class Call:
    """What is static about a call on one example: its settings, the layout of x, the names it averages over."""

    settings: Settings
    channel_axis: int
    axis_names: tuple = ()
    groups: tuple | None = None

    def spec(self, x):
        """The static part of the primitives' operands, for one example x."""
        layout = "".join(CHANNEL if axis == self.channel_axis else ROW for axis in range(x.ndim))
        return Spec(layout, float(self.settings.eps), self.settings.activation, self.settings.backend)


def infer(call, x, stats, weight, bias, residual):
    """Normalise one example with the running statistics; returns y."""
    stats, weight, bias = _with_channels_sharded(call, x, stats, weight, bias)
    wide = _wide(stats)
    running = (value.astype(wide) for value in (stats.mean, stats.var, stats.zero_frac))
    mean, var = approaches.inference_moments(*running, call.settings.eps)
    if is_reference(call.settings.backend):
        return reference.normalise(call, x, mean, var, weight, bias, residual)
    return _normalise(call, x, mean, jnp.zeros_like(mean), var, weight, bias, residual)


def train(call, x, stats, weight, bias, residual, mask):
    """One step on one example, averaged over the named axes; returns y and the new RunningStats.

    `mask` has x's shape with one channel (bool), or is None.
    """
    settings = call.settings
    vmaps, names = split_names(call.axis_names)
    devices = devices_of(names, call.groups)
    averaged = Averaged(vmaps, settings.virtual_batch_size)
    _check_virtual(settings, vmaps)
    examples = total_size(vmaps) * devices.size if settings.virtual_batch_size is None else settings.virtual_batch_size
    positions = examples * (x.size // x.shape[call.channel_axis])
    warn_of_few_values(settings, positions, examples)
    warn_of_low_precision(stats.mean.dtype)

    old = stats
    stats, weight, bias = _with_channels_sharded(call, x, stats, weight, bias)
    wide = _wide(stats)
    zero_frac, count = stats.zero_frac.astype(wide), stats.count
    new_zero_frac, new_count = approaches.advance(
        settings.approach, zero_frac, count, momentum=settings.momentum, warmup_period=settings.warmup_period
    )
    # Virtual batches stay on one device: their counts are not summed over devices.
    across = devices if settings.virtual_batch_size is None else Devices()
    if mask is not None:
        local = jnp.sum(mask, dtype=wide)
        positions = _sum_over(local, averaged, across)
        examples = _sum_over((local > 0).astype(wide), averaged, across)
    mix = Mix(
        zero_frac=zero_frac,
        new_zero_frac=new_zero_frac,
        fraction=approaches.warmup_fraction(new_count, settings.warmup_period, wide),
        debias=approaches.debias_factor(settings.debias, positions, examples, settings.eps, wide),
        nothing=None if mask is None else positions == 0,
    )
    step = _reference_step if is_reference(settings.backend) else _fused_step
    y, new_mean, new_var = step(call, mix, averaged, devices, x, stats, weight, bias, residual, mask)
    if settings.virtual_batch_size is not None:
        new_mean, new_var = _mean_of_virtual_batches(mix, vmaps, devices, (new_mean, new_var), stats)
    if mask is not None:
        everything = mix.nothing
        if settings.virtual_batch_size is not None:
            everything = _sum_over(1 - everything.astype(wide), Averaged(vmaps), devices) == 0
        new_zero_frac = jnp.where(everything, zero_frac, new_zero_frac)
        new_count = jnp.where(everything, count, new_count)
    new = zip((new_mean, new_var, new_zero_frac, new_count), old, strict=True)
    return y, RunningStats(*(shard_like(value.astype(was.dtype), was, range(was.ndim)) for value, was in new))


class Mix(NamedTuple):
    """The scalars of a training step: see `approaches`. `nothing`: no position counts (None without a mask)."""

    zero_frac: jax.Array
    new_zero_frac: jax.Array
    fraction: jax.Array
    debias: jax.Array
    nothing: jax.Array | None

    def coefficients(self, settings):
        """The packed coefficients of the approach; where nothing counts, those of inference."""
        training = approaches.coefficients(
            settings.approach,
            self.zero_frac,
            self.new_zero_frac,
            self.fraction,
            momentum=settings.momentum,
            k=self.debias,
        )
        if self.nothing is not None:
            inference = approaches.inference_coefficients(self.zero_frac, settings.eps)
            training = Coefficients(*(jnp.where(self.nothing, i, t) for i, t in zip(inference, training, strict=True)))
        return training.pack(self.zero_frac.dtype)


def _fused_step(call, mix, averaged, devices, x, stats, weight, bias, residual, mask):
    spec = call.spec(x)
    packed = mix.coefficients(call.settings)
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
    local = moments(spec, averaged, x=x, mask=mask)
    count = jnp.asarray(x.size // x.shape[call.channel_axis], local["var"].dtype)
    if mask is not None:
        count = jnp.sum(mask, dtype=local["var"].dtype)
    count = _sum_over(count, averaged, Devices()) if mask is not None else count * total_size(averaged.names)
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


def _reference_step(call, mix, averaged, devices, x, stats, weight, bias, residual, mask):
    del averaged, devices
    wide = mix.zero_frac.dtype
    # Widened once for both uses, so that the gradient of a 16-bit x is added up before it is rounded.
    dtype, x = x.dtype, x.astype(accumulation_dtype(x.dtype))
    mean, var = reference.moments(call, x, mask)
    running_mean, running_var = stats.mean.astype(wide), stats.var.astype(wide)
    step = approaches.definition(
        call.settings.approach,
        mean.astype(wide),
        var.astype(wide),
        running_mean,
        running_var,
        mix.zero_frac,
        mix.new_zero_frac,
        mix.fraction,
        momentum=call.settings.momentum,
        k=mix.debias,
    )
    if mix.nothing is not None:
        norm_mean, norm_var = approaches.inference_moments(running_mean, running_var, mix.zero_frac, call.settings.eps)
        unchanged = approaches.Step(norm_mean, norm_var, running_mean, running_var)
        step = approaches.Step(*(jnp.where(mix.nothing, old, new) for old, new in zip(unchanged, step, strict=True)))
    y = reference.normalise(call, x, step.norm_mean, step.norm_var, weight, bias, residual)
    return y.astype(dtype), step.running_mean, step.running_var


def _normalise(call, x, pivot, offset, norm_var, weight, bias, residual, mask=None):
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
    channels, dtype = x.shape[call.channel_axis], accumulation_dtype(x.dtype)
    weight = jnp.ones((channels,), dtype) if weight is None else weight
    return weight, jnp.zeros((channels,), dtype) if bias is None else bias


def _wide(stats):
    """The dtype in which the state is updated: its own, but float32 at least."""
    return widest(stats.mean.dtype)


def _sum_over(value, averaged, devices):
    return devices.sum(named_sum(value, averaged))


def _check_virtual(settings, vmaps):
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


def _mean_of_virtual_batches(mix, vmaps, devices, new, stats):
    """The running statistics as the mean over those virtual batches in which anything counts."""
    averaged = Averaged(vmaps)
    if mix.nothing is None:
        size = total_size(vmaps) * devices.size
        return tuple(_sum_over(value, averaged, devices) / size for value in new)
    counted = 1 - mix.nothing.astype(mix.zero_frac.dtype)
    size = _sum_over(counted, averaged, devices)
    means = (_sum_over(counted * value, averaged, devices) / jnp.maximum(size, 1) for value in new)
    return tuple(jnp.where(size == 0, old, mean) for old, mean in zip((stats.mean, stats.var), means, strict=True))
