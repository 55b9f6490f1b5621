"""The demonstration: how the variance of a gradient falls with the batch, for three ways of sharing noise.

A plain net is trained until it is neither trivial nor converged. Then its weights are made random, and gradients of fresh batches
under fresh noise are drawn again and again at each batch size N. With independent noise the variance falls as 1/N. With one
perturbation shared by the batch it levels off. Flipout shares one too, and falls as 1/N all the same.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipout.data import Dataset, embedded_mnist
from flipout.errors import ArgumentError
from flipout.gradients import micro_batches, rows_at_once
from flipout.noise import MultiplicativeGaussian
from flipout.perturb import Perturbed
from flipout.storage.files import make_folder, write_json
from flipout.streams import stream
from flipout.variance import ESTIMATORS, EstimatorVariance, gradient_variance
from flipout_experiments.harness.environment import describe_environment, find_device
from flipout_experiments.nets.networks import FullyConnected
from flipout_experiments.paper.demo_figure import draw_demo
from flipout_experiments.paper.demo_result import DemoResult, DemoSettings, TrainingRun
from flipout_experiments.paper.variance.independent_members import independent_curve

__all__ = ["DemoResult", "DemoSettings", "TrainingRun", "run_demo", "save_result"]

#: Tells a progress display that so many of so many steps of a phase are done.
Progress = Callable[[str, int, int], None]


def run_demo(settings: DemoSettings, progress: Progress = lambda phase, done, total: None) -> DemoResult:
    """Runs the demonstration.

    Args:
        settings: what to run.
        progress: called with the name of a phase and how many of how many of its steps are done.

    Raises:
        ArgumentError: if the device is not there or the embedded data cannot be read.
    """
    device = find_device(settings.device)
    result = DemoResult(settings, describe_environment(device), source="")
    with _timed(result, "load data", progress):
        data = embedded_mnist(settings.seed).to(device)
    result.source = data.source
    module = FullyConnected(stream(settings.seed, 0)).to(device)
    with _timed(result, "pre-train", progress):
        result.pretraining = _pretrain(module, data, settings, lambda done, of: progress("pre-train", done, of))
    net = Perturbed(module, MultiplicativeGaussian(settings.std), include="*weight")
    for name in ("shared", "flipout", "independent"):
        with _timed(result, f"variance: {name}", progress) as count:
            result.curves[name] = _curve(net, data, name, settings, count)
    for name in ("shared", "flipout", "independent"):
        with _timed(result, f"training: {name}", progress) as count:
            result.training[name] = _train(module, data, name, settings, count)
    return result


def save_result(result: DemoResult, folder: Path) -> list[Path]:
    """Writes ``result.json``, ``demo.png`` and ``demo.svg`` into a folder, and what ``flipout report`` reads of one.

    A result that is there is replaced: the demonstration has no checkpoints, and goes on with nothing.

    Raises:
        ArgumentError: if ``folder`` exists and is not a folder.
        SaveError: if it cannot be made, or a file cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; name a folder for the results")
    make_folder(folder / "figures")
    found = result.as_dict()
    paths = [folder / "result.json", folder / "demo.png", folder / "demo.svg"]
    write_json(folder / "config.json", {"experiment": "demo", "preset": None, "settings": found["settings"]})
    write_json(folder / "environment.json", result.environment)
    figure = draw_demo(result)
    for path in paths[1:]:
        figure.savefig(path)
    shutil.copyfile(paths[2], folder / "figures" / "demo.svg")
    write_json(paths[0], found)  # last: it says that the run is finished
    return paths


def loss_function(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch of images, in nats."""
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels)


def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The fraction of examples that the net classifies rightly."""
    with torch.no_grad():
        return float((net(inputs).argmax(1) == labels).float().mean())


def _pretrain(module: nn.Module, data: Dataset, settings: DemoSettings, report: Callable[[int, int], None]) -> dict[str, float]:
    """Gradient descent without noise until the training accuracy is reached; reports the accuracy in per cent."""
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = stream(settings.seed, 1)
    steps, reached = 0, 0.0
    while reached < settings.accuracy and steps < 1000:
        loss = loss_function(module, data.train.sample(64, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
        if steps % 5 == 0:
            reached = accuracy(module, data.train.inputs, data.train.labels)
            report(int(100 * min(reached, settings.accuracy)), round(100 * settings.accuracy))
    tested = accuracy(module, data.test.inputs, data.test.labels)
    return {"steps": steps, "train_accuracy": reached, "test_accuracy": tested}


def _curve(
    net: Perturbed, data: Dataset, name: str, settings: DemoSettings, count: Callable[[int], None]
) -> list[EstimatorVariance]:
    sizes = settings.batch_sizes
    if name == "independent":
        total, pairs = 2 * settings.independent_pairs * sizes[-1], settings.independent_pairs
        return independent_curve(
            net, loss_function, data.train.sample, sizes, pairs, seed=settings.seed, confidence=settings.confidence,
            on_member=lambda: count(total),
        )  # fmt: skip
    draws = settings.shared_draws if name == "shared" else settings.flipout_draws
    curve = []
    for size in sizes:
        found = gradient_variance(
            net, loss_function, data.train.sample, size, [name], draws, seed=settings.seed, confidence=settings.confidence,
            on_draw=lambda: count(draws * len(sizes)),
        )  # fmt: skip
        curve.append(found[name])
    return curve


def _train(module: nn.Module, data: Dataset, name: str, settings: DemoSettings, count: Callable[[int], None]) -> TrainingRun:
    """One run from the frozen net on, with noise; all estimators meet the same batches."""
    started = time.perf_counter()
    device = data.train.labels.device
    batches, noise = stream(settings.seed, 2), stream(settings.seed, 3, device=device)
    net = Perturbed(copy.deepcopy(module), MultiplicativeGaussian(settings.std), ESTIMATORS[name](), include="*weight")
    optimiser = torch.optim.SGD(net.parameters(), lr=settings.learning_rate)
    losses = []
    rows = rows_at_once(net, settings.training_batch, micro_batch=None)
    for _ in range(settings.training_steps):
        inputs, labels = data.train.sample(settings.training_batch, batches)
        parts = iter(zip(inputs.split(rows), labels.split(rows), strict=True))
        optimiser.zero_grad()
        total = 0.0
        for _ in micro_batches(net, settings.training_batch // rows, rows, noise):
            loss = loss_function(net, next(parts)) * (rows / settings.training_batch)
            loss.backward()
            total += loss.item()
        optimiser.step()
        losses.append(total)
        count(settings.training_steps)
    tested = accuracy(net.eval(), data.test.inputs, data.test.labels)
    return TrainingRun(losses, tested, time.perf_counter() - started)


@contextmanager
def _timed(result: DemoResult, phase: str, progress: Progress) -> Iterator[Callable[[int], None]]:
    """Reports a phase to the progress display and its wall time to the result; yields a counter of its steps."""
    done, started = 0, time.perf_counter()

    def count(of: int) -> None:
        nonlocal done
        done += 1
        progress(phase, done, of)

    progress(phase, 0, 1)
    yield count
    result.seconds[phase] = time.perf_counter() - started
    if not done:
        progress(phase, 1, 1)
