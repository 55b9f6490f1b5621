"""Convolutions and transposed convolutions of every rank: one rule.

    y_n = W̄ ⋆ x_n + b + r_n ∘ (ΔW ⋆ (s_n ∘ x_n))

with one sign per example and channel, broadcast over positions and kernel taps, so that what is added is a perturbation of the
kernel. With groups, the input signs of a kernel [out, in / groups, …] repeat from group to group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError, UnsupportedNoiseError
from flipout.estimators import Estimator, LocalReparameterization, LowRank
from flipout.modes import autocast, composed, owned
from flipout.registry import rule
from flipout.rules.per_row import per_row
from flipout.weight import Factor, PerturbedWeight, Term, require_data

__all__ = ["Geometry", "convolve"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything of a convolution but its operands."""

    rank: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        return torch.convolution(
            x,
            kernel,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups if groups is None else groups,
        )

    def backward(
        self, grad: Tensor, x: Tensor, kernel: Tensor, bias_size: list[int] | None, needs: list[bool]
    ) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            grad,
            x,
            kernel,
            bias_size,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            needs,
        )
        return grads


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)


def _padded(x: Tensor, padding: Any, kernel: Tensor, dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Resolves padding="valid" and "same"; an odd total is padded here, on the right as torch does."""
    rank = len(dilation)
    if padding == "valid":
        return x, (0,) * rank
    if padding != "same":
        return x, _tuple(padding, rank)
    total = [d * (k - 1) for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    extra = [p % 2 for p in total]
    if any(extra):
        x = F.pad(x, [side for e in reversed(extra) for side in (0, e)])
    return x, tuple(p // 2 for p in total)


def convolve(x: Tensor, weight: Any, bias: Any, geometry: Geometry, what: str) -> Tensor:
    """A convolution in which the kernel, the bias or both are perturbed. ``x`` is ``[rows, channels, *positions]``."""
    require_data(getattr(F, what), x)
    some = weight if isinstance(weight, PerturbedWeight) else bias
    if x.dim() == geometry.rank + 1:
        raise BatchError(
            f"{what} met {some.origin.name!r} with an unbatched input of shape {tuple(x.shape)}, but the draw has "
            f"{some.batch.members} members; add a batch dimension"
        )
    x, place = some.rows_in(x, x.dim() - 1, what)
    weight, bias = (p.at(place) if isinstance(p, PerturbedWeight) else p for p in (weight, bias))
    plain_bias = None if isinstance(bias, PerturbedWeight) else bias
    if isinstance(weight, PerturbedWeight):
        y = _perturbed_kernel(x, weight, plain_bias, geometry)
    else:
        y = geometry(*autocast(x, weight, plain_bias))
    if isinstance(bias, PerturbedWeight):
        y = y + per_row(bias, x.shape[0]).to(y.dtype).view(x.shape[0], bias.shape[0], *[1] * geometry.rank)
    return y


def _perturbed_kernel(x: Tensor, weight: PerturbedWeight, bias: Tensor | None, geometry: Geometry) -> Tensor:
    x, mean, bias = autocast(x, weight.mean_weight, bias)
    if not x.shape[0]:
        return geometry(x, mean, bias)
    separable = [_channels(term) for term in weight.terms]
    if len(separable) == 1 and separable[0] is not None:
        (base,) = autocast(weight.terms[0].base.expand(mean.shape))
        r, s = (_per_channel(f, x, geometry) for f in separable[0])
        if geometry.transposed:  # the kernel is [in, out / groups, …]
            r, s = s, r
        return _signed_convolution(x, mean, base, s, r, bias, geometry)
    if any(sides is None for sides in separable) and not (
        isinstance(weight.origin.estimator, LowRank) and geometry.groups == 1 and not geometry.transposed
    ):
        return _dense(x, weight, bias, geometry)
    y = geometry(x, mean, bias)
    for term, sides in zip(weight.terms, separable, strict=True):
        if sides is None or not term.base.dim():
            y = y + _low_rank(x, term, weight, geometry)
            continue
        r, s = (_per_channel(f, x, geometry) for f in (reversed(sides) if geometry.transposed else sides))
        z = geometry(x if s is None else x * s, autocast(term.base.expand(mean.shape))[0])
        y = y + (z if r is None else z * r)
    return y


def _channels(term: Term) -> tuple[Factor | None, Factor | None] | None:
    """The factors along kernel axes 0 and 1; None where the term has any other."""
    sides: list[Factor | None] = [None, None]
    if term.per_member:
        return None
    for factor in term.factors:
        if factor.axes not in ((0,), (1,)) or sides[factor.axes[0]] is not None:
            return None
        sides[factor.axes[0]] = factor
    return sides[0], sides[1]


def _per_channel(factor: Factor | None, x: Tensor, geometry: Geometry) -> Tensor | None:
    """``[rows, channels, 1, …]`` of a factor; axis 1 of a kernel is one group's channels, repeated over the groups."""
    if factor is None:
        return None
    values = factor.flat(x.dtype)
    if geometry.groups > 1 and factor.axes == (1,):
        values = values.repeat(1, geometry.groups)
    if values.shape[0] != x.shape[0]:
        values = values.repeat_interleave(x.shape[0] // values.shape[0], 0)
    return values.reshape(*values.shape, *[1] * geometry.rank)


def _signed_convolution(
    x: Tensor, mean: Tensor, base: Tensor, s: Tensor | None, r: Tensor | None, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    if composed(x, mean, base, bias):
        z = geometry(x if s is None else x * s, base)
        return geometry(x, mean, bias) + (z if r is None else z * r)
    y: Tensor = _SignedConvolution.apply(x, mean, base, s, r, bias, geometry)  # type: ignore[no-untyped-call]
    return y


class _SignedConvolution(torch.autograd.Function):
    """Two convolutions forward and four backward; the signed input is formed again for backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, base: Tensor, s: Any, r: Any, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, mean, base, s, r)
        ctx.geometry, ctx.bias_size = geometry, None if bias is None else list(bias.shape)
        y = geometry(x, mean, bias)
        z = geometry(x if s is None else x * s, base)
        return owned(y.add_(z) if r is None else y.addcmul_(z, r))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, base, s, r = ctx.saved_tensors
        needs_x, needs_mean, needs_base, _, _, needs_bias, _ = ctx.needs_input_grad
        gx = gw = gd = gb = None
        if needs_x or needs_mean or needs_bias:
            gx, gw, gb = ctx.geometry.backward(grad, x, mean, ctx.bias_size, [needs_x, needs_mean, needs_bias])
        if needs_x or needs_base:
            rg = grad if r is None else grad * r
            sx = x if s is None or not needs_base else x * s
            dx, gd, _ = ctx.geometry.backward(rg, sx, base, None, [needs_x, needs_base, False])
            if gx is not None and dx is not None:
                gx = gx + dx if s is None else torch.addcmul(gx, dx, s)
        return gx, gw, gd, None, None, gb, None


def _low_rank(x: Tensor, term: Term, weight: PerturbedWeight, geometry: Geometry) -> Tensor:
    """One rank of a low-rank kernel a_n b_nᵀ: each example's image meets its own b_n as a one-channel kernel, then a_n."""
    sides = {0 in f.axes: f for f in term.factors}
    if term.base.dim() or len(sides) != 2 or sides[True].axes != (0,):
        return _dense(x, weight.replace(torch.zeros_like(weight.mean_weight), [term]), None, geometry)
    a = sides[True].flat(x.dtype)
    kernels = sides[False].broadcast(weight.mean_weight.dim(), x.dtype) * term.base.to(x.dtype)  # [N, 1, in, *taps]
    kernels = kernels.expand(-1, 1, *weight.mean_weight.shape[1:])
    y = _grouped(x, kernels.flatten(0, 1), kernels.shape[0], geometry)
    return y * a.repeat_interleave(x.shape[0] // a.shape[0], 0).reshape(x.shape[0], -1, *[1] * geometry.rank)


def _grouped(x: Tensor, kernels: Tensor, members: int, geometry: Geometry) -> Tensor:
    """Each member's rows under its own kernel, as one convolution with a group (or ``groups``) a member."""
    each = x.shape[0] // members
    folded = x.unflatten(0, (members, each)).transpose(0, 1).flatten(1, 2)
    y = geometry(folded, kernels, groups=members * geometry.groups)
    rows: Tensor = y.unflatten(1, (members, -1)).transpose(0, 1).flatten(0, 1)
    return rows


def _dense(x: Tensor, weight: PerturbedWeight, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Every member's kernel in memory: exact for any perturbation."""
    kernels = autocast(weight.dense())[0]
    assert kernels is not None
    y = _grouped(x, kernels.flatten(0, 1), kernels.shape[0], geometry)
    return y if bias is None else y + bias.view(-1, *[1] * geometry.rank)


def _register() -> None:
    for rank, operation in enumerate((F.conv1d, F.conv2d, F.conv3d), 1):

        def forward(
            input: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
            groups: int = 1, _rank: int = rank,
        ) -> Tensor:  # fmt: skip
            dilation = _tuple(dilation, _rank)
            x, padding = _padded(input, padding, weight, dilation)
            geometry = Geometry(_rank, _tuple(stride, _rank), padding, dilation, False, (0,) * _rank, groups)
            return convolve(x, weight, bias, geometry, f"conv{_rank}d")

        _register_for_all(operation, forward)

    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    for rank, transpose in enumerate(transposed, 1):

        def backward(
            input: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
            groups: int = 1, dilation: Any = 1, _rank: int = rank,
        ) -> Tensor:  # fmt: skip
            sizes = (_tuple(value, _rank) for value in (stride, padding, dilation, output_padding))
            stride, padding, dilation, output_padding = sizes
            geometry = Geometry(_rank, stride, padding, dilation, True, output_padding, groups)
            return convolve(input, weight, bias, geometry, f"conv_transpose{_rank}d")

        _register_for_all(transpose, backward)


def _register_for_all(operation: Any, function: Any) -> None:
    rule(operation, Estimator)(function)

    def refuse(input: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(weight, PerturbedWeight):
            result: Tensor = function(input, weight, bias, *args, **kwargs)
            return result
        raise UnsupportedNoiseError(
            f"LocalReparameterization met the kernel {weight.origin.name!r}: a convolution uses one kernel at every position, "
            "and independent noise on the outputs would be biased there; use Flipout(), or exclude the kernel"
        )

    rule(operation, LocalReparameterization)(refuse)


_register()
