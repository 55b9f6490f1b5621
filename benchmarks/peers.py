"""Layers of other libraries, where they are installed.

bayesian-torch 0.5.0 (``pip install --no-deps bayesian-torch==0.5.0``) has ``LinearFlipout`` and ``Conv2dFlipout`` with a mean
and a softplus scale for each weight. Both return ``(output, kl)`` unless called with ``return_kl=False``, which is how they are
raced here: no KL is computed. Its convolution draws a sign for every *position* of the image as well as for every channel. What
it adds is therefore no perturbation of the kernel, and once pooled over positions its variance is far too small: the race tells
what it costs, not that it does the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["NAME", "conv2d", "linear", "lstm", "why_missing"]

NAME = "bayesian-torch"


class _WithoutKL(nn.Module):
    """A layer of bayesian-torch that returns its output only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, return_kl=False)


def why_missing() -> str | None:
    """Why the peer cannot run, or None if it can."""
    try:
        from bayesian_torch.layers import Conv2dFlipout, LinearFlipout  # noqa: F401
    except Exception as error:  # whatever its import raises, the benchmark goes on without it
        return f"{NAME} skipped: its import raised {type(error).__name__}: {error}"
    return None


def linear(width: int, out: int) -> nn.Module:
    from bayesian_torch.layers import LinearFlipout

    return _WithoutKL(LinearFlipout(width, out))


def conv2d(channels: int, out: int, kernel: int, padding: int) -> nn.Module:
    from bayesian_torch.layers import Conv2dFlipout

    return _WithoutKL(Conv2dFlipout(channels, out, kernel, padding=padding))


def lstm(width: int, units: int) -> nn.Module:
    """Takes its input batch first, and draws a new ΔW at every time step."""
    from bayesian_torch.layers import LSTMFlipout

    return _WithoutKL(LSTMFlipout(width, units))
