"""What is known of the operands of an operation, and how such facts join."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flipout.errors import BatchError
from flipout.following.families import _C
from flipout.rows import BATCH, FRESH, NONE, UNKNOWN, UNSEEN, Mixed, Part, Rows, Tracker, entries, ordered
from flipout.weight import PerturbedWeight

__all__ = [
    "aligned",
    "argument",
    "cut_to",
    "fact_of",
    "first_operand",
    "fits",
    "joined",
    "lost",
    "operands_of",
    "part_at",
    "regrouped",
    "without_axis",
]


def fits(place: Rows, tensor: Tensor) -> bool:
    return place.axis < tensor.dim() and tensor.shape[place.axis] == place.size


def fact_of(tracker: Tracker, value: Any) -> Any:
    """The fact of an operand; weights and numbers belong to no row."""
    if not isinstance(value, Tensor) or type(value) is PerturbedWeight:
        return NONE
    fact = tracker.find(value)
    if type(fact) is int:
        return NONE
    return UNKNOWN if fact is UNSEEN else fact


def operands_of(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    if "out" in kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def joined(tracker: Tracker, facts: Iterable[Any]) -> Any:
    """The fact of a result whose operands stand as they say in it already."""
    facts = list(facts)
    known = [fact for fact in facts if fact is not NONE]
    if not known:
        return NONE
    known = [fact for fact in known if fact is not BATCH]
    if not known:
        return BATCH
    mixed = [fact for fact in known if isinstance(fact, Mixed)]
    if mixed:
        first = mixed[0]
        if not isinstance(first, Part) or (len(mixed) == len(known) and all(_same_part(tracker, first, fact) for fact in mixed)):
            return first
        if len(mixed) == len([fact for fact in known if fact is not UNKNOWN]) and all(_same_part(tracker, first, f) for f in mixed):
            return first
        return next((fact for fact in mixed if not isinstance(fact, Part)), Mixed("which was made of parts of different rows"))
    rows = [fact for fact in known if isinstance(fact, Rows)]
    if not rows:
        return UNKNOWN if any(fact is not FRESH for fact in known) else FRESH if len(known) == len(facts) else NONE
    if len(rows) == 1 or all(tracker.agree(fact, rows[0]) for fact in rows[1:]):
        return rows[0]
    sure = [fact for fact in rows if fact.sure]
    if sure and all(tracker.agree(fact, sure[0]) for fact in sure):
        return sure[0]
    assumed = next((fact.weight for fact in rows if fact.weight is not None), None)
    axes = sorted({fact.axis for fact in rows})
    if assumed is not None:
        raise BatchError(
            f"the perturbed weight {assumed!r} was expanded to as many entries as the batch has rows, and meets data whose rows "
            f"stand on another axis (axes {axes} of the result), so whether these entries were meant as rows cannot be told; "
            f"exclude={assumed!r} leaves it unperturbed"
        )
    return Mixed(f"which was made of tensors whose rows stand in different places (axes {axes}), so that rows are mixed")


def _same_part(tracker: Tracker, a: Part, b: Any) -> bool:
    if not isinstance(b, Part) or a.count != b.count:
        return False
    return a.row == b.row or tracker.owner_of(a) == tracker.owner_of(b)


def aligned(fact: Any, x: Tensor, ndim: int) -> Any:
    """A fact of an operand of ``ndim`` broadcast axes."""
    return fact._replace(axis=fact.axis + ndim - x.dim()) if isinstance(fact, Rows) and ndim != x.dim() else fact


def first_operand(tracker: Tracker, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
    x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return x, fact_of(tracker, x)


def argument(args: Any, kwargs: Any, at: int, name: str, default: Any = None) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def lost(x: Tensor, fact: Rows) -> Mixed:
    return Mixed(f"which was made of one of shape {tuple(x.shape)} by an operation along its axis of rows, {fact.axis}")


def cut_to(fact: Rows, index: slice, device: torch.device) -> Any:
    """The rows of a slice of the axis of rows."""
    start, stop, step = index.indices(fact.size)
    whole = fact.run * fact.inner
    if start == 0 and stop == fact.size and step == 1:
        return fact
    if step == 1 and start % whole == 0 and (stop - start) % whole == 0 and stop > start:
        return fact._replace(outer=(stop - start) // whole)
    return ordered(fact, entries(fact, device)[index])


def regrouped(fact: Rows, old: Sequence[int], new: Sequence[int]) -> Any:
    """The axis of a regrouped shape in which the rows stand, whatever is folded around them."""
    left, right = math.prod(old[: fact.axis]) * fact.outer, math.prod(old[fact.axis + 1 :]) * fact.inner
    size = fact.run
    if not size or 0 in new:
        return UNKNOWN
    before = 1
    for axis, n in enumerate(new):
        after = math.prod(new[axis + 1 :])
        if before * n >= left * size and before <= left:
            if not after or left % before or right % after or n != left // before * size * (right // after):
                break
            return fact._replace(axis=axis, outer=left // before, inner=right // after)
        before *= n
    return Mixed(f"which was regrouped from {tuple(old)} to {tuple(new)} so that its rows are spread over several axes")


def part_at(fact: Rows, index: Any) -> Any:
    """The fact of ``x[index]``, of the axis of rows."""
    if isinstance(index, Tensor) and (torch.compiler.is_compiling() or _C._functorch.is_functorch_wrapped_tensor(index)):
        return Mixed("which is a part of one row")
    at = int(index) % fact.size
    run = at // fact.inner % fact.run
    return Part(run if fact.order is None else int(fact.order[run]), fact.count)


def without_axis(fact: Rows, dim: int, x: Tensor) -> Any:
    """The fact where an axis is gone."""
    if dim == fact.axis:
        return Mixed(f"which is a part of one row of an input of shape {tuple(x.shape)}")
    return fact._replace(axis=fact.axis - (dim < fact.axis))
