"""Noise from any law of ``torch.distributions``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution

from flipout.errors import ArgumentError
from flipout.noise import Noise

__all__ = ["FromDistribution"]


@dataclass(frozen=True)
class FromDistribution(Noise):
    """ε from any real-valued ``torch.distributions`` law with mean zero, symmetric or not.

    Draws go through the inverse distribution function where the law has one, and otherwise through
    ``dist.sample`` under a seed taken from the generator, with torch's global random state put back.

    Args:
        dist: a law over the reals whose batch shape broadcasts to the weight.
        relative: scale ΔW by the mean weight.
        learnable: learn a factor on each entry, from 1.

    Raises:
        ArgumentError: if ``dist`` is no distribution over real scalars, or its mean is known and not zero.

    Example:
        >>> FromDistribution(torch.distributions.Laplace(0.0, 0.1)).symmetric
        True
    """

    std: float | Tensor = 1.0
    dist: Distribution = None  # type: ignore[assignment]

    standardized: ClassVar[bool] = False

    def __init__(self, dist: Distribution, relative: bool = False, learnable: bool = False) -> None:
        _check_distribution(dist)
        fields = {"std": 1.0, "relative": relative, "learnable": learnable, "dist": dist}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_even", _is_even(dist))

    @property
    def symmetric(self) -> bool:
        even: bool = self._even  # type: ignore[attr-defined]
        return even

    @property
    def discrete(self) -> bool:
        return bool(self.dist.support.is_discrete)  # type: ignore[union-attr]

    def unit(self, shape: torch.Size, *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        law = self.dist.expand(shape)
        drawn = _inverse_draw(law, generator, dtype, device)
        if drawn is None:
            drawn = _seeded_sample(law, generator, device)
        return drawn.detach().to(dtype=dtype, device=device)

    def unit_log_prob(self, unit: Tensor) -> Tensor:
        inside = _inside(self.dist, unit)
        if not bool(inside.all()):
            possible = _seeded_sample(self.dist, None, torch.device("cpu"), seed=0).to(unit)
            return torch.where(inside, self.dist.log_prob(torch.where(inside, unit, possible)), -math.inf)
        density: Tensor = self.dist.log_prob(unit)
        return density


def _check_distribution(dist: Any) -> None:
    if not isinstance(dist, Distribution):
        raise ArgumentError(f"FromDistribution({dist!r}): expected a torch.distributions.Distribution")
    if dist.event_shape:
        raise ArgumentError(
            f"FromDistribution({dist}): its draws are vectors (event shape {tuple(dist.event_shape)}), but entries of a "
            "weight are perturbed independently; give the law of one entry"
        )
    try:
        mean = dist.mean
    except NotImplementedError:
        return
    if bool((mean.abs() > 1e-6).any()):  # a law without a mean (Cauchy) has nan here and passes
        raise ArgumentError(
            f"FromDistribution({dist}): its mean is {mean}, but the mean weight is the module's own; take a law of mean 0"
        )


def _is_even(dist: Distribution) -> bool:
    """Whether the density is even, asked of the law's own draws."""
    drawn = _seeded_sample(dist.expand(torch.Size([256, *dist.batch_shape])), None, torch.device("cpu"), seed=0)
    if not bool(_inside(dist, -drawn).all()):
        return False
    return torch.allclose(dist.log_prob(drawn), dist.log_prob(-drawn), rtol=1e-4, atol=1e-4)


def _inside(dist: Distribution, value: Tensor) -> Tensor:
    """Where a value has a density. A transformed law names the range of its last transform alone as its support."""
    inside: Tensor = dist.support.check(value)  # type: ignore[union-attr]
    if isinstance(dist, TransformedDistribution):
        for transform in reversed(dist.transforms):
            value = transform.inv(value)  # pyright: ignore[reportAssignmentType]
        inside = inside & _inside(dist.base_dist, value)
    return inside


def _inverse_draw(law: Distribution, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if law.support.is_discrete:  # type: ignore[union-attr]
        return None
    wide = dtype if dtype == torch.float64 else torch.float32
    uniform = torch.rand(law.batch_shape, generator=generator, dtype=wide, device=device)
    uniform = uniform.clamp(min=torch.finfo(wide).tiny)  # rand() can return 0, where the inverse is infinite
    try:
        return law.icdf(uniform)
    except NotImplementedError:
        return None


def _seeded_sample(law: Distribution, generator: torch.Generator | None, device: torch.device, seed: int | None = None) -> Tensor:
    if seed is None:
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return law.sample()
