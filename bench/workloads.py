"""Named workloads, in one table for the benchmark, the audit and the tests."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp

LAYOUTS = ("nchw", "nhwc")
PASSES = ("fwd", "bwd", "fwd+bwd")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Passes over an array of x's size that a copy makes.
COPY_PASSES = 2


class Arranged:
    """What follows from a `shape`, a `layout` and a `dtype`.

    The shape is in the order examples, channels, then the spatial sizes, whatever the layout.
    """

    @property
    def channels(self) -> int:
        """The size of the channel axis."""
        return self.shape[1]

    @property
    def channel_axis(self) -> int:
        """Where the channels are in an array."""
        return 1 if self.layout == "nchw" else len(self.shape) - 1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape in memory's order: `shape` with the channels where the layout has them."""
        examples, channels, *spatial = self.shape
        return (examples, channels, *spatial) if self.layout == "nchw" else (examples, *spatial, channels)

    @property
    def elements(self) -> int:
        """Elements of one array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one array: what one pass over it moves."""
        return self.elements * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Workload(Arranged):
    """One input to normalise, and what is done with it.

    - `name`: unique in the table, short.
    - `shape`: examples, channels, then the spatial sizes, if any, whatever the layout.
    - `dtype`: the name of the input's dtype.
    - `purpose`: what it stands for.
    - `layout`: "nchw" (channels second) or "nhwc" (channels last) in memory; the same without spatial sizes.
    - `activation`, `residual`: what follows the normalisation; see `bn_fused.BatchNorm`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    purpose: str = ""
    layout: str = "nchw"
    activation: str | None = None
    residual: bool = False

    def passes(self, pass_name: str) -> int:
        """Passes over arrays of x's size that no implementation can save.

        - fwd reads x (and the residual) and writes y.
        - bwd reads x and dy and writes dx. With residual and activation it also reads the residual or y, on which the
          activation's derivative depends, and writes the residual's gradient, which is dy without an activation.
        - fwd+bwd is the sum: the backward cannot begin before the loss has been computed from y.
        """
        forward = 2 + self.residual
        backward = 3 + 2 * (self.residual and self.activation is not None)
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_name]

    def __str__(self) -> str:
        options = [self.layout] if self.layout != "nchw" else []
        options += [self.activation] if self.activation else []
        options += ["residual"] if self.residual else []
        return " ".join((self.name, f"({','.join(map(str, self.shape))})", self.dtype, *options))


def _table(*workloads: Workload) -> Mapping[str, Workload]:
    table = {workload.name: workload for workload in workloads}
    assert len(table) == len(workloads), "two workloads share a name"
    return MappingProxyType(table)


WORKLOADS = _table(
    Workload("resnet-early", (32, 64, 56, 56), purpose="a residual network's first stage: few channels, large maps"),
    Workload("resnet-late", (64, 256, 14, 14), purpose="a residual network's third stage: more channels, small maps"),
    Workload("mlp", (4096, 512), purpose="a multilayer perceptron: no spatial axes"),
    # ResNet-50 at 224 x 224: every shape that one of its BatchNorms sees (He et al. 2015, table 1).
    Workload("resnet50-stem", (32, 64, 112, 112), purpose="after the first convolution"),
    Workload("resnet50-1", (32, 64, 56, 56), purpose="stage 1, inside a block"),
    Workload("resnet50-1x", (32, 256, 56, 56), purpose="stage 1, at a block's end"),
    Workload("resnet50-2", (32, 128, 28, 28), purpose="stage 2, inside a block"),
    Workload("resnet50-2x", (32, 512, 28, 28), purpose="stage 2, at a block's end"),
    Workload("resnet50-3", (32, 256, 14, 14), purpose="stage 3, inside a block"),
    Workload("resnet50-3x", (32, 1024, 14, 14), purpose="stage 3, at a block's end"),
    Workload("resnet50-4", (32, 512, 7, 7), purpose="stage 4, inside a block"),
    Workload("resnet50-4x", (32, 2048, 7, 7), purpose="stage 4, at a block's end"),
    # A U-Net for 256 x 256 images, one shape a level.
    Workload("unet-1", (8, 64, 256, 256), purpose="a U-Net's full resolution"),
    Workload("unet-2", (8, 128, 128, 128), purpose="a U-Net's second level"),
    Workload("unet-3", (8, 256, 64, 64), purpose="a U-Net's third level"),
    Workload("unet-4", (8, 512, 32, 32), purpose="a U-Net's fourth level"),
    Workload("unet-5", (8, 1024, 16, 16), purpose="a U-Net's bottleneck"),
    Workload("mlp-narrow", (16384, 128), purpose="no spatial axes, few channels"),
    Workload("mlp-wide", (2048, 4096), purpose="no spatial axes, many channels"),
    # Wide ResNet-28-10 on 32 x 32 images (Zagoruyko & Komodakis 2016).
    Workload("wide-1", (128, 160, 32, 32), purpose="a wide residual network's first stage"),
    Workload("wide-2", (128, 320, 16, 16), purpose="a wide residual network's second stage"),
    Workload("wide-3", (128, 640, 8, 8), purpose="a wide residual network's third stage"),
)

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quick": ("resnet-early", "resnet-late", "mlp"),
        "resnet50": tuple(name for name in WORKLOADS if name.startswith("resnet50-")),
        "unet": tuple(name for name in WORKLOADS if name.startswith("unet-")),
        "mlp": ("mlp-narrow", "mlp", "mlp-wide"),
        "wide": tuple(name for name in WORKLOADS if name.startswith("wide-")),
    }
)


def parse_shape(text: str) -> Workload:
    """The workload for a shape written as `32,64,56,56`: examples, channels, then spatial sizes; float32.

    Raises ValueError when it is not two or more positive whole numbers.
    """
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"shape {text!r}: two or more positive whole numbers are expected (examples, channels, then "
            "spatial sizes), such as 32,64,56,56"
        )
    return Workload("shape", shape, purpose="given on the command line")
