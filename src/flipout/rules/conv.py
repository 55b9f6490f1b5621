"""Convolutions and transposed convolutions of every rank: one rule.

    y_n = W̄ ⋆ x_n + b + r_n ∘ (ΔW ⋆ (s_n ∘ x_n))

with one sign per example and channel, broadcast over positions and kernel taps, so that what is added is a perturbation of the
kernel. With groups, the input signs of a kernel [out, in / groups, …] repeat from group to group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError, UnsupportedNoiseError
from flipout.estimators import Estimator, LocalReparameterization, LowRank
from flipout.modes import autocast, composed, owned, transformed
from flipout.precision import lowered, product_dtype, raised
from flipout.registry import rule
from flipout.rules.per_row import per_row
from flipout.signs import flip_by_
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

    def repeated(self, count: int) -> Geometry:
        """The same for ``count`` convolutions at once, side by side in the channels."""
        return replace(self, groups=count * self.groups)


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
        (base,) = autocast(_bases(weight.terms[0], mean))
        r, s = (_per_channel(f, x, geometry) for f in separable[0])
        if geometry.transposed:  # the kernel is [in, out / groups, …]
            r, s = s, r
        signs = all(f is None or f.packed or f.signs for f in separable[0])
        dtype = product_dtype(weight.origin.estimator, x) if signs else None
        return _signed_convolution(x, mean, base, s, r, bias, geometry, dtype)
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
        z = _on_bases(x if s is None else x * s, autocast(_bases(term, mean))[0], geometry)
        y = y + (z if r is None else z * r)
    return y


def _bases(term: Term, mean: Tensor) -> Tensor:
    """The base of a term, of the kernel's shape; ``[K, *kernel]`` where groups of members have their own."""
    return term.base.expand(-1, *mean.shape) if term.per_member else term.base.expand(mean.shape)


def _on_bases(x: Tensor, base: Tensor, geometry: Geometry) -> Tensor:
    """A convolution with a kernel, or with one for each group of rows: one convolution whose channels are those of all groups.

    A processor is faster with one convolution a group, whose images its cache holds.
    """
    if base.dim() == geometry.rank + 2:
        return geometry(x, base)
    count = len(base)
    if _in_turn(x):
        return torch.cat([geometry(rows, kernel) for rows, kernel in zip(x.chunk(count), base, strict=True)])
    return _unfolded(geometry.repeated(count)(_folded(x, count), base.flatten(0, 1)), count)


def _in_turn(x: Tensor) -> bool:
    return x.device.type == "cpu" and not transformed()


def _folded(x: Tensor, count: int) -> Tensor:
    """``[count * E, C, …]`` as ``[E, count * C, …]``."""
    images: Tensor = x.unflatten(0, (count, len(x) // count))
    return images.transpose(0, 1).flatten(1, 2)


def _unfolded(y: Tensor, count: int) -> Tensor:
    """The inverse of :func:`_folded`."""
    rows: Tensor = y.unflatten(1, (count, y.shape[1] // count)).transpose(0, 1).flatten(0, 1)
    return rows


def _channels(term: Term) -> list[Factor | None] | None:
    """The factors along kernel axes 0 and 1; None where the term has any other."""
    return term.by_axis(2) if term.blocks else None


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
    x: Tensor,
    mean: Tensor,
    base: Tensor,
    s: Tensor | None,
    r: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    dtype: torch.dtype | None,
) -> Tensor:
    if composed(x, mean, base, bias):
        z = _noise(x, s, r, base, geometry, dtype)
        return geometry(x, mean, bias) + z
    y: Tensor = _SignedConvolution.apply(x, mean, base, s, r, bias, geometry, dtype)  # type: ignore[no-untyped-call]
    return y


def _noise(x: Tensor, s: Tensor | None, r: Tensor | None, base: Tensor, geometry: Geometry, dtype: torch.dtype | None) -> Tensor:
    """r ∘ (ΔW ⋆ (s ∘ x)), with the product in ``dtype``."""
    signed, of_x = _lowered(x, s, dtype)
    low, of_base = _lowered(base, None, dtype)
    z = raised(_on_bases(signed, low, geometry), x.dtype, of_x, of_base)
    return z if r is None else z * r if _differentiated(z) else z.mul_(r)


def _lowered(x: Tensor, signs: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """An operand under its signs, in ``dtype`` if that is not None, and the number that it was divided by."""
    if dtype is None:
        return (x if signs is None else x * signs), None
    low, scale = lowered(x, dtype)
    if signs is None:
        return low, scale
    return (low * signs.to(dtype) if _differentiated(x) else flip_by_(low, signs)), scale


def _differentiated(x: Tensor) -> bool:
    return transformed() or (torch.is_grad_enabled() and x.requires_grad)


class _SignedConvolution(torch.autograd.Function):
    """Two convolutions forward and four backward; the signed input is formed again for backward, not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, base: Tensor, s: Any, r: Any, bias: Tensor | None, geometry: Geometry, dtype: Any
    ) -> Tensor:
        ctx.save_for_backward(x, mean, base, s, r)
        ctx.geometry, ctx.dtype, ctx.bias_size = geometry, dtype, None if bias is None else list(bias.shape)
        y = geometry(x, mean, bias)
        if dtype is not None:
            return owned(y.add_(_noise(x, s, r, base, geometry, dtype)))
        z = _on_bases(x if s is None else x * s, base, geometry)
        return owned(y.add_(z) if r is None else y.addcmul_(z, r))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, base, s, r = ctx.saved_tensors
        needs_x, needs_mean, needs_base, _, _, needs_bias, *_ = ctx.needs_input_grad
        gx = gw = gd = gb = None
        if needs_x or needs_mean or needs_bias:
            gx, gw, gb = ctx.geometry.backward(grad, x, mean, ctx.bias_size, [needs_x, needs_mean, needs_bias])
        if needs_x or needs_base:
            rg, of_grad = _lowered(grad, r, ctx.dtype)
            sx, of_x = _lowered(x, s if needs_base else None, ctx.dtype)
            low, of_base = _lowered(base, None, ctx.dtype)
            dx, gd = _backward_on_bases(rg, sx, low, ctx.geometry, [needs_x, needs_base, False])
            gd = None if gd is None else raised(gd, base.dtype, of_grad, of_x)
            if gx is not None and dx is not None:
                dx = raised(dx, gx.dtype, of_grad, of_base)
                gx = gx + dx if s is None else torch.addcmul(gx, dx, s)
        return gx, gw, gd, None, None, gb, None, None


def _backward_on_bases(
    grad: Tensor, x: Tensor, base: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`_on_bases` in its input and in its kernels."""
    if base.dim() == geometry.rank + 2:
        dx, gd, _ = geometry.backward(grad, x, base, None, needs)
        return dx, gd
    count = len(base)
    if _in_turn(x):
        groups = zip(grad.chunk(count), x.chunk(count), base, strict=True)
        images, kernels, _ = zip(*(geometry.backward(g, rows, kernel, None, needs) for g, rows, kernel in groups), strict=True)
        return torch.cat(images) if needs[0] else None, torch.stack(kernels) if needs[1] else None
    wide = geometry.repeated(count)
    dx, gd, _ = wide.backward(_folded(grad, count), _folded(x, count), base.flatten(0, 1), None, needs)
    return None if dx is None else _unfolded(dx, count), None if gd is None else gd.view(base.shape)


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
    return _unfolded(geometry(_folded(x, members), kernels, groups=members * geometry.groups), members)


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
