"""What a run of Tables 2 and 3 found: means over seeds, differences, the table beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from flipout.experiments.claims import Claim
from flipout.experiments.console import interval
from flipout.experiments.language.settings import PAPER
from flipout.experiments.variance import from_json
from flipout.moments import Estimate, combine, estimate_mean

__all__ = ["claims", "estimates", "gains", "show"]


def estimates(result: Mapping[str, Any], split: str) -> dict[str, Estimate]:
    """For each method the mean over seeds with its interval: of ``"valid"``, ``"test"`` or ``"best_epoch"``."""
    return {name: estimate_mean(row[split], result["settings"]["confidence"]) for name, row in result["rows"].items()}


def gains(result: Mapping[str, Any], split: str = "valid") -> dict[tuple[str, str], Estimate]:
    """How much lower a method's mean is than that of another: of none, and of the same noise shared."""
    found, confidence = estimates(result, split), result["settings"]["confidence"]
    pairs = [("none", name) for name in found if name != "none" and "none" in found]
    pairs += [(other, f"{other}-flipout") for other in ("gaussian", "wd") if {other, f"{other}-flipout"} <= set(found)]
    return {(worse, better): combine([1.0, -1.0], [found[worse], found[better]], confidence) for worse, better in pairs}


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the paper's table beside ours."""
    level = result["settings"]["level"]
    paper = PAPER[level]
    console.print(f"\ndata: {result['data']}; trained on the first {result['trained_on']:,} tokens", highlight=False)
    title = f"{result['unit']} ({result['parameters']:,} parameters, {result['settings']['seeds']} seeds)"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("paper, valid", "paper, test", "valid", "test", "best epoch"):
        table.add_column(name, justify="right")
    valid, test, epochs = (estimates(result, split) for split in ("valid", "test", "best_epoch"))
    for name in result["rows"]:
        published = [f"{value:g}" for value in paper.get(name, ())] or ["", ""]
        table.add_row(name, *published, *(interval(found[name], digits=4) for found in (valid, test)), f"{epochs[name].value:.0f}")
    console.print(table)
    for (worse, better), gain in gains(result).items():
        console.print(f"{better} is lower than {worse} by {interval(gain, digits=4)}", highlight=False)
    for name, row in result["rows"].items():
        if row["sampled"][0] is not None:
            best = [min(watched) for watched in row["watched"]]
            told = f"{_mean(row['sampled']):.4g} by averaging samples, {_mean(best):.4g} by mean weights"
            console.print(f"{name}, on what is watched of the validation split: {told}", highlight=False)
    for name, found in result["variance"].items():
        numbers = ", ".join(f"{each} {interval(from_json(found[each]))}" for each in ("shared", "flipout", "shared / flipout"))
        console.print(f"variance of the gradient at {name}'s weights, N = {found['batch_size']}: {numbers}", highlight=False)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def claims(result: dict[str, Any]) -> list[Claim]:
    """Every method is better than none, flipout better than the same noise shared, and its gradients less noisy."""
    level, found = result["settings"]["level"], []
    for (worse, better), gain in gains(result).items():
        known = {worse, better} <= set(PAPER[level])
        paper: float | str = round(PAPER[level][worse][0] - PAPER[level][better][0], 3) if known else "above 0"
        holds = True if gain.low > 0 else False if gain.high < 0 else None
        found.append(Claim(f"{worse} − {better}, {result['unit']} on validation", paper, gain, holds))
    for name, measured in result["variance"].items():
        over = from_json(measured["shared / flipout"])
        holds = True if over.low > 1 else False if over.high < 1 else None
        found.append(Claim(f"{name}: variance, shared / flipout at N = {measured['batch_size']}", "above 1", over, holds))
    return found
