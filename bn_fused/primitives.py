"""The operations of BatchNorm as primitives with complete derivatives.

Three families, each a function, its tangent (linear) and the tangent's transpose:

- `forward`, `tangent`, `backward`: a whole training step. Reverse mode runs one fused forward and one fused backward.
- `moments`, `moments_tangent`, `moments_backward` and `normalise`, `normalise_tangent`, `normalise_backward`: its two
  halves, for what happens between them (devices exchange moments) and for inference.

Functions and transposes become a backend's kernels; tangents are jnp. The derivatives of tangents and transposes are
JAX's own, of the same jnp code, so every order exists.
"""

import functools

import jax
import jax.numpy as jnp

from bn_fused.kernels.backends.jnp import operations as in_jnp
from bn_fused.kernels.contract import (
    LIKE_X,
    MASK,
    NORMALISED,
    OPERATIONS,
    PER_CHANNEL,
    PER_GROUP,
    Blend,
    Coefficients,
    accumulation_dtype,
    blend,
    blend_tangents,
    kept_for_derivative,
    moments_cotangents,
    reciprocal_std,
    scaled,
    statistics_cotangents,
)
from bn_fused.kernels.dispatch import run
from bn_fused.kernels.jax_internals import ad, zero_tangent
from bn_fused.kernels.layout import as_number, expand, group_shape, sum_rows
from bn_fused.kernels.padding import product, without_padding
from bn_fused.named_axes import NOTHING, define, map_batched, named_sum, position_count, sum_batched

_NORMALISATION = OPERATIONS["normalise"].operands
_TANGENTS = {
    "tx": LIKE_X,
    "tweight": PER_CHANNEL,
    "tbias": PER_CHANNEL,
    "toffset": PER_CHANNEL,
    "tnorm_var": PER_CHANNEL,
    "tresidual": LIKE_X,
}
_GRADIENTS = {
    "dx": LIKE_X,
    "dweight": PER_CHANNEL,
    "dbias": PER_CHANNEL,
    "doffset": PER_CHANNEL,
    "dnorm_var": PER_CHANNEL,
    "dresidual": LIKE_X,
}
_MOMENTS = {"x": LIKE_X, "pivot": PER_CHANNEL, "delta": PER_CHANNEL, "count": PER_GROUP, "mask": MASK}
_STEP = {**NORMALISED, **_MOMENTS, "batch": PER_GROUP}


def _divisor(operands, layout, averaged):
    """The number of positions that sums are divided by for a mean, [*groups]; 1 where a mask lets none count."""
    x, mask = operands["x"], operands.get("mask")
    dtype = accumulation_dtype(x.dtype)
    count = position_count(x, mask, layout, averaged, dtype)
    if mask is not None:
        return jnp.maximum(count, 1)
    return jnp.full(group_shape(x.shape, layout), as_number(count, dtype), dtype)


# ---------------------------------------------------------------------------------------- what is computed


def _dispatched(name):
    """An operation of the contract as it is; every averaged axis is part of the operands by then."""

    def compute(spec, averaged, operands):
        del averaged
        present = OPERATIONS[name].result_kinds(operands)
        return dict(zip(present, run(name, spec, **operands), strict=True))

    return compute


def _with_rstd(operands, spec):
    """`normalise` is differentiated with respect to norm_var, kernels take its reciprocal square root."""
    others = {name: value for name, value in operands.items() if name != "norm_var"}
    return {**others, "rstd": reciprocal_std(operands["norm_var"], spec.eps)}


def _normalise(spec, averaged, operands):
    return _dispatched("normalise")(spec, averaged, _with_rstd(operands, spec))


def _to_gradients(results, operands):
    """The gradients of bias, weight, offset and norm_var from the two sums of a backward operation."""
    sum_dz, sum_dz_xhat = results["sum_dz"], results["sum_dz_xhat"]
    doffset, dnorm_var = statistics_cotangents(operands["weight"], operands["rstd"], sum_dz, sum_dz_xhat)
    gradients = {
        "dx": results["dx"],
        "dweight": sum_dz_xhat,
        "dbias": sum_dz,
        "doffset": doffset,
        "dnorm_var": dnorm_var,
    }
    return gradients | ({"dresidual": results["dresidual"]} if "dresidual" in results else {})


