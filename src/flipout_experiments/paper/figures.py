"""Figures of the experiments, drawn without pyplot so that no global state of matplotlib is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flipout.variance.curve_plot import STYLES, errorbar
from flipout_experiments.harness.plot_style import RC

if TYPE_CHECKING:
    from flipout.intervals import Estimate
    from flipout.variance import VarianceComponents, VarianceCurve

__all__ = ["draw_curves", "draw_races", "draw_uncertainty"]


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
