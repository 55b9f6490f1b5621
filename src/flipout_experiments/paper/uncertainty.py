"""How honest predictions are: a point estimate, MC dropout, Bayes by Backprop under each estimator, a deep ensemble (on MNIST).

Each net is trained on digits and asked about test digits (accuracy, negative log-likelihood, calibration) and about inputs that it
should find strange: digits on their side, digits under noise, and Fashion-MNIST where it can be had. How well its
predictive entropy tells these from test digits is the AUROC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Normal

from flipout.bayes import (
    Classification,
    accuracy,
    brier_score,
    calibration_error,
    elbo_loss,
    kl_divergence,
    linear_annealing,
    negative_log_likelihood,
    ood_auroc,
    predict,
    require_finite,
)
from flipout.data import Dataset, Examples, fashion_mnist, mnist
from flipout.errors import ArgumentError, NotFiniteError
from flipout.intervals import Estimate, estimate_mean
from flipout.noise import Gaussian
from flipout.perturb import Perturbed
from flipout.streams import stream
from flipout.variance.named import ESTIMATORS
from flipout_experiments.harness.claims import from_json
from flipout_experiments.harness.console import interval
from flipout_experiments.harness.environment import find_device
from flipout_experiments.harness.reproduce import Experiment
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.nets.networks import FullyConnected
from flipout_experiments.nets.pretrain import mean_loss
from flipout_experiments.paper.figures import draw_uncertainty

__all__ = ["EXPERIMENT", "METHODS", "UncertaintySettings", "strange_inputs"]

#: In the order of the tables.
METHODS = ("point", "dropout", "shared", "flipout", "local_reparameterization", "ensemble")
#: Streams of the batches, the noise, the predictions' noise and the strange inputs.
_DATA, _NOISE, _PREDICT, _STRANGE = 30, 31, 32, 33
#: Bins of the calibration error; steps between two checkpoints, and between two looks whether the loss is finite.
_BINS, _SAVE, _LOOK = 15, 500, 50


@dataclass(frozen=True)
class UncertaintySettings:
    """The nets, their training by Adam, and what they are asked.

    Attributes:
        steps, batch, learning_rate: of every training.
        units: of each hidden layer.
        dropout: chance of a hidden unit under MC dropout.
        std: where the posteriors' scales start.
        prior_std: of the normal prior.
        temperature: of the KL, to which it rises over the first half of the training.
        samples: members of each prediction (of MC dropout and the posteriors).
        ensemble: nets in the deep ensemble, the point estimate being the first.
        rotation: quarter turns of the digits on their side.
        noise_std: of the noise on noisy digits.
        train, test: at most so many images; None for all.
        seeds: trainings of every method, from ``seed`` on.
    """

    steps: int = 1000
    batch: int = 256
    learning_rate: float = 2e-3
    units: int = 256
    dropout: float = 0.5
    std: float = 0.03
    prior_std: float = 0.1
    temperature: float = 0.1
    samples: int = 16
    ensemble: int = 5
    rotation: int = 1
    noise_std: float = 0.5
    train: int | None = None
    test: int | None = None
    seeds: int = 3
    confidence: float = 0.9
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None
    download: bool = True

    @classmethod
    def preset(cls, name: str, **options: Any) -> UncertaintySettings:
        """The settings of a preset."""
        if name == "smoke":
            return cls(steps=6, batch=16, units=8, samples=3, ensemble=2, train=200, test=100, seeds=2, download=False, **options)
        if name == "laptop":
            return cls(**options)
        return cls(steps=10_000, units=512, samples=128, seeds=10, **options)


def strange_inputs(digits: Tensor, settings: UncertaintySettings) -> dict[str, Tensor]:
    """What a net trained on digits should be unsure of, made of digits ``[N, 1, 28, 28]``.

    Example:
        >>> found = strange_inputs(torch.zeros(2, 1, 28, 28), UncertaintySettings())
        >>> {name: tuple(images.shape) for name, images in found.items()}
        {'rotated': (2, 1, 28, 28), 'noisy': (2, 1, 28, 28)}
    """
    noise = torch.randn(digits.shape, generator=stream(settings.seed, _STRANGE)).to(digits.device)
    noisy = (digits + settings.noise_std * noise).clamp_(0, 1)
    return {"rotated": digits.rot90(settings.rotation, (-2, -1)), "noisy": noisy}


def _run(settings: UncertaintySettings, run: Run, progress: Progress) -> dict[str, Any]:
    device = find_device(settings.device)
    with run.phase("load-data", progress):
        data, strange = _load(settings)
        data, strange = data.to(device), {name: images.to(device) for name, images in strange.items()}
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for method in METHODS:
            with run.phase(f"{method}-seed{seed}", progress) as report:
                found[method].append(_Seed(settings, data, strange, seed, run, report).judge(method))
    names = list(found["point"][0]["numbers"])
    measured = {
        method: {name: estimate_mean([seed["numbers"][name] for seed in seeds], settings.confidence) for name in names}
        for method, seeds in found.items()
    }
    beyond = {
        method: {name: _beyond(seeds, found["point"], name, settings.confidence) for name in names}
        for method, seeds in found.items()
        if method != "point"
    }
    with run.phase("figure", progress):
        reliability = {method: [each["reliability"] for each in seeds] for method, seeds in found.items()}
        run.figure("uncertainty", draw_uncertainty(measured, reliability))
    return {
        "data": data.source,
        "strange": list(strange),
        "methods": measured,
        "beyond_point": beyond,
        "seeds": {method: [each["numbers"] for each in seeds] for method, seeds in found.items()},
        "reliability": reliability,
    }


def _load(settings: UncertaintySettings) -> tuple[Dataset, dict[str, Tensor]]:
    where: Any = {"data_dir": settings.data_dir, "download": settings.download}
    data = mnist(settings.seed, **where)
    train, test = (
        Examples(each.inputs[:most], each.labels[:most])
        for each, most in ((data.train, settings.train), (data.test, settings.test))
    )
    strange = strange_inputs(test.inputs, settings)
    try:
        strange["fashion"] = fashion_mnist(**where).test.inputs[: len(test)]
    except ArgumentError:  # neither the folder nor any package has it: digits in disguise are left
        return Dataset(data.name, data.source, train, test), strange
    return Dataset(data.name, data.source, train, test), strange


@dataclass(frozen=True)
class _Seed:
    """One seed's nets: trained, then asked."""

    settings: UncertaintySettings
    data: Dataset
    strange: Mapping[str, Tensor]
    seed: int
    run: Run
    report: Callable[[int, int], None]

    def judge(self, method: str) -> dict[str, Any]:
        """What a method's predictions are worth; out of a checkpoint if they were judged before."""
        name = f"judged-{method}-seed{self.seed}"
        done = self.run.load_checkpoint(name)
        if done is None:
            done = self._judge(method)
            numbers = {number.replace(" ", "_"): value for number, value in done["numbers"].items()}
            self.run.log(step=self.settings.steps, method=method, **numbers)
            self.run.save_checkpoint(name, done)
        return done

    def _judge(self, method: str) -> dict[str, Any]:
        labels = self.data.test.labels
        found = self._predict(method, self.data.test.inputs)
        numbers = {
            "accuracy": accuracy(found, labels),
            "nll": negative_log_likelihood(found, labels),
            "ece": calibration_error(found, labels, _BINS),
            "brier": brier_score(found, labels),
        }
        for name, images in self.strange.items():
            numbers[f"auroc {name}"] = ood_auroc(found.entropy, self._predict(method, images).entropy)
        return {"numbers": numbers, "reliability": _reliability(found, labels)}

    def _predict(self, method: str, images: Tensor) -> Classification:
        """Predictions of test digits or strange inputs, each under the same weights."""
        device, blocks = images.device, images.split(1000)
        if method in ("point", "ensemble"):
            count = 1 if method == "point" else self.settings.ensemble
            nets = [self.train("point", index) for index in range(count)]
            with torch.no_grad():
                return Classification.of(torch.stack([torch.cat([net(b).softmax(1) for b in blocks]) for net in nets]), keep=False)
        net = self.train(method)
        if isinstance(net, Perturbed):
            generator = stream(self.seed, _PREDICT, device=device)
            found: Classification = predict(net, images, self.settings.samples, generator=generator, keep_samples=False)
            return found
        members = []
        with torch.no_grad(), _dropping(net, stream(self.seed, _PREDICT, device=device)):
            for _ in range(self.settings.samples):
                members.append(torch.cat([net(block).softmax(1) for block in blocks]))
        return Classification.of(torch.stack(members), keep=False)

    def train(self, method: str, index: int = 0) -> nn.Module:
        """The trained net, out of its checkpoint if it is there. Every step has streams of its own, so a killed run can go on."""
        settings, name = self.settings, f"{method}{index or ''}-seed{self.seed}"
        device = self.data.train.inputs.device
        key = METHODS.index(method), index
        net = self._net(method, index).to(device)
        optimiser = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
        state = self.run.load_checkpoint(name) or {"step": 0}
        if state["step"]:
            net.load_state_dict(state["net"])
            if state["step"] < settings.steps:
                optimiser.load_state_dict(state["optimiser"])
        for step in range(state["step"], settings.steps):
            batch = self.data.train.sample(settings.batch, stream(self.seed, _DATA, index, step))
            optimiser.zero_grad()
            self._loss(net, batch, step, stream(self.seed, _NOISE, *key, step, device=device)).backward()
            optimiser.step()
            done = step + 1
            if done % _SAVE == 0 and done < settings.steps:
                self.run.save_checkpoint(name, {"step": done, "net": net.state_dict(), "optimiser": optimiser.state_dict()})
            self.report(done, settings.steps)
        if state["step"] < settings.steps:
            self.run.save_checkpoint(name, {"step": settings.steps, "net": net.state_dict()})
        return net.eval()

    def _net(self, method: str, index: int) -> nn.Module:
        settings = self.settings
        module = FullyConnected(stream(self.seed, 0, index), settings.units, settings.dropout if method == "dropout" else 0.0)
        if method in ("point", "dropout"):
            return module
        return Perturbed(module, Gaussian(settings.std, learnable=True), ESTIMATORS[method]())

    def _loss(self, net: nn.Module, batch: tuple[Tensor, Tensor], step: int, generator: torch.Generator) -> Tensor:
        settings = self.settings
        if not isinstance(net, Perturbed):
            with _dropping(net, generator):
                loss = mean_loss(net, batch)
            if self._looks(step):
                _require_finite(loss, step)
            return loss
        with net.hold(settings.batch, generator):
            nll = mean_loss(net, batch)
        temperature = settings.temperature * linear_annealing(step, max(1, settings.steps // 2))
        loss = elbo_loss(nll, kl_divergence(net, Normal(0.0, settings.prior_std)), len(self.data.train), temperature).loss
        if self._looks(step):
            require_finite(net, loss)
        return loss

    def _looks(self, step: int) -> bool:
        """Whether the loss of a step is looked at: of every so many, and of the last before a checkpoint."""
        return step % _LOOK == 0 or (step + 1) % _SAVE == 0 or step + 1 == self.settings.steps


def _require_finite(loss: Tensor, step: int) -> None:
    if not bool(loss.isfinite()):
        raise NotFiniteError(f"the loss is {float(loss.detach())} after {step} steps: lower the learning rate")


@contextmanager
def _dropping(net: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Dropout on, with masks from a generator, then evaluation mode."""
    assert isinstance(net, FullyConnected)
    try:
        net.train()
        net.dropout_generator = generator
        yield
    finally:
        net.eval()
        net.dropout_generator = None


def _reliability(found: Classification, labels: Tensor) -> list[list[float]]:
    """Examples, mean confidence and accuracy of each bin that is not empty."""
    confidence, chosen = found.mean.max(1)
    place = (confidence * _BINS).long().clamp_(0, _BINS - 1)
    rows = []
    for index in range(_BINS):
        here = place == index
        if bool(here.any()):
            rows.append([float(here.sum()), float(confidence[here].mean()), float((chosen == labels)[here].float().mean())])
    return rows


def _beyond(method: Sequence[Mapping[str, Any]], point: Sequence[Mapping[str, Any]], name: str, confidence: float) -> Estimate:
    """The mean difference to the point estimate, seed by seed."""
    return estimate_mean([a["numbers"][name] - b["numbers"][name] for a, b in zip(method, point, strict=True)], confidence)


def _show(result: dict[str, Any], console: Console) -> None:
    console.print(f"\ndata: {result['data']}; strange inputs: {', '.join(result['strange'])}\n", highlight=False)
    titles = {
        "methods": "Test digits, and strange inputs told from them by entropy",
        "beyond_point": "Beyond the point estimate, seed by seed",
    }
    for key, title in titles.items():
        table = Table(title=title, title_justify="left")
        names = list(next(iter(result[key].values())))
        for column in ("method", *names):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method, numbers in result[key].items():
            told = method.replace("local_reparameterization", "LRT")
            table.add_row(told, *(interval(from_json(numbers[name])) for name in names))
        console.print(table)


EXPERIMENT = Experiment(UncertaintySettings.preset, _run, _show)
