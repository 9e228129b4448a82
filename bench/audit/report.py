"""Tables of an audit: for the terminal and as Markdown."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.rows import Passes, Row, ideal
from bn_fused.bench.providers import NO_NORM
from bn_fused.bench.workloads import PASSES

NOTE = (
    "R and W are passes over x: its bytes read and written. around: what XLA's kernels and copies move; inside: what "
    "our Pallas or Triton kernels move, by their plan (opaque: it does not tell; at least what their operands are); "
    "in all: both, with the padding of tiled layouts (of fewer than 128 channels on a TPU); what XLA keeps on the "
    "chip between two kernels is no pass; over no norm: what the norm adds to its block, of what is in all. fwd is a "
    "training step, fwd+bwd a step and its gradient, whose dy comes after y; bwd alone reads what the forward keeps. "
    "launches: all kernels, small ones too, and of them ours. copies: kernels that only copy or transpose an array of "
    "x's size. temporary: the most memory beside arguments and results; kept: from the forward for the backward, as "
    "JAX's derivative has it (in one program XLA recomputes some of it); both in x's. ideal: the norm's own passes, "
    "resident where x stays on the chip between them, streaming where it comes from memory each time. on chip (a "
    "multiprocessor's shared memory, or VMEM), registers of a thread, spills: the most of any of our kernels; - where "
    "the compiler does not tell. seconds: to trace and lower a program + to compile it, in a process that has compiled "
    "what stands above it. instructions: those that a thread issues for an element of x in each loop over x, kernel "
    "after kernel, of our Pallas kernels for GPUs."
)
NOT_COMPILED = "not compiled"


def title(target: str, workload: str, setting: Setting) -> str:
    """What a table is about, in one line."""
    options = [setting.layout] if len(setting.shape) > 2 else []
    options += [setting.activation] if setting.activation else []
    options += ["residual"] if setting.residual else []
    block = f", in {setting.block}" if setting.block else ""
    shape = ",".join(map(str, setting.shape))
    return f"{target}: {' '.join((workload, f'({shape})', setting.dtype, *options))}{block}"


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the lines of the table of one target, workload and setting; the ideal stands above each pass."""
    texts = {
        "pass": lambda row: row.case.pass_name,
        "layer": lambda row: f"{row.case.layer} (auto)" if row.auto else row.case.layer,
        "around": lambda row: str(Passes(row.reads, row.writes)),
    }
    if any(row.kernels for row in rows):
        texts["inside"] = _inside
    if any(row.kernels or _is_padded(row) for row in rows):
        texts["in all"] = lambda row: "opaque" if row.total is None else str(row.total)
    base = {row.case.pass_name: row for row in rows if row.case.layer == NO_NORM.name and row.status == "compiled"}
    if base:
        texts[f"over {NO_NORM.name}"] = lambda row: _over(row, base.get(row.case.pass_name))
    texts |= {
        "launches": lambda row: f"{row.launches} ({row.kernels} ours)" if row.kernels else str(row.launches),
        "copies": lambda row: str(len(row.copies)),
        "temporary": lambda row: _in_x(row.temporary_bytes, row),
        "kept": lambda row: _in_x(row.kept_bytes, row),
    }
    if any(row.lowering_seconds is not None for row in rows):
        texts["seconds"] = _seconds
    told = {
        "on chip": ("on_chip_bytes", lambda value: f"{value / 1024:.0f} KiB"),
        "registers": ("registers", str),
        "spills": ("spill_bytes", lambda value: f"{value} B"),
        "bundles": ("bundles", str),
    }
    for heading, (field, text) in told.items():
        if any(getattr(row, field) is not None for row in rows):
            texts[heading] = lambda row, field=field, text=text: _or_dash(getattr(row, field), text)
    if any(row.sass is not None for row in rows):
        texts["instructions"] = _instructions
    lines = []
    for pass_name in PASSES:
        # What is not installed is named below the table.
        of_pass = [row for row in rows if row.case.pass_name == pass_name and row.status != "missing"]
        if not of_pass:
            continue
        # Inside a block the ideal is compared with what the norm adds to it.
        where = "in all" if "in all" in texts else "around"
        if of_pass[0].case.setting.block:
            where = f"over {NO_NORM.name}"
        for kind, figure in ideal(of_pass[0].case.setting, pass_name).items():
            cells = {"pass": pass_name, "layer": f"ideal, {kind}", where: str(figure)}
            lines.append([cells.get(heading, "") for heading in texts])
        for row in of_pass:
            cells = {"pass": pass_name, "layer": texts["layer"](row), "around": NOT_COMPILED}
            lines.append(
                [text(row) if row.status == "compiled" else cells.get(name, "") for name, text in texts.items()]
            )
    return list(texts), lines