def _backward(spec, averaged, operands):
    return _to_gradients(_dispatched("backward")(spec, averaged, operands), operands)


def _normalise_backward(spec, averaged, operands):
    return _to_gradients(_dispatched("normalise_backward")(spec, averaged, operands), operands)


def _backward_in_jnp(spec, averaged, operands):
    """`backward` while axes are still averaged by name: the sums local, the moments' cotangents over all."""
    results = in_jnp.backward(**operands, spec=spec, total=lambda value: named_sum(value, averaged))
    return _to_gradients(dict(zip(OPERATIONS["backward"].result_kinds(operands), results, strict=True)), operands)


def _normalise_backward_in_jnp(spec, averaged, operands):
    results = in_jnp.normalise_backward(**operands, spec=spec)
    names = OPERATIONS["normalise_backward"].result_kinds(operands)
    return _to_gradients(dict(zip(names, results, strict=True)), operands)


def _moments_backward_in_jnp(spec, averaged, operands):
    operands = {
        **operands,
        "dmean": named_sum(operands["dmean"], averaged),
        "dvar": named_sum(operands["dvar"], averaged),
    }
    return {"dx": in_jnp.moments_backward(**operands, spec=spec)[0]}


def _moments_tangent(spec, averaged, operands):
    """tmean = sum(tx)/n and tvar = 2 sum((x - mean) tx)/n over the positions that count."""
    layout = spec.layout
    x, tx, pivot, delta, count = (operands[name] for name in ("x", "tx", "pivot", "delta", "count"))
    mask = operands.get("mask")
    tx = without_padding(mask, tx.astype(pivot.dtype))
    deviation = without_padding(mask, (x.astype(pivot.dtype) - expand(pivot, layout)) - expand(delta, layout))
    count = count[..., None]
    tmean = named_sum(sum_rows(tx, layout), averaged) / count
    tvar = 2 * named_sum(sum_rows(deviation * tx, layout), averaged) / count
    return {"tmean": tmean, "tvar": tvar}


def _normalise_tangent(spec, averaged, operands):
    del averaged
    layout = spec.layout
    x, pivot, offset, rstd, weight, bias = (
        operands[name] for name in ("x", "pivot", "offset", "rstd", "weight", "bias")
    )
    dtype = pivot.dtype
    weight = weight.astype(dtype)
    residual, y, mask = (operands.get(name) for name in ("residual", "y", "mask"))
    d = in_jnp.deviation(x, pivot, spec)
    centred = d - expand(offset, layout)
    tz = jnp.zeros_like(d)
    if "tx" in operands:
        tz = tz + operands["tx"].astype(dtype) * expand(rstd * weight, layout)
    if "toffset" in operands:
        tz = tz - expand(operands["toffset"].astype(dtype) * rstd * weight, layout)
    factor = jnp.zeros_like(rstd)
    if "tnorm_var" in operands:
        factor = factor - operands["tnorm_var"].astype(dtype) * rstd * rstd * rstd * weight / 2
    if "tweight" in operands:
        factor = factor + operands["tweight"].astype(dtype) * rstd
    tz = tz + product(mask, centred, expand(factor, layout))
    if "tbias" in operands:
        tz = tz + expand(operands["tbias"].astype(dtype), layout)
    if "tresidual" in operands:
        tz = tz + operands["tresidual"].astype(dtype)
    if spec.activation is not None:
        normalisation = offset, rstd, weight, bias, residual, y, mask, spec
        tz = product(mask, tz, in_jnp.activation_derivative(d, *normalisation))
    return {"ty": tz.astype(x.dtype)}


def _tangent(spec, averaged, operands):
    moments = {"tmean": jnp.zeros_like(operands["pivot"]), "tvar": jnp.zeros_like(operands["pivot"])}
    if "tx" in operands:
        moments = _moments_tangent(spec, averaged, operands)
    operands = dict(operands)
    for name, moment in (("toffset", "tmean"), ("tnorm_var", "tvar")):
        through_batch = scaled(operands["batch"], moments[moment])
        operands[name] = operands[name] + through_batch if name in operands else through_batch
    return {**_normalise_tangent(spec, NOTHING, operands), **moments}


