"""BatchNorm in float64 numpy, from the definition: values, running state, the closed form of all gradients.

Independent of the code under test. Everything is float64; what the code under test stores or is given in
float32 (the running state, the momentum m and 1 - m) is taken as it is stored there.

Beside each result stands its `scale`: the size of the quantities whose rounding must be allowed for in a
computation of finite precision, that is the sum of the absolute values of the terms.
`tolerances.assert_close` multiplies it with c * eps.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np


class Coefficients(NamedTuple):
    """norm_mean = batch*mu + running*rm, norm_var = batch*var + running*rv + constant;
    rm' = mean_gain*mu + keep*rm, rv' = var_gain*var + keep*rv.
    """

    batch: float
    running: float
    constant: float
    mean_gain: float
    var_gain: float
    keep: float


@dataclasses.dataclass(frozen=True)
class Definition:
    """What is static about a BatchNorm.

    `precision` is the dtype in which the code under test keeps m and 1 - m. `written_out` says that it computes as
    the definition is written: it rounds 1 - m and not m before it takes the complement, and subtracts a mean rounded
    to its own precision, so that the scales hold |mean|/std.
    """

    approach: str = "batch"
    momentum: float = 0.99
    eps: float = 1e-5
    warmup_period: int = 1
    debias: str = "samples"
    activation: str | None = None
    inference: bool = False
    channel_axis: int = -1
    precision: type = np.float32
    written_out: bool = False


class State(NamedTuple):
    """Running mean and variance [channels], zero_frac and count (scalars)."""

    mean: np.ndarray
    var: np.ndarray
    zero_frac: float
    count: int

    @staticmethod
    def initial(channels):
        return State(np.zeros(channels), np.zeros(channels), 1.0, 0)


# --- activations: value and derivative ----------------------------------------------------------------------


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))


def _gelu_inner(z):
    return math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def _gelu_slope(z):
    inner = np.tanh(_gelu_inner(z))
    return 0.5 * (1 + inner) + 0.5 * z * (1 - inner**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)


ACTIVATIONS = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.where(z < 0, 0, z), lambda z: np.where(z > 0, 1.0, 0.0)),
    "leaky_relu": (lambda z: np.where(z < 0, 0.01 * z, z), lambda z: np.where(z < 0, 0.01, 1.0)),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "gelu": (lambda z: 0.5 * z * (1 + np.tanh(_gelu_inner(z))), _gelu_slope),
}
KINKED = ("relu", "leaky_relu")


# --- one channel axis, last: rows and channels --------------------------------------------------------------


def _times(coefficient, values):
    """Zero where the coefficient is zero, whatever the values: they have no part in the result then."""
    return np.zeros_like(values) if coefficient == 0 else coefficient * values


@dataclasses.dataclass(frozen=True)
class Rows:
    """The fused step on x [rows, channels] with given coefficients: results, and `backward`.

    `counting` [rows] is 1.0 where a position counts, else 0.0. Where the normalisation uses this batch's
    moments alone, no stored mean's rounding enters and the scales hold no |mean|/std, unless `rounded_mean`,
    the relative rounding of the mean, is not zero.
    """

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    coefficients: Coefficients
    eps: float
    activation: str | None
    residual: np.ndarray | None
    counting: np.ndarray
    rounded_mean: float = 0.0

    @functools.cached_property
    def n_pos(self):
        return self.counting.sum()

    def _average(self, values):
        if self.n_pos == 0:
            return np.zeros(values.shape[1])
        # `where`, so that a NaN that does not count contributes nothing.
        return np.where(self.counting[:, None] > 0, values, 0).sum(0) / self.n_pos

    @functools.cached_property
    def mean(self):
        return self._average(self.x)

    @functools.cached_property
    def var(self):
        return self._average((self.x - self.mean) ** 2)

    @functools.cached_property
    def norm_mean(self):
        c = self.coefficients
        return _times(c.batch, self.mean) + _times(c.running, self.running_mean)

    @functools.cached_property
    def norm_var(self):
        c = self.coefficients
        return _times(c.batch, self.var) + _times(c.running, self.running_var) + c.constant

    @functools.cached_property
    def new_running_mean(self):
        c = self.coefficients
        return _times(c.mean_gain, self.mean) + _times(c.keep, self.running_mean)

    @functools.cached_property
    def new_running_var(self):
        c = self.coefficients
        return _times(c.var_gain, self.var) + _times(c.keep, self.running_var)

    @functools.cached_property
    def rstd(self):
        return 1 / np.sqrt(self.norm_var + self.eps)

    @functools.cached_property
    def xhat(self):
        return (self.x - self.norm_mean) * self.rstd

    @functools.cached_property
    def pre(self):
        """What the activation is applied to."""
        out = self.xhat * self.weight + self.bias
        return out if self.residual is None else out + self.residual

    @functools.cached_property
    def y(self):
        return ACTIVATIONS[self.activation][0](self.pre)

    @functools.cached_property
    def exact(self):
        c = self.coefficients
        return c.batch == 1 and c.running == 0 and not self.rounded_mean

    @functools.cached_property
    def stored_mean(self):
        """The size of means whose float32 rounding reaches x - norm_mean."""
        c = self.coefficients
        if self.exact:
            return np.zeros_like(self.mean)
        return abs(_times(c.batch, self.mean)) + abs(_times(c.running, self.running_mean))

    @functools.cached_property
    def var_scale(self):
        # A mean that is off by eps*|mean| adds the square of that.
        return self.var + self.rounded_mean * self.mean**2

    @functools.cached_property
    def xhat_scale(self):
        return abs(self.xhat) + 1 + self.stored_mean * self.rstd

    @functools.cached_property
    def y_scale(self):
        scale = abs(self.weight) * self.xhat_scale + abs(self.bias)
        return scale if self.residual is None else scale + abs(self.residual)

    @functools.cached_property
    def new_running_mean_scale(self):
        c = self.coefficients
        return abs(c.mean_gain) * (abs(self.mean) + np.sqrt(self.var)) + abs(c.keep * self.running_mean)

    @functools.cached_property
    def new_running_var_scale(self):
        c = self.coefficients
        return abs(c.var_gain * self.var_scale) + abs(c.keep * self.running_var)

    def backward(self, dy, dnew_mean, dnew_var, dmean=0.0, dvar=0.0):
        """Gradients and their scales, two `RowsGradients`, for cotangents of y, new_running_*, mean, var."""
        dy, dnew_mean, dnew_var, dmean, dvar = (
            np.asarray(cotangent, np.float64) for cotangent in (dy, dnew_mean, dnew_var, dmean, dvar)
        )
        c, w, r, x, mu, n = self.coefficients, self.weight, self.rstd, self.x, self.mean, max(self.n_pos, 1)
        xhat, var, var_s = self.xhat, self.var, self.var_scale
        dz = dy * ACTIVATIONS[self.activation][1](self.pre)
        s1, s2 = dz.sum(0), (dz * xhat).sum(0)
        d1, d2 = -w * r * s1, -w * r**2 * s2 / 2
        ct_mean, ct_var = dmean + c.mean_gain * dnew_mean, dvar + c.var_gain * dnew_var
        counting = self.counting[:, None]
        dx = dz * w * r + counting * ((c.batch * d1 + ct_mean) / n + (x - mu) * 2 * (c.batch * d2 + ct_var) / n)
        gradients = RowsGradients(
            x=dx,
            weight=s2,
            bias=s1,
            residual=dz,
            running_mean=c.running * d1 + c.keep * dnew_mean,
            running_var=c.running * d2 + c.keep * dnew_var,
            coefficients=Coefficients(
                batch=(mu * d1 + var * d2).sum(),
                running=(self.running_mean * d1 + self.running_var * d2).sum(),
                constant=d2.sum(),
                mean_gain=(mu * dnew_mean).sum(),
                var_gain=(var * dnew_var).sum(),
                keep=(self.running_mean * dnew_mean + self.running_var * dnew_var).sum(),
            ),
        )

        # A smooth activation's slope moves with the rounding of its argument, a kinked one's does not.
        smooth = self.activation is not None and self.activation not in KINKED
        dz_s = abs(dy) * (1 + smooth * self.y_scale)
        s1_s = dz_s.sum(0)
        s2_s = (dz_s * abs(xhat) + abs(dz) * self.xhat_scale).sum(0)
        d1_s, d2_s = abs(w) * r * s1_s, abs(w) * r**2 * s2_s / 2
        ct_mean_s = abs(dmean) + abs(c.mean_gain * dnew_mean)
        ct_var_s = abs(dvar) + abs(c.var_gain * dnew_var)
        away = abs(x - mu) + np.sqrt(var) + self.stored_mean
        mean_s = abs(mu) + np.sqrt(var)
        rm, rv = abs(self.running_mean), abs(self.running_var)
        scales = RowsGradients(
            x=dz_s * abs(w) * r
            + counting * ((abs(c.batch) * d1_s + ct_mean_s) / n + away * 2 * (abs(c.batch) * d2_s + ct_var_s) / n),
            weight=s2_s,
            bias=s1_s,
            residual=dz_s,
            running_mean=abs(c.running) * d1_s + abs(c.keep * dnew_mean),
            running_var=abs(c.running) * d2_s + abs(c.keep * dnew_var),
            coefficients=Coefficients(
                batch=(mean_s * d1_s + var_s * d2_s).sum(),
                running=(rm * d1_s + rv * d2_s).sum(),
                constant=d2_s.sum(),
                mean_gain=(mean_s * abs(dnew_mean)).sum(),
                var_gain=(var_s * abs(dnew_var)).sum(),
                keep=(rm * abs(dnew_mean) + rv * abs(dnew_var)).sum(),
            ),
        )
        return gradients, scales


class RowsGradients(NamedTuple):
    """Of the arguments of `Rows`: x and residual [rows, channels], [channels], and scalars."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    coefficients: Coefficients


