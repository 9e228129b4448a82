"""BatchNorm for JAX: fused, stable to train with, exact under every transform.

`BatchNorm` is the Equinox layer, `batch_norm` the function of arrays, `explain` says which backend computes a call,
and `bn_fused.kernels` holds the raw operations.
"""

from bn_fused import kernels as kernels
from bn_fused.explain import explain as explain
from bn_fused.function import batch_norm as batch_norm
from bn_fused.kernels import BackendChoice as BackendChoice, BackendError as BackendError
from bn_fused.layer import BatchNorm as BatchNorm
from bn_fused.running_stats import RunningStats as RunningStats

__version__ = "0.1.0"
__all__ = ["BackendChoice", "BackendError", "BatchNorm", "RunningStats", "batch_norm", "explain", "kernels"]
