"""The figure of a comparison of methods: validation against epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flipout_experiments.harness.plot_style import RC

__all__ = ["draw_histories"]

#: A method keeps its colour whatever others are shown beside it.
_COLORS = {
    "none": "#555555", "zaremba": "#8c6d31", "semeniuta": "#e69f00", "zoneout": "#009e73", "gal": "#cc79a7",
    "gaussian": "#d55e00", "wd": "#d55e00", "gaussian-flipout": "#0072b2", "wd-flipout": "#0072b2",
}  # fmt: skip


def draw_histories(histories: Mapping[str, Sequence[Sequence[float]]], unit: str) -> Figure:
    """Validation after each epoch, a line a seed.

    Args:
        histories: by method, the numbers of each seed.
        unit: of the numbers.
    """
    with rc_context(RC):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, seeds in histories.items():
            for i, values in enumerate(seeds):
                label = name if i == 0 else None
                color = _COLORS.get(name, "0.5")
                axes.plot(range(1, len(values) + 1), values, color=color, linewidth=1.4, alpha=0.85, label=label)
                best = min(range(len(values)), key=lambda epoch: values[epoch])
                axes.plot([best + 1], [values[best]], color=color, marker="o", markersize=4)
        lowest = min(min(values) for seeds in histories.values() for values in seeds)
        top = min(1.6 * lowest, axes.get_ylim()[1])
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"validation, {unit}")
        axes.legend(frameon=False, fontsize=9)
        return figure
