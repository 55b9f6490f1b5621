"""What is told of races: iterations and seconds to each loss, and their ratios with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flipout.intervals import Estimate, estimate_mean
from flipout_experiments.harness.claims import Claim, from_json
from flipout_experiments.harness.console import interval
from flipout_experiments.paper.race.lanes import Lane, RaceSettings, paces

__all__ = ["PAIRS", "claim_races", "ratio_over_seeds", "show_races", "summarize"]

#: The estimators whose ratios are told.
PAIRS = (("shared", "flipout"), ("flipout", "local_reparameterization"))
#: What there is to reach a loss: counted; at the median time of a step; as the steps really took.
_COSTS = {"steps_to": "iterations", "seconds_to": "seconds", "seconds_spent_to": "seconds as spent"}


def summarize(lanes: Mapping[str, Sequence[Lane]], settings: RaceSettings, confidence: float) -> dict[str, Any]:
    """The record of each training and the ratios between estimators, for the result.

    Args:
        lanes: of each estimator, one a seed.
        settings: of the races.
        confidence: of the intervals.
    """
    seeds = range(len(next(iter(lanes.values()))))
    pace = [paces({name: each[i] for name, each in lanes.items()}) for i in seeds]
    runs = {name: [_training(each[i], pace[i][name], settings) for i in seeds] for name, each in lanes.items()}
    ratios: dict[str, Any] = {}
    for top, bottom in PAIRS:
        if top not in runs or bottom not in runs:
            continue
        found: dict[str, Any] = {}
        for target in map(_name, settings.targets):
            both = [(a, b) for a, b in zip(runs[top], runs[bottom], strict=True)]
            found[target] = {
                cost: ratio_over_seeds([(a[cost][target], b[cost][target]) for a, b in both], confidence) for cost in _COSTS
            }
        found["seconds_a_step"] = ratio_over_seeds([(each[top], each[bottom]) for each in pace], confidence)
        ratios[f"{top} / {bottom}"] = found
    return {"runs": runs, "ratios": ratios}


def _training(lane: Lane, pace: float, settings: RaceSettings) -> dict[str, Any]:
    reached = {_name(target): lane.reached.get(target) for target in settings.targets}
    return {
        "steps_to": reached,
        "seconds_to": {target: None if step is None else step * pace for target, step in reached.items()},
        "seconds_spent_to": {target: None if step is None else sum(lane.seconds[:step]) for target, step in reached.items()},
        "seconds_a_step": pace,
        "steps": len(lane.losses),
        "curve": lane.curve(settings.window),
        "tests": lane.tests,
    }


def ratio_over_seeds(pairs: Sequence[tuple[float | None, float | None]], confidence: float) -> Estimate | None:
    """The geometric mean of the ratios of pairs, with the t-interval of its logarithm; None if a member of a pair is None.

    Example:
        >>> print(ratio_over_seeds([(2.0, 1.0), (8.0, 1.0)], 0.9))
        4 [0.0503, 318]
        >>> ratio_over_seeds([(2.0, None)], 0.9)
    """
    logs = [math.log(top / bottom) for top, bottom in pairs if top is not None and bottom is not None]
    if len(logs) < len(pairs):
        return None
    found = estimate_mean(logs, confidence)
    value = math.exp(found.value)
    high = math.exp(found.high) if found.high < 700 else math.inf
    return Estimate(value, math.exp(found.low), high, value * found.standard_error, found.degrees)


def show_races(result: dict[str, Any], console: Console) -> None:
    """Prints what ``result.json`` holds."""
    console.print(f"\ndata: {result['data']}\nnet: {result['parameters']:,} parameters\n", highlight=False)
    for each in result["races"]:
        console.print(_trainings(each, result["measure"]))
        console.print(_ratios(each))


def claim_races(result: dict[str, Any]) -> list[Claim]:
    """The paper's statements (Sec. 4.3) beside the ratios at the last loss that all reached."""
    found: list[Claim] = []
    paper = {
        ("shared / flipout", "steps_to"): (3.0, "iterations"),
        ("shared / flipout", "seconds_to"): (1.5, "seconds"),
        ("flipout / local_reparameterization", "steps_to"): (1.0, "iterations"),
    }
    for each in result["races"]:
        for (pair, cost), (stated, unit) in paper.items():
            reached = [(t, r[cost]) for t, r in each["ratios"].get(pair, {}).items() if t != "seconds_a_step" and r[cost]]
            if not reached:
                continue
            target, ratio = reached[-1][0], from_json(reached[-1][1])
            holds = 0.8 <= ratio.value <= 1.25 if stated == 1.0 else ratio.value >= stated / 1.25
            what = f"{each['noise']}: {_short(pair)}, {unit} to a training NLL of {target}"
            found.append(Claim(what, stated, ratio, holds if each["noise"] == "bbb" else None))
    return found


def _trainings(each: Mapping[str, Any], measure: str) -> Table:
    table = Table(title=f"{each['noise']}: iterations to a training NLL, seed by seed", title_justify="left")
    targets = list(next(iter(each["runs"].values()))[0]["steps_to"])
    for column in ("estimator", *targets, "seconds a step", f"last {measure}"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name, runs in each["runs"].items():
        steps = [", ".join(str(run["steps_to"][target] or "-") for run in runs) for target in targets]
        seconds = ", ".join(f"{run['seconds_a_step']:.3f}" for run in runs)
        table.add_row(_short(name), *steps, seconds, ", ".join(f"{run['tests'][-1][1]:.4g}" for run in runs))
    return table


def _ratios(each: Mapping[str, Any]) -> Table:
    table = Table(title=f"{each['noise']}: ratios to a training NLL, with intervals over seeds", title_justify="left")
    for column in ("ratio", "NLL", *_COSTS.values()):
        table.add_column(column, justify="left" if column == "ratio" else "right")
    for pair, found in each["ratios"].items():
        for target, ratios in found.items():
            if target == "seconds_a_step":
                table.add_row(_short(pair), "", "", f"{_told(ratios)} a step", "")
            else:
                table.add_row(_short(pair), target, *(_told(ratios[cost]) for cost in _COSTS))
        table.add_section()
    return table


def _name(target: float) -> str:
    return f"{target:g}"


def _short(name: str) -> str:
    return name.replace("local_reparameterization", "LRT")


def _told(found: Mapping[str, Any] | None) -> str:
    return "not reached" if found is None else interval(from_json(found))
