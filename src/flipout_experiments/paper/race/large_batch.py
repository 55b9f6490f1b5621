"""Large batches (Wen et al. 2018, Sec. 4.3, Figures 2a and 4, Appendix E.4): how much sooner a net trains if noise averages out.

The same net starts from the same weights and sees the same batches under shared noise, flipout and, where it is unbiased, local
reparameterisation. What is measured is how many iterations, and how many seconds, each takes to a given training loss: the mean
negative log-likelihood of the mini-batch under its own noise, without the KL, averaged over the last few steps.

Seconds are iterations times the median time of a step, over those steps in which the estimators took turns; the time that the steps
really took is told as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributions import Normal

from flipout.data import Dataset, Text, mnist, penn_treebank, text_batches
from flipout.noise import DropConnect, Gaussian, MultiplicativeGaussian, Noise
from flipout.perturb import Perturbed
from flipout.streams import stream
from flipout.variance.named import ESTIMATORS
from flipout_experiments.harness.environment import find_device
from flipout_experiments.harness.reproduce import Experiment
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.nets.networks import ConvLe, FullyConnected, TiedLSTM, count_parameters
from flipout_experiments.nets.pretrain import mean_loss, token_loss
from flipout_experiments.paper.figures import draw_races
from flipout_experiments.paper.race.lanes import Lane, Objective, RaceSettings, race
from flipout_experiments.paper.race.outcome import claim_races, show_races, summarize

__all__ = ["EXPERIMENT", "LargeBatchSettings", "NoiseSettings"]


@dataclass(frozen=True)
class NoiseSettings:
    """A law of the weights.

    Attributes:
        kind: ``bbb`` (Bayes by Backprop: a Gaussian posterior with learnable scales that start at ``std``, and a standard normal
            prior), ``multiplicative`` (Gaussian, relative to the weight) or ``dropconnect`` (p = 0.5).
        std: of the first two.
        temperature: of the KL of ``bbb``; the paper's 1/10.
    """

    kind: str
    std: float = 1.0
    temperature: float = 0.1

    @property
    def label(self) -> str:
        return self.kind if self.kind != "multiplicative" else f"{self.kind}-{self.std:g}"

    def build(self) -> Noise:
        if self.kind == "bbb":
            return Gaussian(self.std, learnable=True)
        return MultiplicativeGaussian(self.std) if self.kind == "multiplicative" else DropConnect(0.5)


@dataclass(frozen=True)
class LargeBatchSettings:
    """The net, its noises and the races.

    Attributes:
        net: ``fc``, ``convle`` or ``lstm``.
        noises: each a race of its own for every seed.
        race: how it is run.
        estimators: that race; local reparameterisation is left out where it would be biased.
        seeds: races of each noise, from ``seed`` on.
        width: of FC and ConvLe, relative to the paper's.
        level: tokens of the LSTM: words or characters.
        layers, embedding, units: of the LSTM.
        window: tokens of one example of the LSTM's.
        dropout: of the LSTM, embedding and output.
    """

    net: str
    noises: tuple[NoiseSettings, ...]
    race: RaceSettings
    estimators: tuple[str, ...]
    seeds: int
    width: float = 1.0
    level: str = "word"
    layers: int = 3
    embedding: int = 400
    units: int = 1150
    window: int = 70
    dropout: tuple[float, float] = (0.1, 0.4)
    confidence: float = 0.9
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None
    download: bool = True

    @classmethod
    def preset(
        cls, name: str, net: str, noise: str, seed: int = 0, device: str = "cpu", data_dir: Path | None = None
    ) -> LargeBatchSettings:
        """The settings of a preset. The noise ``auto`` is the paper's for the net: ``dropconnect`` for the LSTM, else ``bbb``."""
        kind = ("dropconnect" if net == "lstm" else "bbb") if noise == "auto" else noise
        noises = {
            "bbb": (NoiseSettings("bbb", 0.05),),
            "multiplicative": (NoiseSettings("multiplicative", 1.0), NoiseSettings("multiplicative", 0.5)),
            "dropconnect": (NoiseSettings("dropconnect"),),
        }[kind]
        estimators = ("shared", "flipout", "local_reparameterization")[: 3 if net == "fc" and kind != "dropconnect" else 2]
        common: Any = {"net": net, "noises": noises, "estimators": estimators, "seed": seed, "device": device, "data_dir": data_dir}
        full = _PAPER[net]
        if name == "paper":
            return cls(race=full, seeds=5, **common)
        if name == "smoke":
            short = replace(full, batch=32, targets=(10.0, 1e-3), steps=4, window=2, test_every=2, save_every=2, micro_batch=16)
            return cls(race=short, seeds=2, width=1 / 16, level="char", embedding=4, units=6, window=5, download=False, **common)
        if net == "lstm":
            lstm: Any = {"level": "char", "layers": 1, "embedding": 96, "units": 96, "window": 16, "dropout": (0.0, 0.0)}
            return cls(race=_LAPTOP["lstm"], seeds=3, **lstm, **common)
        if net == "convle":
            return cls(race=_LAPTOP["convle"], seeds=3, width=0.25, **common)
        race = _LAPTOP["fc"] if kind == "bbb" else replace(_LAPTOP["fc"], steps=160)
        return cls(race=race, seeds=3, **{**common, "estimators": estimators if kind == "bbb" else estimators[:2]})


