"""Reading by an index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flipout.following.facts import argument, cut_to, fact_of, first_operand, joined, part_at
from flipout.following.families import HANDLERS, register
from flipout.rows import NONE, UNKNOWN, Mixed, Rows, Tracker, entries, ordered

__all__ = ["gathered", "index_selected", "indexed", "looked_up", "width_of"]


def index_selected(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    dim, index = argument(args, kwargs, 1, "dim") % x.dim(), argument(args, kwargs, 2, "index")
    if not isinstance(fact, Rows):
        return looked_up(tracker, index, dim, fact)
    if dim != fact.axis:
        return fact if not isinstance(fact_of(tracker, index), Rows) else Mixed("which was indexed by rows along another axis")
    return ordered(fact, entries(fact, x.device)[index])


def looked_up(tracker: Tracker, index: Tensor, axis: int, fact: Any) -> Any:
    """A lookup in what belongs to no row: the rows are those of the index."""
    of_index = fact_of(tracker, index)
    if fact is NONE and isinstance(of_index, Rows):
        return of_index._replace(axis=of_index.axis + axis)
    return joined(tracker, [fact, UNKNOWN if isinstance(of_index, Rows) else of_index])


def indexed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """x[...]: basic and advanced."""
    x, fact = args[0], fact_of(tracker, args[0])
    items = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    items = [torch.as_tensor(item, device=x.device) if isinstance(item, list) else item for item in items]
    width = sum(width_of(item) for item in items)
    filled: list[Any] = []
    for item in items:
        filled += [slice(None)] * (x.dim() - width) if item is Ellipsis else [item]
    filled += [slice(None)] * (x.dim() - sum(width_of(item) for item in filled))
    advanced = [item for item in filled if isinstance(item, Tensor) and (item.dim() or item.dtype == torch.bool)]
    if not isinstance(fact, Rows):
        if len(advanced) == 1 and advanced[0].dtype != torch.bool:
            before = next(i for i, item in enumerate(filled) if item is advanced[0])
            return looked_up(tracker, advanced[0], sum(not isinstance(item, int) for item in filled[:before]), fact)
        return joined(tracker, [fact, *(fact_of(tracker, item) for item in advanced)]) if not advanced else UNKNOWN
    # where each axis of x, and the joint axes of the advanced indices, come to stand
    places = [i for i, item in enumerate(filled) if isinstance(item, Tensor) and (item.dim() or item.dtype == torch.bool)]
    adjacent = bool(places) and places == list(range(places[0], places[0] + len(places)))
    wide = max((1 if item.dtype == torch.bool else item.dim() for item in advanced), default=0)
    axis, out, found = 0, 0 if adjacent or not advanced else wide, None
    first = 0
    for i, item in enumerate(filled):
        if i in places and adjacent and i == places[0]:
            first, out = out, out + wide
        if item is None:
            out += 1
        elif isinstance(item, slice):
            if axis == fact.axis:
                cut = cut_to(fact, item, x.device)
                found = cut._replace(axis=out) if isinstance(cut, Rows) else cut
            axis, out = axis + 1, out + 1
        elif i in places:
            if axis <= fact.axis < axis + width_of(item):
                found = gathered(fact, x, item, fact.axis - axis, first, wide)
            axis += width_of(item)
        else:  # an integer
            if axis == fact.axis:
                return part_at(fact, item)
            axis += 1
    rows_in_index = [of for of in (fact_of(tracker, item) for item in advanced) if isinstance(of, Rows)]
    if isinstance(found, Rows) and rows_in_index:
        if not first <= found.axis < first + max(wide, 1):
            return Mixed("which was indexed by rows along another axis")
        if any(item.dtype != torch.bool for item in advanced):
            placed = [
                of._replace(axis=of.axis + first + wide - item.dim())
                for item in advanced
                if item.dtype != torch.bool and isinstance(of := fact_of(tracker, item), Rows)
            ]
            return joined(tracker, [found, *placed])
    return UNKNOWN if found is None else found


def width_of(item: Any) -> int:
    """How many axes an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def gathered(fact: Rows, x: Tensor, index: Tensor, within: int, first: int, wide: int) -> Any:
    """The rows of an advanced index on the axis of rows."""
    stand = entries(fact, x.device)
    if index.dtype == torch.bool:
        return ordered(fact, stand[index.nonzero(as_tuple=True)[within]], first)
    long = [axis for axis, size in enumerate(index.shape) if size != 1]
    if len(long) > 1:
        return Mixed(f"which gathers rows of an input of shape {tuple(x.shape)} by an index of shape {tuple(index.shape)}")
    return ordered(fact, stand[index.flatten()], first + wide - index.dim() + (long[0] if long else 0))


register(index_selected, "index_select")


HANDLERS[torch.Tensor.__getitem__] = indexed
