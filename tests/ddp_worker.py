"""One rank of the DDP test: run by torchrun, writes what it saw to the folder given as its argument."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flipout

DRAWS, ROWS = 300, 4
NOISE = flipout.Gaussian(0.5)


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum(-1).mean()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def generator_of(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + rank)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same start on every rank, as usual: noise comes from the rank's own generator
    module = nn.Linear(5, 3).double()
    x = torch.randn(2, ROWS, 5, dtype=torch.float64)[rank]
    target = torch.randn(2, ROWS, 3, dtype=torch.float64)[rank]
    alone, plain = copy.deepcopy(module), copy.deepcopy(module)

    ddp = DistributedDataParallel(module)
    generator = generator_of(rank)
    outputs, gradients = [], []
    for _ in range(DRAWS):
        ddp.zero_grad()
        with flipout.perturbed(module, NOISE, generator=generator):
            y = ddp(x)
        loss_of(y, target).backward()
        outputs.append(y.detach())
        gradients.append(gradient(module))

    wrapped = DistributedDataParallel(flipout.Perturbed(alone, NOISE, generator=generator_of(rank)))
    wrapped_gradients = []
    for _ in range(3):
        wrapped.zero_grad()
        loss_of(wrapped(x), target).backward()
        wrapped_gradients.append(gradient(alone))

    local = flipout.Perturbed(plain, NOISE, generator=generator_of(rank))
    loss_of(local(x), target).backward()
    own = gradient(plain)
    plain.zero_grad()
    loss_of(plain(x), target).backward()

    bayesian = flipout.Perturbed(copy.deepcopy(plain), flipout.Gaussian(0.5, learnable=True), generator=generator_of(rank))
    with_scales = DistributedDataParallel(bayesian)
    optimiser = flipout.bayes.IVON(with_scales, lr=0.1, effective_sample_size=8)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(with_scales(x), target).backward()
        optimiser.step()

    seen = {
        "ivon": [p.detach() for p in bayesian.parameters()] + list(optimiser.curvature().values()),
        "outputs": torch.stack(outputs),
        "gradients": torch.stack(gradients),
        "wrapped": torch.stack(wrapped_gradients),
        "own": own,
        "plain": gradient(plain),
        "clean": all(type(parameter) is nn.Parameter for parameter in module.parameters()),
    }
    torch.save(seen, Path(sys.argv[1]) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # all is saved; at an ordinary exit threads of torch's own, still running, abort about one process in thirty
