"""Operations that act entry by entry, or row by row: the members' own values, aligned with the rows of the other operand.

They serve every estimator whose weights can be listed: biases, gains, positions, scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError
from flipout.estimators import Estimator
from flipout.modes import autocast
from flipout.registry import rule
from flipout.rows import NONE, Rows
from flipout.rules.axes import scaled
from flipout.rules.per_row import per_row
from flipout.weight import PerturbedWeight, Term, missing_rule, operation_name, require_data

__all__ = ["fits", "spread"]


def spread(weight: PerturbedWeight, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Aligns a weight whose last axes are those of ``x`` with the rows of ``x``.

    Returns:
        ``x`` (expanded to the batch where all examples share it) and the weights, broadcastable to it.
    """
    shape = list(weight.mean_weight.shape)
    layout = weight.batch
    if layout.members is None:  # per token: one row for all axes that the weight does not have
        lead = x.shape[: x.dim() - len(shape)]
        drawn = weight.for_tokens(lead.numel())
        return x, drawn.dense().view(*lead, *shape)
    place = layout.known(x)
    if not isinstance(place, Rows):
        shared = [i for i, size in enumerate(reversed(shape)) if size != 1]
        x, place = layout.where(x, min(max(shared, default=-1) + 1, max(x.dim() - 1 - layout.dim, 0)), what)
    if x.dim() < len(shape):
        place = place._replace(axis=place.axis + len(shape) - x.dim())
        x = x.reshape(*[1] * (len(shape) - x.dim()), *x.shape)
    shape = [1] * (x.dim() - len(shape)) + shape
    if shape[place.axis] != 1:
        raise BatchError(
            f"{what} aligns an axis of {weight.origin.name!r} {tuple(weight.mean_weight.shape)} with the rows of an input of shape "
            f"{tuple(x.shape)}, which stand on its axis {place.axis}; name the right batch_dim or exclude the parameter"
        )
    values = per_row(weight.at(place), x.shape[place.axis])
    del shape[place.axis]
    return x, values.reshape(values.shape[0], *shape).movedim(0, place.axis)


def _scalar(value: Any) -> bool:
    return not isinstance(value, PerturbedWeight) and (not isinstance(value, Tensor) or value.dim() == 0)


def fits(weight: PerturbedWeight, value: Tensor) -> bool:
    """Whether a plain operand belongs to the weight (a mask, a fixed gain): it fits in it and has no axis of rows."""
    own, dim, rows = weight.mean_weight.shape, weight.batch.dim, weight.batch.rows
    fact = weight.batch.known(value)
    if isinstance(fact, Rows):
        return False
    within = value.dim() <= len(own) and all(n in (1, m) for n, m in zip(reversed(value.shape), reversed(own), strict=False))
    if not within or value.dim() <= dim or fact is NONE:
        return within
    # an axis of the weight's own can hold no rows, so what fills it is no data, even where the batch has that size by chance
    return own[dim + len(own) - value.dim()] != 1 or value.shape[dim] != rows


def _multiply(weight: PerturbedWeight, value: Any, operation: Any) -> PerturbedWeight:
    """``weight * value`` or ``weight / value`` for a value that all members share."""
    return weight.map(lambda tensor: operation(tensor, value))


def _scaled_by_number(a: Any, b: Any) -> PerturbedWeight | None:
    """The product of a weight with a weight of one number, in which the terms of the first stay what they are."""
    if not (isinstance(a, PerturbedWeight) and isinstance(b, PerturbedWeight)) or a.batch.members is None:
        return None
    weight, number = (a, b) if b.mean_weight.numel() == 1 else (b, a)
    if number.mean_weight.numel() != 1 or number.mean_weight.dim() > weight.mean_weight.dim():
        return None
    weight.require_drawn("a product of weights")
    return scaled(weight, number.dense().reshape(-1, 1), None)


