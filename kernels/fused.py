"""`fused_batch_norm`: one training step of BatchNorm as a raw operation on rows and channels."""

import functools
import math
import numbers

import jax
import jax.numpy as jnp

from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.backends import reference
from bn_fused.kernels.contract import (
    OPERATIONS,
    Blend,
    Coefficients,
    Spec,
    blend,
    kept_for_derivative,
    statistics_cotangents,
    widest,
)
from bn_fused.kernels.dispatch import run
from bn_fused.kernels.layout import CHANNEL, GROUP, ROW, as_number
from bn_fused.kernels.registry import check_backend_name, is_reference
from bn_fused.kernels.target import FLOATING

LAYOUT = GROUP + ROW + CHANNEL


def fused_batch_norm(
    x,
    weight,
    bias,
    running_mean,
    running_var,
    coefficients,
    *,
    eps,
    activation=None,
    residual=None,
    backend="auto",
    plan=None,
):
    """Normalise x with its batch moments, blended with running statistics, and update those.

    The formulas stand in `bn_fused.kernels.contract`. For people who want the raw operation: no named axes, no
    mask, no approach (`bn_fused.approaches` computes the coefficients). Differentiable in reverse mode with respect
    to every array, through a hand-written backward; forward mode needs `bn_fused.batch_norm`.

    **Arguments:**

    - `x`: [rows, channels] or [groups, rows, channels]; float32, bfloat16, float16 or float64. Each group has
        statistics of its own.
    - `weight`, `bias`, `running_mean`, `running_var`: [channels] or [groups, channels], as x has groups or not.
    - `coefficients`: a `Coefficients` of scalars, or of arrays [groups]. A training step that normalises with the
        batch's moments and keeps 0.9 of the old running statistics has `Coefficients(batch=1.0, running=0.0,
        constant=0.0, mean_gain=0.1, var_gain=0.1, keep=0.9)`.
    - `eps`: added to the variance.
    - `activation`: None or one of "relu", "silu", "gelu", "leaky_relu".
    - `residual`: None, or x's shape and dtype; added before the activation.
    - `backend`: "auto" or a name of `backend_names()`.
    - `plan`: None for the backend's own plan (`bn_fused.explain` shows it), or another of the same type.

    **Returns:**

    `y` (x's shape and dtype), `mean` and `var` ([channels] or [groups, channels], float32, float64 for float64 x;
    the variance is the biased one), `new_running_mean` and `new_running_var` (the dtype of the old ones).

    **Raises:**

    ValueError or TypeError for arguments that do not fit; `BackendError` when it is compiled for a target on which
    the named backend cannot run.
    """
    _check_arguments(x, weight, bias, running_mean, running_var, residual, activation, eps, coefficients, backend)
    grouped = x.ndim == 3
    arrays = (x, weight, bias, running_mean, running_var, residual)
    if not grouped:
        arrays = tuple(None if array is None else array[None] for array in arrays)
    x, weight, bias, running_mean, running_var, residual = arrays
    packed = Coefficients(*coefficients).pack(widest(x.dtype, running_mean.dtype))
    packed = jnp.broadcast_to(packed if packed.ndim == 2 else packed[None], (x.shape[0], packed.shape[-1]))
    if is_reference(backend):
        operands = (x, weight, bias, running_mean, running_var, packed, residual)
        results = reference.fused_batch_norm(*operands, eps=eps, activation=activation)
    else:
        spec = Spec(LAYOUT, float(eps), activation, backend, plan)
        y, pivot, delta, var, new_mean, new_var = _fused(
            spec, x, weight, bias, running_mean, running_var, packed, residual
        )
        results = y, pivot + delta, var, new_mean, new_var
    return results if grouped else tuple(result[0] for result in results)


