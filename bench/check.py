"""Checks against BatchNorm's definition in float64 (`oracle`): of every backend's whole step, and of what is timed.

An error is given relative to the size that rounding acts on, so that one limit, `CONSTANT` times float32's
epsilon, holds for all:

| quantity | relative to |
|---|---|
| y, y at inference | the largest y |
| running mean, running variance | the channel's |mean| + standard deviation, its variance |
| dx | the largest |dy weight rstd|: dx is what remains of it after subtracting two projections |
| dresidual | the largest |dy| |
| dweight, dbias | the sum of the absolute values of their terms: the bound of a sum's backward error |

What passes through a running mean stored in float32 (`ema`, `ema_compatibility`, inference) carries the
rounding of that mean, so the limit grows by 1 + |mean|/std; inference divides by 1 - zero_frac and so does
its rounding. For 16-bit inputs, y, dx and dresidual are rounded at the end, and dx may be made of dresidual as it was
rounded: half an epsilon of that type each, so one is added.
Where relu or leaky_relu got so little that rounding decides on its derivative, dx and dresidual are not compared; the
sums, and dx through them, may be off by what such positions add to them.
Other libraries may compute in that type, and are allowed `RIVAL_CONSTANT` of its epsilons in everything.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bn_fused
from bn_fused.bench.oracle import (
    KINKED,
    OracleState,
    OracleStep,
    inference_oracle,
    initial_state,
    like_x,
    reduced,
    train_oracle,
)
from bn_fused.bench.workloads import Workload

CONSTANT, RIVAL_CONSTANT = 50, 8
MOMENTUM = 0.9
EPS = 1e-5
WARMUP_PERIOD = 4
STEPS = 3
# Small, with sizes that no tile divides.
CHECKED = Workload("check", (6, 5, 7, 3), purpose="the check of every approach")
# Of what is timed, as many channels are compared as have about this many elements; they do not depend on each other.
ELEMENTS_COMPARED = 1 << 23


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

    def worst(self) -> float:
        """The largest error; NaN if one is NaN or none was found."""
        return float(np.max([error.value for error in self.errors])) if self.errors else float("nan")

    @property
    def reason(self) -> str:
        """Why it is not ok, in one line; empty if it is."""
        if self.failure is not None:
            return self.failure
        if not self.errors:
            return "nothing was compared"
        return ", ".join(
            f"{error.quantity} is off by {error.value:.1e} (limit {error.limit:.1e})"
            for error in self.errors
            if not error.ok
        )


def failure_of(error: BaseException) -> str:
    """An exception in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x with mean 1 and standard deviation 2, and a standard normal dy; float32."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return x * np.float32(2) + np.float32(1), dy


