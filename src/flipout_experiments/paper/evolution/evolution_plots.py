"""Figures 2(b), 2(c), 2(d) and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from flipout_experiments.harness.plot_style import RC

__all__ = ["draw_losses", "draw_returns", "draw_rewards", "draw_seconds"]

_COLOURS = {"flipes": "#0072B2", "ideales": "#009E73", "backprop": "#555555"}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))


def draw_losses(curves: Mapping[str, list[dict[str, Any]]], net: str) -> Figure:
    """Training loss against updates, a line a method: the mean over seeds, and every seed faintly."""
    with rc_context(RC):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.subplots()
        for i, (name, runs) in enumerate(curves.items()):
            colour = _COLOURS[name.partition("-")[0]]
            updates = runs[0]["updates"]
            losses = np.array([run["losses"] for run in runs])
            if len(runs) > 1:
                axes.plot(updates, losses.T, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(updates, losses.mean(0), color=colour, linestyle=_DASHES[i % 3], linewidth=2, label=name)
        axes.set_xlabel("updates")
        axes.set_ylabel("training loss (nats)")
        axes.set_title(net)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.92", linewidth=0.8)
        axes.legend(frameon=False)
        return figure


def draw_seconds(rows: list[dict[str, Any]], cores: int, paper: Mapping[tuple[str, float], tuple[float, float]]) -> Figure:
    """Seconds per update against the width of the net, here and in the paper."""
    with rc_context(RC):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        for axes, net, title in zip(
            figure.subplots(1, 2), ("fc", "convle"), ("FC: hidden units", "ConvLe: filter scale"), strict=True
        ):
            own = [row for row in rows if row["net"] == net]
            widths = [row["width"] for row in own]
            axes.plot(widths, [row["flipes"] for row in own], "o-", color="#0072B2", label="FlipES, this device")
            axes.plot(widths, [row["cpues"] for row in own], "s-", color="#D55E00", label=f"cpuES, {cores} cores of this machine")
            axes.plot(widths, [row["cpues_40_cores"] for row in own], "s--", color="#D55E00", label="cpuES, 40 such cores")
            told = [(width, *paper[net, width]) for width in widths if (net, width) in paper]
            if told:
                x, flip, explicit = zip(*told, strict=True)
                axes.plot(x, flip, "o:", color="0.6", label="paper: FlipES, one GPU")
                axes.plot(x, explicit, "s:", color="0.6", label="paper: cpuES, 40 cores")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(title)
            axes.grid(color="0.92", linewidth=0.8)
        figure.axes[0].set_ylabel("seconds per update")
        figure.axes[0].legend(frameon=False, fontsize=8)
        return figure


def draw_returns(curve: list[dict[str, float]], env: str) -> Figure:
    """Mean and best return of a population against generations."""
    with rc_context(RC):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.subplots()
        x = [point["generation"] for point in curve]
        axes.plot(x, [point["best"] for point in curve], color="0.7", linewidth=1, label="best of the population")
        axes.plot(x, [point["mean"] for point in curve], color="#0072B2", linewidth=2, label="mean of the population")
        axes.set_xlabel("generation")
        axes.set_ylabel("return")
        axes.set_title(env)
        axes.grid(color="0.92", linewidth=0.8)
        axes.legend(frameon=False)
        return figure


def draw_rewards(curve: list[dict[str, float]], judged: list[dict[str, float]]) -> Figure:
    """Mean reward of a population with its spread, and that of the mean model, against generations."""
    with rc_context(RC):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.subplots()
        x = np.arange(1, len(curve) + 1)
        mean, spread = (np.array([point[name] for point in curve]) for name in ("mean", "spread"))
        axes.fill_between(x, mean - spread, mean + spread, color="#0072B2", alpha=0.2, linewidth=0)
        axes.plot(x, mean, color="#0072B2", linewidth=1.5, label="population, ± standard deviation")
        axes.plot([p["generation"] for p in judged], [p["reward"] for p in judged], "o-", color="#D55E00", label="mean model")
        axes.set_xlabel("generation")
        axes.set_ylabel("reward")
        axes.grid(color="0.92", linewidth=0.8)
        axes.legend(frameon=False)
        return figure
