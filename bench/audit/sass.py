"""What the loops of a GPU kernel cost, counted in its SASS: instructions, loads and stores, waits for memory.

    python -m bn_fused.bench.audit.sass FILE_OR_FOLDER ...        # what MOSAIC_GPU_DUMP_TO=FOLDER has left there

`kernels(text)` needs the text alone: what nvdisasm or cuobjdump writes, with control codes or without.

A loop is a natural loop of the control flow: all that lies between a branch back and the block that it goes to, if
every way there leads through that block. Its own instructions are those that are in no inner loop. All its branches
count, with what is predicated off: an instruction is issued all the same, and a block that is jumped over is no less
part of the code. How often a loop runs, the text does not say: every figure is of one iteration.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bn_fused.bench.audit.control_flow import LOADS, STORES, Flow, blocks_of, read

# What else reaches memory: atomics and reductions, the copy engine and other asynchronous copies.
_OTHERS = ("ATOM", "RED", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "LDGSTS")
# Loads from global memory, or through a generic address from another block's shared memory; and from shared memory.
_FAR, _NEAR = ("LDG", "LD", "ATOM", "ATOMG"), ("LDS", "LDSM", "ATOMS")

# ------------------------------------------------------------------------------------- counting


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a kernel has, or an iteration of a loop without its inner loops; all of one thread.

    - `instructions`: all of them.
    - `accesses`: how many there are of each kind of load and store, such as LDS.64: 8 bytes from shared memory.
    - `values16`, `values32`: values of 16 and of 32 bits that are loaded from shared memory. They are of 16 bits if
      something takes them out of halves of their register.
    - `stored_bytes`: to shared and global memory.
    - `global_rounds`, `shared_rounds`: how often the warp waits for loads from global memory (or from another block's
      shared memory), or from shared memory, one wait after the other. Instructions are issued in order: an instruction
      that needs a load's result is waited at, and what is loaded behind it belongs to the next round. Of branches that
      exclude each other the longer chain counts; inner loops, and all loops of a kernel, count with one iteration.
      Waits for barriers and for the copy engine are no rounds.
    """

    instructions: int
    accesses: Mapping[str, int]
    values16: int
    values32: int
    stored_bytes: int
    global_rounds: int
    shared_rounds: int

    @property
    def values(self) -> int:
        """The values of arrays that are loaded: where there are any of 16 bits, those of 32 are parameters."""
        return self.values16 or self.values32


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel, by the label of its first block; `around`: the loops that it is in, the outermost first.

    `kind`: "outer" has other loops inside; "waits" tries again until a barrier or a counter lets it go, and does not
    make the loop around it an outer one; "innermost".
    `arrays`: how many arrays of x's shape it reads from shared memory, None if that is not known.
    """

    label: str
    around: tuple[str, ...]
    kind: str
    counts: Counts
    arrays: int | None = None

    @property
    def stores(self) -> bool:
        """Whether it stores what it computes."""
        return self.counts.stored_bytes > 0

    @property
    def per_element(self) -> float | None:
        """Instructions for an element of x, or None: its values are the elements of so many arrays."""
        values = self.counts.values
        return self.counts.instructions * self.arrays / values if self.arrays and values else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, with its loops in the code's order.

    `registers`: the highest number of a thread's register that is named, and one; the compiler may reserve more.
    `local`: loads and stores of local memory, which is where registers are spilled.
    """

    name: str
    registers: int
    local: int
    counts: Counts
    loops: tuple[Loop, ...]

    @property
    def over_x(self) -> tuple[Loop, ...]:
        """The loops that work on arrays, inner loops apart.

        Beside a loop that loads more, what loads at most half as much is for the rest of a tile, unless only one of the
        two stores what it computes.
        """
        width = "values16" if any(loop.counts.values16 for loop in self.loops) else "values32"
        most: Counter[bool] = Counter()
        for loop in self.loops:
            most[loop.stores] = max(most[loop.stores], getattr(loop.counts, width))
        many = [loop for loop in self.loops if 2 * getattr(loop.counts, width) > most[loop.stores]]
        return tuple(loop for loop in many if not any(loop.label in other.around for other in many))


def kernels(text: str) -> list[Kernel]:
    """The kernels in a disassembler's text."""
    return [_kernel(name, lines) for name, lines in read(text).items()]


