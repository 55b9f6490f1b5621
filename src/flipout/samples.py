"""What an estimator draws for, and what it draws: the unit noise of a parameter and the factors that make it differ per member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flipout.modes import transformed
from flipout.noise import Noise
from flipout.terms import Groups
from flipout.weight import Factor

__all__ = ["Sample", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is drawn for: a parameter's mean weight, its noise, and the axes along which signs may vary.

    ``axes`` are the output and input axes of a matrix or a convolution, the feature axis of an embedding, the only axis of a
    vector; a sign is never drawn along the taps of a kernel. ``matrix`` names the target whose output signs a bias shares.
    """

    name: str
    mean: Tensor
    noise: Noise
    axes: tuple[int, ...]
    matrix: str | None = None

    def on(self, device: torch.device) -> Target:
        """The target as if its mean stood on ``device``, for a draw that needs nothing but its shape."""
        here = self.mean.device == device
        return self if here else replace(self, mean=torch.empty((), dtype=self.mean.dtype, device=device).expand(self.mean.shape))

    def signs(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Axes and sizes of each sign factor: one an axis, or one number for a scalar."""
        return [((axis,), (self.mean.shape[axis],)) for axis in self.axes] or [((), ())]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One parameter's draw, free of gradients.

    Attributes:
        unit: ε, of the mean's shape; ``[N, *shape]`` or ``[K, *shape]`` if ``per_member``; 0-d where factors alone make the noise.
        factors: one tuple a term of the carrier.
        per_member: whether ``unit`` has a leading axis: one entry a member, or one a group of members.
        scaled: whether ``unit`` already carries the noise's fixed scale.
        groups: which entry of the leading axis each member has; None where each has its own.
    """

    unit: Tensor
    factors: tuple[tuple[Factor, ...], ...] = ((),)
    per_member: bool = False
    scaled: bool = False
    groups: Groups | None = None

    def without_row(self, row: int) -> Sample:
        """The sample without noise on one row of a table: for every member, and for whatever else uses the table."""

        def blank(values: Tensor, axis: int) -> Tensor:
            if transformed():
                return values.index_fill(axis, torch.tensor([row], device=values.device), 0)
            values.select(axis, row).zero_()  # drawn just now, and free of gradients
            return values

        if self.unit.dim():
            return replace(self, unit=blank(self.unit, int(self.per_member)))
        return replace(
            self,
            factors=tuple(
                tuple(replace(f, values=blank(f.values, 1)) if f.axes == (0,) and f.values is not None else f for f in factors)
                for factors in self.factors
            ),
        )

    def like(self, mean: Tensor) -> Sample:
        """The sample in the dtype and on the device of a mean."""
        if self.unit.dtype == mean.dtype and self.unit.device == mean.device:
            return self
        factors = tuple(
            tuple(replace(f, values=None if f.values is None else f.values.to(mean.device)) for f in term) for term in self.factors
        )
        return replace(self, unit=self.unit.to(dtype=mean.dtype, device=mean.device), factors=factors)

    def with_members(self, members: Sequence[int], fresh: Sample) -> Sample:
        """The sample with the given members' draws replaced by the rows of ``fresh``."""
        index = torch.as_tensor(list(members), device=self.unit.device)

        factors = tuple(
            tuple(replace(o, values=o.put(index, n), repeat=1) for o, n in zip(olds, news, strict=True))
            for olds, news in zip(self.factors, fresh.factors, strict=True)
        )
        unit = self.unit.index_copy(0, index, fresh.unit) if self.per_member and self.groups is None else self.unit
        return replace(self, unit=unit, factors=factors)
