"""What does a perturbed ``nn.Conv2d`` cost in training, against the plain layer and against bayesian-torch?"""

from __future__ import annotations

import torch
from torch import nn

import flipout
from benchmarks import peers
from benchmarks.harness import MIN_ROUNDS, PATIENCE, forward_backward, race
from benchmarks.report import Section

CHANNELS, KERNEL, INPUT = 64, 3, (64, 64, 32, 32)
LEARNABLE_BOUND = 2.4
STD = 0.05

TEXT = """Forward and backward of a convolution 64 → 64, 3×3, padding 1, on an input [64, 64, 32, 32], float32; the input, kernel
and bias require gradients, kernel and bias are perturbed, and learnable scales get gradients too. flipout draws one sign per
example and channel, so that each example has one perturbed kernel. bayesian-torch draws one per example, channel *and position*: a
different and, pooled over positions, much weaker noise; its row says only what it costs."""


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races plain, learnable, fixed and the peer."""
    section = Section("conv", "Convolution, forward + backward", TEXT)
    torch.manual_seed(0)
    x = torch.randn(INPUT, requires_grad=True)

    def plain() -> nn.Module:
        return nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2)

    layers: dict[str, nn.Module] = {
        "plain": plain(),
        "flipout, learnable Gaussian": flipout.Perturbed(plain(), flipout.Gaussian(STD, learnable=True)),
        "flipout, fixed Gaussian": flipout.Perturbed(plain(), flipout.Gaussian(STD)),
    }
    missing = peers.why_missing()
    if missing:
        section.notes.append(missing)
    else:
        layers["bayesian-torch Conv2dFlipout"] = peers.conv2d(CHANNELS, CHANNELS, KERNEL, KERNEL // 2)
    timings = race({name: forward_backward(net, x) for name, net in layers.items()}, rounds=rounds, patience=patience)
    section.add_race("64 → 64, 3×3", timings)
    section.add_target("conv2d learnable / plain", timings["flipout, learnable Gaussian"], LEARNABLE_BOUND)
    if not missing:
        low, ahead, high = timings["bayesian-torch Conv2dFlipout"].over(timings["flipout, learnable Gaussian"])
        section.notes.append(
            f"bayesian-torch takes {ahead:.2f} times as long as learnable flipout (quartiles {low:.2f} – {high:.2f})."
        )
    return section


if __name__ == "__main__":
    print(run().markdown())
