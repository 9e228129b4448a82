"""The backend `pallas_tpu`: Pallas kernels for TPUs (Mosaic)."""

import functools

from bn_fused.kernels.auto import by_table
from bn_fused.kernels.backends import Backend
from bn_fused.kernels.backends.pallas_tpu import operations

BACKEND = Backend(
    "pallas_tpu",
    {
        "forward": operations.forward,
        "backward": operations.backward,
        "moments": operations.moments,
        "moments_backward": operations.moments_backward,
        "normalise": operations.normalise,
        "normalise_backward": operations.normalise_backward,
    },
    refusal=operations.refusal,
    verdict=functools.partial(by_table, "pallas_tpu"),
    plan=operations.plan,
)
