"""The backend `pallas_gpu`: every operation of `contract` for NVIDIA Hopper and Blackwell GPUs, with Pallas Mosaic GPU.

Passes over arrays of x's size, R reads and W writes, and launches; r is the residual, k what is kept for the
activation's derivative where one was added, r or y, and dz, the gradient before the activation, is then a result. A
forward or backward in one launch (`one_launch`) reads once what stays on chip between its two passes, and twice the
rest, here in parentheses:

    forward              R x (+R x) (+R r) W y                                          1 launch
    backward             R x, R dy (+R x, R dy) W dx                                    1 launch
      with k             R x, R dy, R k W dz (+R x, R dz) W dx                          1 launch

Where the blocks may not wait for each other, or where little would stay, each pass is a launch (`stream`), as are those
of the other operations always:

    forward              moments R x, [merge], normalise R x (+R r) W y                 3 launches
    backward             sums R x, R dy, [merge], gradient R x, R dy W dx               3 launches
      with k             sums R x, R dy, R k W dz, [merge], gradient R x, R dz W dx     3 launches
    moments              R x                                                            2 launches
    moments_backward     R x W dx                                                       1 launch
    normalise            R x (+R r) W y                                                 1 launch
    normalise_backward   R x, R dy (+R k) W dx (+W dz)                                  2 launches

[merge] is a launch of O(channels): it merges the blocks' moments (Chan) and computes the blend with the running
statistics, offset and rstd; or it merges the sums. A second pass goes through the rows backwards: it starts with what
the first has left in L2. XLA computes no more than O(channels) around the kernels: it zeroes the counters by which
blocks wait for each other, and where there are few channels several rows are seen as one and the values per channel
repeated. Which of the ways is taken, `Plan.kind` says; `plan=` with `forward=None, backward=None` streams always.
`docs/kernels-gpu.md` says more.

x of any layout is seen as [groups, rows, channels]. Where the channels lie last in memory that costs nothing, and
where XLA chooses the layout (between convolutions on a GPU) it makes them lie last.

Moments are sums of deviations from a pivot, the mean of the first tile of each warpgroup's rows, merged as (number,
pivot, delta, squares): no digit is lost where |mean| is much larger than the standard deviation.

Limits, refused by name: float64; a mask; compute capabilities other than 9.x and 10.x; arrays that XLA partitions over
several devices; fewer than 128 channels with a number of rows that has no suitable divisor (see `tiles.fold_of`); 2^31
rows or more; a plan given by hand whose blocks wait for each other and may not all be on the chip. The running
statistics are blended inside the launch if they are float32, and with jnp after it otherwise: the forward is streamed
then.

Compiled for those chips, run in an interpreter and on an H200.
"""

import jax.numpy as jnp

from bn_fused.kernels.activations import ACTIVATIONS, activate
from bn_fused.kernels.backends.gpu.view import View
from bn_fused.kernels.backends.pallas_gpu import plan as plans
from bn_fused.kernels.backends.pallas_gpu.block import F32
from bn_fused.kernels.backends.pallas_gpu.merges import merge_moments, merge_sums, moments_merge, sums_merge, times
from bn_fused.kernels.backends.pallas_gpu.one_launch import one_launch
from bn_fused.kernels.backends.pallas_gpu.one_launch_plan import not_co_resident, one_launch_tiling
from bn_fused.kernels.backends.pallas_gpu.plan import Plan, make_plan, tiling
from bn_fused.kernels.backends.pallas_gpu.stream import Pass, stream
from bn_fused.kernels.backends.pallas_gpu.tiles import ALIGNMENT, MOMENTS, MOST_FOLDED, SUMS, WARPGROUP, ring_bytes
from bn_fused.kernels.contract import (
    blend,
    moments_cotangents,
    reciprocal_std,
    scale_and_shift,
    statistics_cotangents,
    sum_with_xhat,
    through_moments,
)

DTYPES = ("float32", "bfloat16", "float16")
CAPABILITIES = (9, 10)  # major versions for which Mosaic GPU is known to compile these kernels
MOST_ROWS = 1 << 31


