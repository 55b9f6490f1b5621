"""Figures of predictions, drawn without pyplot so that no global state of matplotlib is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.bayes.metrics import calibration_error, labelled
from flipout.bayes.prediction import Classification, Regression
from flipout.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_band", "plot_reliability"]


def plot_reliability(
    prediction: Classification | Tensor, labels: Tensor, bins: int = 15, axes: Axes | None = None, label: str | None = None
) -> Axes:
    """Accuracy against confidence, bin by bin: an honest prediction lies on the diagonal, an overconfident one below it.

    Args:
        prediction, labels: as for :func:`flipout.bayes.calibration_error`, which the legend shows.
        bins: of equal width.
        axes: to draw on; None makes a figure.
        label: for the legend.

    Raises:
        ArgumentError: as the metrics do, or if matplotlib is not installed.

    Example:
        >>> axes = plot_reliability(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        >>> axes.get_xlabel()
        'confidence'
    """
    require_count("bins", bins, 1)
    mean, labels = labelled(prediction, labels)
    axes = _axes(axes)
    confidence, chosen = mean.max(1)
    right = (chosen == labels).double()
    place = (confidence * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins).double()
    used = counts > 0
    sure = torch.bincount(place, confidence.double(), bins)[used] / counts[used]
    correct = torch.bincount(place, right, bins)[used] / counts[used]
    told = f"{label}: " if label else ""
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=0)
    told += f"ECE {calibration_error(mean, labels, bins):.3f}"
    axes.plot(sure.tolist(), correct.tolist(), marker="o", markersize=4, label=told)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    return axes


def plot_band(x: Tensor, prediction: Regression, axes: Axes | None = None, deviations: float = 2.0, functions: int = 0) -> Axes:
    """The mean of a regression over one input, a band around it, and some members' own functions.

    Args:
        x: ``[N]`` or ``[N, 1]``.
        prediction: of ``[N]`` or ``[N, 1]`` outputs.
        axes: to draw on; None makes a figure.
        deviations: half the width of the band, in standard deviations.
        functions: members to draw.

    Raises:
        ArgumentError: if the prediction is no regression of one number, has no samples to draw, or matplotlib is not installed.

    Example:
        >>> x = torch.linspace(0, 1, 5)
        >>> axes = plot_band(x, Regression.of(torch.stack([x, 2 * x])), functions=2)
        >>> len(axes.lines)
        3
    """
    if not isinstance(prediction, Regression) or prediction.mean.numel() != x.numel():
        raise ArgumentError("plot_band takes a Regression with one output for each of x; predict with task='regression'")
    if functions and (prediction.samples is None or functions > len(prediction.samples)):
        raise ArgumentError(f"functions={functions}: the prediction kept fewer samples; predict with more, and keep_samples=True")
    axes = _axes(axes)
    order = x.flatten().argsort()

    def along(values: Tensor) -> Any:
        return values.detach().flatten()[order].tolist()

    mean, half = prediction.mean, deviations * prediction.std
    axes.fill_between(along(x), along(mean - half), along(mean + half), alpha=0.25, linewidth=0, label=f"±{deviations:g} sd")
    if prediction.samples is not None:
        for member in prediction.samples[:functions]:
            axes.plot(along(x), along(member), color="0.5", linewidth=0.7)
    axes.plot(along(x), along(mean), linewidth=2, label="mean")
    axes.legend(frameon=False)
    return axes


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ArgumentError("a plot needs matplotlib, which is not installed: pip install 'flipout[experiments]'") from error
    made: Axes = Figure(figsize=(4.6, 4.0), layout="constrained").subplots()
    return made
