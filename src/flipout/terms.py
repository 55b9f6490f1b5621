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

__all__ = ["Factor", "Groups", "Term"]


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What multiplies a base per member, along some axes of the weight.

    Attributes:
        values: ``[N, prod(sizes)]`` numbers, or as many signs packed to uint8 bits; None where there are none yet
            (:meth:`per_token`) or never will be (:meth:`of_result`).
        axes: the axes of the weight that it varies along, in the order in which ``values`` is laid out.
        sizes: the weight's size along each of ``axes``.
        packed: whether ``values`` holds bits.
        signs: whether numbers are known to be -1 and +1, as bits always are.
        repeat: rows of ``values`` that are known to be equal, one group after the other (2 for antithetic pairs); 1 where nothing
            is known.
        in_result: whether this is :meth:`of_result`.
    """

    values: Tensor | None
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    packed: bool = True
    signs: bool = False
    repeat: int = 1
    in_result: bool = False

    @classmethod
    def per_token(cls, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Factor:
        """Signs that each operation draws afresh, one row a token."""
        return cls(None, axes, sizes)

    @classmethod
    def of_result(cls) -> Factor:
        """Marks a term whose base is the scale of a noise that the operation draws on its result: it has no weights to list."""
        return cls(None, (), (), in_result=True)

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
class Groups:
    """Which of several bases each member has.

    Attributes:
        each: members to a base, where they stand in runs of one length, the runs in the order of the bases.
        index: the base of each member ``[N]`` where they stand in any other way; else None.
    """

    each: int
    index: Tensor | None = None

    def of(self, count: int, device: torch.device) -> Tensor:
        """The base of each member ``[N]``, of ``count`` bases."""
        if self.index is not None:
            return self.index.to(device)
        return torch.arange(count, device=device).repeat_interleave(self.each)

    def members(self, index: Tensor | slice, count: int, device: torch.device) -> Groups:
        """The groups of some members only."""
        return Groups(self.each, self.of(count, device)[index])

    def same(self, other: Groups | None) -> bool:
        """Whether members of both are grouped alike."""
        return other is not None and self.each == other.each and self.index is other.index


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One summand of the perturbation.

    Attributes:
        base: B, broadcastable to the weight's shape; with a leading axis if ``per_member``.
        factors: what multiplies it per member.
        per_member: whether the base has a leading axis: one entry a member, or one a group of members.
        source: what the base was made of, if a rule may take its gradient there itself.
        groups: which entry of the leading axis each member has; None where each has its own.
    """

    base: Tensor
    factors: tuple[Factor, ...] = ()
    per_member: bool = False
    source: Source | None = None
    groups: Groups | None = None

    @property
    def blocks(self) -> bool:
        """Whether members share one base, or share several in runs of one length."""
        return not self.per_member or (self.groups is not None and self.groups.index is None)

    def listed(self) -> Tensor:
        """The base of every member, ``[N, …]``; ``[1, …]`` where all share one."""
        if not self.per_member:
            return self.base.unsqueeze(0)
        if self.groups is None:
            return self.base
        return self.base.index_select(0, self.groups.of(self.base.shape[0], self.base.device))

    def by_axis(self, ndim: int) -> list[Factor | None] | None:
        """The one factor along each axis of a weight; None where one spans no axis or several, or two share one."""
        found: list[Factor | None] = [None] * ndim
        for factor in self.factors:
            if len(factor.axes) != 1 or factor.axes[0] >= ndim or found[factor.axes[0]] is not None:
                return None
            found[factor.axes[0]] = factor
        return found

    def sides(self, ndim: int, dtype: torch.dtype) -> list[Tensor | None] | None:
        """The numbers ``[N, size]`` along each axis of a weight, factors along one axis multiplied; None where one spans several.

        A factor along no axis, which is one number a member, counts to the first.
        """
        found: list[Tensor | None] = [None] * ndim
        for factor in self.factors:
            if len(factor.axes) > 1:
                return None
            axis, values = (factor.axes or (0,))[0], factor.flat(dtype)
            held = found[axis]
            found[axis] = values if held is None else held * values
        return found

    def over(self, base: Tensor, factors: tuple[Factor, ...] | None = None) -> Term:
        """The term with another base, of the same members, and other factors where given."""
        return Term(base, self.factors if factors is None else factors, self.per_member, groups=self.groups)

    def dense(self, ndim: int) -> Tensor:
        """The term for every member, broadcastable to ``[N, *weight.shape]``."""
        value = self.listed()
        for factor in self.factors:
            value = value * factor.broadcast(ndim, self.base.dtype)
        return value

    def members(self, index: Tensor | slice) -> Term:
        """The term of some members only."""
        factors = tuple(factor.members(index) for factor in self.factors)
        if self.groups is not None:
            groups = self.groups.members(index, self.base.shape[0], self.base.device)
            return Term(self.base, factors, True, groups=groups)
        base = self.base[index] if self.per_member else self.base
        return Term(base, factors, self.per_member, None if self.per_member else self.source)

    def repeated(self, times: int) -> Term:
        """The term with each member ``times`` times, one after the other."""
        if self.per_member and self.groups is None:
            return self.members(torch.arange(len(self.base), device=self.base.device).repeat_interleave(times))
        factors = tuple(f if f.values is None else replace(f, values=f.values.repeat_interleave(times, 0)) for f in self.factors)
        groups = self.groups
        if groups is not None:
            index = None if groups.index is None else groups.index.repeat_interleave(times)
            groups = Groups(groups.each * times, index)
        return replace(self, factors=tuple(replace(f, repeat=1) for f in factors), groups=groups)

    def map(self, function: Callable[[Tensor], Tensor]) -> Term:
        """The term with a function of each entry applied to its base."""
        return self.over(function(self.base))
