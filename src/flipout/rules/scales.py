"""Norms of weights, and weights divided by them: weight normalisation, and what spectral normalisation is made of.

    ‖v_n‖² = Σ_tu (a_t a_u)_n ∘ ((b_t b_u)_n (B_t ∘ B_u)ᵀ),      v_n = Σ_t B_t ∘ (a_tn b_tnᵀ)

over all pairs of terms, the mean among them: for flipout's one term, ‖v̄‖² + ‖ΔV‖² + 2 r_n ∘ (s_n (v̄ ∘ ΔV)ᵀ), one product. The
weight v_n / ‖v_n‖ is then v_n with numbers of its own along the output axis, and keeps its products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.estimators import Estimator
from flipout.registry import rule
from flipout.rules.axes import permute, reshape, scaled
from flipout.weight import Layout, PerturbedWeight, Term, missing_rule

__all__ = ["row_norms"]

_Side = Tensor | None


def row_norms(weight: PerturbedWeight) -> Tensor:
    """‖W_n‖ of each row of a matrix ``[out, in]``, for each member: ``[N, out]``."""
    mean, terms = weight.mean_weight, [_sided(term, weight.mean_weight.dtype) for term in weight.terms]
    sides = [side for side in terms if side is not None]
    if len(sides) < len(terms):
        norms: Tensor = weight.dense().norm(dim=-1)
        return norms
    pieces: list[tuple[Tensor, _Side, _Side]] = [(mean, None, None), *sides]
    total = mean.new_zeros(weight.batch.members or 0, mean.shape[0])
    for i, (base, a, b) in enumerate(pieces):
        for j in range(i + 1):
            other, c, d = pieces[j]
            outer, inner = _product(a, c, i == j), _product(b, d, i == j)
            both = (base * other).expand(mean.shape)
            value = both.sum(1) if inner is None else inner @ both.t()
            value = value if outer is None else value * outer
            total = total + (value if i == j else 2 * value)
    return total.sqrt()


def _sided(term: Term, dtype: torch.dtype) -> tuple[Tensor, _Side, _Side] | None:
    """A term's base and its factors along the rows and along the columns of a matrix; None where there is more to it."""
    sides = None if term.per_member else term.sides(2, dtype)
    if sides is None:
        return None
    return term.base, sides[0], sides[1]


def _product(a: _Side, b: _Side, same: bool) -> _Side:
    if same:
        return None if a is None else a.square()
    if a is None or b is None:
        return b if a is None else a
    return a * b


_WEIGHT_NORM: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]


@rule(_WEIGHT_NORM, Estimator)
def weight_norm(v: Any, g: Any, dim: int = 0) -> PerturbedWeight:
    """W_n = g_n ∘ v_n / ‖v_n‖, the norm over all axes but ``dim``, or over all where it is -1: Salimans & Kingma 2016.

    Exact for each member under every estimator, whether v, g or both are perturbed. A linear map of the result takes one product
    more than flipout's two, and ‖v_n‖ takes one of all members at once. Second derivatives are those of this formula; torch's own
    operation takes ‖v‖ for a constant in them, except where the norm is over all axes.
    """
    some = v if isinstance(v, PerturbedWeight) else g
    if some.batch.members is None:
        raise missing_rule(_WEIGHT_NORM, some, (v, g), "signs per token give no member a norm")
    for operand in (v, g):
        if isinstance(operand, PerturbedWeight):
            operand.require_drawn("a weight normalisation")
    axis = None if dim == -1 else dim
    count = g.mean_weight.numel() if isinstance(g, PerturbedWeight) else g.numel()
    gains = (g.dense() if isinstance(g, PerturbedWeight) else g).reshape(-1, count)
    if not isinstance(v, PerturbedWeight):
        others = [i for i in range(v.dim()) if i != axis]
        return scaled(some.replace(v / (v.norm(dim=others, keepdim=True) if others else v.abs()), ()), gains, axis)
    ndim = v.mean_weight.dim()
    order = [*range(ndim)] if axis is None else [axis, *(i for i in range(ndim) if i != axis)]
    rows = v.mean_weight.shape[axis] if axis is not None else 1
    norms = row_norms(reshape(permute(v, order), (rows, v.mean_weight.numel() // rows)))
    return scaled(v, gains / norms, axis)


@rule((torch.mv, torch.Tensor.mv), Estimator)
def mv(input: Any, vec: Any) -> PerturbedWeight:
    """W_n v for a vector v of no row: a weight again, ``[out]``."""
    weight, vector = input, vec
    if not isinstance(weight, PerturbedWeight) or isinstance(vector, PerturbedWeight) or weight.batch.members is None:
        carrier = weight if isinstance(weight, PerturbedWeight) else vector
        raise missing_rule(
            torch.mv, carrier, (weight, vector), "only the product of one perturbed matrix with a constant is linear"
        )
    weight.require_drawn("a product with a constant")
    members = weight.batch.members
    own = weight.with_rows(Layout(members, members, 0))
    values = F.linear(vector.expand(members, -1), own)
    mean = torch.mv(weight.mean_weight, vector)
    return weight.replace(mean, [Term(values - mean, per_member=True)])


@rule((torch.dot, torch.Tensor.dot, torch.vdot, torch.Tensor.vdot), Estimator)
def dot(input: Any, other: Any) -> PerturbedWeight:
    """u · w_n for a real vector u of no row: a weight of one number."""
    weight, vector = (input, other) if isinstance(input, PerturbedWeight) else (other, input)
    if isinstance(vector, PerturbedWeight) or weight.batch.members is None:
        raise missing_rule(torch.dot, weight, (input, other), "only the product of one perturbed vector with a constant is linear")
    mean = torch.dot(weight.mean_weight, vector)
    return weight.replace(mean, [Term(weight.dense() @ vector - mean, per_member=True)])


@rule(torch.Tensor.H.__get__, Estimator)  # type: ignore[attr-defined]
def adjoint(weight: PerturbedWeight) -> PerturbedWeight:
    """The transpose, of a real matrix."""
    if weight.mean_weight.is_complex() or weight.mean_weight.dim() != 2:
        raise missing_rule(torch.Tensor.H.__get__, weight, (weight,), "only a real matrix has its transpose there")  # type: ignore[attr-defined]
    return permute(weight, (1, 0))


@rule(F.normalize, Estimator)
def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """The power iteration of spectral normalisation, which writes its vectors into buffers, follows the mean weight.

    In training mode the buffers u and v move as those of the plain module do: without a gradient, by W̄. σ_n = uᵀ W_n v is then each
    member's own, with u and v as constants, and W_n / σ_n its weight: exact under every estimator.
    """
    if out is None or torch.is_grad_enabled() or not isinstance(input, PerturbedWeight):
        carrier = input if isinstance(input, PerturbedWeight) else out
        why = "" if out is None else "out= would write each example's result into one tensor"
        raise missing_rule(F.normalize, carrier, (input,), why, loops=out is None)  # type: ignore[arg-type]
    return F.normalize(input.mean_weight, p, dim, eps, out=out)


normalize.takes_out = True  # type: ignore[attr-defined]