# ------------------------------------- taking an operation apart, where per-channel operands differ along its axis


def _only(operands, kinds):
    return {name: operand for name, operand in operands.items() if name in kinds}


def _forward_apart(axis, spec, averaged, operands):
    results = moments.batch(axis, spec, averaged, _only(operands, moments.operands))
    names = ("running_mean", "running_var", "coefficients")
    new = map_batched(axis, blend, *results.values(), *(operands[name] for name in names))
    normalised = normalise.batch(
        axis,
        spec,
        NOTHING,
        {
            **_only(operands, normalise.operands),
            "pivot": results["pivot"],
            "offset": new.offset,
            "norm_var": new.norm_var,
        },
    )
    return {
        **normalised,
        **results,
        "offset": new.offset,
        "rstd": map_batched(axis, lambda norm_var: reciprocal_std(norm_var, spec.eps), new.norm_var),
        "new_running_mean": new.new_running_mean,
        "new_running_var": new.new_running_var,
    }


def _moments_tangent_apart(axis, spec, averaged, operands):
    # Each member's sums, divided by the whole count, and their sum.
    parts = moments_tangent.batch_as_group(axis, spec, averaged, operands)
    return {name: sum_batched(part, axis.size) for name, part in parts.items()}


def _tangent_apart(axis, spec, averaged, operands):
    results = {}
    if "tx" in operands:
        results = moments_tangent.batch(axis, spec, averaged, _only(operands, moments_tangent.operands))
    else:
        zeros = jnp.zeros_like
        results["tmean"] = map_batched(axis, zeros, operands["pivot"])
        results["tvar"] = map_batched(axis, zeros, operands["pivot"])
    operands = dict(operands)
    for name, moment in (("toffset", "tmean"), ("tnorm_var", "tvar")):
        through_batch = map_batched(axis, scaled, operands["batch"], results[moment])
        if name in operands:
            through_batch = map_batched(axis, jnp.add, operands[name], through_batch)
        operands[name] = through_batch
    normalised = normalise_tangent.batch(axis, spec, NOTHING, _only(operands, normalise_tangent.operands))
    return {**normalised, **results}


def _moments_backward_apart(axis, spec, averaged, operands):
    # Every member's moments are those of all: their cotangents add up, then each member's dx is its own.
    operands = {
        **operands,
        "dmean": sum_batched(operands["dmean"], axis.size),
        "dvar": sum_batched(operands["dvar"], axis.size),
    }
    return moments_backward.batch_other(axis, spec, averaged.without(axis.name), operands)


def _backward_apart(axis, spec, averaged, operands):
    direct = normalise_backward.batch_as_group(axis, spec, NOTHING, _only(operands, normalise_backward.operands))
    names = ("dmean", "dvar", "doffset", "dnorm_var", "batch")
    dmean, dvar = map_batched(axis, moments_cotangents, *((operands | direct)[name] for name in names))
    through = moments_backward.apart(
        axis, spec, averaged, {**_only(operands, moments_backward.operands), "dmean": dmean, "dvar": dvar}
    )["dx"]
    dx = map_batched(axis, jnp.add, direct["dx"], through)
    return {**direct, "dx": dx}


# ---------------------------------------------------------------------------------------- the primitives

forward = define(
    "forward",
    OPERATIONS["forward"].operands,
    OPERATIONS["forward"].results,
    _dispatched("forward"),
    folds=True,
    apart=_forward_apart,
)
tangent = define(
    "tangent",
    {**_TANGENTS, **_STEP},
    {"ty": LIKE_X, "tmean": PER_CHANNEL, "tvar": PER_CHANNEL},
    _tangent,
    folds=True,
    apart=_tangent_apart,
)
backward = define("backward", OPERATIONS["backward"].operands, _GRADIENTS, _backward, apart=_backward_apart)

