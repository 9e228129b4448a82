"""The backend `pallas_gpu`: Pallas kernels for NVIDIA Hopper and Blackwell (Mosaic GPU)."""

import functools

from bn_fused.kernels.auto import by_measurement
from bn_fused.kernels.backends import Backend, Tuning
from bn_fused.kernels.backends.pallas_gpu import operations, plan

TUNING = Tuning(plan.REVISION, operations.search_set, plan.parse, plan.combine)
BACKEND = Backend(
    "pallas_gpu",
    {
        "forward": operations.forward,
        "backward": operations.backward,
        "moments": operations.moments,
        "moments_backward": operations.moments_backward,
        "normalise": operations.normalise,
        "normalise_backward": operations.normalise_backward,
    },
    refusal=operations.refusal,
    verdict=functools.partial(by_measurement, "pallas_gpu", TUNING),
    plan=operations.plan,
    plan_refusal=operations.plan_refusal,
    tuning=TUNING,
    slow_to_lower=True,
)
