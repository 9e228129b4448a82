"""The pictures of the command line, drawn with matplotlib."""

from collections.abc import Sequence

import numpy as np

from bn_fused.bench.run.records import Row, Run
from bn_fused.bench.run.report import called
from bn_fused.bench.stability import Curves

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def series(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The (layer, approach) of the rows, in their order."""
    return list(dict.fromkeys((row.layer, row.approach) for row in rows))


def plot_run(run: Run, path: str) -> None:
    """A PNG of how close every layer comes to the copy's bandwidth, a panel for each pass.

    Where a bar is missing it says why; a line over a bar's end is the spread, from the 10th to the 90th percentile.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(row.pass_name for row in run.rows))
    cases = list(dict.fromkeys(str(row.at) for row in run.rows))
    drawn = series(run.rows)
    several = len({approach for _, approach in drawn}) > 1
    bar = 0.8 / max(1, len(drawn))
    height = 1.2 + 0.2 * len(cases) * (len(drawn) + 1)
    figure = Figure(figsize=(2.5 + 3.6 * max(1, len(passes)), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(passes)), sharey=True, squeeze=False)[0]
    for panel, pass_name in zip(panels, passes, strict=False):
        rows = {(str(row.at), row.layer, row.approach): row for row in run.rows if row.pass_name == pass_name}
        for index, (layer, approach) in enumerate(drawn):
            colour = COLOURS[index % len(COLOURS)]
            name = f"{called(layer)} {approach}" if several else called(layer)
            found = [rows.get((case, layer, approach)) for case in cases]
            shares = [100 * (getattr(row, "of_copy", None) or 0) for row in found]
            places = [place - 0.4 + bar * (index + 0.5) for place in range(len(cases))]
            panel.barh(places, shares, bar, label=name, color=colour)
            for row, place, share in zip(found, places, shares, strict=True):
                if not share:
                    panel.text(1, place, getattr(row, "status", "not run"), va="center", fontsize=6, color="grey")
                    continue
                # A share is larger where a time is smaller.
                ends = [share * row.median / row.p90, share * row.median / row.p10]
                panel.plot(ends, [place, place], color="black", linewidth=0.8)
                panel.text(max(ends) + 1, place, f"{share:.0f}", va="center", fontsize=6)
        panel.axvline(100, color="grey", linewidth=0.8, linestyle="--")
        panel.annotate("the copy", (100, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=6,
                       color="grey")  # fmt: skip
        panel.set_xlabel(f"{pass_name}, % of the copy's bandwidth", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(cases)), cases, fontsize=8)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", frameon=False, fontsize=8, ncols=4)
    figure.text(0.99, 0.01, f"{run.environment.device}, jax {run.environment.versions.get('jax')}, {run.date[:10]}",
                ha="right", fontsize=6, color="grey")  # fmt: skip
    figure.savefig(path, metadata={"Title": run.command})


# Of the same colours, cold ones for what trains, warm ones for what does not; and a line style for whose layer it is.
STABILITY_STYLES = {
    "batch": ("#0072B2", "-"),
    "ema": ("#009E73", "-"),
    "ema_compatibility": ("#D55E00", "-"),
    "equinox batch": ("#56B4E9", "--"),
    "equinox ema": ("#E69F00", "--"),
}
# Points of a curve at most: its late steps are taken together, on a logarithmic axis at equal distances.
POINTS = 48


def together(steps: int) -> list[slice]:
    """Which steps make a point of a curve: one each at first, then more and more."""
    edges = np.unique(np.round(np.geomspace(1, steps + 1, POINTS + 1)).astype(int)) - 1
    return [slice(int(start), int(stop)) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def curve(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of values [seeds, steps] the points of a picture: step (from 1), median, smallest, largest.

    Over the seeds and over the steps that are taken together; without the values that are no finite numbers.
    """
    points = []
    for part in together(values.shape[1]):
        finite = values[:, part][np.isfinite(values[:, part])]
        figures = (np.median(finite), finite.min(), finite.max()) if finite.size else (np.nan,) * 3
        points.append(((part.start + 1 + part.stop) / 2, *figures))
    return tuple(np.array(points).T)


def stability_figure(curves: Sequence[Curves], caption: str):
    """The losses and the gradients' norms of `stability`, side by side, as a matplotlib Figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    figure = Figure(figsize=(9, 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, kind, title in zip(panels, ("losses", "gradients"), ("training loss", "gradient norm"), strict=True):
        highest, medians = [], []
        for one in curves:
            colour, style = STABILITY_STYLES[one.norm]
            step, median, smallest, largest = curve(getattr(one, kind))
            medians.append(median)
            if np.isfinite(largest).any():
                place = int(np.nanargmax(largest))
                highest.append((largest[place], step[place], colour))
            panel.fill_between(step, smallest, largest, color=colour, alpha=0.18, linewidth=0)
            label = one.norm if one.norm.startswith("equinox") else f"bn_fused {one.norm}"
            panel.plot(step, median, style, color=colour, linewidth=1.8, label=label)
        panel.set(xscale="log", yscale="log", xlabel="step", title=title)
        _cut_spikes(panel, medians, highest)
        panel.set_xlim(1, max(one.losses.shape[1] for one in curves))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.grid(True, alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=8.5, columnspacing=1.4)
    figure.supxlabel(caption, fontsize=7.5, color="#444444", linespacing=1.5)
    return figure


# A spike of one seed may be a million times what is to be seen: the axis ends at so many times the largest median.
ABOVE_MEDIANS = 30


def _cut_spikes(panel, medians, highest):
    """End a panel's axis above the medians, and write at its edge how far what is cut off goes.

    `highest`: of each curve the value, the step and the colour.
    """
    medians = np.concatenate(medians) if medians else np.array([])
    medians = medians[np.isfinite(medians)]
    top = ABOVE_MEDIANS * medians.max() if medians.size else np.inf
    cut = [one for one in highest if one[0] > top]
    if not cut:
        return
    panel.set_ylim(top=top)
    for value, step, colour in cut:
        panel.annotate(f"to {value:.0e}", (step, top), ha="center", va="top", fontsize=7, color=colour)


def plot_stability(curves: Sequence[Curves], caption: str, path, command: str) -> None:
    """Save the picture of `stability_figure` as a PNG that holds the command line that made it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = stability_figure(curves, caption)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Title": command})
