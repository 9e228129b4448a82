"""The table of kernel cases that the tests of all backends share: shapes, dtypes and options of one BatchNorm step.

A backend's tests add what is its own: the plans under which it computes a case. The arrays are small, because most of
these tests run in interpreters; those for a real device are at the end.
"""

import dataclasses
import itertools

from bn_fused.kernels.activations import ACTIVATIONS

# Coefficients: those of the approach `batch`, and six numbers with nothing special about them.
BATCH = (1.0, 0.0, 0.0, 0.01, 0.01, 0.99)
BLEND = (0.7, 0.4, 0.1, 0.1, 0.15, 0.9)
# Operations besides `forward`.
ALL = ("backward", "normalise_backward", "moments_backward", "normalise", "moments")


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: x [groups, rows, channels] in `dtype`, weight and bias in `parameters`.

    - `coefficients`: of the first group; those of every further one are larger.
    - `centre`: x lies around it, with a standard deviation of 1.
    - `operations`: what is compared besides `forward`, where operations are run one by one.
    - `layout`: the axes in which x is given: "grc", or "rcr" for [4, channels, rows / 4].
    """

    rows: int
    channels: int
    groups: int = 1
    dtype: str = "float32"
    activation: str | None = None
    residual: bool = False
    coefficients: tuple = BATCH
    centre: float = 3.0
    operations: tuple = ("backward",)
    parameters: str = "float32"
    layout: str = "grc"


CASES = {
    "far from zero": Case(23, 128, centre=1e4, operations=("backward", "moments", "moments_backward")),
    "groups": Case(
        19, 128, groups=2, activation="silu", residual=True, operations=("backward", "normalise_backward")
    ),
    "groups far from zero": Case(19, 40, groups=2, activation="relu", coefficients=BLEND, centre=1e3),
    "images": Case(12, 136, activation="relu", layout="rcr"),
    "silu": Case(33, 16, activation="silu", coefficients=BLEND, operations=ALL),
    "residual without activation": Case(
        33, 16, residual=True, operations=("backward", "normalise_backward", "normalise")
    ),
    "bfloat16": Case(
        44, 32, dtype="bfloat16", activation="relu", residual=True, coefficients=BLEND, operations=ALL
    ),
    "bfloat16, gelu": Case(
        29, 48, dtype="bfloat16", activation="gelu", residual=True, coefficients=BLEND, operations=ALL
    ),
    "float16": Case(21, 256, dtype="float16", activation="leaky_relu", residual=True),
    "float16, gelu": Case(19, 520, dtype="float16", activation="gelu", coefficients=BLEND),
    # Rows and channels that are few, or a multiple of nothing.
    "one row": Case(1, 5, coefficients=BLEND, operations=ALL),
    "3 channels": Case(29, 3, activation="relu", coefficients=BLEND, operations=ALL),
    "3 channels, 512 rows": Case(512, 3, activation="silu", coefficients=BLEND, operations=ALL),
    "17 channels": Case(
        128, 17, dtype="bfloat16", activation="relu", coefficients=BLEND, parameters="bfloat16", operations=ALL
    ),
    "64 channels": Case(14, 64, dtype="float16", coefficients=BLEND, parameters="float16", operations=ALL),
    "65 channels": Case(
        40, 65, activation="leaky_relu", coefficients=BLEND, parameters="bfloat16", operations=ALL
    ),
    "96 channels": Case(
        16, 96, dtype="bfloat16", activation="leaky_relu", coefficients=BLEND, parameters="bfloat16", operations=ALL
    ),
    "130 channels": Case(77, 130),
    "136 channels": Case(9, 136, activation="gelu", coefficients=BLEND),
    "384 channels": Case(17, 384, groups=2, activation="silu", residual=True),
    "1000 channels": Case(
        8, 1000, dtype="float16", activation="relu", coefficients=BLEND, parameters="float16", operations=ALL
    ),
    # More rows.
    "200 rows": Case(200, 130, groups=2, activation="gelu", residual=True, coefficients=BLEND),
    "200 rows, bfloat16": Case(
        200, 130, groups=2, dtype="bfloat16", activation="gelu", residual=True, coefficients=BLEND
    ),
    "256 rows": Case(256, 128, residual=True),
    "300 rows": Case(300, 256, activation="relu", residual=True),
    "300 rows, bfloat16": Case(
        300, 65, groups=2, dtype="bfloat16", activation="relu", centre=100.0, operations=ALL
    ),
    "300 rows, 150 channels": Case(300, 150, activation="leaky_relu", coefficients=BLEND),
    "512 rows": Case(512, 128, dtype="bfloat16", activation="silu", coefficients=BLEND),
    "2051 rows": Case(2051, 7, activation="relu", operations=ALL),
    "2051 rows, 24 channels": Case(
        2051, 24, activation="gelu", residual=True, coefficients=BLEND, operations=ALL
    ),
}  # fmt: skip


def grid(shapes, dtypes, **fields):
    """A case for each shape ([groups,] rows, channels), dtype and activation, with a residual and without, by name."""
    every = itertools.product(shapes, dtypes, (None, *ACTIVATIONS), (False, True))
    return {
        f"{'x'.join(map(str, shape))}-{dtype}-{activation}-{residual}": Case(
            *shape[-2:],
            groups=shape[0] if len(shape) == 3 else 1,
            dtype=dtype,
            activation=activation,
            residual=residual,
            coefficients=BLEND,
            **fields,
        )
        for shape, dtype, activation, residual in every
    }


# For a device: rows that fold and rows that do not, one row, and enough for every core; channels as networks and people
# have them; no more elements than numpy works on in float64 within a minute.
DEVICE_SHAPES = [
    (rows, channels)
    for rows in (1, 8, 1568, 28679, 100352)
    for channels in (3, 17, 64, 65, 96, 128, 256, 1000, 2048)
    if rows * channels <= 30_000_000 and (rows >= 128 or rows * channels >= 128)
]
DEVICE_SETTINGS = [
    {"activation": None, "dtype": "float32"},
    {"activation": "relu", "dtype": "bfloat16", "residual": True},
    {"activation": "silu", "dtype": "float16", "coefficients": BLEND},
    {"activation": "gelu", "dtype": "bfloat16", "parameters": "bfloat16", "coefficients": BLEND},
    {"activation": "leaky_relu", "dtype": "float32", "residual": True},
]


def on_a_device(rows, channels, setting):
    """The name and the case of a shape in a setting."""
    case = Case(rows, channels, groups=2 if rows == 1568 else 1, operations=ALL, **setting)
    return f"{rows}x{channels}-{case.dtype}-{case.activation}", case
