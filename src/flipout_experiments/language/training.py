"""Training of a language model by truncated backpropagation, with the noise of its method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flipout.data import text_batches
from flipout.errors import ArgumentError
from flipout.regularize import Regularized
from flipout.streams import stream
from flipout_experiments.language.evaluation import evaluate
from flipout_experiments.language.schedule import NonMonotonic

__all__ = ["Trained", "TrainingSettings", "train_language_model"]

#: The stream of the noise, and steps between two looks at whether the loss is still finite.
_NOISE, _LOOK = 21, 50
#: No language model is this bad before it has exploded: nats a token.
_EXPLODED = 100.0


@dataclass(frozen=True)
class TrainingSettings:
    """How a language model is trained.

    Attributes:
        epochs: at most so many passes over the text.
        batch: contiguous streams of the text that run side by side.
        window: tokens after which backpropagation is cut, and for which masks and weights are drawn.
        optimiser: ``"amsgrad"`` or ``"sgd"``.
        learning_rate: of the optimiser.
        clip: the largest norm of a gradient.
        patience: epochs without a better validation after which training stops; None runs all epochs.
        quarter_after: the interval of Merity's criterion, by which the learning rate is divided by 4; None keeps it.
        evaluation_rows: streams of a split in an evaluation.
        watched: the first so many tokens of the validation split that are evaluated after each epoch; None for all of it.
        save_steps: steps between two checkpoints within an epoch.
    """

    epochs: int
    batch: int
    window: int
    optimiser: str
    learning_rate: float
    clip: float
    patience: int | None = None
    quarter_after: int | None = None
    evaluation_rows: int = 1
    watched: int | None = None
    save_steps: int = 500

    def __post_init__(self) -> None:
        if self.optimiser not in ("amsgrad", "sgd"):
            raise ArgumentError(f"optimiser {self.optimiser!r}: choose amsgrad or sgd")


@dataclass(frozen=True)
class Trained:
    """What a training reached. The model has the weights of its best epoch.

    Attributes:
        train, valid: mean loss of each epoch in nats a token: of training under noise, and after it of the mean weights on what is
            watched of the validation split.
        best: the epoch with the lowest validation loss, from 1.
        steps: in all.
    """

    train: tuple[float, ...]
    valid: tuple[float, ...]
    best: int
    steps: int


Save = Callable[[dict[str, Any]], None]
Load = Callable[[], dict[str, Any] | None]


def train_language_model(
    net: Regularized,
    train: Tensor,
    valid: Tensor,
    settings: TrainingSettings,
    seed: int = 0,
    save: Save = lambda state: None,
    load: Load = lambda: None,
    log: Callable[..., None] = lambda **numbers: None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Trains, and leaves the model with the weights of the epoch whose mean weights did best on the validation split.

    Each step reads the next window of every stream, with the state that the last one left and with masks and weights of its own,
    drawn from a stream of its own: the saved state is all that a killed run needs to go on as if it had never stopped.

    Args:
        net: the model under its method. Its module takes tokens ``[N, T]`` and a state, and returns logits and the next state.
        train, valid: tokens ``[n]`` of the splits, on the device of the model.
        settings: how.
        seed: of the noise.
        save, load: a checkpoint's; ``load`` is called once.
        log: called after each epoch with ``step`` and numbers.
        report: progress, in steps.

    Raises:
        ArgumentError: if a split is too short for its windows, or the loss explodes: then the step and the gradient's norm are
            named, and what was saved before is kept.
    """
    if len(valid) < 2:
        raise ArgumentError(f"the validation split has {len(valid)} tokens, so no epoch could be judged; give it two or more")
    batches = text_batches(train, settings.batch, settings.window)
    run = _Run(net, settings, seed)
    run.restore(load())
    total = settings.epochs * len(batches)
    while not run.ended:
        run.epoch(batches, save, lambda step: report(step, total))
        losses = run.judge(valid[: settings.watched])
        log(step=run.epochs, train_loss=losses[0], valid_loss=losses[1], learning_rate=run.learning_rate)
        save(run.state())
    net.module.load_state_dict(run.best_weights)
    return Trained(tuple(run.train), tuple(run.valid), run.valid.index(min(run.valid)) + 1, run.step)


