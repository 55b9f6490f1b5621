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
from flipout.rows import NONE, Mixed, Part, Rows
from flipout.rules.axes import broadcast, narrowed_to_one, scaled
from flipout.rules.per_row import per_row
from flipout.weight import PerturbedWeight, Term, missing_rule, operation_name, require_data

__all__ = ["fits", "on_place", "spread"]


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
    if isinstance(place, Part):
        return x, per_row(weight.at(place.over(0, 1)), 1)[0]
    if not isinstance(place, Rows):
        shared = [i for i, size in enumerate(reversed(shape)) if size != 1]
        x, place = layout.where(x, min(max(shared, default=-1) + 1, max(x.dim() - 1 - layout.dim, 0)), what)
    if x.dim() < len(shape):
        place = place._replace(axis=place.axis + len(shape) - x.dim())
        x = x.reshape(*[1] * (len(shape) - x.dim()), *x.shape)
    return x, on_place(weight, x.dim(), place, what)


def on_place(weight: PerturbedWeight, ndim: int, place: Rows, what: str) -> Tensor:
    """The members' weights, broadcastable to a tensor of ``ndim`` axes whose rows stand at ``place``."""
    lead = ndim - weight.mean_weight.dim()
    if lead < 0:
        raise BatchError(
            f"{what} has no axis for the rows in {ndim} axes of {weight.origin.name!r} {tuple(weight.mean_weight.shape)}"
        )
    if place.axis >= lead:
        weight = narrowed_to_one(weight, place.axis - lead)
    shape = [1] * lead + list(weight.mean_weight.shape)
    if shape[place.axis] != 1:
        raise BatchError(
            f"{what} aligns an axis of {weight.origin.name!r} {tuple(weight.mean_weight.shape)} with the rows of an input of "
            f"{ndim} axes, which stand on its axis {place.axis}; name the right batch_dim or exclude the parameter"
        )
    values = per_row(weight.at(place), place.size)
    del shape[place.axis]
    return values.reshape(values.shape[0], *shape).movedim(0, place.axis)


def _scalar(value: Any) -> bool:
    return not isinstance(value, PerturbedWeight) and (not isinstance(value, Tensor) or value.dim() == 0)


def fits(weight: PerturbedWeight, value: Tensor) -> bool:
    """Whether a plain operand belongs to the weight (a mask, a fixed gain): it fits in it and has no axis of rows."""
    own, dim, rows = weight.mean_weight.shape, weight.batch.dim, weight.batch.rows
    fact = weight.batch.known(value)
    if isinstance(fact, (Rows, Mixed)) and fact is not NONE:
        return False
    within = value.dim() <= len(own) and all(n in (1, m) for n, m in zip(reversed(value.shape), reversed(own), strict=False))
    if not within or value.dim() <= dim or fact is NONE:
        return within
    # an axis of the weight's own can hold no rows, so what fills it is no data, even where the batch has that size by chance
    return own[dim + len(own) - value.dim()] != 1 or value.shape[dim] != rows


def _shared(weight: PerturbedWeight, value: Tensor) -> bool:
    """Whether a plain operand has no rows, so that its sum or product with the weight is a weight again."""
    return fits(weight, value) or _wide(weight, value)


def _wide(weight: PerturbedWeight, value: Tensor) -> bool:
    """Whether a plain operand is a constant that the weight is broadcast to."""
    if not weight.batch.constant(value) or weight.batch.members is None:
        return False
    own = weight.mean_weight.shape
    lead = value.dim() - len(own)
    return lead > 0 or any(m == 1 != n for n, m in zip(reversed(value.shape), reversed(own), strict=False))


def _spread_out(weight: PerturbedWeight, value: Any) -> PerturbedWeight:
    """The weight broadcast with a constant."""
    shape = torch.broadcast_shapes(weight.mean_weight.shape, value.shape) if isinstance(value, Tensor) else weight.mean_weight.shape
    return weight if shape == weight.mean_weight.shape else broadcast(weight, shape)


def _multiply(weight: PerturbedWeight, value: Any, operation: Any) -> PerturbedWeight:
    """``weight * value`` or ``weight / value`` for a value that all members share."""
    weight = _spread_out(weight, value)
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
    if _scalar(value) or (not isinstance(value, PerturbedWeight) and _shared(weight, value)):
        return _multiply(weight, value, torch.mul)
    if (scaled := _scaled_by_number(a, b)) is not None:
        return scaled
    return _aligned(torch.mul, a, b)


@rule((torch.div, torch.Tensor.div, torch.true_divide, torch.Tensor.__truediv__, torch.Tensor.__div__), Estimator)
def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    a, b = input, other
    if rounding_mode is not None:
        raise missing_rule(torch.div, a if isinstance(a, PerturbedWeight) else b, (a, b), "rounding is not linear")
    if isinstance(a, PerturbedWeight) and not isinstance(b, PerturbedWeight) and (_scalar(b) or _shared(a, b)):
        return _multiply(a, b, torch.div)
    if _scalar(a) or (isinstance(a, Tensor) and not isinstance(a, PerturbedWeight) and _shared(b, a)):
        b = _spread_out(b, a)
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
    if isinstance(value, PerturbedWeight) or not (_scalar(value) or _shared(weight, value)):
        return _aligned(operation, a, b, alpha=alpha)
    weight, value_first = _spread_out(weight, value), weight is not a
    if not value_first:
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


