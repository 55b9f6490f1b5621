"""What models do to a weight before using it: the carrier is closed under these.

Views and transposes, casts, scalar multiples and shifts, slices, concatenation. Each maps the mean, the bases and the axes of the
factors; sign bits are left packed wherever the axes they vary along survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flipout.errors import BatchError
from flipout.estimators import Estimator
from flipout.registry import rule
from flipout.rows import NONE, Mixed, Rows
from flipout.rules.axes import broadcast, permute, reshape, take
from flipout.rules.per_row import per_row
from flipout.rules.pointwise import on_place
from flipout.weight import Factor, PerturbedWeight, Term, missing_rule, require_data

__all__ = ["index_basic"]


# --- transposes -------------------------------------------------------------------------------------------------------


@rule((torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__), Estimator)  # type: ignore[attr-defined]
def transpose_last(weight: PerturbedWeight) -> PerturbedWeight:
    ndim = weight.mean_weight.dim()
    if ndim < 2:
        return weight
    return permute(weight, [*range(ndim - 2), ndim - 1, ndim - 2])


@rule((torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes), Estimator)
def transpose(weight: PerturbedWeight, dim0: int, dim1: int) -> PerturbedWeight:
    order = list(range(weight.mean_weight.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(weight, order)


@rule((torch.permute, torch.Tensor.permute), Estimator)
def permute_rule(weight: PerturbedWeight, *dims: Any, **named: Any) -> PerturbedWeight:
    return permute(weight, _sizes(dims) if dims else named["dims"])


@rule((torch.movedim, torch.Tensor.movedim), Estimator)
def movedim(weight: PerturbedWeight, source: Any, destination: Any) -> PerturbedWeight:
    # torch's own answer for the order, read off a tensor whose strides name its axes
    ndim = weight.mean_weight.dim()
    probe = torch.empty_strided([1] * ndim, list(range(ndim)), device="meta").movedim(source, destination)
    return permute(weight, list(probe.stride()))


# --- views ------------------------------------------------------------------------------------------------------------


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


@rule((torch.reshape, torch.Tensor.reshape, torch.Tensor.view), Estimator)
def view(weight: PerturbedWeight, *shape: Any, **named: Any) -> PerturbedWeight:
    if (len(shape) == 1 and isinstance(shape[0], torch.dtype)) or "dtype" in named:
        raise missing_rule(torch.Tensor.view, weight, (weight,), "reading its bits as another dtype has no meaning")
    return reshape(weight, _sizes(shape) if shape else next(iter(named.values())))


def _viewed(*operations: Any) -> None:
    """Registers operations that only regroup axes: the new shape is the one that torch gives the mean."""

    for operation in operations:

        def regroup(weight: Any, *args: Any, _operation: Any = operation, **kwargs: Any) -> Any:
            plain = [a.mean_weight if isinstance(a, PerturbedWeight) else a for a in args]  # w.view_as(another weight)
            if not isinstance(weight, PerturbedWeight):
                return _operation(weight, *plain, **kwargs)
            return reshape(weight, _operation(weight.mean_weight, *plain, **kwargs).shape)

        rule(operation, Estimator)(regroup)


_viewed(torch.flatten, torch.Tensor.flatten, torch.unflatten, torch.Tensor.unflatten, torch.squeeze, torch.Tensor.squeeze)
_viewed(torch.unsqueeze, torch.Tensor.unsqueeze, torch.Tensor.view_as, torch.Tensor.reshape_as, torch.ravel, torch.Tensor.ravel)


@rule((torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to), Estimator)
def expand(weight: Any, *shape: Any) -> PerturbedWeight | Tensor:
    """Expanded to the rows of the batch, each row is its own member's value; along any other axis, it stays a weight.

    An axis of one or a new axis on the batch dimension that is expanded to exactly the rows of the batch is read as the batch.
    """
    sizes = shape[0].shape if isinstance(shape[0], Tensor) else _sizes(shape)
    if not isinstance(weight, PerturbedWeight):  # data in the shape of a weight
        plain: Tensor = weight.expand(sizes)
        return plain
    mean = weight.mean_weight.expand(sizes)
    lead = mean.dim() - weight.mean_weight.dim()
    own = [1] * lead + list(weight.mean_weight.shape)
    axis = _becomes_rows(weight, own, mean.shape)
    if axis is not None:
        return _on_rows(weight, own, axis).expand(mean.shape)
    return broadcast(weight, mean.shape)


def _becomes_rows(weight: PerturbedWeight, own: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The axis of size one that becomes as many entries as the batch has rows; None if none does."""
    dim, rows = weight.batch.dim, weight.batch.rows
    if rows is None or rows == 1:
        return None
    fits = [axis for axis, (old, new) in enumerate(zip(own, sizes, strict=True)) if old == 1 and new == rows]
    if len(fits) > 1 and dim not in fits:
        raise BatchError(
            f"the weight {weight.origin.name!r} {tuple(weight.mean_weight.shape)} was expanded to {tuple(sizes)}, and axes "
            f"{fits} have the {rows} rows of the batch each, so which of them holds the rows cannot be told; "
            f"exclude={weight.origin.name!r}"
        )
    return dim if dim in fits else next(iter(fits), None)


