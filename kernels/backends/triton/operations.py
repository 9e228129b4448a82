"""The backend `triton`: every operation of `contract` for GPUs, with Triton through jax-triton.

For NVIDIA's since Ampere, and AMD's Instinct MI200 and MI300 series (gfx90a, gfx942), with their own tiles.

Any number of rows and of channels is streamed in passes that read x from memory once each and write what they compute
directly (`passes` says how, `plan` with which tiles). Passes over arrays of x's size, R reads and W writes, and
launches:

    forward                   moments R x, [merge], normalise R x (+R residual) W y       3 launches
    backward                  sums R x, R dy, [merge], gradient R x, R dy W dx            3 launches
      where dz is a result    sums R x, R dy, R k W dz, [merge], gradient R x, R dz W dx  3 launches
    moments                   R x                                                         2 launches
    moments_backward          R x W dx                                                    1 launch
    normalise                 R x (+R residual) W y                                       1 launch
    normalise_backward        R x, R dy (+R k) W dx (+W dz)                               2 launches

dz is a result, the residual's gradient, where an activation follows the residual; its derivative is computed of k then,
the residual or y: see `contract.kept_for_derivative`. The sums are of dz before it is rounded to x's dtype.

[merge] is a launch of O(channels): it merges the blocks' moments (Chan) and computes the blend with the running
statistics, or from the sums what the gradient needs per channel. Before the moments each block reads the first tile of
its rows for the pivot, and finds it in the cache a moment later. The second pass of forward and backward goes through
the rows backwards: it starts with what the first has left in L2. What is not read again, L2 may drop at once.

Where the cache is large and the memory slow (Ada, MI300X: `plan.heuristic`), forward and backward work slab by
slab: the launches of a few channels, whose rows stay in the cache between both passes, then those of the next few. From
memory that is R W forward and 2R W backward, or 3R 2W with dz, for as many times more launches. The results are the
same arrays, which each slab continues in place.

x of any layout is seen as [groups, rows, channels]; where the channels lie last in memory that costs nothing. Where XLA
chooses the layout, between convolutions, it makes them lie last for 16-bit types, and for float32 since Hopper; between
convolutions of float32 on Ampere and Ada it keeps them first, and a transpose is added before and after each pass.

Limits, refused by name: float64; an activation that `passes` does not have; a mask; compute capabilities below 8.0, and
those and AMD's architectures that these kernels were not compiled for; arrays that XLA partitions over several devices;
2^31 rows, values per channel, or values between the first and the last row of a tile, or more; on AMD 2^32 threads of a
launch or more. jax-triton must be installed, in the one version that works with all versions of JAX this library is
for; for AMD with Triton 3.6 alone.
Where a row of channels is not a multiple of 16 bytes, and the number of rows has no divisor with which several rows
are, values are read one by one, several times slower. The running statistics are blended inside the launch if they are
float32, and with jnp after it otherwise.

On AMD jax-triton compiles for the first GPU of the process, so that without one nothing is lowered, and hands the code
over in a temporary file with a name of its own: JAX's compilation cache does not find such a program again.

Never run on a GPU: the kernels' numbers are checked in Triton's interpreter, and their code compiled; for NVIDIA within
XLA's programs, for AMD up to what XLA is given.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bn_fused.kernels.activations import LEAKY_RELU_SLOPE
from bn_fused.kernels.backends.gpu.view import View
from bn_fused.kernels.backends.triton.plan import Plan, check, merge_tile, slab_columns
from bn_fused.kernels.contract import blend, reciprocal_std
from bn_fused.kernels.jax_internals import first_amd_architecture

F32 = jnp.float32


def _check_that_jax_triton_compiles_for(architecture):
    """ValueError unless the AMD GPU that jax-triton would compile for is there, and of that architecture."""
    first = first_amd_architecture()
    if first != architecture:
        there = "there is none" if first is None else f"that is {first}"
        raise ValueError(
            f"jax-triton compiles for the first AMD GPU of the process alone, and {there}: triton cannot be lowered "
            f"for {architecture} here"
        )


def launch(kernel, name, inputs, outputs, *, grid, warps, architecture, in_place, **constants):
    """One launch of a kernel, whose parameters are inputs, outputs and constants, in order; returns the outputs.

    `in_place`: {input: output} of the places of those that are the same memory.
    """
    import jax_triton

    on_amd = isinstance(architecture, str)
    if on_amd:
        _check_that_jax_triton_compiles_for(architecture)
    # The kernels' own loops say how many stages they have.
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=tuple(outputs),
        grid=(grid,),
        name=f"bn_fused_{name}",
        num_warps=warps,
        num_stages=1,
        input_output_aliases=in_place,
        # For AMD jax-triton asks the device.
        compute_capability=None if on_amd else architecture,
        **constants,
    )


@dataclasses.dataclass(frozen=True)
class _Slab:
    """The columns of one launch: all of them, or as many as the slabs of a plan have.

    `number`: int32 [1], which slab it is. It is what a slab's second pass gives to the launches of the next: these
    cannot begin, and push this slab out of the cache, before that has ended.
    """

    columns: int
    channels: int
    number: jax.Array
    whole: bool


class _View(View):
    """The view of one call that its plan makes, and the launches over it."""

    def __init__(self, x, spec):
        if not isinstance(spec.plan, Plan):
            raise TypeError(f"plan is {spec.plan!r}; triton needs one of {Plan}")
        super().__init__(x, spec.layout, spec.plan.fold)
        check(spec.plan, self.rows, self.channels)
        self.plan, self.activation, self.eps = spec.plan, spec.activation or "none", spec.eps

    def slab(self, slabs=1):
        """The first of that many slabs: of the plan's, or of one that has all columns."""
        number, width = jnp.zeros((1,), jnp.int32), self.folded[-1]
        if slabs == 1:
            return _Slab(width, self.channels, number, True)
        columns = slab_columns(self.plan, width)
        return _Slab(columns, columns, number, False)

    def stream(self, kernel, name, slab, inputs, *, arrays, before=(), sums=0, outputs=0, reverse=False, **constants):
        """A pass over a slab that reads `arrays` of the inputs by tiles. Returns its results, and the slab after it.

        The results are `outputs` arrays like the first input, then the partial results, if there are `sums`. `before`
        are the outputs as the slab before this one has left them, which this one continues in the same memory; before
        the first slab each is None.
        """
        plan, (groups, rows, width) = self.plan, self.folded
        blocks = -(-slab.columns // plan.columns)
        grid = groups * plan.splits * blocks
        types = [jax.ShapeDtypeStruct(self.folded, inputs[0].dtype)] * outputs
        if sums:
            types.append(jax.ShapeDtypeStruct((groups, plan.splits, sums, slab.columns), F32))
        elif not slab.whole:
            types.append(jax.ShapeDtypeStruct((1,), jnp.int32))
        results = launch(
            kernel,
            name,
            # A pointer that is not read stands where there is nothing before.
            [slab.number, *(slab.number if array is None else array for array in before), *inputs],
            types,
            in_place={1 + place: place for place, array in enumerate(before) if array is not None},
            grid=grid,
            warps=plan.warps,
            architecture=plan.architecture,
            ROWS=rows,
            WIDTH=width,
            CHANNELS=self.channels,
            SLAB=slab.columns,
            SPLITS=plan.splits,
            BLOCKS=blocks,
            GRID=grid,
            TILE_ROWS=plan.rows_of(arrays),
            COLUMNS=plan.columns,
            STAGES=plan.stages,
            REVERSE=reverse,
            **constants,
        )
        if sums or slab.whole:
            return results, slab
        *results, number = results
        return results, dataclasses.replace(slab, number=number)

    def merge(self, kernel, name, slab, inputs, number, **constants):
        """A launch of O(channels): `number` results [groups, slab.channels]."""
        plan, (groups, rows, _) = self.plan, self.folded
        entries, columns, warps = merge_tile(plan, slab.channels)
        return launch(
            kernel,
            name,
            [slab.number, *inputs],
            [jax.ShapeDtypeStruct((groups, slab.channels), F32)] * number,
            in_place={},
            grid=groups * -(-slab.channels // columns),
            warps=warps,
            architecture=plan.architecture,
            ROWS=rows,
            FOLD=plan.fold,
            CHANNELS=self.channels,
            SLAB=slab.channels,
            SPLITS=plan.splits,
            ENTRIES=entries,
            COLUMNS=columns,
            **constants,
        )

    def channels_of(self, *values):
        return [self.channel(value) for value in values]

    def joined(self, parts):
        """Values per channel [groups, channels] from those of each slab, [groups, slab.channels]: lists of them."""
        if len(parts) == 1:
            return parts[0]
        return [jnp.concatenate(values, axis=1)[:, : self.channels] for values in zip(*parts, strict=True)]


def _kernels():
    """The modules `passes` and `merges`, which import Triton."""
    from bn_fused.kernels.backends.triton import merges, passes

    return passes, merges


def _partial_moments(view, slab, flat):
    passes, _ = _kernels()
    (partial,), _ = view.stream(passes.moments, "moments", slab, [flat], arrays=1, sums=3)
    return partial


def moments(x, mask=None, *, spec):
    """Mean, as pivot + delta, and biased variance of each channel over its rows."""
    _check_no_mask(mask)
    view = _View(x, spec)
    return tuple(view.unchannel(value) for value in _moments(view, view.as_rows(x)))


def _moments(view, flat):
    _, merges = _kernels()
    slab = view.slab()
    return view.merge(merges.merge_moments, "merge_moments", slab, [_partial_moments(view, slab, flat)], 3)


def forward(x, weight, bias, running_mean, running_var, coefficients, residual=None, mask=None, *, spec):
    """Moments, blend and normalisation: y, and per channel the moments, offset, rstd and the new running statistics."""
    _check_no_mask(mask)
    view, (_, merges) = _View(x, spec), _kernels()
    flat, added = view.as_rows(x), None if residual is None else view.as_rows(residual)
    affine = view.channels_of(weight, bias)
    if running_mean.dtype != F32 or running_var.dtype != F32:
        moments = [view.unchannel(value) for value in _moments(view, flat)]
        offset, norm_var, *new = blend(*moments, running_mean, running_var, coefficients)
        rstd = reciprocal_std(norm_var, spec.eps)
        channels = [*view.channels_of(moments[0], offset, rstd), *affine]
        y, _ = _normalise(view, view.slab(), flat, added, channels, reverse=True)
        return view.like_x(y), *moments, offset, rstd, *new
    packed = jnp.reshape(coefficients.astype(F32), (view.groups, coefficients.shape[-1]))
    per_channel = [*view.channels_of(running_mean, running_var), packed]
    slab, y, parts = view.slab(view.plan.slabs), None, []
    for _ in range(view.plan.slabs):
        inputs = [_partial_moments(view, slab, flat), *per_channel]
        statistics = view.merge(merges.merge_and_blend, "merge_moments", slab, inputs, 7, EPS=view.eps)
        pivot, _, _, offset, rstd, *_ = statistics
        channels = [pivot, offset, rstd, *affine]
        y, slab = _normalise(view, slab, flat, added, channels, before=y, reverse=True)
        parts.append(statistics)
    return view.like_x(y), *(view.unchannel(value) for value in view.joined(parts))


def _normalise(view, slab, flat, added, channels, *, before=None, reverse):
    """y with this slab, and the slab after it."""
    passes, _ = _kernels()
    (y,), following = view.stream(
        passes.normalise,
        "normalise",
        slab,
        # Where there is no residual its pointer is never read.
        [flat, channels[0] if added is None else added, *channels],
        arrays=1 if added is None else 2,
        before=(before,),
        outputs=1,
        reverse=reverse,
        RESIDUAL=added is not None,
        ACTIVATION=view.activation,
        SLOPE=LEAKY_RELU_SLOPE,
        **({"following": None} if slab.whole else {}),
    )
    return y, following


def normalise(x, pivot, offset, rstd, weight, bias, residual=None, mask=None, *, spec):
    """y = activation((x - pivot - offset) * rstd * weight + bias + residual), in x's dtype."""
    _check_no_mask(mask)
    view = _View(x, spec)
    channels = view.channels_of(pivot, offset, rstd, weight, bias)
    added = None if residual is None else view.as_rows(residual)
    y, _ = _normalise(view, view.slab(), view.as_rows(x), added, channels, reverse=False)
    return view.like_x(y)


def _gradient(view, name, slab, arrays, derivative, channels, through=None, *, sums, dx, before=(), reverse=False):
    """A pass of a backward over dy, x and, where it matters, residual or y; or over dz and x: see the kernel."""
    passes, _ = _kernels()
    dz = len(arrays) == 3
    # The pointers that are not read, and those that are not written.
    inputs = [*arrays, *channels[: 3 - len(arrays)], *channels, *(through or channels[:2])]
    written = dx + dz + (sums or not slab.whole)
    unused = dict.fromkeys(("first_out", "second_out", "third_out")[written:])
    return view.stream(
        passes.gradient,
        name,
        slab,
        inputs,
        arrays=len(arrays),
        before=tuple(before) or (None,),
        sums=2 * sums,
        outputs=dx + dz,
        reverse=reverse,
        **derivative,
        SLOPE=LEAKY_RELU_SLOPE,
        SUMS=sums,
        WRITE_DX=dx,
        MOMENTS=through is not None,
        **unused,
    )


_NO_DERIVATIVE = {"ACTIVATION": "none", "KEPT": "none"}


def _derivative(view, residual, y):
    """The constants that say by which derivative a pass multiplies dy, and of what it is computed."""
    kept = "y" if y is not None else "residual" if residual is not None else "none"
    return {"ACTIVATION": view.activation, "KEPT": kept}


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
    view, (_, merges) = _View(x, spec), _kernels()
    first = second = view.gradient_arrays(dy, x, residual, y), _derivative(view, residual, y)
    channels = view.channels_of(pivot, offset, rstd, weight, bias)
    per_channel = [*channels[1:4], *view.channels_of(dmean, dvar, delta), view.group(batch), view.group(count)]
    slab, dx, dz, parts = view.slab(view.plan.slabs), [], [], []
    for _ in range(view.plan.slabs):
        (*dz, partial), _ = _gradient(view, "backward_sums", slab, *first, channels, sums=True, dx=False, before=dz)
        *sums, slope, level = view.merge(merges.merge_backward, "merge_sums", slab, [partial, *per_channel], 4)
        through = slope, level
        if dz:
            second = [*dz, view.as_rows(x)], _NO_DERIVATIVE
        dx, slab = _gradient(
            view, "backward_dx", slab, *second, channels, through, sums=False, dx=True, before=dx, reverse=True
        )
        parts.append(sums)
    return view.gradients(*dx, dz, view.joined(parts))


def normalise_backward(dy, x, pivot, offset, rstd, weight, bias, residual=None, y=None, mask=None, *, spec):
    """Gradient of `normalise`: dx with the statistics held constant, and the sums as in `backward`; in one pass."""
    _check_no_mask(mask)
    view, (_, merges) = _View(x, spec), _kernels()
    slab = view.slab()
    arrays, derivative = view.gradient_arrays(dy, x, residual, y), _derivative(view, residual, y)
    channels = view.channels_of(pivot, offset, rstd, weight, bias)
    (dx, *dz, partial), _ = _gradient(
        view, "normalise_backward", slab, arrays, derivative, channels, sums=True, dx=True
    )
    sums = view.merge(merges.merge_sums, "merge_sums", slab, [partial, *channels[1:3]], 2)
    return view.gradients(dx, dz, sums)


def moments_backward(dmean, dvar, x, pivot, delta, count, mask=None, *, spec):
    """Gradient of `moments` with respect to x."""
    _check_no_mask(mask)
    view, (passes, _) = _View(x, spec), _kernels()
    inputs = [view.as_rows(x), *view.channels_of(pivot, delta, dmean, dvar), view.group(count)]
    (dx,), _ = view.stream(passes.moments_gradient, "moments_backward", view.slab(), inputs, arrays=1, outputs=1)
    return (view.like_x(dx),)


def _check_no_mask(mask):
    if mask is not None:
        raise ValueError("triton takes no mask")
