"""A draw: the perturbations of one forward pass, or of as many as it is held for."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flipout.errors import ArgumentError, DrawError, MemberError
from flipout.estimators import Estimator, Shared
from flipout.samples import Sample, Target
from flipout.select import Site
from flipout.weight import Layout, Origin, PerturbedWeight, Term

__all__ = ["Draw"]


class Draw:
    """What was drawn for every selected parameter of a module, for ``members`` members.

    Users get one from :meth:`flipout.Perturbed.hold` or :func:`flipout.perturbed`; they do not make it. Only unit draws and signs
    are kept, so the perturbation follows the mean weights and the learnable scales when an optimiser moves them.

    Attributes:
        members: N, the number of different weights (None per token).
        estimator: how the members share the draw.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
        >>> with net.hold(members=4) as draw:
        ...     y = net(torch.ones(4, 3))
        ...     own = draw.module(1)
        >>> torch.allclose(own(torch.ones(3)), y[1])
        True
    """

    #: The hooks of a module that is perturbed in place.
    calls: Any = None

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[Site],
        log_std: Mapping[str, Tensor],
        estimator: Estimator,
        members: int | None,
        generator: torch.Generator | None,
        fallback: str | None = None,
        samples: Sequence[Sample] | None = None,
    ) -> None:
        self.members = None if estimator.per_token else members
        self.estimator = estimator
        self._module = module
        self._sites = sites
        self._log_std = log_std
        self._generator = generator
        self._fallback = fallback
        self._samples: list[Sample] = self._sample() if samples is None else list(samples)
        self._fixed: dict[int, Tensor] = {}
        self._last: tuple[list[Any], list[Tensor]] | None = None

    def _targets(self) -> list[Target]:
        return [Target(site.name, site.mean, site.noise, site.axes, site.matrix) for site in self._sites]

    def _sample(self) -> list[Sample]:
        targets = self._targets()
        devices = {target.mean.device for target in targets}
        if len(devices) == 1:
            return self.estimator.sample(targets, self.members, self._generator)
        samples: dict[str, Sample] = {}
        for device in sorted(devices, key=str):
            here = [target for target in targets if target.mean.device == device]
            drawn = self.estimator.sample(here, self.members, self._generator)
            samples.update(zip((target.name for target in here), drawn, strict=True))
        return [samples[target.name] for target in targets]

    def _terms(self, i: int, mean: Tensor) -> tuple[Term, ...]:
        site, sample = self._sites[i], self._samples[i]
        base, source = self._fixed.get(i), None
        if base is None:
            base, source = site.noise.sourced(sample.unit, mean, self._log_std.get(site.name), scaled=sample.scaled)
            if not site.noise.relative and not site.noise.learnable and not torch.compiler.is_compiling():
                self._fixed[i] = base  # depends on nothing that moves
        if torch.compiler.is_compiling():  # which differentiates what the rules compose
            source = None
        return tuple([Term(base, factors, sample.per_member, source) for factors in sample.factors])

    def carriers(self, rows: int, dim: int) -> list[Tensor]:
        """One perturbed weight a selected parameter, for an input with ``rows`` rows on ``dim``.

        Where all rows see one weight (Shared, a single member) it is that weight, an ordinary tensor, and needs no rule.
        """
        if isinstance(self.estimator, Shared) or (self.members == 1 and self.estimator.has_members):
            return [_only(site.mean, self._terms(i, site.mean)) for i, site in enumerate(self._sites)]
        layout = Layout(self.members, rows, dim)
        generator = None if self.estimator.has_members else self._generator
        weights: list[Tensor] = []
        for i, site in enumerate(self._sites):
            mean = site.mean
            origin = Origin(site.name, self.estimator, self._fallback, generator, [])
            weights.append(PerturbedWeight(mean, self._terms(i, mean), layout, origin))
        return weights

    def slot_weights(self, rows: int, dim: int) -> list[Tensor]:
        """The carriers repeated for every slot of a tied parameter; those of the last call where nothing in them has moved."""
        if torch.compiler.is_compiling():  # nothing may outlive the graph that made it
            return [weight for site, weight in zip(self._sites, self.carriers(rows, dim), strict=True) for _ in site.slots]
        key: list[Any] = [rows, dim]
        for site in self._sites:  # carriers read the mean in place, but copied its metadata
            mean = site.mean
            key += (id(mean), mean.dtype, mean.device, mean.requires_grad)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        weights = self.carriers(rows, dim)
        slots = [weight for site, weight in zip(self._sites, weights, strict=True) for _ in site.slots]
        if len(self._fixed) == len(self._sites) and isinstance(weights[0], PerturbedWeight) and self.estimator.has_members:
            self._last = (key, slots)
        return slots

    def weights(self, n: int) -> dict[str, Tensor]:
        """Member ``n``'s dense weights by parameter name, differentiable in the means and scales.

        Args:
            n: member index, 0 to ``members - 1``.

        Raises:
            MemberError: if ``n`` lies outside the draw.
            DrawError: if the estimator gives members no weights (LocalReparameterization, signs per token).

        Example:
            >>> import torch, flipout
            >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
            >>> with net.hold(members=4) as draw:
            ...     sorted(draw.weights(0)), draw.weights(0)["weight"].shape
            (['bias', 'weight'], torch.Size([2, 3]))
        """
        n = self._index(n)
        found = {}
        for i, site in enumerate(self._sites):
            mean = site.mean
            terms = self._terms(i, mean)
            if not isinstance(self.estimator, Shared):
                terms = tuple(term.members(slice(n, n + 1)) for term in terms)
            found[site.name] = _only(mean, terms)
        return found

    def module(self, n: int) -> nn.Module:
        """A plain copy of the module with member ``n``'s weights: no trace of flipout is left in it.

        Raises:
            MemberError, DrawError: as :meth:`weights`.
        """
        hooks = contextlib.nullcontext() if self.calls is None else self.calls.lifted()
        with torch.no_grad():
            weights = self.weights(n)
            with hooks:  # they would be copied along
                plain = copy.deepcopy(self._module)
            parameters = dict(plain.named_parameters(remove_duplicate=False))
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        return plain

    def resample(self, members: Sequence[int]) -> None:
        """Draws the given members afresh; the others keep their weights, and members go on sharing what they share.

        Args:
            members: distinct member indices.

        Raises:
            MemberError: if an index lies outside the draw.
            UnsupportedNoiseError: under Shared, where members cannot differ.
        """
        wanted = [self._index(n) for n in members]
        if len(set(wanted)) != len(wanted):
            raise ArgumentError(f"resample({list(members)}): each member once")
        if wanted:
            self._samples = self.estimator.resample(self._targets(), self._samples, wanted, self._generator)
            self._fixed.clear()
            self._last = None

    def weighted_sum(self, f: Tensor) -> dict[str, Tensor]:
        """Σ_n f[n] ΔW_n by parameter name, without any member's weights in memory.

        For flipout this is ΔW ∘ (rᵀ diag(f) s): one product a parameter. Evolution strategies build their update from it.

        Args:
            f: ``[members]`` weights, for example shaped fitness.

        Returns:
            One tensor of the parameter's shape each.

        Raises:
            ArgumentError: if ``f`` has another shape.
            DrawError: as :meth:`weights`.
        """
        self._require_members()
        if not isinstance(f, Tensor) or f.shape != (self.members,):
            found = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ArgumentError(f"weighted_sum takes one weight for each of {self.members} members, got {found}")
        sums = {}
        for i, site in enumerate(self._sites):
            mean = site.mean
            weights = f.to(dtype=mean.dtype, device=mean.device)
            parts = [_weighted(term, weights, mean) for term in self._terms(i, mean)]
            sums[site.name] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return sums

    def _require_members(self) -> None:
        if not self.estimator.has_members:
            raise DrawError(f"under {self.estimator} members have no weights of their own; hold a draw of another estimator")

    def _index(self, n: Any) -> int:
        self._require_members()
        try:
            index = operator.index(n)
        except TypeError:
            raise MemberError(f"member index {n!r} is a {type(n).__name__}; expected an integer") from None
        if self.members is None or not 0 <= index < self.members:
            raise MemberError(f"member {index} is out of range: the draw has members 0 to {(self.members or 0) - 1}")
        return index

    def __repr__(self) -> str:
        return f"Draw(members={self.members}, estimator={self.estimator}, parameters={[s.name for s in self._sites]})"


def _only(mean: Tensor, terms: Sequence[Term]) -> Tensor:
    """The weight of a single member."""
    for term in terms:
        value = term.dense(mean.dim()) if term.per_member or term.factors else term.base.unsqueeze(0)
        mean = mean + value[0]
    return mean


def _weighted(term: Term, f: Tensor, mean: Tensor) -> Tensor:
    """Σ_n f[n] (B ∘ Π factors[n])."""
    if term.per_member:
        return torch.einsum("n,n...->...", f, term.base.expand(f.shape[0], *mean.shape))
    operands: list[Any] = [f, [0]]
    axes = sorted(axis for factor in term.factors for axis in factor.axes)
    for factor in term.factors:
        operands += [factor.flat(mean.dtype).view(-1, *factor.sizes), [0, *(1 + axis for axis in factor.axes)]]
    total = torch.einsum(*operands, [1 + axis for axis in axes])
    shape = [mean.shape[axis] if axis in axes else 1 for axis in range(mean.dim())]
    return (term.base * total.reshape(shape)).expand(mean.shape)
