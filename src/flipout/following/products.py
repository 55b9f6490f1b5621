"""Matrix products and einsum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flipout.following.facts import aligned, fact_of, first_operand, joined, lost, operands_of
from flipout.following.families import register
from flipout.rows import UNKNOWN, Rows, Tracker

__all__ = ["linear"]


def _multiplied(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """a @ b."""
    a, b = operands_of(args, kwargs)[:2]
    return joined(tracker, [_left_factor(fact_of(tracker, a), a, b, result), _right_factor(fact_of(tracker, b), a, b, result)])


def _distances(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """cdist: rows of points stand on the last axis but one, those of the points they are compared with on the last."""
    a, b = operands_of(args, kwargs)[:2]
    of_a, of_b = fact_of(tracker, a), fact_of(tracker, b)
    if isinstance(of_a, Rows):
        of_a = lost(a, of_a) if of_a.axis == a.dim() - 1 else of_a._replace(axis=of_a.axis + result.dim() - a.dim())
    if isinstance(of_b, Rows):
        last = of_b.axis == b.dim() - 2
        of_b = lost(b, of_b) if of_b.axis == b.dim() - 1 else of_b._replace(axis=of_b.axis + result.dim() - b.dim() + last)
    return joined(tracker, [of_a, of_b])


def _left_factor(fact: Any, a: Tensor, b: Tensor, result: Tensor) -> Any:
    if not isinstance(fact, Rows):
        return fact
    if fact.axis == a.dim() - 1:
        return lost(a, fact)
    return fact._replace(axis=fact.axis + result.dim() - a.dim() + (b.dim() == 1))


def _right_factor(fact: Any, a: Tensor, b: Tensor, result: Tensor) -> Any:
    if not isinstance(fact, Rows):
        return fact
    if fact.axis == max(b.dim() - 2, 0):
        return lost(b, fact)
    if fact.axis == b.dim() - 1:
        return fact._replace(axis=result.dim() - 1)
    return fact._replace(axis=fact.axis + result.dim() - b.dim() + (a.dim() == 1))


def _reflected_product(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return _multiplied(tracker, (args[1], args[0]), kwargs, result)


def _added_product(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """addmm, baddbmm, addmv: input + a @ b."""
    x, a, b = operands_of(args, kwargs)[:3]
    fact = _multiplied(tracker, (a, b), {}, result)
    return joined(tracker, [aligned(fact_of(tracker, x), x, result.dim()), fact])


def linear(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if isinstance(fact, Rows):
        return lost(x, fact) if fact.axis == x.dim() - 1 else fact
    return fact


def _bilinear(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return joined(tracker, [fact_of(tracker, x) for x in operands_of(args, kwargs)[:2]])


def _einsum(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    equation, *operands = args
    if not isinstance(equation, str):
        return UNKNOWN
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        counts = {c: inputs.count(c) for c in inputs if c not in ",."}
        output = ("..." if "..." in inputs else "") + "".join(sorted(c for c, n in counts.items() if n == 1))
    facts = []
    for term, x in zip(terms, operands, strict=True):
        fact = fact_of(tracker, x)
        if not isinstance(fact, Rows):
            facts.append(fact)
            continue
        letters = _letters(term, x.dim())
        letter = letters[fact.axis]
        target = _letters(output, result.dim())
        facts.append(fact._replace(axis=target.index(letter)) if letter in target else lost(x, fact))
    return joined(tracker, facts)


def _letters(term: str, ndim: int) -> list[str]:
    """The letters of a term, axis by axis; axes under an ellipsis are counted from their right."""
    head, dots, tail = term.partition("...")
    hidden = ndim - len(head) - len(tail) if dots else 0
    return [*head, *(f".{hidden - i}" for i in range(hidden)), *tail]


register(_multiplied, "matmul bmm mm mv dot inner __matmul__")


register(_distances, "cdist")


register(_reflected_product, "__rmatmul__")


register(_added_product, "addmm baddbmm addmv")


register(linear, "linear")


register(_bilinear, "bilinear")


register(_einsum, "einsum")
