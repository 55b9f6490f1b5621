"""The figure of the demonstration."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from flipout.variance.curve_plot import STYLES, errorbar
from flipout_experiments.harness.plot_style import RC
from flipout_experiments.paper.demo_result import DemoResult

__all__ = ["draw_demo"]


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
    """Names instead of a legend, each with the slope of its curve."""
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
