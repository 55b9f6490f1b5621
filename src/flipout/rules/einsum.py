"""``einsum`` of one weight with one operand of data.

    y_n = einsum(x_n, W̄) + r_n ∘ einsum(s_n ∘ x_n, ΔW)

A factor varies along one axis of the weight, and that axis has a letter: if the data has the letter too, the factor multiplies the
data, else the result. Where the equation contracts some axes and keeps all others apart, it is a linear map and goes to that rule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError
from flipout.estimators import Estimator
from flipout.registry import rule
from flipout.rules.axes import permute, reshape
from flipout.weight import Factor, PerturbedWeight, Term, missing_rule

__all__ = ["Equation"]


class Equation(NamedTuple):
    """The letters of the data, of the weight and of the result."""

    data: str
    weight: str
    result: str


def _equation(written: str, ranks: tuple[int, int], weight_first: bool) -> Equation | None:
    """Reads an equation of two operands; None where a letter repeats in an operand or stands in the weight alone."""
    left, arrow, right = written.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != 2:
        return None
    at = 0 if weight_first else 1
    weight, data = operands[at], operands[1 - at]
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in left]
    count = ranks[1 - at] - len(data.replace("...", ""))
    if "..." in weight or count < 0:
        return None
    lead = "".join(spare[:count])
    data = data.replace("...", lead)
    if not arrow:
        letters = weight + data.replace(lead, "") if lead else weight + data
        right = lead + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    right = right.replace("...", lead)
    if len(weight) != ranks[at] or len(data) != ranks[1 - at] or any(len(set(part)) != len(part) for part in (data, weight, right)):
        return None
    return Equation(data, weight, right) if set(weight) <= set(data) | set(right) else None


@rule(torch.functional.einsum, Estimator)
def einsum(*args: Any) -> Tensor:
    """As torch's, of one perturbed weight and one operand of data; the equation is a string."""
    equation, operands = args[0], args[1:]
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    carriers = [operand for operand in operands if isinstance(operand, PerturbedWeight)]
    if not isinstance(equation, str):
        raise missing_rule(
            torch.einsum, next(a for a in args if isinstance(a, PerturbedWeight)), operands, "its equation is no string"
        )
    read = None
    if len(operands) == 2 and len(carriers) == 1:
        read = _equation(equation, (operands[0].dim(), operands[1].dim()), operands[0] is carriers[0])
    if read is None:
        raise missing_rule(
            torch.einsum, carriers[0], operands, "only one weight with one operand of data, no letter twice in either, has a rule"
        )
    weight, x = carriers[0], next(operand for operand in operands if operand is not carriers[0])
    if weight.batch.members is not None:
        x, place = weight.rows_in(x, 0, f"einsum {','.join(read[:2])}->{read.result}")
        weight = weight.at(place)
    if not set(read.data) & set(read.weight) & set(read.result):
        return _as_linear(x, weight, read)
    return _by_letters(x, weight, read)


def _as_linear(x: Tensor, weight: PerturbedWeight, equation: Equation) -> Tensor:
    """Letters are contracted or stand on one side alone: a linear map of the flattened contracted axes."""
    data, own, result = equation
    lost = [c for c in data if c not in own and c not in result]
    kept = [c for c in data if c in result]
    inner = [c for c in data if c in own]
    outer = [c for c in own if c not in data]
    place = weight.batch.place
    if place is not None and data[place.axis] in kept:
        place = place._replace(axis=kept.index(data[place.axis]))
        weight = weight.with_rows(weight.batch.at(place))
    elif place is not None:
        raise BatchError(
            f"einsum {equation} met {weight.origin.name!r} and sums over the rows of the batch, of whom each has its own weight"
        )
    x = x.permute([data.index(c) for c in (*kept, *inner, *lost)])
    sizes = list(x.shape)
    x = x.sum(tuple(range(len(kept) + len(inner), len(data)))) if lost else x
    x = x.reshape(*sizes[: len(kept)], math.prod(sizes[len(kept) : len(kept) + len(inner)]))
    matrix = permute(weight, [own.index(c) for c in (*outer, *inner)])
    spread = [weight.mean_weight.shape[own.index(c)] for c in outer]
    y: Tensor = F.linear(x, reshape(matrix, (math.prod(spread), x.shape[-1])))
    order = [*kept, *outer]
    return y.reshape(*sizes[: len(kept)], *spread).permute([order.index(c) for c in result])


def _by_letters(x: Tensor, weight: PerturbedWeight, equation: Equation) -> Tensor:
    """A stack of matrices, an axis of which the data shares and the result keeps: each factor goes where its letter is."""
    data, own, result = equation
    layout = weight.batch
    members, dim = layout.members, 0 if layout.place is None else layout.place.axis
    if members is None or data[dim] in own or data[dim] not in result:
        raise BatchError(
            f"einsum {','.join(equation[:2])}->{result} met {weight.origin.name!r} with data of shape {tuple(x.shape)}, whose rows "
            f"cannot be told: the module's own input has {layout.rows} rows on batch_dim={dim}, and the result must keep them"
        )
    weight.require_drawn("einsum")
    row = data[dim]
    member = next(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in data + own + result)
    data, result = data.replace(row, member + row), result.replace(row, member + row)
    x = x.unflatten(dim, (members, -1)) if members else x.unsqueeze(dim)
    y: Tensor = torch.einsum(f"{data},{own}->{result}", x, weight.mean_weight)  # under autocast, in the dtype that torch chooses
    for term in weight.terms:
        y = y + _of_term(x, term, weight, Equation(data, own, result), member)
    return y.flatten(result.index(member), result.index(member) + 1)


def _of_term(x: Tensor, term: Term, weight: PerturbedWeight, equation: Equation, member: str) -> Tensor:
    data, own, result = equation
    letters = [[own[axis] for axis in factor.axes] for factor in term.factors]
    if term.per_member or any(not (set(some) <= set(data) or set(some) <= set(result)) for some in letters):
        dense = term.dense(weight.mean_weight.dim()).expand(weight.batch.members or 0, *weight.mean_weight.shape)
        return torch.einsum(f"{data},{member}{own}->{result}", x, dense)
    base = term.base.expand(weight.mean_weight.shape)
    after = []
    for factor, some in zip(term.factors, letters, strict=True):
        if set(some) <= set(data):
            x = x * _placed(factor, some, data, member, x.dtype)
        else:
            after.append(_placed(factor, some, result, member, x.dtype))
    z: Tensor = torch.einsum(f"{data},{own}->{result}", x, base)
    for values in after:
        z = z * values.to(z.dtype)
    return z


def _placed(factor: Factor, letters: list[str], letters_of: str, member: str, dtype: torch.dtype) -> Tensor:
    """A factor's values, to broadcast against a tensor with the axes ``letters_of``."""
    values = factor.shaped(dtype)
    order = sorted(range(len(letters) + 1), key=lambda i: letters_of.index([member, *letters][i]))
    present = [member, *letters]
    shape = [values.shape[present.index(c)] if c in present else 1 for c in letters_of]
    return values.permute(order).reshape(shape)
