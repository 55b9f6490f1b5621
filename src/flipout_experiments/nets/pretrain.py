"""Training a net until it is neither trivial nor converged, for measurements on it (the paper's appendix C).

The paper leaves open whether its nets were trained with their noise. Here either is done: with noise, under flipout, the net is one
that a user of that noise would have, and its accuracy is that of its noisy predictions; without, it meets the noise unprepared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipout.data import Examples, Text
from flipout.errors import ArgumentError
from flipout.perturb import Perturbed
from flipout.streams import stream

__all__ = ["Pretraining", "PretrainingSettings", "mean_loss", "pretrain_classifier", "pretrain_language_model", "token_loss"]

#: Streams of the batches, of the noise, and of the noise under which accuracy is told.
_DATA, _NOISE, _CHECK = 10, 11, 12
#: Training examples on which accuracy is told, and steps between two tellings.
_JUDGED, _EVERY = 2000, 10


@dataclass(frozen=True)
class PretrainingSettings:
    """How a net is pre-trained, by Adam.

    Attributes:
        noisy: whether with its noise.
        accuracy: of classifiers, on training images, at which training ends; None runs all steps.
        steps: at most so many (language models: exactly).
        batch: examples in a step.
        learning_rate: of Adam.
        clip: the largest norm of a gradient; None for no bound.
    """

    noisy: bool
    accuracy: float | None
    steps: int
    batch: int
    learning_rate: float
    clip: float | None = None


@dataclass(frozen=True)
class Pretraining:
    """What a pre-training reached.

    Attributes:
        steps: that it took.
        seconds: of this process.
        measures: ``accuracy`` and ``accuracy_of_means`` on training images, or ``perplexity`` of the mean weights on the validation
            split.
    """

    steps: int
    seconds: float
    measures: dict[str, float]


Save = Callable[[dict[str, Any]], None]
Load = Callable[[], dict[str, Any] | None]
Report = Callable[[int, int], None]


def mean_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch of labelled examples, in nats."""
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels)


