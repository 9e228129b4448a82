"""What a layer moves through a chip's memory, without the chip: compile each case for it and count.

`audit(cases)` gives a `Row` for every case. The cases of a target are compiled in a process of its own (this module
run as `python -m bn_fused.bench.audit.compile`): XLA keeps one GPU's description for a process, and a compiler that
aborts takes its process along. What compilers tell of our kernels they write into files, which takes them up to three
times as long: a program with such kernels is compiled again for that, in one more process, and the seconds that a row
has are those without it.

Counted in the compiled program (`traffic`) are the passes over arrays of x's size that are made around our kernels.
What a kernel does inside, HLO does not say: its plan does. A plan may have a method

    passes(operation) -> (reads, writes)

or a mapping `passes` of that form, which gives the passes over arrays of x's size (x, dy, the residual, y, dx) that the
kernels of an operation of `kernels.contract` make. Without it they are not known, and the row says so. Operands that
XLA has brought onto the chip beforehand (a TPU's VMEM), and results that it keeps there, are no passes through memory:
of what the plan says, the share counts that lies in memory.
"""

import contextlib
import dataclasses
import glob
import importlib
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bn_fused.bench import deviceless, installing
from bn_fused.bench.audit import sass
from bn_fused.bench.audit.blocks import Setting, layer_named, make_program
from bn_fused.bench.audit.hlo import ON_CHIP, Module, parse
from bn_fused.bench.audit.rows import (
    Case,
    Passes,
    Row,
    case_from_json,
    case_to_json,
    row_from_json,
    row_of,
    row_to_json,
)
from bn_fused.bench.audit.traffic import Traffic, passes
from bn_fused.bench.child import Child, ChildEnded, answer_requests
from bn_fused.bench.providers import NO_NORM, explain
from bn_fused.kernels.chips import CHIPS

# Why the instructions of our Pallas kernels for GPUs are not known.
NO_DISASSEMBLER = (
    "instructions are not counted: they need nvdisasm, which comes with Triton: "
    + installing.pip_install(f"--no-deps $({installing.python()} -m bn_fused.bench.deviceless triton)")
)
# The operations of `kernels.contract` that a pass runs.
OPERATIONS = {"fwd": ("forward",), "bwd": ("backward",), "fwd+bwd": ("forward", "backward")}
# Custom calls that are kernels of ours: Pallas for GPUs and for TPUs, Triton.
MOSAIC_GPU = "mosaic_gpu"
KERNEL_TARGETS = (MOSAIC_GPU, "tpu_custom_call", "triton_kernel_call")

# ------------------------------------------------------------------------------------- counting one compiled program


def planned_passes(plan: Any, operations: Sequence[str]) -> dict[str, Passes] | None:
    """The passes inside the kernels of each of these operations by a plan; None if it does not tell."""
    told = getattr(plan, "passes", None)
    if told is None:
        return None
    ask = told if callable(told) else told.get
    planned = {operation: ask(operation) for operation in operations}
    return None if None in planned.values() else {name: Passes(*figures) for name, figures in planned.items()}


def kernel_calls(module: Module) -> dict[str, str]:
    """The custom calls of a program that are kernels of ours: name to attributes."""
    return {
        instruction.name: instruction.attributes
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "custom-call"
        and any(f'custom_call_target="{target}' in instruction.attributes for target in KERNEL_TARGETS)
    }


