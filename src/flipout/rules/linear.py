"""Linear maps of the last axis: ``linear``, ``matmul`` and its kin, ``bilinear``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError, UnsupportedNoiseError
from flipout.estimators import Estimator, Flipout, Independent, LocalReparameterization, LowRank
from flipout.modes import autocast, functional, require_randomness, uncounted
from flipout.precision import product_dtype
from flipout.registry import rule
from flipout.rows import Part, Rows
from flipout.rules.axes import permute, reshape
from flipout.rules.constants import is_constant, of_constant
from flipout.rules.pointwise import add
from flipout.rules.products import factored_product, mean_product, signed_linear
from flipout.weight import Factor, PerturbedWeight, Term, missing_rule, require_data

__all__ = ["linear", "sign_factors"]


def _blocks(x: Tensor, weight: PerturbedWeight, what: str) -> tuple[Tensor, Tensor, PerturbedWeight, Rows]:
    """Arranges an operand and a weight by members.

    Returns:
        ``x`` as ``[A, N, T, in]`` with members on axis 1; ``x`` itself, expanded to the batch if all examples share it; the weight
        with these members; where the rows stand.
    """
    x, place = weight.rows_in(x, 1, what)
    outer = place.outer
    if place.order is not None or weight.batch.owner is not None:
        weight, outer = weight.at(place), 1
    members = weight.batch.members or 0
    lead = math.prod(x.shape[: place.axis]) * outer
    each = math.prod(x.shape[place.axis : -1]) // (members * outer) if members else 1
    return x.reshape(lead, members, each, x.shape[-1]), x, weight, place


def _of_one_row(x: Tensor, weight: Any, bias: Any) -> Tensor | None:
    """A vector that is a part of one row, as a matrix of one row; None for any other."""
    some = weight if isinstance(weight, PerturbedWeight) else bias
    return some.moved(x, x.unsqueeze(0)) if isinstance(some.batch.known(x), Part) else None


def _split(term: Term, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None] | None:
    """The term's factors along the input and along the output axis of a matrix; None if one spans both."""
    sides = term.sides(2, dtype) if term.blocks else None
    return None if sides is None else (sides[1], sides[0])


def sign_factors(term: Term) -> tuple[Factor, Factor] | None:
    """The (s, r) of a term that has one factor along the input axis, one along the output axis and a full base.

    The base may be one for each group of members, ``[K, out, in]``.
    """
    sides = term.by_axis(2) if term.blocks and term.base.dim() == 2 + term.per_member else None
    r, s = sides or (None, None)
    return None if s is None or r is None else (s, r)


