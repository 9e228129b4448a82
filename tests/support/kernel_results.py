"""Kernel cases against float64: operands, what the results must be, and the files between a test and its interpreter.

A `case` is a `kernel_cases.Case`. Results of single operations are named "operation.result" and are float32 arrays
[groups, ...].
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from bn_fused import kernels

from support import oracle
from support.tolerances import assert_close, computed_in, eps, tol

EPS = 1e-5
LIKE_X = ("x", "dy", "residual")
# How an interpreter of kernels is compiled: half of the time is LLVM's, which has nothing to do with what they compute.
INTERPRETED = {"xla_backend_optimization_level": 0}


def operands(case):
    """Random operands of `forward` and cotangents, rounded to the case's dtypes and held in float32, or float64."""
    random, wide = np.random.default_rng(0), computed_in(case.dtype)
    like_x, per_channel = (case.groups, case.rows, case.channels), (case.groups, case.channels)

    def rounded(values, dtype):
        return values.astype(wide) if dtype == "float64" else np.array(jnp.asarray(values, dtype).astype(jnp.float32))

    larger = 1 + np.arange(case.groups)[:, None] / 10
    arrays = {
        "x": rounded(case.centre + random.standard_normal(like_x), case.dtype),
        "dy": rounded(random.standard_normal(like_x), case.dtype),
        "coefficients": (larger * np.asarray(case.coefficients)).astype(wide),
    }
    if case.residual:
        arrays["residual"] = rounded(random.standard_normal(like_x), case.dtype)
    for name in ("weight", "bias", "running_mean", "running_var", "dmean", "dvar", "dnew_mean", "dnew_var"):
        values = random.standard_normal(per_channel)
        arrays[name] = {"weight": 1 + values / 4, "running_var": 1 + abs(values)}.get(name, values).astype(wide)
    for name in ("weight", "bias"):
        arrays[name] = rounded(arrays[name], case.parameters)
    return arrays


def expected_rows(case, arrays, rounded_mean=0.0):
    """The oracle's view of the operands, one for each group; for `rounded_mean` see there."""
    exact = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    return [
        oracle.Rows(
            x=exact["x"][group],
            **{key: exact[key][group] for key in ("weight", "bias", "running_mean", "running_var")},
            coefficients=oracle.Coefficients(*exact["coefficients"][group]),
            eps=EPS,
            activation=case.activation,
            residual=exact["residual"][group] if case.residual else None,
            counting=np.ones(case.rows),
            rounded_mean=rounded_mean,
        )
        for group in range(case.groups)
    ]


def with_dz_rounded(case, row, gradients, scales):
    """The scales of `row.backward`, dx's for a backend that makes it of dz as it is returned, rounded to x's dtype.

    It may where dz is a result: the residual's gradient, where an activation follows.
    """
    if not (case.residual and case.activation):
        return scales
    roundings = eps(case.dtype) / tol(computed_in(case.dtype))  # as many as `assert_close` allows for of a scale
    return scales._replace(x=scales.x + roundings * abs(gradients.residual * row.weight) * row.rstd)


def keep_from_kinks(case, arrays):
    """Set dy to zero where the activation's derivative depends on a rounding."""
    if case.activation in oracle.KINKED:
        rows = expected_rows(case, arrays)
        pre, scale = (np.stack([getattr(row, name) for row in rows]) for name in ("pre", "y_scale"))
        arrays["dy"] = np.where(abs(pre) < 1e-3 * scale, 0, arrays["dy"])


# ---------------------------------------------------------------------------------------------- operation by operation


def save_call(path, case, arrays, **settings):
    """Write a case for the process that computes it: its operands in the case's layout, the settings as JSON."""
    images = case.layout == "rcr"  # [4, channels, rows / 4], one group

    def placed(name, value):
        if not images:
            return value
        return np.moveaxis(value.reshape(4, -1, case.channels), 1, 2) if name in LIKE_X else value[0]

    fields = ("layout", "activation", "dtype", "parameters", "rows", "operations")
    settings = {name: getattr(case, name) for name in fields} | settings
    given = {name: placed(name, value) for name, value in arrays.items()}
    np.savez(path, settings=json.dumps(settings), **given)


def load_results(path, case):
    """The results that the process has written, in groups, rows and channels; their dtypes are checked."""
    results = dict(np.load(path))
    for name in [name for name in results if not name.endswith(".dtype")]:
        like_x = name.split(".")[1] in ("y", "dx", "dresidual")
        assert str(results[f"{name}.dtype"]) == (case.dtype if like_x else "float32"), name
        if case.layout == "rcr":
            value = results[name]
            results[name] = np.moveaxis(value, 2, 1).reshape(1, case.rows, -1) if like_x else value[None]
    return results


