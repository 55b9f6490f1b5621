"""What a run of Tables 2 and 3 found: means over seeds, differences, the table beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.table import Table

from flipout.intervals import Estimate, combine, estimate_mean
from flipout_experiments.harness.claims import Claim, from_json
from flipout_experiments.harness.console import interval
from flipout_experiments.language.settings import PAPER

__all__ = ["Pair", "claims", "estimates", "gains", "pairs", "rounded", "show", "variance_sentence"]


def estimates(result: Mapping[str, Any], split: str) -> dict[str, Estimate]:
    """For each method the mean over seeds with its interval: of ``"valid"``, ``"test"`` or ``"best_epoch"``."""
    return {name: estimate_mean(row[split], result["settings"]["confidence"]) for name, row in result["rows"].items()}


def gains(result: Mapping[str, Any], split: str = "valid") -> dict[tuple[str, str], Estimate]:
    """How much lower a method's mean is than that of another: of none, and of the same noise shared."""
    found, confidence = estimates(result, split), result["settings"]["confidence"]
    pairs = [("none", name) for name in found if name != "none" and "none" in found]
    pairs += [(other, f"{other}-flipout") for other in ("gaussian", "wd") if {other, f"{other}-flipout"} <= set(found)]
    return {(worse, better): combine([1.0, -1.0], [found[worse], found[better]], confidence) for worse, better in pairs}


@dataclass(frozen=True)
class Pair:
    """Two methods of a run.

    Attributes:
        lower, higher: by their means over seeds.
        by: how much lower, with its interval.
        paper: the same difference in the paper, negative where it has them the other way round; None where it has not both.

    Example:
        >>> print(Pair("wd-flipout", "wd", Estimate(1.5, -2.9, 5.9, 2.0, 3), 1.94))
        wd-flipout and wd are not told apart: wd-flipout is lower by 1.5 [-2.9, 5.9] (paper: by 1.94)
    """

    lower: str
    higher: str
    by: Estimate
    paper: float | None

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.by.low > 0

    def __str__(self) -> str:
        published = "" if self.paper is None else f" (paper: {'by' if self.paper >= 0 else 'higher by'} {abs(self.paper):g})"
        by = f"by {rounded(self.by)}{published}"
        if self.told_apart:
            return f"{self.lower} is lower than {self.higher} {by}"
        return f"{self.lower} and {self.higher} are not told apart: {self.lower} is lower {by}"


def pairs(result: Mapping[str, Any], split: str = "valid") -> list[Pair]:
    """Every two methods of a run, those that can be told apart first, by how far apart they are.

    Each interval stands alone: among twenty pairs of equal methods, about two would leave out 0 at a confidence of 90 %.
    """
    found, confidence = estimates(result, split), result["settings"]["confidence"]
    paper = PAPER[result["settings"]["level"]]
    listed = []
    for two in combinations(found, 2):
        lower, higher = sorted(two, key=lambda name: found[name].value)
        by = combine([1.0, -1.0], [found[higher], found[lower]], confidence)
        published = round(paper[higher][0] - paper[lower][0], 3) if {lower, higher} <= set(paper) else None
        listed.append(Pair(lower, higher, by, published))
    return sorted(listed, key=lambda pair: (not pair.told_apart, -pair.by.value))


def variance_sentence(name: str, found: Mapping[str, Any]) -> str:
    """What a run measured of the gradient's variance at a method's weights, and whether the two estimators can be told apart."""
    shared, flipped, over = (from_json(found[key]) for key in ("shared", "flipout", "shared / flipout"))
    told = "lower under flipout" if over.low > 1 else "higher under flipout" if over.high < 1 else "not told apart"
    return (
        f"variance of the gradient at {name}'s weights, N = {found['batch_size']}, {found['draws']:,} draws each: shared "
        f"{interval(shared)}, flipout {interval(flipped)}, shared / flipout {rounded(over)}: {told}"
    )


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
    for pair in pairs(result):
        console.print(str(pair), highlight=False)
    for name, row in result["rows"].items():
        if row["sampled"][0] is not None:
            best = [min(watched) for watched in row["watched"]]
            told = f"{_mean(row['sampled']):.4g} by averaging samples, {_mean(best):.4g} by mean weights"
            console.print(f"{name}, on what is watched of the validation split: {told}", highlight=False)
    for name, found in result["variance"].items():
        console.print(variance_sentence(name, found), highlight=False)


def rounded(estimate: Estimate) -> str:
    """A number and its interval with as many decimals as half the interval needs for two digits.

    Example:
        >>> rounded(Estimate(0.006661, 0.0005121, 0.01281, 0.003, 4))
        '0.0067 [0.0005, 0.0128]'
    """
    half = (estimate.high - estimate.low) / 2
    if not math.isfinite(half) or half <= 0:
        return interval(estimate, digits=4)
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{estimate.value:.{decimals}f} [{estimate.low:.{decimals}f}, {estimate.high:.{decimals}f}]"


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