def refusal(problem, target):
    """None, or one sentence: why these kernels cannot compute the problem on the target."""
    chip = target.chip
    if target.platform != "cuda":
        return "it is written for NVIDIA GPUs"
    if problem.dtype not in DTYPES:
        return f"its kernels take {', '.join(DTYPES)}, not {problem.dtype}"
    if problem.mask:
        return "its kernels take no mask"
    if chip is None:
        return "it is not known for which GPU it is compiled, and its tiles depend on that"
    major, minor = chip.compute_capability
    if major < CAPABILITIES[0]:
        return f"it needs compute capability 9.x or 10.x (Hopper, Blackwell), and {chip.name} has {major}.{minor}"
    if major not in CAPABILITIES:
        return f"it is not known to compile for compute capability {major}.{minor} ({chip.name})"
    if target.partitioned:
        return (
            "XLA partitions the arrays over several devices in a way that does not let a kernel run on each one's part "
            "(inside a partly manual shard_map, without a mesh, under jax.export)"
        )
    if problem.rows >= MOST_ROWS:
        return f"it counts rows in 32 bits, and there are {problem.rows}"
    if plan(problem, target) is None:
        itemsize = jnp.dtype(problem.dtype).itemsize
        return (
            f"the copy engine needs rows of at least {WARPGROUP} values and of a multiple of {ALIGNMENT} bytes; "
            f"{problem.channels} channels of {itemsize} bytes make none, and the number of rows, {problem.rows}, has "
            f"no divisor up to {MOST_FOLDED} by which several rows could be read as one that does"
        )
    return None


def plan(problem, target, config=None):
    """The `Plan` for a problem, or None if there is none."""
    itemsize = jnp.dtype(problem.dtype).itemsize
    return make_plan(
        problem.groups,
        problem.rows,
        problem.channels,
        itemsize,
        target.chip,
        residual=problem.residual,
        derivative=problem.activation is not None,
        clusters_only=target.several_devices,
        config=config,
    )


def search_set(problem, target):
    """The configurations to time for a problem."""
    itemsize, derivative = jnp.dtype(problem.dtype).itemsize, problem.activation is not None
    sizes = problem.groups, problem.rows, problem.channels, itemsize, target.chip
    return plans.search_set(*sizes, residual=problem.residual, derivative=derivative)


def plan_refusal(plan, problem, target):
    """None, or one sentence: why a plan given by hand would not fit the chip, or could deadlock on it."""
    chip, itemsize = target.chip, jnp.dtype(problem.dtype).itemsize
    most = ring_bytes(chip, plan.columns, plan.warpgroups, MOMENTS)
    if plan.ring_bytes > most:
        return f"its ring_bytes are {plan.ring_bytes}, and a block of {chip.name} has room for {most}"
    backward = 2 + (problem.residual and problem.activation is not None)
    for one_launch_plan, inputs, sums in (
        (plan.forward, 1 + problem.residual, MOMENTS),
        (plan.backward, backward, SUMS),
    ):
        if one_launch_plan is None:
            continue
        if target.several_devices and not one_launch_plan.cluster:
            return (
                "blocks that wait for each other without being a cluster can deadlock with collectives between devices"
            )
        sentence = not_co_resident(one_launch_plan, chip, itemsize, inputs, sums)
        if sentence is not None:
            return sentence
    return None


class _View(View):
    """The view of one call that its plan makes."""

    def __init__(self, x, spec, operation=None):
        if not isinstance(spec.plan, Plan):
            raise TypeError(f"plan is {spec.plan!r}; pallas_gpu needs one of {Plan}")
        self.plan, self.one_launch = spec.plan, spec.plan.one_launch(operation)
        super().__init__(x, spec.layout, (self.one_launch or self.plan).fold)

    def tiling(self, inputs):
        return tiling(self.plan, self.groups, self.rows, self.channels, self.itemsize, inputs)

    def one_launch_tiling(self, inputs):
        return one_launch_tiling(self.one_launch, self.groups, self.rows, self.channels, self.itemsize, inputs)

    def numbers(self, values):
        """Several values per group as float32 [groups, number]."""
        return jnp.reshape(values.astype(F32), (self.groups, values.shape[-1]))

    def tiled(self, *values):
        """Values per channel for a kernel: float32 [groups, channels] each; for folded rows repeated, all in one."""
        values = [self.channel(value) for value in values]
        return values if self.fold == 1 else [jnp.tile(jnp.stack(values, 1), (1, 1, self.fold))]


# What the passes compute.


def _moments_row(values, constants):
    (pivot,) = constants
    d = values[0] - pivot
    return (d, d * d), ()


_MOMENTS = Pass(lambda channels, numbers: [], _moments_row)


def _normalisation(activation):
    """y, of x and, where there is one, the residual; per channel pivot, offset, rstd, weight and bias."""

    def constants(channels, numbers):
        pivot, offset, rstd, weight, bias, *_ = channels
        return pivot, *scale_and_shift(offset, rstd, weight, bias)

    def row(values, constants):
        x, *residual = values
        return (), (activate(_before_activation(x, constants, *residual), activation),)

    return Pass(constants, row)


def _before_activation(x, constants, residual=None):
    pivot, scale, shift = constants
    z = (x - pivot) * scale + shift
    return z if residual is None else z + residual


