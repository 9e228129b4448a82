"""Named workloads, in one table for the benchmark and the tests."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """One input to normalise.

    - `name`: unique, short.
    - `shape`: examples first, channels second, then the spatial sizes, if any.
    - `dtype`: the name of the input's dtype.
    - `purpose`: what it stands for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    purpose: str = ""

    @property
    def channels(self) -> int:
        """The size of the channel axis."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of one array of this shape and dtype: what one pass over it moves."""
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name} ({','.join(map(str, self.shape))}) {self.dtype}"


def _table(*workloads: Workload) -> Mapping[str, Workload]:
    table = {workload.name: workload for workload in workloads}
    assert len(table) == len(workloads), "two workloads share a name"
    return MappingProxyType(table)


WORKLOADS = _table(
    Workload(
        "resnet-early", (32, 64, 56, 56), purpose="a residual network's first stage: few channels, large maps"
    ),
    Workload(
        "resnet-late",
        (64, 256, 14, 14),
        purpose="a residual network's third stage: more channels, small maps",
    ),
    Workload("mlp", (4096, 512), purpose="a multilayer perceptron: no spatial axes"),
)

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType({"quick": ("resnet-early", "resnet-late", "mlp")})


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
