"""BatchNorm for JAX: fused, stable to train with, exact under every transform.

`BatchNorm` is the Equinox layer, `batch_norm` the function of arrays, `explain` says which backend computes a call,
and `bn_fused.kernels` holds the raw operations. `with_settings`, `moments_of`, `from_equinox`, `to_equinox`,
`recalibrate` and `fold` are for whole models.
"""

from bn_fused import kernels as kernels
from bn_fused.conversion import from_equinox as from_equinox, to_equinox as to_equinox
from bn_fused.explain import explain as explain
from bn_fused.folding import fold as fold, fold_arrays as fold_arrays
from bn_fused.function import batch_norm as batch_norm
from bn_fused.kernels import BackendChoice as BackendChoice, BackendError as BackendError
from bn_fused.layer import BatchNorm as BatchNorm
from bn_fused.models import moments_of as moments_of, with_settings as with_settings
from bn_fused.recalibration import recalibrate as recalibrate
from bn_fused.running_stats import RunningStats as RunningStats

__version__ = "0.1.0"
__all__ = [
    "BackendChoice",
    "BackendError",
    "BatchNorm",
    "RunningStats",
    "batch_norm",
    "explain",
    "fold",
    "fold_arrays",
    "from_equinox",
    "kernels",
    "moments_of",
    "recalibrate",
    "to_equinox",
    "with_settings",
]
