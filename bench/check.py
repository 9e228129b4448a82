"""Checks of the layer against BatchNorm's definition in float64, written out in numpy.

An error is given relative to the size that rounding acts on, so that one limit, `CONSTANT` times float32's
epsilon, holds for all:

| quantity | relative to |
|---|---|
| y, y at inference | the largest y |
| running mean, running variance | the channel's |mean| + standard deviation, its variance |
| dx | the largest |dy weight rstd|: dx is what remains of it after subtracting two projections |
| dweight, dbias | the sum of the absolute values of their terms: the bound of a sum's backward error |

What passes through a running mean stored in float32 (`ema`, `ema_compatibility`, inference) carries the
rounding of that mean, so the limit grows by 1 + |mean|/std; inference divides by 1 - zero_frac and so does
its rounding.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .providers import Provider, bn_fused_layer, functions
from .workloads import Workload

CONSTANT = 50
MOMENTUM = 0.9
EPS = 1e-5
WARMUP_PERIOD = 4
STEPS = 3
# Small, with sizes that no tile divides.
CHECKED = Workload("check", (6, 5, 7, 3), purpose="the check of every approach")


class OracleState(NamedTuple):
    """The running state in float64: mean and var [channels], zero_frac, count; see `bn_fused.approaches`."""

    mean: np.ndarray
    var: np.ndarray
    zero_frac: float = 1.0
    count: int = 0


def initial_state(channels: int) -> OracleState:
    """The state of a layer that was never trained."""
    return OracleState(np.zeros(channels), np.zeros(channels))


def _reduced(x):
    return (0, *range(2, x.ndim))


def _spread(x, value):
    return np.reshape(value, (1, -1) + (1,) * (x.ndim - 2))


class OracleStep(NamedTuple):
    """A training step in float64, with the gradient of sum(y dy); normalised is (x - norm_mean) rstd."""

    y: np.ndarray
    state: OracleState
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    normalised: np.ndarray
    rstd: np.ndarray


def train_oracle(x, dy, weight, bias, state, *, approach, momentum, eps, warmup_period):
    """A training step and its gradient by the definition, in float64.

    x, dy: [examples, channels, *spatial]; weight, bias: [channels]; debias over the examples.
    """
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes = _reduced(x)
    n = x.size // x.shape[1]
    mean = x.mean(axes)
    var = ((x - _spread(x, mean)) ** 2).mean(axes)
    m, z = momentum, state.zero_frac
    # slope: the derivative of the normalisation's mean by the batch's mean, and the same for the variances.
    if approach == "batch":
        new_z, count = z * m, state.count
        k = x.shape[0] / max(x.shape[0] - 1, eps)
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
    normalised = (x - _spread(x, norm_mean)) * _spread(x, rstd)
    y = normalised * _spread(x, weight) + _spread(x, bias)
    dbias, dweight = dy.sum(axes), (dy * normalised).sum(axes)
    dmean = -slope * weight * rstd * dbias
    dvar = -slope * weight * rstd**2 * dweight / 2
    dx = (
        dy * _spread(x, weight * rstd)
        + _spread(x, dmean) / n
        + (x - _spread(x, mean)) * _spread(x, 2 * dvar) / n
    )
    state = OracleState(running_mean, running_var, new_z, count)
    return OracleStep(y, state, dx, dweight, dbias, normalised, rstd)


def inference_oracle(x, weight, bias, state, *, eps):
    """Inference by the definition, in float64; arguments as in `train_oracle`."""
    x = np.asarray(x, np.float64)
    denominator = max(1 - state.zero_frac, eps)
    mean, var = state.mean / denominator, state.var / denominator
    return (x - _spread(x, mean)) / _spread(x, np.sqrt(var + eps)) * _spread(x, weight) + _spread(x, bias)


@dataclasses.dataclass(frozen=True)
class Error:
    """The relative error of one quantity, and the limit it must keep; NaN keeps none."""

    quantity: str
    value: float
    limit: float

    @property
    def share(self) -> float:
        """The error as a share of its limit."""
        return self.value / self.limit

    @property
    def ok(self) -> bool:
        """Whether the error keeps its limit."""
        return self.share <= 1


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of a check: the errors found, or the failure that kept it from running (one line)."""

    errors: tuple[Error, ...] = ()
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it ran and every error keeps its limit."""
        return self.failure is None and bool(self.errors) and all(error.ok for error in self.errors)

    def worst(self, *quantities: str) -> float:
        """The largest error of these quantities (default: all); NaN if one is NaN or none was found."""
        values = [error.value for error in self.errors if not quantities or error.quantity in quantities]
        return float(np.max(values)) if values else float("nan")

    @property
    def reason(self) -> str:
        """Why it is not ok, in one line; empty if it is."""
        if self.failure is not None:
            return self.failure
        return ", ".join(
            f"{error.quantity} is off by {error.value:.1e} (limit {error.limit:.1e})"
            for error in self.errors
            if not error.ok
        )


def failure_of(error: Exception) -> str:
    """An exception in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def data(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x with mean 1 and standard deviation 2, and a standard normal dy; float32."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return x * np.float32(2) + np.float32(1), dy


def with_parameters(layer, channels: int, seed: int = 0):
    """The layer with weights around 1 and biases around 0, not exactly 1 and 0; and both as float64."""
    rng = np.random.default_rng(seed)
    weight = np.asarray(1 + 0.3 * rng.standard_normal(channels), np.float32)
    bias = np.asarray(0.3 * rng.standard_normal(channels), np.float32)
    layer = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(weight), jnp.asarray(bias))
    )
    return layer, weight.astype(np.float64), bias.astype(np.float64)


