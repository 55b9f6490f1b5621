"""IVON by estimator against ivon-opt and Bayes by Backprop: equal processor time, and the price of a step.

    python -m benchmarks.variational step
    python -m benchmarks.variational race --data-dir DIR [--seeds 5] [--seconds 10] [--tables 2]

``race`` trains each method for as many processor seconds, with a cosine schedule over them, and prints test error,
negative log-likelihood and calibration error of the posterior predictive (32 members), then differences to ivon-opt
paired by seed with 95 % intervals. ``step`` times whole training steps, interleaved, in processor seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ivon
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import cross_entropy

import flipout
from flipout import bayes
from flipout.data import mnist
from flipout.intervals import estimate_mean

__all__ = ["METHODS", "main", "race", "step_times"]

MEMBERS, BETA1 = 32, 0.9
#: For each data set: hidden width, batch, learning rate and initial curvature of IVON, 1 - β₂, weight decay, Adam's learning rate.
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {"width": 100, "batch": 512, "lr": 2.0, "h": 0.1, "keep": 1e-3, "decay": 1e-4, "adam": 5e-3},
    "digits": {"width": 50, "batch": 128, "lr": 1.0, "h": 0.1, "keep": 1e-3, "decay": 1e-3, "adam": 1e-2},
    "breast_cancer": {"width": 50, "batch": 128, "lr": 0.5, "h": 0.1, "keep": 1e-3, "decay": 1e-3, "adam": 1e-2},
}
ESTIMATORS = {"shared": flipout.Shared(), "flipout": flipout.Flipout(), "local": flipout.LocalReparameterization()}
METHODS = ("ivon shared", "ivon flipout", "ivon local", "ivon-opt", "backprop flipout")


def load(name: str, data_dir: Path | None, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and labels, and those of the test."""
    if name == "mnist":
        data = mnist(data_dir=data_dir)
        return data.train.inputs.flatten(1), data.train.labels, data.test.inputs.flatten(1), data.test.labels
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    inputs, labels = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    cut = 2 * len(y) // 3
    mean, std = inputs[:cut].mean(0), inputs[:cut].std(0).clamp_min(1e-6)
    inputs = (inputs - mean) / std
    return inputs[:cut], labels[:cut], inputs[cut:], labels[cut:]


