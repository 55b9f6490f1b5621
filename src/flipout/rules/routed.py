"""Products with a stack of matrices of which each row of data uses one: the experts of a mixture.

    y_t = W̄_g x_t + r_t ∘ (ΔW_g (s_t ∘ x_t)),      g = the expert that token t was sent to

A router sends rows of all examples to an expert in an order of its own, so that the example a row belongs to cannot be told:
one weight per example is refused by name. With ``Flipout(granularity="token")`` every row draws its own signs, whoever it
belongs to, and the product is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flipout.errors import BatchError
from flipout.estimators import Estimator
from flipout.registry import rule
from flipout.weight import PerturbedWeight, Term, missing_rule

__all__ = ["grouped_product", "routed_error"]


def routed_error(weight: PerturbedWeight, what: str) -> BatchError:
    """The error for rows that were sent to the matrices of a stack."""
    name = weight.origin.name
    return BatchError(
        f"{what} met the stack of matrices {name!r} {tuple(weight.mean_weight.shape)}, to which rows were routed: a row no longer "
        f"stands where its example stood, so that {weight.origin.estimator} cannot tell whose weights it should see. Use "
        f'Flipout(granularity="token"), or leave the stack unperturbed with exclude={name!r}'
    )


def grouped_product(x: Tensor, weight: PerturbedWeight, ends: Tensor, product: Any) -> Tensor:
    """``product(x, W)`` with a row of signs for each row of ``x``.

    Args:
        x: ``[T, in]``, sorted by matrix.
        weight: a carrier of ``[G, in, out]`` with T members, one a row.
        ends: ``[G]``, where each matrix's run of rows ends; rows past the last end belong to none.
        product: the plain grouped product of ``[T, in]`` and ``[G, in, out]``.

    Returns:
        ``[T, out]``.
    """
    matrices = weight.mean_weight.shape[0]
    rows = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(ends, rows.to(ends.dtype), right=True).clamp(max=matrices - 1)
    y: Tensor = product(x, weight.mean_weight)
    for term in weight.terms:
        inputs, outputs = _sides(term, rows, group, x.dtype)
        base = term.base.expand(weight.mean_weight.shape).to(x.dtype)
        z = product(x if inputs is None else x * inputs, base)
        y = y + (z if outputs is None else z * outputs)
    return y


def _sides(term: Term, rows: Tensor, group: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What multiplies each row of the inputs and of the outputs: the factors of a stack [G, in, out] by their axes."""
    sides: dict[int, Tensor] = {}
    for factor in term.factors:
        values = factor.flat(dtype)
        for axis in factor.axes:
            if len(factor.axes) > 1:
                raise ValueError("a factor that spans two axes of a stack of matrices has no grouped product")
            at_row = values[rows, group].unsqueeze(-1) if axis == 0 else values
            side = 1 if axis == 1 else 2
            sides[side] = at_row if side not in sides else sides[side] * at_row
        if not factor.axes:
            sides[2] = values if 2 not in sides else sides[2] * values
    return sides.get(1), sides.get(2)


def grouped_mm(
    mat_a: Any, mat_b: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """torch's grouped product of routed rows ``[T, in]`` with a stack of matrices ``[G, in, out]``."""
    operation = _GROUPED_MM
    if not isinstance(mat_b, PerturbedWeight) or isinstance(bias, PerturbedWeight) or offs is None:
        carrier = next(operand for operand in (mat_b, mat_a, bias) if isinstance(operand, PerturbedWeight))
        raise missing_rule(operation, carrier, (mat_a, mat_b), "only the stack of matrices of routed rows may be perturbed")
    if mat_b.batch.members is not None:
        raise routed_error(mat_b, "grouped_mm")
    drawn = mat_b.for_tokens(mat_a.shape[0])
    y = grouped_product(mat_a, drawn, offs, lambda x, stack: operation(x, stack, offs=offs, out_dtype=out_dtype))
    return y if bias is None else y + bias


_GROUPED_MM: Any = getattr(torch, "_grouped_mm", None)  # torch 2.8 and later
if _GROUPED_MM is not None:
    rule(_GROUPED_MM, Estimator)(grouped_mm)