# --- the whole layer ----------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """By argument; x and residual in x's shape."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    zero_frac: float


def _inference_coefficients(state):
    """rm / (1-z); mean 0 and variance 1 where z is exactly one."""
    if state.zero_frac == 1:
        return Coefficients(0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
    return Coefficients(0.0, 1 / (1 - state.zero_frac), 0.0, 0.0, 0.0, 1.0)


def debias_factor(definition, n_axis, n_pos):
    """k of the approach `batch`."""
    if definition.debias == "axis":
        return 1.0 if n_axis == 1 else n_axis / max(n_axis - 1, definition.eps)
    if definition.debias == "samples":
        return 1.0 if n_pos == 1 else n_pos / (n_pos - 1)
    return 1.0


@dataclasses.dataclass(frozen=True)
class Result:
    """What one call gives, and `backward`."""

    definition: Definition
    state_before: State
    rows: Rows
    state: State
    trained: bool
    warm: float  # f = c'/P, `ema` only
    shape: tuple

    def _unflatten(self, rows):
        axis = self.definition.channel_axis % len(self.shape)
        others = tuple(size for index, size in enumerate(self.shape) if index != axis)
        return np.moveaxis(rows.reshape(*others, -1), -1, axis)

    @property
    def y(self):
        return self._unflatten(self.rows.y)

    @property
    def pre(self):
        return self._unflatten(self.rows.pre)

    @property
    def y_scale(self):
        return self._unflatten(np.broadcast_to(self.rows.y_scale, self.rows.x.shape))

    @property
    def state_scale(self):
        return State(self.rows.new_running_mean_scale, self.rows.new_running_var_scale, abs(self.state.zero_frac), 0)

    def backward(self, dy, dmean, dvar, dzero_frac):
        """Gradients and their scales for cotangents of y and of the new state's mean, var and zero_frac."""
        definition, rows, c = self.definition, self.rows, self.rows.coefficients
        dy_rows, dzero_frac = _rows_of(dy, definition.channel_axis), float(dzero_frac)
        gradients, scales = rows.backward(dy_rows, dmean, dvar)

        def zero_frac(of, ct, coefficients):
            m, z = float(definition.precision(definition.momentum)), self.state_before.zero_frac
            if self.trained and definition.approach == "ema_compatibility":
                return 0.0
            if self.trained:
                direct = m * ct
                through = self.warm * m * coefficients.batch if definition.approach == "ema" else 0.0
                return direct + through
            through = 0.0 if z == 1 else coefficients.running * c.running**2
            return ct + through

        return tuple(
            Gradients(
                self._unflatten(of.x),
                of.weight,
                of.bias,
                self._unflatten(np.broadcast_to(of.residual, rows.x.shape)),
                of.running_mean,
                of.running_var,
                zero_frac(of, ct, of.coefficients),
            )
            for of, ct in ((gradients, dzero_frac), (scales, abs(dzero_frac)))
        )


def _rows_of(array, channel_axis):
    array = np.moveaxis(np.asarray(array, np.float64), channel_axis, -1)
    return array.reshape(-1, array.shape[-1])


def batch_norm(definition, x, state, weight=None, bias=None, residual=None, mask=None, n_axis=None):
    """One call on x [examples, ..., channels, ...] (`definition.channel_axis` says where); gives a `Result`.

    `mask` broadcasts against x's shape without the channel axis. `n_axis` overrides the number of examples,
    for batches spread over several named axes.
    """
    x = np.asarray(x, np.float64)
    state = State(
        np.asarray(state.mean, np.float64),
        np.asarray(state.var, np.float64),
        float(state.zero_frac),
        int(state.count),
    )
    rows = _rows_of(x, definition.channel_axis)
    channels = rows.shape[1]
    positions = list(x.shape)
    del positions[definition.channel_axis % x.ndim]
    mask = np.broadcast_to(True if mask is None else np.asarray(mask), positions)
    counting = mask.reshape(-1).astype(np.float64)
    n_pos = counting.sum()
    if n_axis is None:
        n_axis = int(mask.reshape(len(x), -1).any(1).sum())

    m = float(definition.precision(definition.momentum))
    rest = float(definition.precision(1 - definition.momentum)) if definition.written_out else 1 - m
    z, trained, warm = state.zero_frac, not definition.inference and n_pos > 0, 0.0
    new_z, new_count = state.zero_frac, state.count
    if not trained:
        coefficients = _inference_coefficients(state)
    elif definition.approach == "batch":
        new_z = z * m
        k = debias_factor(definition, n_axis, n_pos)
        coefficients = Coefficients(1.0, 0.0, 0.0, rest, k * rest, m)
    elif definition.approach == "ema":
        new_z = z * m
        new_count = min(state.count + 1, definition.warmup_period)
        warm = new_count / definition.warmup_period
        coefficients = Coefficients((1 - warm) + warm * (new_z + rest), warm * m, 0.0, rest, rest, m)
    elif definition.approach == "ema_compatibility":
        new_z = 0 * z
        first = z == 1
        coefficients = (
            Coefficients(1.0, 0.0, 0.0, 1.0, 1.0, 0.0) if first else Coefficients(rest, m, 0.0, rest, rest, m)
        )
    else:
        raise ValueError(f"unknown approach {definition.approach!r}")
    step = Rows(
        x=rows,
        weight=np.ones(channels) if weight is None else np.asarray(weight, np.float64),
        bias=np.zeros(channels) if bias is None else np.asarray(bias, np.float64),
        running_mean=state.mean,
        running_var=state.var,
        coefficients=coefficients,
        eps=definition.eps,
        activation=definition.activation,
        residual=None if residual is None else _rows_of(residual, definition.channel_axis),
        counting=counting,
        rounded_mean=float(np.finfo(definition.precision).eps) if definition.written_out else 0.0,
    )
    new = State(step.new_running_mean, step.new_running_var, new_z, new_count)
    return Result(definition, state, step, new, trained, warm, x.shape)
