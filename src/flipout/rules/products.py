"""The pair of products behind a linear layer, with a backward written for it.

    Y = X W̄ᵀ + b + R ∘ ((S ∘ X) ΔWᵀ)          Wen et al. 2018, Eq. 4

Six products forward and backward against a plain layer's three; five where nothing needs the gradient of ΔW. Between forward and
backward only the operands and the packed sign bits are kept: signs are unpacked again, never stored as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flipout.modes import composed, transformed
from flipout.signs import unpack

__all__ = ["factored_product", "signed_linear"]


def signed_linear(
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s_bits: Tensor,
    r_bits: Tensor,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    bias_bits: Tensor | None = None,
) -> Tensor:
    """X W̄ᵀ + b + R ∘ ((S ∘ X) ΔWᵀ) + C ∘ Δb, with signs as bits.

    Args:
        x: ``[A, N, T, in]``: N members; every row of the A and T axes sees its member's weights.
        mean: W̄ ``[out, in]``.
        base: ΔW ``[out, in]``.
        s_bits: packed signs ``[N, ceil(in / 8)]``.
        r_bits: packed signs ``[N, ceil(out / 8)]``.
        bias: mean bias ``[out]`` or None.
        bias_base: Δb ``[out]`` or None.
        bias_bits: packed signs of the bias ``[N, ceil(out / 8)]`` or None.

    Returns:
        ``[A, N, T, out]``.
    """
    operands = (x, mean, base, s_bits, r_bits, bias, bias_base, bias_bits)
    if composed(x, mean, base, bias, bias_base):
        return _forward(*operands)
    result: Tensor = _SignedLinear.apply(*operands)  # type: ignore[no-untyped-call]
    return result


def _signs(bits: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``[N, 1, size]``, which broadcasts to the rows of a member."""
    return unpack(bits, size, dtype).unsqueeze(1)


def _forward(
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s_bits: Tensor,
    r_bits: Tensor,
    bias: Tensor | None,
    bias_base: Tensor | None,
    bias_bits: Tensor | None,
) -> Tensor:
    out, width = mean.shape
    rows = (*x.shape[:-1], out)
    r = _signs(r_bits, out, x.dtype)
    flat = x.reshape(-1, width)
    signed = _times(_signs(s_bits, width, x.dtype), x)
    y = torch.mm(signed.reshape(-1, width), base.t()).view(rows)
    if transformed():
        y = y * r if bias is None else torch.addcmul(bias, y, r)
        if bias_base is not None and bias_bits is not None:
            y = y + _signs(bias_bits, out, x.dtype) * bias_base
        return y + torch.mm(flat, mean.t()).view(rows)
    y.mul_(r)
    if bias is not None:
        y.add_(bias)
    if bias_base is not None and bias_bits is not None:
        y.addcmul_(_signs(bias_bits, out, x.dtype), bias_base)
    y.view(-1, out).addmm_(flat, mean.t())
    return y


def _times(signs: Tensor, x: Tensor) -> Tensor:
    """signs ∘ x, into the memory of the signs where the shapes allow."""
    if not transformed() and x.shape[0] == 1 and x.shape[2] == 1 and signs.is_contiguous():
        return signs.unsqueeze(0).mul_(x)
    return signs * x


class _SignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        ctx.save_for_backward(*operands)
        return _forward(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, base, s_bits, r_bits, bias, bias_base, bias_bits = ctx.saved_tensors
        needs_x, needs_mean, needs_base, _, _, needs_bias, needs_bias_base, _ = ctx.needs_input_grad
        out, width = mean.shape
        grad = grad.contiguous()
        g = grad.view(-1, out)
        gx = gw = gd = gb = gc = None
        if needs_x or needs_base:
            rg = _times(_signs(r_bits, out, grad.dtype), grad).reshape(-1, out)
        if needs_x:
            gx = torch.mm(rg, base).view(x.shape).mul_(_signs(s_bits, width, x.dtype))
            gx.view(-1, width).addmm_(g, mean)
        if needs_mean:
            gw = torch.mm(g.t(), x.reshape(-1, width))
        if needs_base:
            sx = _times(_signs(s_bits, width, x.dtype), x).reshape(-1, width)
            gd = torch.mm(rg.t(), sx)
        if needs_bias:
            gb = g.sum(0)
        if needs_bias_base:
            gc = _times(_signs(bias_bits, out, grad.dtype), grad).reshape(-1, out).sum(0)
        return gx, gw, gd, None, None, gb, gc, None


def factored_product(x: Tensor, base: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    """v ∘ (B (u ∘ x)) for real factors: one rank of a low-rank draw, or a sign that has lost its bits.

    Args:
        x: ``[A, N, T, in]``.
        base: B ``[out, in]``, or 0-d for one scale at every entry, which needs no product of width ``out``.
        inputs: u ``[N, in]`` or None for ones.
        outputs: v ``[N, out]`` or None for ones; needed if ``base`` is 0-d.
    """
    if inputs is not None:
        if not base.dim() and outputs is not None:  # B = b·1: v (u · x) b
            inner = torch.matmul(x, (inputs * base).unsqueeze(-1))
            return inner * outputs.unsqueeze(1)
        x = x * inputs.unsqueeze(1)
    y = torch.matmul(x, base.t())
    return y if outputs is None else y * outputs.unsqueeze(1)
