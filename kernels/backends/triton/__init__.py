"""The backend `triton`: Triton kernels, through jax-triton."""

import functools

from bn_fused.kernels.auto import by_measurement
from bn_fused.kernels.backends import Backend, Tuning
from bn_fused.kernels.backends.triton import limits, operations, plan

TUNING = Tuning(plan.REVISION, limits.search_set, plan.parse)
BACKEND = Backend(
    "triton",
    {
        "forward": operations.forward,
        "backward": operations.backward,
        "moments": operations.moments,
        "moments_backward": operations.moments_backward,
        "normalise": operations.normalise,
        "normalise_backward": operations.normalise_backward,
    },
    refusal=limits.refusal,
    verdict=functools.partial(by_measurement, "triton", TUNING),
    plan=limits.plan,
    plan_refusal=limits.plan_refusal,
    tuning=TUNING,
)
