"""Does ``torch.compile(fullgraph=True)`` take a perturbed network, and what is left of the cost?"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import flipout
from benchmarks.harness import MIN_ROUNDS, PATIENCE, forward_backward, race
from benchmarks.overhead import mlp
from benchmarks.report import Section

STD = 0.05

TEXT = """Forward and backward in training mode with `torch.compile(fullgraph=True)` (inductor), float32, all parameters
perturbed by a learnable Gaussian; ratios refer to the *compiled* plain module of the same block. The compiled and the eager network
draw from the same law but not the same numbers. Compilation itself is not timed."""


def cnn() -> nn.Module:
    """A small convolutional classifier of 28×28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


#: Name, module, input shape, calls timed as one.
CASES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
    ("MLP 64-64-64-10, 32 rows", mlp, (32, 64), 20),
    ("CNN, 64 images", cnn, (64, 1, 28, 28), 1),
]


def _step(net: nn.Module, x: Tensor, compiled: bool) -> Callable[[], None]:
    net = copy.deepcopy(net)
    return forward_backward(torch.compile(net, fullgraph=True) if compiled else net, x)  # type: ignore[arg-type]


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races compiled plain, compiled perturbed and both in eager mode."""
    section = Section("compiled", "torch.compile, forward + backward", TEXT)
    for name, make, shape, calls in CASES:
        started = time.perf_counter()
        torch.manual_seed(0)
        module, x = make(), torch.randn(shape)
        networks = {
            "plain": module,
            "perturbed": flipout.Perturbed(module, flipout.Gaussian(STD, learnable=True)),
        }
        torch.compiler.reset()
        steps = {f"{kind}, compiled": _step(net, x, True) for kind, net in networks.items()}
        steps |= {f"{kind}, eager": _step(net, x, False) for kind, net in networks.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's own, while it compiles
            for step in steps.values():
                step()
        print(f"{name}: compiled in {time.perf_counter() - started:.0f} s", flush=True)
        section.add_race(name, race(steps, rounds=2 * rounds, calls=calls, patience=patience))
    return section


if __name__ == "__main__":
    print(run().markdown())
