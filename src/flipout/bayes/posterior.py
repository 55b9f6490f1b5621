"""The posterior of each random weight, and posteriors that start from a trained net."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, Normal

from flipout.arguments import is_count
from flipout.bayes.curvature import DiagonalHessian
from flipout.distributions import FromDistribution
from flipout.errors import ArgumentError
from flipout.noise import Gaussian, Noise
from flipout.perturb import Perturbed
from flipout.select import Site, select
from flipout.sharded import whole

__all__ = ["Posterior", "from_pretrained", "posteriors", "require_net"]


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """The law of one random parameter, W = W̄ + ΔW.

    Attributes:
        names: of the parameter; more than one where it is tied, the first being the one it is known by.
        noise: the law of ΔW.
        mean: W̄.
        log_std: logarithm of each entry's scale where the noise is learnable, else None.
    """

    names: tuple[str, ...]
    noise: Noise
    mean: Tensor
    log_std: Tensor | None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def scale(self) -> Tensor:
        """The magnitude of ΔW's scale at each entry."""
        return self.noise.scale(self.mean, self.log_std)

    def law(self) -> Distribution | None:
        """The posterior as a law of torch's, differentiable in the mean and the scale, or None where torch has none for it."""
        if isinstance(self.noise, Gaussian):
            return Normal(self.mean, self.scale, validate_args=False)
        if isinstance(self.noise, FromDistribution) and type(self.noise.dist) in (Normal, Laplace):
            base: Any = self.noise.dist
            width = base.scale.to(dtype=self.mean.dtype, device=self.mean.device)
            law: Distribution = type(base)(self.mean, self.scale * width, validate_args=False)
            return law
        return None

    def sample(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A weight drawn by reparameterisation, and its log-density under the posterior, entry by entry."""
        unit = self.noise.unit(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        perturbation = self.noise.perturbation(unit, self.mean, self.log_std)
        return self.mean + perturbation, self.noise.log_prob(perturbation, self.mean, self.log_std)


def posteriors(net: Perturbed) -> Iterator[Posterior]:
    """Each random parameter of a net, tied ones once, as the means and scales stand now; sharded ones (FSDP2) gathered.

    Raises:
        ArgumentError: if ``net`` is no :class:`flipout.Perturbed`.
    """
    scales = require_net(net).scales
    for site in net.sites:
        scale = scales.get(site.name)
        yield Posterior(site.names, site.noise, whole(site.mean), None if scale is None else whole(scale))


def require_net(net: Any) -> Perturbed:
    """The net, if it has random weights; else raises ArgumentError."""
    if not isinstance(net, Perturbed):
        raise ArgumentError(
            f"expected a flipout.Perturbed, whose weights have a law, not a {type(net).__name__}: wrap the module first, for "
            "example with flipout.Perturbed(module, flipout.Gaussian(0.05, learnable=True))"
        )
    return net


def from_pretrained(
    module: nn.Module,
    relative_std: float = 0.1,
    floor: float = 1e-3,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    *,
    curvature: Mapping[str, Tensor] | None = None,
    dataset_size: int | None = None,
    prior_precision: float = 1.0,
    **options: Any,
) -> Perturbed:
    """A mean-field Gaussian posterior around a trained net, with learnable scales.

        σ_ij = max(relative_std · |W_ij|, floor)                              without curvature
        σ_ij = 1 / √(dataset_size · max(h_ij, 0) + prior_precision)           with it (Laplace's approximation)

    The module is wrapped, not copied: its weights go on as the means. The floor keeps the scale of small and zero weights away
    from zero, where the KL to any prior would be infinite.

    Args:
        module: with the weights of a point estimate.
        relative_std: the starting scale as a fraction of each weight's magnitude.
        floor: the least starting scale, in the units of the weights.
        include, exclude: which parameters become random, as in :class:`flipout.Perturbed`.
        curvature: h, the diagonal of the Hessian of the mean loss by parameter name, from
            :func:`flipout.bayes.diagonal_hessian`, whose negative entries count as zero: such a weight gets the prior's scale. In
            any other mapping a negative entry is refused. ``relative_std`` and ``floor`` then have no part.
        dataset_size: number of training examples, for ``curvature``.
        prior_precision: of the prior N(0, 1/prior_precision), for ``curvature``; positive.
        options: its other arguments: ``estimator``, ``batch_dim``, ``generator``, ``fallback``.

    Raises:
        ArgumentError: if ``relative_std``, ``floor`` or ``prior_precision`` is not positive and finite, a weight is not finite, the
            curvature lacks a parameter, has another shape or is negative, or as ``Perturbed``.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[3.0, 0.0]]))
        >>> net = from_pretrained(layer, relative_std=0.1, floor=0.01)
        >>> next(net.noise_parameters()).exp()
        tensor([[0.3000, 0.0100]], grad_fn=<ExpBackward0>)
    """
    for name, value in {"relative_std": relative_std, "floor": floor, "prior_precision": prior_precision}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            raise ArgumentError(f"from_pretrained({name}={value!r}): expected a positive number; at scale zero the KL is infinite")
    sites = select(module, Gaussian(1.0), include, exclude)
    scales = {site.name: _scale_of(site, relative_std, floor) for site in sites}
    if curvature is not None or dataset_size is not None:
        scales = {site.name: _laplace_scale(site, curvature, dataset_size, prior_precision) for site in sites}
    noise: dict[str, Noise] = {name: Gaussian(scale, learnable=True) for name, scale in scales.items()}
    return Perturbed(module, noise, include=include, exclude=exclude, **options)


def _scale_of(site: Site, relative_std: float, floor: float) -> Tensor:
    mean = whole(site.mean.detach())
    if not bool(mean.isfinite().all()):
        raise ArgumentError(f"parameter {site.name!r} is not finite, so the net is not trained: mend it, or exclude it")
    return (relative_std * mean.abs()).clamp_min(floor)


def _laplace_scale(site: Site, curvature: Mapping[str, Tensor] | None, dataset_size: int | None, prior_precision: float) -> Tensor:
    if curvature is None or not is_count(dataset_size):
        raise ArgumentError(
            f"from_pretrained(dataset_size={dataset_size!r}): curvature is that of the mean loss, so it takes the number of "
            "training examples with it: give both, curvature= and dataset_size="
        )
    h = next((curvature[name] for name in site.names if name in curvature), None)
    if h is None:
        raise ArgumentError(
            f"from_pretrained: the curvature has {', '.join(map(repr, list(curvature)[:3]))}, not {site.name!r}; measure it, or "
            "exclude the parameter"
        )
    mean = whole(site.mean.detach())
    if not isinstance(h, Tensor) or h.shape != mean.shape or not bool(h.isfinite().all()):
        told = f"the shape {tuple(h.shape)}, or entries that are not finite" if isinstance(h, Tensor) else type(h).__name__
        raise ArgumentError(f"the curvature of {site.name!r} has {told}; expected finite numbers of shape {tuple(mean.shape)}")
    if not isinstance(curvature, DiagonalHessian) and bool((h < 0).any()):
        raise ArgumentError(
            f"the curvature of {site.name!r} has {int((h < 0).sum())} negative entries, of which no variance can be made; raise "
            "them to zero or more (DiagonalHessian.positive does), or take another approximation of the Hessian"
        )
    precision = h.to(mean).clamp_min(0.0) * dataset_size + prior_precision
    return precision.rsqrt()
