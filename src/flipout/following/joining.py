"""Joining tensors, and cutting them."""

from __future__ import annotations

from typing import Any

import torch

from flipout.following.facts import argument, cut_to, fact_of, first_operand, joined, part_at, without_axis
from flipout.following.families import Handler, register
from flipout.rows import UNKNOWN, Mixed, Part, Rows, Tracker, entries, ordered

__all__ = ["concatenated"]


def concatenated(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    pieces = argument(args, kwargs, 0, "tensors")
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % result.dim()
    pieces = [piece for piece in pieces if piece.shape != (0,)]
    facts = [fact_of(tracker, piece) for piece in pieces]
    if len(facts) > 1 and all(isinstance(fact, Part) for fact in facts):
        if all(fact.row == facts[0].row for fact in facts):
            return facts[0]
        return ordered(
            facts[0].over(dim, 1), torch.cat([f.over(0, p.shape[dim]).order for f, p in zip(facts, pieces, strict=True)])
        )
    facts = [f.over(dim, p.shape[dim]) if isinstance(f, Part) else f for f, p in zip(facts, pieces, strict=True)]
    along = [fact for fact in facts if isinstance(fact, Rows) and fact.axis == dim]
    if not along:
        return joined(tracker, facts)
    if len(along) < len(facts):
        return Mixed("which joins rows of the batch with entries that belong to no row")
    if any(fact.count != along[0].count for fact in along):
        return Mixed("which joins batches of different sizes")
    if all(fact.order is along[0].order and fact.inner == along[0].inner for fact in along):
        return along[0]._replace(outer=sum(fact.outer for fact in along))
    return ordered(along[0], torch.cat([entries(fact, result.device) for fact in along]))


def _joined_on(axis: int, least: int) -> Handler:
    """hstack and its kin: cat() along an axis of pieces that have got axes of one."""

    def handler(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
        pieces = list(argument(args, kwargs, 0, "tensors"))
        dim = 0 if axis == 1 and result.dim() == 1 else axis
        if any(piece.dim() < least for piece in pieces):
            return UNKNOWN
        return concatenated(tracker, (pieces, dim), {}, result)

    return handler


def _stacked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    pieces = argument(args, kwargs, 0, "tensors")
    dim = argument(args, kwargs, 1, "dim", 0) % result.dim()
    facts = [fact_of(tracker, piece) for piece in pieces]
    if all(isinstance(fact, Part) for fact in facts):
        return ordered(facts[0].over(dim, 1), torch.tensor([fact.row for fact in facts]))
    fact = joined(tracker, facts)
    return fact._replace(axis=fact.axis + (fact.axis >= dim)) if isinstance(fact, Rows) else fact


def _split(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    if dim != fact.axis:
        return fact
    facts, start = [], 0
    for piece in result:
        facts.append(cut_to(fact, slice(start, start + piece.shape[dim]), x.device))
        start += piece.shape[dim]
    return facts


def _unbound(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    dim = argument(args, kwargs, 1, "dim", 0) % x.dim()
    return without_axis(fact, dim, x) if dim != fact.axis else [part_at(fact, i) for i in range(len(result))]


def _selected(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    dim = argument(args, kwargs, 1, "dim") % x.dim()
    return without_axis(fact, dim, x) if dim != fact.axis else part_at(fact, argument(args, kwargs, 2, "index"))


def _narrowed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    dim = argument(args, kwargs, 1, "dim") % x.dim()
    if not isinstance(fact, Rows) or dim != fact.axis:
        return fact
    start = int(argument(args, kwargs, 2, "start")) % max(fact.size, 1)
    return cut_to(fact, slice(start, start + result.shape[dim]), x.device)


register(_joined_on(1, 2), "hstack")


register(_joined_on(0, 2), "vstack row_stack")


register(_joined_on(1, 2), "column_stack")


register(_joined_on(2, 3), "dstack")


register(concatenated, "cat concat concatenate")


register(_stacked, "stack")


register(_split, "split chunk tensor_split split_with_sizes")


register(_unbound, "unbind __iter__")


register(_selected, "select")


register(_narrowed, "narrow")