def _gradient(activation, from_y=False, *, sums=False, dx=False, dz=False, moments=False):
    """Of dy, x and, where it is kept for the derivative, y (`from_y`) or the residual: `sums`, `dx` and `dz`.

    The sums are those of dz and dz * d, d = x - pivot. Per channel: pivot, offset, rstd, weight and bias; with
    `moments`, where dx has the part that goes through the moments, slope and level before them.
    """
    needs_z = activation is not None and not from_y
    needed = ["pivot", *["scale"] * (needs_z or dx), *["shift"] * needs_z, *["slope", "level"] * moments]

    def constants(channels, numbers):
        through, (pivot, offset, rstd, weight, bias, *_) = (channels[:2], channels[2:]) if moments else ([], channels)
        scale, shift = scale_and_shift(offset, rstd, weight, bias)
        known = {"pivot": pivot, "scale": scale, "shift": shift} | dict(zip(("slope", "level"), through, strict=False))
        return [known[name] for name in needed]

    def row(values, constants):
        dy, x, *kept = values
        c = dict(zip(needed, constants, strict=True))
        d, dz_value = x - c["pivot"], dy
        if activation is not None:
            z_or_y = kept[0] if from_y else _before_activation(x, (c["pivot"], c["scale"], c["shift"]), *kept)
            dz_value = dy * ACTIVATIONS[activation].derivative(z_or_y)
        results = []
        if dx:
            value = dz_value * c["scale"]
            if moments:
                value = value + (d * c["slope"] + c["level"])
            results.append(value)
        return (dz_value, dz_value * d) if sums else (), (*results, *[dz_value] * dz)

    return Pass(constants, row)


def _moments_gradient_constants(channels, numbers):
    pivot, delta, dmean, dvar = channels
    (count,) = numbers
    return pivot, *through_moments(dmean, dvar, delta, count)


def _moments_gradient_row(values, constants):
    pivot, slope, level = constants
    return (), ((values[0] - pivot) * slope + level,)


# What the merges of the sums compute: per channel, of the sums and other values per channel and per group.


def _finish_sums(sums, channels, _):
    """sum(dz) and sum(dz * xhat), xhat = (d - offset) * rstd."""
    sum_dz, sum_dz_d = sums
    _, offset, rstd, *_ = channels
    return sum_dz, sum_with_xhat(sum_dz, sum_dz_d, offset, rstd)


def _finish_backward(sums, channels, numbers):
    """slope and level, and the two sums: the part of dx that goes through the moments is d * slope + level."""
    _, _, rstd, weight, _, dmean, dvar, delta = channels
    batch, count = numbers
    sum_dz, sum_dz_xhat = _finish_sums(sums, channels, ())
    from_normalisation = statistics_cotangents(weight, rstd, sum_dz, sum_dz_xhat)
    dmean, dvar = moments_cotangents(dmean, dvar, *from_normalisation, batch, times)
    return *through_moments(dmean, dvar, delta, count), sum_dz, sum_dz_xhat


# The operations.


def _moments_partial(view, x):
    tiles = view.tiling(1)
    (partial,) = stream(tiles, "bn_fused_moments", [x], [], [], _MOMENTS, sums=2, moments=True)
    return tiles, partial


def moments(x, mask=None, *, spec):
    """Mean, as pivot + delta, and biased variance of each channel over its rows."""
    _check_no_mask(mask)
    view = _View(x, spec)
    _, results = merge_moments(*_moments_partial(view, view.as_rows(x)))
    return tuple(map(view.unchannel, results))


def forward(x, weight, bias, running_mean, running_var, coefficients, residual=None, mask=None, *, spec):
    """Moments, blend and normalisation: y, the moments and the new running statistics."""
    _check_no_mask(mask)
    blends = running_mean.dtype == F32 and running_var.dtype == F32
    view = _View(x, spec, "forward" if blends else None)
    flat = view.as_rows(x)
    if view.one_launch is not None:
        operands = [weight, bias, running_mean, running_var]
        return _forward_in_one_launch(view, flat, operands, coefficients, residual, spec)
    partial = _moments_partial(view, flat)
    if blends:
        operands = view.tiled(weight, bias, running_mean, running_var)
        numbers = [view.numbers(coefficients)]
        needed, results = merge_moments(*partial, (operands, numbers), spec.eps)
        pivot, offset, rstd, delta, var, *new = map(view.unchannel, results)
        channels = [*needed, *operands]
    else:
        _, results = merge_moments(*partial)
        pivot, delta, var = map(view.unchannel, results)
        offset, norm_var, *new = blend(pivot, delta, var, running_mean, running_var, coefficients)
        rstd = reciprocal_std(norm_var, spec.eps)
        channels = view.tiled(pivot, offset, rstd, weight, bias)
    y = _normalise(view, flat, residual, channels, spec, reverse=True)
    return y, pivot, delta, var, offset, rstd, *new