moments = define(
    "moments",
    OPERATIONS["moments"].operands,
    OPERATIONS["moments"].results,
    _dispatched("moments"),
    folds=True,
)
moments_tangent = define(
    "moments_tangent",
    {"tx": LIKE_X, **_MOMENTS},
    {"tmean": PER_CHANNEL, "tvar": PER_CHANNEL},
    _moments_tangent,
    folds=True,
    apart=_moments_tangent_apart,
)
moments_backward = define(
    "moments_backward",
    OPERATIONS["moments_backward"].operands,
    {"dx": LIKE_X},
    _dispatched("moments_backward"),
    rowwise=True,
    apart=_moments_backward_apart,
)

normalise = define(
    "normalise",
    {("norm_var" if name == "rstd" else name): kind for name, kind in _NORMALISATION.items()},
    {"y": LIKE_X},
    _normalise,
    rowwise=True,
)
normalise_tangent = define(
    "normalise_tangent", {**_TANGENTS, **NORMALISED}, {"ty": LIKE_X}, _normalise_tangent, rowwise=True
)
normalise_backward = define(
    "normalise_backward", OPERATIONS["normalise_backward"].operands, _GRADIENTS, _normalise_backward
)


# ---------------------------------------------------------------------------------------- derivatives


def _nonzero(names, tangents):
    """{name: tangent}, without those that are zero by their structure; a mask has none."""
    tangents = dict(zip(names, tangents, strict=True))
    return {name: t for name, t in tangents.items() if name != "mask" and not isinstance(t, ad.Zero)}


def _jvp_in(function, primals, tangents):
    """`jax.jvp` with respect to those keyword arguments that have a tangent."""
    variables = {name: primals[name] for name in tangents if name in primals}

    def of_variables(variables):
        return function(**{**primals, **variables})

    return jax.jvp(of_variables, (variables,), ({name: tangents[name] for name in variables},))


def _normalisation_tangents(tangents, toffset, tnorm_var):
    """The linear operands of a tangent: those of x, weight, bias and residual, and of the statistics."""
    renamed = {f"t{name}": tangents.get(name) for name in ("x", "weight", "bias", "residual")}
    return {**renamed, "toffset": toffset, "tnorm_var": tnorm_var}


@functools.partial(jax.jit, inline=True)  # traced once for all layers of the same channels
def _rstd_tangent(rstd, tnorm_var):
    return -rstd * rstd * rstd / 2 * tnorm_var


def _forward_jvp(values, tangents, *, names, spec, averaged):
    operands, tangents = dict(zip(names, values, strict=True)), _nonzero(names, tangents)
    results = forward(spec, averaged, **operands)
    pivot, delta, var, rstd = (results[name] for name in ("pivot", "delta", "var", "rstd"))
    # What the statistics' tangents are apart from those of the batch's moments, and then with them.
    state = _only(operands, ("running_mean", "running_var", "coefficients"))
    of_state = _only(tangents, state)
    from_state = Blend(None, None, None, None)
    if of_state:
        _, from_state = _jvp_in(functools.partial(blend, pivot, delta, var), state, of_state)
    step = {
        "x": operands["x"],
        "pivot": pivot,
        "delta": delta,
        "offset": results["offset"],
        "rstd": rstd,
        "weight": operands["weight"],
        "bias": operands["bias"],
        "batch": Coefficients.unpack(operands["coefficients"]).batch.astype(pivot.dtype),
        "count": _divisor(operands, spec.layout, averaged),
        "mask": operands.get("mask"),
        **kept_for_derivative(spec, operands.get("residual"), results["y"]),
    }
    linear = _normalisation_tangents(tangents, from_state.offset, from_state.norm_var)
    result_tangents = tangent(spec, averaged, **linear, **step)
    tmean, tvar = result_tangents["tmean"], result_tangents["tvar"]
    of_blend = blend_tangents(tmean, tvar, operands["coefficients"], operands["running_mean"].dtype)
    if of_state:
        of_blend = jax.tree.map(jnp.add, of_blend, from_state)
    tangents_out = {
        "y": result_tangents["ty"],
        "pivot": zero_tangent(pivot),
        "delta": tmean,
        "var": tvar,
        "rstd": _rstd_tangent(rstd, of_blend.norm_var),
        **of_blend._asdict(),
    }
    return list(results.values()), [tangents_out[name] for name in results]