def count(hlo_text: str, elements: int, nbytes: int, inside: Mapping[str, Passes] | None = None) -> dict[str, Any]:
    """The fields of a `Row` that the text of a compiled program gives.

    `inside`: the passes that our kernels make, if there are any in it, for each operation; see `planned_passes`.
    """
    traffic = passes(hlo_text, elements, nbytes)
    calls = kernel_calls(parse(hlo_text))
    operand_reads, operand_writes = _passes_of(traffic, calls)
    padded = passes(hlo_text, elements, nbytes, padded=True)
    padded_operands = _passes_of(padded, calls)
    fields = {
        "reads": traffic.reads - operand_reads,
        "writes": traffic.writes - operand_writes,
        "padded_reads": padded.reads - padded_operands[0],
        "padded_writes": padded.writes - padded_operands[1],
        "kernels": len(calls),
        "operand_reads": operand_reads,
        "operand_writes": operand_writes,
        "launches": traffic.launches,
        "copies": _copies(traffic),
        "details": [str(access) for access in traffic.details],
    }
    kinds = "inside_reads", "inside_writes", "padded_inside_reads", "padded_inside_writes"
    if not calls:
        return fields | dict.fromkeys(kinds, 0.0)
    vmem = [int(size) for attributes in calls.values() for size in _VMEM.findall(attributes)]
    if vmem:
        fields["on_chip_bytes"] = max(vmem)
    if inside is not None:
        fields |= dict.fromkeys(kinds, 0.0)
        anywhere = passes(ON_CHIP.sub("", hlo_text), elements, nbytes)
        for operation, planned in inside.items():
            names = _calls_of(operation, inside, calls)
            for prefix, counted in (("", traffic), ("padded_", padded)):
                figures = zip(planned, _passes_of(counted, names), _passes_of(anywhere, names), strict=True)
                for kind, (by_plan, in_memory, in_all) in zip(("reads", "writes"), figures, strict=True):
                    fields[f"{prefix}inside_{kind}"] += by_plan * in_memory / in_all if in_all else by_plan
    return fields


def _calls_of(operation, operations, calls):
    """The kernels of an operation: those with its name, and all of them if some kernel has no operation's name."""
    named = {call: re.sub(r"\.\d+$", "", call).removeprefix("bn_fused_") for call in calls}
    if set(named.values()) <= set(operations):
        return {call for call, name in named.items() if name == operation}
    return set(calls)


# What a TPU kernel uses of VMEM, memory space 1.
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def _passes_of(traffic: Traffic, names: Iterable[str]) -> tuple[float, float]:
    chosen = [access for access in traffic.details if access.instruction in names]
    return (
        sum(access.times * access.reads for access in chosen),
        sum(access.times * access.writes for access in chosen),
    )


def _copies(traffic: Traffic) -> list[str]:
    """The copies and transposes from memory to memory; a TPU's copies to and from its chip only read or write."""
    both = {access.instruction for access in traffic.details if access.reads and access.writes}
    return [name for name in traffic.copies_or_transposes if name in both]


