"""A weight under another shape, order or part of its axes, with the factors of its members.

Each maps the mean, the bases and the axes of the factors; sign bits are left packed wherever the axes they vary along survive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from flipout.errors import DrawError
from flipout.signs import packed_size
from flipout.weight import Factor, PerturbedWeight, Term

__all__ = ["broadcast", "narrowed_to_one", "permute", "reshape", "scaled", "take"]


def permute(weight: PerturbedWeight, order: Sequence[int]) -> PerturbedWeight:
    """Permutes the axes of the weight: axis ``order[i]`` becomes axis ``i``."""
    order = [axis % weight.mean_weight.dim() for axis in order]
    place = {old: new for new, old in enumerate(order)}

    def of_term(term: Term) -> Term:
        factors = tuple(replace(f, axes=tuple(place[axis] for axis in f.axes)) for f in term.factors)
        if term.per_member:
            base = term.base.permute(0, *(1 + axis for axis in order))
        else:
            base = term.base.permute(order) if term.base.dim() else term.base
        return term.over(base, factors)

    return weight.replace(weight.mean_weight.permute(order), [of_term(term) for term in weight.terms])


def reshape(weight: PerturbedWeight, shape: Sequence[int]) -> PerturbedWeight:
    """Reads the weight's entries, in order, under another shape."""
    old = weight.mean_weight.shape
    mean = weight.mean_weight.reshape(tuple(shape))
    groups = _matched(old, mean.shape)

    def of_factor(factor: Factor) -> Factor:
        touched = [group for group in groups if set(group[0]) & set(factor.axes)]
        whole = [axis for before, _ in touched for axis in before if old[axis] != 1]
        kept = [axis for axis in factor.axes if old[axis] != 1]
        if not kept:  # one sign for all entries
            return replace(factor, axes=(), sizes=())
        after = [axis for _, axes in touched for axis in axes if mean.shape[axis] != 1]
        axes, sizes = tuple(after), tuple(mean.shape[axis] for axis in after)
        if whole == kept:  # the factor varies along all that is regrouped: its layout stays
            return replace(factor, axes=axes, sizes=sizes)
        if factor.values is None:
            raise DrawError("a view that mixes axes with signs and axes without cannot be read per token")
        values = factor.broadcast(len(old), weight.mean_weight.dtype)
        values = values.expand(-1, *(size if axis in whole else 1 for axis, size in enumerate(old)))
        return _regrouped(factor, values, axes, sizes)

    def of_term(term: Term) -> Term:
        base = term.base
        if term.per_member:
            base = base.reshape(base.shape[0], *mean.shape)
        elif base.dim():
            base = base.expand(old).reshape(mean.shape)
        return term.over(base, tuple(of_factor(f) for f in term.factors))

    return weight.replace(mean, [of_term(term) for term in weight.terms])


