"""The pictures of the command line, drawn with matplotlib."""

from collections.abc import Sequence

from .records import Row, Run

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def series(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The (layer, approach) of the rows that were timed, in their order."""
    return list(dict.fromkeys((row.layer, row.approach) for row in rows if row.of_copy is not None))


def plot_run(run: Run, path: str) -> None:
    """A PNG of how close every layer comes to the copy's bandwidth, a panel for each pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(row.pass_name for row in run.rows))
    cases = list(dict.fromkeys(str(row.at) for row in run.rows))
    drawn = series(run.rows)
    several = len({approach for _, approach in drawn}) > 1
    width = max(6.0, 1.5 + len(cases) * max(1, len(drawn)) * 0.35)
    figure = Figure(figsize=(width, 1 + 2.6 * max(1, len(passes))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(passes)), 1, sharex=True, squeeze=False)[:, 0]
    for panel, pass_name in zip(axes, passes, strict=False):
        for index, (layer, approach) in enumerate(drawn):
            found = {
                str(row.at): row.of_copy
                for row in run.rows
                if (row.layer, row.approach, row.pass_name) == (layer, approach, pass_name)
            }
            bar = 0.8 / len(drawn)
            panel.bar(
                [place - 0.4 + bar * (index + 0.5) for place in range(len(cases))],
                [100 * (found.get(case) or 0) for case in cases],
                bar,
                label=f"{layer} {approach}" if several else layer,
                color=COLOURS[index % len(COLOURS)],
            )
        panel.axhline(100, color="grey", linewidth=0.8, linestyle="--")
        panel.set_ylabel(f"{pass_name}\n% of copy bandwidth")
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.text(0.99, 0.01, f"{run.environment.device}, jax {run.environment.versions.get('jax')}, {run.date[:10]}",
                ha="right", fontsize=6, color="grey")  # fmt: skip
    figure.savefig(path, metadata={"Title": run.command})
