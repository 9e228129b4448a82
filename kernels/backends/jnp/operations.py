"""Every operation of `contract` in jnp, with the closed-form backward.

Everything is affine in d = x - pivot, which is exact where it matters, so that no digit is lost when |mean| is much
larger than the standard deviation:

    delta = mean(d)                 var = mean(d^2) - delta^2
    y     = activation(d * scale + shift + residual)
    dx    = dz * scale + d * slope + level

with scale, shift, slope and level per channel. Traffic in passes over x where XLA fuses the elementwise work into the
reductions (GPU, any layout): forward 2 reads and 1 write, one read more with a residual and one with a mask; backward 4
reads and 1 write, with residual and activation 5 and 2. How the sums are written decides whether XLA does so, see
`plan`. x is worked on where it lies: no transpose in any layout.

The pivot is the mean of about sqrt(n) rows, spread over the n rows of the channel. var's rounding error grows with 1 +
(pivot - mean)^2/var, whatever the mean; a single outlier among k sampled rows adds at most n/k^2, about 1, to that
factor, which is why k is sqrt(n) and not a few (Chan, Golub & LeVeque, "Algorithms for computing the sample variance",
The American Statistician 37, 1983). On a CPU it is the square root of the examples and of the positions of each, where
they lie apart, so that it holds of an outlying example too. Under a mask, where a sample may have nothing that counts,
it is the mean itself. Where `jax.export` leaves n open, k is at least n/15, for a fifteenth of a read more: whatever x
is, the mean of k of n rows has (pivot - mean)^2/var of at most n/k - 1, so that the factor is 15 at most.

On a TPU XLA makes sums in the kernel of the convolution or matrix product before, and spares a read of x, if the pivot
is there before x. So a large x has the running mean as its pivot. Where that is more than two standard deviations from
a channel's mean, so that the factor is above 5, the sums are made again, about the sample's.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from bn_fused.kernels.activations import ACTIVATIONS, activate
from bn_fused.kernels.backends.jnp.plan import plan_of
from bn_fused.kernels.backends.jnp.sums import LEAST_SUMS, sums_of, written_out
from bn_fused.kernels.contract import (
    LIKE_X,
    MASK,
    OPERATIONS,
    accumulation_dtype,
    blend,
    moments_cotangents,
    reciprocal_std,
    scale_and_shift,
    statistics_cotangents,
    sum_with_xhat,
    through_moments,
)
from bn_fused.kernels.layout import ROW, as_number, count_rows, expand, merge_rows, sample_rows, sum_rows
from bn_fused.kernels.padding import guarded, product, without_padding


def moments(x, mask=None, *, spec, expected=None):
    """Mean, as pivot + delta, and biased variance of each channel over its rows (those that count, under a mask).

    `expected`: what the mean may be near to, per channel, or None.
    """
    layout, dtype = spec.layout, accumulation_dtype(x.dtype)
    if mask is None:
        count = as_number(count_rows(x.shape, layout), dtype)
        if expected is not None and plan_of(spec).expects:
            return _moments_about_expected(expected.astype(dtype), x, count, spec)
        pivot = _mean_of_sample(x, spec)
    else:
        values = x.astype(dtype), jnp.ones(x.shape, dtype)
        total, count = sums_of([without_padding(mask, value) for value in values], spec)
        count = jnp.maximum(count, 1)
        pivot = _or_zero(total / count)
    return _moments_about(pivot, x, count, mask, spec)


def _moments_about(pivot, x, count, mask, spec):
    """`moments` about a finite pivot."""
    d = without_padding(mask, deviation(x, pivot, spec))
    total, square_sum = sums_of((d, jnp.square(d)), spec)
    delta = total / count
    return pivot, delta, _variance(square_sum / count, delta)


FAR = 2  # standard deviations of a channel
AGAIN = "bn_fused_moments_again"  # the scope of what is computed where a mean is far


def _moments_about_expected(expected, x, count, spec):
    """`moments` for XLA:TPU, about a pivot that is there before x: a convolution's kernel then makes the sums too.

    About a sample's mean it makes them only when x is written, and reads all of x again. That is done where a channel's
    mean is far from the pivot, and var's rounding error more than 1 + FAR^2 times what it is about the mean. Not about
    the mean that was found: delta has the digits of a far pivot only.
    """
    _, delta, var = first = _moments_about(_or_zero(expected), x, count, None, spec)
    near = jnp.isfinite(var) & (jnp.square(delta) <= FAR**2 * var)

    def again():
        second = _moments_about(_mean_of_sample(x, spec), x, count, None, spec)
        # The others keep theirs: what one channel has in it changes nothing in another.
        return tuple(jnp.where(near, *either) for either in zip(first, second, strict=True))

    with jax.named_scope(AGAIN):
        return lax.cond(jnp.all(near), lambda: first, again)


def _mean_of_sample(x, spec):
    """The mean of about the square root of the rows of each channel, finite."""
    layout, dtype = spec.layout, accumulation_dtype(x.dtype)
    if plan_of(spec).fold is None:
        sample = sample_rows(x, layout).astype(dtype)
    else:
        # A few stretches of a few examples. Some of every example are a line of memory each, and took XLA:CPU half as
        # long as a sum over all rows.
        (x,), layout = merge_rows([x], layout)
        sample = written_out(sample_rows(x, layout, of_each_axis=True).astype(dtype))
    return _or_zero(sum_rows(sample, layout) / as_number(count_rows(sample.shape, layout), dtype))


def _or_zero(values):
    """The values, those that are not finite as zero: as a pivot they would turn an infinite mean into NaN."""
    return jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values))


def _variance(mean_square, delta):
    """mean_square - delta^2, at least 0: `contract.squares_about_mean` of means, in fewer operations.

    With more of them XLA:CPU fuses what stands around them in another way, and the last bits of other results change.
    """
    correction = delta * delta
    overflows = jnp.isfinite(delta) & ~jnp.isfinite(correction)
    correction = jnp.where(overflows, jnp.zeros_like(correction), correction)
    return jnp.maximum(mean_square - correction, jnp.zeros_like(delta))


def normalise(x, pivot, offset, rstd, weight, bias, residual=None, mask=None, *, spec):
    """y = activation((x - pivot - offset) * rstd * weight + bias + residual), in x's dtype."""
    del mask
    d = deviation(x, pivot, spec)
    residual = _as_stored(residual) if plan_of(spec).stages else residual
    z = before_activation(d, offset, rstd, weight, bias, residual, None, spec)
    return activate(z, spec.activation).astype(x.dtype)


