"""Priors beside those of torch.distributions, of which any law over the reals will do."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

from flipout.bayes.posterior import posteriors
from flipout.errors import ArgumentError
from flipout.perturb import Perturbed

__all__ = ["LogUniform", "ScaleMixture", "centred_prior"]


class ScaleMixture(Distribution):
    """π N(0, σ₁²) + (1 - π) N(0, σ₂²): most weights near zero, some far from it (Blundell et al. 2015, Eq. 7).

    Args:
        weight: π, of the first normal, 0 < π < 1.
        std1, std2: σ₁ and σ₂, positive.

    Raises:
        ArgumentError: for numbers outside these ranges.

    Example:
        >>> ScaleMixture(0.5, 1.0, 0.1).log_prob(torch.tensor(0.0)).exp()
        tensor(2.1942)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]
    support = constraints.real  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    has_rsample = False

    def __init__(self, weight: float = 0.5, std1: float = 1.0, std2: float = math.exp(-6)) -> None:
        if not 0.0 < weight < 1.0:
            raise ArgumentError(f"ScaleMixture(weight={weight!r}): expected the share of the first normal, 0 < weight < 1")
        for name, value in {"std1": std1, "std2": std2}.items():
            if not (value > 0 and math.isfinite(value)):
                raise ArgumentError(f"ScaleMixture({name}={value!r}): a standard deviation is positive and finite")
        self.weight, self.std1, self.std2 = float(weight), float(std1), float(std2)
        super().__init__(validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        logs = [
            math.log(share) + Normal(0.0, std, validate_args=False).log_prob(value)
            for share, std in ((self.weight, self.std1), (1 - self.weight, self.std2))
        ]
        return torch.logaddexp(*logs)

    def __repr__(self) -> str:
        return f"ScaleMixture({self.weight}, {self.std1}, {self.std2})"


class LogUniform(Distribution):
    """``p(w) ∝ 1/|w|``: every order of magnitude is as likely as any other (variational dropout, Kingma et al. 2015).

    The prior is improper. Its constant is chosen such that the KL of N(μ, σ²) is 0 where nothing is known of the weight
    (σ²/μ² → ∞), as Molchanov et al. (2017) have it; their approximation is not needed:

        KL = 2 ∫_0^x D(t) dt,   x = |μ| / (√2 σ),   D Dawson's function      (Hron et al. 2018)

    Example:
        >>> torch.distributions.kl_divergence(Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.1])), LogUniform())
        tensor([0.0000, 2.9327])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]
    support = constraints.real  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    has_rsample = False
    #: log p(w) = constant - log|w|.
    constant = -0.5 * (math.log(2 * math.pi * math.e) + np.euler_gamma + math.log(2.0))

    def __init__(self) -> None:
        super().__init__(validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.constant - value.abs().log()

    def __repr__(self) -> str:
        return "LogUniform()"


def centred_prior(
    net: Perturbed, std: float | None = None, relative_std: float | None = None, floor: float = 1e-3
) -> dict[str, Normal]:
    """A normal prior around the weights that a net has now, for each of its random parameters.

        N(W_ij, std²)   or   N(W_ij, max(relative_std · |W_ij|, floor)²)

    Taken of a pretrained net, it says that fine-tuned weights should stay near those they came with. The means are copied and
    do not move with training. Move the net to its device first.

    Args:
        net: whose random parameters it is for.
        std: of the prior, in the units of the weights.
        relative_std: in its place, as a fraction of each weight's magnitude.
        floor: the least standard deviation under ``relative_std``.

    Returns:
        A prior by parameter name, for :func:`flipout.bayes.kl_divergence`.

    Raises:
        ArgumentError: unless one of ``std`` and ``relative_std`` is given, positive and finite, and so is ``floor``.

    Example:
        >>> import flipout
        >>> net = flipout.bayes.from_pretrained(torch.nn.Linear(3, 2))
        >>> sorted(centred_prior(net, std=0.1))
        ['bias', 'weight']
    """
    if (std is None) == (relative_std is None):
        raise ArgumentError(f"centred_prior(std={std!r}, relative_std={relative_std!r}): give one of the two")
    for name, value in {"std": std, "relative_std": relative_std, "floor": floor}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ArgumentError(f"centred_prior({name}={value!r}): expected a positive number; at width zero the KL is infinite")
    found = {}
    for each in posteriors(net):
        centre = each.mean.detach().clone()
        if std is not None:
            width = torch.full_like(centre, std)
        else:
            assert relative_std is not None
            width = (relative_std * centre.abs()).clamp_min(floor)
        found[each.name] = Normal(centre, width)
    return found