def _on_rows(weight: PerturbedWeight, own: Sequence[int], axis: int) -> Tensor:
    """The weight with each row's own value on an axis of size one, ``own`` being its shape with new axes in front."""
    layout, rows = weight.batch, weight.batch.rows or 0
    place = Rows(axis, rows, weight=weight.origin.name)
    values = per_row(weight.at(place), rows)
    if layout.tracker is not None:
        layout.tracker.landed = place
    return values.reshape(rows, *own[:axis], *own[axis + 1 :]).movedim(0, axis)


@rule((torch.Tensor.repeat, torch.tile, torch.Tensor.tile), Estimator)
def repeat(weight: PerturbedWeight, *sizes: Any, **named: Any) -> PerturbedWeight | Tensor:
    """As :func:`expand` where an axis of size one becomes the rows of the batch; any other axis repeats its entries."""
    times = list(_sizes(sizes) if sizes else next(iter(named.values())))
    own = [1] * (len(times) - weight.mean_weight.dim()) + list(weight.mean_weight.shape)
    times = [1] * (len(own) - len(times)) + times
    axis = _becomes_rows(weight, own, [n * k for n, k in zip(own, times, strict=True)])
    if axis is not None:
        return _on_rows(weight, own, axis).repeat(*[1 if i == axis else k for i, k in enumerate(times)])
    weight.require_drawn("repeat(), where entries share one noise")
    repeated = reshape(weight, own)
    for i, k in enumerate(times):
        if k != 1:
            index = torch.arange(own[i], device=weight.device).repeat(k)
            repeated = take(repeated, i, index)
    return repeated


# --- slices -----------------------------------------------------------------------------------------------------------


@rule((torch.narrow, torch.Tensor.narrow), Estimator)
def narrow(weight: PerturbedWeight, dim: int, start: int, length: int) -> PerturbedWeight:
    start = start % weight.mean_weight.shape[dim] if start < 0 else start
    return take(weight, dim, slice(start, start + length))


@rule((torch.select, torch.Tensor.select), Estimator)
def select(weight: PerturbedWeight, dim: int, index: int) -> PerturbedWeight:
    return reshape(take(weight, dim, _one(index)), weight.mean_weight.select(dim, index).shape)


@rule((torch.index_select, torch.Tensor.index_select), Estimator)
def index_select(weight: PerturbedWeight, dim: int, index: Tensor) -> PerturbedWeight:
    require_data(torch.index_select, index)
    weight.require_drawn("index_select(), where rows may repeat")
    return take(weight, dim, index)


def _one(index: int) -> slice:
    return slice(index, index + 1 if index != -1 else None)


def _cut(weight: PerturbedWeight, lengths: Sequence[int], dim: int) -> tuple[PerturbedWeight, ...]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(take(weight, dim, slice(s, s + n)) for s, n in zip(starts, lengths, strict=True))


@rule((torch.chunk, torch.Tensor.chunk), Estimator)
def chunk(weight: PerturbedWeight, chunks: int, dim: int = 0) -> tuple[PerturbedWeight, ...]:
    return _cut(weight, [piece.shape[dim] for piece in weight.mean_weight.chunk(chunks, dim)], dim)


@rule((torch.split, torch.Tensor.split, torch.functional.split, torch.split_with_sizes, torch.Tensor.split_with_sizes), Estimator)
def split(weight: PerturbedWeight, split_size_or_sections: Any, dim: int = 0) -> tuple[PerturbedWeight, ...]:
    pieces = weight.mean_weight.split(split_size_or_sections, dim)
    return _cut(weight, [piece.shape[dim] for piece in pieces], dim)


@rule((torch.unbind, torch.Tensor.unbind), Estimator)
def unbind(weight: PerturbedWeight, dim: int = 0) -> tuple[PerturbedWeight, ...]:
    return tuple(select(weight, dim, i) for i in range(weight.mean_weight.shape[dim]))


@rule(torch.Tensor.__iter__, Estimator)
def iterate(weight: PerturbedWeight) -> Any:
    return iter(unbind(weight))


def index_basic(weight: PerturbedWeight, index: tuple[Any, ...]) -> PerturbedWeight:
    """Basic indexing: integers, slices, None and Ellipsis."""
    ndim = weight.mean_weight.dim()
    named = sum(item is not None and item is not Ellipsis for item in index)
    filled: list[Any] = []
    for item in index:
        filled += [slice(None)] * (ndim - named) if item is Ellipsis else [item]
    taken, axis = weight, 0
    for item in filled:
        if item is None:
            continue
        if item != slice(None):
            taken = take(taken, axis, _one(item) if isinstance(item, int) else item)
        axis += 1
    return reshape(taken, weight.mean_weight[tuple(index)].shape)


