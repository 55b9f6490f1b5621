"""Evolution strategies of the paper (Wen et al. 2018, Sec. 4.4): Figure 2(b), 2(c), 2(d) and Figure 5.

The paper leaves open σ, the step size and the optimiser, and says nothing of antithetic pairs or fitness shaping. Here all
methods have pairs, centered ranks and Adam; every member sees the batch of its update; IdealES has independent Gaussian
perturbations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flipout.data import mnist
from flipout.intervals import Estimate, t_quantile
from flipout_experiments.harness.claims import Claim, from_json
from flipout_experiments.harness.console import interval
from flipout_experiments.harness.environment import find_device
from flipout_experiments.harness.reproduce import Experiment, choose
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.paper.evolution.contestants import Contestant, Problem, train
from flipout_experiments.paper.evolution.evolution_plots import draw_losses, draw_seconds
from flipout_experiments.paper.evolution.timing import TimingSettings, cores_to_use, explicit_seconds, flipes_seconds

__all__ = ["EXPERIMENT", "EvolutionSettings"]

_IDEAL = Contestant("ideales", 1600, 0.05, 0.01)
_FLIPES = Contestant("flipes", 1600, 0.05, 0.01, members_per_base=40, base="gaussian")
_BACKPROP = Contestant("backprop", 0, 0.0, 0.001)
#: The paper's seconds per update, FlipES and cpuES on 40 cores (Fig. 5), by net and width.
_PAPER_SECONDS = {
    ("fc", 32.0): (0.12, 0.51), ("fc", 128.0): (0.13, 1.22), ("fc", 512.0): (0.18, 5.10), ("fc", 2048.0): (1.86, 38.0),
    ("convle", 0.25): (2.3, 16.0), ("convle", 0.75): (5.48, 46.0), ("convle", 1.0): (7.12, 67.0), ("convle", 1.5): (11.77, 132.0),
}  # fmt: skip
_PAPER_CORES = 40


@dataclass(frozen=True)
class EvolutionSettings:
    """One figure's runs.

    Attributes:
        figure: ``2b``, ``2c``, ``2d`` or ``5``.
        problem, contestants, seeds: of the training runs; none for Figure 5.
        timing: of Figure 5.
        price_gpu, price_cpu: dollars per hour of the device that runs FlipES, and of 40 cores; 0 where they are not given.
    """

    figure: str
    problem: Problem | None
    contestants: tuple[Contestant, ...]
    seeds: tuple[int, ...]
    timing: TimingSettings | None
    price_gpu: float = 0.0
    price_cpu: float = 0.0
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None
    download: bool = True

    @classmethod
    def preset(cls, name: str, figure: str, **options: Any) -> EvolutionSettings:
        """The settings of a preset: fewer samples and smaller nets for ``smoke`` and ``laptop``."""
        if name == "smoke":
            options["download"] = False
        if figure == "5":
            return cls(figure, None, (), (), choose(name, _TIMINGS, "preset"), **options)
        problem = choose(name, _PROBLEMS[figure], "preset")
        contestants = _CONTESTANTS[figure]
        if name == "smoke":
            contestants = tuple(_smaller(c) for c in contestants)
        seed = options.get("seed", 0)
        count = {"smoke": 2, "laptop": 3, "paper": 3}[name] if figure == "2b" else 1
        return cls(figure, problem, contestants, tuple(range(seed, seed + count)), None, **options)


def _smaller(c: Contestant) -> Contestant:
    return replace(c, samples=c.samples // 80 * 2, members_per_base=c.members_per_base and 20)


_CONTESTANTS: Mapping[str, tuple[Contestant, ...]] = {
    "2b": (_IDEAL, _FLIPES),
    "2c": (Contestant("flipes", 5000, 0.05, 0.01), Contestant("flipes", 1600, 0.05, 0.01), _BACKPROP),
    "2d": (Contestant("flipes", 1600, 0.03, 0.005), _BACKPROP),
}
_PROBLEMS: Mapping[str, Mapping[str, Problem]] = {
    "2b": {
        "smoke": Problem("fc", 16, 4, 12, 4),
        "laptop": Problem("fc", 32, 16, 200, 10),
        "paper": Problem("fc", 512, 16, 12_000, 100),
    },
    "2c": {
        "smoke": Problem("fc", 16, 4, 12, 4),
        "laptop": Problem("fc", 128, 32, 150, 10),
        "paper": Problem("fc", 512, 32, 20_000, 100),
    },
    "2d": {
        "smoke": Problem("convle", 1 / 16, 2, 4, 2),
        "laptop": Problem("convle", 0.125, 8, 100, 10),
        "paper": Problem("convle", 1.0, 16, 4_000, 50),
    },
}
_TIMINGS = {
    "smoke": TimingSettings((32,), (0.25,), 200, 100, 4, 1),
    "laptop": TimingSettings((32, 128, 512, 2048), (0.25, 0.75, 1.0, 1.5), 5000, 1000, 40, 3),
    "paper": TimingSettings((32, 128, 512, 2048), (0.25, 0.75, 1.0, 1.5), 5000, 5000, 400, 10),
}


def _run(settings: EvolutionSettings, run: Run, progress: Progress) -> dict[str, Any]:
    return _train_all(settings, run, progress) if settings.timing is None else _time_all(settings, settings.timing, run, progress)


def _train_all(settings: EvolutionSettings, run: Run, progress: Progress) -> dict[str, Any]:
    problem = settings.problem
    assert problem is not None
    with run.phase("load-data", progress):
        loaded = mnist(settings.seed, data_dir=settings.data_dir, download=settings.download)
        data = loaded.to(find_device(settings.device))
    curves: dict[str, list[dict[str, Any]]] = {}
    for contestant in settings.contestants:
        name = _name(contestant)
        for seed in settings.seeds:
            phase = f"{name}-seed{seed}"
            with run.phase(phase, progress) as report:
                found = train(
                    problem, contestant, data, seed, load=partial(run.load_checkpoint, phase),
                    save=partial(run.save_checkpoint, phase), log=run.log, report=report,
                )  # fmt: skip
            curves.setdefault(name, []).append(found)
    result = {"data": loaded.source, "curves": curves, "final": {name: _final(runs) for name, runs in curves.items()}}
    if len(curves) == 2 and len(settings.seeds) > 1:
        first, second = (list(curves[name]) for name in curves)
        result["difference"] = _mean([b["losses"][-1] - a["losses"][-1] for a, b in zip(first, second, strict=True)]).as_dict()
    with run.phase("figure", progress):
        run.figure(f"figure-{settings.figure}", draw_losses(curves, problem.net))
    return result


def _name(contestant: Contestant) -> str:
    return contestant.method if not contestant.samples else f"{contestant.method}-{contestant.samples}"


def _final(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "loss": _mean([run["losses"][-1] for run in runs]).as_dict(),
        "test_accuracy": statistics.mean(run["test_accuracy"] for run in runs),
    }


def _mean(values: list[float], confidence: float = 0.9) -> Estimate:
    """The mean with its t-interval; without one for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf, math.inf, 0)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile(confidence, len(values) - 1) * error
    return Estimate(mean, mean - half, mean + half, error, len(values) - 1)


