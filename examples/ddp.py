"""Two processes, one model, noise of its own on each: ``python examples/ddp.py``.

It starts itself under torchrun with gloo; on GPUs it would be nccl, and nothing else. The wrapper goes *inside* DDP. Each rank
draws from a generator of its own, so that noise differs between ranks as it does between examples, and the average of the gradients
is that of one batch of twice the size.
"""

import argparse
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flipout
from flipout.data import embedded_mnist


def work(steps: int) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same initial weights everywhere
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    noise = torch.Generator().manual_seed(1000 + rank)
    ddp = DistributedDataParallel(flipout.Perturbed(model, flipout.MultiplicativeGaussian(0.5), include="*weight", generator=noise))
    optimiser = torch.optim.Adam(ddp.parameters(), lr=2e-3)
    digits, order = embedded_mnist(), torch.Generator().manual_seed(rank)
    for _ in range(steps):
        images, labels = digits.train.sample(128 // ranks, order)
        optimiser.zero_grad()
        nn.functional.cross_entropy(ddp(images), labels).backward()
        optimiser.step()
    right = (model(digits.test.inputs).argmax(1) == digits.test.labels).float().mean()
    weights = [torch.zeros_like(model[1].weight) for _ in range(ranks)]
    dist.all_gather(weights, model[1].weight.detach())
    if rank == 0:
        print(
            f"test accuracy {float(right):.3f}; weights on {ranks} ranks equal: {all(torch.equal(weights[0], w) for w in weights)}"
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if "RANK" in os.environ:
        work(options.steps)
        sys.stdout.flush()
        os._exit(0)  # all is done; at an ordinary exit threads of torch's own, still running, abort about one process in thirty
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    subprocess.run([*command, "--steps", str(options.steps)], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


if __name__ == "__main__":
    main()
