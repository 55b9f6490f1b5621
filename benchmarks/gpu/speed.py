"""What a training step costs under flipout, in plain steps; peak memory; an update of FlipES against a table of noise."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import flipout
from benchmarks.gpu.tables import table
from flipout_experiments.paper.evolution.timing import TimingSettings, cores_to_use, explicit_seconds, flipes_seconds

__all__ = ["evolution", "layers", "transformer"]

STD = 0.05
Step = Callable[[], None]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _race(steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, one a round, in an order that rotates."""
    names, seconds = list(steps), {name: [] for name in steps}
    for i in range(rounds + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _synchronize(device)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            if i > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _peak(step: Step, device: torch.device) -> float | str:
    """MiB allocated at the peak of a step beyond what stood before."""
    if device.type != "cuda":
        return "–"
    step()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _contestants(build: Callable[[], nn.Module], x: Tensor, fixed: flipout.Noise, bases: int) -> dict[str, Step]:
    learnable, low = flipout.Gaussian(STD, learnable=True), flipout.Flipout(noise_dtype=torch.bfloat16)
    nets: dict[str, nn.Module] = {
        "plain": build(),
        "fixed": flipout.Perturbed(build(), fixed),
        "fixed, bfloat16 noise": flipout.Perturbed(build(), fixed, low),
        "learnable": flipout.Perturbed(build(), learnable),
        "learnable, bfloat16 noise": flipout.Perturbed(build(), learnable, low),
        f"fixed, {bases} bases": flipout.Perturbed(build(), fixed, flipout.Flipout(bases=bases)),
        "shared": flipout.Perturbed(build(), fixed, flipout.Shared()),
    }

    def step(net: nn.Module) -> Step:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            y = net(x)
            (y[0] if isinstance(y, tuple) else y).float().mean().backward()

        return run

    return {name: step(net.to(x.device)) for name, net in nets.items()}


def _rows(layer: str, steps: Mapping[str, Step], device: torch.device, rounds: int) -> list[list[object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flipout.PrecisionWarning)
        seconds = _race(steps, device, rounds)
    rows: list[list[object]] = []
    for name, times in seconds.items():
        ratios = sorted(t / p for t, p in zip(times, seconds["plain"], strict=True))
        quartiles = f"{ratios[len(ratios) // 4]:.2f} – {ratios[(3 * len(ratios)) // 4]:.2f}"
        rows.append([layer, name, 1e3 * statistics.median(times), statistics.median(ratios), quartiles, _peak(steps[name], device)])
    return rows


_HEADER = ["layer", "contestant", "ms", "over plain", "quartiles", "peak MiB"]


def layers(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Linear, convolution and LSTM, forward and backward."""
    rounds, small = (3, 8) if quick else (30, 1)
    gaussian, rows = flipout.Gaussian(STD), []
    for n, width, out in ((8192, 784, 512), (1024, 1024, 1024), (128, 1024, 1024)):
        x = torch.randn(n // small, width // small, device=device, requires_grad=True)
        steps = _contestants(lambda width=width, out=out: nn.Linear(width // small, out // small), x, gaussian, 8)  # type: ignore[misc]
        rows += _rows(f"linear {n} × {width} → {out}", steps, device, rounds)
    for n, channels, out, size in ((256, 64, 64, 32), (1024, 3, 32, 32)):
        x = torch.randn(n // small, channels, size // (2 if quick else 1), size // (2 if quick else 1), device=device)
        x.requires_grad_()
        steps = _contestants(lambda c=channels, o=out: nn.Conv2d(c, o, 3, padding=1), x, gaussian, 8)  # type: ignore[misc]
        rows += _rows(f"convolution {channels} → {out} 3×3, {n} images", steps, device, rounds)
    for units, batch, noise in ((650, 40, flipout.DropConnect(0.5)), (256, 32, gaussian)):
        x = torch.randn(batch, 35 // (5 if quick else 1), units // small, device=device, requires_grad=True)
        steps = _contestants(lambda u=units: nn.LSTM(u // small, u // small, batch_first=True), x, noise, 4)  # type: ignore[misc]
        rows += _rows(f"LSTM {units}, {batch} sequences", steps, device, rounds)
    return [table("A training step, over that of the plain layer", _HEADER, rows)]


class _Blocks(nn.Module):
    """GPT-2's blocks: pre-norm attention and a fourfold perceptron."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(x)
        return found


def transformer(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """The blocks of GPT-2 small: 12 of 768, on 8 × 128 tokens."""
    width, depth, heads, rows, length = (32, 2, 2, 8, 8) if quick else (768, 12, 12, 8, 128)
    x = torch.randn(rows, length, width, device=device, requires_grad=True)
    steps = _contestants(lambda: _Blocks(width, depth, heads), x, flipout.MultiplicativeGaussian(0.1), 4)
    return [table("GPT-2's blocks", _HEADER, _rows(f"{depth} blocks of {width}", steps, device, 2 if quick else 15))]


def evolution(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Seconds per update of FlipES on the device against perturbations from a table of noise on the host's cores: Figure 5."""
    settings = TimingSettings((16,), (), 64, 64, 4, 1) if quick else TimingSettings((512, 2048), (), 8192, 4096, 40, 3)
    nets = [("fc", float(width)) for width in settings.fc_widths]
    cores = min(cores_to_use(), 2 if quick else 40)
    each = explicit_seconds(nets, settings, cores)
    rows: list[list[object]] = []
    for (net, width), explicit in zip(nets, each, strict=True):
        ours = statistics.median(flipes_seconds(net, width, settings, device))
        theirs = explicit * settings.samples / cores
        rows.append([f"FC of {width:.0f}", settings.samples, ours, theirs, cores, theirs / ours])
    header = ["net", "members", "FlipES, s", "noise table, s", "on cores", "noise table / FlipES"]
    return [table("An update of a population (Figure 5)", header, rows)]
