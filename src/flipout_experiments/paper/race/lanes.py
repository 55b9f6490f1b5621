"""A race: one net trained several times from one start, on the same batches, each time under another estimator.

The trainings take turns, step by step, in one process, so that whatever else the machine does hits all alike. A training ends when
it has reached the last of the losses asked for.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flipout.bayes import elbo_loss, kl_divergence, require_finite
from flipout.bayes.kl import Prior
from flipout.gradients import micro_batches, rows_at_once
from flipout.perturb import Perturbed
from flipout.streams import stream
from flipout_experiments.harness.run import Run
from flipout_experiments.nets.networks import TiedLSTM

__all__ = ["Lane", "Objective", "RaceSettings", "paces", "race"]

#: Streams of the batches, of the noise, and of the net's own dropout.
_DATA, _NOISE, _DROPOUT = 20, 21, 22


@dataclass(frozen=True)
class RaceSettings:
    """How the nets are trained, by Adam.

    Attributes:
        batch: examples in a step.
        learning_rate: of Adam.
        targets: losses in nats, falling; a training ends at the last.
        steps: at most so many.
        window: steps over whose mean the loss is judged.
        test_every: steps between two looks at the test set, whose time is not counted.
        save_every: steps between two checkpoints.
        clip: the largest norm of a gradient; None for no bound.
        micro_batch: most examples to run at once.
    """

    batch: int
    learning_rate: float
    targets: tuple[float, ...]
    steps: int
    window: int = 10
    test_every: int = 20
    save_every: int = 50
    clip: float | None = None
    micro_batch: int | None = None


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        nll: mean negative log-likelihood of a batch under a net.
        prior: of the weights; None for the nll alone.
        dataset_size: by which the KL is divided.
        temperature: of the KL.
    """

    nll: Callable[[Perturbed, Any], Tensor]
    prior: Prior | None = None
    dataset_size: int = 1
    temperature: float = 1.0


