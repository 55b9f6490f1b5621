"""What a perturbation is made of: bases, and the factors that make them differ per member."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flipout.errors import DrawError
from flipout.noise import Source
from flipout.signs import pack, unpack

__all__ = ["Factor", "Term"]


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What multiplies a base per member, along some axes of the weight.

    Attributes:
        values: ``[N, prod(sizes)]`` numbers, or as many signs packed to uint8 bits; None for signs that each operation
            draws afresh, one row a token.
        axes: the axes of the weight that it varies along, in the order in which ``values`` is laid out.
        sizes: the weight's size along each of ``axes``.
        packed: whether ``values`` holds bits.
        signs: whether numbers are known to be -1 and +1, as bits always are.
        repeat: rows of ``values`` that are known to be equal, one group after the other (2 for antithetic pairs); 1 where nothing
            is known.
    """

    values: Tensor | None
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    packed: bool = True
    signs: bool = False
    repeat: int = 1

    @property
    def count(self) -> int:
        """How many values a member has."""
        return math.prod(self.sizes)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """The values, ``[N, prod(sizes)]``."""
        if self.values is None:
            raise DrawError('signs drawn per token (granularity="token") exist only inside an operation on tokens')
        if self.packed:
            return unpack(self.values, self.count, dtype)
        return self.values if self.values.dtype == dtype else self.values.to(dtype)

    def shaped(self, dtype: torch.dtype) -> Tensor:
        """The values, ``[N, *sizes]``."""
        values = self.flat(dtype)
        return values.view(values.shape[0], *self.sizes)

    def compact(self, dtype: torch.dtype) -> Tensor:
        """The values as they are kept: bits, or numbers in ``dtype``."""
        if self.values is None or not self.packed:
            return self.flat(dtype)
        return self.values

    def broadcast(self, ndim: int, dtype: torch.dtype) -> Tensor:
        """The values as ``[N, ...]`` that broadcasts against ``[N, *weight.shape]`` for a weight of rank ``ndim``."""
        values = self.shaped(dtype)
        order = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        values = values.permute(0, *(1 + i for i in order))
        shape = [values.shape[0]] + [1] * ndim
        for i in order:
            shape[1 + self.axes[i]] = self.sizes[i]
        return values.reshape(shape)

    def put(self, index: Tensor, fresh: Factor) -> Tensor:
        """The values with the rows ``index`` replaced by those of ``fresh``."""
        if self.values is None or fresh.values is None:
            raise DrawError("signs drawn per token belong to no member")
        values = fresh.values
        if self.packed != fresh.packed:  # few fresh signs are drawn as numbers
            values = pack(values) if self.packed else fresh.flat(self.values.dtype)
        return self.values.index_copy(0, index, values)

    def members(self, index: Tensor | slice) -> Factor:
        """The factor of some members only."""
        if self.values is None:
            return self
        return replace(self, values=self.values[index], repeat=1)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One summand of the perturbation.

    Attributes:
        base: B, broadcastable to the weight's shape; with a leading member axis if ``per_member``.
        factors: what multiplies it per member.
        per_member: whether the base differs per member by itself.
        source: what the base was made of, if a rule may take its gradient there itself.
    """

    base: Tensor
    factors: tuple[Factor, ...] = ()
    per_member: bool = False
    source: Source | None = None

    def dense(self, ndim: int) -> Tensor:
        """The term for every member, broadcastable to ``[N, *weight.shape]``."""
        value = self.base if self.per_member else self.base.unsqueeze(0)
        for factor in self.factors:
            value = value * factor.broadcast(ndim, self.base.dtype)
        return value

    def members(self, index: Tensor | slice) -> Term:
        """The term of some members only."""
        base = self.base[index] if self.per_member else self.base
        source = None if self.per_member else self.source
        return Term(base, tuple(factor.members(index) for factor in self.factors), self.per_member, source)

    def map(self, function: Callable[[Tensor], Tensor]) -> Term:
        """The term with a function of each entry applied to its base."""
        return Term(function(self.base), self.factors, self.per_member)