def _in_place(operation: Any, name: str) -> None:
    """Registers ``x += w`` and its kin: rows of data take the values of their members in place."""

    def apply(input: Tensor, other: Any, **kwargs: Any) -> Tensor:
        method = getattr(torch.Tensor, name)
        if isinstance(input, PerturbedWeight):
            raise missing_rule(method, input, (input, other), "a weight is not written into")
        x, values = spread(other, input, operation_name(method))
        if x is not input or torch.broadcast_shapes(x.shape, values.shape) != x.shape:
            raise BatchError(
                f"{operation_name(method)} met a tensor of shape {tuple(input.shape)} that all examples share, and the weight "
                f"{other.origin.name!r} {tuple(other.mean_weight.shape)}, of which each has its own: expand the tensor to the "
                f"batch first"
            )
        if values.dtype != x.dtype and not other.mean_weight.dim():
            values = values.to(x.dtype)
        result: Tensor = operation(input, values, **kwargs)
        return result

    rule(operation, Estimator)(apply)


for _name in ("add", "sub", "mul", "div"):
    _in_place(getattr(torch.Tensor, f"{_name}_"), f"{_name}_")
    _in_place(getattr(torch.Tensor, {"div": "__itruediv__"}.get(_name, f"__i{_name}__")), f"{_name}_")
for _name in ("subtract", "multiply", "divide", "true_divide"):
    _in_place(getattr(torch.Tensor, f"{_name}_"), f"{_name}_")


@rule(torch.Tensor.copy_, Estimator)
def copy(input: Tensor, src: Any, *_: Any, **__: Any) -> Tensor:
    """Rows of data become the values of their members."""
    require_data(torch.Tensor.copy_, input)
    x, values = spread(src, input, "copy_")
    if x is not input:
        raise missing_rule(torch.Tensor.copy_, src, (input, src), "the tensor that it is copied to has no rows")
    return input.copy_(values)


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


def _choice(condition: Any, input: Any, other: Any) -> Tensor:
    """where() of rows of data and of weights, each row with its member's."""
    operands = (condition, input, other)
    carriers = [value for value in operands if isinstance(value, PerturbedWeight)]
    ndim = max(value.dim() for value in operands if isinstance(value, Tensor))
    places, constant, dim = [], True, carriers[0].batch.dim
    for value in operands:
        if isinstance(value, Tensor) and not isinstance(value, PerturbedWeight):
            fact = carriers[0].batch.known(value)
            if isinstance(fact, Mixed) and fact is not NONE:
                carriers[0].rows_in(value, 0, "where")
            if isinstance(fact, Rows):
                places.append(fact._replace(axis=fact.axis + ndim - value.dim()))
            constant = constant and (fact is NONE or not value.dim() or (value.dim() == ndim > dim and value.shape[dim] == 1))
    if not places and constant and carriers[0].batch.members is not None:  # what all examples share: a weight again
        values: Any = torch.where(*(_lifted(v.dense(), ndim) if isinstance(v, PerturbedWeight) else v for v in operands))
        return PerturbedWeight(
            values.new_zeros(values.shape[1:]), (Term(values, per_member=True),), carriers[0].batch, carriers[0].origin
        )
    if not places or carriers[0].batch.members is None or not all(place.same(places[0]) for place in places):
        raise missing_rule(torch.where, carriers[0], operands, "its other operands have no rows, or in different places")
    chosen: Any = torch.where(*(on_place(v, ndim, places[0], "where") if isinstance(v, PerturbedWeight) else v for v in operands))
    return chosen  # type: ignore[no-any-return]


@rule(torch.where, Estimator)
def where(condition: Any, input: Any, other: Any) -> Tensor:
    return _choice(condition, input, other)


@rule(torch.Tensor.where, Estimator)
def where_of(input: Any, condition: Any, other: Any) -> Tensor:
    return _choice(condition, input, other)


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
    return tuple(torch.broadcast_tensors(*aligned))


@rule((F.prelu, torch.prelu), Estimator)
def prelu(input: Tensor, weight: PerturbedWeight) -> Tensor:
    """A slope per channel (or one): max(0, x) + w_n min(0, x). Channels are axis 1 of a batched input."""
    require_data(F.prelu, input)
    x, place = weight.rows_in(input, max(input.dim() - 1, 0), "prelu")
    (x,) = autocast(x)
    slopes = per_row(weight.at(place), x.shape[place.axis]).to(x.dtype)
    channels = slopes.shape[1]
    if channels == 1 or x.dim() == 1:
        slopes = slopes.reshape(-1, *[1] * (x.dim() - 1))
    else:
        slopes = slopes.reshape(-1, channels, *[1] * (x.dim() - 2))
    return torch.where(x > 0, x, slopes * x)
