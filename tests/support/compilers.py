"""The compilers for chips that are not there, which tests marked `compilers` need."""

import importlib.util

import pytest

from bn_fused.bench import deviceless
from bn_fused.kernels.backends.triton import limits


class CompilerMissing(pytest.skip.Exception):
    """Why a test that compiles for a chip is skipped; `conftest` fails one that is not marked `compilers`."""


def skip_without_compilers(*targets, triton=None):
    """Skip the test, saying what to install, unless the compilers for these targets are there.

    - `targets`: as of `bn_fused.bench.deviceless.compile_for`.
    - `triton`: None, or the platform ("cuda" or "rocm") for which Triton's compiler is needed too.
    """
    for sentence in (*map(deviceless.missing, targets), None if triton is None else limits.missing(triton)):
        if sentence is not None:
            raise CompilerMissing(sentence)


def skip_without_triton():
    """Skip the test, saying what to install, unless Triton is there; jax-triton is not asked for."""
    if importlib.util.find_spec("triton") is None:
        raise CompilerMissing(
            "triton is not installed: pip install --no-deps $(python -m bn_fused.bench.deviceless triton)"
        )