def _check_arguments(x, weight, bias, running_mean, running_var, residual, activation, eps, coefficients, backend):
    if x.ndim not in (2, 3):
        raise ValueError(f"x has shape {x.shape}; accepted are [rows, channels] and [groups, rows, channels]")
    if jnp.dtype(x.dtype).name not in FLOATING:
        raise TypeError(f"x has dtype {x.dtype}; accepted are {', '.join(FLOATING)}")
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; there is nothing to average over")
    per_channel = (*x.shape[:-2], x.shape[-1])
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in named.items():
        if not hasattr(value, "shape"):
            raise TypeError(f"{name} is {value!r}; it must be an array of shape {per_channel}")
        if value.shape != per_channel:
            raise ValueError(f"{name} has shape {value.shape}; for x of shape {x.shape} it must be {per_channel}")
    if running_mean.dtype != running_var.dtype:
        raise TypeError(f"running_var has dtype {running_var.dtype}; it must have running_mean's, {running_mean.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype}{list(residual.shape)}; it must be as x, {x.dtype}{list(x.shape)}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted are None, {', '.join(map(repr, ACTIVATIONS))}")
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps is {eps!r}; accepted is a Python number")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; accepted is a finite number above 0")
    if not isinstance(coefficients, Coefficients):
        raise TypeError(f"coefficients is {coefficients!r}; accepted are bn_fused.kernels.Coefficients")
    groups = x.shape[:-2]
    for name, value in coefficients._asdict().items():
        if jnp.shape(value) not in ((), groups):
            accepted = "a scalar" if not groups else f"a scalar or an array of shape {groups}"
            raise ValueError(f"coefficients.{name} has shape {jnp.shape(value)}; accepted is {accepted}")
    check_backend_name(backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(spec, *operands):
    return _results(_run_forward(spec, *operands))


def _run_forward(spec, x, weight, bias, running_mean, running_var, coefficients, residual):
    """The results of `forward` by name."""
    results = run(
        "forward",
        spec,
        x=x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        coefficients=coefficients,
        residual=residual,
    )
    return dict(zip(OPERATIONS["forward"].results, results, strict=True))


def _results(forward):
    """Those of them that `fused_batch_norm` is made of, and differentiated in."""
    return tuple(forward[name] for name in ("y", "pivot", "delta", "var", "new_running_mean", "new_running_var"))


def _fused_forward(spec, x, weight, bias, running_mean, running_var, coefficients, residual):
    state = running_mean, running_var, coefficients
    forward = _run_forward(spec, x, weight, bias, *state, residual)
    moments = tuple(forward[name] for name in ("pivot", "delta", "var"))
    normalisation = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "offset": forward["offset"],
        "rstd": forward["rstd"],
        **kept_for_derivative(spec, residual, forward["y"]),
    }
    return _results(forward), (normalisation, moments, state, residual is not None)


def _fused_backward(spec, saved, cotangents):
    normalisation, (pivot, delta, var), state, has_residual = saved
    dy, _, dmean, dvar, dnew_mean, dnew_var = cotangents

    # Per channel, everything is the derivative of these O(channels) formulas; only x's part needs the kernel.
    def per_channel(delta, var, *state):
        return blend(pivot, delta, var, *state)

    _, pullback = jax.vjp(per_channel, delta, var, *state)
    zeros = jnp.zeros_like(delta)
    into_mean, into_var, *_ = pullback(Blend(zeros, zeros, dnew_mean, dnew_var))
    x, weight, bias = (normalisation[name] for name in ("x", "weight", "bias"))
    dx, sum_dz, sum_dz_xhat, *dresidual = run(
        "backward",
        spec,
        dy=dy,
        dmean=dmean + into_mean,
        dvar=dvar + into_var,
        **normalisation,
        pivot=pivot,
        delta=delta,
        batch=Coefficients.unpack(state[-1]).batch.astype(delta.dtype),
        count=jnp.full(x.shape[:1], as_number(x.shape[1], delta.dtype), delta.dtype),
    )
    doffset, dnorm_var = statistics_cotangents(weight, normalisation["rstd"], sum_dz, sum_dz_xhat)
    _, _, *dstate = pullback(Blend(doffset, dnorm_var, dnew_mean, dnew_var))
    if has_residual and not dresidual:
        dresidual = [dy]
    dweight, dbias = sum_dz_xhat.astype(weight.dtype), sum_dz.astype(bias.dtype)
    return dx, dweight, dbias, *dstate, *(dresidual or [None])


_fused.defvjp(_fused_forward, _fused_backward)