#: Under ``paper``: Adam's 0.003 is Appendix E.2's, the LSTM's 0.001 E.4's.
_PAPER = {
    "fc": RaceSettings(8192, 0.003, (0.5, 0.2, 0.1, 0.05), 30_000, test_every=100, save_every=500),
    "convle": RaceSettings(8192, 0.003, (0.5, 0.2, 0.1, 0.05), 30_000, test_every=100, save_every=500, micro_batch=2048),
    "lstm": RaceSettings(8192, 0.001, (5.5, 5.0, 4.5), 50_000, test_every=100, save_every=500, clip=0.25, micro_batch=512),
}
#: Under ``laptop``: smaller nets but for FC, and batches that still show what happens at 8192.
_LAPTOP = {
    "fc": RaceSettings(8192, 0.003, (0.5, 0.2, 0.1), 800),
    "convle": RaceSettings(1024, 0.003, (0.5, 0.2, 0.1), 400),
    "lstm": RaceSettings(1024, 0.01, (2.5, 2.3, 2.1), 300, clip=0.25),
}


def _run(settings: LargeBatchSettings, run: Run, progress: Progress) -> dict[str, Any]:
    device = find_device(settings.device)
    with run.phase("load-data", progress):
        data = _load(settings)
    moved: Any = data.to(device)
    races: list[dict[str, Any]] = []
    for noise in settings.noises:
        lanes: dict[str, list[Lane]] = {name: [] for name in settings.estimators}
        for index in range(settings.seeds):
            seed = settings.seed + index
            with run.phase(f"{noise.label}-seed{seed}", progress) as report:
                nets = {name: _net(settings, noise, name, data, seed).to(device) for name in settings.estimators}
                sample, test, objective = _task(settings, noise, moved)
                found = race(nets, objective, sample, test, settings.race, seed, run, f"{noise.label}-seed{seed}", report)
            for name, lane in found.items():
                lanes[name].append(lane)
        races.append({"noise": noise.label, **summarize(lanes, settings.race, settings.confidence)})
    measure = "perplexity" if settings.net == "lstm" else "test error"
    with run.phase("figure", progress):
        run.figure("large-batch", draw_races(races, settings.net, measure, settings.race.targets))
    parameters = count_parameters(_module(settings, data, settings.seed))
    return {"data": data.source, "parameters": parameters, "measure": measure, "races": races}


def _load(settings: LargeBatchSettings) -> Dataset | Text:
    where: Any = {"data_dir": settings.data_dir, "download": settings.download}
    return penn_treebank(settings.level, **where) if settings.net == "lstm" else mnist(settings.seed, **where)


def _module(settings: LargeBatchSettings, data: Dataset | Text, seed: int) -> nn.Module:
    generator = stream(seed, 0)
    if isinstance(data, Text):
        return TiedLSTM(generator, len(data.vocabulary), settings.embedding, settings.units, settings.layers, *settings.dropout)
    if settings.net == "fc":
        return FullyConnected(generator, round(512 * settings.width))
    return ConvLe(generator, settings.width)


def _net(settings: LargeBatchSettings, noise: NoiseSettings, estimator: str, data: Dataset | Text, seed: int) -> Perturbed:
    include = "lstms.*weight*" if settings.net == "lstm" else "*" if noise.kind == "bbb" else "*weight"
    return Perturbed(_module(settings, data, seed), noise.build(), ESTIMATORS[estimator](), include=include)


def _task(
    settings: LargeBatchSettings, noise: NoiseSettings, data: Any
) -> tuple[Callable[..., Any], Callable[..., float], Objective]:
    """How to draw a batch, how to test, and what to minimise."""
    prior = Normal(0.0, 1.0) if noise.kind == "bbb" else None
    if isinstance(data, Text):
        window = settings.window
        pieces = text_batches(data.test, min(64, len(data.test) // (window + 1)), window)[:20]
        objective = Objective(token_loss, prior, len(data.train) // window, noise.temperature)
        return (lambda n, g: data.sample(n, window, g)), (lambda net: _perplexity(net, pieces)), objective
    objective = Objective(mean_loss, prior, len(data.train), noise.temperature)
    return data.train.sample, (lambda net: _error(net, data.test)), objective


def _error(net: nn.Module, examples: Any) -> float:
    """The fraction of examples that the mean weights classify wrongly."""
    with torch.no_grad():
        parts = zip(examples.inputs.split(2000), examples.labels.split(2000), strict=True)
        wrong = sum(int((net(inputs).argmax(1) != labels).sum()) for inputs, labels in parts)
    return wrong / len(examples)


def _perplexity(net: nn.Module, pieces: Sequence[Any]) -> float:
    """Of the mean weights, without dropout."""
    before = net.training
    try:
        net.eval()
        with torch.no_grad():
            losses = [float(token_loss(net, piece)) for piece in pieces]
    finally:
        net.train(before)
    return math.exp(sum(losses) / len(losses))


EXPERIMENT = Experiment(LargeBatchSettings.preset, _run, show_races, claim_races)