def token_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token over all tokens of a batch of sequences ``[N, T]``, in nats."""
    tokens, targets = batch
    return F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())


def pretrain_classifier(
    net: Perturbed,
    examples: Examples,
    settings: PretrainingSettings,
    seed: int = 0,
    save: Save = lambda state: None,
    load: Load = lambda: None,
    report: Report = lambda done, total: None,
) -> Pretraining:
    """Trains until the accuracy on the first 2,000 training images is reached, told every ten steps.

    Every step has streams of its own for its batch and its noise, so the saved state (weights, Adam's moments, the step) is all
    that a run needs to go on as if it had never stopped.

    Args:
        net: the net with its noise.
        examples: to train on.
        settings: how.
        seed: of batches and noise.
        save, load: a checkpoint's; ``save`` is called every so often, ``load`` once.
        report: progress, of the accuracy in per cent.

    Raises:
        ArgumentError: if the loss is not finite, or the accuracy is not reached in the steps allowed.
    """
    judged = examples.inputs[:_JUDGED], examples.labels[:_JUDGED]
    reached = 0.0

    def enough(step: int) -> bool:
        nonlocal reached
        if settings.accuracy is None or step % _EVERY:
            return False
        reached = _accuracy(net, judged, settings.noisy, stream(seed, _CHECK, step))
        report(round(100 * min(reached, settings.accuracy)), round(100 * settings.accuracy))
        return reached >= settings.accuracy

    began = time.perf_counter()
    sample = examples.sample
    step = _train(net, lambda n, g: sample(n, g), mean_loss, settings, seed, save, load, enough, lambda step: None)
    if settings.accuracy is not None and reached < settings.accuracy:
        raise ArgumentError(
            f"after {step} steps the accuracy is {reached:.3f}, not yet {settings.accuracy}: allow more steps, or ask for less"
        )
    accuracy = _accuracy(net, judged, settings.noisy, stream(seed, _CHECK, step))
    means = _accuracy(net, judged, False, stream(seed, _CHECK, step))
    return Pretraining(step, time.perf_counter() - began, {"accuracy": accuracy, "accuracy_of_means": means})


def pretrain_language_model(
    net: Perturbed,
    text: Text,
    window: int,
    settings: PretrainingSettings,
    seed: int = 0,
    save: Save = lambda state: None,
    load: Load = lambda: None,
    report: Report = lambda done, total: None,
) -> Pretraining:
    """Trains on random windows of ``window`` tokens for the steps asked for; arguments otherwise as :func:`pretrain_classifier`.

    Raises:
        ArgumentError: if the loss is not finite, or the text is shorter than a window.
    """
    began = time.perf_counter()
    step = _train(
        net, lambda n, g: text.sample(n, window, g), token_loss, settings, seed, save, load, lambda step: False,
        lambda step: report(step, settings.steps),
    )  # fmt: skip
    valid = Text(text.name, text.source, text.level, text.vocabulary, {"train": text.valid})
    with torch.no_grad(), _means(net):
        losses = [float(token_loss(net, valid.sample(settings.batch, window, stream(seed, _CHECK, i)))) for i in range(5)]
    return Pretraining(step, time.perf_counter() - began, {"perplexity": math.exp(sum(losses) / len(losses))})


def _train(
    net: Perturbed,
    sample: Callable[[int, torch.Generator], Any],
    loss_function: Callable[[nn.Module, Any], Tensor],
    settings: PretrainingSettings,
    seed: int,
    save: Save,
    load: Load,
    enough: Callable[[int], bool],
    after: Callable[[int], None],
) -> int:
    """Runs the steps, and returns how many they were."""
    optimiser = torch.optim.Adam(net.module.parameters(), lr=settings.learning_rate)
    step = 0
    if (state := load()) is not None:
        net.module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    device = next(net.module.parameters()).device
    while step < settings.steps and not (step and enough(step)):
        batch = sample(settings.batch, stream(seed, _DATA, step))
        with _noise(net, settings.noisy, settings.batch, stream(seed, _NOISE, step, device=device)):
            loss = loss_function(net, batch)
        optimiser.zero_grad()
        loss.backward()
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(net.module.parameters(), settings.clip)
        optimiser.step()
        step += 1
        after(step)
        if step % 50 == 0:
            _require_finite(loss, step)
            save({"module": net.module.state_dict(), "optimiser": optimiser.state_dict(), "step": step})
        elif step == settings.steps:
            _require_finite(loss, step)
    optimiser.zero_grad()
    if step >= settings.steps:
        enough(step)
    return step


def _require_finite(loss: Tensor, step: int) -> None:
    if not math.isfinite(value := float(loss.detach())):
        raise ArgumentError(f"the loss is {value} after {step} steps: lower the learning rate or the noise")


def _accuracy(net: Perturbed, judged: tuple[Tensor, Tensor], noisy: bool, generator: torch.Generator) -> float:
    """The fraction of examples that are classified rightly, 500 at a time."""
    right = 0
    device = next(net.module.parameters()).device
    with torch.no_grad():
        for inputs, labels in zip(judged[0].split(500), judged[1].split(500), strict=True):
            own = stream(int(torch.randint(2**31, (), generator=generator)), device=device)
            with _noise(net, noisy, len(inputs), own):
                right += int((net(inputs).argmax(1) == labels).sum())
    return right / len(judged[1])


@contextmanager
def _noise(net: Perturbed, noisy: bool, rows: int, generator: torch.Generator) -> Iterator[None]:
    if noisy:
        with net.hold(rows, generator):
            yield
    else:
        with _means(net):
            yield


@contextmanager
def _means(net: Perturbed) -> Iterator[None]:
    """The mean weights: the net in evaluation mode. (None of the paper's nets behaves otherwise in it.)"""
    before = net.training
    try:
        net.eval()
        yield
    finally:
        net.train(before)
