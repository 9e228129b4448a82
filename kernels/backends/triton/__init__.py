"""The backend `triton`: Triton kernels, through jax-triton."""

import functools

from bn_fused.kernels.auto import verdict
from bn_fused.kernels.backends import Backend
from bn_fused.kernels.backends.triton import limits, operations, tuning

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
    verdict=functools.partial(verdict, "triton"),
    plan=tuning.plan,
    plan_refusal=limits.plan_refusal,
)
