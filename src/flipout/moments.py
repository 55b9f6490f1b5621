"""The running mean and variance of a gradient, without keeping the gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flipout.errors import ArgumentError

__all__ = ["Moments"]


class Moments:
    """Welford's streaming mean of a gradient, and its squared deviations summed over the entries of each parameter.

        δ = g_k - m_{k-1},   m_k = m_{k-1} + δ/k,   M_k = M_{k-1} + (k-1)/k · ‖δ‖²

    Welford 1962. No gradient is kept: the memory is one gradient, whatever the number of draws.

    Example:
        >>> moments = Moments()
        >>> for g in (1.0, 2.0, 6.0):
        ...     moments.add({"w": torch.tensor([g, 0.0])})
        >>> moments.variance()
        {'w': 7.0}
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, gradient: Mapping[str, Tensor]) -> None:
        """Takes in one gradient by parameter name. The tensors are only read."""
        self.count += 1
        for name, g in gradient.items():
            if self.count == 1:
                self.mean[name] = g.detach().clone()
                self._squares[name] = torch.zeros((), dtype=torch.float64, device=g.device)
                continue
            delta = g.detach() - self.mean[name]
            self._squares[name] += (self.count - 1) / self.count * delta.square().sum().double()
            self.mean[name].add_(delta, alpha=1 / self.count)

    def variance(self) -> dict[str, float]:
        """The unbiased variance M/(k-1), summed over the entries of each parameter.

        Raises:
            ArgumentError: before the second gradient.
        """
        if self.count < 2:
            raise ArgumentError(f"a variance needs at least 2 gradients, got {self.count}")
        return {name: squares.item() / (self.count - 1) for name, squares in self._squares.items()}
