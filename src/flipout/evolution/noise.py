"""What the members of a generation are perturbed by: the samples of an estimator, drawn from counters.

A *direction* is a perturbation ΔW_p. With antithetic pairs, members 2p and 2p + 1 are W̄ + ΔW_p and W̄ - ΔW_p; without, a member
has a direction to itself. Pairs are made by the signs alone: under flipout -ΔW ∘ (r sᵀ) = ΔW ∘ ((-r) sᵀ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flipout.estimators import Estimator, Flipout, LowRank
from flipout.evolution.counters import Counters, Place
from flipout.samples import Sample, Target
from flipout.signs import packed_size, unpack
from flipout.weight import Factor

__all__ = ["Directions", "Law"]

#: Up to so many signs are unpacked when they are drawn, for all calls of the module under the draw.
_FEW_SIGNS = 2**20
#: Draws that a parameter may have: its base, and its factors.
_DRAWS = 2


@dataclass(frozen=True)
class Law:
    """The law of the perturbations of a generation.

    Attributes:
        estimator: Flipout, LowRank or Independent.
        base: ``"rademacher"`` or ``"gaussian"``.
        std: the standard deviation of every weight's perturbation.
    """

    estimator: Estimator
    base: str
    std: float


@dataclass(frozen=True)
class Directions:
    """Directions ``start`` to ``stop - 1`` of a generation, all under one base perturbation.

    Attributes:
        law: of the perturbations.
        counters: where their numbers come from.
        generation, base, start, stop: which.
        paired: whether a sample has two members a direction, + and -, or one.
    """

    law: Law
    counters: Counters
    generation: int
    base: int
    start: int
    stop: int
    paired: bool

    def samples(self, targets: Sequence[Target]) -> list[Sample]:
        """One sample a parameter, scaled by the standard deviation."""
        estimator = self.law.estimator
        if isinstance(estimator, Flipout):
            return self._flipout(targets)
        if isinstance(estimator, LowRank):
            return [self._low_rank(i, target, estimator.rank) for i, target in enumerate(targets)]
        return [self._independent(i, target) for i, target in enumerate(targets)]

    def _flipout(self, targets: Sequence[Target]) -> list[Sample]:
        rows: dict[str, Factor] = {}
        samples = []
        own = [target.signs() if target.matrix is None else [] for target in targets]
        members = (self.stop - self.start) * (1 + self.paired)
        few = members * sum(math.prod(sizes) for places in own for _, sizes in places) <= _FEW_SIGNS
        for i, (target, places) in enumerate(zip(targets, own, strict=True)):
            factors: tuple[Factor, ...] = ()
            if target.matrix is None:
                factors = self._signs(i, target, places, few)
                rows[target.name] = factors[0]
            samples.append(Sample(self._base(i, target), (factors,), scaled=True))
        return [  # a bias has the output signs of its matrix
            sample if target.matrix is None else Sample(sample.unit, ((rows[target.matrix],),), scaled=True)
            for target, sample in zip(targets, samples, strict=True)
        ]

    def _base(self, i: int, target: Target) -> Tensor:
        """σ ε of the mean's shape, shared by all members of the base."""
        place, count = Place(self.generation, self.base, _DRAWS * i), target.mean.numel()
        unit = self._numbers(place, 0, 1, count, target).mul_(self.law.std)
        return unit.view(target.mean.shape)

    def _signs(
        self, i: int, target: Target, places: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], few: bool
    ) -> tuple[Factor, ...]:
        widths = [packed_size(math.prod(sizes)) for _, sizes in places]
        drawn = self.counters.bits(Place(self.generation, 0, _DRAWS * i + 1), self.start, self.stop, 8 * sum(widths))
        factors = []
        for k, (bits, (axes, sizes)) in enumerate(zip(drawn.split(widths, 1), places, strict=True)):
            if self.paired:
                bits = torch.stack([bits, bits if k else ~bits], 1).flatten(0, 1)
            bits = bits.contiguous().to(target.mean.device)
            values = unpack(bits, math.prod(sizes), target.mean.dtype) if few else bits
            factors.append(Factor(values, axes, sizes, packed=not few, signs=True, repeat=2 if self.paired and k else 1))
        return tuple(factors)

    def _low_rank(self, i: int, target: Target, rank: int) -> Sample:
        mean = target.mean
        if mean.dim() < 2:
            return self._independent(i, target)
        rows, columns = mean.shape[0], mean.shape[1:]
        place, width = Place(self.generation, 0, _DRAWS * i + 1), rows + columns.numel()
        drawn = self._numbers(place, self.start, self.stop, rank * width, target).view(-1, rank, width)
        a, b = drawn.split([rows, columns.numel()], 2)
        if self.paired:
            a, b = self._pairs(a), b.repeat_interleave(2, 0)
        factors = tuple(
            (
                Factor(a[:, k].contiguous(), (0,), (rows,), packed=False),
                Factor(b[:, k].contiguous(), tuple(range(1, mean.dim())), tuple(columns), packed=False),
            )
            for k in range(rank)
        )
        return Sample(torch.full((), self.law.std / math.sqrt(rank), dtype=mean.dtype, device=mean.device), factors, scaled=True)

    def _independent(self, i: int, target: Target) -> Sample:
        mean = target.mean
        drawn = self._numbers(Place(self.generation, 0, _DRAWS * i + 1), self.start, self.stop, mean.numel(), target)
        drawn = drawn.mul_(self.law.std).view(self.stop - self.start, *mean.shape)
        return Sample(self._pairs(drawn) if self.paired else drawn, per_member=True, scaled=True)

    def _numbers(self, place: Place, start: int, stop: int, count: int, target: Target) -> Tensor:
        """Unit draws of the law, ``[stop - start, count]``, in the parameter's dtype and on its device; free to be changed."""
        mean = target.mean
        if self.law.base == "gaussian":
            return self.counters.normals(place, start, stop, count).to(device=mean.device, dtype=mean.dtype)
        bits = self.counters.bits(place, start, stop, count).contiguous().to(mean.device)
        return unpack(bits, count, mean.dtype)

    @staticmethod
    def _pairs(numbers: Tensor) -> Tensor:
        """+ and - of every direction, one after the other."""
        return torch.stack([numbers, -numbers], 1).flatten(0, 1)
