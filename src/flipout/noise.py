"""Noise: the law of the perturbation ΔW of a weight with mean W̄.

Every noise factorises over the entries of a weight and has mean zero:

    ΔW = scale ∘ ε             additive
    ΔW = scale ∘ W̄ ∘ ε         relative to the mean

with ε a *unit* draw of W̄'s shape. A noise is a small immutable description. The unit draw is kept apart from the scale so
that a held draw can be applied again after W̄ or a learnable scale has moved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flipout.arguments import broadcasts
from flipout.errors import ArgumentError
from flipout.modes import composed, functional, transformed
from flipout.signs import draw_bits, unpack

__all__ = ["DropConnect", "Gaussian", "MultiplicativeGaussian", "Noise", "Rademacher", "Source"]


class Source(NamedTuple):
    """What a ΔW was made of, for a rule whose own backward goes through to it.

    Attributes:
        leaf: W̄ where ΔW = ε ∘ W̄ (relative noise), log σ where ΔW = ε ∘ exp(log σ) (learnable noise).
        unit: the scaled ε of relative noise; None for learnable noise, where ΔW is its own derivative.
    """

    leaf: Tensor
    unit: Tensor | None


@dataclass(frozen=True)
class Noise(ABC):
    """The law of ΔW. Subclasses give :meth:`unit`, the draw of ε, and :meth:`unit_log_prob`, its log-density.

    Attributes:
        relative: whether ΔW is a multiple of the mean weight.
        learnable: whether each entry's scale is a parameter, kept as ``log_std`` by :class:`flipout.Perturbed`.

    Example:
        >>> class Uniform(Noise):
        ...     def unit(self, shape, *, generator, dtype, device):
        ...         return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
        ...     def unit_log_prob(self, unit):
        ...         return torch.where(unit.abs() <= 1, -math.log(2.0), -math.inf)
        >>> Uniform(0.1).log_prob(torch.tensor([0.05, 0.2]), torch.zeros(2)).exp()
        tensor([5., 0.])
    """

    std: float | Tensor | Callable[[Tensor], Tensor] = 1.0
    relative: bool = False
    learnable: bool = False

    #: Whether ε has variance one, so that ``std`` is the standard deviation that a low-rank draw can match.
    standardized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_scale(type(self).__name__, self.std)

    @property
    def symmetric(self) -> bool:
        """Whether ΔW and -ΔW have one law, which is what allows flipout's signs."""
        return True

    @property
    def discrete(self) -> bool:
        """Whether the law has a mass instead of a density."""
        return False

    @abstractmethod
    def unit(
        self,
        shape: torch.Size,
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Draws ε with the given shape, without gradient."""

    @abstractmethod
    def unit_log_prob(self, unit: Tensor) -> Tensor:
        """Log-density (log-mass for a discrete law) of each entry of ε, in nats."""

    @property
    def fixed_scale(self) -> float | None:
        """The one number that scales ε, where it is not learnable, a tensor or a function: draws may carry it."""
        if not self.standardized or self.learnable or isinstance(self.std, Tensor) or callable(self.std):
            return None
        return float(self.std)

    @property
    def moves(self) -> bool:
        """Whether ΔW changes with the mean or a learnable scale, under one and the same ε."""
        return self.relative or self.learnable or callable(self.std)

    def perturbation(self, unit: Tensor, mean: Tensor, log_std: Tensor | None = None, *, scaled: bool = False) -> Tensor:
        """ΔW from a unit draw, differentiable in ``mean`` (relative noise) and ``log_std`` (learnable noise).

        Args:
            unit: ε, of the mean's shape, or with leading member dimensions, or 0-d for the scale itself.
            mean: W̄.
            log_std: logarithm of each entry's scale where the noise is learnable, else None.
            scaled: whether ``unit`` already carries :attr:`fixed_scale`.

        Returns:
            ΔW, of the broadcast shape of its factors.
        """
        return self.sourced(unit, mean, log_std, scaled=scaled)[0]

    def sourced(
        self, unit: Tensor, mean: Tensor, log_std: Tensor | None = None, *, scaled: bool = False
    ) -> tuple[Tensor, Source | None]:
        """:meth:`perturbation`, and what it was made of: None if of nothing that moves, or of more than one such thing."""
        if not scaled:
            unit = self._scaled(unit, mean, log_std)
        if not self.relative:
            return unit, None if log_std is None else Source(log_std, None)
        return unit * mean, None if unit.requires_grad else Source(mean, unit)

    def _scaled(self, unit: Tensor, mean: Tensor, log_std: Tensor | None) -> Tensor:
        if log_std is not None:
            return _scale_by_exp(unit, log_std)
        if isinstance(self.std, Tensor) or callable(self.std):
            scale = scale_of_mean(self.std, mean) if callable(self.std) else self.std.to(dtype=mean.dtype, device=mean.device)
            return unit * (scale.expand(mean.shape) if scale.numel() > 1 else scale)  # a unit may be one number (LowRank)
        return unit if self.std == 1.0 else unit * self.std

    def scale(self, mean: Tensor, log_std: Tensor | None = None) -> Tensor:
        """The magnitude of ΔW's scale at each entry, of the mean's shape: std, or ``std·|W̄|`` for relative noise."""
        one = torch.ones((), dtype=mean.dtype, device=mean.device)
        return self.perturbation(one, mean, log_std).abs().expand(mean.shape)

    def log_prob(self, perturbation: Tensor, mean: Tensor, log_std: Tensor | None = None) -> Tensor:
        """Log-density of each entry of ΔW, in nats (log-mass for a discrete law).

        Args:
            perturbation: ΔW, of the mean's shape.
            mean: W̄, which sets the scale of relative noise.
            log_std: as in :meth:`perturbation`.

        Example:
            >>> Gaussian(0.5).log_prob(torch.zeros(1), torch.ones(1)).exp()
            tensor([0.7979])
        """
        scale = self.scale(mean, log_std)
        if self.relative:  # a multiple of W̄ itself: keep its sign, which an asymmetric law needs
            scale = scale * torch.where(mean < 0, -1.0, 1.0).to(mean.dtype)
        density = self.unit_log_prob(perturbation / scale)
        return density if self.discrete else density - scale.abs().log()

    def initial_log_std(self, mean: Tensor) -> Tensor:
        """The starting value of a learnable scale: log std at every entry of ``mean``."""
        if callable(self.std):
            std = scale_of_mean(self.std, mean)
            if mean.device.type != "meta" and not bool((std > 0).all()):
                raise ArgumentError(
                    f"{type(self).__name__}(std=function, learnable=True): the function gives zero for some weights, and a scale "
                    "that is learnt is kept as its logarithm; add a floor"
                )
        else:
            std = self.std if isinstance(self.std, Tensor) else torch.tensor(self.std, dtype=torch.float64)
        return std.log().to(dtype=mean.dtype, device=mean.device).expand(mean.shape).clone()


@dataclass(frozen=True)
class Gaussian(Noise):
    """ΔW ~ N(0, std²), or N(0, std² W̄²) when relative.

    Args:
        std: standard deviation, in the units of the weight (additive) or as a fraction of it (relative); a positive
            float, a tensor that broadcasts to the weight, or a function of the mean weight W̄ that gives such a tensor, zero
            or more: noise that depends on the weight, as that of analog hardware does. The function is given W̄ without its
            graph, at each draw, so no gradient goes through the scale.
        relative: scale ΔW by the mean weight.
        learnable: make the standard deviation of each entry a parameter that starts at ``std``.

    Raises:
        ArgumentError: if ``std`` is not positive and finite; when a net is wrapped or called, if a function gives another shape, a
            negative number or a graph.

    Example:
        >>> Gaussian(0.1).symmetric
        True
        >>> largest = Gaussian(lambda W: 0.05 * W.abs().amax(1, keepdim=True))  # of each output's weights
        >>> largest.scale(torch.tensor([[1.0, -4.0], [2.0, 0.0]]))
        tensor([[0.2000, 0.2000],
                [0.1000, 0.1000]])
    """

    def unit(self, shape: torch.Size, *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        if functional():
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)
        # the stream of randn(), which torch.compile cannot give a generator where a size is not fixed
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    def unit_log_prob(self, unit: Tensor) -> Tensor:
        return -0.5 * (unit.square() + math.log(2 * math.pi))


@dataclass(frozen=True)
class Rademacher(Noise):
    """ΔW = ±std with equal probability, or ±std·W̄ when relative.

    Arguments and errors as for :class:`Gaussian`.

    Example:
        >>> noise = Rademacher(0.1)
        >>> g = torch.Generator().manual_seed(0)
        >>> unit = noise.unit(torch.Size([4]), generator=g, dtype=torch.float32, device=torch.device("cpu"))
        >>> noise.perturbation(unit, torch.zeros(4)).abs()
        tensor([0.1000, 0.1000, 0.1000, 0.1000])
    """

    @property
    def discrete(self) -> bool:
        return True

    def unit(self, shape: torch.Size, *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = shape.numel()
        (bits,) = draw_bits(1, [count], generator=generator, device=device)
        return unpack(bits, count, dtype).reshape(shape)

    def unit_log_prob(self, unit: Tensor) -> Tensor:
        on_support = torch.isclose(unit.abs(), torch.ones_like(unit))
        return torch.where(on_support, unit.new_full((), -math.log(2.0)), -math.inf)


@dataclass(frozen=True)
class MultiplicativeGaussian(Gaussian):
    """W = W̄ ∘ (1 + std·ε) with ε ~ N(0, 1): :class:`Gaussian` noise relative to the mean.

    Example:
        >>> MultiplicativeGaussian(0.5).scale(torch.tensor([1.0, -4.0]))
        tensor([0.5000, 2.0000])
    """

    relative: bool = True


@dataclass(frozen=True)
class DropConnect(Noise):
    """Drops each weight with probability ``p`` and scales the kept ones by 1/(1-p), so that the mean is W̄.

    ΔW is -W̄ with probability p and W̄·p/(1-p) otherwise. At p = 0.5 these are -W̄ and +W̄: the relative
    :class:`Rademacher` noise with std 1, the only symmetric case and so the only one that flipout takes.

    Args:
        p: probability of dropping a weight, 0 < p < 1.

    Raises:
        ArgumentError: if ``p`` lies outside (0, 1).

    Example:
        >>> DropConnect(0.5).symmetric, DropConnect(0.2).symmetric
        (True, False)
    """

    std: float | Tensor = 1.0
    relative: bool = True
    p: float = 0.5

    standardized: ClassVar[bool] = False

    def __init__(self, p: float = 0.5) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 < p < 1.0:
            raise ArgumentError(f"DropConnect(p={p!r}): p is a probability of dropping, 0 < p < 1")
        for name, value in {"std": 1.0, "relative": True, "learnable": False, "p": float(p)}.items():
            object.__setattr__(self, name, value)

    @property
    def symmetric(self) -> bool:
        return self.p == 0.5

    @property
    def discrete(self) -> bool:
        return True

    def unit(self, shape: torch.Size, *, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.symmetric:
            return Rademacher(1.0).unit(shape, generator=generator, dtype=dtype, device=device)
        kept = torch.rand(shape, generator=generator, device=device) >= self.p
        return kept.to(dtype).div_(1 - self.p).sub_(1)

    def unit_log_prob(self, unit: Tensor) -> Tensor:
        kept = torch.isclose(unit, torch.full_like(unit, self.p / (1 - self.p)))
        dropped = torch.isclose(unit, torch.full_like(unit, -1.0))
        log_dropped = torch.where(dropped, unit.new_full((), math.log(self.p)), -math.inf)
        return torch.where(kept, unit.new_full((), math.log1p(-self.p)), log_dropped)


def scale_of_mean(function: Callable[[Tensor], Tensor], mean: Tensor) -> Tensor:
    """What a function of the mean weight gives for its scale, checked.

    Raises:
        ArgumentError: if it is no tensor that broadcasts to the mean, is negative or not finite, or requires a gradient.
    """
    scale: Any = function(mean.detach())
    if not isinstance(scale, Tensor) or not broadcasts(scale.shape, mean.shape):
        found = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise ArgumentError(
            f"std=function gave {found} for a weight of shape {tuple(mean.shape)}; expected a tensor that broadcasts to it"
        )
    if scale.requires_grad:
        raise ArgumentError(
            "std=function gave a tensor with a graph, and the scale takes no gradient: detach the tensors that the function uses, "
            "or make the scale learnable"
        )
    if not transformed() and scale.device.type != "meta" and scale.numel():
        low, high = (float(each) for each in torch.aminmax(scale))
        if not (low >= 0 and math.isfinite(high)):
            raise ArgumentError(
                f"std=function gave numbers from {low:g} to {high:g} for a weight of shape {tuple(mean.shape)}; a standard "
                "deviation is finite and not negative"
            )
    return scale.to(dtype=mean.dtype, device=mean.device)


def _check_scale(kind: str, std: Any) -> None:
    if callable(std) and not isinstance(std, Tensor):
        return
    if isinstance(std, Tensor):
        good = bool(((std > 0) & std.isfinite()).all()) and std.is_floating_point()
    else:
        good = isinstance(std, (int, float)) and not isinstance(std, bool) and math.isfinite(std) and std > 0
    if not good:
        raise ArgumentError(
            f"{kind}(std={std!r}): a standard deviation is positive and finite; for no noise on a weight, exclude it"
        )


class _ScaleByExp(torch.autograd.Function):
    """ε ∘ exp(log σ), which is its own derivative in log σ: nothing but the result is kept for backward."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, log_std: Tensor) -> Tensor:
        scaled = log_std.exp().mul_(unit) if unit.dim() <= log_std.dim() else unit * log_std.exp()
        ctx.save_for_backward(scaled)
        ctx.shape = log_std.shape
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scaled,) = ctx.saved_tensors
        return None, (grad * scaled).sum_to_size(ctx.shape)


def _scale_by_exp(unit: Tensor, log_std: Tensor) -> Tensor:
    if composed(log_std):
        return unit * log_std.exp()
    scaled: Tensor = _ScaleByExp.apply(unit, log_std)  # type: ignore[no-untyped-call]
    return scaled
