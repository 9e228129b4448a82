"""Fused BatchNorm operations on one device: no Equinox, no named axes.

`fused_batch_norm` is the whole as one differentiable operation. `contract` says what a backend computes, `registry`
holds the backends and chooses among them, `dispatch` makes the choice when an operation is lowered.
"""

from bn_fused.kernels.backends import Backend as Backend
from bn_fused.kernels.chips import CHIPS as CHIPS
from bn_fused.kernels.contract import Coefficients as Coefficients, Spec as Spec
from bn_fused.kernels.fused import fused_batch_norm as fused_batch_norm
from bn_fused.kernels.registry import (
    BackendChoice as BackendChoice,
    backend_names as backend_names,
    choose as choose,
    register as register,
    unregister as unregister,
)
from bn_fused.kernels.target import BackendError as BackendError, Problem as Problem, Target as Target

__all__ = [
    "Backend",
    "BackendChoice",
    "BackendError",
    "CHIPS",
    "Coefficients",
    "Problem",
    "Spec",
    "Target",
    "backend_names",
    "choose",
    "fused_batch_norm",
    "register",
    "unregister",
]