def network(inputs: int, width: int, classes: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


class Method:
    """A way to train a posterior: ``step(x, y)``, ``scale(fraction)`` of the learning rate, ``probabilities(x)``."""

    def __init__(self, kind: str, model: nn.Sequential, examples: int, settings: dict[str, Any]) -> None:
        family, _, estimator = kind.partition(" ")
        self.family, self.model, self.examples, self.settings = family, model, examples, settings
        options = {"lr": settings["lr"], "hess_init": settings["h"], "weight_decay": settings["decay"]}
        beta2 = 1 - settings["keep"]
        self.net: Any = None
        if family == "ivon-opt":
            self.optimiser: Any = ivon.IVON(model.parameters(), ess=examples, beta1=BETA1, beta2=beta2, **options)
        else:
            std = 1 / math.sqrt(examples * (settings["h"] + settings["decay"]))
            noise = flipout.Gaussian(std, learnable=True)
            self.net = flipout.Perturbed(model, noise, ESTIMATORS[estimator])
            if family == "ivon":
                self.optimiser = bayes.IVON(self.net, effective_sample_size=examples, betas=(BETA1, beta2), **options)
            else:
                self.optimiser = torch.optim.Adam(self.net.parameters(), settings["adam"])
                self.prior = Normal(0.0, 1 / math.sqrt(examples * settings["decay"]))
        self.rate = self.optimiser.param_groups[0]["lr"]

    def scale(self, fraction: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * fraction

    def step(self, x: Tensor, y: Tensor) -> None:
        if self.family == "ivon-opt":
            with self.optimiser.sampled_params(train=True):
                self.optimiser.zero_grad()
                cross_entropy(self.model(x), y).backward()
        else:
            self.optimiser.zero_grad()
            loss = cross_entropy(self.net(x), y)
            if self.family == "backprop":
                loss = bayes.elbo_loss(loss, bayes.kl_divergence(self.net, self.prior), self.examples).loss
            loss.backward()
        self.optimiser.step()

    @torch.no_grad()
    def probabilities(self, x: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        if self.net is not None:
            return bayes.predict(self.net, x, MEMBERS, keep_samples=False).mean  # type: ignore[no-any-return]
        total = torch.zeros(())
        for _ in range(MEMBERS):
            with self.optimiser.sampled_params():
                total = total + self.model(x).softmax(-1) / MEMBERS
        return total


def trained(kind: str, name: str, data: Any, seconds: float, seed: int, settings: dict[str, Any]) -> tuple[Method, int]:
    x, y = data[0], data[1]
    method = Method(kind, network(x.shape[1], settings["width"], int(y.max()) + 1, seed), len(x), settings)
    order, start, steps = torch.Generator().manual_seed(seed), time.process_time(), 0
    while (used := time.process_time() - start) < seconds:
        method.scale(0.5 * (1 + math.cos(math.pi * used / seconds)))
        rows = torch.randint(len(x), (settings["batch"],), generator=order)
        method.step(x[rows], y[rows])
        steps += 1
    return method, steps


def race(
    name: str, data_dir: Path | None, seeds: int, seconds: float, methods: Any = METHODS, first: int = 0, **changes: Any
) -> list[dict[str, Any]]:
    """A row for each seed and method."""
    rows = []
    for seed in range(first, first + seeds):
        data = load(name, data_dir, seed)
        for kind in methods:
            method, steps = trained(kind, name, data, seconds, seed, {**SETTINGS[name], **changes})
            found = method.probabilities(data[2], seed)
            row = {
                "data": name,
                "seed": seed,
                "method": kind,
                "steps": steps,
                "error": 1 - bayes.accuracy(found, data[3]),
                "nll": bayes.negative_log_likelihood(found, data[3]),
                "ece": bayes.calibration_error(found, data[3]),
            }
            rows.append(row)
            print(
                f"{name:14s} seed {seed} {kind:17s} {steps:6d} steps  error {100 * row['error']:5.2f} %  nll {row['nll']:.4f}  "
                f"ece {row['ece']:.4f}",
                flush=True,
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> None:
    """Means, and differences to ivon-opt and to Bayes by Backprop paired by seed."""
    for kind in dict.fromkeys(row["method"] for row in rows):
        told = []
        for measure in ("nll", "ece"):
            own = {row["seed"]: row[measure] for row in rows if row["method"] == kind}
            told.append(f"{measure} {statistics.mean(own.values()):.4f}")
            for other in ("ivon-opt", "backprop flipout"):
                theirs = {row["seed"]: row[measure] for row in rows if row["method"] == other}
                if other != kind and theirs:
                    gap = estimate_mean([own[seed] - theirs[seed] for seed in own], 0.95)
                    told.append(f"minus {other} {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]")
        print(f"{rows[0]['data']:14s} {kind:17s} {'  '.join(told)}", flush=True)


def step_times(rounds: int = 40, batch: int = 512, inner: int = 5) -> dict[str, float]:
    """Medians over rounds of the processor seconds of a whole training step."""
    x, y = torch.randn(batch, 784), torch.randint(10, (batch,))
    settings = SETTINGS["mnist"]
    model = network(784, settings["width"], 10, 0)
    kinds: dict[str, Callable[[], None]] = {}
    for kind in ("ivon shared", "ivon flipout", "ivon local", "ivon-opt", "backprop flipout"):
        method = Method(kind, copy.deepcopy(model), 60_000, settings)
        kinds[kind] = lambda method=method: method.step(x, y)  # type: ignore[misc]
    for kind, estimator in ESTIMATORS.items():
        net = flipout.Perturbed(copy.deepcopy(model), flipout.Gaussian(0.01, learnable=True), estimator)
        kinds[f"adam {kind}"] = _adam(net, x, y)
    kinds["adam plain"] = _adam(copy.deepcopy(model), x, y)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(rounds + 3):
        for kind in list(kinds)[i % len(kinds) :] + list(kinds)[: i % len(kinds)]:
            start = time.process_time()
            for _ in range(inner):
                kinds[kind]()
            if i >= 3:
                times[kind].append((time.process_time() - start) / inner)
    ratios = {
        "ivon shared / adam shared": ("ivon shared", "adam shared"),
        "ivon flipout / adam flipout": ("ivon flipout", "adam flipout"),
        "ivon local / adam local": ("ivon local", "adam local"),
        "ivon shared / ivon-opt": ("ivon shared", "ivon-opt"),
        "ivon flipout / ivon-opt": ("ivon flipout", "ivon-opt"),
        "ivon flipout / backprop flipout": ("ivon flipout", "backprop flipout"),
        "adam flipout / adam plain": ("adam flipout", "adam plain"),
    }
    for kind, each in times.items():
        print(f"{kind:18s} {1e3 * statistics.median(each):7.2f} ms a step")
    found = {}
    for told, (one, other) in ratios.items():
        each = [a / b for a, b in zip(times[one], times[other], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        found[told] = middle
        print(f"{told:32s} {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    return found


def _adam(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)

    def step() -> None:
        optimiser.zero_grad()
        cross_entropy(net(x), y).backward()
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["race", "step"])
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--data", nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of training on MNIST")
    parser.add_argument("--tables", type=float, default=2.0, help="seconds of training on a table")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.what == "step":
        step_times(options.rounds)
        return
    rows = []
    for name in options.data:
        seconds = options.seconds if name == "mnist" else options.tables
        found = race(name, options.data_dir, options.seeds, seconds)
        summary(found)
        rows += found
    if options.json is not None:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
