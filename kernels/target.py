"""What a backend is asked: a `Problem`, the size and kind of one call, for a `Target` that it is lowered for."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.export import is_symbolic_dim

from bn_fused.kernels.chips import Chip
from bn_fused.kernels.contract import Spec, has_residual
from bn_fused.kernels.layout import CHANNEL, count_rows, group_shape

FLOATING = ("float32", "bfloat16", "float16", "float64")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class BackendError(ValueError):
    """A backend that was asked for by name cannot run; the message says for which target, and what is missing."""


@dataclass(frozen=True)
class Target:
    """What an operation is lowered for.

    A platform of `PLATFORMS`; the chip, where it is known; whether XLA is left to partition the code over several
    devices (False for what runs on each device's part of the arrays, see `partition`); whether the program runs on
    several devices at all.
    """

    platform: str
    chip: Chip | None = None
    partitioned: bool = False
    several_devices: bool = False

    def __str__(self):
        return self.platform if self.chip is None else f"{self.platform} ({self.chip.name})"


@dataclass(frozen=True)
class Problem:
    """The size and kind of one call: what a backend's refusal and plan depend on. Its dtype is one of `FLOATING`.

    Groups and rows are what JAX has for a size, as `b*16`, where `jax.export` leaves it open. `channels_last`: whether
    the channels lie last in memory, as far as that is known. `operation`: a name of `contract.OPERATIONS`, at inference
    "normalise".
    """

    groups: int
    rows: int
    channels: int
    dtype: str
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    channels_last: bool = True
    operation: str = "forward"

    @property
    def left_open(self):
        """The sizes that `jax.export` leaves open, in words; "" if there are none."""
        sizes = (("groups", self.groups), ("rows", self.rows))
        return " and ".join(f"{name} ({size})" for name, size in sizes if is_symbolic_dim(size))


def channels_lie_last(following, after_convolution, target, dtype):
    """Whether the channels lie last in memory: no axis of another size than 1 follows, or XLA lays them so on a target.

    - `following`: the sizes of the axes that follow the channels.
    - `after_convolution`: whether a convolution, of 16 or 32 bits, made the array.
    """
    if all(not is_symbolic_dim(size) and size == 1 for size in following):
        return True
    if not after_convolution or target.platform != "cuda" or target.chip is None:
        return False
    # float32 goes through the tensor cores' float32 formats, which Ampere has for channels first.
    return jnp.dtype(dtype).itemsize == 2 or target.chip.compute_capability >= (9, 0)


def problem_of(spec: Spec, x, present, target, operation):
    """The problem that an operand x (anything with shape and dtype) and the names of the operands make on a target."""
    following = x.shape[spec.layout.index(CHANNEL) + 1 :]
    return Problem(
        groups=math.prod(group_shape(x.shape, spec.layout)),
        rows=count_rows(x.shape, spec.layout),
        channels=x.shape[spec.layout.index(CHANNEL)],
        dtype=jnp.dtype(x.dtype).name,
        activation=spec.activation,
        residual=has_residual(present),
        mask="mask" in present,
        channels_last=channels_lie_last(following, spec.after_convolution, target, x.dtype),
        operation=operation,
    )
