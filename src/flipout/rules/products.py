"""The pair of products behind a linear layer, with a backward written for it.

    Y = X W̄ᵀ + b + R ∘ ((S ∘ X) ΔWᵀ + Δb)          Wen et al. 2018, Eq. 4

Six products forward and backward against a plain layer's three; five where nothing needs the gradient of ΔW. Between forward and
backward only the operands and the packed sign bits are kept: signs are unpacked again, never stored as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.modes import composed, owned, transformed
from flipout.precision import lowered, raised
from flipout.signs import flip_, unpack

__all__ = ["base_product", "factored_product", "mean_product", "sign_lowered", "signed_linear"]


def signed_linear(
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    repeat: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """X W̄ᵀ + b + R ∘ ((S ∘ X) ΔWᵀ + Δb).

    Args:
        x: ``[N, in]``, or ``[A, N, T, in]`` where every row of the A and T axes sees its member's weights.
        mean: W̄ ``[out, in]``.
        base: ΔW ``[out, in]``, or ``[K, out, in]`` for K groups of N/K members, one after the other.
        s: signs of the inputs, packed ``[N, ceil(in / 8)]`` or as numbers ``[N, in]``; kept for backward as they come.
        r: signs of the outputs, packed or as numbers ``[N, out]``.
        bias: mean bias ``[out]`` or None.
        bias_base: Δb ``[out]`` or ``[K, out]``, perturbed under the signs of the outputs, or None.
        repeat: how many consecutive members have the same ``s``; where they see one input as well, they share (S ∘ X) ΔWᵀ.
        dtype: of the products of ΔW, or None for that of ``x``.

    Returns:
        ``[N, out]`` or ``[A, N, T, out]``.
    """
    operands = (x, mean, base, s, r, bias, bias_base, repeat, dtype)
    if composed(x, mean, base, bias, bias_base):
        return _forward(*operands)
    result: Tensor = _SignedLinear.apply(*operands)  # type: ignore[no-untyped-call]
    return result


def _signs(signs: Tensor, like: Tensor) -> Tensor:
    """Signs as numbers that broadcast to the rows of ``like``."""
    if signs.dtype == torch.uint8:
        signs = unpack(signs, like.shape[-1], like.dtype)
    return signs if like.dim() == 2 else signs.unsqueeze(1)


def _times(signs: Tensor, x: Tensor) -> Tensor:
    """signs ∘ x, into the memory of freshly unpacked signs where the shapes allow."""
    numbers = _signs(signs, x)
    if x.dim() == 2 and signs.dtype == torch.uint8 and not transformed():
        return numbers.mul_(x)
    return numbers * x


def sign_lowered(signs: Tensor, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """signs ∘ x in a lower precision, and the number that it was divided by; in that of ``x`` if ``dtype`` is None."""
    if dtype is None:
        return _times(signs, x), None
    if signs.dtype != torch.uint8 or transformed() or (torch.is_grad_enabled() and x.requires_grad):
        return lowered(_times(signs, x), dtype)
    low, scale = lowered(x, dtype)
    return flip_(low, signs), scale


def base_product(x: Tensor, base: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Bᵀ + b, each row under the base of its group.

    Args:
        x: ``[N, in]`` or ``[A, N, T, in]``.
        base: B ``[out, in]``, or ``[K, out, in]``.
        bias: b ``[out]``, or ``[K, out]``.

    Returns:
        ``[N, out]`` or ``[A, N, T, out]``.
    """
    if base.dim() == 2:
        return F.linear(x, base, bias)
    rows = _by_group(x, len(base))
    z = torch.bmm(rows, base.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, base.mT)
    if x.dim() == 2:
        return z.flatten(0, 1)
    lead, members, each, _ = x.shape
    z = z.view(len(base), lead, members // len(base), each, base.shape[1])
    return z.transpose(0, 1).reshape(lead, members, each, base.shape[1])


def _by_group(x: Tensor, groups: int) -> Tensor:
    """The rows of each group: ``[K, A * N/K * T, in]``."""
    if x.dim() == 2:
        return x.reshape(groups, len(x) // groups, x.shape[1])
    lead, members, each, width = x.shape
    return x.reshape(lead, groups, members // groups, each, width).transpose(0, 1).reshape(groups, -1, width)


def _slope(g: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Gᵀ X over all rows: the gradient of a base, in its shape."""
    if like.dim() == 2:
        return torch.mm(g.flatten(0, -2).t(), x.flatten(0, -2))
    return torch.bmm(_by_group(g, len(like)).mT, _by_group(x, len(like)))


def _noise(x: Tensor, s: Tensor, base: Tensor, bias_base: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """(S ∘ X) ΔWᵀ + Δb; in ``dtype``, or in that of ``x`` where it is None or the product was divided by something."""
    if dtype is None:
        return base_product(_times(s, x), base, bias_base)
    signed, of_x = sign_lowered(s, x, dtype)
    low, of_base = lowered(base, dtype)
    if of_x is None and of_base is None:
        return base_product(signed, low, None if bias_base is None else bias_base.to(dtype))
    z = raised(base_product(signed, low), x.dtype, of_x, of_base)
    if bias_base is None:
        return z
    return z + (bias_base if bias_base.dim() == 1 else _of_members(bias_base, z))


def _of_members(values: Tensor, like: Tensor) -> Tensor:
    """Values of each group, ``[K, out]``, for the members of ``like``."""
    axis = _members_axis(like)
    spread = values.repeat_interleave(like.shape[axis] // len(values), 0)
    return spread if like.dim() == 2 else spread.unsqueeze(1)


def _plus(y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    """y + R ∘ z, into the memory of both where that is allowed."""
    if transformed():
        return y + (_signs(r, z) * z).to(y.dtype)
    if z.dtype != y.dtype and r.dtype == torch.uint8 and not z.requires_grad:
        return y.add_(flip_(z, r))
    if z.dtype != y.dtype:
        z = z.to(y.dtype)
    return y.addcmul_(z, _signs(r, z))


def _forward(
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s: Tensor,
    r: Tensor,
    bias: Tensor | None,
    bias_base: Tensor | None,
    repeat: int,
    dtype: torch.dtype | None,
) -> Tensor:
    if _one_input(x) and base.dim() == 2:
        return _forward_one(x, mean, base, s, r, bias, bias_base, repeat, dtype)
    return _plus(F.linear(x, mean, bias), _noise(x, s, base, bias_base, dtype), r)


def _forward_one(
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s: Tensor,
    r: Tensor,
    bias: Tensor | None,
    bias_base: Tensor | None,
    repeat: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """As :func:`_forward`, where all members see one input: both products are computed once for those that share them."""
    axis = _members_axis(x)
    groups = x.shape[axis] // repeat
    z = _noise(x.narrow(axis, 0, groups), s[::repeat], base, bias_base, dtype)
    numbers = unpack(r, z.shape[-1], x.dtype) if r.dtype == torch.uint8 else r
    numbers = (numbers if x.dim() == 2 else numbers.unsqueeze(1)).unflatten(0, (groups, repeat))
    y: Tensor = (z.unsqueeze(axis + 1) * numbers).flatten(axis, axis + 1)
    return y.add_(mean_product(x, mean, bias))


def mean_product(x: Tensor, mean: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W̄ᵀ + b, computed once where all members see one input: where their axis of ``x`` is an expanded one, of stride 0.

    Args:
        x: ``[N, in]`` or ``[A, N, T, in]``.

    Returns:
        ``[N, out]`` or ``[A, N, T, out]``; of size 1 on the members' axis where it was computed once.
    """
    return F.linear(x.narrow(_members_axis(x), 0, 1) if _one_input(x) else x, mean, bias)


def _members_axis(x: Tensor) -> int:
    return 0 if x.dim() == 2 else 1


def _one_input(x: Tensor) -> bool:
    axis = _members_axis(x)
    return not transformed() and x.stride(axis) == 0 and x.shape[axis] > 1


class _SignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        ctx.save_for_backward(*operands[:5])
        ctx.dtype = operands[8]
        return owned(_forward(*operands))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, base, s, r = ctx.saved_tensors
        needs_x, needs_mean, needs_base, _, _, needs_bias, needs_bias_base, *_ = ctx.needs_input_grad
        dtype: torch.dtype | None = ctx.dtype
        g = grad.flatten(0, -2)
        gx = gw = gd = gb = gc = None
        rg, of_grad = sign_lowered(r, grad, dtype) if needs_x or needs_base or needs_bias_base else (grad, None)
        signs = _signs(s, x) if dtype is None and (needs_x or needs_base) else s
        if needs_x:
            low, of_base = (base, None) if dtype is None else lowered(base, dtype)
            z = base_product(rg, low.mT)
            gx = torch.mm(g, mean).view(x.shape)
            if dtype is None:
                gx.addcmul_(z, signs)
            else:
                gx = _plus(gx, z if of_grad is None else raised(z, gx.dtype, of_grad, of_base), s)
        if needs_mean:
            gw = torch.mm(g.t(), x.flatten(0, -2))
        if needs_base:
            if dtype is None:
                fresh = s.dtype == torch.uint8 and x.dim() == 2 and not torch.is_grad_enabled()
                gd = _slope(rg, signs.mul_(x) if fresh else signs * x, base)
            else:
                signed, of_x = sign_lowered(s, x, dtype)
                gd = raised(_slope(rg, signed, base), base.dtype, of_grad, of_x)
        if needs_bias:
            gb = g.sum(0)
        if needs_bias_base:
            total = (
                rg.flatten(0, -2).sum(0, dtype=grad.dtype) if base.dim() == 2 else _by_group(rg, len(base)).sum(1, dtype=grad.dtype)
            )
            gc = raised(total, grad.dtype, of_grad)
        return gx, gw, gd, None, None, gb, gc, None, None


def factored_product(
    x: Tensor, base: Tensor, inputs: Tensor | None, outputs: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """v ∘ (B (u ∘ x)) for real factors: one rank of a low-rank draw, or a sign that has lost its bits.

    Args:
        x: ``[A, N, T, in]``.
        base: B ``[out, in]`` or ``[K, out, in]``, or 0-d for one scale at every entry, which needs no product of width ``out``.
        inputs: u ``[N, in]`` or None for ones.
        outputs: v ``[N, out]`` or None for ones; needed if ``base`` is 0-d.
        dtype: of the product with a matrix, or None for that of ``x``.
    """
    if inputs is not None:
        if not base.dim() and outputs is not None:  # B = b·1: v (u · x) b
            inner = torch.matmul(x, (inputs * base).unsqueeze(-1))
            return inner * outputs.unsqueeze(1)
        x = x * inputs.unsqueeze(1)
    if dtype is None:
        y = base_product(x, base)
    else:
        (low, of_x), (low_base, of_base) = lowered(x, dtype), lowered(base, dtype)
        y = raised(base_product(low, low_base), x.dtype, of_x, of_base)
    return y if outputs is None else y * outputs.unsqueeze(1)
