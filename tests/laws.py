"""What the tests of laws share: estimators, judges, z-scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from cases import CASES, Case
from torch import Tensor

import flipout
from flipout.reference import loop_forward

MEMBERS = 3
EXACT = 1e-10
#: A z-score beyond this has a chance of 6e-7 under the law: what fails is the code, not the seed.
Z_LIMIT = 5.0

#: Estimators whose members have weights to list, so that the oracle can judge them.
#: Flipout keeps few signs as numbers and many as bits: ``conftest.py`` makes "flipout_bits" keep all of them as bits.
LISTED: dict[str, flipout.Estimator] = {
    "flipout": flipout.Flipout(),
    "flipout_bits": flipout.Flipout(),
    "shared": flipout.Shared(),
    "independent": flipout.Independent(),
    "low_rank": flipout.LowRank(2),
}


def pairs(names: Iterable[str] = LISTED) -> list[tuple[Case, str]]:
    """Every case with every estimator that can list its members."""
    return [(case, name) for case in CASES for name in names if case.held_to("low rank") or name != "low_rank"]


def pair_id(value: object) -> str:
    return str(value)


def wrap(case: Case, noise: flipout.Noise, estimator: flipout.Estimator, dtype: torch.dtype = torch.float64) -> flipout.Perturbed:
    """The case's module, wrapped, in evaluation mode (a held draw samples in either mode)."""
    net = flipout.Perturbed(
        case.build(dtype),
        noise,
        estimator,
        exclude=case.exclude,
        batch_dim=case.batch_dim,
        generator=torch.Generator().manual_seed(2),
    )
    return net.eval()


def oracle(net: flipout.Perturbed, draw: flipout.Draw, inputs: Sequence[Tensor]) -> Tensor:
    return loop_forward(net.module, draw, *inputs, batch_dim=net.batch_dim)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference between two tensors of one shape."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item() if a.numel() else 0.0


def z_mean(samples: Tensor, expected: Tensor | float) -> Tensor:
    """z-score of the mean of independent samples along axis 0."""
    error = samples.std(0) / math.sqrt(samples.shape[0])
    return (samples.mean(0) - expected) / error.clamp_min(torch.finfo(samples.dtype).tiny)


def z_difference(a: Tensor, b: Tensor) -> Tensor:
    """z-score of the difference of two means of independent samples along axis 0."""
    error = (a.var(0) / a.shape[0] + b.var(0) / b.shape[0]).sqrt()
    return (a.mean(0) - b.mean(0)) / error.clamp_min(torch.finfo(a.dtype).tiny)


def worst(z: Tensor) -> float:
    """The largest |z| of several, corrected for their number (Bonferroni), so that one limit serves all."""
    z = z.double().abs().flatten()
    tail = (torch.special.erfc(z / math.sqrt(2)) * z.numel()).clamp(max=1.0).min().clamp_min(1e-300)
    return float(math.sqrt(2) * torch.special.erfinv(1 - tail)) if tail > 1e-12 else float(z.max())
