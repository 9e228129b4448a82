"""What the kernels of a training step are for, by the names that `bn-bench step` recorded on a GPU.

Kernels of libraries, and XLA's own matrix products, are told by their names. XLA's fusions are not: with `jnp`, Equinox
or Flax parts of a BatchNorm stand in one kernel with pooling, the loss or a cast. So they are told by the difference to
the network without BatchNorm. Of what that one runs beside its convolutions, relu (a maximum, the residual's addition
within) and its gradient (a select) have kernels of their own; what is left is the rest, in every network. What another
network takes beyond its own convolutions and that rest is its BatchNorm with relu and residual: small kernels around it
too, and weights that are transposed for another layout.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bn_fused.bench.step.networks import NO_NORM, Setting
from bn_fused.bench.step.timed import Row

# cuDNN's helpers (padding, workspaces, sums over parts) have its name in theirs.
MATRIX_PRODUCT = re.compile(r"cudnn|cublas|cutlass|nvjet|xmma|gemm", re.IGNORECASE)
# In the network without BatchNorm. One relu or two have their maximum in the pooling after them.
RELU = re.compile(r"loop_maximum_fusion(_\d+)?")
RELU_GRADIENT = re.compile(r"loop_select_fusion(_\d+)?")


class Parts(NamedTuple):
    """Seconds of a step: convolutions and matrix products; the rest; BatchNorm with relu and residual."""

    products: float
    rest: float
    norm: float


class Untold(ValueError):
    """The kernels do not tell what they are for; the message is one line."""


def _seconds(kernels: Mapping[str, Sequence[float]], name: re.Pattern) -> float:
    return sum(launches * seconds for kernel, (launches, seconds) in kernels.items() if name.search(kernel))


def _rest(without_norm: Row, setting: Setting) -> float:
    """Seconds of a step for neither convolutions nor matrix products nor BatchNorm with relu and residual."""
    kernels = without_norm.kernels
    relus = 1 + sum(len(block.convolutions) for block in setting.architecture.blocks)
    gradients = sum(launches for name, (launches, _) in kernels.items() if RELU_GRADIENT.fullmatch(name))
    if gradients != relus:
        raise Untold(f"{NO_NORM!r} has {gradients:g} kernels named as the gradients of its {relus} relus")
    return without_norm.busy - sum(_seconds(kernels, name) for name in (MATRIX_PRODUCT, RELU, RELU_GRADIENT))


def parts(rows: Sequence[Row], without_norm: Row, setting: Setting) -> dict[str, Parts]:
    """Of each network with kernels, by name; `Untold` where the names are not those that are known.

    `without_norm`: the row `NO_NORM` of the same setting on the same device. Torch's networks are left out: their rest
    is another one than XLA's.
    """
    rest = _rest(without_norm, setting)
    told = {}
    for row in rows:
        if row.kernels and not row.name.startswith("torch"):
            products = _seconds(row.kernels, MATRIX_PRODUCT)
            told[row.name] = Parts(products, rest, row.busy - products - rest)
    return told
