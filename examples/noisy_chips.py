"""Train for an analog chip, test on many: ``python examples/noisy_chips.py``.

Each chip programs the weights with errors of its own, N(0, (f · largest weight of the output)²). A net is trained
without noise, with one noisy weight a batch (shared), and with one for each example (flipout), for equal steps and
for equal processor time, and asked about test images on 64 chips.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import flipout
from flipout.data import mnist

ESTIMATORS = {"none": None, "shared": flipout.Shared(), "flipout": flipout.Flipout()}


def programming_error(fraction: float) -> flipout.Gaussian:
    return flipout.Gaussian(lambda weight: fraction * weight.abs().amax(1, keepdim=True))


def train(kind: str, fraction: float, data, steps: int | None, seconds: float | None, batch: int, seed: int):
    """A net, and the steps and processor seconds that it took: as many steps, or as much time, as is given."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    net = flipout.Perturbed(model, programming_error(fraction), ESTIMATORS[kind] or flipout.Shared(), include="*weight")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    order, start, step = torch.Generator().manual_seed(seed), time.process_time(), 0
    while step < steps if steps is not None else time.process_time() - start < seconds:
        images, labels = data.sample(batch, order)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images) if kind == "none" else net(images), labels).backward()
        optimiser.step()
        step += 1
    return net, step, time.process_time() - start


@torch.no_grad()
def chips(net: flipout.Perturbed, data, count: int, seed: int) -> torch.Tensor:
    """The accuracy of each chip: all chips in one batch, each with weights of its own."""
    right = torch.zeros(count)
    net.eval()
    with net.using(flipout.Independent()), net.hold(members=count, generator=torch.Generator().manual_seed(seed)):
        for images, labels in zip(data[0].split(250), data[1].split(250), strict=True):
            answers = net(images.repeat(count, 1, 1, 1)).argmax(1).view(count, -1)
            right += (answers == labels).sum(1)
    return right / len(data[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--chips", type=int, default=64)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--data-dir", type=Path, default=None)
    options = parser.parse_args()
    data = mnist(data_dir=options.data_dir, download=False)
    print(data.source)
    test = data.test.inputs[: options.test_images], data.test.labels[: options.test_images]
    for fraction in options.fractions:
        for seed in range(options.seeds):
            seconds = None
            for budget in ("equal steps", "equal time"):
                for kind in reversed(ESTIMATORS):  # flipout first: its time is everybody's
                    if budget == "equal time" and kind == "flipout":
                        continue
                    limits = (options.steps, None) if budget == "equal steps" else (None, seconds)
                    net, steps, used = train(kind, fraction, data.train, *limits, options.batch, seed)
                    seconds = used if seconds is None else seconds
                    found = chips(net, test, options.chips, 1000 + seed)
                    print(
                        f"error {fraction:g} of the largest weight, seed {seed}, {budget:11s} {kind:8s} {steps:6d} steps "
                        f"{used:5.1f} s: {options.chips} chips have accuracy {float(found.mean()):.4f}, "
                        f"the worst {float(found.min()):.4f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
