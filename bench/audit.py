"""What a layer moves through a chip's memory, without the chip: compile each case for it and count.

`audit(cases)` gives a `Row` for every case. The cases of a target are compiled in a process of its own (this module
run as `python -m bn_fused.bench.audit`): XLA keeps one GPU's description for a process, and a compiler that aborts
takes its process along.

Counted in the compiled program (`traffic`) are the passes over arrays of x's size that are made around our kernels.
What a kernel does inside, HLO does not say: its plan does. A plan may have a method

    passes(operation) -> (reads, writes)

or a mapping `passes` of that form, which gives the passes over arrays of x's size (x, dy, the residual, y, dx) that the
kernels of an operation of `kernels.contract` make. Without it they are not known, and the row says so. Operands that
XLA has brought onto the chip beforehand (a TPU's VMEM), and results that it keeps there, are no passes through memory:
of what the plan says, the share counts that lies in memory.
"""

import dataclasses
import glob
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from bn_fused.kernels.chips import CHIPS

from . import deviceless
from .blocks import Setting, layer_named, make_program
from .child import Child, ChildEnded, answer_requests
from .providers import NO_NORM
from .traffic import ON_CHIP, Module, Traffic, parse, passes

# The operations of `kernels.contract` that a pass runs.
OPERATIONS = {"fwd": ("forward",), "bwd": ("backward",), "fwd+bwd": ("forward", "backward")}
# Custom calls that are kernels of ours: Pallas for GPUs and for TPUs, Triton.
KERNEL_TARGETS = ("mosaic_gpu", "tpu_custom_call", "triton_kernel_call")

