"""Fitness shaping: what fitness counts for, as weights of the update. All rank or scale over the whole population."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flipout.errors import ArgumentError

__all__ = ["SHAPINGS", "Shaping", "centered_rank", "find_shaping", "sign", "zscore"]

#: Fitness ``[n]`` to weights ``[n]``, larger is better in both.
Shaping = Callable[[Tensor], Tensor]


def centered_rank(fitness: Tensor) -> Tensor:
    """Ranks from -1/2 (worst) to 1/2 (best): nothing but the order counts (Salimans et al. 2017). Equal fitness, equal rank.

    Args:
        fitness: ``[n]``.

    Returns:
        ``[n]``, of mean zero.

    Example:
        >>> centered_rank(torch.tensor([3.0, 10.0, -1.0, 3.0]))
        tensor([ 0.0000,  0.5000, -0.5000,  0.0000])
    """
    _, value, count = torch.unique(fitness, return_inverse=True, return_counts=True)
    below = count.cumsum(0) - count
    middle = below.to(fitness.dtype) + (count - 1).to(fitness.dtype) / 2
    ranks: Tensor = middle[value] / max(len(fitness) - 1, 1) - 0.5
    return ranks


def zscore(fitness: Tensor) -> Tensor:
    """(F - mean) / standard deviation; zeros where all are equal.

    Example:
        >>> zscore(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """
    low, high = fitness.aminmax()
    if bool(low == high):
        return torch.zeros_like(fitness)
    centered = fitness / 2 - (low / 2 + high / 2) / 2  # halves and the largest size: squares of any fitness can be summed
    centered = centered / centered.abs().max()
    centered = centered - centered.mean()
    return centered / centered.square().mean().sqrt()


def sign(fitness: Tensor) -> Tensor:
    """+1 above the median of the population, -1 below it, 0 at it.

    Example:
        >>> sign(torch.tensor([1.0, 2.0, 30.0]))
        tensor([-1.,  0.,  1.])
    """
    ordered, n = fitness.sort().values, len(fitness)
    low, high = ordered[(n - 1) // 2], ordered[n // 2]
    return (fitness > low).to(fitness) - (fitness < high).to(fitness) if bool(low < high) else torch.sign(fitness - low)


SHAPINGS: dict[str, Shaping] = {"centered_rank": centered_rank, "zscore": zscore, "sign": sign}


def find_shaping(shaping: str | Shaping) -> Shaping:
    """A shaping by name, or the function itself.

    Raises:
        ArgumentError: if it is neither.
    """
    if isinstance(shaping, str) and shaping in SHAPINGS:
        return SHAPINGS[shaping]
    if isinstance(shaping, str) or not callable(shaping):
        names = ", ".join(map(repr, SHAPINGS))
        raise ArgumentError(f"fitness_shaping={shaping!r}: choose {names}, or give a function from fitness [n] to weights [n]")
    return shaping
