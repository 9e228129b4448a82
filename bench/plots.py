"""The pictures of the command line, drawn with matplotlib."""

import pathlib
from collections.abc import Sequence

import numpy as np

from bn_fused.bench.pictures import Layers, Step, newest
from bn_fused.bench.run.records import Row, Run
from bn_fused.bench.run.report import called
from bn_fused.bench.stability import Curves
from bn_fused.bench.step.networks import NO_NORM

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def series(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The (layer, approach) of the rows, in their order."""
    return list(dict.fromkeys((row.layer, row.approach) for row in rows))


def plot_run(run: Run, path: str, source: str = "") -> None:
    """A PNG of the time of every layer over that of a copy of as many bytes, a panel for each pass.

    The copy moves the passes over x that none can save: at 1 nothing is left to gain. Times are on a logarithmic axis.
    Where a bar is missing it says why; a line over a bar's end is the spread, from the 10th to the 90th percentile. The
    PNG holds the run's command and `source`, where that is recorded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(row.pass_name for row in run.rows))
    cases, common = apart([str(row.at) for row in run.rows])
    drawn = series(run.rows)
    measure = "device time" if any(row.timed_by == "device" for row in run.rows) else "time"
    several = len({approach for _, approach in drawn}) > 1
    bar = 0.8 / max(1, len(drawn))
    height = 1.5 + 0.17 * len(cases) * (len(drawn) + 1)
    figure = Figure(figsize=(2 + 4 * max(1, len(passes)), height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(passes)), sharex=True, sharey=True, squeeze=False)[0]
    all_times = [1.0, *(1 / row.of_copy for row in run.rows if row.of_copy)]
    right = 1.4 * max(all_times)
    for panel, pass_name in zip(panels, passes, strict=False):
        panel.set(xscale="log", xlim=(min(all_times), right))
        rows = {(str(row.at), row.layer, row.approach): row for row in run.rows if row.pass_name == pass_name}
        for index, (layer, approach) in enumerate(drawn):
            name = f"{called(layer)} {approach}" if several else called(layer)
            found = [rows.get((case, layer, approach)) for case in cases]
            times = [1 / of_copy if (of_copy := getattr(row, "of_copy", None)) else 1 for row in found]
            places = [place - 0.4 + bar * (index + 0.5) for place in range(len(cases))]
            panel.barh(places, [time - 1 for time in times], bar, 1, label=name, color=COLOURS[index % len(COLOURS)])
            for row, place, time in zip(found, places, times, strict=True):
                if row is None or row.of_copy is None:
                    status = getattr(row, "status", "not run")
                    panel.text(1.02, place, status, va="center", fontsize=7, color="#555555")
                    continue
                ends = [time * row.p10 / row.median, time * row.p90 / row.median]
                panel.plot(ends, [place, place], color="black", linewidth=0.8)
                beside = min(1.03 * max(1, *ends), right)  # a wide spread is cut off
                panel.text(beside, place, f"{time:.{1 if time >= 10 else 2}f}", va="center", fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlabel(f"{pass_name}: {measure} over that of a copy of as many bytes, logarithmic", fontsize=8.5)
        _plain_ticks(panel)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(cases)), cases.values(), fontsize=8)
    panels[0].invert_yaxis()
    where = _made_on(run.environment.device, run.environment.versions.get("jax"), run.date)
    figure.suptitle(f"BatchNorm alone, {common}\n{where}", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8.5, ncols=4)
    figure.savefig(path, metadata={"Title": run.command, "Source": source})


# The name of a workload that is given by its shape.
UNNAMED = "shape"


def apart(cases: Sequence[str]) -> tuple[dict[str, str], str]:
    """What tells workloads apart, by workload in their order, with the shape; and the words that all have."""
    words = {case: [word for word in case.split() if word != UNNAMED] for case in cases}
    common = set.intersection(*map(set, words.values())) if words else set()
    common = [word for word in next(iter(words.values()), []) if word in common and not word.startswith("(")]
    own = {case: " ".join(word for word in each if word not in common) for case, each in words.items()}
    return own, " ".join(common)


def _made_on(device: str, jax: str | None, date: str) -> str:
    return f"{device}, jax {jax}, {date[:10]}"


def _plain_ticks(panel) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    panel.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100]))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())


# What a step's time goes into, in the order of `Parts`, with the colour of each and that of the figures upon it.
STEP_PARTS = {
    "convolutions and matrix products": ("#B8B8B8", "black"),
    "the rest": ("#E69F00", "black"),
    "BatchNorm with relu and residual": ("#0072B2", "white"),
}


def _recorded_at(step: Step) -> str:
    if step.without_norm == step.steps:
        return ""
    return f" (recorded {step.without_norm.date[:16].replace('T', ' ')} UTC)"


def plot_step(step: Step, path: str) -> None:
    """A PNG of what the kernels of a training step take with each BatchNorm, a bar of three parts for each network."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{called(name)} (relu and residual alone)" if name == NO_NORM else called(name) for name in step.parts]
    figure = Figure(figsize=(10, 1.9 + 0.42 * len(names)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    begin = np.zeros(len(names))
    for number, (label, (colour, ink)) in enumerate(STEP_PARTS.items()):
        values = np.array([1e3 * one[number] for one in step.parts.values()])
        bars = panel.barh(names, values, 0.72, begin, label=label, color=colour, edgecolor="white", linewidth=0.8)
        panel.bar_label(bars, fmt="%.2f", label_type="center", color=ink, fontsize=8)
        begin = begin + values
    for place, total in enumerate(begin):
        panel.text(total + 0.15, place, f"{total:.2f}", va="center", fontsize=9, fontweight="bold")
    panel.set_xlim(0, 1.07 * begin.max())
    panel.invert_yaxis()
    panel.tick_params(labelsize=8.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel(
        "device time of a step's kernels, ms. The rest (pooling, loss, optimiser, copies): in every network what that\n"
        f"without BatchNorm{_recorded_at(step)} takes beside convolutions, relu and residual. "
        "BatchNorm: what is left.",
        fontsize=8,
    )
    where = _made_on(step.steps.device, step.steps.jax, step.steps.date)
    panel.set_title(f"A training step of {step.steps.setting}\n{where}", fontsize=10)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8.5, ncols=3)
    figure.savefig(path, metadata={"Source": step.source})


def plot_recorded(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draw the newest of what is recorded in `folder` into the folder `out`; their paths. Errors as of `newest`."""
    paths = []
    for name, one in newest(folder).items():
        out.mkdir(parents=True, exist_ok=True)
        paths.append(out / name)
        if isinstance(one, Layers):
            plot_run(one.run, str(paths[-1]), one.source)
        else:
            plot_step(one, str(paths[-1]))
    return paths


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
