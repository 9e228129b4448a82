"""What every backend computes: the operations, their operands and results, and the arithmetic per channel.

Notation, per channel: mean and var are the batch's moments, held as `pivot + delta` (pivot a value near the mean,
delta what is missing to it) because the mean alone in float32 loses delta's digits where |mean| is much larger than
the standard deviation. norm_mean = pivot + offset and norm_var are what x is normalised with, rstd =
1/sqrt(norm_var + eps). With the six coefficients of `Coefficients`

    norm_mean = batch * mean + running * running_mean
    norm_var  = batch * var  + running * running_var + constant
    new_running_mean = mean_gain * mean + keep * running_mean
    new_running_var  = var_gain  * var  + keep * running_var
    y = activation((x - norm_mean) * rstd * weight + bias + residual)
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_fused.kernels.activations import derivative_from_result
from bn_fused.kernels.padding import product

# The kinds an operand or result can have.
LIKE_X = "x"  # x's shape and dtype
MASK = "mask"  # x's shape with one channel, bool
PER_CHANNEL = "channel"  # [*groups, channels]
PER_GROUP = "group"  # [*groups]
COEFFICIENTS = "coefficients"  # [*groups, 6]


class Coefficients(NamedTuple):
    """The six numbers that make one training step of an approach out of batch moments and running statistics.

    Each is a scalar, or has shape [groups]. See the module's formulas; `bn_fused.approaches` computes them.

    - `batch`: weight of the batch's moments in the normalisation.
    - `running`: weight of the running statistics in the normalisation.
    - `constant`: added to the normalisation's variance: 1 where statistics that were never trained are used, else 0.
    - `mean_gain`, `var_gain`: weight of the batch's mean and variance in the new running statistics.
    - `keep`: weight of the old running statistics in the new ones.
    """

    batch: jax.Array
    running: jax.Array
    constant: jax.Array
    mean_gain: jax.Array
    var_gain: jax.Array
    keep: jax.Array

    def pack(self, dtype):
        """One array [*groups, 6], the form in which they travel to a backend."""
        return jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(value, dtype) for value in self)), -1)

    @staticmethod
    def unpack(packed):
        """The six values [*groups] of a packed array [*groups, 6]."""
        return Coefficients(*(packed[..., index] for index in range(len(Coefficients._fields))))


@dataclass(frozen=True)
class Spec:
    """What is static about one call: the layout of x (see `layout`), eps, the activation, the backend asked for.

    `after_convolution`: whether x is known to be made by one, which says how XLA lays it out in memory.
    `place`: what `dispatch.lowering_place` says of where a primitive around the call is lowered.
    """

    layout: str
    eps: float = 1e-5
    activation: str | None = None
    backend: str = "auto"
    plan: object = None
    after_convolution: bool = False
    place: tuple = ()


def kept_for_derivative(spec, residual, y):
    """What a backward needs beside x for the activation's derivative, as operands by name: y, the residual, or nothing.

    Without a residual x tells what the activation got, and without an activation nothing depends on it. y is kept by
    the operation that follows anyway, the residual often by none.
    """
    if residual is None or spec.activation is None:
        return {}
    return {"y": y} if derivative_from_result(spec.activation, y.dtype) else {"residual": residual}


def has_residual(present):
    """Whether an operation with these operands has a residual, whose gradient is a result of a backward.

    Where there is no activation that gradient is dy: none of `kept_for_derivative` is an operand, and it is no result.
    """
    return "residual" in present or "y" in present


def present_results(results, present):
    """The results a call has, {name: kind}, given the names of its operands."""
    return {name: kind for name, kind in results.items() if name != "dresidual" or has_residual(present)}


@dataclass(frozen=True)
class Operation:
    """An operation's operands and results, {name: kind}. A residual, y and a mask may be left out."""

    name: str
    operands: dict
    results: dict

    def result_kinds(self, present):
        """The results this call has, {name: kind}, given the names of the operands that are there."""
        return present_results(self.results, present)


_NORMALISATION = {
    "x": LIKE_X,
    "pivot": PER_CHANNEL,
    "offset": PER_CHANNEL,
    "rstd": PER_CHANNEL,
    "weight": PER_CHANNEL,
    "bias": PER_CHANNEL,
    "residual": LIKE_X,
    # Every position is normalised; where the mask is False and dy is zero, x and residual are padding and not even a
    # NaN in them gets into the sums of the backward.
    "mask": MASK,
}
# What its tangent and its backward are computed of: in the residual's place what `kept_for_derivative` says.
NORMALISED = {**_NORMALISATION, "y": LIKE_X}
_SUMS = {"dx": LIKE_X, "sum_dz": PER_CHANNEL, "sum_dz_xhat": PER_CHANNEL, "dresidual": LIKE_X}