def check_results(case, arrays, results, operations):
    """Compare the results of forward, and of the other operations, with float64."""
    rows = expected_rows(case, arrays)

    def joined(get):
        return np.stack([get(row) for row in rows])

    def close(result, expected, scale, stored=np.float32):
        scale = np.broadcast_to(scale, expected.shape)
        assert_close(results[result], expected, scale, stored=stored, what=result)

    def mean_is(operation):
        mean = results[f"{operation}.pivot"].astype(np.float64) + results[f"{operation}.delta"]
        # The mean keeps what float32 would lose of it: its error is relative to the spread.
        spread = joined(lambda row: np.sqrt(row.var) + abs(row.x - row.mean).max(0))
        assert_close(mean, joined(lambda row: row.mean), spread, stored=np.float32, what=f"{operation}: mean")
        close(f"{operation}.var", joined(lambda row: row.var), joined(lambda row: row.var_scale))

    def normalisation_is():
        # What the backward is given of it: the mean, relative to the spread as above, and the reciprocal root.
        offset = results["forward.pivot"].astype(np.float64) + results["forward.offset"]
        spread = joined(lambda row: np.sqrt(row.norm_var) + abs(row.x - row.norm_mean).max(0))
        assert_close(offset, joined(lambda row: row.norm_mean), spread, stored=np.float32, what="forward: norm_mean")
        rstd = joined(lambda row: 1 / np.sqrt(row.norm_var + EPS))
        close("forward.rstd", rstd, rstd * (1 + joined(lambda row: row.var_scale / (row.norm_var + EPS))))

    mean_is("forward")
    normalisation_is()
    y, y_scale = joined(lambda row: row.y), joined(lambda row: row.y_scale)
    close("forward.y", y, y_scale, stored=case.dtype)
    for moment in ("mean", "var"):
        of = f"new_running_{moment}"
        close(f"forward.{of}", joined(lambda row, of=of: getattr(row, of)),
              joined(lambda row, of=of: getattr(row, f"{of}_scale")))  # fmt: skip
    dy, dmean, dvar = (np.asarray(arrays[key], np.float64) for key in ("dy", "dmean", "dvar"))
    zero = np.zeros(case.channels)
    for operation in operations:
        if operation == "moments":
            mean_is("moments")
        elif operation == "normalise":
            close("normalise.y", y, y_scale, stored=case.dtype)
        elif operation == "moments_backward":
            through = [
                dmean[g] / case.rows + (row.x - row.mean) * 2 * dvar[g] / case.rows for g, row in enumerate(rows)
            ]
            scale = [
                (abs(dmean[g]) + 2 * abs(dvar[g]) * (abs(row.x - row.mean) + np.sqrt(row.var))) / case.rows
                for g, row in enumerate(rows)
            ]
            close("moments_backward.dx", np.stack(through), np.stack(scale), stored=case.dtype)
        else:
            both = []
            for g, row in enumerate(rows):
                if operation == "normalise_backward":
                    frozen = row.coefficients._replace(batch=0.0)
                    held = dataclasses.replace(row, coefficients=frozen)
                    # The same normalisation, of which nothing depends on the batch.
                    for cached in ("norm_mean", "norm_var"):
                        held.__dict__[cached] = getattr(row, cached)
                    both.append(held.backward(dy[g], zero, zero))
                else:
                    gradients, scales = row.backward(dy[g], zero, zero, dmean[g], dvar[g])
                    both.append((gradients, with_dz_rounded(case, row, gradients, scales)))
            for result, of, stored in (
                ("dx", "x", case.dtype),
                ("sum_dz", "bias", np.float32),
                ("sum_dz_xhat", "weight", np.float32),
                ("dresidual", "residual", case.dtype),
            ):
                if result == "dresidual" and not (case.residual and case.activation):
                    assert f"{operation}.dresidual" not in results
                    continue
                expected = np.stack([getattr(values, of) for values, _ in both])
                close(f"{operation}.{result}", expected, np.stack([getattr(s, of) for _, s in both]), stored)


def spoilt(arrays):
    """The operands with values in channels 3 to 6 of x that are not finite, or whose square is not."""
    x = arrays["x"].copy()
    x[0, 7, 3] = np.inf
    x[0, 0, 4] = -np.inf  # in the rows that make a pivot
    x[0, -1, 5] = np.nan
    x[0, :, 6] *= 1e30
    return arrays | {"x": x}


