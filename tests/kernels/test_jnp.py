"""The forms that the backend `jnp` has for XLA:GPU, computed on a CPU: what they are for is counted in test_traffic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_fused.kernels.activations import ACTIVATIONS
from bn_fused.kernels.backends import jnp as jnp_backend

from support.kernel_cases import CASES
from support.kernel_results import check_step

ON_A_GPU = jnp_backend.Plan(stages=True)
# relu with y kept in float32 and bfloat16, leaky_relu, the residual kept, no residual; groups, several parts.
NAMES = ("300 rows", "bfloat16", "65 channels", "float16", "groups", "groups far from zero", "2051 rows, 24 channels")


@pytest.mark.parametrize("name", NAMES)
def test_values_and_all_gradients_agree_with_float64(name):
    check_step(CASES[name], "jnp", ON_A_GPU)


def test_values_and_all_gradients_agree_in_float64(x64):
    check_step(dataclasses.replace(CASES["300 rows"], dtype="float64"), "jnp", ON_A_GPU)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, activation in ACTIVATIONS.items() if activation.steps is not None])
def test_a_derivative_by_its_steps_is_the_derivative(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tiny = float(jnp.finfo(dtype).tiny)
        values = jnp.asarray([-np.inf, -3.0, -1e-30, -tiny, 0.0, tiny, 1e-30, 1.0, np.inf], dtype)
        found = jnp_backend._of_bits(values, *ACTIVATIONS[name].steps)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, ACTIVATIONS[name].derivative(values))


def test_bfloat16_is_the_same_number_by_its_bits():
    values = jnp.asarray([0.0, -0.0, 1.0, -3.140625, 1e-38, 3e38, np.inf, -np.inf, np.nan], jnp.bfloat16)
    found = jnp_backend._as_stored(values)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, values.astype(jnp.float32))


@pytest.mark.parametrize("least", [1, 7, 64, 1024])
def test_rows_are_cut_into_equal_parts_and_as_many_as_asked_for_where_these_are_long_enough(least):
    for rows in (*range(1, 700), 3136, 4099, 100352, 401408):
        parts = jnp_backend._parts(rows, least)
        divisors = [number for number in range(1, rows + 1) if rows % number == 0] if rows < 5000 else None
        assert rows % parts == 0 and parts <= max(math.isqrt(rows), rows // jnp_backend.LEAST_ROWS), rows
        if divisors is not None and parts < least:
            enough = [number for number in divisors if number >= least]
            assert not any(number <= rows // jnp_backend.LEAST_ROWS for number in enough), (rows, parts)