def _moments_jvp(values, tangents, *, names, spec, averaged):
    operands, tangents = dict(zip(names, values, strict=True)), _nonzero(names, tangents)
    results = moments(spec, averaged, **operands)
    if "x" not in tangents:
        return list(results.values()), [zero_tangent(value) for value in results.values()]
    count = _divisor(operands, spec.layout, averaged)
    saved = {"pivot": results["pivot"], "delta": results["delta"], "count": count}
    result_tangents = moments_tangent(spec, averaged, tx=tangents["x"], **operands, **saved)
    return list(results.values()), [zero_tangent(results["pivot"]), result_tangents["tmean"], result_tangents["tvar"]]


def _normalise_jvp(values, tangents, *, names, spec, averaged):
    operands, tangents = dict(zip(names, values, strict=True)), _nonzero(names, tangents)
    y = normalise(spec, averaged, **operands)["y"]
    centre = [tangents[name] for name in ("pivot", "offset") if name in tangents]
    saved = {name: operands[name] for name in ("x", "pivot", "offset", "weight", "bias")}
    ty = normalise_tangent(
        spec,
        averaged,
        **_normalisation_tangents(tangents, sum(centre[1:], *centre[:1]) if centre else None, tangents.get("norm_var")),
        **saved,
        rstd=reciprocal_std(operands["norm_var"], spec.eps),
        mask=operands.get("mask"),
        **kept_for_derivative(spec, operands.get("residual"), y),
    )["ty"]
    return [y], [ty]


ad.primitive_jvps[forward.primitive] = _forward_jvp
ad.primitive_jvps[moments.primitive] = _moments_jvp
ad.primitive_jvps[normalise.primitive] = _normalise_jvp


def _jvp_of_jnp(operation, compute):
    """The derivative of an operation as JAX's own of its jnp form, also while axes are averaged by name."""

    def jvp(values, tangents, *, names, spec, averaged):
        operands, tangents = dict(zip(names, values, strict=True)), _nonzero(names, tangents)
        results, result_tangents = _jvp_in(lambda **operands: compute(spec, averaged, operands), operands, tangents)
        order = operation.result_kinds(names)
        return [results[name] for name in order], [result_tangents[name] for name in order]

    ad.primitive_jvps[operation.primitive] = jvp


for _operation, _compute in (
    (tangent, _tangent),
    (backward, _backward_in_jnp),
    (moments_tangent, _moments_tangent),
    (moments_backward, _moments_backward_in_jnp),
    (normalise_tangent, _normalise_tangent),
    (normalise_backward, _normalise_backward_in_jnp),
):
    _jvp_of_jnp(_operation, _compute)


def _transpose_with(operation, cotangent_names):
    """The transpose rule of a tangent: bind `operation` to the cotangents, hand each linear operand its gradient."""

    def transpose(cotangents, *values, names, spec, averaged):
        linear = {name: v.aval for name, v in zip(names, values, strict=True) if ad.is_undefined_primal(v)}
        saved = {name: v for name, v in zip(names, values, strict=True) if name in operation.operands}
        cotangents = dict(zip(cotangent_names, map(ad.instantiate_zeros, cotangents), strict=True))
        gradients = operation(spec, averaged, **cotangents, **saved)
        if "dy" in cotangents:
            gradients.setdefault("dresidual", cotangents["dy"])  # no activation in between
        gradient_of = {name: gradients["d" + name[1:]] for name in linear}
        return [gradient_of[name].astype(linear[name].dtype) if name in linear else None for name in names]

    return transpose


ad.primitive_transposes[tangent.primitive] = _transpose_with(backward, ("dy", "dmean", "dvar"))
ad.primitive_transposes[moments_tangent.primitive] = _transpose_with(moments_backward, ("dmean", "dvar"))
ad.primitive_transposes[normalise_tangent.primitive] = _transpose_with(normalise_backward, ("dy",))
