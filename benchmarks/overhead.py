"""What does a small network pay for carriers and dispatch, where products cost next to nothing?"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import flipout
from benchmarks.harness import MIN_ROUNDS, PATIENCE, race
from benchmarks.report import Section

ROWS = 32
HOLD_BOUND, FREE_BOUND = 5.0, 9.0
CALLS = 20

TEXT = f"""The forward pass of an MLP 64-64-64-10 on {ROWS} rows, float32, six parameters perturbed by a fixed Gaussian; {CALLS}
calls timed as one. Nearly all of it is the fixed cost of Python and of torch's dispatch. Under `hold` the draw is made once;
without it each call draws anew. Targets refer to training mode (gradients recorded); the second block runs under `no_grad`."""


def mlp() -> nn.Module:
    """The paper-sized toy: 64-64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races the forward pass plain, under hold, and without."""
    section = Section("overhead", "Small network, forward", TEXT)
    for gradients in (True, False):
        torch.manual_seed(0)
        module, x = mlp(), torch.randn(ROWS, 64)
        held, free = (flipout.Perturbed(module, flipout.Gaussian(0.1)) for _ in range(2))
        learnable = flipout.Perturbed(module, flipout.Gaussian(0.1, learnable=True))
        contestants = {"plain": module, "under hold": held, "without hold": free, "without hold, learnable": learnable}
        with torch.set_grad_enabled(gradients), held.hold(members=ROWS):
            calls = {name: partial(net, x) for name, net in contestants.items()}
            timings = race(calls, rounds=4 * rounds, calls=CALLS, patience=patience)
        name = "training" if gradients else "no_grad"
        section.add_race(name, timings)
        if gradients:
            section.add_target("under hold / plain", timings["under hold"], HOLD_BOUND)
            section.add_target("without hold / plain", timings["without hold"], FREE_BOUND)
    return section


if __name__ == "__main__":
    print(run().markdown())
