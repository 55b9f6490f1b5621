"""Slices of the paper's own settings: Figure 1 at its largest batches, and the language models of Tables 2 and 3."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.tables import table
from flipout.data import penn_treebank
from flipout.estimators import Flipout, Shared
from flipout.regularize import Regularized
from flipout.variance import variance_curve
from flipout_experiments.harness.run import Run, silent
from flipout_experiments.language.models import build_model
from flipout_experiments.language.settings import METHODS, PAPER, RegularizationSettings
from flipout_experiments.language.training import train_language_model
from flipout_experiments.paper.variance.subjects import prepare, subject_settings

__all__ = ["language", "variance"]


class _Part:
    """A run under whose names a part of it writes: one folder holds several nets."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name

    def phase(self, name: str, progress: Any = silent) -> Any:
        return self._run.phase(f"{self._name}-{name}", progress)

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        return self._run.load_checkpoint(f"{self._name}-{name}")

    def save_checkpoint(self, name: str, state: Any) -> None:
        self._run.save_checkpoint(f"{self._name}-{name}", state)

    def path(self, name: str) -> Path:
        return self._run.path(f"{self._name}-{name}")


def variance(net: str, device: torch.device, quick: bool, run: Run, data_dir: Path | None) -> list[dict[str, Any]]:
    """Figure 1: slopes and the variance at the largest N, under shared noise, flipout, and flipout with bases."""
    preset = "smoke" if quick else "paper"
    settings = replace(subject_settings(net, preset, device=str(device), data_dir=data_dir), download=False)
    part: Any = _Part(run, net)
    subject = prepare(settings, part, silent)
    sizes, draws = ((1, 8), (8, 8)) if quick else ((1, 64, 1024, 8192), (400, 200, 100, 100))
    bases = 4 if quick else 64
    last = sizes[-1]
    asked: dict[str, tuple[Any, tuple[int, ...], Any]] = {
        "shared": (Shared(), sizes, draws),
        "flipout": (Flipout(), sizes, draws),
        "bases": (Flipout(bases=bases), (last,), draws[-1]),
    }
    curves = {}
    for name, (estimator, at, count) in asked.items():
        with part.phase(name):
            curves[name] = variance_curve(
                subject.net, subject.loss_fn, subject.sample_batch, at, (estimator,), count, parts=subject.parts,
                micro_batch=1024 if net == "convgg" else None, checkpoint=part.path(f"{name}.json"),
            )  # fmt: skip
    rows: list[list[object]] = []
    for panel, names in subject.panels.items():
        ideal = curves["flipout"].at("flipout", 1, names).value / last
        row: list[object] = [panel, str(curves["shared"].slope("shared", names)), str(curves["flipout"].slope("flipout", names))]
        row += [next(iter(curve.points.values()))[-1].of(names).value / ideal for curve in curves.values()]
        rows.append(row)
    header = ["layer", "slope, shared", "slope, flipout", *(f"{n} / (α/N)" for n in ("shared", "flipout", f"{bases} bases"))]
    return [table(f"Figure 1, {net}, up to N = {last} ({subject.record['data']})", header, rows)]


def language(level: str, method: str, device: torch.device, quick: bool, data_dir: Path | None) -> list[dict[str, Any]]:
    """One epoch of a method of Table 2 or 3 at the paper's size: its loss and speed, beside what the paper reaches in the end."""
    settings = RegularizationSettings.preset("smoke" if quick else "paper", level, method)
    data = penn_treebank(level, data_dir=data_dir, download=False)
    training = replace(settings.training, epochs=1)
    net = Regularized(build_model(settings.model, len(data.vocabulary), training.window, 0).to(device), METHODS[level][method])
    tokens, held = (split[: 2_000 if quick else None].to(device) for split in (data.train, data.valid))
    began = time.perf_counter()
    found = train_language_model(net, tokens, held[: 1_000 if quick else 50_000], training)
    seconds = time.perf_counter() - began
    rows = [[method, found.steps, seconds, found.steps / seconds, found.valid[0], PAPER[level].get(method, ("–",))[0]]]
    header = ["method", "steps", "seconds", "steps a second", "validation, nats a token", "the paper's, when trained to the end"]
    return [table(f"Table {2 if level == 'char' else 3}, one epoch", header, rows)]
