"""What does a training step of the paper's character model cost under weight noise, against the same model on plain nn.LSTM?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import MIN_ROUNDS, PATIENCE, race
from benchmarks.report import Section
from flipout.regularize import CHAR, Regularized
from flipout_experiments.language.models import ModelSettings, build_model

VOCABULARY = 50
#: (units, steps, batch): the presets laptop and paper.
SETTINGS = [(256, 50, 32), (1000, 100, 32)]
CONTESTANTS = {"plain nn.LSTM": "none", "shared Gaussian": "gaussian", "flipout": "gaussian-flipout"}
BOUND = 2.3

TEXT = """One training step: forward, cross-entropy, backward, clipping and AMSGrad, float32, one-hot inputs of 50 symbols,
multiplicative Gaussian noise on the hidden-to-hidden matrix, drawn anew for each step and held over its time steps. The recurrent
product is nearly the whole cost of this model, and under flipout there are two in the forward pass and four instead of two in the
backward pass: the limit is about 2."""


def step(name: str, units: int, steps: int, batch: int) -> Callable[[], None]:
    """A training step of the character model under a method of Table 2."""
    net = Regularized(build_model(ModelSettings("char", units), VOCABULARY, steps, 0), CHAR[name])
    parameters = list(net.module.parameters())
    optimiser = torch.optim.Adam(parameters, lr=0.002, amsgrad=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, steps + 1), generator=generator)
    module: nn.Module = net.module
    state: tuple[Tensor, Tensor] = module.initial_state(batch)  # type: ignore[operator]

    def once() -> None:
        with net.drawing(batch, generator):
            logits, _ = net(tokens[:, :-1], state)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    return once


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    section = Section("language", "Language model", TEXT)
    for units, steps, batch in SETTINGS:
        contestants = {label: step(name, units, steps, batch) for label, name in CONTESTANTS.items()}
        timings = race(contestants, rounds=rounds, patience=patience)
        name = f"1×{units}, {steps} characters, batch {batch}"
        section.add_race(name, timings)
        section.add_target(f"{name}, flipout", timings["flipout"], BOUND)
    return section


if __name__ == "__main__":
    print(run().markdown())
