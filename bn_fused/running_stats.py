"""`RunningStats`: what a BatchNorm remembers from one training step to the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bn_fused.approaches import inference_moments
from bn_fused.arguments import (
    as_state_dtype,
    as_stats,
    check_array,
    check_floating,
    check_positive_integer,
    check_zero_start,
    known,
)
from bn_fused.kernels.contract import widest


class RunningStats(NamedTuple):
    """The running statistics of a BatchNorm with C channels: a pytree of four arrays.

    - `mean`, `var`: shape [C], float32 or float64: the running averages as they are stored, from a start at zero (not
        yet divided by 1 - zero_frac, as `moments` does).
    - `zero_frac`: shape [], their dtype, starts at 1: the share of those averages that is still their zero start.
    - `count`: shape [], int32, starts at 0: the steps of the warm-up of the approach "ema".

    Statistics that are not zero under a zero_frac of 1 (an `init(...)` whose mean was replaced) are an error where
    their values are known; under `jit` nobody knows, and they count as never trained. Those from elsewhere come by
    `of`.

    The average of several states (a teacher, stochastic weight averaging) is that of all their floating fields,
    `zero_frac` among them. Where that stays close to 1 its rounding shows: a teacher that keeps .9999 of itself in each
    step is off by up to 2 % of the moments in its first steps and .1 % after a hundred, at .999 by a tenth of both.

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

    @staticmethod
    def of(mean, var):
        """Statistics that were trained elsewhere: zero_frac is 0, nothing of a zero start is left in them; count 0.

        `mean`, `var`: shape [C], the same floating dtype; 16-bit floats are widened to float32. ValueError or TypeError
        for other arrays, for values that are not finite, and for a variance below zero, where the values are known.
        """
        for name, value in (("mean", mean), ("var", var)):
            check_array(name, value)
            check_floating(name, value)
        mean, var = jnp.asarray(mean), jnp.asarray(var)
        if mean.ndim != 1 or (mean.shape, mean.dtype) != (var.shape, var.dtype):
            raise ValueError(
                f"mean is {mean.dtype}{list(mean.shape)} and var is {var.dtype}{list(var.shape)}; accepted are two of "
                "shape [channels] and the same dtype"
            )
        for name, values in (("mean", known(mean)), ("var", known(var))):
            if values is None:
                continue
            if not (finite := np.isfinite(values)).all():
                raise ValueError(f"{name} has the value {values[~finite][0]}; accepted are finite numbers")
            if name == "var" and (values < 0).any():
                raise ValueError(f"var has the value {values.min()}; accepted are variances, which are at least 0")
        dtype = widest(mean.dtype)
        # Copies, so that whoever donates them leaves the given arrays alone.
        mean, var = jnp.array(mean, dtype), jnp.array(var, dtype)
        return RunningStats(mean, var, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))

    def moments(self):
        """The mean and variance that inference normalises with, [C]: mean/(1 - zero_frac), var alike.

        0 and 1 where nothing was trained yet (zero_frac is 1). float32, or float64 if the statistics are.
        """
        stats = as_stats(self)
        check_zero_start("stats", stats)
        dtype = widest(stats.mean.dtype)
        return inference_moments(*(value.astype(dtype) for value in (stats.mean, stats.var, stats.zero_frac)))


def check_stats(stats):
    """TypeError unless it is a `RunningStats`."""
    if not isinstance(stats, RunningStats):
        raise TypeError(
            f"stats is a {type(stats).__name__}; accepted is a bn_fused.RunningStats, of arrays that were trained "
            "elsewhere bn_fused.RunningStats.of(mean, var)"
        )


# So that an exported function may take and return them.
export.register_namedtuple_serialization(RunningStats, serialized_name="bn_fused.RunningStats")