def _inside(row: Row) -> str:
    if not row.kernels:
        return "-"
    if row.inside_reads is None:
        return f"opaque (>= {Passes(row.operand_reads, row.operand_writes)})"
    return str(Passes(row.inside_reads, row.inside_writes))


def _seconds(row: Row) -> str:
    if row.lowering_seconds is None:
        return "-"
    return f"{row.lowering_seconds:.1f}+{row.compiling_seconds:.1f} s"


def _instructions(row: Row) -> str:
    """The instructions for an element of x in each loop over x; kernels without one, which merge, are left out."""
    figures = [[loop.per_element for loop in kernel.over_x] for kernel in row.sass or ()]
    texts = ["/".join(f"{figure:.1f}" for figure in loops if figure is not None) for loops in figures]
    return ", ".join(filter(None, texts)) or "-"


def _over(row: Row, base: Row | None) -> str:
    """What a row's norm adds to the block, its kernels' passes included where they are known."""
    if base is None or row is base:
        return "-"
    if row.total is None:
        return "opaque"
    return str(Passes(*(here - there for here, there in zip(row.total, base.total, strict=True))))


def _is_padded(row: Row) -> bool:
    return row.status == "compiled" and row.padded_reads + row.padded_writes > 1.01 * (row.reads + row.writes)


def _in_x(nbytes: int | None, row: Row) -> str:
    return _or_dash(nbytes, lambda value: f"{value / row.case.setting.nbytes:.2f}")


def _or_dash(value, text) -> str:
    return "-" if value is None else text(value)


def table(rows: Sequence[Row]) -> Table:
    """The table of one target, workload and setting."""
    table = Table(title=escape(title(*rows[0].case.group)), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.collapse_padding = True
    headings, lines = columns(rows)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("pass", "layer") else "right", no_wrap=True)
    for line in lines:
        style = {"ideal": "dim", NOT_COMPILED: "yellow"}
        key = "ideal" if line[1].startswith("ideal, ") else line[2]
        table.add_row(*map(escape, line), style=style.get(key))
    return table


def notes(rows: Sequence[Row], *, details: bool = False) -> list[str]:
    """What the table does not say.

    Why a row was not compiled, or what is not known of it; if wanted, the kernels' plans and every access.
    """
    lines = []
    for reason, compiled in dict.fromkeys((row.reason, row.status == "compiled") for row in rows if row.reason):
        of_reason = [row for row in rows if row.reason == reason]
        names = ", ".join(dict.fromkeys(row.case.layer for row in of_reason))
        said = reason if compiled else f"{NOT_COMPILED}: {reason}"
        lines.append(said if len(of_reason) == len(rows) else f"{names}: {said}")
    plans = {row.case.layer: row.plan for row in rows if row.kernels and row.plan} if details else {}
    lines += [f"{layer}: {plan}" for layer, plan in plans.items()]
    for row in rows if details else ():
        lines += [f"{row.case.layer}, {row.case.pass_name}: {access}" for access in row.details]
    return lines


def markdown(rows: Sequence[Row], versions: str) -> str:
    """All tables as Markdown."""
    parts = []
    for group in dict.fromkeys(row.case.group for row in rows):
        of_group = [row for row in rows if row.case.group == group]
        headings, lines = columns(of_group)
        rule = ["---" if heading in ("pass", "layer") else "---:" for heading in headings]
        text = [f"### {title(*group)}", ""]
        text += ["| " + " | ".join(line) + " |" for line in (headings, rule, *lines)]
        text += ["", *(f"{note}  " for note in notes(of_group))]
        parts.append("\n".join(text).rstrip() + "\n")
    return "\n".join([*parts, f"{NOTE}\n", f"Compiled without the chip with {versions}.\n"])
