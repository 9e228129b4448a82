"""Fused BatchNorm operations on one device: no Equinox, no named axes.

`fused_batch_norm` is the whole as one differentiable operation. `contract` says what a backend computes, `registry`
holds the backends and chooses among them, `dispatch` makes the choice when an operation is lowered.
"""

from .chips import CHIPS as CHIPS
from .contract import Coefficients as Coefficients
from .contract import Spec as Spec
from .fused import fused_batch_norm as fused_batch_norm
from .registry import Backend as Backend
from .registry import BackendChoice as BackendChoice
from .registry import BackendError as BackendError
from .registry import Problem as Problem
from .registry import Target as Target
from .registry import backend_names as backend_names
from .registry import choose as choose
from .registry import register as register
from .registry import unregister as unregister

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
