"""The text of a disassembled GPU kernel (SASS), and its control flow: instructions, blocks, loops."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

# ------------------------------------------------------------------------------------- instructions

LOADS = {"LDS": "shared", "LDSM": "shared", "LDG": "global", "LD": "generic", "LDL": "local"}
STORES = {"STS": "shared", "STSM": "shared", "STG": "global", "ST": "generic", "STL": "local"}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; 4 without any of them
# Instructions without results in registers, and those whose only results are the predicates that they begin with.
_NO_RESULT = (*STORES, "BAR", "BRA", "BRX", "CALL", "JMP", "JMX", "NANOSLEEP", "RED", "REDG", "RET", "WARPSYNC")
_PREDICATES_ONLY = ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UISETP", "UPLOP3", "FCHK", "ELECT", "SYNCS")
_LEAVES = ("EXIT", "RET", "BRX", "JMP", "JMX")
# What takes a 16-bit value out of its half of a register: half-precision arithmetic and permutations; the others shift
# or mask by these numbers.
_HALVES, _HALF_NUMBERS = ("HADD2", "HFMA2", "HMUL2", "HMNMX2", "HSETP2", "PRMT"), ("0x10", "0x10000", "0xffff0000")
_SHIFTS = ("SHF", "SHL", "IMAD", "LOP3", "LEA")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of SASS; `guard` is the predicate under which it runs, with "!" where that must be false."""

    address: int
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def never(self) -> bool:
        """Whether it is there to fill a place only."""
        return self.guard in ("!PT", "!UPT")

    @property
    def conditional(self) -> bool:
        """Whether it may run or not; a branch may have its predicate among its operands."""
        return self.guard not in ("", "PT", "UPT") or (self.name == "BRA" and len(self.operands) > 1)

    @property
    def nbytes(self) -> int:
        """What a load or store moves for a thread."""
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)

    @property
    def target(self) -> str | None:
        """Where a branch goes: a label, or an address as hexadecimal number."""
        found = re.search(r"`\((\S+)\)|\b(0x[0-9a-f]+)$", self.operands[-1] if self.operands else "")
        return found and (found[1] or found[2])

    @functools.cached_property
    def registers(self) -> tuple[frozenset[str], frozenset[str]]:
        """The registers that are read, and those that are written; predicates are none."""
        operands, results = list(self.operands), []
        if self.name not in _NO_RESULT:
            while operands and re.match(r"U?P[\dT]", operands[0]):
                operands.pop(0)
            if operands and re.match(r"U?R[\dZ]", operands[0]) and self.name not in _PREDICATES_ONLY:
                results.append(operands.pop(0))
        text = ", ".join(operands)
        read = set(re.findall(r"\bU?R\d+\b", text)).union(*(_run(one, 2) for one in re.findall(r"U?R\d+\.64", text)))
        if self.name in STORES and operands:
            read |= _run(operands[-1], self.nbytes // 4)
        number = 2 if ".WIDE" in self.opcode else self.nbytes // 4
        return frozenset(read), frozenset().union(*(_run(one, number) for one in results))

    @property
    def unpacks(self) -> bool:
        """Whether it takes 16 bits out of a register."""
        halves = self.name in _SHIFTS and any(one in _HALF_NUMBERS for one in self.operands)
        return halves or self.name in _HALVES


def _run(operand: str, number: int) -> set[str]:
    """The neighbouring registers that begin with an operand, at least one; none if it is the constant zero."""
    found = re.match(r"[-~|]*(U?R)(\d+)", operand)
    return {f"{found[1]}{int(found[2]) + more}" for more in range(max(number, 1))} if found else set()


_KERNEL = re.compile(r"\s*\.text\.([\w.$]+):|\s*Function\s*:\s*(\S+)")
_LABEL = re.compile(r"(\.L\w+|\$[\w.$]+):\s*$")
_INSTRUCTION = re.compile(
    r"[^/]*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P[\dT])\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*)"
)


def read(text: str) -> dict[str, list[str | Instruction]]:
    """The labels and instructions of each kernel in a disassembler's text."""
    found: dict[str, list] = {}
    lines: list = []
    for line in text.splitlines():
        if kernel := _KERNEL.match(line):
            lines = found.setdefault(kernel[1] or kernel[2], [])
        elif label := _LABEL.match(line):
            lines.append(label[1])
        elif instruction := _INSTRUCTION.match(line):
            operands = re.sub(r"/\*.*", "", instruction["operands"]).strip()
            operands = tuple(one.strip() for one in re.split(r",(?![^\[]*\])", operands)) if operands else ()
            guard, address = instruction["guard"] or "", int(instruction["address"], 16)
            lines.append(Instruction(address, instruction["opcode"], operands, guard))
    return {name: lines for name, lines in found.items() if any(isinstance(line, Instruction) for line in lines)}


# ------------------------------------------------------------------------------------- control flow


@dataclasses.dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may come next."""

    label: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    next: list[int] = dataclasses.field(default_factory=list)


def blocks_of(lines: Sequence[str | Instruction]) -> list[Block]:
    """The blocks of a kernel, in the order of the text.

    The call of a subroutine goes on behind it, and the subroutine is none of the kernel's blocks. The call of an
    external function, an assertion that has failed, does not come back.
    """
    branches = [line for line in lines if isinstance(line, Instruction) and line.name in ("BRA", "BSSY")]
    targets = {branch.target for branch in branches}
    blocks, places, joins = [Block("start")], {}, {}
    for line in lines:
        label = line if isinstance(line, str) else f"{line.address:#x}"
        if label in targets:
            if blocks[-1].instructions:
                blocks.append(Block(label))
            blocks[-1].label = label
            places[label] = len(blocks) - 1
        if isinstance(line, str):
            continue
        blocks[-1].instructions.append(line)
        if line.name in ("BRA", "BSYNC", *_LEAVES) or line.opcode.startswith("CALL.ABS"):
            blocks.append(Block(f"after {line.address:#x}"))
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        goes_on = True
        for instruction in block.instructions:
            if instruction.name == "BSSY":
                joins[instruction.operands[0]] = instruction.target
        if last is not None and not last.never:
            target = last.target if last.name == "BRA" else None
            if last.name == "BSYNC":  # where those that branched come together
                target = joins.get(last.operands[0])
            if target in places:
                block.next.append(places[target])
            leaves = last.name in _LEAVES or last.opcode.startswith("CALL.ABS")
            goes_on = last.conditional or not (leaves or last.name == "BRA" or target in places)
        if goes_on and index + 1 < len(blocks) and index + 1 not in block.next:
            block.next.append(index + 1)
    return blocks


class Flow:
    """The blocks of a kernel that can be reached, `order`ed so that each stands before those it leads on to.

    `loops`: the number of the first block of each loop, with the numbers of all its blocks.
    """

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = blocks
        self.order = self._in_order()
        self.place = {block: place for place, block in enumerate(self.order)}
        self.before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in blocks[block].next:
                self.before[following].append(block)
        self.loops = self._natural_loops()

    def instructions(self, chosen: Iterable[int]) -> list[Instruction]:
        """The instructions of these blocks, in the text's order."""
        return [instruction for block in sorted(chosen) for instruction in self.blocks[block].instructions]

    def _in_order(self):
        order, seen, stack = [], {0}, [(0, iter(self.blocks[0].next))]
        while stack:
            block, following = stack[-1]
            step = next((one for one in following if one not in seen), None)
            if step is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(self.blocks[step].next)))
        return order[::-1]

    def _dominators(self):
        """For each block the last one that all ways to it lead through (Cooper, Harvey & Kennedy)."""
        above, changed = {0: 0}, True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [one for one in self.before[block] if one in above]
                new = functools.reduce(lambda one, other: self._common(above, one, other), known)
                changed |= above.get(block) != new
                above[block] = new
        return above

    def _common(self, above, one, other):
        while one != other:
            if self.place[one] > self.place[other]:
                one = above[one]
            else:
                other = above[other]
        return one

    def _natural_loops(self):
        above, loops = self._dominators(), {}
        for block in self.order:
            for first in self.blocks[block].next:
                if self._common(above, first, block) == first:
                    inside, waiting = loops.setdefault(first, {first}), [block]
                    while waiting:
                        one = waiting.pop()
                        if one not in inside:
                            inside.add(one)
                            waiting += self.before[one]
        return loops
