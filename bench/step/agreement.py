"""Whether networks with the same weights compute the same losses, as far as rounding lets them.

Compared are two losses, `Losses`, with those of a baseline. How far apart rounding may bring them follows from the
number formats (`tolerance`) and from the network: a residual network of many layers with few values to normalise
amplifies every rounding error. So the baseline runs on images, too, that differ by one unit of rounding (`NOISES`
times); how much that changes its losses is what rounding does to this network.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

# The unit of rounding of a float32 convolution or matrix product at JAX's default precision: TF32, and bfloat16.
PRODUCT_EPSILON = {"gpu": 2.0**-10, "tpu": 2.0**-7}
# The step that is compared changes the loss by about this share, so that the gradient decides about the second loss.
STEP_SHARE = 0.1
NOISES = 3
# Every layer rounds, and not the images alone; what comes late is amplified less. Twice for that, twice for chance.
NOISE_FACTOR = 4
# Where the limits become a larger share than this of the loss, or of its change in the step, agreement says nothing.
MOST_OF_LOSS, MOST_OF_CHANGE = 0.02, 0.5


class Losses(NamedTuple):
    """Of the initial weights, and after one step."""

    before: float
    after: float


class Expected(NamedTuple):
    """The baseline's losses, and by how much rounding changed each of them."""

    losses: Losses
    noise: Losses


class Tolerance(NamedTuple):
    """By how much two networks with the same weights may differ.

    - `loss`: relative to a loss.
    - `change`: for the loss after a step, relative to its change as well.
    """

    loss: float
    change: float


def epsilon(dtype: str, platform: str) -> float:
    """The unit of rounding of a network's convolutions."""
    return max(float(jnp.finfo(dtype).eps), PRODUCT_EPSILON.get(platform, 0.0))


def tolerance(dtype: str, layers: int, platform: str) -> Tolerance:
    """What rounding explains in a network that amplifies nothing, with this many layers.

    The losses are means over the batch, whose errors cancel in part: one unit of rounding of the convolutions, and what
    float32 sums over the classes and the batch lose. The gradient passes every layer, whose errors add as random ones
    do, and those of a layer are amplified where its variance is small.
    """
    loss = epsilon(dtype, platform) + 64 * float(jnp.finfo(jnp.float32).eps)
    return Tolerance(loss, 4 * math.sqrt(layers) * loss)


def limits(expected: Expected, allowed: Tolerance) -> Losses:
    """By how much losses may differ from the baseline's."""
    (before, after), noise = expected
    return Losses(
        allowed.loss * abs(before) + NOISE_FACTOR * noise.before,
        allowed.loss * abs(after) + allowed.change * abs(after - before) + NOISE_FACTOR * noise.after,
    )


def incomparable(expected: Expected, allowed: Tolerance, values: int) -> str:
    """Why agreement with the baseline would say nothing, in one line; empty if it does say something.

    `values`: how many the norm with the fewest has of each channel.
    """
    (before, after), limit = expected.losses, limits(expected, allowed)
    if limit.before <= MOST_OF_LOSS * abs(before) and limit.after <= MOST_OF_CHANGE * abs(after - before):
        return ""
    return (
        f"rounding alone moves the loss of {before:.4g} by {expected.noise.before:.1g}, and that of {after:.4g} after "
        f"a step by {expected.noise.after:.1g}, so that no loss tells who is right (the smallest norm has {values} "
        "values of each channel; more and larger images help, and float32). `bn-bench run` checks every layer against "
        "float64"
    )


def disagreement(losses: Losses, expected: Expected | None, allowed: Tolerance, baseline: str) -> str:
    """Why losses are not what they should be, in one line; empty if they are."""
    if not all(map(math.isfinite, losses)):
        return f"the losses are {losses[0]:.6g} and, after a step, {losses[1]:.6g}"
    if expected is None:
        return f"there is nothing to compare the loss with: {baseline} gave none"
    whats = "the loss", "the loss after a step"
    for what, loss, wanted, limit in zip(whats, losses, expected.losses, limits(expected, allowed), strict=True):
        if abs(loss - wanted) > limit:
            return f"{what} is {loss:.6g}, of {baseline} {wanted:.6g} (they may differ by {limit:.1e})"
    return ""
