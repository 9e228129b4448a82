"""The backend `pallas_tpu`: every operation of `contract` as one Pallas kernel for TPUs (Mosaic).

Traffic in passes over x, with all of a channel block's rows kept in VMEM (resident), or none (streaming); with a part
of them (hybrid) it lies between:

    forward              1 to 2 reads, 1 write      one more read with a residual
    backward             2 to 4 reads, 1 write      with residual and activation 3 to 6 reads, 2 writes
    moments              1 read
    normalise            1 read, 1 write            one more read with a residual
    normalise_backward   2 reads, 1 write           with residual and activation 3 reads, 2 writes
    moments_backward     1 read, 1 write

`forward` and `backward` go over the rows of one channel block in two phases, sums and then results, and copy the blocks
that stay in VMEM only once. `plan` decides how many those are. The backward keeps x and dy of them, or x and dz
where that is a result (the residual's gradient), rounded to x's dtype as the result is; of the other blocks dz is
computed again.

The moments are sums of deviations from the mean of the blocks before, merged by the formula of Chan, Golub & LeVeque
("Algorithms for computing the sample variance", The American Statistician 37, 1983) in the order of the rows.

A kernel wants x as [groups, rows, channels] with the channels in lanes. XLA keeps a convolution's result as [*spatial,
examples, channels], so the rows of images are taken in that order and the view costs nothing there; an array that lies
in another way is copied before and after (two reads and two writes more: images as the argument of a program, where
their width is a multiple of 8). Channels are padded to a multiple of 128; with fewer than 128 XLA keeps x in other
layouts, and its copies around the kernel cost several times what the kernel does.

`auto` does not take these kernels. docs/tpu-audit.md has what whole programs move, compiled for each generation: alone
and with 128 channels or more, the kernels move fewer bytes than `jnp`; between convolutions or matrix products XLA
computes the sums in the kernel of the operation before, and the normalisation in that of the one after, and keeps in
VMEM what the kernels' own VMEM drives out. There `jnp` moves as little or less, and with few channels much less. A
backend is not told what is around it.

Not taken, and refused by name: float64 and float16 (which were not compiled), masks, arrays that XLA partitions
over several devices, and a TPU that is not in the table of chips.
"""

import math

import jax.numpy as jnp

from bn_fused.kernels.backends.pallas_tpu.plan import plan as plan  # the backend's plan
from bn_fused.kernels.chips import TpuChip
from bn_fused.kernels.contract import blend, reciprocal_std
from bn_fused.kernels.layout import CHANNEL, GROUP, ROW, axes_of, channel_shape, group_shape

DTYPES = ("float32", "bfloat16")


def refusal(problem, target):
    """None, or why the kernels cannot compute a problem on a target."""
    if target.platform != "tpu":
        return "its kernels are compiled for TPUs"
    if not isinstance(target.chip, TpuChip):
        return "which TPU it is lowered for is not known, and its plans need to know"
    if problem.dtype not in DTYPES:
        return f"x has dtype {problem.dtype}; its kernels take {' and '.join(DTYPES)}"
    if problem.mask:
        return "there is a mask, which its kernels do not read"
    if target.partitioned:
        return (
            "XLA partitions x over several devices, and libtpu does not let a kernel run on each one's part: name the "
            "devices in a shard_map for that"
        )
    return None


# ------------------------------------------------------------------------------------------ views


def _order(layout):
    """x's axes as the kernels want them: groups, rows with the examples last where they are images, channels."""
    rows = axes_of(layout, ROW)
    # Of images XLA keeps the examples next to the channels.
    rows = (*rows[1:], *rows[:1]) if len(rows) > 2 else rows
    return (*axes_of(layout, GROUP), *rows, layout.index(CHANNEL))


def _view(array, layout):
    """An array of x's shape as [groups, rows, channels]."""
    groups, channels = math.prod(group_shape(array.shape, layout)), array.shape[layout.index(CHANNEL)]
    return jnp.transpose(array, _order(layout)).reshape(groups, -1, channels)


def _unview(array, shape, layout):
    """`_view` undone."""
    order = _order(layout)
    array = array.reshape([shape[axis] for axis in order])
    return jnp.transpose(array, [order.index(axis) for axis in range(len(order))])


