"""Figures of variance curves, drawn without pyplot so that no global state of matplotlib is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flipout.errors import ArgumentError
from flipout.variance.estimators import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flipout.moments import Estimate
    from flipout.variance.curve import VarianceCurve

__all__ = ["STYLES", "draw_curve", "errorbar"]

#: Okabe and Ito's palette, safe for colour-blind readers; markers and lines differ as well, for print.
STYLES: dict[str, dict[str, Any]] = {
    "shared": {"color": "#D55E00", "marker": "s", "linestyle": (0, (4, 2))},
    "flipout": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "independent": {"color": "#009E73", "marker": "D", "linestyle": (0, (1, 1.5))},
    "local_reparameterization": {"color": "#CC79A7", "marker": "^", "linestyle": "-."},
    "low_rank": {"color": "#E69F00", "marker": "v", "linestyle": (0, (3, 1, 1, 1))},
}
_OTHER = {"color": "#555555", "marker": "x", "linestyle": "-"}


def draw_curve(curve: VarianceCurve, names: Sequence[str] | None = None, axes: Axes | None = None) -> Axes:
    """The variance against N under each estimator, with intervals, on log-log axes.

    Raises:
        ArgumentError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ArgumentError("plot() needs matplotlib, which is not installed: pip install 'flipout[experiments]'") from error
    if axes is None:
        axes = Figure(figsize=(5.5, 4.2), layout="constrained").subplots()
    for name in curve.points:
        errorbar(axes, name, curve.batch_sizes(name), curve.values(name, names))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("batch size N")
    axes.set_ylabel("variance of the gradient")
    axes.legend(frameon=False)
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