def _time_all(settings: EvolutionSettings, timing: TimingSettings, run: Run, progress: Progress) -> dict[str, Any]:
    nets = [*(("fc", float(w)) for w in timing.fc_widths), *(("convle", s) for s in timing.conv_scales)]
    device, cores = find_device(settings.device), cores_to_use()
    with run.phase("flipes", progress) as report:
        state = run.load_checkpoint("flipes") or {"seconds": []}
        seconds = list(state["seconds"])
        for net, width in nets[len(seconds) :]:
            seconds.append(statistics.median(flipes_seconds(net, width, timing, device)))
            run.log(step=len(seconds), net=net, width=width, seconds=seconds[-1])
            run.save_checkpoint("flipes", {"seconds": seconds})
            report(len(seconds), len(nets))
    with run.phase("cpues", progress):
        each = explicit_seconds(nets, timing, cores)
    rows = []
    for (net, width), flip, member in zip(nets, seconds, each, strict=True):
        here, forty = member * timing.samples / cores, member * timing.samples / _PAPER_CORES
        row = {"net": net, "width": width, "flipes": flip, "cpues": here, "cpues_40_cores": forty}
        if settings.price_gpu and settings.price_cpu:
            row["cost_factor"] = forty * settings.price_cpu / (flip * settings.price_gpu)
        rows.append(row)
    with run.phase("figure", progress):
        run.figure("figure-5", draw_seconds(rows, cores, _PAPER_SECONDS))
    return {"cores": cores, "samples": timing.samples, "rows": rows}