class _Call:
    """The operands of one kernel, brought to its form, and its results brought back."""

    def __init__(self, operation, x, spec, interpret):
        self.operation, self.shape, self.spec, self.interpret = operation, x.shape, spec, interpret
        self.operands = {}

    def large(self, **arrays):
        """Arrays of x's shape; those that are None are left out."""
        for name, array in arrays.items():
            if array is not None:
                self.operands[name] = ("large", _view(array, self.spec.layout))

    def channel(self, **arrays):
        """Arrays [*groups, channels]."""
        for name, array in arrays.items():
            array = array.astype(jnp.float32).reshape(-1, 1, array.shape[-1])
            self.operands[name] = ("channel", array)

    def scalars(self, **arrays):
        """Arrays [*groups], or [*groups, n] that are packed."""
        groups = len(group_shape(self.shape, self.spec.layout))
        for name, array in arrays.items():
            packed = array.astype(jnp.float32) if array.ndim > groups else array.astype(jnp.float32)[..., None]
            self.operands[name] = ("scalars", packed.reshape(-1, 1, packed.shape[-1]))

    def __call__(self, large=(), channel=()):
        """Run it; returns the large results and then those per channel, in this order."""
        from bn_fused.kernels.backends.pallas_tpu import kernels as pallas_tpu_kernels

        results = {**dict.fromkeys(large, "large"), **dict.fromkeys(channel, "channel")}
        arrays = pallas_tpu_kernels.call(
            self.operation,
            self.operands,
            results,
            getattr(self.spec.plan, self.operation),
            eps=self.spec.eps,
            activation=self.spec.activation,
            interpret=self.interpret,
        )
        layout, shape = self.spec.layout, self.shape
        return tuple(
            _unview(arrays[name], shape, layout)
            if name in large
            else arrays[name].reshape(channel_shape(shape, layout))
            for name in results
        )


# ------------------------------------------------------------------------------------------ operations


def forward(x, weight, bias, running_mean, running_var, coefficients, residual=None, *, spec, interpret=False):
    """Moments, blend and normalisation in one launch; see `contract`."""
    state_dtype = running_mean.dtype
    if state_dtype == jnp.float64:
        # No kernel computes in float64: the state's few values are XLA's work then, between two launches.
        pivot, delta, var = moments(x, spec=spec, interpret=interpret)
        new = blend(pivot, delta, var, running_mean, running_var, coefficients)
        rstd = reciprocal_std(new.norm_var, spec.eps)
        y = normalise(x, pivot, new.offset, rstd, weight, bias, residual, spec=spec, interpret=interpret)
        return y, pivot, delta, var, new.offset, rstd, new.new_running_mean, new.new_running_var
    call = _Call("forward", x, spec, interpret)
    call.scalars(coefficients=coefficients)
    call.large(x=x, residual=residual)
    call.channel(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    per_channel = ("pivot", "delta", "var", "offset", "rstd", "new_running_mean", "new_running_var")
    *results, new_mean, new_var = call(("y",), per_channel)
    return *results, new_mean.astype(state_dtype), new_var.astype(state_dtype)


def backward(
    dy,
    dmean,
    dvar,
    x,
    pivot,
    offset,
    rstd,
    weight,
    bias,
    delta,
    batch,
    count,
    residual=None,
    y=None,
    *,
    spec,
    interpret=False,
):
    """Gradient of `forward` in one launch; see `contract`."""
    call = _Call("backward", x, spec, interpret)
    call.scalars(batch=batch, count=count)
    call.channel(dmean=dmean, dvar=dvar, delta=delta)
    return _gradients(call, dy, x, pivot, offset, rstd, weight, bias, residual, y)


def moments(x, *, spec, interpret=False):
    """Pivot, delta and variance of each channel; see `contract`."""
    call = _Call("moments", x, spec, interpret)
    call.large(x=x)
    return call((), ("pivot", "delta", "var"))


def moments_backward(dmean, dvar, x, pivot, delta, count, *, spec, interpret=False):
    """Gradient of `moments` with respect to x."""
    call = _Call("moments_backward", x, spec, interpret)
    call.scalars(count=count)
    call.large(x=x)
    call.channel(dmean=dmean, dvar=dvar, pivot=pivot, delta=delta)
    return call(("dx",))


def normalise(x, pivot, offset, rstd, weight, bias, residual=None, *, spec, interpret=False):
    """y = activation((x - pivot - offset) * rstd * weight + bias + residual)."""
    call = _Call("normalise", x, spec, interpret)
    call.large(x=x, residual=residual)
    call.channel(pivot=pivot, offset=offset, rstd=rstd, weight=weight, bias=bias)
    return call(("y",))[0]


def normalise_backward(dy, x, pivot, offset, rstd, weight, bias, residual=None, y=None, *, spec, interpret=False):
    """Gradient of `normalise`: dx with the statistics held constant, and the two sums."""
    call = _Call("normalise_backward", x, spec, interpret)
    return _gradients(call, dy, x, pivot, offset, rstd, weight, bias, residual, y)


def _gradients(call, dy, x, pivot, offset, rstd, weight, bias, residual, y):
    call.large(dy=dy, x=x, residual=residual, y=y)
    call.channel(pivot=pivot, offset=offset, rstd=rstd, weight=weight, bias=bias)
    large = ("dx",) if residual is None and y is None else ("dx", "dresidual")
    dx, *dresidual, sum_dz, sum_dz_xhat = call(large, ("sum_dz", "sum_dz_xhat"))
    return dx, sum_dz, sum_dz_xhat, *dresidual