def check_spoilt(results, expected):
    """What is not finite stays in its channel: the others are those that the operands had before they were `spoilt`."""
    for result, value in results.items():
        if not result.endswith(".dtype"):
            others = np.setdiff1d(np.arange(value.shape[-1]), (3, 4, 5, 6))
            np.testing.assert_array_equal(value[..., others], expected[result][..., others], err_msg=result)
    mean = (results["forward.pivot"] + results["forward.delta"])[0]
    assert mean[3] == np.inf and mean[4] == -np.inf and np.isnan(mean[5])
    var = results["forward.var"][0]
    assert np.isnan(var[3]) and np.isnan(var[4]) and np.isnan(var[5]) and var[6] == np.inf
    assert np.isfinite(mean[6])
    assert np.isnan(results["forward.y"][0][:, 3:6]).all()


# ---------------------------------------------------------------------------------------------- the whole step


@functools.cache
def _step(activation, backend, plan, interpreted):
    """`fused_batch_norm` and its gradients, as a jitted function of operands, coefficients and cotangents."""

    @functools.partial(jax.jit, compiler_options=INTERPRETED if interpreted else None)
    def run(arrays, coefficients, cotangents):
        def of(arrays, coefficients):
            return kernels.fused_batch_norm(
                **arrays, coefficients=coefficients, eps=EPS, activation=activation, backend=backend, plan=plan
            )

        results, pullback = jax.vjp(of, arrays, coefficients)
        return results, *pullback(cotangents)

    return run


def as_given(case, arrays, one_group=True):
    """The operands as jax arrays in the case's dtypes; where `one_group`, a case with one has no axis of groups."""
    dtypes = dict.fromkeys(LIKE_X, case.dtype) | dict.fromkeys(("weight", "bias"), case.parameters)
    return {
        name: jnp.asarray(value[0] if one_group and case.groups == 1 else value, dtypes.get(name, value.dtype))
        for name, value in arrays.items()
    }


def check_step(case, backend, plan=None, interpreted=False):
    """Compare the results of `fused_batch_norm` and the gradients of everything it is given with float64.

    `interpreted`: whether the backend's kernels are, so that nothing depends on what LLVM makes of the interpreter.
    """
    wide = computed_in(case.dtype)
    arrays = operands(case)
    keep_from_kinks(case, arrays)
    # The definition written out subtracts a mean that is rounded to its own precision.
    rows = expected_rows(case, arrays, float(np.finfo(wide).eps) if backend == "reference" else 0.0)
    given = as_given(case, arrays)
    coefficients = kernels.Coefficients(*jnp.moveaxis(given.pop("coefficients"), -1, 0))
    cotangents = tuple(given.pop(name) for name in ("dy", "dmean", "dvar", "dnew_mean", "dnew_var"))
    results, gradients, coefficient_gradients = _step(case.activation, backend, plan, interpreted)(
        given, coefficients, cotangents
    )

    def close(actual, expected, scales, what):
        """Compare with what the groups, one by one, must have."""
        expected = np.stack(expected)
        scales = np.stack([np.broadcast_to(scale, expected.shape[1:]) for scale in scales])
        expected, scales = (array if case.groups > 1 else array[0] for array in (expected, scales))
        assert_close(actual, expected, scales, dtype=wide, what=what)

    y, mean, var, new_mean, new_var = results
    assert y.dtype == case.dtype and mean.dtype == var.dtype == new_mean.dtype == new_var.dtype == wide
    close(mean, [row.mean for row in rows], [np.sqrt(row.var) + abs(row.mean) for row in rows], "mean")
    others = {"y": y, "var": var, "new_running_mean": new_mean, "new_running_var": new_var}
    for name, result in others.items():
        close(result, [getattr(row, name) for row in rows], [getattr(row, f"{name}_scale") for row in rows], name)
    both = []
    for group, row in enumerate(rows):
        found = row.backward(*(arrays[name][group] for name in ("dy", "dnew_mean", "dnew_var", "dmean", "dvar")))
        both.append((found[0], with_dz_rounded(case, row, *found)))
    for name, gradient in gradients.items():
        close(
            gradient, *([getattr(each, name) for each in of] for of in zip(*both, strict=True)), f"gradient of {name}"
        )
    for name, gradient in zip(coefficients._fields, coefficient_gradients, strict=True):
        of_groups = ([getattr(each.coefficients, name) for each in of] for of in zip(*both, strict=True))
        close(gradient, *of_groups, f"gradient of the coefficient {name}")