def _forward_in_one_launch(view, flat, operands, coefficients, residual, spec):
    arrays = [flat] if residual is None else [flat, view.as_rows(residual)]
    channels, numbers, tiles = view.tiled(*operands), [view.numbers(coefficients)], view.one_launch_tiling(len(arrays))
    (y,), results = one_launch(
        tiles, "bn_fused_forward", arrays, channels, numbers, _MOMENTS, moments_merge(tiles, True, spec.eps),
        _normalisation(spec.activation), sums=2, reads=1, moments=True,
    )  # fmt: skip
    pivot, offset, rstd, delta, var, *new = map(view.unchannel, results)
    return view.like_x(y), pivot, delta, var, offset, rstd, *new


def _normalise(view, flat, residual, channels, spec, reverse):
    arrays = [flat] if residual is None else [flat, view.as_rows(residual)]
    work, tiles = _normalisation(spec.activation), view.tiling(len(arrays))
    (y,) = stream(tiles, "bn_fused_normalise", arrays, channels, [], work, outputs=1, reverse=reverse)
    return view.like_x(y)


def normalise(x, pivot, offset, rstd, weight, bias, residual=None, mask=None, *, spec):
    """y = activation((x - pivot - offset) * rstd * weight + bias + residual), in x's dtype."""
    _check_no_mask(mask)
    view = _View(x, spec)
    channels = view.tiled(pivot, offset, rstd, weight, bias)
    return _normalise(view, view.as_rows(x), residual, channels, spec, reverse=False)


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
    mask=None,
    *,
    spec,
):
    """Gradient of `forward`: dx, sum(dz), sum(dz * xhat), and dresidual where the derivative needs residual or y."""
    _check_no_mask(mask)
    view = _View(x, spec, "backward")
    arrays = view.gradient_arrays(dy, x, residual, y)
    channels = view.tiled(pivot, offset, rstd, weight, bias, dmean, dvar, delta)
    numbers = [view.group(value) for value in (batch, count)]
    activation, from_y, write_dz = spec.activation, y is not None, len(arrays) == 3
    merge = sums_merge(_finish_backward, needed=2)
    first = _gradient(activation, from_y, sums=True, dz=write_dz)
    # Where dz is written, the second pass reads it in dy's place: no derivative is left to compute.
    second = _gradient(None if write_dz else activation, dx=True, moments=True)
    if view.one_launch is not None:
        (dx, *dz), sums = one_launch(
            view.one_launch_tiling(len(arrays)), "bn_fused_backward", arrays, channels, numbers, first, merge, second,
            sums=2, reads=len(arrays), outputs=int(write_dz),
        )  # fmt: skip
        return view.gradients(dx, dz, sums)
    tiles, name = view.tiling(len(arrays)), "bn_fused_backward_sums"
    *dz, partial = stream(tiles, name, arrays, channels, [], first, sums=2, outputs=int(write_dz))
    slope_and_level, sums = merge_sums(tiles, partial, channels, numbers, merge)
    if dz:
        arrays = [*dz, view.as_rows(x)]
    tiles, channels = view.tiling(len(arrays)), [*slope_and_level, *channels]
    (dx,) = stream(tiles, "bn_fused_backward_dx", arrays, channels, [], second, outputs=1, reverse=True)
    return view.gradients(dx, dz, sums)


def normalise_backward(dy, x, pivot, offset, rstd, weight, bias, residual=None, y=None, mask=None, *, spec):
    """Gradient of `normalise`: dx with the statistics held constant, and the sums as in `backward`; in one pass."""
    _check_no_mask(mask)
    view = _View(x, spec)
    arrays = view.gradient_arrays(dy, x, residual, y)
    tiles, write_dz = view.tiling(len(arrays)), len(arrays) == 3
    channels = view.tiled(pivot, offset, rstd, weight, bias)
    work = _gradient(spec.activation, y is not None, sums=True, dx=True, dz=write_dz)
    name = "bn_fused_normalise_backward"
    dx, *dz, partial = stream(tiles, name, arrays, channels, [], work, sums=2, outputs=1 + write_dz)
    _, sums = merge_sums(tiles, partial, channels, [], sums_merge(_finish_sums, needed=0))
    return view.gradients(dx, dz, sums)


def moments_backward(dmean, dvar, x, pivot, delta, count, mask=None, *, spec):
    """Gradient of `moments` with respect to x."""
    _check_no_mask(mask)
    view = _View(x, spec)
    channels = view.tiled(pivot, delta, dmean, dvar)
    name, work = "bn_fused_moments_backward", Pass(_moments_gradient_constants, _moments_gradient_row)
    flat, numbers = [view.as_rows(x)], [view.group(count)]
    (dx,) = stream(view.tiling(1), name, flat, channels, numbers, work, outputs=1)
    return (view.like_x(dx),)


def _check_no_mask(mask):
    if mask is not None:
        raise ValueError("pallas_gpu takes no mask")
