"""α, β and γ of Theorem 2 for each of the paper's nets, and the curves that they predict beside the measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flipout.intervals import t_quantile
from flipout.variance import VarianceComponents, VarianceCurve, suggest_batch_size, variance_components
from flipout_experiments.harness.claims import Claim, from_json
from flipout_experiments.harness.console import Count, interval
from flipout_experiments.harness.reproduce import Experiment
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.paper.figures import draw_curves
from flipout_experiments.paper.variance.measured_curves import (
    CurveSettings,
    VarianceSettings,
    measure_curve,
    show_pretraining,
)
from flipout_experiments.paper.variance.subjects import SubjectSettings, prepare, subject_settings

__all__ = ["EXPERIMENT", "ComponentsSettings", "limit"]


@dataclass(frozen=True)
class ComponentsSettings:
    """The net, the nested sampling, and the curve to hold against it.

    Attributes:
        subject: the net, as in the variance experiment.
        curve: points to measure.
        bases: base perturbations, under flipout and under shared noise.
        batch_size: of the gradients that the components come from.
    """

    subject: SubjectSettings
    curve: CurveSettings
    bases: int
    batch_size: int

    @property
    def device(self) -> str:
        return self.subject.device

    @classmethod
    def preset(cls, name: str, net: str, seed: int = 0, device: str = "cpu", data_dir: Path | None = None) -> ComponentsSettings:
        """The settings of a preset."""
        subject = subject_settings(net, name, seed=seed, device=device, data_dir=data_dir)
        return cls(subject, *_SAMPLING[name][net if name == "laptop" else "all"])


#: For each preset: the curve, the bases and the batch size of the nested sampling.
_SAMPLING: Mapping[str, Mapping[str, tuple[CurveSettings, int, int]]] = {
    "smoke": {"all": (CurveSettings((1, 4, 16), (8, 8, 8), micro_batch=8), 8, 8)},
    "laptop": {
        "fc": (CurveSettings((1, 8, 64, 512, 4096), (800, 400, 160, 80, 30)), 100, 512),
        "convle": (CurveSettings((1, 8, 64, 512), (240, 120, 40, 20)), 40, 64),
        "convgg": (CurveSettings((1, 8, 64, 512), (240, 120, 40, 20), micro_batch=256), 40, 64),
        "lstm": (CurveSettings((1, 8, 64), (200, 100, 40), micro_batch=64), 40, 32),
    },
    "paper": {"all": (CurveSettings(tuple(2**i for i in range(14)), (2000,) * 14, 50, micro_batch=1024), 1000, 1024)},
}


def _run(settings: ComponentsSettings, run: Run, progress: Progress) -> dict[str, Any]:
    subject = prepare(settings.subject, run, progress)
    with run.phase("components", progress) as report:
        components = variance_components(
            subject.net, subject.loss_fn, subject.sample_batch, settings.bases, batch_size=settings.batch_size,
            parts=subject.parts, confidence=settings.curve.confidence, micro_batch=settings.curve.micro_batch,
            seed=settings.subject.seed, checkpoint=run.path("components.json"), on_draw=Count(report, 2 * settings.bases),
        )  # fmt: skip
    curve = measure_curve(subject, VarianceSettings(settings.subject, settings.curve), run, progress)
    panels = {**subject.panels, "all weights": tuple(n for n in components.blocks if n not in components.parts)}
    points = [point for panel, names in panels.items() for point in _compared(panel, names, components, curve)]
    with run.phase("figure", progress):
        run.figure("components", draw_curves(curve, subject.panels, settings.subject.net, components))
    return {
        **subject.record,
        "panels": panels,
        "components": {panel: {key: e.as_dict() for key, e in components.of(names).items()} for panel, names in panels.items()},
        "suggestion": suggest_batch_size(components=components).as_dict(),
        "curve": curve.as_dict(),
        "points": points,
        "within": sum(point["within"] for point in points) / len(points),
    }


def _compared(panel: str, names: tuple[str, ...], components: VarianceComponents, curve: VarianceCurve) -> list[dict[str, Any]]:
    """Each measured point beside the prediction, and whether zero lies in the interval of their difference."""
    found = []
    for estimator in curve.points:
        for n, measured in zip(curve.batch_sizes(estimator), curve.values(estimator, names), strict=True):
            predicted = components.predict(estimator, n, names)
            error = math.hypot(measured.standard_error, predicted.standard_error)
            parts = ((measured.standard_error, measured.degrees), (predicted.standard_error, predicted.degrees))
            degrees = error**4 / math.fsum(each**4 / degree for each, degree in parts)
            within = abs(measured - predicted) <= t_quantile(curve.confidence, degrees) * error
            found.append(
                {
                    "panel": panel,
                    "estimator": estimator,
                    "batch_size": n,
                    "measured": measured.as_dict(),
                    "predicted": predicted.as_dict(),
                    "within": within,
                }
            )
    return found


def _show(result: dict[str, Any], console: Console) -> None:
    show_pretraining(result, console)
    table = Table(title="Theorem 2: components of the variance, summed over the weights", title_justify="left")
    for column in ("", "alpha", "beta", "gamma", "alpha / beta", "beta / gamma"):
        table.add_column(column, justify="right" if column else "left")
    for panel, found in result["components"].items():
        alpha, beta, gamma = (from_json(found[name]) for name in ("alpha", "beta", "gamma"))
        relation = f"{alpha / beta:.3g}" if beta > 0 else "", f"{beta / gamma:.3g}" if gamma > 0 else ""
        table.add_row(panel, interval(alpha), interval(beta), interval(gamma), *relation)
    console.print(table)
    told = ", ".join(f"{name} {limit(result, name)}" for name in ("shared", "flipout"))
    console.print(f"a batch is worth half of its examples at N = {told}", highlight=False)
    points = result["points"]
    console.print(
        f"predicted within the interval of the measured: {sum(point['within'] for point in points)} of {len(points)} points "
        f"({100 * result['within']:.0f} %)",
        highlight=False,
    )


def limit(result: Mapping[str, Any], estimator: str) -> str:
    """The batch size at which a batch is worth half of its examples, as text."""
    found = result["suggestion"][estimator]["value"]
    return "no limit seen" if found is None else f"{found:,.0f}"


def _claims(result: dict[str, Any]) -> list[Claim]:
    """α ≫ β ≫ γ, "much" taken as ten times, and the curves they predict (Sec. 3.2)."""
    found = []
    for panel, components in result["components"].items():
        alpha, beta, gamma = (from_json(components[name]) for name in ("alpha", "beta", "gamma"))
        for names, large, small in (("α / β", alpha, beta), ("β / γ", beta, gamma)):
            holds = True if large.low > 10 * small.high else False if large.high < 10 * small.low else None
            seen = large / small if small > 0 else f"{interval(large)} / {interval(small)}"
            found.append(Claim(f"{panel}: {names}", "≫ 1", seen, holds))
    points, within = len(result["points"]), result["within"]
    told = f"{round(points * within)} of {points} points within their interval"
    found.append(Claim("measured curves and Eq. 11, 12", "agree", told, within >= 0.9))
    return found


EXPERIMENT = Experiment(ComponentsSettings.preset, _run, _show, _claims)
