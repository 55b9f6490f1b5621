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
from flipout.signs import unpack

__all__ = ["factored_product", "mean_product", "signed_linear"]


def signed_linear(
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    bias_base: Tensor | None = None,
    repeat: int = 1,
) -> Tensor:
    """X W̄ᵀ + b + R ∘ ((S ∘ X) ΔWᵀ + Δb).

    Args:
        x: ``[N, in]``, or ``[A, N, T, in]`` where every row of the A and T axes sees its member's weights.
        mean: W̄ ``[out, in]``.
        base: ΔW ``[out, in]``.
        s: signs of the inputs, packed ``[N, ceil(in / 8)]`` or as numbers ``[N, in]``; kept for backward as they come.
        r: signs of the outputs, packed or as numbers ``[N, out]``.
        bias: mean bias ``[out]`` or None.
        bias_base: Δb ``[out]``, perturbed under the signs of the outputs, or None.
        repeat: how many consecutive members have the same ``s``; where they see one input as well, they share (S ∘ X) ΔWᵀ.

    Returns:
        ``[N, out]`` or ``[A, N, T, out]``.
    """
    operands = (x, mean, base, s, r, bias, bias_base, repeat)
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


def _forward(
    x: Tensor, mean: Tensor, base: Tensor, s: Tensor, r: Tensor, bias: Tensor | None, bias_base: Tensor | None, repeat: int
) -> Tensor:
    if _one_input(x):
        return _forward_one(x, mean, base, s, r, bias, bias_base, repeat)
    y = F.linear(x, mean, bias)
    z = F.linear(_times(s, x), base, bias_base)
    return y + _signs(r, z) * z if transformed() else y.addcmul_(z, _signs(r, z))


def _forward_one(
    x: Tensor, mean: Tensor, base: Tensor, s: Tensor, r: Tensor, bias: Tensor | None, bias_base: Tensor | None, repeat: int
) -> Tensor:
    """As :func:`_forward`, where all members see one input: both products are computed once for those that share them."""
    axis = _members_axis(x)
    groups = x.shape[axis] // repeat
    z = F.linear(_times(s[::repeat], x.narrow(axis, 0, groups)), base, bias_base)
    numbers = _signs(r, z).unflatten(0, (groups, repeat))
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
        return owned(_forward(*operands))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, base, s, r = ctx.saved_tensors
        needs_x, needs_mean, needs_base, _, _, needs_bias, needs_bias_base, _ = ctx.needs_input_grad
        g = grad.flatten(0, -2)
        gx = gw = gd = gb = gc = None
        rg = _times(r, grad).flatten(0, -2) if needs_x or needs_base or needs_bias_base else g
        signs = _signs(s, x) if needs_x or needs_base else s
        if needs_x:
            gx = torch.mm(g, mean).view(x.shape)
            gx.addcmul_(torch.mm(rg, base).view(x.shape), signs)
        if needs_mean:
            gw = torch.mm(g.t(), x.flatten(0, -2))
        if needs_base:
            fresh = s.dtype == torch.uint8 and x.dim() == 2 and not torch.is_grad_enabled()
            signed = signs.mul_(x) if fresh else signs * x
            gd = torch.mm(rg.t(), signed.flatten(0, -2))
        if needs_bias:
            gb = g.sum(0)
        if needs_bias_base:
            gc = rg.sum(0)
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
