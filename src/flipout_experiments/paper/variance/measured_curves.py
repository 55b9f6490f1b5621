"""Figure 1: the variance of a gradient against the batch size, layer by layer, under each estimator (Wen et al. 2018, Sec. 4.1).

The net is pre-trained and frozen, then its weights get multiplicative Gaussian noise with σ = 1. Shared noise levels off, flipout
falls as 1/N over the whole range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flipout.variance import EstimatorVariance, VarianceCurve, variance_curve
from flipout.variance.named import label
from flipout_experiments.harness.claims import Claim, from_json
from flipout_experiments.harness.console import Count, interval
from flipout_experiments.harness.reproduce import Experiment
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.paper.figures import draw_curves
from flipout_experiments.paper.variance.independent_members import independent_curve
from flipout_experiments.paper.variance.subjects import Subject, SubjectSettings, prepare, subject_settings

__all__ = ["EXPERIMENT", "CurveSettings", "VarianceSettings", "measure_curve", "show_pretraining", "summary"]

_POWERS = tuple(2**i for i in range(14))


@dataclass(frozen=True)
class CurveSettings:
    """Where and how often gradients are drawn.

    Attributes:
        batch_sizes: N.
        draws: gradients of flipout and LRT at each N; shared noise, whose variance varies more, gets twice as many.
        repeats: blocks of draws at each point; None lets the instrument choose.
        independent_sizes: N under independent noise, each a multiple of the one before; empty for none.
        independent_pairs: pairs of draws at the largest of these.
        micro_batch: most examples to run at once.
        confidence: of the t-intervals.
    """

    batch_sizes: tuple[int, ...]
    draws: tuple[int, ...]
    repeats: int | None = None
    independent_sizes: tuple[int, ...] = ()
    independent_pairs: int = 2
    micro_batch: int | None = None
    confidence: float = 0.9


@dataclass(frozen=True)
class VarianceSettings:
    """The net, its curve, and the estimators to measure: LRT on the fully connected net only, since it is biased elsewhere."""

    subject: SubjectSettings
    curve: CurveSettings
    estimators: tuple[str, ...] = ("shared", "flipout")

    @property
    def device(self) -> str:
        return self.subject.device

    @classmethod
    def preset(cls, name: str, net: str, seed: int = 0, device: str = "cpu", data_dir: Path | None = None) -> VarianceSettings:
        """The settings of a preset."""
        local = ("local_reparameterization",) if net == "fc" else ()
        subject = subject_settings(net, name, seed=seed, device=device, data_dir=data_dir)
        return cls(subject, _curve(name, net), ("shared", "flipout", *local))


#: Under ``laptop``: batch sizes, draws, and sizes and pairs of draws under independent noise.
_LAPTOP = {
    "fc": CurveSettings((1, 2, 8, 32, 128, 512, 2048, 8192), (800, 500, 300, 200, 120, 80, 40, 30), None, (1, 8, 64, 512), 24),
    "convle": CurveSettings((1, 4, 16, 64, 256, 1024), (240, 160, 100, 50, 30, 16), None, (1, 4, 16, 64), 4),
    "convgg": CurveSettings((1, 4, 16, 64, 256, 1024), (240, 160, 100, 50, 30, 12), None, (1, 4, 16), 4, micro_batch=256),
    "lstm": CurveSettings((1, 4, 16, 64, 256), (240, 160, 100, 50, 20), None, (1, 4, 16), 4, micro_batch=64),
}


def _curve(preset: str, net: str) -> CurveSettings:
    if preset == "smoke":
        return CurveSettings((1, 4, 16), (8, 8, 8), None, (1, 4), 1, micro_batch=8)
    if preset == "laptop":
        return _LAPTOP[net]
    micro = {"lstm": 64, "convgg": 1024}.get(net)  # the LSTM's is the paper's own
    sizes, pairs = ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 50) if net == "fc" else ((1, 4, 16, 64), 50)
    return CurveSettings(_POWERS, (10_000,) * len(_POWERS), 50, sizes, pairs, micro)


def measure_curve(subject: Subject, settings: VarianceSettings, run: Run, progress: Progress) -> VarianceCurve:
    """The curve of every estimator, one phase each; finished blocks of draws are kept in the run folder."""
    spec, seed = settings.curve, settings.subject.seed
    curve = VarianceCurve({}, spec.confidence)
    for name in settings.estimators:
        draws = tuple(count * (2 if name == "shared" else 1) for count in spec.draws)
        with run.phase(f"variance-{name}", progress) as report:
            found = variance_curve(
                subject.net, subject.loss_fn, subject.sample_batch, spec.batch_sizes, (name,), {name: draws},
                repeats=spec.repeats, parts=subject.parts, confidence=spec.confidence, micro_batch=spec.micro_batch, seed=seed,
                checkpoint=run.path(f"curve-{name}.json"), on_draw=Count(report, sum(draws)),
            )  # fmt: skip
            curve = curve.joined(found)
            for point in found.points[name]:
                run.log(step=point.batch_size, estimator=name, variance=float(point.total))
    if spec.independent_sizes:
        curve = curve.joined(_independent(subject, settings, run, progress))
    return curve


def _independent(subject: Subject, settings: VarianceSettings, run: Run, progress: Progress) -> VarianceCurve:
    spec = settings.curve
    with run.phase("variance-independent", progress) as report:
        state = run.load_checkpoint("independent")
        if state is None:
            count = Count(report, 2 * spec.independent_pairs * spec.independent_sizes[-1])
            found = independent_curve(
                subject.net, subject.loss_fn, subject.sample_batch, spec.independent_sizes, spec.independent_pairs,
                seed=settings.subject.seed, confidence=spec.confidence, on_member=count, parts=subject.parts,
            )  # fmt: skip
            for point in found:
                run.log(step=point.batch_size, estimator="independent", variance=float(point.total))
            state = {"points": [point.as_dict() for point in found]}
            run.save_checkpoint("independent", state)
    points = tuple(EstimatorVariance.from_dict(point) for point in state["points"])
    return VarianceCurve({"independent": points}, spec.confidence)


def _run(settings: VarianceSettings, run: Run, progress: Progress) -> dict[str, Any]:
    subject = prepare(settings.subject, run, progress)
    curve = measure_curve(subject, settings, run, progress)
    with run.phase("figure", progress):
        run.figure("variance", draw_curves(curve, subject.panels, settings.subject.net))
    return {**subject.record, "panels": dict(subject.panels), "curve": curve.as_dict(), "summary": summary(curve, subject.panels)}


def summary(curve: VarianceCurve, panels: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """For each panel the slopes, the plateaus, and the ratios at the largest N (for independent noise at its own largest)."""
    found = {}
    for panel, names in panels.items():
        last = curve.batch_sizes("flipout")[-1]
        ratios = {"shared / flipout": (last, curve.ratio("shared", "flipout", last, names))}
        common = [
            n for n in curve.batch_sizes("flipout") if "independent" in curve.points and n in curve.batch_sizes("independent")
        ]
        if common:
            ratios["flipout / independent"] = (common[-1], curve.ratio("flipout", "independent", common[-1], names))
        found[panel] = {
            "slope": {name: curve.slope(name, names).as_dict() for name in curve.points},
            "plateau": {name: curve.plateau(name, names).as_dict() for name in ("shared", "flipout")},
            "ratio": {name: {"batch_size": size, **estimate.as_dict()} for name, (size, estimate) in ratios.items()},
        }
    return found


def show_pretraining(result: dict[str, Any], console: Console) -> None:
    """Prints the data and what pre-training reached."""
    reached = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result["pretraining"].items())
    console.print(f"\ndata: {result['data']}\nnet: {result['parameters']:,} parameters; pre-trained: {reached}\n", highlight=False)


def _show(result: dict[str, Any], console: Console) -> None:
    show_pretraining(result, console)
    curve = VarianceCurve.from_dict(result["curve"])
    for panel, names in result["panels"].items():
        table = Table(title=f"{panel}: variance of the gradient, summed over the layer", title_justify="left")
        table.add_column("N", justify="right")
        for name in curve.points:
            table.add_column(label(name), justify="right")
        for n in curve.batch_sizes("flipout"):
            has = {name: n in curve.batch_sizes(name) for name in curve.points}
            table.add_row(f"{n:,}", *(interval(curve.at(name, n, names)) if has[name] else "" for name in curve.points))
        slopes = result["summary"][panel]["slope"]
        table.add_section()
        table.add_row("slope", *(interval(from_json(slopes[name])) for name in curve.points))
        console.print(table)
        for name, found in result["summary"][panel]["ratio"].items():
            console.print(f"{name} at N = {found['batch_size']:,}: {interval(from_json(found))}", highlight=False)


def _claims(result: dict[str, Any]) -> list[Claim]:
    """Shared noise flattens between N = 100 and 1000; flipout falls as 1/N over the whole range; LRT is lower (Sec. 4.1)."""
    curve, found = VarianceCurve.from_dict(result["curve"]), []
    for panel, names in result["panels"].items():
        slope, last = curve.slope("flipout", names), curve.batch_sizes("flipout")[-1]
        found.append(Claim(f"{panel}: slope of flipout, log-log", -1.0, slope, abs(slope + 1) <= 0.1))
        lead = curve.ratio("shared", "flipout", last, names)
        flat = lead.low > 1 if last >= 100 else None
        found.append(Claim(f"{panel}: shared / flipout at N = {last:,}", "above 1: shared noise levels off", lead, flat))
        if "local_reparameterization" in curve.points:
            local = curve.ratio("local_reparameterization", "flipout", last, names)
            found.append(Claim(f"{panel}: LRT / flipout at N = {last:,}", "below 1", local, local.high < 1))
    return found


EXPERIMENT = Experiment(VarianceSettings.preset, _run, _show, _claims)
