"""`RunningStats`: what a BatchNorm remembers from one training step to the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from bn_fused.arguments import as_state_dtype, check_positive_integer


class RunningStats(NamedTuple):
    """The running statistics of a BatchNorm with C channels: a pytree of four arrays.

    - `mean`, `var`: shape [C], float32 or float64: the running averages as they are stored, from a start at zero (not
        yet divided by 1 - zero_frac).
    - `zero_frac`: shape [], their dtype, starts at 1: the share of those averages that is still their zero start.
    - `count`: shape [], int32, starts at 0: the steps of the warm-up of the approach "ema".

    `jax.export` knows the class by the name "bn_fused.RunningStats".
    """

    mean: jax.Array
    var: jax.Array
    zero_frac: jax.Array
    count: jax.Array

    @staticmethod
    def init(num_channels, dtype=jnp.float32):
        """The statistics before the first step: mean and var 0, zero_frac 1, count 0.

        `num_channels`: an integer, 1 or more. `dtype`: float32 or float64, None for JAX's default float. Anything else
        raises ValueError or TypeError: 16-bit floats lose an update of 1 % in their rounding.
        """
        check_positive_integer("num_channels", num_channels)
        dtype = as_state_dtype(dtype)
        # Two arrays, not one twice: a step may be given their memory (`donate_argnums`).
        mean, var = jnp.zeros((num_channels,), dtype), jnp.zeros((num_channels,), dtype)
        return RunningStats(mean, var, jnp.ones((), dtype), jnp.zeros((), jnp.int32))


# So that an exported function may take and return them.
export.register_namedtuple_serialization(RunningStats, serialized_name="bn_fused.RunningStats")