def forward(x, weight, bias, running_mean, running_var, coefficients, residual=None, mask=None, *, spec):
    """Moments, blend and normalisation: y, the moments and the new running statistics."""
    pivot, delta, var = moments(x, mask, spec=spec, expected=running_mean)
    new = blend(pivot, delta, var, running_mean, running_var, coefficients)
    rstd = reciprocal_std(new.norm_var, spec.eps)
    y = normalise(x, pivot, new.offset, rstd, weight, bias, residual, spec=spec)
    return y, pivot, delta, var, new.offset, rstd, new.new_running_mean, new.new_running_var


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
    total=lambda value: value,
):
    """Gradient of `forward`: dx, sum(dz), sum(dz * xhat), and dresidual where the derivative needs residual or y.

    `total` adds the cotangents of the moments over what x has only a part of (a named axis); the sums stay local.
    """
    if plan_of(spec).stages and _is_result(residual, y):
        # XLA would let the forward compute what the derivative needs of these, and keep that too.
        x, residual, y = lax.optimization_barrier((x, residual, y))
    normalisation = offset, rstd, weight, bias, residual, y, mask, spec
    d = deviation(x, pivot, spec)
    dz = _times_derivative(dy, d, *normalisation)
    sum_dz, sum_dz_xhat = _sums(d, dz, offset, rstd, mask, spec)
    from_normalisation = statistics_cotangents(weight, rstd, sum_dz, sum_dz_xhat)
    dmean, dvar = map(total, moments_cotangents(dmean, dvar, *from_normalisation, batch))
    dresidual = _dresidual(dz, residual, y, x.dtype)
    if plan_of(spec).stages and spec.activation is not None:
        # Left to itself, XLA:GPU writes dz to memory for its next use, in float32. It is cheaper to compute it from x
        # and dy again; and where it is a result, and so written anyway, to read that.
        if dresidual:
            x, dz, dmean, dvar = lax.optimization_barrier((x, *dresidual, dmean, dvar))
            d, dz, dresidual = deviation(x, pivot, spec), dz.astype(d.dtype), (dz,)
        else:
            x, dy, dmean, dvar = lax.optimization_barrier((x, dy, dmean, dvar))
            d = deviation(x, pivot, spec)
            dz = _times_derivative(dy, d, *normalisation)
    dx = dz * expand(rstd * weight.astype(rstd.dtype), spec.layout)
    dx = dx + _through_moments(d, dmean, dvar, delta, count, mask, spec.layout)
    return dx.astype(x.dtype), sum_dz, sum_dz_xhat, *dresidual


