"""A population: how its members divide into pairs, bases and chunks, and what they are perturbed by in a generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flipout.arguments import require_count
from flipout.draw import Draw
from flipout.errors import ArgumentError, UnsupportedNoiseError
from flipout.estimators import Estimator, Flipout, Independent, LowRank
from flipout.evolution.counters import Counters
from flipout.evolution.members import Members
from flipout.evolution.noise import Directions, Law
from flipout.noise import Gaussian, Rademacher
from flipout.perturb import Perturbed
from flipout.samples import Target

__all__ = ["Population", "perturbed_net", "require_members"]

#: Members evaluated at once where no chunk is given, and entries of dense members' weights.
_CHUNK, _DENSE = 4096, 2**24
#: Directions whose sum is formed at once in an update. Fixed, so that an update does not depend on how members were evaluated.
_SUMMED = 1024


@dataclass(frozen=True)
class Population:
    """The members of every generation of a strategy. Has no state: a generation and its σ are arguments.

    Attributes:
        net: the module, and which of its parameters are perturbed.
        base: ``"rademacher"`` or ``"gaussian"``.
        size: N.
        per_base: members that share a base perturbation, at most N.
        antithetic: whether members 2p and 2p + 1 are a pair.
        counters: where all noise comes from.
    """

    net: Perturbed
    base: str
    size: int
    per_base: int
    antithetic: bool
    counters: Counters

    @property
    def each(self) -> int:
        """Members to a direction."""
        return 2 if self.antithetic else 1

    @property
    def estimator(self) -> Estimator:
        """How members share a draw."""
        return self.net.estimator

    def at_once(self, most: int = _CHUNK) -> int:
        """Members to hold at once, whole pairs: ``most``, or what dense members leave room for."""
        if isinstance(self.estimator, Independent):
            entries = sum(site.mean.numel() for site in self.net.sites)
            most = min(most, _DENSE // entries)
        return max(most // self.each, 1) * self.each

    def chunks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        """Parts of a range, none larger than ``size`` or across a base."""
        while start < stop:
            last = min(start + size, (start // self.per_base + 1) * self.per_base, stop)
            yield start, last
            start = last

    def members(self, start: int, stop: int, generation: int, std: float) -> Members:
        """Members ``start`` to ``stop - 1`` of a generation.

        Raises:
            ArgumentError: for a range that is none, cuts a pair, or spans several bases.
        """
        if not 0 <= start < stop <= self.size or start % self.each or stop % self.each:
            pairs = ", in whole antithetic pairs (even bounds)" if self.antithetic else ""
            raise ArgumentError(f"members {start} to {stop}: expected 0 <= start < stop <= {self.size}{pairs}")
        if start // self.per_base != (stop - 1) // self.per_base:
            raise ArgumentError(
                f"members {start} to {stop - 1} span several base perturbations of {self.per_base} members each, which cannot "
                "share a forward pass; ask for each base's members in turn, or call step(evaluate), which does"
            )
        directions = self._directions(start, stop, generation, std, self.antithetic)
        return Members(self.net, directions, directions.samples(self._targets()))

    @torch.no_grad()
    def weighted_sum(self, weights: Tensor, scale: float, generation: int, std: float) -> dict[str, Tensor]:
        """scale · Σ_n weights[n] ΔW_n by parameter name, in blocks that do not depend on the chunks of the evaluation.

        Args:
            weights: ``[size]``.
            scale: of the sum.
            generation, std: whose perturbations.
        """
        totals = {
            site.name: torch.zeros(site.mean.shape, dtype=site.mean.dtype, device=site.mean.device) for site in self.net.sites
        }
        device = next(iter(totals.values())).device
        signed = weights.view(-1, 2)[:, 0] - weights.view(-1, 2)[:, 1] if self.antithetic else weights
        signed, targets, each = (signed * scale).to(device), self._targets(), self.each
        for start, stop in self.chunks(0, self.size, self.at_once(each * _SUMMED)):
            directions = self._directions(start, stop, generation, std, paired=False)
            first, last = directions.start, directions.stop
            draw = Draw(self.net.module, self.net.sites, {}, self.estimator, last - first, None, None, directions.samples(targets))
            for name, part in draw.weighted_sum(signed[first:last]).items():
                totals[name] += part
        return totals

    def _directions(self, start: int, stop: int, generation: int, std: float, paired: bool) -> Directions:
        law, each = Law(self.estimator, self.base, std), self.each
        return Directions(law, self.counters, generation, start // self.per_base, start // each, stop // each, paired)

    def _targets(self) -> list[Target]:
        return [Target(site.name, site.mean, site.noise, site.axes, site.matrix) for site in self.net.sites]


def perturbed_net(
    module: nn.Module,
    base: str,
    estimator: Estimator,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    batch_dim: int,
    fallback: str | None,
) -> Perturbed:
    """The module with unit noise of a base law on its trained parameters.

    Raises:
        ArgumentError: for another law.
        UnsupportedNoiseError: for an estimator that has no members.
    """
    laws = {"rademacher": Rademacher(1.0), "gaussian": Gaussian(1.0)}
    if base not in laws:
        raise ArgumentError(f'base={base!r}: choose "rademacher" or "gaussian"')
    if not isinstance(estimator, (Flipout, LowRank, Independent)) or not estimator.has_members:
        raise UnsupportedNoiseError(
            f"estimator={estimator!r}: members of a population need weights of their own; choose Flipout(), LowRank(rank) or "
            "Independent()"
        )
    if isinstance(estimator, Flipout) and estimator.bases > 1:
        raise ArgumentError(f"{estimator}: the bases of a population are counted by its members; pass members_per_base=N/K")
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad] if isinstance(module, nn.Module) else []
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    return Perturbed(module, laws[base], estimator, include, [*exclude, *frozen], batch_dim, fallback=fallback)


def require_members(name: str, value: Any, least: int, each: int) -> int:
    """The value, if it is a number of members of at least ``least``, in whole directions of ``each``.

    Raises:
        ArgumentError: if it is not.
    """
    if require_count(name, value, least) % each:
        raise ArgumentError(f"{name}={value}: antithetic pairs need an even number; add one, or pass antithetic=False")
    return int(value)
