"""What an audit is about and what it found: cases, rows, the fewest passes there can be, and their form as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bn_fused.bench import saved
from bn_fused.bench.audit.blocks import Setting, layer_named
from bn_fused.bench.audit.sass import Kernel, kernel_from_json

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
    - `reason`: why it was not compiled, or what is not known of what was, in one line.
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
    - `lowering_seconds`, `compiling_seconds`: how long tracing and lowering took, and compiling.
    - `sass`: the program's Pallas kernels for GPUs, disassembled; none if they could not be, None if it has none.
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
    lowering_seconds: float | None = None
    compiling_seconds: float | None = None
    sass: tuple[Kernel, ...] | None = None

    @property
    def total(self) -> "Passes | None":
        """All passes, around and inside of kernels, with padding; None where they are not known."""
        if self.reads is None or self.padded_inside_reads is None:
            return None
        return Passes(self.padded_reads + self.padded_inside_reads, self.padded_writes + self.padded_inside_writes)


class Passes(tuple):
    """Reads and writes, as (reads, writes); prints as 2R+1W."""

    def __new__(cls, reads: float, writes: float):
        """From two numbers, where `tuple` takes one iterable."""
        return super().__new__(cls, (reads, writes))

    def __str__(self) -> str:
        reads, writes = (f"{value:.3g}" for value in self)
        return f"{reads}R{'' if writes.startswith('-') else '+'}{writes}W"


def ideal(setting: Setting, pass_name: str) -> dict[str, Passes]:
    """The fewest passes of the norm itself: "streaming" from memory, and "resident" where x stays on the chip.

    Streaming reads x for the statistics and again to normalise; its backward reads x and dy for the sums and again
    for dx. Resident reads everything once. A residual is read by the forward; with an activation its value or y decides
    the derivative: the backward reads that for the sums, and writes the residual's gradient (without one that is dy
    itself), which it reads in dy's place for dx.
    """
    residual = 1 if setting.residual else 0
    through_activation = residual if setting.compiled.activation is not None else 0
    passes = {
        "fwd": {"streaming": (2 + residual, 1), "resident": (1 + residual, 1)},
        "bwd": {
            "streaming": (4 + through_activation, 1 + through_activation),
            "resident": (2 + through_activation, 1 + through_activation),
        },
    }
    passes["fwd+bwd"] = {
        kind: tuple(map(sum, zip(passes["fwd"][kind], passes["bwd"][kind], strict=True))) for kind in passes["fwd"]
    }
    return {kind: Passes(*figures) for kind, figures in passes[pass_name].items()}


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
    if rest.get("sass") is not None:
        rest["sass"] = tuple(map(kernel_from_json, rest["sass"]))
    return row_of(case_from_json({**case, "setting": setting}), rest)


def row_of(case: Case, fields: Mapping[str, Any]) -> Row:
    """The row of a case with these fields, in which lists may stand for tuples."""
    lists = {name: tuple(fields[name]) for name in ("copies", "details") if name in fields}
    return Row(case, **{**fields, **lists})


def to_json(rows: Sequence[Row], *, command: str, versions: Mapping[str, str], interrupted: bool) -> str:
    """The audit as it is saved; `load` reads it."""
    added = {"versions": versions}
    return saved.envelope(saved.AUDIT, added, map(row_to_json, rows), command=command, interrupted=interrupted)


def load(text: str) -> tuple[Row, ...]:
    """The rows of a saved audit; ValueError, in one line, if it is none or another version's."""
    return tuple(row_from_json(values) for values in load_document(text)["rows"])


def load_document(text: str) -> dict[str, Any]:
    """A saved audit as plain values; ValueError as of `load`."""
    kind, version, content = saved.read(text)
    if kind != saved.AUDIT:
        version = None
    if version != saved.SCHEMA:
        raise ValueError(f"audit_schema_version is {version!r}; this bn-bench reads version {saved.SCHEMA}")
    return content
