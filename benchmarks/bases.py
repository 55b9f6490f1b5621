"""What several base perturbations buy: the variance of a layer's gradient against the batch size, and the time of a step.

    python -m benchmarks.bases --net convle --bases 64 --data-dir DATA --out FOLDER

Not among the runs of ``python -m benchmarks``: it pre-trains the paper's nets, and goes on from what it left in FOLDER. At each N a
batch has K = min(N, bases) bases; α/N, the law of independent noise, is taken from N = 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flipout.estimators import Flipout
from flipout.variance import VarianceCurve, variance_curve
from flipout_experiments.harness.run import Run, silent
from flipout_experiments.paper.variance.subjects import Subject, SubjectSettings, prepare, subject_settings

__all__ = ["main"]


@dataclass(frozen=True)
class Question:
    """What is asked of a net: batch sizes with the draws at each, and the bases of the largest batches."""

    subject: SubjectSettings
    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    bases: int
    device: str = "cpu"


def _curve(subject: Subject, question: Question, run: Run, name: str, bases: Callable[[int], int]) -> VarianceCurve:
    points = []
    for n, draws in zip(question.sizes, question.draws, strict=True):
        found = variance_curve(
            subject.net, subject.loss_fn, subject.sample_batch, (n,), (Flipout(bases=bases(n)),), draws,
            parts=subject.parts, micro_batch=256 if question.subject.net == "convgg" else None,
            checkpoint=run.path(f"{name}-{n}.json"),
        )  # fmt: skip
        points += next(iter(found.points.values()))
    return VarianceCurve({name: tuple(points)}, 0.9)


def _added_time(subject: Subject, n: int, counts: Sequence[int], rounds: int) -> dict[int, list[float]]:
    """Seconds of a gradient at N for each number of bases, one a round, in turn."""
    batch = subject.sample_batch(n, torch.Generator().manual_seed(0))
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for i in range(rounds + 1):
        for count in counts:
            with subject.net.using(Flipout(bases=count)), subject.net.hold(n):
                start = time.perf_counter()
                subject.loss_fn(subject.net, batch).backward()
            if i:
                seconds[count].append(time.perf_counter() - start)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures one net, and prints slopes, ratios and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("fc", "convle", "convgg"), required=True)
    parser.add_argument("--bases", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=(1, 16, 128, 1024))
    parser.add_argument("--draws", type=int, nargs="+", default=(160, 100, 60, 30))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args(arguments)
    subject_asked = subject_settings(asked.net, "laptop", data_dir=asked.data_dir)
    question = Question(subject_asked, tuple(asked.sizes), tuple(asked.draws), asked.bases)
    with Run.open(asked.out, "bases", question, resume=(asked.out / "config.json").exists()) as run:
        subject = prepare(question.subject, run, silent)
        curves = _curve(subject, question, run, "flipout", lambda n: 1)
        curves = curves.joined(_curve(subject, question, run, "bases", lambda n: min(n, question.bases)))
        for panel, names in subject.panels.items():
            told = [f"slope {curves.slope('flipout', names)}", f"with bases {curves.slope('bases', names)}"]
            last = question.sizes[-1]
            first = curves.at("flipout", 1, names).value / last
            for name in ("flipout", "bases"):
                told.append(f"{name} over alpha/N at {last}: {curves.at(name, last, names).value / first:.3f}")
            print(panel, "; ".join(told), flush=True)
        counts = (1, min(question.bases, question.sizes[-1]))
        seconds = _added_time(subject, question.sizes[-1], counts, asked.rounds)
        added = statistics.median(b / a for a, b in zip(*(seconds[count] for count in counts), strict=True))
        print(f"a step at N = {question.sizes[-1]} with {counts[1]} bases: {added:.3f} times that with one")


if __name__ == "__main__":
    main()
