"""Figure 5: seconds per update of FlipES, against explicit perturbations on every core.

*cpuES* is the method of Salimans et al. 2017 that the paper compares with: a process on every core perturbs the net member by
member with noise looked up in a shared table, and sums its own members' noise, weighted by fitness. What one core does in a
second is measured with all cores at work, so that seconds per update on more cores are those of perfect scaling, in cpuES's
favour.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flipout.evolution import EvolutionStrategy, Members
from flipout_experiments.paper.evolution.contestants import Problem, make_net

__all__ = ["TimingSettings", "cores_to_use", "explicit_seconds", "flipes_seconds"]

_STD = 0.02


@dataclass(frozen=True)
class TimingSettings:
    """What is timed.

    Attributes:
        fc_widths, conv_scales: nets.
        samples: members an update, an example each.
        chunk: members of FlipES at once.
        explicit_members: that each core perturbs for the timing of cpuES.
        repeats: timings of each, of which the median counts.
    """

    fc_widths: tuple[int, ...]
    conv_scales: tuple[float, ...]
    samples: int
    chunk: int
    explicit_members: int
    repeats: int


def cores_to_use() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def problem_of(net: str, width: float) -> Problem:
    return Problem(net, width, 1, 0, 1)


def flipes_seconds(net: str, width: float, settings: TimingSettings, device: torch.device) -> list[float]:
    """Seconds of a whole generation on the device, by repeats: noise, forward passes, ranks, sum."""
    module = make_net(problem_of(net, width), 0).to(device)
    es = EvolutionStrategy(module, _STD, settings.samples, chunk=settings.chunk)
    images = torch.rand((settings.chunk, 1, 28, 28) if net == "convle" else (settings.chunk, 784), device=device)

    def evaluate(module: nn.Module, members: Members) -> Tensor:
        found: Tensor = module(images[: members.count])[:, 0]
        return found

    seconds = []
    es.step(evaluate)
    for _ in range(settings.repeats):
        start = time.perf_counter()
        es.step(evaluate)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def explicit_seconds(nets: Sequence[tuple[str, float]], settings: TimingSettings, cores: int) -> list[float]:
    """Seconds that a core takes for one member under cpuES, for each net, measured with all cores at work at once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores) as pool:
        barrier = [(list(nets), settings.explicit_members, settings.repeats)] * cores
        found = pool.map(_explicit_here, barrier, chunksize=1)
    return [sum(core[i] for core in found) / cores for i in range(len(nets))]


def _explicit_here(work: Any) -> list[float]:
    nets, members, repeats = work
    torch.set_num_threads(1)
    table = torch.randn(25_000_000, generator=torch.Generator().manual_seed(0))  # a tenth of Salimans et al.'s
    return [_explicit(make_net(problem_of(net, width), 0), net, table, members, repeats) for net, width in nets]


@torch.no_grad()
def _explicit(module: nn.Module, net: str, table: Tensor, members: int, repeats: int) -> float:
    parameters = list(module.parameters())
    means = [p.clone() for p in parameters]
    sizes = [p.numel() for p in parameters]
    image = torch.rand((1, 1, 28, 28) if net == "convle" else (1, 784))
    pairs = max(members // 2, 1)
    room = max(table.numel() - sum(sizes), 1)
    total = torch.zeros(sum(sizes))
    best = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fitness = []
        for pair in range(pairs):
            noise = table.narrow(0, 7919 * pair % room, sum(sizes)).split(sizes)
            for sign in (_STD, -_STD):
                for p, mean, d in zip(parameters, means, noise, strict=True):
                    torch.add(mean, d.view_as(mean), alpha=sign, out=p)
                fitness.append(float(module(image)[0, 0]))
        for pair in range(pairs):
            total.add_(table.narrow(0, 7919 * pair % room, sum(sizes)), alpha=fitness[2 * pair] - fitness[2 * pair + 1])
        best.append((time.perf_counter() - start) / (2 * pairs))
    return sorted(best[1:])[repeats // 2]