def _token_rows(x: Tensor, *weights: Any) -> tuple[Tensor, list[Any]]:
    """Where signs are drawn per token: ``x`` as ``[tokens, in]`` and the weights with a row of signs for each."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    drawn = [w.for_tokens(flat.shape[0]) if isinstance(w, PerturbedWeight) else w for w in weights]
    return flat, drawn


@rule(F.linear, Flipout, LowRank, bases=True)
def linear(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """y_n = W̄ x_n + Σ_t v_tn ∘ (B_t (u_tn ∘ x_n)): two products for flipout."""
    if is_constant(input, weight, bias):
        return of_constant(F.linear, input, weight, bias)
    if input.dim() == 1 and (row := _of_one_row(input, weight, bias)) is not None:
        return F.linear(row, weight, bias).squeeze(0)
    some = weight if isinstance(weight, PerturbedWeight) else bias
    if some.batch.members is None:
        flat, drawn = _token_rows(input, weight, bias)
        return linear(flat, *drawn).view(*input.shape[:-1], weight.shape[0])
    if not isinstance(weight, PerturbedWeight):
        return _plain_product(input, weight, bias)
    if input.dim() == 2 and input.shape[0] == weight.batch.members and weight.batch.owner is None:
        input, place = weight.rows_in(input, 1, "linear")
        fused = _fused(input, weight, bias, place) if place.blocks else None
        if fused is not None:
            return _add_bias(fused[0], fused[1], place)
    x, input, weight, place = _blocks(input, weight, "linear")
    shape = (*input.shape[:-1], weight.mean_weight.shape[0])
    fused = _fused(x, weight, bias, place)
    if fused is not None:
        return _add_bias(fused[0].view(shape), fused[1], place)
    x, mean = autocast(x, weight.mean_weight)
    y = mean_product(x, mean)
    for term in weight.terms:
        (base,) = autocast(term.base)
        sides = _split(term, x.dtype)
        if sides is None:
            y = y + torch.matmul(x, _matrices(term, weight, x.dtype).mT)
        else:
            full = base if base.dim() or (sides[0] is not None and sides[1] is not None) else base.expand(weight.mean_weight.shape)
            y = y + factored_product(x, full, *sides, dtype=product_dtype(weight.origin.estimator, x))
    return _add_bias(y.view(shape), bias, place)


def _plain_product(input: Tensor, weight: Tensor, bias: PerturbedWeight) -> Tensor:
    """A linear map of which the bias alone is perturbed."""
    _, place = bias.rows_in(input, 1, "linear") if bias.batch.members is not None else (input, None)
    return _add_bias(F.linear(input, weight), bias, place)


def _fused(x: Tensor, weight: PerturbedWeight, bias: Any, place: Rows) -> tuple[Tensor, Any] | None:
    """The hand-written pair of products and the bias still to add; None where the weight no longer is flipout's own."""
    signs = sign_factors(weight.terms[0]) if len(weight.terms) == 1 else None
    if signs is None:
        return None
    s, r = signs
    b, db, left = None, None, bias
    if not isinstance(bias, PerturbedWeight):
        b, left = bias, None
    elif _shares_signs(bias, r, weight.terms[0]):
        b, db, left = bias.mean_weight, bias.terms[0].base, None
    x, mean, base, b, db = autocast(x, weight.mean_weight, weight.terms[0].base, b, db)
    dtype = product_dtype(weight.origin.estimator, x)
    return signed_linear(x, mean, base, s.compact(x.dtype), r.compact(x.dtype), b, db, s.repeat, dtype), left


def _shares_signs(bias: PerturbedWeight, r: Factor, matrix: Term) -> bool:
    """Whether a bias is perturbed under the very output signs of a matrix, in the same groups."""
    if len(bias.terms) != 1 or len(bias.terms[0].factors) != 1 or bias.terms[0].factors[0].values is not r.values:
        return False
    groups = bias.terms[0].groups
    return groups is matrix.groups if groups is None else groups.same(matrix.groups)


def _matrices(term: Term, weight: PerturbedWeight, dtype: torch.dtype) -> Tensor:
    dense = term.dense(weight.mean_weight.dim()).to(dtype)
    return dense.expand(dense.shape[0], *weight.mean_weight.shape)


def _add_bias(y: Tensor, bias: Any, place: Rows | None = None) -> Tensor:
    """``y + bias``, for a result whose rows stand at ``place``."""
    if bias is None:
        return y
    if isinstance(bias, PerturbedWeight):
        return add(y, bias if place is None else bias.at(place)).to(y.dtype)  # type: ignore[no-any-return]
    total: Tensor = y + bias.to(y.dtype)
    return total


