"""What do noise in bfloat16 and several base perturbations cost in training, against the plain layer and flipout in float32?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import flipout
from benchmarks.harness import MIN_ROUNDS, PATIENCE, forward_backward, race
from benchmarks.report import Section
from flipout.precision import multiplies_faster

STD, BASES = 0.05, 8
LOW = flipout.Flipout(noise_dtype=torch.bfloat16)
#: Name, layer, shape of the input, fixed noise, and bounds on a step with bfloat16 noise over the plain one: learnable, fixed.
SETTINGS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], flipout.Noise, float, float | None]] = [
    ("linear [8192, 784] → 512", lambda: nn.Linear(784, 512), (8192, 784), flipout.Gaussian(STD), 1.6, 1.4),
    ("linear [1024, 1024] → 1024", lambda: nn.Linear(1024, 1024), (1024, 1024), flipout.Gaussian(STD), 1.65, 1.45),
    ("linear [128, 1024] → 1024", lambda: nn.Linear(1024, 1024), (128, 1024), flipout.Gaussian(STD), 2.5, None),
    ("conv 64 → 64, 3×3", lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 64, 32, 32), flipout.Gaussian(STD), 1.6, None),
    ("conv 3 → 32, 5×5", lambda: nn.Conv2d(3, 32, 5, padding=2), (256, 3, 32, 32), flipout.Gaussian(STD), 1.6, None),
    ("LSTM 650 → 650, T = 35, batch 24", lambda: nn.LSTM(650, 650), (35, 24, 650), flipout.Gaussian(STD), 1.95, 1.75),
    ("LSTM 256 → 256, T = 35, batch 32", lambda: nn.LSTM(256, 256), (35, 32, 256), flipout.Gaussian(STD), 2.4, 2.1),
]

TEXT = f"""Forward and backward, as in the sections of the layers. *bfloat16*: the products of the noise run in it, those of the
mean in float32. *{BASES} bases*: the batch in {BASES} groups, each with a ΔW of its own, drawn anew in each step. Where the
processor multiplies no faster in bfloat16, the noise keeps float32 and these rows are left out."""


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races plain, float32 noise, bfloat16 noise and several bases at each setting."""
    section = Section("below", "Noise in bfloat16, several bases", TEXT)
    gains = multiplies_faster("cpu", torch.bfloat16)
    if not gains:
        section.notes.append("This processor multiplies no faster in bfloat16, so its rows and targets are left out.")
    for name, build, shape, fixed, learnable_bound, fixed_bound in SETTINGS:
        torch.manual_seed(0)
        x: Tensor = torch.randn(shape, requires_grad=True)
        learnable = flipout.Gaussian(STD, learnable=True)
        layers: dict[str, nn.Module] = {
            "plain": build(),
            "learnable": flipout.Perturbed(build(), learnable),  # type: ignore[arg-type]
            "fixed": flipout.Perturbed(build(), fixed),  # type: ignore[arg-type]
            f"fixed, {BASES} bases": flipout.Perturbed(build(), fixed, flipout.Flipout(bases=BASES)),  # type: ignore[arg-type]
        }
        if gains:
            layers["learnable, bfloat16"] = flipout.Perturbed(build(), learnable, LOW)
            layers["fixed, bfloat16"] = flipout.Perturbed(build(), fixed, LOW)
        timings = race({each: forward_backward(net, x) for each, net in layers.items()}, rounds=rounds, patience=patience)
        section.add_race(name, timings)
        if gains:
            section.add_target(f"{name}, learnable, bfloat16 / plain", timings["learnable, bfloat16"], learnable_bound)
            if fixed_bound is not None:
                section.add_target(f"{name}, fixed, bfloat16 / plain", timings["fixed, bfloat16"], fixed_bound)
        low, middle, high = timings[f"fixed, {BASES} bases"].over(timings["fixed"])
        section.notes.append(f"{name}: {BASES} bases take {middle:.2f} times as long as one (quartiles {low:.2f} – {high:.2f}).")
    return section


if __name__ == "__main__":
    print(run().markdown())
