"""Linear maps of constants: of a buffer, of positions, of another weight. The result has no rows, and every member has its own.

    c_n = W_n x,        the same for each row of member n

It stays a weight, in the shape that the plain operation gives it, so that what a model does to it next (views, lookups by a fixed
index) means what it meant. Its values are listed: N times the memory of one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flipout.rows import Rows
from flipout.rules.axes import broadcast
from flipout.weight import Layout, PerturbedWeight, Term, missing_rule

__all__ = ["is_constant", "is_listed", "listed", "of_constant"]


def is_constant(x: Tensor, *weights: Any) -> bool:
    """Whether an operand belongs to no row: another weight, or what the weights' call knows as a constant."""
    if isinstance(x, PerturbedWeight):
        return True
    some = next(weight for weight in weights if isinstance(weight, PerturbedWeight))
    return some.batch.members is not None and some.batch.constant(x)


def listed(weight: PerturbedWeight, values: Tensor) -> PerturbedWeight:
    """A carrier of the values of each member, ``[N, *shape]``."""
    return PerturbedWeight(values.new_zeros(values.shape[1:]), (Term(values, per_member=True),), weight.batch, weight.origin)


def of_constant(operation: Any, x: Tensor, *weights: Any) -> PerturbedWeight:
    """``operation(x, *weights)`` for each member, of an operation that maps the last axis of ``x`` and leaves the others."""
    carriers = [weight for weight in (x, *weights) if isinstance(weight, PerturbedWeight)]
    first, members = carriers[0], carriers[0].batch.members
    if members is None:
        raise missing_rule(operation, first, (x, *weights), "it stands where the data should")
    there = Layout(members, members, 0, place=Rows(0, members))
    own = [w.with_rows(there) if isinstance(w, PerturbedWeight) else w for w in weights]
    if not isinstance(x, PerturbedWeight):
        for axis, (n, step) in enumerate(zip(x.shape[:-1], x.stride()[:-1], strict=True)):  # an expanded axis is computed once
            if n > 1 and step == 0:
                one = of_constant(operation, x.narrow(axis, 0, 1), *weights)
                return broadcast(one, (*x.shape[:-1], one.mean_weight.shape[-1]))
    data = x.dense() if isinstance(x, PerturbedWeight) else x.expand(members, *x.shape)
    values: Tensor = operation(data if data.dim() > 1 else data.unsqueeze(0), *own)
    return listed(next((w for w in weights if isinstance(w, PerturbedWeight)), first), values)


def is_listed(weight: PerturbedWeight) -> bool:
    """Whether the members' values are listed already, so that a function of them costs no more memory."""
    return bool(weight.terms) and all(term.per_member and not term.factors for term in weight.terms)
