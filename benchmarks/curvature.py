"""How noisy the curvature is that IVON learns from, by estimator, base distribution and batch size.

    python -m benchmarks.curvature --data-dir DIR [--draws 24] [--seeds 3]

On MNIST and a fully connected net, early in training and late: the standard deviation of E_n[ΔW_n ∘ g_n] / σ²
over fresh batches and fresh noise, root mean square over all weights, and its ratio to shared noise with 95 %
intervals over draws; one line a net.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flipout
from flipout import bayes
from flipout.data import mnist
from flipout.intervals import ratio
from flipout.variance import gradient_variance, without_replacement

__all__ = ["bases", "main", "measure", "trained"]

WIDTH = 100


def trained(train: Any, steps: int, seed: int) -> flipout.Perturbed:
    """A net after some steps of IVON at a batch of 512, with its learnt scales."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    net = flipout.Perturbed(model, flipout.Gaussian(0.1, learnable=True))
    optimiser = bayes.IVON(net, lr=0.5, effective_sample_size=len(train), hess_init=0.1, betas=(0.9, 0.999), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images, labels = train.sample(512, generator)
        optimiser.zero_grad()
        cross_entropy(net(images), labels).backward()
        optimiser.step()
    return net


def bases(net: flipout.Perturbed) -> dict[str, flipout.Perturbed]:
    """The net under a Gaussian base and under a Rademacher base of the same scales."""
    other = flipout.Perturbed(net.module, flipout.Rademacher(0.1, learnable=True))
    for name, scale in net.scales.items():
        other.scales[name].data.copy_(scale.detach())
    return {"gaussian": net, "rademacher": other}


def estimators() -> dict[str, flipout.Estimator]:
    """Those that are there: several bases as well, where the library has them."""
    found: dict[str, flipout.Estimator] = {"shared": flipout.Shared(), "flipout": flipout.Flipout()}
    try:
        found["flipout, 4 bases"] = flipout.Flipout(bases=4)  # type: ignore[call-arg]
        found["flipout, 16 bases"] = flipout.Flipout(bases=16)  # type: ignore[call-arg]
    except TypeError:
        pass
    return found


def measure(train: Any, steps: int, size: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """A row for each base distribution and estimator."""
    net = trained(train, steps, seed)
    sample_batch = without_replacement(train.inputs, train.labels)
    rows = []
    reference = None
    for base, each in bases(net).items():
        local = {"local_reparameterization": flipout.LocalReparameterization()} if base == "gaussian" else {}
        for name, estimator in {**estimators(), **local}.items():
            found = gradient_variance(
                each,
                lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
                sample_batch,
                size,
                [estimator],
                draws,
                of="curvature",
                confidence=0.95,
                seed=seed,
            )
            (point,) = found.values()
            reference = reference or point
            entries = sum(point.sizes.values())
            relative = ratio(point.total, reference.total, 0.95)
            rows.append(
                {
                    "steps": steps,
                    "batch_size": size,
                    "seed": seed,
                    "base": base,
                    "estimator": name,
                    "std": math.sqrt(point.total.value / entries),
                    "ratio": math.sqrt(relative.value),
                    "low": math.sqrt(relative.low),
                    "high": math.sqrt(relative.high),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 600])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    train = mnist(data_dir=options.data_dir).train
    rows = []
    for steps in options.steps:
        for size in options.batch_sizes:
            for seed in range(options.seeds):
                for row in measure(train, steps, size, options.draws, seed):
                    rows.append(row)
                    print(
                        f"{steps:5d} steps  N={size:5d}  seed {seed}  {row['base']:10s} {row['estimator']:24s} "
                        f"std {row['std']:.4g}  over shared {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                        flush=True,
                    )
    if options.json is not None:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
