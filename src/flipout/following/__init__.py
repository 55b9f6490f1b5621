"""Following the rows of a batch through torch's operations on activations.

Each function of these modules says, for a family of operations, where the rows of the result stand, given where those of the
operands do. An operation of no family leaves its result unknown: then rules go by sizes, and raise where these do not settle it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flipout.errors import FlipoutError
from flipout.following import indexing, joining, layers, mixing, views  # noqa: F401  (they fill the table)
from flipout.following.facts import fits
from flipout.following.families import HANDLERS, Handler
from flipout.following.pointwise import elementwise, unknown
from flipout.following.products import linear
from flipout.following.writing import set_item
from flipout.rows import BATCH, FRESH, NONE, UNKNOWN, UNSEEN, Mixed, Rows, Tracker, entries
from flipout.weight import PerturbedWeight

__all__ = ["follow", "followed_alone"]


def followed_alone(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """The fact of the result of an elementwise function of one tensor of data, before it runs; None for any other operation."""
    if len(args) != 1 or HANDLERS.get(func) is not elementwise or type(args[0]) is not Tensor or tracker.replay is not None:
        return None
    for value in kwargs.values():
        if type(value) not in _NUMBERS:
            return None
    fact = tracker.find(args[0])
    return None if fact is UNSEEN or type(fact) is int else fact


_NUMBERS = frozenset({bool, int, float, str, type(None)})


def follow(tracker: Tracker, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Notes where the rows of an operation's result stand."""
    landed, tracker.landed = tracker.landed, None
    if tracker.replay is not None:
        return
    handler: Handler = HANDLERS.get(func, unknown)
    if handler is linear and landed is not None and args and tracker.find(args[0]) is landed and fits(landed, result):
        tracker.note(result, landed)
        return
    if not isinstance(result, (Tensor, tuple, list)) and handler is not set_item:
        return
    try:
        fact = handler(tracker, args, kwargs, result)
    except FlipoutError:
        raise
    except (IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError, StopIteration, RuntimeError):
        fact = UNKNOWN  # a way to call it that its family does not know
    if isinstance(result, Tensor):
        if (fact is UNKNOWN or fact is NONE) and landed is not None and fits(landed, result):
            fact = landed  # where a rule has put the rows of what all examples share
        _note(tracker, result, fact)
        if args and result is args[0] and result._base is not None:
            _spoil(tracker, result, fact)
    elif isinstance(result, (tuple, list)):
        facts = fact if isinstance(fact, list) else [fact] * len(result)
        for each, of_each in zip(result, facts, strict=True):
            if isinstance(each, Tensor) and type(each) is not PerturbedWeight:
                _note(tracker, each, of_each)


def _note(tracker: Tracker, result: Tensor, fact: Any) -> None:
    if type(fact) is Rows and not fits(fact, result):
        if fact.size == 1 and fact.axis < result.dim():  # a part of one row, broadcast
            fact = Rows(fact.axis, fact.count, order=entries(fact, result.device).expand(result.shape[fact.axis]))
        else:
            fact = Mixed(f"which has not the {fact.size} entries on axis {fact.axis} that its rows have")
    tracker.note(result, fact)


def _spoil(tracker: Tracker, view: Tensor, fact: Any) -> None:
    """What is written in place into a view is in the whole as well."""
    base = view._base
    if base is None or fact is NONE or fact is BATCH or fact is FRESH:
        return
    before = tracker.find(base)
    if isinstance(fact, Mixed) and isinstance(before, Rows):
        tracker.note(base, fact)
    elif before is FRESH:
        tracker.note(base, UNKNOWN)