def draw_parameters(channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights around 1 and biases around 0, not exactly 1 and 0; float32."""
    rng = np.random.default_rng(seed)
    weight = np.asarray(1 + 0.3 * rng.standard_normal(channels), np.float32)
    return weight, np.asarray(0.3 * rng.standard_normal(channels), np.float32)


def _largest(got, want, scale, undecided=0.0, where=None):
    """max(|got - want| - undecided, 0) / scale, broadcast together; NaN if there is one, 0 for 0 against 0."""
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    errors = np.maximum(np.abs(np.asarray(got, np.float64) - want) - undecided, 0) / scale
    return float(np.max(errors if where is None else np.where(where | np.isnan(errors), errors, 0)))


@dataclasses.dataclass(frozen=True)
class Limits:
    """How far off a layer may be: `array` for y, dx and dresidual, `sum` for sums per channel.

    `kink` is the share of the largest value before the activation within which rounding may decide on which side
    of the activation's kink a value lies.
    """

    array: float
    sum: float
    kink: float

    @classmethod
    def of(cls, dtype: str, ours: bool = True, factor: float = 1.0) -> "Limits":
        """For inputs of this dtype; `factor` is what a stored mean adds, see the module."""
        coarse, fine = (float(jnp.finfo(kind).eps) for kind in (dtype, jnp.float32))
        coarse = coarse if coarse > fine else 0.0
        if ours:
            return cls(CONSTANT * fine * factor + coarse, CONSTANT * fine * factor, CONSTANT * fine * factor)
        return cls(*[(CONSTANT * fine + RIVAL_CONSTANT * coarse) * factor] * 2, CONSTANT * fine * factor + coarse)


def step_errors(results: dict, want: OracleStep, dy, weight, limits: Limits, activation=None) -> tuple[Error, ...]:
    """The errors of a step's results, those of y, dx, dweight, dbias and dresidual that are there."""
    axes = reduced(want.y)
    sure, of_dweight, of_dbias, of_dx = None, 0.0, 0.0, 0.0
    if activation in KINKED:
        sure = np.abs(want.z) > limits.kink * np.max(np.abs(want.z))
        # The derivative may be another by up to 1 there.
        flipped = np.where(sure, 0, np.abs(dy))
        of_dweight, of_dbias = (flipped * np.abs(want.normalised)).sum(axes), flipped.sum(axes, dtype=np.float64)
        through = like_x(dy, of_dbias) + np.abs(want.normalised) * like_x(dy, of_dweight)
        of_dx = np.abs(like_x(dy, weight * want.rstd)) * through * dy.shape[1] / dy.size
    compared = {
        "y": lambda y: _largest(y, want.y, np.max(np.abs(want.y))),
        "dx": lambda dx: _largest(dx, want.dx, np.max(np.abs(dy * like_x(dy, weight * want.rstd))), of_dx, sure),
        "dresidual": lambda dresidual: _largest(dresidual, want.dresidual, np.max(np.abs(dy)), where=sure),
        "dweight": lambda dweight: _largest(dweight, want.dweight, np.abs(dy * want.normalised).sum(axes), of_dweight),
        "dbias": lambda dbias: _largest(dbias, want.dbias, np.abs(dy).sum(axes, dtype=np.float64), of_dbias),
    }
    return tuple(
        Error(name, compared[name](value), limits.sum if name in ("dweight", "dbias") else limits.array)
        for name, value in results.items()
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


def stored_mean_factor(x, approach: str) -> float:
    """1 + |mean|/std where the approach normalises with a stored mean, else 1; see the module."""
    if approach == "batch":
        return 1.0
    axes = reduced(x)
    return float(1 + np.max(np.abs(x.mean(axes, dtype=np.float64)) / x.std(axes, dtype=np.float64)))


@jax.jit
def _run(static, arrays, x, dy):
    """A layer's step under vmap and its gradient: y, state's arrays, (dx, dweight, dbias)."""
    layer, state = eqx.combine(arrays, static.value)

    def output(x, weight, bias):
        moved = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
        return jax.vmap(moved, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    y, pullback, new_state = jax.vjp(output, x, layer.weight, layer.bias, has_aux=True)
    return y, eqx.filter((layer, new_state), eqx.is_array), pullback(dy)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What is not an array in a layer and its state, as a static argument."""

    value: object


def check_approach(backend: str, approach: str) -> Check:
    """Train a layer for a few steps on `CHECKED`, then infer; every result of every step against the oracle.

    Of each quantity the largest error is kept. A failure of the backend is reported, not raised.
    """
    largest: dict[str, Error] = {}

    def add(errors):
        for error in errors:
            before = largest.get(error.quantity)
            if before is None or (before.ok and not error.share <= before.share):
                largest[error.quantity] = error

    try:
        layer, state = eqx.nn.make_with_state(bn_fused.BatchNorm)(
            CHECKED.channels, "batch", approach, EPS, True, MOMENTUM, WARMUP_PERIOD, backend=backend
        )
        weight, bias = draw_parameters(CHECKED.channels)
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(weight), jnp.asarray(bias)))
        arrays, static = eqx.partition((layer, state), eqx.is_array)
        static = _Static(static)
        want_state = initial_state(CHECKED.channels)
        for step in range(STEPS):
            x, dy = draw(CHECKED.shape, seed=step)
            limits = Limits.of("float32", factor=stored_mean_factor(x, approach))
            want = train_oracle(
                x, dy, weight.astype(np.float64), bias.astype(np.float64), want_state,
                approach=approach, momentum=MOMENTUM, eps=EPS, warmup_period=WARMUP_PERIOD,
            )  # fmt: skip
            want_state = want.state
            y, arrays, gradients = _run(static, arrays, x, dy)
            state = eqx.combine(arrays, (layer, state))[1]
            results = {"y": y, **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}
            add(step_errors(results, want, dy, weight, limits))
            add(state_errors(layer, state, want_state, limits.sum))
        inferring = eqx.nn.inference_mode(layer)
        y, _ = eqx.filter_jit(jax.vmap(inferring, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))(x, state)
        want_y = inference_oracle(x, weight, bias, want_state, eps=EPS)
        limit = Limits.of("float32", factor=stored_mean_factor(x, "ema")).array / (1 - want_state.zero_frac)
        add((Error("inference", _largest(y, want_y, np.max(np.abs(want_y))), limit),))
    except Exception as error:  # a kernel may fail in any way; it must show as a failed check, whatever it raised
        return Check(failure=failure_of(error))
    return Check(tuple(largest.values()))
