"""XLA's optimised HLO text, read into computations and instructions: `parse(compiled.as_text())`."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {
    "pred": 8,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](\{[^{}]*\})?")
# Memory spaces of a TPU that are not its main memory: VMEM, and CMEM on v4.
ON_CHIP = re.compile(r"S\([13]\)")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type: its dtype and shape as text, the number of elements, the bytes it fills.

    `padded_nbytes` counts the padding of the last tile of a tiled (TPU) layout; `on_chip` says that the array lies
    in a TPU's on-chip memory and not in the device's main one, where it would cost traffic.
    """

    text: str
    elements: int
    nbytes: int
    padded_nbytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it computes, from which instructions, and its attributes as text."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a module by name, each its instructions by name in order; `entry` names the first to run."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str | None


def parse(hlo_text: str) -> Module:
    """Read HLO text, with or without the `%` signs and the operands' types.

    Raises ValueError for a dtype it does not know, and for parentheses that are not closed.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = None
    for line in re.sub(r"/\*.*?\*/", "", hlo_text).splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            match = _INSTRUCTION.match(line)
            instruction = match and _parse_instruction(*match.groups())
            if instruction:
                current[instruction.name] = instruction
    return Module(computations, entry)


def _parse_instruction(root: str | None, name: str, rest: str) -> Instruction | None:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest[end:])
    if not opcode:
        return None
    start = end + opcode.end() - 1
    stop = _closing(rest, start)
    arguments = rest[start + 1 : stop]
    return Instruction(
        name,
        opcode.group(1),
        tuple(_arrays(rest[:end])),
        tuple(part.split()[-1].lstrip("%") for part in _split(arguments) if part.strip()),
        arguments,
        rest[stop + 1 :],
        root is not None,
    )


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _split(arguments: str) -> Iterator[str]:
    """The parts of a list of operands: commas inside of brackets (types, layouts) do not separate."""
    depth, start = 0, 0
    for index, character in enumerate(arguments):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield arguments[start:index]
            start = index + 1
    yield arguments[start:]


def _arrays(type_text: str) -> Iterator[Array]:
    for dtype, dimensions, layout in _SHAPE.findall(type_text):
        # A bounded dynamic dimension is written <=8.
        sizes = [int(size.strip().lstrip("<=")) for size in dimensions.split(",") if size.strip()]
        elements = math.prod(sizes)
        bits = _bits(dtype)
        padded = _padded_elements(sizes, layout)
        yield Array(
            f"{dtype}[{dimensions}]{layout}",
            elements,
            -(-elements * bits // 8),
            -(-padded * bits // 8),
            ON_CHIP.search(layout) is not None,
        )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)  # f32, bf16, s4, f8e4m3fn
    if not digits:
        raise ValueError(f"unknown dtype {dtype!r} in HLO")
    return int(digits.group(1))


def _padded_elements(sizes: list[int], layout: str) -> int:
    """Elements with the minor dimensions rounded up to the first tile of the layout, `{minor,...,major:T(8,128)}`."""
    tile = _TILE.search(layout)
    order = layout.strip("{}").split(":")[0]
    if not tile or not sizes or "*" in tile.group(1):
        return math.prod(sizes)
    minor_to_major = [int(axis) for axis in order.split(",") if axis]
    padded = list(sizes)
    for axis, multiple in zip(minor_to_major, reversed([int(size) for size in tile.group(1).split(",")]), strict=False):
        padded[axis] = -(-padded[axis] // multiple) * multiple
    return math.prod(padded)