def _aligned(operation: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """A perturbed operand with rows of data."""
    weight, x = (a, b) if isinstance(a, PerturbedWeight) else (b, a)
    if isinstance(x, PerturbedWeight):
        if a.batch.members is None:
            raise missing_rule(operation, a, (a, b), "two weights drawn per token have no product")
        ndim = max(a.mean_weight.dim(), b.mean_weight.dim())
        result: Tensor = operation(*(_lifted(w.dense(), ndim) for w in (a, b)), **kwargs)
        zero = torch.zeros_like(operation(a.mean_weight, b.mean_weight))
        return a.replace(zero, [Term(result.to(zero.dtype), per_member=True)])
    x, values = spread(weight, x, operation_name(operation))
    first, second = (values, x) if weight is a else (x, values)
    aligned: Tensor = operation(first, second, **kwargs)
    # one number, of which each row has its own, decides no dtype
    return aligned.to(torch.result_type(weight.mean_weight, x)) if not weight.mean_weight.dim() else aligned


def _lifted(weights: Tensor, ndim: int) -> Tensor:
    """``[N, *shape]`` as ``[N, 1, …, *shape]`` with ``ndim`` axes after the members'."""
    return weights.reshape(weights.shape[0], *[1] * (ndim + 1 - weights.dim()), *weights.shape[1:])


_REFLECTED = {
    torch.Tensor.__rsub__: torch.sub,
    torch.Tensor.__rtruediv__: torch.div,
    torch.Tensor.__rdiv__: torch.div,
    torch.Tensor.__radd__: torch.add,
    torch.Tensor.__rmul__: torch.mul,
}


@rule((torch.mul, torch.Tensor.mul, torch.multiply, torch.Tensor.__mul__), Estimator)
def mul(input: Any, other: Any) -> Any:
    a, b = input, other
    weight, value = (a, b) if isinstance(a, PerturbedWeight) else (b, a)
    if _scalar(value) or (not isinstance(value, PerturbedWeight) and fits(weight, value)):
        return _multiply(weight, value, torch.mul)
    if (scaled := _scaled_by_number(a, b)) is not None:
        return scaled
    return _aligned(torch.mul, a, b)


@rule((torch.div, torch.Tensor.div, torch.true_divide, torch.Tensor.__truediv__, torch.Tensor.__div__), Estimator)
def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    a, b = input, other
    if rounding_mode is not None:
        raise missing_rule(torch.div, a if isinstance(a, PerturbedWeight) else b, (a, b), "rounding is not linear")
    if isinstance(a, PerturbedWeight) and not isinstance(b, PerturbedWeight) and (_scalar(b) or fits(a, b)):
        return _multiply(a, b, torch.div)
    if _scalar(a):
        return b.replace(torch.zeros_like(b.mean_weight), [Term(a / b.dense(), per_member=True)])
    if isinstance(b, PerturbedWeight) and b.mean_weight.numel() == 1 and isinstance(a, PerturbedWeight):
        inverse = b.replace(torch.zeros_like(b.mean_weight), [Term(b.dense().reciprocal(), per_member=True)])
        if (scaled := _scaled_by_number(a, inverse)) is not None:
            return scaled
    return _aligned(torch.div, a, b)


def _sum(a: Any, b: Any, alpha: float, operation: Any) -> Any:
    sign = 1.0 if operation is torch.add else -1.0
    if isinstance(a, PerturbedWeight) and isinstance(b, PerturbedWeight) and a.mean_weight.shape == b.mean_weight.shape:
        other = [term.map(lambda base: base * (sign * alpha)) for term in b.terms]
        return a.replace(operation(a.mean_weight, b.mean_weight, alpha=alpha), [*a.terms, *other])
    weight, value = (a, b) if isinstance(a, PerturbedWeight) else (b, a)
    if isinstance(value, PerturbedWeight) or not (_scalar(value) or fits(weight, value)):
        return _aligned(operation, a, b, alpha=alpha)
    if weight is a:
        mean = weight.mean_weight + value * (sign * alpha)
        terms = weight.terms
    else:
        mean = value + weight.mean_weight * (sign * alpha)
        terms = tuple(term.map(lambda base: base * (sign * alpha)) for term in weight.terms)
    return weight.replace(mean, terms)


@rule((torch.add, torch.Tensor.add, torch.Tensor.__add__), Estimator)
def add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _sum(input, other, alpha, torch.add)


@rule((torch.sub, torch.Tensor.sub, torch.subtract, torch.Tensor.__sub__), Estimator)
def sub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _sum(input, other, alpha, torch.sub)


@rule(torch.rsub, Estimator)
def rsub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _sum(other, input, alpha, torch.sub)


for _reflected, _plain in _REFLECTED.items():

    def _swapped(a: Any, b: Any, _rule: Any = {torch.sub: sub, torch.div: div, torch.add: add, torch.mul: mul}[_plain]) -> Any:
        return _rule(b, a)

    rule(_reflected, Estimator)(_swapped)


def _exact(operation: Any) -> None:
    """Registers a pointwise function of a weight: exact per example, at the cost of listing every member's entries."""

    def apply(weight: Any, *args: Any, **kwargs: Any) -> PerturbedWeight:
        for other in (*args, *kwargs.values()):
            if isinstance(other, PerturbedWeight) or (isinstance(other, Tensor) and not fits(weight, other)):
                carrier = other if isinstance(other, PerturbedWeight) else weight
                raise missing_rule(operation, carrier, (weight, other), "its other operand is no constant")
        if weight.batch.members is None:
            raise missing_rule(operation, weight, (weight,), "it is not linear, so signs per token cannot pass through it")
        values = operation(weight.dense(), *args, **kwargs)
        result: PerturbedWeight = weight.replace(torch.zeros_like(weight.mean_weight), [Term(values, per_member=True)])
        return result

    rule(operation, Estimator)(apply)


for _name in ("exp", "log", "tanh", "sigmoid", "relu", "abs", "square", "sqrt", "rsqrt", "reciprocal", "pow", "clamp"):
    _exact(getattr(torch, _name))
    _exact(getattr(torch.Tensor, _name))
for _function in (torch.Tensor.__pow__, F.softplus, F.relu, F.silu, F.gelu):
    _exact(_function)


@rule(torch.functional.broadcast_tensors, Estimator)
def broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    """Each row its own member's values where one of the operands is data, as for ``mean + weight``; weights alone stay weights."""
    first = next(t for t in tensors if isinstance(t, PerturbedWeight))
    data = [t for t in tensors if not _scalar(t) and not isinstance(t, (PerturbedWeight, torch.nn.Parameter))]
    rows = next((t for t in data if isinstance(first.batch.known(t), Rows)), None)
    if rows is None:
        rows = next((t for t in data if not fits(first, t)), None)
    if rows is None:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        return tuple(t.expand(shape) for t in tensors)
    aligned = [spread(t, rows, "broadcast_tensors")[1] if isinstance(t, PerturbedWeight) else t for t in tensors]
    return torch.broadcast_tensors(*aligned)


@rule((F.prelu, torch.prelu), Estimator)
def prelu(input: Tensor, weight: PerturbedWeight) -> Tensor:
    """A slope per channel (or one): max(0, x) + w_n min(0, x). Channels are axis 1 of a batched input."""
    require_data(F.prelu, input)
    x, place = weight.where(input, max(input.dim() - 1, 0), "prelu")
    (x,) = autocast(x)
    slopes = per_row(weight.at(place), x.shape[place.axis]).to(x.dtype)
    channels = slopes.shape[1]
    if channels == 1 or x.dim() == 1:
        slopes = slopes.reshape(-1, *[1] * (x.dim() - 1))
    else:
        slopes = slopes.reshape(-1, channels, *[1] * (x.dim() - 2))
    return torch.where(x > 0, x, slopes * x)