Status = Literal["compiled", "refused", "missing", "failed"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile: `layer` ("no norm", a rival's name or a backend) in a pass, for a target.

    `workload` is the name of the shape.
    """

    target: str
    workload: str
    setting: Setting
    layer: str
    pass_name: str

    @property
    def group(self) -> tuple:
        """What the cases of one table have in common."""
        return self.target, self.workload, self.setting

    @property
    def ours(self) -> bool:
        """Whether a backend of bn_fused is compiled."""
        return layer_named(self.layer).ours


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found for a case. Passes are over x, sizes in bytes; None stands for what is not known.

    - `status`: "compiled"; "refused": the backend cannot run there; "missing": something is not installed; "failed".
    - `reason`: why it was not compiled, in one line.
    - `auto`: whether `backend="auto"` takes this backend here.
    - `reads`, `writes`: passes around the kernels.
    - `padded_reads`, `padded_writes`: the same with the padding of tiled layouts, in passes over an unpadded x.
    - `kernels`: how many of the launches are our kernels; `inside_reads`, `inside_writes`: passes that they make, by
      their plan; `padded_inside_reads`, `padded_inside_writes`: the same with padding; `operand_reads`,
      `operand_writes`: the passes if they touched each of their operands once, the least there is.
    - `launches`: kernels, copies and calls that run, small ones included.
    - `copies`: names of those that do nothing but copy or transpose an array of x's size.
    - `temporary_bytes`: the most memory that is used beside arguments and results.
    - `kept_bytes`: kept from the forward for the backward, as JAX's derivative has it; see `blocks.Program`.
    - `on_chip_bytes`, `registers`, `spill_bytes`: of the kernels, where the compiler tells; the largest of them. Spills
      are those of the code as it stands, not times the rounds of loops.
    - `bundles`: instructions of a TPU's kernels, which run several operations each; the most of any kernel.
    - `plan`: the plan in words.
    - `details`: a line for every access to arrays of x's size.
    - `seconds`: for compiling.
    """

    case: Case
    status: Status
    reason: str = ""
    auto: bool = False
    reads: float | None = None
    writes: float | None = None
    padded_reads: float | None = None
    padded_writes: float | None = None
    kernels: int = 0
    inside_reads: float | None = None
    inside_writes: float | None = None
    padded_inside_reads: float | None = None
    padded_inside_writes: float | None = None
    operand_reads: float = 0.0
    operand_writes: float = 0.0
    launches: int | None = None
    copies: tuple[str, ...] = ()
    temporary_bytes: int | None = None
    kept_bytes: int | None = None
    on_chip_bytes: int | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    bundles: int | None = None
    plan: str = ""
    details: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def total(self) -> "Passes | None":
        """All passes, around and inside of kernels, with padding; None where they are not known."""
        if self.reads is None or self.padded_inside_reads is None:
            return None
        return Passes(self.padded_reads + self.padded_inside_reads, self.padded_writes + self.padded_inside_writes)


class Passes(tuple):
    """Reads and writes, as (reads, writes); prints as 2R+1W."""

    def __new__(cls, reads: float, writes: float):
        return super().__new__(cls, (reads, writes))

    def __str__(self) -> str:
        return f"{self[0]:.3g}R+{self[1]:.3g}W"


def ideal(setting: Setting, pass_name: str) -> dict[str, Passes]:
    """The fewest passes of the norm itself: "streaming" from memory, and "resident" where x stays on the chip.

    Streaming reads x for the statistics and again to normalise; its backward reads x and dy for the sums and again
    for dx. Resident reads everything once. A residual is read by the forward; with an activation its value decides
    the derivative, so the backward reads it as often as x, and writes its gradient (without one that is dy itself).
    """
    residual = 1 if setting.residual else 0
    through_activation = residual if setting.activation is not None or setting.block is not None else 0
    made = {
        "fwd": {"streaming": (2 + residual, 1), "resident": (1 + residual, 1)},
        "bwd": {
            "streaming": (4 + 2 * through_activation, 1 + through_activation),
            "resident": (2 + through_activation, 1 + through_activation),
        },
    }
    made["fwd+bwd"] = {
        kind: tuple(map(sum, zip(made["fwd"][kind], made["bwd"][kind], strict=True))) for kind in made["fwd"]
    }
    return {kind: Passes(*figures) for kind, figures in made[pass_name].items()}


# ------------------------------------------------------------------------------------- counting one compiled program


def planned_passes(plan: Any, operations: Sequence[str]) -> dict[str, Passes] | None:
    """The passes inside the kernels of each of these operations by a plan; None if it does not tell."""
    told = getattr(plan, "passes", None)
    if told is None:
        return None
    ask = told if callable(told) else told.get
    found = {operation: ask(operation) for operation in operations}
    return None if None in found.values() else {name: Passes(*figures) for name, figures in found.items()}


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
                for kind, (told, found, whole) in zip(("reads", "writes"), figures, strict=True):
                    fields[f"{prefix}inside_{kind}"] += told * found / whole if whole else told
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
    found = {"registers": registers, "spill_bytes": spills, "on_chip_bytes": shared}
    return {name: max(values) for name, values in found.items() if values}


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
    found = {"bundles": bundles, "spill_bytes": spills}
    return {name: max(values) for name, values in found.items() if values}


def compile_case(case: Case, dump: pathlib.Path | None = None) -> Row:
    """Compile a case in this process; whatever goes wrong is the row's reason. `dump`: where compilers dump kernels."""
    import jax

    import bn_fused

    setting, start = case.setting, time.perf_counter()
    try:
        with jax.enable_x64(setting.dtype == "float64"):
            asked = _explain(case, "auto"), _explain(case, case.layer) if case.ours else None
            program = make_program(setting, case.layer, case.pass_name)
            compiled = deviceless.compile_for(case.target, program.function, *program.specs)
    except bn_fused.BackendError as error:
        return Row(case, "refused", _line(error))
    except (deviceless.DevicelessUnavailable, ModuleNotFoundError) as error:
        return Row(case, "missing", _line(error))
    except Exception as error:
        return Row(case, "failed", f"{type(error).__name__}: {_line(error)}")
    auto, choice = asked
    plan = None if choice is None else choice.plan
    hlo_text = compiled.as_text()
    fields = count(hlo_text, setting.elements, setting.nbytes, planned_passes(plan, OPERATIONS[case.pass_name]))
    memory = compiled.memory_analysis()
    if memory is not None:
        fields["temporary_bytes"] = memory.temp_size_in_bytes
    if dump is not None:
        fields |= gpu_resources(dump) | tpu_resources(dump, kernel_calls(parse(hlo_text)))
    return _row(
        case,
        {
            "status": "compiled",
            "auto": auto.name == case.layer,
            "kept_bytes": program.kept_bytes,
            "plan": _plan_text(plan, OPERATIONS[case.pass_name]),
            "seconds": time.perf_counter() - start,
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


def _explain(case, backend):
    import bn_fused

    setting = case.setting
    return bn_fused.explain(
        setting.array_shape,
        setting.dtype,
        channel_axis=setting.channel_axis,
        activation=setting.activation or ("relu" if setting.block else None),
        residual=setting.residual,
        target=case.target,
        backend=backend,
    )


def _line(error) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ------------------------------------------------------------------------------------- JSON, in and out


def case_to_json(case: Case) -> dict[str, Any]:
    """The case as plain values."""
    return dataclasses.asdict(case)


def case_from_json(values: Mapping[str, Any]) -> Case:
    """The case of `case_to_json`."""
    setting = dict(values["setting"])
    setting["shape"] = tuple(setting["shape"])
    return Case(**{**values, "setting": Setting(**setting)})


def row_to_json(row: Row) -> dict[str, Any]:
    """The row as plain values, with those of its case and the ideal beside them."""
    values = dataclasses.asdict(row)
    case = values.pop("case")
    setting = case.pop("setting")
    return {**case, **setting, **values, "ideal": ideal(row.case.setting, row.case.pass_name)}


def row_from_json(values: Mapping[str, Any]) -> Row:
    """The row of `row_to_json`."""
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Case, Setting, Row)}
    setting = {name: value for name, value in values.items() if name in names[Setting]}
    case = {name: value for name, value in values.items() if name in names[Case]}
    rest = {name: value for name, value in values.items() if name in names[Row]}
    return _row(case_from_json({**case, "setting": setting}), rest)


def _row(case, fields) -> Row:
    lists = {name: tuple(fields[name]) for name in ("copies", "details") if name in fields}
    return Row(case, **{**fields, **lists})


# ------------------------------------------------------------------------------------- all cases, in processes


def audit(
    cases: Sequence[Case],
    *,
    time_limit: float = 120.0,
    instructions: bool = False,
    before: Callable[[Case], None] = lambda case: None,
    command: Sequence[str] = (sys.executable, "-m", "bn_fused.bench.audit"),
) -> Iterator[Row]:
    """The rows of the cases, in order, each as soon as it is there.

    Every target has a process of its own. One that ends, or gives no row within `time_limit` seconds, makes its case
    "failed" and is replaced by a new one for the cases that are left. With `instructions`, TPU's kernels'
    instructions and spills are counted; their compiler then writes down all it does, which takes up to a minute and a
    gigabyte a program. `before` is called when a case's turn comes; `command` is the process's program. Closing the
    iterator ends the process with all it started.
    """
    child, target = None, None
    with tempfile.TemporaryDirectory(prefix="bn_fused_audit_") as dump:
        try:
            for case in cases:
                before(case)
                sentence = deviceless.missing(case.target) or layer_named(case.layer).missing
                if sentence is not None:
                    yield Row(case, "missing", sentence)
                    continue
                if child is None or target != case.target:
                    if child is not None:
                        child.close()
                    child, target = Child(command, _environment(case.target, dump, instructions)), case.target
                try:
                    row = row_from_json(child.ask(case_to_json(case), time_limit))
                except ChildEnded as ended:
                    child.close()
                    child, row = None, Row(case, "failed", str(ended))
                yield row
        finally:
            if child is not None:
                child.close()


# Where a compiling process finds its folder for dumps.
_DUMP = "BN_FUSED_AUDIT_DUMP"


def _environment(target: str, dump: str, instructions: bool) -> dict[str, str]:
    """What a compiling process finds in its environment."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # The TPU's compiler may be loaded by several processes at once: it does not touch a TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        _DUMP: dump,
    }
    if CHIPS[target].platform == deviceless.CUDA:
        environment |= {"MOSAIC_GPU_DUMP_TO": dump, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    elif instructions:
        flags = (os.environ.get("LIBTPU_INIT_ARGS", ""), f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true")
        environment["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()
    return environment


def serve() -> None:
    """Compile the cases that come on standard input; the other end of `audit`."""
    dump = pathlib.Path(os.environ[_DUMP])

    def answer(request):
        for path in dump.iterdir():
            path.unlink()
        return row_to_json(compile_case(case_from_json(request), dump))

    answer_requests(answer)


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


def to_json(rows: Sequence[Row], *, command: str, versions: Mapping[str, str], interrupted: bool) -> str:
    """The audit as it is saved; `load` reads it."""
    content = {
        "audit_schema_version": SCHEMA,
        "command": command,
        "versions": dict(versions),
        "interrupted": interrupted,
        "rows": [row_to_json(row) for row in rows],
    }
    return json.dumps(content, indent=1) + "\n"


def load(text: str) -> tuple[Row, ...]:
    """The rows of a saved audit; ValueError, in one line, if it is none or another version's."""
    return tuple(row_from_json(values) for values in load_document(text)["rows"])


def load_document(text: str) -> dict[str, Any]:
    """A saved audit as plain values; ValueError as of `load`."""
    try:
        content = json.loads(text)
        version = content.get("audit_schema_version") if isinstance(content, dict) else None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if version != SCHEMA:
        raise ValueError(f"audit_schema_version is {version!r}; this bn-bench reads version {SCHEMA}")
    return content


SCHEMA = 1


if __name__ == "__main__":
    serve()
