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


def passes(operation, residual, derivative, kept=0):
    """(reads, writes) of arrays of x's size inside the kernels of an operation.

    `residual`: one is added; `derivative`: an activation follows, whose derivative needs it or y in a backward; `kept`:
    the share of what forward and backward read for their sums that stays on chip for their results.
    """
    forward, backward = int(residual), int(residual and derivative)
    return {
        "moments": (1, 0),
        "normalise": (1 + forward, 1),
        "forward": (2 - kept + forward, 1),
        "moments_backward": (1, 1),
        "normalise_backward": (2 + backward, 1 + backward),
        # Where the residual's gradient dz is a result, the sums' pass writes it, and the other reads it and x.
        "backward": (2 + backward + 2 * (1 - kept), 1 + backward),
    }[operation]
