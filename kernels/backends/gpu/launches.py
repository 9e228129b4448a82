"""The launches that the streaming GPU backends share, and their passes over arrays of x's size. Without JAX."""

# The kernels of each operation, in order; a merge is a launch of O(channels).
LAUNCHES = {
    "moments": ("moments", "merge_moments"),
    "normalise": ("normalise",),
    "forward": ("moments", "merge_moments", "normalise"),
    "moments_backward": ("moments_backward",),
    "normalise_backward": ("normalise_backward", "merge_sums"),
    "backward": ("backward_sums", "merge_sums", "backward_dx"),
}


def launches(operation):
    """The kernels of an operation, by name and in order."""
    return tuple(f"bn_fused_{name}" for name in LAUNCHES[operation])


def passes(operation, residual, derivative, once=False):
    """(reads, writes) of arrays of x's size inside the kernels of an operation.

    `residual`: one is added; `derivative`: an activation's derivative needs it in a backward; `once`: what forward and
    backward read for their sums stays on chip for their results.
    """
    forward, backward, times = int(residual), int(residual and derivative), 1 if once else 2
    return {
        "moments": (1, 0),
        "normalise": (1 + forward, 1),
        "forward": (times + forward, 1),
        "moments_backward": (1, 1),
        "normalise_backward": (2 + backward, 1 + backward),
        "backward": (times * (2 + backward), 1 + backward),
    }[operation]
