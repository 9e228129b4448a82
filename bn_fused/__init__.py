"""BatchNorm for JAX: fused, stable to train with, exact under every transform.

`BatchNorm` is the Equinox layer, `batch_norm` the function of arrays, `explain` says which backend computes a call,
and `bn_fused.kernels` holds the raw operations.
"""

from . import kernels as kernels
from .explain import explain as explain
from .function import batch_norm as batch_norm
from .kernels import BackendChoice as BackendChoice
from .kernels import BackendError as BackendError
from .layer import BatchNorm as BatchNorm
from .step import RunningStats as RunningStats

__version__ = "0.1.0"
__all__ = ["BackendChoice", "BackendError", "BatchNorm", "RunningStats", "batch_norm", "explain", "kernels"]
