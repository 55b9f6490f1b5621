"""Figures of the experiments, drawn without pyplot so that no global state of matplotlib is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from flipout.variance.curve_plot import STYLES, errorbar

if TYPE_CHECKING:
    from flipout.intervals import Estimate
    from flipout.variance import VarianceComponents, VarianceCurve
    from flipout_experiments.paper.demo import DemoResult

__all__ = ["RC", "draw_curves", "draw_demo", "draw_races", "draw_uncertainty"]

#: The look of all figures.
RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "flipout",
}


def draw_demo(result: DemoResult) -> Figure:
    """Variance against N on log-log axes, and the noisy training runs beside it."""
    with rc_context(RC):
        figure = Figure(figsize=(10.5, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
        _variance_panel(left, result)
        _training_panel(right, result)
        return figure


def _variance_panel(axes: Axes, result: DemoResult) -> None:
    sizes = np.array(result.settings.batch_sizes, dtype=float)
    ideal = [
        curve[i].total.value * size
        for i, size in enumerate(sizes)
        for curve in (result.curves["flipout"], result.curves["independent"])
    ]
    axes.plot(sizes, np.exp(np.mean(np.log(ideal))) / sizes, color="0.72", linewidth=5, solid_capstyle="round", zorder=0)
    offsets = {"shared": 0.96, "flipout": 1.0, "independent": 1.04}  # so that equal points are both seen
    for name, curve in result.curves.items():
        errorbar(axes, name, (offsets[name] * sizes).tolist(), [point.total for point in curve])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.grid(which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("batch size N")
    axes.set_ylabel("variance of the gradient, summed over weights")
    axes.set_title("Shared noise stops averaging out; flipout's does not")
    axes.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.5)
    _label_curves(axes, result)


def _label_curves(axes: Axes, result: DemoResult) -> None:
    """Names in place of a legend, each with the slope of its curve."""
    lines = ["slope on log-log axes"]
    for i, name in enumerate(("shared", "flipout", "independent")):
        slope = result.slope(name)
        half = (slope.high - slope.low) / 2
        error = f" ± {half:.2f}" if np.isfinite(half) else ""
        style = STYLES[name]
        y = 0.235 - 0.068 * i
        axes.plot(
            [0.04, 0.105], [y, y], transform=axes.transAxes, color=style["color"], linestyle=style["linestyle"], linewidth=1.8,
            clip_on=False,
        )  # fmt: skip
        axes.plot([0.0725], [y], transform=axes.transAxes, color=style["color"], marker=style["marker"], markersize=6)
        axes.text(0.125, y, name, transform=axes.transAxes, color=style["color"], va="center", fontweight="bold")
        axes.text(0.36, y, f"{slope.value:.2f}{error}".replace("-", "−"), transform=axes.transAxes, va="center", color="0.2")
    axes.text(0.36, 0.305, lines[0], transform=axes.transAxes, va="center", color="0.45", fontsize=8.5)
    axes.plot([0.04, 0.105], [0.033, 0.033], transform=axes.transAxes, color="0.72", linewidth=5, solid_capstyle="round")
    axes.text(0.125, 0.033, "1/N", transform=axes.transAxes, va="center", color="0.35", fontweight="bold")
    percent = round(100 * result.settings.confidence)
    axes.text(0.98, 0.98, f"{percent} % intervals", transform=axes.transAxes, ha="right", va="top", color="0.45", fontsize=8.5)


def _training_panel(axes: Axes, result: DemoResult) -> None:
    for name, run in result.training.items():
        style = STYLES[name]
        losses = np.array(run.losses)
        steps = np.arange(1, len(losses) + 1)
        window = min(5, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps, losses, color=style["color"], alpha=0.25, linewidth=1)
        label = f"{name}: mean {run.mean_loss:.2f}, sd {run.spread:.2f}"
        axes.plot(steps[window - 1 :], smooth, color=style["color"], linestyle=style["linestyle"], linewidth=2.2, label=label)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"step (N = {result.settings.training_batch})")
    axes.set_ylabel("training loss under noise (nats)")
    axes.set_ylim(bottom=0)
    axes.set_title("One noisy training run each")
    axes.legend(frameon=False, fontsize=9, loc="upper right", handlelength=2.4)
    axes.set_ylim(top=1.28 * axes.get_ylim()[1])  # room for the legend


def draw_curves(
    curve: VarianceCurve, panels: Mapping[str, tuple[str, ...]], net: str, components: VarianceComponents | None = None
) -> Figure:
    """One panel a layer: the variance averaged over its weights, as the paper has it, and what the components predict."""
    with rc_context(RC):
        columns = min(len(panels), 2) if len(panels) != 3 else 3
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
        for axes, (panel, names) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
            entries = sum(next(iter(curve.points.values()))[0].sizes[name] for name in names)
            for name in curve.points:
                sizes = curve.batch_sizes(name)
                errorbar(axes, name, sizes, curve.values(name, names), 1 / entries)
                if components is not None and name in ("shared", "flipout"):
                    grid = np.geomspace(sizes[0], sizes[-1], 40).round().astype(int).tolist()
                    predicted = [components.predict(name, n, names) / entries for n in grid]
                    positive = [(n, value) for n, value in zip(grid, predicted, strict=True) if value > 0]
                    axes.plot(*zip(*positive, strict=True), color="0.25", linewidth=1, zorder=3)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.set_xlabel("batch size N")
            axes.set_title(f"{net}: {panel}")
        figure.axes[0].set_ylabel("variance of the gradient, mean over weights")
        figure.axes[0].legend(frameon=False, fontsize=9)
        return figure


def draw_races(races: Sequence[Mapping[str, Any]], net: str, measure: str, targets: Sequence[float]) -> Figure:
    """For each noise the training loss against iterations and against seconds, and the test measure against iterations."""
    with rc_context(RC):
        figure = Figure(figsize=(12.6, 3.7 * len(races)), layout="constrained")
        grid = figure.subplots(len(races), 3, squeeze=False)
        for row, race in zip(grid, races, strict=True):
            for name, runs in race["runs"].items():
                style = STYLES[name]
                pace = float(np.exp(np.mean([np.log(run["seconds_a_step"]) for run in runs])))  # one clock for all seeds
                for i, run in enumerate(runs):
                    line: Any = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.4, "alpha": 0.8}
                    label = name.replace("_", " ") if i == 0 else None
                    steps, losses = np.array(run["curve"], dtype=float).reshape(-1, 2).T
                    row[0].plot(steps, losses, label=label, **line)
                    row[1].plot(steps * pace, losses, **line)
                    row[2].plot(*np.array(run["tests"], dtype=float).T, **line)
            for axes in row[:2]:
                for target in targets:
                    axes.axhline(target, color="0.85", linewidth=0.8, zorder=0)
                axes.set_ylabel("training NLL under noise (nats)")
            for axes in row:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.set_xlim(left=0)
                axes.grid(color="0.94", linewidth=0.8)
                axes.set_axisbelow(True)
            row[0].set_title(f"{net}, {race['noise']}: loss over iterations")
            row[1].set_title("loss over seconds")
            row[2].set_title(f"{measure} of the mean weights")
            row[0].set_xlabel("iterations")
            row[1].set_xlabel("seconds (iterations × the mean pace)")
            row[2].set_xlabel("iterations")
            row[2].set_ylabel(measure)
            row[0].legend(frameon=False, fontsize=9)
        return figure


#: Colours of the methods that are no estimators.
_METHODS = {"point": "0.35", "dropout": "#E69F00", "ensemble": "#009E73"}


def draw_uncertainty(
    methods: Mapping[str, Mapping[str, Estimate]], reliability: Mapping[str, Sequence[Sequence[Sequence[float]]]]
) -> Figure:
    """Accuracy against confidence, pooled over seeds; the calibration error and the AUROCs of each method with intervals."""
    with rc_context(RC):
        names = list(methods)[::-1]
        numbers = ["ece", *(name for name in next(iter(methods.values())) if name.startswith("auroc"))]
        figure = Figure(figsize=(4.6 + 2.3 * len(numbers), 4.2), layout="constrained")
        first, *rest = figure.subplots(1, 1 + len(numbers), width_ratios=[2, *[1] * len(numbers)])
        colours = {name: _METHODS.get(name) or STYLES[name]["color"] for name in methods}
        first.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
        for name, seeds in reliability.items():
            bins = _pooled(seeds)
            first.plot(*zip(*bins, strict=True), color=colours[name], marker="o", markersize=3.5, linewidth=1.3, label=_plain(name))
        first.set_xlabel("confidence")
        first.set_ylabel("accuracy")
        first.set_title("Reliability on test digits")
        first.legend(frameon=False, fontsize=9)
        for axes, number in zip(rest, numbers, strict=True):
            for row, name in enumerate(names):
                found = methods[name][number]
                known = np.isfinite(found.high)
                error = [[found - found.low], [found.high - found]] if known else None
                axes.errorbar([float(found)], [row], xerr=error, color=colours[name], marker="o", markersize=5, capsize=2.5)
            axes.set_yticks(range(len(names)), [_plain(name) if axes is rest[0] else "" for name in names])
            axes.grid(axis="x", color="0.92", linewidth=0.8)
            axes.set_title("ECE" if number == "ece" else number.replace("auroc", "AUROC:"))
            axes.xaxis.set_major_locator(MaxNLocator(4))
        return figure


def _pooled(seeds: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """Mean confidence and accuracy of each bin over all seeds; bins are told apart by their place in [0, 1]."""
    sums: dict[int, np.ndarray[Any, Any]] = {}
    for count, confidence, accuracy in (row for seed in seeds for row in seed):
        place = min(int(confidence * 15), 14)
        sums[place] = sums.get(place, np.zeros(3)) + count * np.array([1.0, confidence, accuracy])
    return [(float(total[1] / total[0]), float(total[2] / total[0])) for _, total in sorted(sums.items())]


def _plain(name: str) -> str:
    return {"local_reparameterization": "LRT", "dropout": "MC dropout"}.get(name, name)