class _Run:
    """A training under way: everything that a checkpoint holds."""

    def __init__(self, net: Regularized, settings: TrainingSettings, seed: int) -> None:
        self.net, self.settings, self.seed = net, settings, seed
        self.parameters = list(net.module.parameters())
        self.device = self.parameters[0].device
        self.optimiser: torch.optim.Optimizer
        if settings.optimiser == "amsgrad":
            self.optimiser = torch.optim.Adam(self.parameters, lr=settings.learning_rate, amsgrad=True)
        else:
            self.optimiser = torch.optim.SGD(self.parameters, lr=settings.learning_rate)
        self.criterion = NonMonotonic(settings.quarter_after) if settings.quarter_after is not None else None
        self.step, self.window = 0, 0
        self.train: list[float] = []
        self.valid: list[float] = []
        self.best_weights: dict[str, Tensor] = {}
        self.recurrent: tuple[Tensor, ...] | None = None
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.unseen: list[tuple[Tensor, Tensor]] = []

    @property
    def epochs(self) -> int:
        """Epochs that are done."""
        return len(self.valid)

    @property
    def learning_rate(self) -> float:
        return float(self.optimiser.param_groups[0]["lr"])

    @property
    def ended(self) -> bool:
        """Whether all epochs are done, or enough of them without a better one."""
        patience = self.settings.patience
        waited = self.epochs - 1 - self.valid.index(min(self.valid)) if self.valid else 0
        return self.epochs >= self.settings.epochs or (patience is not None and waited >= patience)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "module": self.net.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "criterion": None if self.criterion is None else self.criterion.state_dict(),
            "step": self.step,
            "window": self.window,
            "train": list(self.train),
            "valid": list(self.valid),
            "best_weights": self.best_weights,
            "recurrent": None if self.recurrent is None else list(self.recurrent),
            "loss": self.loss,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from a checkpoint, if there is one."""
        if state is None:
            return
        self.net.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.criterion is not None:
            self.criterion.load_state_dict(state["criterion"])
        self.step, self.window = state["step"], state["window"]
        self.train, self.valid = list(state["train"]), list(state["valid"])
        self.best_weights = {name: weight.to(self.device) for name, weight in state["best_weights"].items()}
        recurrent = state["recurrent"]
        self.recurrent = None if recurrent is None else tuple(each.to(self.device) for each in recurrent)
        self.loss = state["loss"].to(self.device)

    def epoch(self, batches: list[tuple[Tensor, Tensor]], save: Save, report: Callable[[int], None]) -> None:
        """What is left of an epoch."""
        self.net.train()
        if self.recurrent is None:
            self.recurrent = self.initial_state()
        for inputs, targets in batches[self.window :]:
            self.one_step(inputs, targets)
            report(self.step)
            if self.window % self.settings.save_steps == 0 and self.window < len(batches):
                self.look()
                save(self.state())
        self.look()
        self.train.append(float(self.loss) / len(batches))
        self.window, self.recurrent = 0, None
        self.loss.zero_()

    def initial_state(self) -> tuple[Tensor, ...]:
        state: tuple[Tensor, ...] = self.net.module.initial_state(self.settings.batch)  # type: ignore[operator]
        return state

    def one_step(self, inputs: Tensor, targets: Tensor) -> None:
        with self.net.drawing(len(inputs), stream(self.seed, _NOISE, self.step, device=self.device)):
            logits, recurrent = self.net(inputs, self.recurrent)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        self.recurrent = tuple(each.detach() for each in recurrent)
        self.step += 1
        self.window += 1
        self.loss += loss.detach()
        self.unseen.append((loss.detach(), norm))
        if len(self.unseen) >= _LOOK:
            self.look()

    def look(self) -> None:
        """Raises ArgumentError if the loss of a step since the last look has exploded; nothing was saved meanwhile."""
        numbers = torch.tensor([]) if not self.unseen else torch.stack([torch.stack(pair) for pair in self.unseen]).cpu()
        first = self.step - len(self.unseen) + 1
        self.unseen = []
        for i, (loss, norm) in enumerate(numbers.tolist()):
            if not (math.isfinite(norm) and loss < _EXPLODED):
                raise ArgumentError(
                    f"the loss exploded: at step {first + i} it is {loss:.4g} nats a token and its gradient has norm {norm:.4g}. "
                    "The last good checkpoint is kept. Lower the learning rate or the bound on the norm, or the noise"
                )

    def judge(self, valid: Tensor) -> tuple[float, float]:
        """Ends an epoch: evaluates the mean weights, keeps the best, and slows down by the criterion."""
        found = evaluate(self.net, valid, self.settings.evaluation_rows, self.settings.window)
        if not math.isfinite(found):
            raise ArgumentError(f"the validation loss after step {self.step} is {found}; the last good checkpoint is kept")
        if not self.valid or found < min(self.valid):
            self.best_weights = copy.deepcopy(self.net.module.state_dict())
        self.valid.append(found)
        if self.criterion is not None and self.criterion.update(found):
            for group in self.optimiser.param_groups:
                group["lr"] /= 4
        return self.train[-1], found
