"""Figures of variance curves, drawn without pyplot so that no global state of matplotlib is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flipout.errors import ArgumentError
from flipout.variance.named import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flipout.intervals import Estimate

__all__ = ["STYLES", "errorbar", "plot_curves", "plot_groups", "plot_predictions"]

#: Okabe and Ito's palette, safe for colour-blind readers; markers and lines differ as well, for print.
STYLES: dict[str, dict[str, Any]] = {
    "shared": {"color": "#D55E00", "marker": "s", "linestyle": (0, (4, 2))},
    "flipout": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "independent": {"color": "#009E73", "marker": "D", "linestyle": (0, (1, 1.5))},
    "local_reparameterization": {"color": "#CC79A7", "marker": "^", "linestyle": "-."},
    "low_rank": {"color": "#E69F00", "marker": "v", "linestyle": (0, (3, 1, 1, 1))},
}
_OTHER = {"color": "#555555", "marker": "x", "linestyle": "-"}


def plot_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[Estimate]]], axes: Axes | None = None) -> Axes:
    """The variance against N under each estimator, with intervals, on log-log axes.

    Args:
        curves: batch sizes and variances, by estimator.
        axes: to draw on; None makes a figure.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    axes = _log_axes(axes)
    for name, (sizes, values) in curves.items():
        errorbar(axes, name, sizes, values)
    axes.legend(frameon=False)
    return axes


def plot_predictions(predicted: Mapping[str, Sequence[Estimate]], batch_sizes: Sequence[int], axes: Axes | None = None) -> Axes:
    """What Theorem 2 predicts, a line with its band for each estimator.

    Args:
        predicted: a variance at each batch size, by estimator.
        batch_sizes: N.
        axes: to draw on; None makes a figure.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    axes = _log_axes(axes)
    for estimator, found in predicted.items():
        shown = [(n, float(e), max(e.low, float(e) / 20), e.high) for n, e in zip(batch_sizes, found, strict=True) if e > 0]
        style = STYLES[estimator]
        if shown:
            sizes, values, low, high = zip(*shown, strict=True)
            look = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.2}
            axes.plot(sizes, values, label=f"{estimator}, predicted", **look)
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.legend(frameon=False)
    return axes


def plot_groups(variances: Mapping[str, Mapping[str, Estimate]], axes: Axes | None = None) -> Axes:
    """The variance of each group of weights under each estimator, with intervals, on a log scale.

    Args:
        variances: by estimator, then by group.
        axes: to draw on; None makes a figure.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    axes = _log_axes(axes)
    groups = list(next(iter(variances.values())))
    for i, (name, each) in enumerate(variances.items()):
        errorbar(axes, name, [place + 0.08 * i for place in range(len(groups))], list(each.values()))
        axes.lines[-1].set_linestyle("none")
    axes.set_xscale("linear")
    axes.set_xlabel("")
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.legend(frameon=False)
    return axes


def _log_axes(axes: Axes | None) -> Axes:
    if axes is None:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ArgumentError("plot() needs matplotlib, which is not installed: pip install 'flipout[experiments]'") from error
        axes = Figure(figsize=(5.5, 4.2), layout="constrained").subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("batch size N")
    axes.set_ylabel("variance of the gradient")
    return axes


def errorbar(axes: Axes, name: str, sizes: Sequence[float], values: Sequence[Estimate], scale: float = 1.0) -> None:
    """A curve with its intervals in the estimator's own colour, marker and line; ``scale`` multiplies the variances."""
    style = STYLES.get(name, _OTHER)
    low = [scale * min(float(e) - max(e.low, float(e) / 20), float(e)) for e in values]
    high = [scale * (e.high - float(e)) if e.high < float("inf") else 0.0 for e in values]
    axes.errorbar(
        sizes, [scale * float(e) for e in values], yerr=[low, high], color=style["color"], marker=style["marker"],
        linestyle=style["linestyle"], label=label(name), markersize=5, markeredgecolor="white", markeredgewidth=0.7, linewidth=1.6,
        elinewidth=1.3, capsize=2.5,
    )  # fmt: skip
