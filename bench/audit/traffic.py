"""Passes over x that a compiled program makes through memory, counted in its optimised HLO text.

BatchNorm is bound by memory: what it costs is how often it reads and writes an array of x's size. After XLA's
fusion every remaining instruction of the program is one kernel that reads its operands from memory and writes its
results there, so both can be counted in `compiled.as_text()`, for a chip that is not there too (`deviceless`):

    traffic = passes(compiled.as_text(), x.size, x.nbytes)
    assert traffic.reads <= 3 and traffic.writes <= 1

One pass is x's own number of bytes: a float32 array of x's shape makes two where x is bfloat16. What a kernel does
inside an opaque custom call (Pallas, Triton, cuDNN) is not seen: each of its operands is taken to be read once and
each of its results written once.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from bn_fused.bench.audit.hlo import Array, Instruction, Module, parse
from bn_fused.kernels.backends.jnp.operations import AGAIN

# Instructions that name or group arrays, or wait for them, and move nothing.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "opt-barrier",
        "optimization-barrier",
        "add-dependency",
        "domain",
        "partition-id",
        "replica-id",
        "get-dimension-size",
    ]
)
# Instructions that run other computations.
_CONTROL = ("call", "while", "conditional", "async-start")
# Instructions that only move data: alone in a kernel, they are a copy that a better layout would save.
_MOVES = frozenset(["copy", "transpose", "reshape", "bitcast", "bitcast-convert"])
# In a fusion, instructions that hand an operand through element by element in the same order and need not read all
# of it if only a part of their result is used.
_TRANSPARENT = frozenset(["bitcast", "reshape", "copy", "convert"])
_SLICES = frozenset(("slice", "dynamic-slice", "gather"))

_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Access:
    """What one kernel of the program reads and writes of arrays of about x's size, in passes over x.

    - `seldom`: whether it runs only where a channel's mean lies far from what was expected, see `passes`.
    """

    instruction: str
    opcode: str
    reads: float
    writes: float
    times: int = 1
    seldom: bool = False

    def __str__(self) -> str:
        repeated = f", {self.times} times" if self.times > 1 else ""
        seldom = ", seldom: not counted" if self.seldom else ""
        return f"{self.instruction} ({self.opcode}): {self.reads:g}R + {self.writes:g}W{repeated}{seldom}"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program moves.

    - `reads`, `writes`: passes over x.
    - `launches`: kernels, copies and custom calls that run, small ones included.
    - `details`: the accesses with any of these passes, in the program's order, and those that are seldom made.
    - `copies_or_transposes`: names of the kernels that do nothing but copy or transpose an array of about x's size.
    """

    reads: float
    writes: float
    launches: int
    details: tuple[Access, ...]
    copies_or_transposes: tuple[str, ...]

    @property
    def seldom(self) -> float:
        """The passes, reads and writes, that are not counted because they are seldom made."""
        return sum(access.times * (access.reads + access.writes) for access in self.details if access.seldom)

    def __str__(self) -> str:
        return f"{self.reads:g}R + {self.writes:g}W in {self.launches} launches"


def passes(hlo_text: str, x_elements: int, x_bytes: int, *, smallest: float = 1 / 32, padded: bool = False) -> Traffic:
    """Count the passes over x in an optimised HLO module.

    **Arguments:**

    - `hlo_text`: `compiled.as_text()`.
    - `x_elements`, `x_bytes`: x's number of elements and bytes.
    - `smallest`: accesses of fewer than this share of x's elements are left out of the passes (statistics per channel,
        the partial sums of a reduction in two steps); they still count as launches.
    - `padded`: count the bytes with the padding of tiled layouts.

    **Counted** are the kernels of the entry computation and of the computations it calls. A fusion reads of each
    operand what it uses: if that goes through slices alone, the slices. An operand that is used twice by one kernel is
    read once. A dynamic-update-slice works in place: it reads and writes the update. A loop's body counts as often as
    the loop runs (once if HLO does not say), a conditional as its most expensive branch; but that with which `jnp` sums
    the moments again, where a channel's mean lies far from what was expected, as the cheaper one: what the other one
    does is among the details as seldom. What lies on the chip costs nothing.

    Raises ValueError for sizes below 1, and for a text without an entry computation.
    """
    if x_elements < 1 or x_bytes < 1:
        raise ValueError(f"x_elements is {x_elements} and x_bytes {x_bytes}; both must be above 0")
    module = parse(hlo_text)
    if module.entry is None:
        raise ValueError("hlo_text has no ENTRY computation; pass the text of a compiled module")
    return _Counter(module, smallest * x_elements, x_bytes, padded).run(module.entry)


