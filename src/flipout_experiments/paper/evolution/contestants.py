"""Training a classifier by evolution or by backpropagation, resumably, with the training loss as it falls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipout.data import Dataset, Examples
from flipout.errors import NotFiniteError
from flipout.estimators import Flipout, Independent
from flipout.evolution import EvolutionStrategy, Members
from flipout.streams import stream
from flipout_experiments.nets.networks import ConvLe, linear

__all__ = ["Contestant", "Problem", "make_net", "test_accuracy", "train"]

#: Streams of the initial weights and of the batches.
_WEIGHTS, _BATCHES = 20, 21
#: Updates between two checkpoints, training examples on which the loss is told, and rows that run at once.
_EVERY, _JUDGED, _ROWS = 10, 2000, 16_384


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        net: ``fc`` (784-width-width-10) or ``convle``.
        width: hidden units of FC; the filter scale of ConvLe.
        examples: in the batch of an update, which all members see.
        updates: of the weights.
        judge_every: updates between two evaluations of the training loss.
    """

    net: str
    width: float
    examples: int
    updates: int
    judge_every: int


@dataclass(frozen=True)
class Contestant:
    """How it is trained.

    Attributes:
        method: ``flipes``, ``ideales`` (independent Gaussian perturbations) or ``backprop``.
        samples: members a generation; none for backprop.
        std: of the perturbations.
        learning_rate: of Adam.
        members_per_base: of FlipES; the paper's is 40.
        base: law of the base perturbations.
    """

    method: str
    samples: int
    std: float
    learning_rate: float
    members_per_base: int | None = None
    base: str = "rademacher"


def make_net(problem: Problem, seed: int) -> nn.Module:
    """The net with its initial weights."""
    generator = stream(seed, _WEIGHTS)
    if problem.net == "convle":
        return ConvLe(generator, problem.width)
    width = int(problem.width)
    layers: list[nn.Module] = []
    for inputs, outputs in ((784, width), (width, width), (width, 10)):
        layers += [linear(inputs, outputs, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    problem: Problem,
    contestant: Contestant,
    data: Dataset,
    seed: int,
    *,
    load: Callable[[], dict[str, Any] | None],
    save: Callable[[dict[str, Any]], None],
    log: Callable[..., None],
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Trains to the end, or goes on from what ``load`` gives.

    Args:
        problem, contestant, data, seed: of the run; seeds fix initial weights, batches and noise.
        load, save: of checkpoints.
        log: of metrics, ``log(step=..., loss=...)``.
        report: of progress.

    Returns:
        ``updates`` and ``losses`` (nats, of the mean weights on training images), and ``test_accuracy``.

    Raises:
        NotFiniteError: if the loss is not finite where it is told.
    """
    device = data.train.labels.device
    module = make_net(problem, seed).to(device)
    optimiser = torch.optim.Adam(module.parameters(), lr=contestant.learning_rate)
    es = None if contestant.method == "backprop" else _strategy(module, problem, contestant, seed)
    batches = stream(seed, _BATCHES)
    state = load() or {"done": 0, "updates": [0], "losses": [_loss(module, data.train)]}
    if state["done"]:
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        batches.set_state(state["batches"])
        if es is not None:
            es.load_state_dict(state["es"])
    updates, losses = list(state["updates"]), list(state["losses"])
    for done in range(state["done"] + 1, problem.updates + 1):
        inputs, labels = data.train.sample(problem.examples, batches)
        if es is None:
            optimiser.zero_grad()
            F.cross_entropy(module(_shaped(inputs, problem)), labels).backward()
        else:
            es.step(_fitness(problem, inputs, labels))
        optimiser.step()
        if done % problem.judge_every == 0 or done == problem.updates:
            updates.append(done)
            losses.append(_loss(module, data.train))
            if not math.isfinite(losses[-1]):
                raise NotFiniteError(
                    f"the loss is {losses[-1]} after {done} updates: lower the learning rate; what was saved is kept"
                )
            log(step=done, loss=losses[-1])
        if done % _EVERY == 0 or done == problem.updates:
            parts = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "batches": batches.get_state()}
            if es is not None:
                parts["es"] = es.state_dict()
            save(copy.deepcopy({**parts, "done": done, "updates": updates, "losses": losses}))
        report(done, problem.updates)
    return {"updates": updates, "losses": losses, "test_accuracy": test_accuracy(module, data.test)}


def _strategy(module: nn.Module, problem: Problem, contestant: Contestant, seed: int) -> EvolutionStrategy:
    ideal = contestant.method == "ideales"
    rows = max(_ROWS // problem.examples // 2 * 2, 2)
    return EvolutionStrategy(
        module, contestant.std, contestant.samples, estimator=Independent() if ideal else Flipout(),
        base="gaussian" if ideal else contestant.base, members_per_base=None if ideal else contestant.members_per_base, seed=seed,
        chunk=None if ideal else min(rows, contestant.samples),
    )  # fmt: skip


def _fitness(problem: Problem, inputs: Tensor, labels: Tensor) -> Callable[[nn.Module, Members], Tensor]:
    """Minus the cross-entropy of each member, all on one batch."""

    def evaluate(module: nn.Module, members: Members) -> Tensor:
        conv = problem.net == "convle"
        logits = module(members.repeat(inputs) if conv else members.expand(inputs.flatten(1))).reshape(-1, 10)
        losses = F.cross_entropy(logits, labels.repeat(members.count), reduction="none")
        return members.mean(-losses)

    return evaluate


def _shaped(images: Tensor, problem: Problem) -> Tensor:
    return images if problem.net == "convle" else images.flatten(1)


@torch.no_grad()
def _loss(module: nn.Module, examples: Examples) -> float:
    images, labels = examples.inputs[:_JUDGED], examples.labels[:_JUDGED]
    return float(F.cross_entropy(module(images if isinstance(module, ConvLe) else images.flatten(1)), labels))


@torch.no_grad()
def test_accuracy(module: nn.Module, examples: Examples) -> float:
    """The share of images that the mean weights get right."""
    right = 0
    for images, labels in zip(examples.inputs.split(1000), examples.labels.split(1000), strict=True):
        logits = module(images if isinstance(module, ConvLe) else images.flatten(1))
        right += int((logits.argmax(1) == labels).sum())
    return right / len(examples)


test_accuracy.__test__ = False  # type: ignore[attr-defined]  # it is no test, whatever its name says to pytest