def kernel_from_json(values: Mapping[str, Any]) -> Kernel:
    """The kernel of `dataclasses.asdict`."""

    def loop_of(loop):
        return Loop(**{**loop, "around": tuple(loop["around"]), "counts": Counts(**loop["counts"])})

    loops = tuple(map(loop_of, values["loops"]))
    return Kernel(**{**values, "counts": Counts(**values["counts"]), "loops": loops})


def _kernel(name, lines):
    flow = Flow(blocks_of(lines))
    waits = {first for first, inside in flow.loops.items() if _only_waits(flow.instructions(inside))}
    loops = []
    for first in sorted(flow.loops, key=flow.place.get):
        inside = flow.loops[first]
        inner = [other for other, blocks in flow.loops.items() if blocks < inside]
        outer = sorted((other for other, blocks in flow.loops.items() if inside < blocks), key=flow.place.get)
        kind = "waits" if first in waits else "outer" if set(inner) - waits else "innermost"
        own = inside.difference(*(flow.loops[other] for other in inner))
        label, *around = (flow.blocks[one].label for one in (first, *outer))
        loops.append(Loop(label, tuple(around), kind, _counts(flow, own, inside, repeats=True)))
    instructions = flow.instructions(flow.order)
    named = [int(number) for one in instructions for number in re.findall(r"\bR(\d+)", ", ".join(one.operands))]
    local = sum("local" in (LOADS.get(one.name), STORES.get(one.name)) for one in instructions)
    counts = _counts(flow, flow.order, flow.order, repeats=False)
    return Kernel(name, max(named, default=-1) + 1, local, counts, tuple(loops))


def _only_waits(instructions):
    """Whether a loop does nothing but try again: it asks a barrier or reads a counter, and computes nothing with it."""
    tries = any("TRYWAIT" in one.opcode or (one.name in _FAR and ".STRONG" in one.opcode) for one in instructions)
    works = [one for one in instructions if one.name in (*STORES, *_NEAR, "FADD", "FMUL", "FFMA") and not one.never]
    return tries and not works


def _counts(flow, own, inside, *, repeats):
    """The `Counts` of the blocks `own`; rounds are those on the way through the blocks `inside`."""
    instructions = flow.instructions(own)
    accesses: Counter[str] = Counter()
    stored = 0
    for one in instructions:
        if one.never:
            continue
        if one.name in LOADS or one.name in STORES:
            accesses[one.name if one.nbytes == 4 else f"{one.name}.{8 * one.nbytes}"] += 1
            stored += one.nbytes if STORES.get(one.name) in ("shared", "global") else 0
        elif one.name.startswith(_OTHERS):
            accesses[one.name] += 1
    rounds = []
    for loads in (_FAR, _NEAR):
        first = _Rounds().through(flow, inside, loads)
        # What an iteration loads for the next one is waited for there.
        rounds.append(first.through(flow, inside, loads).now - first.now if repeats else first.now)
    return Counts(len(instructions), dict(sorted(accesses.items())), *_loaded(instructions), stored, *rounds)


def _loaded(instructions):
    """How many values of 16 and of 32 bits these instructions load from shared memory, if they run again and again."""
    halves = wholes = 0
    for place, load in enumerate(instructions):
        if LOADS.get(load.name) != "shared":
            continue
        _, results = load.registers
        if load.nbytes < 4:
            halves += load.nbytes == 2
            continue
        # The registers that hold what was loaded, copies included: each with the one it was loaded to.
        holds, unpacked = {register: register for register in results}, set()
        for later in (*instructions[place + 1 :], *instructions[:place]):
            used, written = later.registers
            sources = {holds[register] for register in used & holds.keys()}
            if later.unpacks:
                unpacked |= sources
            copies = later.opcode.startswith(("MOV", "IMAD.MOV"))
            for register in written:
                holds.pop(register, None)
                if copies and len(sources) == 1:
                    holds[register] = next(iter(sources))
            if not holds:
                break
        halves += 2 * len(unpacked)
        wholes += len(results) - len(unpacked)
    return halves, wholes


