"""Tolerances, derived and in one place: a constant times the dtype's epsilon times the size of the terms.

`c` counts the roundings that may add up in one direction; 50 covers a formula of a dozen operations on values
that themselves come from blocked sums. A test says how large the quantities are whose rounding it allows for
(`scale`: for a sum, the sum of the absolute terms), never how far apart two results were once seen to be.
"""

import math

import jax.numpy as jnp
import numpy as np

C = 50


def eps(dtype):
    """The spacing of a floating dtype at one."""
    return float(jnp.finfo(dtype).eps)


def computed_in(dtype):
    """The dtype in which values of this dtype are computed: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)


def tol(dtype, n=1, c=C):
    """c * eps(dtype) * sqrt(n): relative error of n values of this dtype summed in no particular order."""
    return c * eps(dtype) * math.sqrt(n)


def assert_close(actual, expected, scale=None, *, dtype=np.float32, stored=None, c=C, what="value"):
    """Every element of `actual` lies within c * eps * scale of `expected`; NaN and infinities are the same.

    `scale`: size of the quantities whose roundings are allowed for, broadcast against `expected`; its
    absolute value where it is not given. `dtype`: what it was computed in. `stored`: the dtype in which the
    result is kept, whose own rounding is then allowed once; by default that of `actual`.
    """
    stored = jnp.dtype(actual.dtype if stored is None else stored)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, expected {expected.shape}"
    scale = np.abs(expected) if scale is None else np.broadcast_to(np.asarray(scale, np.float64), expected.shape)
    finite = np.isfinite(expected)
    patterns = (np.where(np.isfinite(array), 0.0, array) for array in (actual, expected))
    assert np.array_equal(*patterns, equal_nan=True), (
        f"{what} is not finite in other places than expected: {actual} against {expected}"
    )
    assert np.all(np.isfinite(scale[finite])), f"{what}: a scale that is not finite allows everything"
    allowed = c * eps(dtype) * np.where(finite, scale, 0)
    if stored != jnp.dtype(dtype):
        allowed = allowed + eps(stored) * np.abs(np.where(finite, expected, 0))
    allowed = allowed + float(jnp.finfo(stored).smallest_subnormal)
    error = np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0))
    if np.all(error <= allowed):
        return
    excess = error / allowed
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    raise AssertionError(
        f"{what}: {np.count_nonzero(error > allowed)} of {error.size} differ; worst at "
        f"{tuple(map(int, worst))}: {actual[worst]:.9g} against {expected[worst]:.9g}, "
        f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g} ({excess[worst]:.3g} times)"
    )


def assert_same_bits(actual, expected, what="value"):
    """The same dtype, shape and bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what} is {actual.dtype}{list(actual.shape)}, expected {expected.dtype}{list(expected.shape)}"
    )
    if actual.tobytes() == expected.tobytes():
        return
    bits = f"u{actual.dtype.itemsize}"
    different = np.count_nonzero(actual.view(bits) != expected.view(bits))
    gap = np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64)))
    raise AssertionError(f"{what}: {different} of {actual.size} values differ in their bits, by up to {gap:.3g}")
