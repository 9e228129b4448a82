"""`explain`: which backend computes a batch, why, and with what plan."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from bn_fused import arguments
from bn_fused.kernels import Problem, Target, choose
from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.chips import CHIPS, chip_of
from bn_fused.kernels.target import FLOATING, PLATFORMS, channels_lie_last


def explain(
    shape,
    dtype,
    *,
    channel_axis=-1,
    activation=None,
    residual=False,
    mask=False,
    groups=1,
    after_convolution=False,
    inference=False,
    target=None,
    backend="auto",
):
    """Say which backend `batch_norm` or the layer would use, without running anything.

    **Arguments:**

    - `shape`: the batch's shape, axis 0 the examples (for the layer: with the mapped axis).
    - `dtype`: the batch's dtype.
    - `channel_axis`, `activation`, `backend`: as of `batch_norm`. The layer's examples have their channels first, so
        with the mapped axis it is `channel_axis=1` ([N, C, H, W]), and not the default, which is the last axis.
    - `residual`, `mask`: whether there is one.
    - `groups`: how many such batches one call normalises (the size of unnamed vmaps around it).
    - `after_convolution`: whether the batch is what a convolution made, in the same jitted function and but for
        operations that keep its shape: on an NVIDIA GPU its channels then lie last in memory, whichever axis is theirs.
    - `inference`: whether the running statistics normalise it.
    - `target`: what it is compiled for: None for JAX's default device, a chip ("h200", "v5e"; see
        `bn_fused.kernels.CHIPS`) or a platform ("cpu", "cuda", "rocm", "tpu") whose chip is not known.

    **Returns:**

    A `BackendChoice`: `name`, `reason`, `plan`. The plan of a backend with kernels has three methods, each of an
    operation's name ("forward", "backward", ...):

    - `kind(operation)`: how it walks over x, such as "resident" or "streaming".
    - `passes(operation)`: the numbers of reads and writes of arrays of x's size inside its kernels.
    - `launches(operation)`: its kernels' names, in order.

    A plan does not know what XLA does around the kernels: `bn-bench audit` counts it in the compiled program.
    "reference" has no plan, and that of "jnp" has no such methods, because XLA decides.

    **Raises:**

    ValueError or TypeError for arguments that do not fit; `BackendError` where `backend` cannot run on the target.
    """
    arguments.check_one_of("activation", activation, (None, *ACTIVATIONS))
    arguments.check_positive_integer("groups", groups)
    arguments.check_boolean("residual", residual)
    arguments.check_boolean("mask", mask)
    arguments.check_boolean("after_convolution", after_convolution)
    arguments.check_boolean("inference", inference)
    if isinstance(shape, (jax.Array, np.ndarray)) and np.ndim(shape) != 1:
        raise TypeError(f"shape is an array of shape {shape.shape}; accepted are whole numbers, such as its shape")
    try:
        shape = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape is {shape!r}; accepted is a sequence of whole numbers") from None
    if shape and min(shape) < 1:
        raise ValueError(f"shape is {shape!r}; accepted are sizes of 1 or more")
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; accepted are {', '.join(FLOATING)}") from None
    axis, target = arguments.as_channel_axis(channel_axis, shape, "shape"), _target(target)
    channels = shape[axis]
    problem = Problem(
        groups,
        math.prod(shape) // max(channels, 1),
        channels,
        dtype.name,
        activation,
        residual,
        mask,
        channels_lie_last(shape[axis + 1 :], after_convolution, target, dtype),
        "normalise" if inference else "forward",
    )
    return choose(problem, target, backend)


def _target(target):
    if target is None:
        device = jax.devices()[0]
        platform = device.platform
        if platform == "gpu":
            platform = "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"
        return Target(platform, chip_of(device))
    if isinstance(target, Target):
        return target
    arguments.check_one_of("target", target, (*CHIPS, *PLATFORMS))
    return Target(CHIPS[target].platform, CHIPS[target]) if target in CHIPS else Target(target)
