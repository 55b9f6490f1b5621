"""Writing in place, into a part of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flipout.following.facts import aligned, argument, fact_of, first_operand, joined, lost
from flipout.following.families import HANDLERS, register
from flipout.following.indexing import indexed, width_of
from flipout.following.mixing import along_dim
from flipout.rows import BATCH, NONE, UNKNOWN, Mixed, Part, Rows, Tracker, entries, ordered
from flipout.weight import PerturbedWeight

__all__ = ["set_item"]


def set_item(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """x[...] = y: a tensor that is filled with rows has them, and one with rows keeps them if each gets what is its own."""
    x, index, value = args
    if isinstance(value, Tensor) and type(value) is not PerturbedWeight:
        tracker.note(x, _written(tracker, x, index, value, fact_of(tracker, x), fact_of(tracker, value)))
    return None


def _written(tracker: Tracker, x: Tensor, index: Any, value: Tensor, fact: Any, of_value: Any) -> Any:
    if isinstance(of_value, Part):
        items = list(index) if isinstance(index, tuple) else [index]
        if all(isinstance(item, (int, slice)) for item in items):
            whole = [axis for axis, item in enumerate(items) if isinstance(item, int)]
            axis = fact.axis if isinstance(fact, Rows) else whole[0] if whole else 0
            if axis in whole:
                return _placed(tracker, x, axis, torch.tensor([items[axis] % x.shape[axis]]), fact, of_value.over(axis, 1))
    if isinstance(of_value, Mixed):
        return fact if of_value is NONE else _of_statistic(fact) if of_value is BATCH else of_value
    if of_value is UNKNOWN or (isinstance(fact, Mixed) and fact is not NONE):
        return fact
    items = list(index) if isinstance(index, tuple) else [index]
    part = x[index]
    if isinstance(fact, Rows):
        of_part = indexed(tracker, (x, index), {}, part)
        of_value = aligned(of_value, value, part.dim())
        if isinstance(of_part, Rows) and (value.dim() == 0 or tracker.agree(of_part, of_value)):
            return fact
    advanced = [i for i, item in enumerate(items) if isinstance(item, (Tensor, list))]
    filled: list[Any] = []
    for item in items:
        width = sum(width_of(each) for each in items)
        filled += [slice(None)] * (x.dim() - width) if item is Ellipsis else [item]
    filled += [slice(None)] * (x.dim() - sum(width_of(item) for item in filled))
    if not advanced and all(isinstance(item, (int, slice)) for item in filled):
        kept = [axis for axis, item in enumerate(filled) if isinstance(item, slice)]
        at = of_value.axis + len(kept) - value.dim() if not isinstance(fact, Rows) else of_value.axis
        axis = kept[at]
        return _placed(tracker, x, axis, torch.arange(x.shape[axis])[filled[axis]], fact, of_value)
    if len(advanced) == 1 and all(isinstance(item, (int, slice, Tensor, list)) for item in filled):
        where = filled.index(next(item for item in filled if isinstance(item, (Tensor, list))))
        picked = torch.as_tensor(filled[where], device=x.device)
        kept = [axis for axis, item in enumerate(filled) if not isinstance(item, int)]
        at = of_value.axis + len(kept) - value.dim() if not isinstance(fact, Rows) else of_value.axis
        if picked.dim() == 1:
            stand = torch.arange(x.shape[kept[at]], device=x.device)
            return _placed(tracker, x, kept[at], stand[picked if kept[at] == where else filled[kept[at]]], fact, of_value)
    return Mixed("into which rows were written at places that cannot be followed")


def _of_statistic(fact: Any) -> Any:
    return BATCH if fact is NONE else fact


def _placed(tracker: Tracker, x: Tensor, axis: int, index: Tensor, fact: Any, source: Rows) -> Any:
    """The fact of ``x`` after rows of ``source`` were put, or added, at entries ``index`` of its axis."""
    if torch.compiler.is_compiling():
        return UNKNOWN
    size, device = x.shape[axis], index.device
    wanted = tracker.owners(source, device)
    if len(wanted) != len(index):
        return Mixed("into which rows were written at places that cannot be followed")
    if isinstance(fact, Rows):
        agree = fact.axis == axis and torch.equal(tracker.owners(fact, device)[index], wanted)
        return fact if agree else Mixed(f"in which entries of axis {axis} were made of rows of different members")
    else:  # zeros, say: as many entries for each row
        inner, left = divmod(size, source.count)
        guess = Rows(axis, source.count, 1, inner)
        if not left and inner and torch.equal(tracker.owners(guess, device)[index], wanted):
            return guess
    order = torch.full((size,), -1, device=device)
    order[index] = entries(source, device)
    full = Rows(axis, source.count, order=order.clamp(min=0))
    if bool((order >= 0).all()) and torch.equal(tracker.owners(full, device)[index], wanted):
        return ordered(source, order, axis)
    return Mixed(f"in which entries of axis {axis} were made of rows of different members, or of none")


def _put(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """index_put(input, indices, values, accumulate)."""
    x, indices, value = args[0], argument(args, kwargs, 1, "indices"), argument(args, kwargs, 2, "values")
    before, of_value = fact_of(tracker, x), fact_of(tracker, value)
    return _written(tracker, result, tuple(indices), value, before, of_value)


def _scattered_at(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """scatter(input, dim, index, src) and its kin: along the rows, each entry must be given what belongs to its own member."""
    x = args[0]
    dim, index = argument(args, kwargs, 1, "dim") % max(x.dim(), 1), argument(args, kwargs, 2, "index")
    source = argument(args, kwargs, 3, "src")
    source = kwargs.get("value") if source is None else source
    if not isinstance(source, Tensor) or source.dim() != x.dim():
        return joined(tracker, [fact_of(tracker, x), fact_of(tracker, index) if fact_of(tracker, x) is not UNKNOWN else UNKNOWN])
    fact, of_source = fact_of(tracker, x), fact_of(tracker, source)
    along = [f for f in (fact, of_source) if isinstance(f, Rows) and f.axis == dim]
    if not along:
        return along_dim(tracker, x, dim, [x, index, source])
    if not isinstance(of_source, Rows) or of_source.axis != dim:
        return lost(x, along[0]) if of_source is not NONE else fact
    if index.shape[dim] != source.shape[dim] or torch.compiler.is_compiling():
        return lost(source, of_source)
    flat = index.movedim(dim, 0).flatten(1)
    first = flat[:, 0]
    if bool((flat == first.unsqueeze(1)).all()):
        return _placed(tracker, result, dim, first, fact, of_source)
    stand = fact if isinstance(fact, Rows) else Rows(dim, of_source.count, 1, x.shape[dim] // of_source.count)
    if stand.axis == dim and stand.size == x.shape[dim]:
        given = tracker.owners(stand, index.device)[flat]
        if torch.equal(given, tracker.owners(of_source, index.device).unsqueeze(1).expand_as(given)):
            return stand
    return lost(source, of_source)


def _filled_in(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """masked_scatter(input, mask, source): the entries of the source, one after the other, where the mask is set."""
    x, mask, source = args[0], argument(args, kwargs, 1, "mask"), argument(args, kwargs, 2, "source")
    fact, of_source = fact_of(tracker, x), fact_of(tracker, source)
    if not isinstance(of_source, Rows):
        return joined(tracker, [fact, of_source])
    if isinstance(fact, Rows) and not torch.compiler.is_compiling():
        own = tracker.owners(fact, x.device).view([-1 if axis == fact.axis else 1 for axis in range(x.dim())])
        theirs = tracker.owners(of_source, x.device).view([-1 if axis == of_source.axis else 1 for axis in range(source.dim())])
        wanted = own.expand(x.shape)[mask.expand(x.shape)]
        if torch.equal(wanted, theirs.expand(source.shape).flatten()[: len(wanted)]):
            return fact
    return Mixed("into which rows were scattered by a mask, not each its own")


def _added_at(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """index_add and index_copy: along the rows, each entry must be given what belongs to its own member."""
    x, fact = first_operand(tracker, args, kwargs)
    dim = argument(args, kwargs, 1, "dim") % x.dim()
    index, source = argument(args, kwargs, 2, "index"), argument(args, kwargs, 3, "source")
    of_source = fact_of(tracker, source)
    if not isinstance(of_source, Rows) or of_source.axis != dim:
        return (
            lost(x, fact)
            if isinstance(fact, Rows) and fact.axis == dim and of_source is not NONE
            else joined(tracker, [fact, of_source])
        )
    return _placed(tracker, result, dim, index, fact, of_source)


register(_added_at, "index_add index_copy index_reduce")


register(_scattered_at, "scatter scatter_add scatter_reduce")


register(_put, "index_put")


register(_filled_in, "masked_scatter")


HANDLERS[torch.Tensor.__setitem__] = set_item
