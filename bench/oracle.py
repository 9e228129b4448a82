"""BatchNorm's definition and its gradient in float64, written out in numpy: what every layer is checked against.

Arrays are in the order examples, channels, spatial sizes.
"""

import math
from typing import NamedTuple

import numpy as np


class OracleState(NamedTuple):
    """The running state in float64: mean and var [channels], zero_frac, count; see `bn_fused.approaches`."""

    mean: np.ndarray
    var: np.ndarray
    zero_frac: float = 1.0
    count: int = 0


def initial_state(channels: int) -> OracleState:
    """The state of a layer that was never trained."""
    return OracleState(np.zeros(channels), np.zeros(channels))


class OracleStep(NamedTuple):
    """A training step in float64, with the gradient of sum(y dy).

    `z` is the value before the activation, `normalised` is (x - norm_mean) rstd, `dresidual` the gradient of the
    residual, which there need not be.
    """

    y: np.ndarray
    state: OracleState
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dresidual: np.ndarray
    z: np.ndarray
    normalised: np.ndarray
    rstd: np.ndarray


def reduced(x) -> tuple[int, ...]:
    """The axes that the statistics average over."""
    return (0, *range(2, x.ndim))


def like_x(x, value):
    """A value per channel [channels] with x's rank, to be broadcast against x."""
    return np.reshape(value, (1, -1) + (1,) * (x.ndim - 2))


def _gelu(z):
    # The tanh form: Hendrycks & Gimpel, arXiv:1606.08415, section 2.
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = np.tanh(scale * (z + cubic * z**3))
    return z * (1 + tanh) / 2, (1 + tanh) / 2 + z / 2 * (1 - tanh**2) * scale * (1 + 3 * cubic * z**2)


def _silu(z):
    sigmoid = (1 + np.tanh(z / 2)) / 2
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


# Function and derivative.
ACTIVATIONS = {
    None: lambda z: (z, np.ones_like(z)),
    "relu": lambda z: (np.maximum(z, 0), (z > 0).astype(z.dtype)),
    "leaky_relu": lambda z: (np.where(z > 0, z, z / 100), np.where(z > 0, 1.0, 0.01)),
    "silu": _silu,
    "gelu": _gelu,
}
# Those whose derivative jumps at zero: which side of it a value falls on is a matter of rounding.
KINKED = ("relu", "leaky_relu")


def train_oracle(
    x, dy, weight, bias, state, *, approach, momentum, eps, warmup_period, activation=None, residual=None
) -> OracleStep:
    """A training step and its gradient by the definition, in float64.

    x, dy, residual: [examples, channels, *spatial]; weight, bias: [channels]; debias over the positions ("samples").
    """
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes = reduced(x)
    n = x.size // x.shape[1]
    mean = x.mean(axes)
    var = ((x - like_x(x, mean)) ** 2).mean(axes)
    m, z = momentum, state.zero_frac
    # slope: the derivative of the normalisation's mean by the batch's mean, and the same for the variances.
    if approach == "batch":
        new_z, count = z * m, state.count
        k = n / max(n - 1, 1)
        running_mean = (1 - m) * mean + m * state.mean
        running_var = (1 - m) * k * var + m * state.var
        norm_mean, norm_var, slope = mean, var, 1.0
    elif approach == "ema":
        new_z, count = z * m, min(state.count + 1, warmup_period)
        f = count / warmup_period
        running_mean = (1 - m) * mean + m * state.mean
        running_var = (1 - m) * var + m * state.var
        norm_mean = (1 - f) * mean + f * (new_z * mean + running_mean)
        norm_var = (1 - f) * var + f * (new_z * var + running_var)
        slope = 1 - f + f * (new_z + 1 - m)
    elif approach == "ema_compatibility":
        new_z, count = 0.0, state.count
        slope = 1.0 if z == 1 else 1 - m
        running_mean = slope * mean + (1 - slope) * state.mean
        running_var = slope * var + (1 - slope) * state.var
        norm_mean, norm_var = running_mean, running_var
    else:
        raise ValueError(f"approach is {approach!r}; the oracle knows batch, ema and ema_compatibility")
    rstd = 1 / np.sqrt(norm_var + eps)
    normalised = (x - like_x(x, norm_mean)) * like_x(x, rstd)
    before = normalised * like_x(x, weight) + like_x(x, bias)
    if residual is not None:
        before = before + np.asarray(residual, np.float64)
    y, derivative = ACTIVATIONS[activation](before)
    dz = dy * derivative
    dbias, dweight = dz.sum(axes), (dz * normalised).sum(axes)
    dmean = -slope * weight * rstd * dbias
    dvar = -slope * weight * rstd**2 * dweight / 2
    dx = dz * like_x(x, weight * rstd) + like_x(x, dmean) / n + (x - like_x(x, mean)) * like_x(x, 2 * dvar) / n
    state = OracleState(running_mean, running_var, new_z, count)
    return OracleStep(y, state, dx, dweight, dbias, dz, before, normalised, rstd)


def inference_oracle(x, weight, bias, state, *, eps):
    """Inference by the definition, in float64, of a state that was trained; arguments as in `train_oracle`."""
    x = np.asarray(x, np.float64)
    denominator = 1 - state.zero_frac
    mean, var = state.mean / denominator, state.var / denominator
    return (x - like_x(x, mean)) / like_x(x, np.sqrt(var + eps)) * like_x(x, weight) + like_x(x, bias)
