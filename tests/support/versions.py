"""What is tested beside the newest JAX alone."""

import jax
import pytest

AN_OLDER_JAX = jax.__version_info__ < (0, 11)
# Marks of what takes long and would tell the same on an older JAX, where CI leaves it out: `pytest -m slow` runs it. Of
# all that goes through JAX the smallest case is tested there too.
ON_THE_NEWEST_JAX = (pytest.mark.slow,) if AN_OLDER_JAX else ()


def on_the_newest_jax(test):
    """The test with these marks."""
    for mark in ON_THE_NEWEST_JAX:
        test = mark(test)
    return test


def also_on_the_newest_jax(*values):
    """Values of `pytest.mark.parametrize` with these marks; a tuple is that of several arguments."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=ON_THE_NEWEST_JAX) for v in values]