class _Counter:
    """Counts a module's computations; see `passes`."""

    def __init__(self, module: Module, least_elements: float, x_bytes: int, padded: bool):
        self.module = module
        self.computations = module.computations
        self.least_elements = least_elements
        self.x_bytes = x_bytes
        self.padded = padded

    def run(self, name: str) -> Traffic:
        """The traffic of one computation."""
        instructions = self.computations.get(name, {})
        reads = writes = 0.0
        launches = 0
        details: list[Access] = []
        copies: list[str] = []
        for instruction in instructions.values():
            opcode = instruction.opcode
            if opcode in _FREE or opcode.endswith(("-done", "-update")):
                continue
            if opcode in _CONTROL:
                runs, times = self._called(instruction)
                seldom = opcode == "conditional" and AGAIN in instruction.attributes
                inner = runs[0 if seldom else -1]
                reads += times * inner.reads
                writes += times * inner.writes
                launches += times * inner.launches
                details.extend(dataclasses.replace(access, times=times * access.times) for access in inner.details)
                if seldom:
                    details.extend(dataclasses.replace(access, seldom=True) for access in runs[-1].details)
                copies.extend(inner.copies_or_transposes)
                continue
            launches += 1
            access = Access(
                instruction.name,
                opcode,
                self._reads(instruction, instructions),
                self._writes(instruction, instructions),
            )
            reads, writes = reads + access.reads, writes + access.writes
            if access.reads or access.writes:
                details.append(access)
                if self._only_moves(instruction):
                    copies.append(instruction.name)
        return Traffic(reads, writes, launches, tuple(details), tuple(copies))

    def _called(self, instruction: Instruction) -> tuple[list[Traffic], int]:
        """The traffic of what a control instruction may run, the most expensive last, and how often it runs it."""
        names = _CALLED.findall(instruction.attributes)
        for branches in _BRANCHES.findall(instruction.attributes):
            names.extend(name.strip().lstrip("%") for name in branches.split(","))
        trips = _TRIP_COUNT.search(instruction.attributes) if instruction.opcode == "while" else None
        times = int(trips.group(1)) if trips else 1
        # A loop over x's rows reads little of x in each round, and all of it in the end.
        inner = _Counter(self.module, self.least_elements / max(times, 1), self.x_bytes, self.padded)
        runs = [inner.run(name) for name in names] or [Traffic(0.0, 0.0, 0, (), ())]
        return sorted(runs, key=lambda traffic: traffic.reads + traffic.writes), times

    def _passes(self, arrays: tuple[Array, ...], elements: float = math.inf) -> float:
        """The passes that an access to at most `elements` of each of these arrays makes."""
        total = 0.0
        for array in arrays:
            touched = min(elements, array.elements)
            if array.on_chip or not array.elements or touched < self.least_elements:
                continue
            nbytes = array.padded_nbytes if self.padded else array.nbytes
            total += nbytes * touched / array.elements / self.x_bytes
        return total

    def _source(self, name: str, instructions: Mapping[str, Instruction]) -> str:
        """The instruction whose memory an operand lies in, through bitcasts."""
        while name in instructions and instructions[name].opcode == "bitcast":
            name = instructions[name].operands[0]
        return name

    def _reads(self, instruction: Instruction, instructions: Mapping[str, Instruction]) -> float:
        opcode = instruction.opcode
        if opcode in _SLICES:
            source = instructions.get(instruction.operands[0])
            fits = instruction.arrays[0].elements
            return self._passes(source.arrays, fits) if source else 0.0
        if opcode.endswith("-start"):
            # The result of an asynchronous copy or slice lists its operand again, then where the data go.
            from_chip = all(array.on_chip for array in self._operand_arrays(instruction, instructions))
            moved = self._destinations(instruction, instructions)
            return (
                0.0 if from_chip else self._passes(tuple(dataclasses.replace(array, on_chip=False) for array in moved))
            )
        # How many elements of each source are read; a source that several operands share is read once.
        touched: dict[str, float] = {}
        for index, operand in enumerate(instruction.operands):
            source = self._source(operand, instructions)
            touched[source] = max(touched.get(source, 0), self._elements_read(instruction, index))
        total = 0.0
        for source, elements in touched.items():
            if source in instructions:
                total += self._passes(instructions[source].arrays, elements)
        return total

    def _elements_read(self, instruction: Instruction, index: int) -> float:
        """How many elements of an operand a kernel reads: all (infinity) unless it takes slices alone."""
        if instruction.opcode == "dynamic-update-slice":
            return 0 if index == 0 else math.inf
        if instruction.opcode != "fusion":
            return math.inf
        fused = self._fused(instruction)
        parameter = next(
            (
                inner
                for inner in fused.values()
                if inner.opcode == "parameter" and inner.arguments.strip() == str(index)
            ),
            None,
        )
        return self._elements_used(parameter.name, fused) if parameter else math.inf

    def _elements_used(self, name: str, instructions: Mapping[str, Instruction]) -> float:
        """How many elements of a value inside a fusion are used."""
        if instructions[name].root:
            return math.inf
        used = 0.0
        for user in instructions.values():
            for index, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in _SLICES and index == 0:
                    used += user.arrays[0].elements
                elif user.opcode == "dynamic-update-slice" and index == 0:
                    # In place where it is what the fusion returns; else the rest is copied.
                    used += 0 if self._is_result(user.name, instructions) else math.inf
                elif user.opcode == "fusion":
                    used += self._elements_read(user, index)
                elif user.opcode in _TRANSPARENT:
                    used += self._elements_used(user.name, instructions)
                else:
                    used = math.inf
        return used

    def _is_result(self, name: str, instructions: Mapping[str, Instruction]) -> bool:
        """Whether a value inside a fusion is returned, through bitcasts, and not used otherwise."""
        users = [user for user in instructions.values() if name in user.operands]
        if not users:
            return instructions[name].root
        return all(
            (user.opcode == "tuple" and user.root)
            or (user.opcode == "bitcast" and self._is_result(user.name, instructions))
            for user in users
        )

    def _writes(self, instruction: Instruction, instructions: Mapping[str, Instruction]) -> float:
        opcode = instruction.opcode
        if opcode == "dynamic-update-slice":
            update = instructions.get(instruction.operands[1])
            return self._passes(update.arrays) if update else 0.0
        if opcode.endswith("-start"):
            return self._passes(self._destinations(instruction, instructions))
        if opcode == "fusion":
            fused = self._fused(instruction)
            root = next((inner for inner in fused.values() if inner.root), None)
            if root:
                results = root.operands if root.opcode == "tuple" else (root.name,)
                return sum(self._fused_write(result, fused) for result in results)
        return self._passes(instruction.arrays)

    def _fused_write(self, result: str, fused: Mapping[str, Instruction]) -> float:
        """The passes with which a fusion writes one of its results: an update in place writes the update alone."""
        instruction = fused[self._source(result, fused)]
        if instruction.opcode == "dynamic-update-slice":
            update = fused[self._source(instruction.operands[1], fused)]
            return self._passes(fused[result].arrays, sum(array.elements for array in update.arrays))
        return self._passes(fused[result].arrays)

    def _fused(self, instruction: Instruction) -> Mapping[str, Instruction]:
        called = _CALLED.search(instruction.attributes)
        return self.computations.get(called.group(1), {}) if called else {}

    def _operand_arrays(self, instruction: Instruction, instructions: Mapping[str, Instruction]) -> list[Array]:
        return [array for name in instruction.operands if name in instructions for array in instructions[name].arrays]

    def _destinations(self, instruction: Instruction, instructions: Mapping[str, Instruction]) -> tuple[Array, ...]:
        """The arrays of an asynchronous start's result that are not its operands again."""
        arrays = list(instruction.arrays)
        for operand in self._operand_arrays(instruction, instructions):
            same = next((array for array in arrays if array.text == operand.text), None)
            if same is not None and len(arrays) > 1:
                arrays.remove(same)
        return tuple(arrays)

    def _only_moves(self, instruction: Instruction) -> bool:
        """Whether a kernel does nothing but copy, transpose or reshape."""
        if instruction.opcode == "fusion":
            work = [inner for inner in self._fused(instruction).values() if inner.opcode not in ("parameter", "tuple")]
            return bool(work) and all(inner.opcode in _MOVES for inner in work)
        return instruction.opcode in _MOVES or instruction.opcode == "copy-start"
