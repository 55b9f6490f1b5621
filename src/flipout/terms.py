"""What a perturbation is made of: bases, the factors that make them differ per member, and whose rows are whose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flipout.errors import BatchError, DrawError
from flipout.noise import Source
from flipout.signs import pack, unpack

__all__ = ["Factor", "Layout", "Term"]


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

    def compact(self, dtype: torch.dtype) -> Tensor:
        """The values as they are kept: bits, or numbers in ``dtype``."""
        if self.values is None or not self.packed:
            return self.flat(dtype)
        return self.values

    def broadcast(self, ndim: int, dtype: torch.dtype) -> Tensor:
        """The values as ``[N, ...]`` that broadcasts against ``[N, *weight.shape]`` for a weight of rank ``ndim``."""
        values = self.flat(dtype)
        order = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        values = values.view(-1, *self.sizes).permute(0, *(1 + i for i in order))
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


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of a tensor belong to which member.

    Attributes:
        members: N, the number of different weights; None where each token draws its own (``granularity="token"``).
        rows: the rows of the module's own input on ``dim``: a multiple of N, in member-major blocks; None if unknown.
        dim: the batch dimension of the module's own input.
    """

    members: int | None
    rows: int | None
    dim: int

    def locate(self, x: Tensor, features: int, what: str) -> tuple[Tensor, int]:
        """Finds the axis of ``x`` that holds the rows, given that its last ``features`` axes hold none.

        An operand that all examples share (size 1 there) is expanded to the rows.

        Returns:
            ``x`` and the axis; the axis has ``k * members`` rows in member-major blocks.

        Raises:
            BatchError: if no axis can hold the rows.
        """
        members, rows, dim = self.members, self.rows, self.dim
        free = x.dim() - features
        if members is None:
            raise BatchError(
                f'{what} has no weights per token; granularity="token" serves linear, embedding and pointwise operations'
            )
        if dim < free:
            size = x.shape[dim]
            if size == rows or (rows is None and size % members == 0):
                return x, dim
            if size == 1 and rows is not None:
                return x.expand(*x.shape[:dim], rows, *x.shape[dim + 1 :]), dim
        if free == 1:  # folded (batch·time), or a batch-second model that kept one row per example
            size, step = x.shape[0], rows or members
            if size == step or (dim == 0 and step and size % step == 0):
                return x, 0
            if size == 1 and rows is not None:
                return x.expand(rows, *x.shape[1:]), 0
        raise BatchError(
            f"{what} got an input of shape {tuple(x.shape)}, whose rows cannot be matched to the draw: the module's own "
            f"input has {rows if rows is not None else 'k·' + str(members)} rows on batch_dim={dim}, for {members} members. "
            "An operation's input must have these rows on batch_dim, or be 2-D with a multiple of them (batch·time, "
            'member-major). Name the right batch_dim, exclude the parameter, or use Flipout(granularity="token") where '
            "rows are routed among examples"
        )