# dz is the cotangent before the activation, dz = dy * activation'(z); xhat = (x - norm_mean) * rstd.
OPERATIONS = {
    operation.name: operation
    for operation in (
        # The whole training step of one layer.
        Operation(
            "forward",
            {
                "x": LIKE_X,
                "weight": PER_CHANNEL,
                "bias": PER_CHANNEL,
                "running_mean": PER_CHANNEL,
                "running_var": PER_CHANNEL,
                "coefficients": COEFFICIENTS,
                "residual": LIKE_X,
                "mask": MASK,
            },
            {
                "y": LIKE_X,
                "pivot": PER_CHANNEL,
                "delta": PER_CHANNEL,
                "var": PER_CHANNEL,
                "offset": PER_CHANNEL,
                "rstd": PER_CHANNEL,
                "new_running_mean": PER_CHANNEL,
                "new_running_var": PER_CHANNEL,
            },
        ),
        # Its gradient: dmean and dvar are the cotangents of the batch's moments that come from elsewhere (the
        # running statistics), batch the coefficient of that name, count the number of positions averaged over.
        Operation(
            "backward",
            {
                "dy": LIKE_X,
                "dmean": PER_CHANNEL,
                "dvar": PER_CHANNEL,
                **NORMALISED,
                "delta": PER_CHANNEL,
                "batch": PER_GROUP,
                "count": PER_GROUP,
                "mask": MASK,
            },
            _SUMS,
        ),
        # The two halves, between which devices exchange moments and sums.
        Operation(
            "moments",
            {"x": LIKE_X, "mask": MASK},
            {"pivot": PER_CHANNEL, "delta": PER_CHANNEL, "var": PER_CHANNEL},
        ),
        Operation(
            "moments_backward",
            {
                "dmean": PER_CHANNEL,
                "dvar": PER_CHANNEL,
                "x": LIKE_X,
                "pivot": PER_CHANNEL,
                "delta": PER_CHANNEL,
                "count": PER_GROUP,
                "mask": MASK,
            },
            {"dx": LIKE_X},
        ),
        Operation("normalise", _NORMALISATION, {"y": LIKE_X}),
        Operation("normalise_backward", {"dy": LIKE_X, **NORMALISED}, _SUMS),
    )
}


def widest(*dtypes):
    """float64 if it is among the dtypes, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in map(jnp.dtype, dtypes) else jnp.float32)


def accumulation_dtype(dtype):
    """The dtype of moments and sums: float64 for float64 inputs, float32 for all others."""
    return widest(dtype)


@functools.partial(jax.jit, inline=True)  # traced once for all layers of the same channels
@jax.custom_jvp
def scaled(coefficient, value):
    """coefficient [*groups] times value [*groups, channels]; zero where the coefficient is, whatever the value.

    So a running statistic that is infinite or NaN does not reach a result it has no part in.
    """
    is_zero = coefficient == 0
    if is_zero.ndim > 0:
        is_zero = jax.lax.broadcast_in_dim(is_zero, value.shape, range(is_zero.ndim))
    return jax.lax.select(is_zero, jnp.zeros_like(value), coefficient[..., None] * value)


def scaled_tangent(coefficient, tangent):
    """`scaled` of a tangent. Its derivatives are such products again: where the coefficient is zero, they are not."""
    nowhere = jnp.zeros((1,) * tangent.ndim, bool)
    return product(nowhere, coefficient[..., None], tangent)


# The product's own derivative: also where the coefficient is zero, the result depends on it.
scaled.__wrapped__.defjvps(
    lambda dcoefficient, result, coefficient, value: dcoefficient[..., None] * value,
    lambda dvalue, result, coefficient, value: scaled_tangent(coefficient, dvalue),
)


class Blend(NamedTuple):
    """The values per channel that follow from the moments: see the module's formulas."""

    offset: jax.Array
    norm_var: jax.Array
    new_running_mean: jax.Array
    new_running_var: jax.Array

    def astypes(self, moments_dtype, state_dtype):
        """What the normalisation takes in the one dtype, what the state keeps in the other."""
        dtypes = (moments_dtype, moments_dtype, state_dtype, state_dtype)
        return Blend(*(value.astype(dtype) for value, dtype in zip(self, dtypes, strict=True)))