# --- entries ----------------------------------------------------------------------------------------------------------


def _mapped(*operations: Any) -> None:
    """Registers operations that are linear in each entry."""

    for operation in operations:

        def linear_map(weight: Any, *args: Any, _operation: Any = operation, **kwargs: Any) -> Any:
            if not isinstance(weight, PerturbedWeight):  # plain.to(weight) and the like
                return _operation(weight, *(a.mean_weight if isinstance(a, PerturbedWeight) else a for a in args), **kwargs)
            mapped = weight.map(lambda tensor: _operation(tensor, *args, **kwargs))
            if not mapped.mean_weight.is_floating_point():
                raise missing_rule(_operation, weight, (weight,), "a cast to whole numbers would round its noise away")
            return mapped

        rule(operation, Estimator)(linear_map)


_mapped(torch.clone, torch.Tensor.clone, torch.Tensor.contiguous, torch.detach, torch.Tensor.detach)
_mapped(torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16)
_mapped(torch.Tensor.type_as, torch.Tensor.cpu, torch.Tensor.cuda, torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)


@rule((torch.cat, torch.concat, torch.concatenate), Estimator)
def cat(tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> PerturbedWeight | Tensor:
    """Joins whole carriers, and plain weights among them, along an axis.

    Each piece's terms become terms of the whole, zero outside the piece.
    """
    first = next(t for t in tensors if isinstance(t, PerturbedWeight))
    ndim = first.mean_weight.dim()
    dim %= ndim
    means = [t.mean_weight if isinstance(t, PerturbedWeight) else t for t in tensors]
    place = next(
        (fact for t in tensors if not isinstance(t, PerturbedWeight) and isinstance(fact := first.batch.known(t), Rows)), None
    )
    if place is not None and place.axis != dim:  # each row is joined with its member's own
        data = next(t for t in tensors if not isinstance(t, PerturbedWeight))
        whole = [_expanded_to(t, data, dim, place) if isinstance(t, PerturbedWeight) else t for t in tensors]
        return torch.cat(whole, dim)
    for piece in tensors:
        if not isinstance(piece, (PerturbedWeight, torch.nn.Parameter)) and _has_rows(piece, first):
            raise missing_rule(
                torch.cat, first, tensors, "one of its other arguments has the rows of the batch: expand the weight to them"
            )
    mean = torch.cat(means, dim)
    total, start = mean.shape[dim], 0
    terms: list[Term] = []
    for piece, piece_mean in zip(tensors, means, strict=True):
        size = piece_mean.shape[dim]
        margins = (start, total - start - size)
        if isinstance(piece, PerturbedWeight):
            terms += [_padded(term, piece, dim, margins) for term in piece.terms]
        start += size
    return first.replace(mean, terms)


def _expanded_to(weight: PerturbedWeight, data: Tensor, dim: int, place: Rows) -> Tensor:
    """The members' weights in the shape of data whose rows stand at ``place``, but for the axis that is joined."""
    own = weight.mean_weight
    if own.dim() != data.dim() or any(
        n != m and axis != dim for axis, (n, m) in enumerate(zip(own.shape, data.shape, strict=True))
    ):
        shapes = [tuple(data.shape), tuple(own.shape)]
        raise missing_rule(
            torch.cat, weight, (data, weight), f"their shapes {shapes} do not fit: expand the weight to the rows of the batch"
        )
    return on_place(weight, data.dim(), place, "cat").expand(own.shape)


def _has_rows(value: Tensor, weight: PerturbedWeight) -> bool:
    """Whether a tensor is data: it has the rows of the module's own input on the batch dimension."""
    dim, rows = weight.batch.dim, weight.batch.rows
    fact = weight.batch.known(value)
    if isinstance(fact, (Rows, Mixed)):
        return fact is not NONE
    return rows != 1 and value.dim() > dim and value.shape[dim] == rows


def _padded(term: Term, piece: PerturbedWeight, dim: int, margins: tuple[int, int]) -> Term:
    before, after = margins
    base = term.base if term.per_member else term.base.expand(piece.mean_weight.shape)
    padding = [0, 0] * (piece.mean_weight.dim() - 1 - dim) + [before, after]
    base = torch.nn.functional.pad(base, padding)
    factors = []
    for factor in term.factors:
        if dim not in factor.axes:
            factors.append(factor)
            continue
        at = factor.axes.index(dim)
        values = factor.shaped(piece.mean_weight.dtype)
        margin = [0, 0] * (len(factor.sizes) - 1 - at) + [before, after]
        values = torch.nn.functional.pad(values, margin)
        factors.append(Factor(values.flatten(1), factor.axes, tuple(values.shape[1:]), packed=False))
    return term.over(base, tuple(factors))