def moments_backward(dmean, dvar, x, pivot, delta, count, mask=None, *, spec):
    """Gradient of `moments` with respect to x."""
    d = deviation(x, pivot, spec)
    return (_through_moments(d, dmean, dvar, delta, count, mask, spec.layout).astype(x.dtype),)


def normalise_backward(dy, x, pivot, offset, rstd, weight, bias, residual=None, y=None, mask=None, *, spec):
    """Gradient of `normalise`: dx with the statistics held constant, and the sums as in `backward`."""
    d = deviation(x, pivot, spec)
    dz = _times_derivative(dy, d, offset, rstd, weight, bias, residual, y, mask, spec)
    sum_dz, sum_dz_xhat = _sums(d, dz, offset, rstd, mask, spec)
    dx = dz * expand(rstd * weight.astype(rstd.dtype), spec.layout)
    return dx.astype(x.dtype), sum_dz, sum_dz_xhat, *_dresidual(dz, residual, y, x.dtype)


def deviation(x, pivot, spec):
    """d = x - pivot, in the accumulation dtype."""
    return x.astype(accumulation_dtype(x.dtype)) - expand(pivot, spec.layout)


def before_activation(d, offset, rstd, weight, bias, residual, mask, spec):
    """z = (d - offset) * rstd * weight + bias + residual."""
    scale, shift = scale_and_shift(offset, rstd, weight, bias)
    z = guarded(jnp.multiply, mask)(d, expand(scale, spec.layout)) + expand(shift, spec.layout)
    return z if residual is None else z + residual.astype(d.dtype)


def activation_derivative(d, offset, rstd, weight, bias, residual, y, mask, spec):
    """activation'(z): computed of y, where it is kept for that (see `contract.kept_for_derivative`)."""
    if y is None:
        argument = before_activation(d, offset, rstd, weight, bias, residual, mask, spec)
    else:
        argument = y.astype(d.dtype)
    activation = ACTIVATIONS[spec.activation]
    if plan_of(spec).stages and activation.steps is not None:
        return _of_bits(argument, *activation.steps)
    return guarded(activation.derivative, mask)(argument)


def _times_derivative(dy, d, offset, rstd, weight, bias, residual, y, mask, spec):
    """dz = dy * activation'(z)."""
    dz = dy.astype(d.dtype)
    if spec.activation is None:
        return dz
    derivative = activation_derivative(d, offset, rstd, weight, bias, residual, y, mask, spec)
    steps, is_result = ACTIVATIONS[spec.activation].steps, _is_result(residual, y)
    if plan_of(spec).chooses and is_result and steps == (0, 0):
        # XLA:TPU writes and reads it so; a product is in float32, and it writes and reads a mask and dy for that.
        return lax.select(derivative > 0, dy, jnp.zeros_like(dy)).astype(d.dtype)
    dz = product(mask, dz, derivative)
    # Two loops read dz. A CPU computes it in both where it is no result anyway and the derivative is one of steps.
    return written_out(dz) if plan_of(spec).fold is not None and (is_result or steps is None) else dz