def _regrouped(factor: Factor, values: Tensor, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Factor:
    """A factor of some of another's values, as numbers."""
    values = values.reshape(values.shape[0], math.prod(sizes))
    return Factor(values, axes, sizes, packed=False, signs=factor.packed or factor.signs)


def take(weight: PerturbedWeight, axis: int, index: slice | Tensor) -> PerturbedWeight:
    """Selects along one axis, which stays."""
    axis %= weight.mean_weight.dim()

    def pick(tensor: Tensor, at: int) -> Tensor:
        return tensor[(slice(None),) * at + (index,)]

    mean = pick(weight.mean_weight, axis)

    def of_factor(factor: Factor) -> Factor:
        if axis not in factor.axes:
            return factor
        at = factor.axes.index(axis)
        sizes = (*factor.sizes[:at], mean.shape[axis], *factor.sizes[at + 1 :])
        if factor.values is None:
            return replace(factor, sizes=sizes)
        if (bits := _packed_slice(factor, index)) is not None:
            return replace(factor, values=bits, sizes=sizes)
        values = pick(factor.shaped(weight.mean_weight.dtype), 1 + at)
        return _regrouped(factor, values, factor.axes, sizes)

    def of_term(term: Term) -> Term:
        base = term.base
        if base.dim():
            base = pick(base, axis + term.per_member)
        return term.over(base, tuple(of_factor(f) for f in term.factors))

    return weight.replace(mean, [of_term(term) for term in weight.terms])


def broadcast(weight: PerturbedWeight, shape: Sequence[int]) -> PerturbedWeight:
    """The weight expanded to a larger shape, along whose new entries the members' values repeat."""
    mean = weight.mean_weight.expand(tuple(shape))
    if mean.numel() > weight.mean_weight.numel():
        weight.require_drawn("expand(), where entries share one noise")
    old = weight.mean_weight.shape
    lead = mean.dim() - len(old)

    def of_factor(factor: Factor) -> Factor:
        # an axis of size one has one sign, which the expanded axis shares: drop it from the sizes, not from the values
        kept = [(axis + lead, size) for axis, size in zip(factor.axes, factor.sizes, strict=True) if old[axis] != 1]
        return replace(factor, axes=tuple(axis for axis, _ in kept), sizes=tuple(size for _, size in kept))

    def of_term(term: Term) -> Term:
        base = term.base
        if term.per_member:
            base = base.reshape(base.shape[0], *[1] * lead, *base.shape[1:]).expand(-1, *mean.shape)
        elif base.dim():
            base = base.expand(mean.shape)
        return term.over(base, tuple(of_factor(f) for f in term.factors))

    return weight.replace(mean, [of_term(term) for term in weight.terms])


def narrowed_to_one(weight: PerturbedWeight, axis: int) -> PerturbedWeight:
    """The weight with one entry on an axis along which it is expanded; itself where it is not."""
    mean = weight.mean_weight
    if mean.shape[axis] == 1 or mean.stride(axis) != 0:
        return weight
    for term in weight.terms:
        at, ndim = axis + term.per_member, mean.dim() + term.per_member
        base = term.base
        if (base.dim() and (base.dim() != ndim or (base.shape[at] != 1 and base.stride(at) != 0))) or any(
            axis in f.axes for f in term.factors
        ):
            return weight
    return take(weight, axis, slice(0, 1))


def scaled(weight: PerturbedWeight, values: Tensor, axis: int | None) -> PerturbedWeight:
    """Each member's weight times numbers of its own: W_n ∘ c_n, whose terms stay products of a base with factors.

    Args:
        values: c ``[N, size of the axis]``; ``[N, 1]`` without an axis.
        axis: the axis along which c varies, or None.
    """
    mean = weight.mean_weight
    axes: tuple[int, ...] = () if axis is None else (axis,)
    sizes = tuple(mean.shape[at] for at in axes)

    def of_term(term: Term) -> Term:
        held = next((f for f in term.factors if f.axes == axes), None)
        merged = values if held is None else held.flat(mean.dtype) * values
        others = tuple(f for f in term.factors if f is not held)
        return term.over(term.base, (*others, Factor(merged, axes, sizes, packed=False)))

    # W̄ ∘ c̄ stays a mean, so that what reads one finds one
    middle = values.mean(0) if len(values) else values.sum(0)
    shape = [mean.shape[at] if at == axis else 1 for at in range(mean.dim())]
    own = Term(mean, (Factor(values - middle, axes, sizes, packed=False),))
    return weight.replace(mean * middle.reshape(shape), [own, *(of_term(term) for term in weight.terms)])


def _packed_slice(factor: Factor, index: slice | Tensor) -> Tensor | None:
    """The bits of a run of signs that starts at a whole byte, still packed; None for any other selection."""
    if factor.values is None or not factor.packed or len(factor.axes) != 1 or not isinstance(index, slice):
        return None
    start, stop, step = index.indices(factor.count)
    if step != 1 or start % 8 or stop <= start:
        return None
    return factor.values[:, start // 8 : packed_size(stop)]


def _matched(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of one count of entries into the smallest runs of axes with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        left = right = 1
        while True:
            if left == right and (before or after) and left != 1:
                break
            if left <= right and i < len(old):
                before.append(i)
                left *= old[i]
                i += 1
            elif j < len(new):
                after.append(j)
                right *= new[j]
                j += 1
            elif i < len(old):
                before.append(i)
                left *= old[i]
                i += 1
            else:
                break
        groups.append((before, after))
    return groups
