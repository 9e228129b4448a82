"""Saved audits of several chips as one document: which layer moves the fewest bytes where."""

import json
from collections.abc import Mapping, Sequence

from bn_fused.bench.audit.blocks import Setting
from bn_fused.bench.audit.rows import Row
from bn_fused.bench.deviceless import TPU
from bn_fused.bench.installing import versions_text
from bn_fused.bench.providers import NO_NORM
from bn_fused.bench.workloads import PASSES
from bn_fused.kernels.chips import CHIPS

# Totals that differ by less than this share count as equal.
EQUAL = 0.02
ALONE = "alone"
HOW = (
    "What whole programs move through the chip's memory, in passes over x (reads and writes of x's bytes, with the "
    "padding of tiled layouts), counted in what the compiler made for the chip; what happens inside our kernels is "
    "added by their plan. What XLA keeps in on-chip memory (VMEM, CMEM) between two operations is no pass; what a "
    "cache may save is not taken off. No chip was there: these are bytes and not times.\n\n"
    "Each setting is a layer alone, or with relu between two convolutions 3x3 or two linear maps that keep the number "
    'of channels, whose own passes are in the figures (the line "no norm" has them alone). "fwd" is a training step, '
    '"fwd+bwd" the step and its gradient with respect to x and all parameters. The fewest passes of a setting on a '
    "chip are bold, and what is within 2 % of them. An empty cell was not compiled."
)

SELDOM = (
    "jnp sums a large x about its running mean, and a second time where a channel's mean is more than two standard "
    "deviations from that. What the second time moves is not in the figures."
)


class Unsuitable(ValueError):
    """The rows make no summary; the message is one line."""


def summary(title: str, rows: Sequence[Row], documents: Sequence[Mapping]) -> str:
    """The document in Markdown: a table for every pass, and who moves the fewest bytes.

    `rows` are of all documents; `documents` have the keys "command" and "versions".
    """
    rows = [row for row in rows if row.total is not None or row.case.layer != NO_NORM.name]
    targets = list(dict.fromkeys(row.case.target for row in rows))
    if not any(row.total is not None for row in rows):
        raise Unsuitable("there is no program in it whose passes are known")
    on_tpu = any(CHIPS[target].platform == TPU for target in targets)
    parts = [f"# {title}", HOW, *([SELDOM] if on_tpu else []), *_verdicts(rows)]
    for pass_name in PASSES:
        of_pass = [row for row in rows if row.case.pass_name == pass_name]
        if of_pass:
            parts.append("\n".join([f"## {pass_name}", "", *_table(of_pass, targets)]))
    reasons = dict.fromkeys((row.case.target, row.case.layer, row.reason) for row in rows if row.status != "compiled")
    if reasons:
        parts.append("\n".join(f"- not compiled: {target}, {layer}: {reason}" for target, layer, reason in reasons))
    parts.append(_origin(documents))
    return "\n\n".join(parts) + "\n"


def figure(row: Row) -> float | None:
    """All passes of a program, reads and writes; None where they are not known."""
    return None if row.total is None else sum(row.total)


def fewest(rows: Sequence[Row]) -> set[str]:
    """The layers with the fewest passes among the rows of one setting, pass and chip; ties are all in it."""
    known = {row.case.layer: figure(row) for row in rows if figure(row) is not None and row.case.layer != NO_NORM.name}
    if not known:
        return set()
    least = min(known.values())
    return {layer for layer, value in known.items() if value <= (1 + EQUAL) * least}


def _groups(rows):
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.workload, row.case.setting, row.case.target, row.case.pass_name), []).append(row)
    return groups


def _verdicts(rows):
    """A line for each block: how often each layer has the fewest passes."""
    lines = []
    groups = _groups(rows)
    for block in dict.fromkeys(row.case.setting.block for row in rows):
        of_block = {key: group for key, group in groups.items() if key[1].block == block and len(group) > 1}
        winners = [fewest(group) for group in of_block.values()]
        layers = dict.fromkeys(
            row.case.layer for group in of_block.values() for row in group if row.case.layer != NO_NORM.name
        )
        told = [
            f"{layer} in {sum(layer in names for names in winners)}"
            + (f" ({sum(names == {layer} for names in winners)} with no other)")
            for layer in layers
        ]
        name = ALONE if block is None else f"in {block}"
        lines.append(f"- {name}: of {len(winners)} programs the fewest passes are those of {', '.join(told)}")
    return ["\n".join(lines)]


def _name(setting: Setting) -> str:
    shape = ",".join(map(str, setting.shape))
    layout = [setting.layout] if len(setting.shape) > 2 else []
    options = [setting.activation] if setting.activation and setting.block is None else []
    options += ["residual"] if setting.residual else []
    return " ".join((setting.block or ALONE, f"({shape})", *layout, setting.dtype, *options))


def _table(rows, targets):
    lines = ["| | layer | " + " | ".join(targets) + " |", "|---|---|" + "---:|" * len(targets)]
    groups = _groups(rows)
    for workload, setting in dict.fromkeys((row.case.workload, row.case.setting) for row in rows):
        here = [row for row in rows if (row.case.workload, row.case.setting) == (workload, setting)]
        for index, layer in enumerate(dict.fromkeys(row.case.layer for row in here)):
            cells = [_name(setting) if index == 0 else "", layer]
            for target in targets:
                group = groups.get((workload, setting, target, here[0].case.pass_name), [])
                row = next((row for row in group if row.case.layer == layer), None)
                cells.append(_cell(row, layer in fewest(group)))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(row, least):
    if row is None:
        return ""
    value = figure(row)
    if value is None:
        return row.status if row.status != "compiled" else "opaque"
    return f"**{value:.3g}**" if least else f"{value:.3g}"


def _origin(documents):
    versions = dict.fromkeys(json.dumps(dict(document["versions"])) for document in documents)
    lines = [f"Compiled with {versions_text(json.loads(one))}." for one in versions]
    commands = dict.fromkeys(document["command"] for document in documents)
    return "\n".join([*lines, "", "```", *commands, "```"])