def _of_bits(argument, below, at_zero):
    """The derivative that is 1 above zero and has these values elsewhere (the second 0 or 1), for XLA:GPU.

    Without a comparison: XLA would write its result, which is small, and read it again for each of the sums. A NaN
    and -0.0 count by their sign.
    """
    integer = jnp.dtype(f"int{8 * argument.dtype.itemsize}")
    bits = lax.bitcast_convert_type(argument, integer) + integer.type(at_zero)
    return jnp.maximum(lax.clamp(integer.type(0), bits, integer.type(1)).astype(argument.dtype), below)


def _as_stored(array):
    """bfloat16 as float32 by its bits, for XLA:GPU; other arrays as they are.

    For an ordinary conversion XLA takes the float32 value that was rounded, and the operation before has to write that
    beside its result in bfloat16.
    """
    if array is None or array.dtype != jnp.bfloat16:
        return array
    bits = lax.bitcast_convert_type(array, jnp.uint16).astype(jnp.uint32) << jnp.uint32(16)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _sums(d, dz, offset, rstd, mask, spec):
    """sum(dz) and sum(dz * xhat), xhat = (d - offset) * rstd."""
    least_sums = 1 if spec.activation is None else LEAST_SUMS
    sum_dz, sum_dz_d = sums_of((dz, product(mask, dz, d)), spec, least_sums)
    return sum_dz, sum_with_xhat(sum_dz, sum_dz_d, offset, rstd)


def _through_moments(d, dmean, dvar, delta, count, mask, layout):
    """dmean/n + (d - delta) * 2 * dvar/n: the part of dx that goes through the moments."""
    slope, level = through_moments(dmean, dvar, delta, count[..., None])
    # Before and after: what is masked has no part in the gradient, nor in this product's own derivatives.
    return without_padding(mask, without_padding(mask, d) * expand(slope, layout) + expand(level, layout))


def _is_result(residual, y):
    """Whether dz is a result of a backward, the residual's gradient: `contract.has_residual` of operands."""
    return residual is not None or y is not None


def _dresidual(dz, residual, y, dtype):
    """The residual's gradient as a tuple of one, or none where it is no result."""
    return (dz.astype(dtype),) if _is_result(residual, y) else ()


SHORT = 32  # a last axis with fewer rows; without an activation one with fewer bytes


def with_merged_rows(operation):
    """An operation of the contract with row axes that lie together as one, where the last is short and the plan folds.

    XLA:CPU's loops run along the last axis of their result; over one of 14 they took up to five times as long. So what
    has x's shape is written in the merged shape; but not y without an activation, because the user's own may follow, in
    the same loop. Where the last axis is long, what was merged took up to 1.2 times as long, forward and backward.
    """
    contract = OPERATIONS[operation.__name__]

    def merged(*, spec, **operands):
        shape = operands["x"].shape
        if not _is_short(operands["x"], spec):
            return operation(**operands, spec=spec)
        with_rows = [name for name in operands if contract.operands[name] in (LIKE_X, MASK)]
        arrays, layout = merge_rows([operands[name] for name in with_rows], spec.layout)
        operands |= dict(zip(with_rows, arrays, strict=True))
        results = operation(**operands, spec=replace(spec, layout=layout))
        results = list(results if isinstance(results, tuple) else (results,))
        is_longer = arrays[0].shape[-1] > shape[-1]
        for index, (name, kind) in enumerate(contract.result_kinds(operands).items()):
            if kind == LIKE_X:
                written = is_longer and (name != "y" or spec.activation is not None)
                results[index] = jnp.reshape(written_out(results[index]) if written else results[index], shape)
        return tuple(results)

    return merged


def _is_short(x, spec):
    """Whether XLA:CPU's loops are slow over the last axis of x."""
    last = x.shape[-1]
    if plan_of(spec).fold is None or spec.layout[-1] != ROW or is_symbolic_dim(last):
        return False
    return (last if spec.activation is not None else last * x.dtype.itemsize) < SHORT