def gpu_resources(folder: pathlib.Path) -> dict[str, int]:
    """The fields of a `Row` that Mosaic GPU's dump of a program's kernels gives: the largest of any kernel."""
    registers, spills, shared = [], [], []
    for path in folder.glob("*.ptxas"):
        text = path.read_text(errors="replace")
        registers += map(int, re.findall(r"Used (\d+) registers", text))
        spills += map(int, re.findall(r"(\d+) bytes spill stores", text))
    for path in folder.glob("*.mlir-passes.log"):
        # The launch in the code of the lowering, where the size is a constant that has its value as its name.
        shared += map(int, re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", path.read_text(errors="replace")))
    resources = {"registers": registers, "spill_bytes": spills, "on_chip_bytes": shared}
    return {name: max(values) for name, values in resources.items() if values}


def gpu_kernels(folder: pathlib.Path, arrays_of: Mapping[str, int]) -> tuple[sass.Kernel, ...]:
    """Mosaic GPU's kernels in its dump; `arrays_of`: how many arrays of x's size a kernel of this name reads.

    Where a forward adds up moments, it stores nothing, and reads x without the residual.
    """
    found = []
    for path in sass.dumped(folder):
        for kernel in sass.kernels(path.read_text(errors="replace")):
            name = kernel.name.removesuffix("_mosaic_gpu_kernel")
            loops = []
            for loop in kernel.loops:
                of_x_alone = "forward" in name and not loop.stores
                loops.append(dataclasses.replace(loop, arrays=1 if of_x_alone else arrays_of.get(name)))
            found.append(dataclasses.replace(kernel, name=name, loops=tuple(loops)))
    return tuple(found)


def arrays_read(hlo_text: str, elements: int, nbytes: int) -> dict[str, int]:
    """How many arrays of x's size the Pallas kernels of a program read, by the names that they were given."""
    reads = {access.instruction: access.reads for access in passes(hlo_text, elements, nbytes).details}
    names = {call: _NAME.search(attributes) for call, attributes in kernel_calls(parse(hlo_text)).items()}
    return {name[1]: round(reads[call]) for call, name in names.items() if name and round(reads.get(call, 0))}


# A kernel's name in the scopes of its operation; the last one is the primitive's.
_NAME = re.compile(r'op_name="[^"]*/(\w+)/[^/"]*"')


# The column of a TPU's compiler for stores to memory because there are no registers left, each of a whole register.
_SPILL, _VECTOR_REGISTER = "VSTORE:SPILL", 8 * 128 * 4


def tpu_resources(folder: pathlib.Path, kernels: Iterable[str]) -> dict[str, int]:
    """The fields of a `Row` that the TPU compiler's dump gives of the kernels with these names: the largest of any.

    The dump of a kernel has a table with a line for every instruction, which says how many units of each kind it uses.
    """
    bundles, spills = [], []
    for name in kernels:
        for path in folder.glob(f"*-{glob.escape(name)}-*-final_hlo-static-per-bundle-utilization.txt"):
            lines = path.read_text(errors="replace").splitlines()
            units = next((line.split(", ") for line in lines if _SPILL in line), None)
            start = next((index for index, line in enumerate(lines) if "UTILIZATION" in line), None)
            if units is None or start is None:
                continue
            used = [line.split() for line in lines[start + 1 :] if line.strip()]
            bundles.append(len(used))
            spills.append(_VECTOR_REGISTER * sum(int(line[units.index(_SPILL)]) for line in used))
    resources = {"bundles": bundles, "spill_bytes": spills}
    return {name: max(values) for name, values in resources.items() if values}


def compile_case(case: Case, dump: pathlib.Path | None = None) -> Row:
    """Compile a case in this process; whatever goes wrong is the row's reason. `dump`: where compilers dump kernels."""
    import jax

    import bn_fused

    setting = case.setting
    try:
        with jax.enable_x64(setting.dtype == "float64"):
            auto = explain(setting.compiled, "auto", case.target)
            choice = explain(setting.compiled, case.layer, case.target) if case.ours else None
            program = make_program(setting, case.layer, case.pass_name)
            times = [time.perf_counter()]
            lowered = deviceless.lower_for(case.target, program.function, *program.specs)
            times.append(time.perf_counter())
            compiled = deviceless.compile_lowered(lowered)
            times.append(time.perf_counter())
    except bn_fused.BackendError as error:
        return Row(case, "refused", _line(error))
    except (deviceless.DevicelessUnavailable, ModuleNotFoundError) as error:
        return Row(case, "missing", _line(error))
    except Exception as error:
        return Row(case, "failed", f"{type(error).__name__}: {_line(error)}")
    plan = None if choice is None else choice.plan
    hlo_text = compiled.as_text()
    fields = count(hlo_text, setting.elements, setting.nbytes, planned_passes(plan, OPERATIONS[case.pass_name]))
    memory = compiled.memory_analysis()
    if memory is not None:
        fields["temporary_bytes"] = memory.temp_size_in_bytes
    calls = kernel_calls(parse(hlo_text))
    if any(MOSAIC_GPU in attributes for attributes in calls.values()):
        fields["sass"] = ()
    if dump is not None:
        fields |= gpu_resources(dump) | tpu_resources(dump, calls)
        if "sass" in fields:
            fields["sass"] = gpu_kernels(dump, arrays_read(hlo_text, setting.elements, setting.nbytes))
            if sass.nvdisasm() is None:
                fields["reason"] = NO_DISASSEMBLER
    return row_of(
        case,
        {
            "status": "compiled",
            "auto": auto.name == case.layer,
            "kept_bytes": program.kept_bytes,
            "plan": _plan_text(plan, OPERATIONS[case.pass_name]),
            "lowering_seconds": times[1] - times[0],
            "compiling_seconds": times[2] - times[1],
            **fields,
        },
    )


def _plan_text(plan, operations):
    """A plan in words: of one that has a part for each operation, the parts that run."""
    if plan is None:
        return ""
    parts = {operation: getattr(plan, operation, None) for operation in operations}
    if None in parts.values():
        return str(plan)
    return "; ".join(f"{operation}: {part}" for operation, part in parts.items())


def _line(error) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ------------------------------------------------------------------------------------- all cases, in processes


def audit(
    cases: Sequence[Case],
    *,
    time_limit: float = 120.0,
    instructions: bool = False,
    before: Callable[[Case], None] = lambda case: None,
    command: Sequence[str] = (sys.executable, "-m", "bn_fused.bench.audit.compile"),
) -> Iterator[Row]:
    """The rows of the cases, in order, each as soon as it is there.

    Every target has a process of its own. One that ends, or gives no row within `time_limit` seconds, makes its case
    "failed" and is replaced by a new one for the cases that are left. With `instructions`, TPU's kernels'
    instructions and spills are counted; their compiler then writes down all it does, which takes up to a minute and a
    gigabyte a program. `before` is called when a case's turn comes; `command` is the process's program. Closing the
    iterator ends the processes with all they started.
    """
    with contextlib.closing(_Process(command)) as process:
        for case in cases:
            before(case)
            sentence = deviceless.missing(case.target) or layer_named(case.layer).missing
            if sentence is not None:
                yield Row(case, "missing", sentence)
                continue
            row = process.row(case, time_limit)
            on_tpu = CHIPS[case.target].platform == deviceless.TPU
            if row.sass is not None or (on_tpu and instructions and row.kernels):
                with (
                    tempfile.TemporaryDirectory(prefix="bn_fused_audit_") as dump,
                    # A process compiles, and dumps, a kernel once: a later program with the same one would find none.
                    contextlib.closing(_Process(command, dump)) as dumping,
                ):
                    row = _with_dumped(row, dumping.row(case, time_limit))
            yield row


class _Process:
    """The process that compiles the cases of a target; `dump`: the folder where its compiler dumps kernels."""

    def __init__(self, command: Sequence[str], dump: str | None = None):
        self.command, self.dump = command, dump
        self.child: Child | None = None
        self.target: str | None = None

    def row(self, case: Case, time_limit: float) -> Row:
        """The row of a case."""
        if self.child is None or self.target != case.target:
            self.close()
            self.child, self.target = Child(self.command, _environment(case.target, self.dump)), case.target
        try:
            return row_from_json(self.child.ask(case_to_json(case), time_limit))
        except ChildEnded as ended:
            self.close()
            return Row(case, "failed", str(ended))

    def close(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.close()
        self.child = None


# What a row has from dumps alone.
_FROM_DUMPS = ("on_chip_bytes", "registers", "spill_bytes", "bundles", "sass", "reason")


def _with_dumped(row, again):
    """A row with what compiling it again has told, with dumps."""
    if again.status != "compiled":
        return dataclasses.replace(row, reason=f"what its kernels use is not known: {again.reason}")
    told = {name: getattr(again, name) for name in _FROM_DUMPS}
    return dataclasses.replace(row, **{name: value for name, value in told.items() if value is not None})


# Where a compiling process finds its folder for dumps, if it is to dump.
_DUMP = "BN_FUSED_AUDIT_DUMP"


def _environment(target: str, dump: str | None) -> dict[str, str]:
    """What a compiling process finds in its environment."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # The TPU's compiler may be loaded by several processes at once: it does not touch a TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if dump is None:
        return environment
    if CHIPS[target].platform == deviceless.CUDA:
        kinds = dict.fromkeys(("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_SASS"), "1")
        return environment | {_DUMP: dump, "MOSAIC_GPU_DUMP_TO": dump, **kinds}
    flags = (os.environ.get("LIBTPU_INIT_ARGS", ""), f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true")
    return environment | {_DUMP: dump, "LIBTPU_INIT_ARGS": " ".join(flags).strip()}


def serve() -> None:
    """Compile the cases that come on standard input; the other end of `audit`."""
    dump = pathlib.Path(os.environ[_DUMP]) if _DUMP in os.environ else None
    if "MOSAIC_GPU_DUMP_TO" in os.environ:
        _show_disassembler()

    answer_requests(lambda request: row_to_json(compile_case(case_from_json(request), dump)))


def _show_disassembler():
    """Tell Mosaic GPU where nvdisasm is: what it finds by itself, on import, is that of a CUDA toolkit."""
    nvdisasm = sass.nvdisasm()
    if nvdisasm is not None:
        importlib.import_module("jax.experimental.mosaic.gpu")
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(nvdisasm.parent.parent)


def cases_of(
    targets: Sequence[str],
    settings: Sequence[tuple[str, Setting]],
    layers: Sequence[str],
    pass_names: Sequence[str],
) -> list[Case]:
    """All cases, those of a target together. Inside a block its passes without a norm come first."""
    return [
        Case(target, workload, setting, layer, pass_name)
        for target in targets
        for workload, setting in settings
        for pass_name in pass_names
        for layer in (*((NO_NORM.name,) if setting.block is not None else ()), *layers)
    ]


if __name__ == "__main__":
    serve()
