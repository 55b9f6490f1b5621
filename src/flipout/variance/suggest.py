"""Where larger batches stop paying, and how many bases make them pay again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flipout.arguments import require_count
from flipout.errors import ArgumentError
from flipout.gradients import LossFunction, SampleBatch
from flipout.intervals import Estimate
from flipout.perturb import Perturbed
from flipout.variance.components import VarianceComponents, variance_components

__all__ = ["BasesSuggestion", "BatchSuggestion", "suggest_bases", "suggest_batch_size"]


@dataclass(frozen=True)
class BatchSuggestion:
    """The largest batches that still pay.

    Attributes:
        shared, flipout: the batch size at which a batch is worth ``efficiency`` times its examples; infinite where no limit was
            seen.
        efficiency: as asked for.
        components: what the sizes were computed from.

    Example:
        >>> blocks = {"w": ((100.0, 4.0, 0.1), (102.0, 5.0, 0.1))}
        >>> components = VarianceComponents(blocks, {"w": 3}, batch_size=64, draws=40)
        >>> found = suggest_batch_size(components=components)
        >>> found.flipout > found.shared
        True
    """

    shared: Estimate
    flipout: Estimate
    efficiency: float
    components: VarianceComponents

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "shared": self.shared.as_dict(),
            "flipout": self.flipout.as_dict(),
            "efficiency": self.efficiency,
            "components": self.components.as_dict(),
        }

    def __str__(self) -> str:
        worth = f"worth {100 * self.efficiency:.0f} % of its examples"
        return f"a batch is {worth} at N = {_size(self.shared)} with shared noise, at N = {_size(self.flipout)} with flipout"


def suggest_batch_size(
    net: Perturbed | None = None,
    loss_fn: LossFunction | None = None,
    sample_batch: SampleBatch | None = None,
    *,
    components: VarianceComponents | None = None,
    efficiency: float = 0.5,
    **options: Any,
) -> BatchSuggestion:
    """The batch sizes up to which more examples pay, with shared noise and with flipout.

    With V(N) = α/N + (1 - 1/N) c of Theorem 2 (c = β + γ for shared noise, γ for flipout) a batch of N is worth α/V(N) examples
    with independent noise. That is the fraction e of N at

        N = 1 + (α/c) (1 - e)/e,

    beyond which each further example is worth less than e², and at most α/c examples' worth can be had at all.

    Args:
        net, loss_fn, sample_batch, options: for :func:`variance_components`, unless ``components`` are given.
        components: already measured.
        efficiency: e, between 0 and 1.

    Returns:
        Both sizes; the intervals are those of c, since α is known far better. Where c is not above zero the size is infinite.

    Raises:
        ArgumentError: if neither a net nor components are given, or ``efficiency`` is not inside (0, 1).

    Example:
        >>> blocks = {"w": ((100.0, 4.0, 0.1), (102.0, 5.0, 0.1))}
        >>> found = suggest_batch_size(components=VarianceComponents(blocks, {"w": 3}, batch_size=64, draws=40))
        >>> round(found.shared), round(found.flipout)
        (23, 1011)
    """
    if not 0 < efficiency < 1:
        raise ArgumentError(f"efficiency={efficiency!r}: expected a fraction between 0 and 1")
    components = _measured("suggest_batch_size", net, loss_fn, sample_batch, components, options)
    found = components.of()
    factor = found["alpha"].value * (1 - efficiency) / efficiency
    flat = components.predict("shared", 2**62), components.predict("flipout", 2**62)  # β + γ and γ, with their own intervals
    shared, flipout = (_limit(factor, c) for c in flat)
    return BatchSuggestion(shared, flipout, efficiency, components)


@dataclass(frozen=True)
class BasesSuggestion:
    """How many base perturbations a batch needs.

    Attributes:
        bases: K for ``Flipout(bases=K)``: the smallest divisor of the batch size that is enough.
        needed: the real number that K must reach; its interval is that of γ.
        batch_size, efficiency: as asked for.
        components: what it was computed from.

    Example:
        >>> blocks = {"w": ((100.0, 4.0, 0.1), (102.0, 5.0, 0.1))}
        >>> components = VarianceComponents(blocks, {"w": 3}, batch_size=64, draws=40)
        >>> print(suggest_bases(8192, components=components))
        bases=256: at N = 8192 a batch is worth 95 % of its examples from 151.3 [151.3, 151.3] bases on
    """

    bases: int
    needed: Estimate
    batch_size: int
    efficiency: float
    components: VarianceComponents

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bases": self.bases,
            "needed": self.needed.as_dict(),
            "batch_size": self.batch_size,
            "efficiency": self.efficiency,
            "components": self.components.as_dict(),
        }

    def __str__(self) -> str:
        needed = self.needed
        return (
            f"bases={self.bases}: at N = {self.batch_size} a batch is worth {100 * self.efficiency:.0f} % of its examples from "
            f"{needed.value:,.1f} [{needed.low:,.1f}, {needed.high:,.1f}] bases on"
        )


def suggest_bases(
    batch_size: int,
    net: Perturbed | None = None,
    loss_fn: LossFunction | None = None,
    sample_batch: SampleBatch | None = None,
    *,
    components: VarianceComponents | None = None,
    efficiency: float = 0.95,
    **options: Any,
) -> BasesSuggestion:
    """The bases with which a batch under flipout is worth as good as all its examples.

    With K bases, V(N) = α/N + (1/K - 1/N) γ, and a batch of N is worth the fraction e of N examples with independent noise from

        K = N / (1 + (α/γ) (1 - e)/e)

    on: one base where γ is not above zero, and never more than N.

    Args:
        batch_size: N.
        net, loss_fn, sample_batch, options: for :func:`variance_components`, unless ``components`` are given; the net under
            ``Flipout()``.
        components: already measured.
        efficiency: e, between 0 and 1.

    Returns:
        The smallest K that divides the batch size and reaches what is needed.

    Raises:
        ArgumentError: if neither a net nor components are given, ``efficiency`` is not inside (0, 1), or ``batch_size`` is no
            positive integer.

    Example:
        >>> blocks = {"w": ((100.0, 4.0, 0.1), (102.0, 5.0, 0.1))}
        >>> components = VarianceComponents(blocks, {"w": 3}, batch_size=64, draws=40)
        >>> suggest_bases(64, components=components).bases
        2
        >>> ratio = components.predict("flipout", 8192, bases=256).value / components.predict("independent", 8192).value
        >>> round(ratio, 3)
        1.031
    """
    n = require_count("batch_size", batch_size, 1)
    if not 0 < efficiency < 1:
        raise ArgumentError(f"efficiency={efficiency!r}: expected a fraction between 0 and 1")
    components = _measured("suggest_bases", net, loss_fn, sample_batch, components, options)
    factor, gamma = components.of()["alpha"].value * (1 - efficiency) / efficiency, components.of()["gamma"]

    def count(value: float) -> float:
        return max(1.0, n / (1 + factor / value)) if value > 0 else 1.0

    error = n * factor / (gamma.value + factor) ** 2 * gamma.standard_error if gamma.value > 0 else 0.0
    needed = Estimate(count(gamma.value), count(gamma.low), count(gamma.high), error, gamma.degrees)
    bases = next(k for k in range(math.ceil(needed.value - 1e-9), n + 1) if n % k == 0)
    return BasesSuggestion(bases, needed, n, efficiency, components)


def _measured(what: str, net: Any, loss_fn: Any, sample_batch: Any, components: Any, options: Any) -> VarianceComponents:
    if components is None:
        if net is None or loss_fn is None or sample_batch is None:
            raise ArgumentError(f"{what} needs net, loss_fn and sample_batch, or components that were measured before")
        components = variance_components(net, loss_fn, sample_batch, **options)
    return components  # type: ignore[no-any-return]


def _limit(factor: float, c: Estimate) -> Estimate:
    def size(value: float) -> float:
        return 1 + factor / value if value > 0 else math.inf

    value = size(c.value)
    error = factor / c.value**2 * c.standard_error if c.value > 0 else math.inf
    return Estimate(value, size(c.high), size(c.low), error, c.degrees)


def _size(estimate: Estimate) -> str:
    def text(value: float) -> str:
        return f"{value:,.0f}" if math.isfinite(value) else "any size"

    return f"{text(estimate.value)} [{text(estimate.low)}, {text(estimate.high)}]"
