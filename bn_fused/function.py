"""`batch_norm`: BatchNorm of a whole batch as a function of arrays."""

import jax

from bn_fused import arguments
from bn_fused.kernels.jax_internals import shard_like
from bn_fused.running_stats import check_stats
from bn_fused.step import Call, infer, train

EXAMPLES = "bn_fused.examples"  # the name of the axis of examples while one example is traced


def batch_norm(
    x,
    stats,
    weight=None,
    bias=None,
    *,
    approach="batch",
    momentum=0.99,
    eps=1e-5,
    warmup_period=1,
    channel_axis=-1,
    axis_name=None,
    axis_index_groups=None,
    activation=None,
    residual=None,
    mask=None,
    debias="samples",
    virtual_batch_size=None,
    inference=False,
    backend="auto",
):
    r"""Normalise a batch over its examples and positions; the functional form of `bn_fused.BatchNorm`.

    There are the formulas, the approaches and advice on the settings.

    **Arguments:**

    - `x`: the batch, axis 0 the examples, with its C channels on `channel_axis` and any number of spatial axes;
        float32, bfloat16, float16 or float64.
    - `stats`: the `RunningStats` of C channels.
    - `weight`, `bias`: shape [C], or None for 1 and 0.
    - `approach`: "batch", "ema" or "ema_compatibility".
    - `momentum`: weight of the old running statistics in the new: a number from 0 (the last batch alone) to 1, without
        1 (PyTorch's is 1 minus this one), or a scalar array. That may be traced (a schedule): then nobody checks it.
        k/(k+1) in step k, from 0, gives the plain average over batches.
    - `eps`: added to the variance, above 0.
    - `warmup_period`: steps over which the approach "ema" moves from batch to running statistics.
    - `channel_axis`: the axis of the channels, any but 0.
    - `axis_name`: further named axes to average over (of `jax.vmap`, `jax.shard_map`, `jax.pmap`): a name, a
        sequence of names, or None for this batch alone.
    - `axis_index_groups`: None, or groups of indices along the one axis of devices in `axis_name`, of the same size, as
        [[0, 1], [2, 3]]: each group of devices has statistics of its own, the running ones too. JAX sums over groups
        under `pmap` and in `shard_map(..., check_vma=False)` only.
    - `activation`: None, "relu", "silu", "gelu" or "leaky_relu", in the same pass.
    - `residual`: None, or x's shape and dtype; added before the activation.
    - `mask`: None, or bool of x's shape without the channel axis or broadcastable to it: which positions count in the
        statistics. Of whole examples [n], it is `mask[:, None, None]` for images ([n] alone is taken for the last axis
        of positions if it has that size). What padding holds in x and residual,
        NaN too, reaches no gradient where y's is zero there, at inference as in training; see the layer.
    - `debias`: "samples", "axis" or "none".
    - `virtual_batch_size`: None, or a divisor of the number of examples: that many consecutive examples share their
        statistics, and the running statistics move by the mean over these virtual batches.
    - `inference`: use `stats` and leave them as they are.
    - `backend`: "auto" or a name of `bn_fused.kernels.backend_names()`.

    **Returns:**

    `y`, with x's shape and dtype, and the new `RunningStats` (at inference, `stats` itself).

    **Raises:**

    ValueError or TypeError that names the argument, its value and what is accepted; NameError for an `axis_name`
    that is not bound; `bn_fused.BackendError`, when it is compiled, for a named backend that cannot run there.

    Inside of `shard_map` without an `axis_name`, every device has statistics of its own; where the `out_specs` say that
    they are the same on all, JAX says that replication cannot be inferred.
    """
    settings = arguments.Settings(approach, eps, warmup_period, activation, debias, virtual_batch_size, backend)
    momentum = arguments.as_momentum(momentum)
    names, device_groups = arguments.as_axis_names(axis_name), arguments.as_device_groups(axis_index_groups)
    arguments.check_boolean("inference", inference)
    if not inference:
        arguments.check_bound(names, one_example=False)
    x = arguments.as_array("x", x)
    check_stats(stats)
    channel_axis = arguments.as_channel_axis(channel_axis, x.shape, "x")
    given, stats = stats, arguments.as_stats(stats)
    arguments.check_zero_start("stats", stats)
    channels = stats.mean.shape[0]
    arguments.check_input(x, channels, channel_axis, f"stats has {channels}, channel_axis is {channel_axis}", inference)
    weight = arguments.as_parameter("weight", weight, stats.mean.shape, "stats.mean")
    bias = arguments.as_parameter("bias", bias, stats.mean.shape, "stats.mean")
    residual = arguments.as_residual(residual, x)
    mask = arguments.as_mask(mask, x, channel_axis)
    if mask is not None and not (inference or names):
        arguments.warn_of_few_counted(settings, mask)
    if mask is not None:
        mask = shard_like(mask, x, [None if axis == channel_axis else axis for axis in range(x.ndim)])
    if residual is not None:
        residual = shard_like(residual, x, range(x.ndim))

    call = Call(settings, channel_axis - 1, (EXAMPLES, *names), device_groups)
    with jax.named_scope("bn_fused.batch_norm"):
        if inference:
            step = jax.vmap(lambda x, residual, mask: infer(call, x, stats, weight, bias, residual, mask))
            return step(x, residual, mask), given
        step = jax.vmap(
            lambda x, residual, mask: train(call, momentum, x, stats, weight, bias, residual, mask),
            axis_name=EXAMPLES,
            out_axes=(0, None),
        )
        return step(x, residual, mask)
