"""Whether the library's laws hold on a device: outputs, gradients, moments, precision, synchronisation, compilation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import flipout
from benchmarks.gpu.tables import table
from flipout.reference import loop_forward

__all__ = ["laws"]

MEMBERS = 4


class _First(nn.Module):
    """The output of a module that returns a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return found[0]  # type: ignore[no-any-return]


#: Modules with the shape of one row of their input.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(17, 13), (17,)),
    "linear, sequences": (lambda: nn.Linear(17, 13), (5, 17)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 5, 5)),
    "LSTM": (lambda: _First(nn.LSTM(6, 8, num_layers=2, batch_first=True)), (5, 6)),
    "GRU": (lambda: _First(nn.GRU(6, 8, batch_first=True)), (5, 6)),
    "attention": (lambda: _First(nn.MultiheadAttention(16, 2, batch_first=True)), (5, 16)),
    "norms": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.GroupNorm(2, 6)), (4, 3, 3)),
}


def _error(device: torch.device, case: str, estimator: flipout.Estimator, noise: flipout.Noise, dtype: torch.dtype) -> float:
    """The largest difference of outputs and gradients from those of the loop over members, relative to their size."""
    torch.manual_seed(0)
    build, shape = CASES[case]
    net = flipout.Perturbed(build().to(device, dtype), noise, estimator, generator=torch.Generator(device).manual_seed(1))
    x = torch.randn(2 * MEMBERS, *shape, device=device, dtype=dtype, requires_grad=True)
    wanted = [*net.parameters(), x]
    with net.hold(MEMBERS) as draw:
        outputs = net(x), loop_forward(net.module, draw, x)
    ours, theirs = ([y, *torch.autograd.grad((y + 0.1 * y * y).sum(), wanted, allow_unused=True)] for y in outputs)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            worst = max(worst, float(((a - b).abs().max() / b.abs().max().clamp_min(1e-6)).detach()))
    return worst


def _exact(device: torch.device) -> list[list[object]]:
    rows: list[list[object]] = []
    noise = flipout.Gaussian(0.3, learnable=True)
    for case in CASES:
        for bases in (1, 2):
            error = _error(device, case, flipout.Flipout(bases=bases), noise, torch.float64)
            rows.append([case, f"{bases} base{'s' * (bases > 1)}, float64", error, _verdict(error < 1e-9)])
    return rows


def _lowered(device: torch.device) -> list[list[object]]:
    rows: list[list[object]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flipout.PrecisionWarning)
        for case in CASES:
            estimator = flipout.Flipout(noise_dtype=torch.bfloat16)
            error = _error(device, case, estimator, flipout.Gaussian(0.1, learnable=True), torch.float32)
            rows.append([case, "bfloat16 noise", error, _verdict(error < 0.1)])
    return rows


def _moments(device: torch.device) -> list[list[object]]:
    """z-scores of mean and variance of a member's perturbation, and of the correlation of two members."""
    net = flipout.Perturbed(nn.Linear(300, 400).to(device), flipout.Gaussian(0.3), generator=torch.Generator(device).manual_seed(2))
    with net.hold(4) as draw, torch.no_grad():
        own = [((draw.weights(n)["weight"] - net.module.weight) / 0.3).flatten().double() for n in (0, 3)]
    root = math.sqrt(own[0].numel())
    scores = {
        "mean": float(own[0].mean()) * root,
        "variance": float(own[0].square().mean() - 1) * root / math.sqrt(2),
        "two members": float((own[0] * own[1]).mean()) * root / math.sqrt(3),
    }
    return [["linear", name, score, _verdict(abs(score) < 5)] for name, score in scores.items()]


@contextmanager
def _watched(device: torch.device) -> Iterator[None]:
    """Raises where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _unsynchronised(device: torch.device) -> list[list[object]]:
    rows: list[list[object]] = []
    for case, (build, shape) in CASES.items():
        net = flipout.Perturbed(build().to(device), flipout.Gaussian(0.1, learnable=True))
        x = torch.randn(2 * MEMBERS, *shape, device=device)
        net(x).sum().backward()
        try:
            with _watched(device):
                net(x).sum().backward()
        except RuntimeError as error:
            rows.append([case, "host waits", str(error).splitlines()[0], _verdict(False)])
        else:
            rows.append([case, "host waits", "never" if device.type == "cuda" else "not asked of a CPU", _verdict(True)])
    return rows


def _graphs(device: torch.device, quick: bool) -> list[list[object]]:
    """CUDA graphs of a compiled step, against the same step as it stands."""
    if quick:
        return []
    rows: list[list[object]] = []
    mode: Any = "reduce-overhead" if device.type == "cuda" else "default"
    for case in ("linear", "convolution"):
        build, shape = CASES[case]
        net = flipout.Perturbed(build().to(device), flipout.Gaussian(0.1))
        x = torch.randn(2 * MEMBERS, *shape, device=device)
        with net.hold(MEMBERS), torch.no_grad():
            plain = net(x)
            compiled = torch.compile(net, mode=mode, fullgraph=True)
            for _ in range(4):
                error = float((compiled(x) - plain).abs().max())
        rows.append([case, f"compiled, {mode}", error, _verdict(error < 1e-3)])
    return rows


def laws(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """The table of all laws; a verdict other than "holds" is a failure."""
    rows = [*_exact(device), *_lowered(device), *_moments(device), *_unsynchronised(device), *_graphs(device, quick)]
    return [table("Laws on the device", ["case", "law", "seen", "verdict"], rows)]


def _verdict(good: bool) -> str:
    return "holds" if good else "FAILS"