class _Rounds:
    """Rounds of loads one after the other: in which the warp is `now`, and which a register's value comes with."""

    def __init__(self, now=0, of=()):
        self.now, self.of = now, dict(of)

    def joined(self, other):
        names = self.of.keys() | other.of.keys()
        of = {name: max(self.of.get(name, 0), other.of.get(name, 0)) for name in names}
        return _Rounds(max(self.now, other.now), of)

    def run(self, instructions, loads):
        for instruction in instructions:
            used, written = instruction.registers
            self.now = max([self.now, *(self.of.get(name, 0) for name in used | written)])
            if instruction.name in loads and not instruction.never:
                self.of.update(dict.fromkeys(written, self.now + 1))

    def through(self, flow, inside, loads):
        """The rounds after the longest way through these blocks, each of them once."""
        chosen = [block for block in flow.order if block in inside]
        arriving, end = {chosen[0]: self}, _Rounds(self.now)
        for block in chosen:
            if block not in arriving:
                continue
            here = _Rounds(arriving[block].now, arriving[block].of)
            here.run(flow.blocks[block].instructions, loads)
            end = end.joined(here)
            for following in flow.blocks[block].next:
                if following in inside:
                    arriving[following] = here.joined(arriving[following]) if following in arriving else here
        return end


# ------------------------------------------------------------------------------------- where the text comes from


def nvdisasm() -> pathlib.Path | None:
    """The disassembler, of Triton or on the path."""
    return _tool("nvdisasm", shutil.which("nvdisasm"))


def _tool(name, instead):
    triton = importlib.util.find_spec("triton")
    places = triton.submodule_search_locations if triton else ()
    found = next(
        (path for place in places if (path := pathlib.Path(place, "backends/nvidia/bin", name)).exists()), instead
    )
    return pathlib.Path(found) if found else None


def dumped(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files with SASS in a folder of Mosaic GPU's dumps, in the order in which the kernels were lowered."""
    files = {path.name.partition(".")[0]: path for path in folder.glob("*.sass*")}
    return sorted(files.values(), key=lambda path: (_number(path), path.name))


def _number(path):
    number = re.search(r"_(\d+)\.", path.name)
    return int(number[1]) if number else -1


def disassembled(path: pathlib.Path) -> str:
    """The SASS of a file: of one with PTX, or a cubin, what the tools here make of it."""
    if path.suffix not in (".ptx", ".cubin"):
        return path.read_text(errors="replace")
    with tempfile.TemporaryDirectory() as folder:
        cubin = path
        if path.suffix == ".ptx":
            cubin = pathlib.Path(folder, "kernel.cubin")
            architecture = re.search(r"^\.target\s+(\w+)", path.read_text(), re.M)[1]
            # Triton's own may be older than what XLA writes for.
            ptxas = shutil.which("ptxas") or _tool("ptxas", "ptxas")
            subprocess.run([ptxas, f"-arch={architecture}", path, "-o", cubin], check=True)
        command = [nvdisasm() or "nvdisasm", "-ndf", "-c", cubin]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _lines(kernel):
    """A kernel in words."""
    counts = kernel.counts
    yield f"{kernel.name}: {counts.instructions} instructions, registers to R{kernel.registers - 1}, {_memory(counts)}"
    for loop in kernel.loops:
        counts, each = loop.counts, loop.per_element
        shown = each is not None and (loop.kind == "innermost" or loop in kernel.over_x)
        figure = f", {each:.2f} for each of {counts.values / loop.arrays:g} elements" if shown else ""
        name = f"{'  ' * (len(loop.around) + 1)}{loop.label} {loop.kind}"
        yield f"{name}: {counts.instructions} instructions{figure}, {_memory(counts)}"


def _memory(counts):
    accesses = ", ".join(f"{number} {name}" for name, number in counts.accesses.items()) or "no loads, no stores"
    return f"{accesses}; rounds of loads: {counts.global_rounds} global, {counts.shared_rounds} shared"


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m bn_fused.bench.audit.sass",
        description="Count what the loops of GPU kernels cost; one iteration of each, inner loops apart.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=pathlib.Path,
        metavar="PATH",
        help="SASS, PTX, a cubin, or a folder: of Mosaic GPU's dumps the SASS, or the PTX if there is none",
    )
    parser.add_argument("--arrays", type=int, default=1, help="arrays of x's shape that a loop reads; default: 1")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for a kernel")
    options = parser.parse_args(arguments)
    for path in options.paths:
        files = (dumped(path) or sorted(path.glob("*.ptx"), key=_number)) if path.is_dir() else [path]
        for file in files:
            try:
                text = disassembled(file)
            except (OSError, subprocess.CalledProcessError) as error:
                parser.error(f"{file}: {error}")
            for kernel in kernels(text):
                loops = tuple(dataclasses.replace(loop, arrays=options.arrays) for loop in kernel.loops)
                kernel = dataclasses.replace(kernel, loops=loops)
                print(json.dumps(dataclasses.asdict(kernel)) if options.json else "\n".join(_lines(kernel)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