@rule(F.linear, Independent)
def linear_dense(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """y_n = W_n x_n with every member's matrix in memory."""
    if is_constant(input, weight, bias):
        return of_constant(F.linear, input, weight, bias)
    if input.dim() == 1 and (row := _of_one_row(input, weight, bias)) is not None:
        return F.linear(row, weight, bias).squeeze(0)
    if not isinstance(weight, PerturbedWeight):
        return _plain_product(input, weight, bias)
    x, input, weight, place = _blocks(input, weight, "linear")
    x, matrices = autocast(x, weight.dense())
    y = torch.matmul(x, matrices.mT)
    return _add_bias(y.view(*input.shape[:-1], matrices.shape[1]), bias, place)


@rule(F.linear, LocalReparameterization)
def linear_local(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """y_n ~ N(W̄ x_n, σ² x_n²): Kingma et al. 2015; the paper's Eq. 2."""
    if is_constant(input, weight, bias):
        return of_constant(F.linear, input, weight, bias)
    if input.dim() == 1 and (row := _of_one_row(input, weight, bias)) is not None:
        return F.linear(row, weight, bias).squeeze(0)
    if not isinstance(weight, PerturbedWeight):
        return _plain_product(input, weight, bias)
    if weight.drawn:  # made of vectors, of which every member has its own
        return linear_dense(input, weight, bias)
    origin, layout = weight.origin, weight.batch
    if len(weight.terms) != 1:
        raise UnsupportedNoiseError(
            f"LocalReparameterization met {origin.name!r} joined with another perturbed weight before a linear map: it does not "
            "know the law of the result; use Flipout(), or exclude one of them"
        )
    _, place = weight.rows_in(input, 1, "linear") if input.dim() == 2 else (input, None)
    if place is None or not place.blocks or place.axis or input.shape[0] != layout.members or layout.owner is not None:
        raise UnsupportedNoiseError(
            f"LocalReparameterization met {origin.name!r} in a linear map of an input of shape {tuple(input.shape)} for "
            f"{layout.members} members: rows that share a member's weights would get independent noise, which is biased. It "
            "serves 2-D inputs with one row a member; use Flipout() for sequences"
        )
    if origin.uses:
        raise UnsupportedNoiseError(
            f"LocalReparameterization met {origin.name!r} twice in one forward pass: the uses share one weight and their "
            "pre-activations are not independent; use Flipout() for tied or repeated layers"
        )
    origin.uses.append("linear")
    x, mean, scale = autocast(input, weight.mean_weight, weight.terms[0].base)
    variance = F.linear(x.square(), scale.expand(mean.shape).square())
    require_randomness()
    with uncounted():
        if functional():
            noise = torch.randn(variance.shape, generator=origin.generator, dtype=variance.dtype, device=variance.device)
        else:
            noise = torch.empty_like(variance).normal_(generator=origin.generator)
    # the square root has no slope at zero: a row of zeros has no noise and no gradient
    return _add_bias(F.linear(x, mean) + variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * noise, bias, place)


# --- matmul and its kin: a carrier on the right is a transposed linear map, on the left it acts on columns -----------


def _linear(x: Tensor, weight: PerturbedWeight) -> Tensor:
    y: Tensor = F.linear(x, weight)
    return y


def _right(x: Tensor, weight: PerturbedWeight) -> Tensor:
    """x @ W for a matrix W [in, out]."""
    return _linear(x, permute(weight, (1, 0)))


def _left(weight: PerturbedWeight, x: Tensor) -> Tensor:
    """W @ x for a matrix W [out, in]: the last two axes of x are (in, columns).

    The columns of a matrix are the rows of the batch (``W @ x.T``); with more axes, the batch stands in front.
    """
    if x.dim() < 2:
        raise BatchError(f"W @ x met {weight.origin.name!r} with x of shape {tuple(x.shape)}, which has no batch dimension")
    last = x.dim() - 1
    turned = weight.moved(x, x.mT, lambda axis: {last: last - 1, last - 1: last}.get(axis, axis))
    return _linear(turned, weight).mT


def _stacked(x: Tensor, weight: PerturbedWeight) -> Tensor:
    """x @ W for a stack W [..., in, out] that each example sees whole: x is [N, ..., rows, in]."""
    ndim = weight.mean_weight.dim()
    x, place = weight.rows_in(x, min(ndim, x.dim() - 1), "matmul with a stack of matrices")
    weight, axis = weight.at(place), place.axis
    if x.dim() - axis - 1 < ndim or weight.batch.members is None:
        raise BatchError(
            f"a product of an input of shape {tuple(x.shape)} with the stack of matrices {weight.origin.name!r} "
            f"{tuple(weight.mean_weight.shape)} cannot tell the examples apart: the batch dimension must stand before the stack's "
            "own axes. Where rows are routed among examples (a mixture of experts), exclude the parameter"
        )
    weights = weight.dense()
    rows = x.shape[axis]
    if weights.shape[0] != rows:
        weights = weights.repeat_interleave(rows // weights.shape[0], 0)
    middle = [1] * (x.dim() - axis - 1 - ndim)
    x, weights = autocast(x, weights)
    return torch.matmul(x, weights.view(rows, *middle, *weights.shape[1:]))


@rule((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), Estimator)
def matmul(input: Any, other: Any) -> Tensor:
    a, b = input, other
    if isinstance(a, PerturbedWeight) and isinstance(b, PerturbedWeight):
        raise missing_rule(torch.matmul, a, (a, b), "a product of two perturbed weights is not linear in their noise")
    if isinstance(b, PerturbedWeight):
        if b.mean_weight.dim() == 1:
            return _right(a, reshape(b, (-1, 1))).squeeze(-1)
        return _right(a, b) if b.mean_weight.dim() == 2 else _stacked(a, b)
    if a.mean_weight.dim() == 1:
        return _left(reshape(a, (1, -1)), b).squeeze(0 if b.dim() == 2 else -2)
    if a.mean_weight.dim() == 2:
        return _left(a, b)
    last = b.dim() - 1
    turned = a.moved(b, b.mT, lambda axis: {last: last - 1, last - 1: last}.get(axis, axis))
    return _stacked(turned, permute(a, _last_swapped(a.mean_weight.dim()))).mT


def _last_swapped(ndim: int) -> list[int]:
    return [*range(ndim - 2), ndim - 1, ndim - 2]


@rule(torch.Tensor.__rmatmul__, Estimator)
def rmatmul(a: Any, b: Any) -> Tensor:
    return matmul(b, a)


@rule((torch.mm, torch.Tensor.mm), Estimator)
def mm(input: Any, mat2: Any) -> Tensor:
    a, b = input, mat2
    for operand in (a, b):
        if operand.dim() != 2:
            raise RuntimeError(f"mm expects matrices, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return matmul(a, b)


@rule((torch.bmm, torch.Tensor.bmm), Estimator)
def bmm(input: Any, mat2: Any) -> Tensor:
    a, b = input, mat2
    carrier = a if isinstance(a, PerturbedWeight) else b
    if carrier.mean_weight.shape[0] == 1 and carrier.batch.members is not None:
        other = b if carrier is a else a  # one matrix for each batch of size one: an ordinary product
        matrix = reshape(carrier, carrier.mean_weight.shape[1:])
        if other.shape[0] == 1 == carrier.batch.rows:
            return matmul(matrix, other) if carrier is a else matmul(other, matrix)
    other = b if carrier is a else a
    place = carrier.batch.known(other) if carrier.batch.members is not None and not isinstance(other, PerturbedWeight) else None
    if isinstance(place, Rows) and place.axis == 0 and place.sure:  # each matrix meets one row: its member's own
        index = carrier.batch.index(place)
        if index is None:
            index = torch.arange(carrier.batch.members or 0).repeat_interleave(place.size // (carrier.batch.members or 1))
        matrices = carrier.dense()[index.to(carrier.device), torch.arange(place.size, device=carrier.device)]
        operands = autocast(*((matrices, b) if carrier is a else (a, matrices)))
        return torch.bmm(*operands)
    raise BatchError(
        f"bmm met the stack of matrices {carrier.origin.name!r} {tuple(carrier.mean_weight.shape)}: its leading axis indexes the "
        "stack, so the rows of the batch cannot be told apart (a mixture of experts routes rows this way). Use matmul on [batch, "
        "stack, rows, in], or exclude the parameter"
    )


@rule((torch.addmm, torch.Tensor.addmm), Estimator)
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta·input + alpha·(mat1 @ mat2); any of the three may be perturbed."""
    product = mm(mat1, mat2) if isinstance(mat1, PerturbedWeight) or isinstance(mat2, PerturbedWeight) else torch.mm(mat1, mat2)
    if alpha != 1:
        product = product * alpha
    scaled = input * beta if beta != 1 else input
    if isinstance(scaled, PerturbedWeight) and isinstance(mat1, PerturbedWeight):
        if scaled.dim() == 1 != scaled.shape[0]:
            raise BatchError(
                f"addmm of the perturbed matrix {mat1.origin.name!r} with the vector {scaled.origin.name!r} {tuple(scaled.shape)} "
                "would align the vector with the rows of the batch; make it a column [out, 1], or exclude it"
            )
        if isinstance(scaled, PerturbedWeight):
            scaled.moved(mat2, product)
        return _add_bias(scaled.moved(product, product.t(), lambda axis: 1 - axis), scaled.t()).t()
    if isinstance(scaled, PerturbedWeight) and not isinstance(mat1, PerturbedWeight):
        scaled.moved(mat1, product)
    return _add_bias(product, scaled)


# --- bilinear ---------------------------------------------------------------------------------------------------------


@rule(F.bilinear, Estimator)
def bilinear(input1: Tensor, input2: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """y_n = x1_nᵀ W_n x2_n: a linear map of the outer product of the inputs, with the weight [out, in1, in2] read as a matrix."""
    require_data(F.bilinear, input1, input2)
    if not isinstance(weight, PerturbedWeight):
        return _add_bias(bias.moved(input1, F.bilinear(input1, input2, weight)), bias)
    if weight.drawn:
        return _bilinear_drawn(input1, input2, weight, bias)
    outer = weight.moved(input1, (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2))
    y: Tensor = F.linear(outer, reshape(weight, (weight.shape[0], outer.shape[-1])), bias)
    return y


def _bilinear_drawn(input1: Tensor, input2: Tensor, weight: PerturbedWeight, bias: Any) -> Tensor:
    """Each factor moves to the operand whose axis it varies along: two bilinear forms for flipout."""
    if weight.batch.members is None:
        lead = input1.shape[:-1]
        return _bilinear_drawn(
            input1.reshape(input1.shape[:-1].numel(), input1.shape[-1]),
            input2.reshape(input2.shape[:-1].numel(), input2.shape[-1]),
            weight.for_tokens(lead.numel()),
            bias.for_tokens(lead.numel()) if isinstance(bias, PerturbedWeight) else bias,
        ).view(*lead, weight.shape[0])
    plain = weight
    x1, input1, weight, place = _blocks(input1, plain, "bilinear")
    x2, _, _, other = _blocks(input2, plain, "bilinear")
    if not place.same(other):
        raise BatchError(
            f"bilinear met {weight.origin.name!r} with two inputs whose rows stand in different places: {place}, {other}"
        )
    y = F.bilinear(x1, x2, weight.mean_weight)
    for term in weight.terms:
        sides = None if term.per_member else term.sides(3, x1.dtype)
        if sides is None:
            dense = term.dense(3).expand(-1, *weight.mean_weight.shape)
            y = y + torch.einsum("anti,noij,antj->anto", x1, dense, x2).to(y.dtype)
            continue
        r, s, q = (side.unsqueeze(1) if side is not None else None for side in sides)
        z = F.bilinear(x1 if s is None else x1 * s, x2 if q is None else x2 * q, term.base.expand(weight.mean_weight.shape))
        y = y + (z if r is None else z * r)
    return _add_bias(y.view(*input1.shape[:-1], weight.shape[0]), bias, place)
