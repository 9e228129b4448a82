"""The three approaches, once: how batch moments and running statistics mix in a training step.

`definition` is the table of formulas as they are written down; the reference backend evaluates it as it stands.
`coefficients` is the same table as the six numbers that every other backend takes (see `bn_fused.kernels.contract`).

For momentum m, the share z of the running average that is still its zero start, the warm-up counter c and period P,
with z' and c' after the step and f = c'/P:

| approach | z' | c' | new running mean | new running variance | normalised with |
|---|---|---|---|---|---|
| batch | z m | c | (1-m) mu + m rm | (1-m) k var + m rv | mu, var |
| ema | z m | min(c+1, P) | (1-m) mu + m rm | (1-m) var + m rv | (1-f) mu + f (z' mu + rm'), var alike |
| ema_compatibility | 0 | c | mu if z = 1 else (1-m) mu + m rm | var alike | rm', rv' |

k is the debias factor of the variance (`debias_factor`). Inference normalises with rm/(1-z) and rv/(1-z).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bn_fused.kernels import Coefficients

APPROACHES = ("batch", "ema", "ema_compatibility")
DEBIAS = ("axis", "samples", "none")


class Step(NamedTuple):
    """What a step of the definition gives: the normalisation's moments and the new running statistics."""

    norm_mean: jax.Array
    norm_var: jax.Array
    running_mean: jax.Array
    running_var: jax.Array


def advance(approach, zero_frac, count, *, momentum, warmup_period):
    """z' and c' of the table: the share of the zero start and the warm-up counter after a step."""
    if approach == "ema_compatibility":
        return 0.0 * zero_frac, count
    if approach == "ema":
        count = jnp.minimum(count + 1, warmup_period)
    return zero_frac * momentum, count


def warmup_fraction(count, warmup_period, dtype):
    """f = c'/P of the approach `ema`."""
    return count.astype(dtype) / warmup_period


def debias_factor(debias, positions, examples, eps, dtype):
    """k, the factor that makes the batch's variance unbiased; 1 where n is 1.

    "samples": n/(n-1) with n the number of positions that the variance is the mean of (Ioffe & Szegedy,
    arXiv:1502.03167, algorithm 2); "axis": n/max(n-1, eps) with n the number of examples; "none": 1.
    """
    if debias == "none":
        return jnp.ones((), dtype)
    if debias == "samples":
        n = jnp.asarray(positions, dtype)
        return n / jnp.maximum(n - 1, 1)
    n = jnp.asarray(examples, dtype)
    return jnp.where(n > 1, n / jnp.maximum(n - 1, eps), jnp.ones((), dtype))


def definition(approach, mean, var, running_mean, running_var, zero_frac, new_zero_frac, fraction, *, momentum, k):
    """One step of the table, in its order of operations; all values of one dtype, per channel or scalar.

    `momentum` is a Python float, whose complement is taken before it is rounded to that dtype, or has it too.
    """
    m = momentum
    if approach == "ema_compatibility":
        first = zero_frac == 1
        new_mean = jnp.where(first, mean, (1 - m) * mean + m * running_mean)
        new_var = jnp.where(first, var, (1 - m) * var + m * running_var)
        return Step(new_mean, new_var, new_mean, new_var)
    new_mean = (1 - m) * mean + m * running_mean
    if approach == "batch":
        return Step(mean, var, new_mean, (1 - m) * k * var + m * running_var)
    new_var = (1 - m) * var + m * running_var
    f = fraction
    norm_mean = (1 - f) * mean + f * (new_zero_frac * mean + new_mean)
    norm_var = (1 - f) * var + f * (new_zero_frac * var + new_var)
    return Step(norm_mean, norm_var, new_mean, new_var)


def coefficients(approach, zero_frac, new_zero_frac, fraction, *, momentum, k):
    """The table as six coefficients, in the dtype of `zero_frac`.

    1 - m is the complement of m as it is rounded to that dtype, as is 1 - z after the first step: what inference
    divides by is exactly what the first batch was weighted with.
    """
    dtype = zero_frac.dtype
    keep = jnp.asarray(momentum, dtype)
    gain = 1 - keep
    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
    if approach == "batch":
        return Coefficients(one, zero, zero, gain, k * gain, keep)
    if approach == "ema":
        f = fraction
        return Coefficients((1 - f) + f * (new_zero_frac + gain), f * keep, zero, gain, gain, keep)
    first = zero_frac == 1
    gain, keep = jnp.where(first, one, gain), jnp.where(first, zero, keep)
    return Coefficients(gain, keep, zero, gain, gain, keep)


def inference_coefficients(zero_frac):
    """The coefficients that normalise with running statistics and leave them as they are."""
    one, zero = jnp.ones_like(zero_frac), jnp.zeros_like(zero_frac)
    never_trained, share = _trained_share(zero_frac)
    running = jnp.where(never_trained, zero, 1 / share)
    return Coefficients(zero, running, jnp.where(never_trained, one, zero), zero, zero, one)


def inference_moments(running_mean, running_var, zero_frac):
    """Mean and variance to normalise with at inference: rm/(1-z) and rv/(1-z).

    Statistics that were never trained (z is exactly 1) are mean 0 and variance 1.
    """
    never_trained, share = _trained_share(zero_frac)
    mean = jnp.where(never_trained, jnp.zeros_like(running_mean), running_mean / share)
    var = jnp.where(never_trained, jnp.ones_like(running_var), running_var / share)
    return mean, var


def _trained_share(zero_frac):
    """Whether nothing was trained (z is exactly 1), and 1 - z, by which can be divided: 1 where nothing was."""
    never_trained = zero_frac == 1
    return never_trained, jnp.where(never_trained, jnp.ones_like(zero_frac), 1 - zero_frac)