@functools.partial(jax.jit, inline=True)  # traced once for all layers of the same channels
def blend(pivot, delta, var, running_mean, running_var, coefficients):
    """Batch moments and running statistics to what x is normalised with and to the new running statistics.

    All values are per channel [*groups, channels], `coefficients` packed [*groups, 6]. Computed in the wider of
    the moments' and the state's dtypes (float32 at least); offset and norm_var come in the moments' dtype, the
    running statistics in the state's.
    """
    moments_dtype, state_dtype = pivot.dtype, running_mean.dtype
    dtype = widest(moments_dtype, state_dtype)
    pivot, delta, var, running_mean, running_var, coefficients = (
        value.astype(dtype) for value in (pivot, delta, var, running_mean, running_var, coefficients)
    )
    new = blend_channels(pivot, delta, var, running_mean, running_var, Coefficients.unpack(coefficients), scaled)
    return new.astypes(moments_dtype, state_dtype)


@functools.partial(jax.jit, static_argnames="state_dtype", inline=True)
def blend_tangents(tdelta, tvar, coefficients, state_dtype):
    """The tangents of `blend` along those of delta and var, in which it is linear."""
    dtype = widest(tdelta.dtype, state_dtype)
    c = Coefficients.unpack(coefficients.astype(dtype))
    new = Blend(
        scaled_tangent(c.batch, tdelta.astype(dtype)),
        scaled_tangent(c.batch, tvar.astype(dtype)),
        scaled_tangent(c.mean_gain, tdelta.astype(dtype)),
        scaled_tangent(c.var_gain, tvar.astype(dtype)),
    )
    return new.astypes(tdelta.dtype, state_dtype)


def blend_channels(pivot, delta, var, running_mean, running_var, coefficients, times):
    """The formulas of `blend`, in one dtype; `times(coefficient, value)` is `scaled`, or what a kernel has for it."""
    c = Coefficients(*coefficients)
    mean = pivot + delta
    # norm_mean - pivot, without going through the rounded mean: for the approach `batch` it is delta itself.
    offset = times(c.batch, delta) + (times(c.batch - 1, pivot) + times(c.running, running_mean))
    norm_var = times(c.batch, var) + times(c.running, running_var) + times(c.constant, jnp.ones_like(var))
    new_mean = times(c.mean_gain, mean) + times(c.keep, running_mean)
    new_var = times(c.var_gain, var) + times(c.keep, running_var)
    return Blend(offset, norm_var, new_mean, new_var)


def reciprocal_std(norm_var, eps):
    """1 / sqrt(norm_var + eps)."""
    return jax.lax.rsqrt(norm_var + jnp.asarray(eps, norm_var.dtype))


def scale_and_shift(offset, rstd, weight, bias):
    """What x is normalised by: (x - norm_mean) * rstd * weight + bias is (x - pivot) * scale + shift."""
    scale = rstd * weight.astype(rstd.dtype)
    return scale, bias.astype(rstd.dtype) - offset * scale


def squares_about_mean(square_sum, total, mean):
    """square_sum - total * mean, at least 0: the sum of squares about the mean.

    Where only the correction overflows it is left out: the sum is infinite where the variance is. NaN stays. In
    selections alone, because not every kernel language has logic on vectors of bool.
    """
    correction = total * mean
    unless_overflow = jnp.where(jnp.abs(mean) < jnp.inf, jnp.zeros_like(mean), correction)
    correction = jnp.where(jnp.abs(correction) < jnp.inf, correction, unless_overflow)
    squares = square_sum - correction
    return jnp.where(squares < 0, jnp.zeros_like(squares), squares)


def sum_with_xhat(sum_dz, sum_dz_d, offset, rstd):
    """sum(dz * xhat) from the sums of dz and of dz * d: xhat = (d - offset) * rstd, d = x - pivot."""
    return (sum_dz_d - offset * sum_dz) * rstd


def statistics_cotangents(weight, rstd, sum_dz, sum_dz_xhat):
    """The cotangents of offset and norm_var in the normalisation, from its two sums per channel."""
    scale = weight.astype(rstd.dtype) * rstd
    return -scale * sum_dz, -scale * rstd * sum_dz_xhat / 2


def moments_cotangents(dmean, dvar, doffset, dnorm_var, batch, times=scaled):
    """The cotangents of the batch's moments: those from elsewhere, and the share `batch` of the normalisation's."""
    return dmean + times(batch, doffset), dvar + times(batch, dnorm_var)


def through_moments(dmean, dvar, delta, count):
    """slope and level: dx's part through the moments, dmean/n + (d - delta) * 2 * dvar/n, is d * slope + level."""
    slope = 2 * dvar / count
    return slope, dmean / count - delta * slope