@dataclass
class Lane:
    """The record of one training.

    Attributes:
        losses: of each step: the nll of its batch under its noise, in nats, without the KL.
        seconds: of each step.
        tests: pairs of a step and the measure of the mean weights on the test set.
        reached: for each target that was reached, the first step at which the mean loss of the window is no greater.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tests: list[tuple[int, float]] = field(default_factory=list)
    reached: dict[float, int] = field(default_factory=dict)

    def add(self, loss: float, seconds: float, settings: RaceSettings) -> None:
        """Takes in a step."""
        self.losses.append(loss)
        self.seconds.append(seconds)
        if len(self.losses) < settings.window:
            return
        smooth = statistics.fmean(self.losses[-settings.window :])
        for target in settings.targets:
            if target not in self.reached and smooth <= target:
                self.reached[target] = len(self.losses)

    def ended(self, settings: RaceSettings) -> bool:
        return settings.targets[-1] in self.reached or len(self.losses) >= settings.steps

    def curve(self, window: int, points: int = 150) -> list[tuple[int, float]]:
        """The mean loss of the window at some steps."""
        steps = range(window, len(self.losses) + 1)
        chosen = steps[:: max(1, len(steps) // points)]
        return [(step, statistics.fmean(self.losses[step - window : step])) for step in chosen]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Lane:
        """What ``asdict`` made a checkpoint of."""
        tests = [(int(step), float(value)) for step, value in state["tests"]]
        return cls(list(state["losses"]), list(state["seconds"]), tests, dict(state["reached"]))


def race(
    nets: Mapping[str, Perturbed],
    objective: Objective,
    sample: Callable[[int, torch.Generator], Any],
    test: Callable[[nn.Module], float],
    settings: RaceSettings,
    seed: int,
    run: Run,
    name: str,
    report: Callable[[int, int], None],
) -> dict[str, Lane]:
    """Trains every net in turn until each has reached the last target or has taken all steps.

    Every step has streams of its own for its batch and its noise, so a killed race goes on as if it had never stopped, but for
    the seconds.

    Args:
        nets: one an estimator, of equal weights.
        objective: what is minimised.
        sample: draws a batch.
        test: the measure of a net with its mean weights.
        settings: how.
        seed: of batches and noise.
        run, name: where it is saved, and under which name.
        report: of steps done by the slowest, and at most to do.

    Raises:
        NotFiniteError: if a loss is; the checkpoint before it is kept.
    """
    lanes = {each: Lane() for each in nets}
    optimisers = {each: torch.optim.Adam(net.parameters(), lr=settings.learning_rate) for each, net in nets.items()}
    state = run.load_checkpoint(name)
    step = 0
    if state is not None:
        step = state["step"]
        for each, saved in state["lanes"].items():
            lanes[each] = Lane.of(saved["lane"])
            if not state["finished"]:
                nets[each].load_state_dict(saved["net"])
                optimisers[each].load_state_dict(saved["optimiser"])
        if state["finished"]:
            return lanes

    def save(finished: bool) -> None:
        saved = {}
        for each, lane in lanes.items():
            weights = {} if finished else {"net": nets[each].state_dict(), "optimiser": optimisers[each].state_dict()}
            saved[each] = {"lane": asdict(lane), **weights}
        run.save_checkpoint(name, {"step": step, "finished": finished, "lanes": saved})

    while active := [each for each, lane in lanes.items() if not lane.ended(settings)]:
        batch = sample(settings.batch, stream(seed, _DATA, step))
        turn = step % len(active)
        for each in active[turn:] + active[:turn]:
            lanes[each].add(*_step(nets[each], optimisers[each], objective, batch, settings, seed, step), settings)
        step += 1
        for each in active:
            lane = lanes[each]
            if step % settings.test_every == 0 or lane.ended(settings):
                lane.tests.append((step, test(nets[each].module)))
                run.log(step=step, race=name, estimator=each, nll=lane.losses[-1], test=lane.tests[-1][1])
        report(step, settings.steps)
        if step % settings.save_every == 0:
            save(finished=False)
    save(finished=True)
    report(settings.steps, settings.steps)
    return lanes


def _step(
    net: Perturbed, optimiser: torch.optim.Optimizer, objective: Objective, batch: Any, settings: RaceSettings, seed: int, step: int
) -> tuple[float, float]:
    """One update: the nll of the batch and the seconds it took."""
    device = next(net.module.parameters()).device
    _wait(device)
    began = time.perf_counter()
    optimiser.zero_grad()
    noise = stream(seed, _NOISE, step, zlib.crc32(repr(net.estimator).encode()), device=device)
    if isinstance(net.module, TiedLSTM):
        net.module.dropout_generator = stream(seed, _DROPOUT, step, device=device)
    rows = rows_at_once(net, settings.batch, settings.micro_batch)
    count = settings.batch // rows
    total = torch.zeros((), device=device)
    for i, _ in enumerate(micro_batches(net, count, rows, noise)):
        part = tuple(each[i * rows : (i + 1) * rows] for each in batch) if count > 1 else batch
        nll = objective.nll(net, part) / count
        total += nll.detach()
        if i + 1 == count and objective.prior is not None:
            kl = kl_divergence(net, objective.prior, generator=noise)
            nll = elbo_loss(nll, kl, objective.dataset_size, objective.temperature).loss
        nll.backward()
    value = require_finite(net, total)
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), settings.clip)
    optimiser.step()
    _wait(device)
    return value, time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paces(lanes: Mapping[str, Lane]) -> dict[str, float]:
    """The median seconds of a step of each, over the steps that all took, the first two of which are left out."""
    common: Sequence[int] = range(2, min(len(lane.seconds) for lane in lanes.values()))
    if not common:
        common = range(min(len(lane.seconds) for lane in lanes.values()))
    return {name: statistics.median(lane.seconds[i] for i in common) for name, lane in lanes.items()}