def _show(result: dict[str, Any], console: Console) -> None:
    if "rows" in result:
        _show_seconds(result, console)
        return
    table = Table(title=f"Figure {result['settings']['figure']}: after the last update", title_justify="left")
    for column in ("method", "training loss (nats)", "test accuracy"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, final in result["final"].items():
        table.add_row(name, interval(from_json(final["loss"])), f"{100 * final['test_accuracy']:.1f} %")
    console.print(table)
    if "difference" in result:
        console.print(
            f"FlipES - IdealES, paired by seed: {interval(from_json(result['difference']))}; 90 % interval", highlight=False
        )


def _show_seconds(result: dict[str, Any], console: Console) -> None:
    title = f"Figure 5: seconds per update of {result['samples']:,} samples"
    table = Table(title=title, title_justify="left")
    cores = result["cores"]
    priced = "cost_factor" in result["rows"][0]
    for column in ("net", "FlipES here", f"cpuES, {cores} cores here", "cpuES, 40 such cores", "paper: FlipES, cpuES"):
        table.add_column(column, justify="left" if column == "net" else "right")
    if priced:
        table.add_column("cost factor", justify="right")
    for row in result["rows"]:
        paper = _PAPER_SECONDS.get((row["net"], row["width"]))
        cells = [f"{row['net']} {row['width']:g}", *(f"{row[name]:.3g}" for name in ("flipes", "cpues", "cpues_40_cores"))]
        cells.append(f"{paper[0]:g}, {paper[1]:g}" if paper else "")
        table.add_row(*cells, *([f"{row['cost_factor']:.3g}"] if priced else []))
    console.print(table)
    if not priced:
        console.print("--price-gpu and --price-cpu (dollars per hour of this device, and of 40 cores) give a cost factor")


def _claims(result: dict[str, Any]) -> list[Claim]:
    """No loss against IdealES; data efficiency like backprop's; one device does the work of 40 cores for less."""
    if "rows" in result:
        return [
            Claim(
                f"{row['net']} {row['width']:g}: cpuES on 40 cores / FlipES, seconds per update",
                paper[1] / paper[0] if (paper := _PAPER_SECONDS.get((row["net"], row["width"]))) else "above 1",
                row["cpues_40_cores"] / row["flipes"],
                None,
            )
            for row in result["rows"]
        ]
    if "difference" in result:
        seen = from_json(result["difference"])
        return [Claim("FlipES - IdealES, final training loss (nats)", "no loss", seen, seen.low <= 0 <= seen.high)]
    finals = {name: final["loss"]["value"] for name, final in result["final"].items()}
    ratios = {name: value / finals["backprop"] for name, value in finals.items() if name != "backprop"}
    return [Claim(f"{name}: final training loss / backprop's", "comparable", ratio, None) for name, ratio in ratios.items()]


EXPERIMENT = Experiment(EvolutionSettings.preset, _run, _show, _claims)