def _largest(got, want, scale):
    """max |got - want| / scale, scale broadcast against both; NaN if there is one, 0 for 0 against 0."""
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return float(np.max(np.abs(np.asarray(got, np.float64) - want) / scale))


def step_errors(y, gradient, want: OracleStep, dy, weight, limit: float) -> tuple[Error, ...]:
    """The errors of a step's y and gradient (dx, dweight, dbias)."""
    dx, dweight, dbias = gradient
    axes = _reduced(want.y)
    dx_scale = np.max(np.abs(dy * _spread(dy, weight * want.rstd)))
    return (
        Error("y", _largest(y, want.y, np.max(np.abs(want.y))), limit),
        Error("dx", _largest(dx, want.dx, dx_scale), limit),
        Error("dweight", _largest(dweight, want.dweight, np.abs(dy * want.normalised).sum(axes)), limit),
        Error("dbias", _largest(dbias, want.dbias, np.abs(dy).sum(axes, dtype=np.float64)), limit),
    )


def state_errors(layer, state, want: OracleState, limit: float) -> tuple[Error, ...]:
    """The errors of the running state of a `bn_fused.BatchNorm`."""
    mean, var = state.get(layer.state_index)
    return (
        Error("running mean", _largest(mean, want.mean, np.abs(want.mean) + np.sqrt(want.var)), limit),
        Error("running variance", _largest(var, want.var, want.var), limit),
        Error("zero_frac", _largest(state.get(layer.zero_frac_index), want.zero_frac, 1.0), limit),
        Error("count", _largest(state.get(layer.count_index), want.count, 1.0), 0.5),
    )


def _limit(x, through_running_mean):
    epsilon = float(np.finfo(np.float32).eps)
    if not through_running_mean:
        return CONSTANT * epsilon
    axes = _reduced(x)
    return CONSTANT * epsilon * float(1 + np.max(np.abs(x.mean(axes)) / x.std(axes)))


def check_approach(backend: str, approach: str) -> Check:
    """Train a layer for a few steps on `CHECKED`, then infer; every result of every step against the oracle.

    Of each quantity the largest error is kept. A failure of the backend is reported, not raised.
    """
    channels = CHECKED.channels
    provider = bn_fused_layer(backend, approach, momentum=MOMENTUM, eps=EPS, warmup_period=WARMUP_PERIOD)
    found: dict[str, Error] = {}

    def keep(errors):
        for error in errors:
            before = found.get(error.quantity)
            if before is None or (before.ok and not error.share <= before.share):
                found[error.quantity] = error

    try:
        layer, state = provider.make(channels)
        layer, weight, bias = with_parameters(layer, channels)
        arrays, run = functions(layer, state)
        want_state = initial_state(channels)
        for step in range(STEPS):
            x, dy = data(CHECKED.shape, seed=step)
            limit = _limit(x, through_running_mean=approach != "batch")
            want = train_oracle(
                x, dy, weight, bias, want_state,
                approach=approach, momentum=MOMENTUM, eps=EPS, warmup_period=WARMUP_PERIOD,
            )  # fmt: skip
            want_state = want.state
            y, arrays, gradient = run.forward_backward(arrays, x, dy)
            state = eqx.combine(arrays, (layer, state))[1]
            keep(step_errors(y, gradient, want, dy, weight, limit))
            keep(state_errors(layer, state, want_state, limit))
        arrays, run = functions(eqx.nn.inference_mode(layer), state)
        want_y = inference_oracle(x, weight, bias, want_state, eps=EPS)
        y, _ = run.forward(arrays, x)
        limit = _limit(x, through_running_mean=True) / (1 - want_state.zero_frac)
        keep((Error("inference", _largest(y, want_y, np.max(np.abs(want_y))), limit),))
    except (
        Exception
    ) as error:  # a kernel may fail in any way; it must show as a failed check, whatever it raised
        return Check(failure=failure_of(error))
    return Check(tuple(found.values()))


def check_workload(layer_provider: Provider, workload: Workload):
    """Build a layer at a workload's size, with approach "batch", and check its first training step.

    Returns the check, and, unless it failed to run, what timing needs: (arrays, functions, x, dy), with x and
    dy on the device.
    """
    x, dy = data(workload.shape)
    try:
        layer, state = layer_provider.make(workload.channels)
        layer, weight, bias = with_parameters(layer, workload.channels)
        arrays, run = functions(layer, state)
        device_x, device_dy = jnp.asarray(x), jnp.asarray(dy)
        y_forward, _ = jax.block_until_ready(run.forward(arrays, device_x))
        y, _, gradient = jax.block_until_ready(run.forward_backward(arrays, device_x, device_dy))
    except Exception as error:  # as in check_approach
        return Check(failure=failure_of(error)), None
    want = train_oracle(
        x, dy, weight, bias, initial_state(workload.channels),
        approach="batch", momentum=0.99, eps=EPS, warmup_period=1,
    )  # fmt: skip
    limit = _limit(x, through_running_mean=False)
    errors = step_errors(y, gradient, want, dy, weight, limit)
    forward_error = Error("y of fwd", _largest(y_forward, want.y, np.max(np.abs(want.y))), limit)
    return Check((forward_error, *errors)), (arrays, run, device_x, device_dy)
