"""How much a stochastic gradient varies, under any estimator, on any module.

The gradient of one step is random twice over: in its batch and in its noise. ``gradient_variance`` draws both afresh again and
again and reports the variance of every weight's gradient, summed over the weights. Theory: Wen et al. 2018, Sec. 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, Independent, LocalReparameterization, LowRank, Shared
from flipout.gradients import LossFunction, SampleBatch, gradient, require_count, rows_at_once
from flipout.moments import Estimate, Moments, estimate_mean, ratio
from flipout.perturb import Perturbed

__all__ = [
    "ESTIMATORS",
    "EstimatorVariance",
    "GradientVariance",
    "block_sizes",
    "gradient_variance",
    "named_estimators",
]

#: The estimators by the names that results, tables and the command line use.
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "shared": Shared,
    "flipout": Flipout,
    "independent": Independent,
    "local_reparameterization": LocalReparameterization,
    "low_rank": LowRank,
}


@dataclass(frozen=True)
class EstimatorVariance:
    """The variance of the gradient under one estimator.

    Attributes:
        estimator: its name.
        batch_size: N.
        draws: how many gradients were drawn.
        blocks: for each parameter, the unbiased variance within each block of draws, summed over the parameter's entries;
            intervals come from the spread between blocks.
        sizes: the number of entries of each parameter.
        confidence: of the intervals.
    """

    estimator: str
    batch_size: int
    draws: int
    blocks: dict[str, tuple[float, ...]]
    sizes: dict[str, int]
    confidence: float = 0.9

    @property
    def total(self) -> Estimate:
        """The variance summed over all weights."""
        return self.of(self.blocks)

    @property
    def parameters(self) -> dict[str, Estimate]:
        """The variance summed over the entries of each parameter."""
        return {name: self.of([name]) for name in self.blocks}

    def of(self, names: Iterable[str]) -> Estimate:
        """The variance summed over the entries of the named parameters, for example those of a layer."""
        sums = [math.fsum(values) for values in zip(*(self.blocks[name] for name in names), strict=True)]
        found = estimate_mean(sums, self.confidence)
        return Estimate(found.value, max(found.low, 0.0), found.high, found.standard_error, found.degrees)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "estimator": self.estimator,
            "batch_size": self.batch_size,
            "draws": self.draws,
            "confidence": self.confidence,
            "total": self.total.as_dict(),
            "parameters": {name: {**found.as_dict(), "entries": self.sizes[name]} for name, found in self.parameters.items()},
        }


class GradientVariance(Mapping[str, EstimatorVariance]):
    """What :func:`gradient_variance` found, by estimator."""

    def __init__(self, found: Mapping[str, EstimatorVariance]) -> None:
        self._found = dict(found)

    def __getitem__(self, estimator: str) -> EstimatorVariance:
        return self._found[estimator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def ratio(self, numerator: str, denominator: str) -> Estimate:
        """The total variance under one estimator relative to another's."""
        top, bottom = self[numerator], self[denominator]
        return ratio(top.total, bottom.total, top.confidence)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: found.as_dict() for name, found in self.items()}

    def __repr__(self) -> str:
        return f"GradientVariance({', '.join(f'{name}={found.total}' for name, found in self.items())})"


def gradient_variance(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int = 256,
    estimators: Iterable[str | Estimator] = ("shared", "flipout"),
    draws: int = 200,
    *,
    repeats: int | None = None,
    confidence: float = 0.9,
    micro_batch: int | None = None,
    seed: int = 0,
    on_draw: Callable[[], None] | None = None,
) -> GradientVariance:
    """The variance of the gradient of the mean weights over fresh batches and fresh noise, for each estimator.

        Σ_i Var(G_i),      G = (1/N) Σ_n ∇_W̄ L(x_n, W_n)

    The draws are cut into blocks; each block gives an unbiased variance by streaming moments, and their mean is reported with
    Student's t-interval. Costs ``draws`` forward and backward passes an estimator and the memory of two gradients beside the
    pass itself. The module's parameters, their ``.grad`` and its mode are left alone; it runs in the mode it is in.

    Args:
        net: the module with its noise. Frozen parameters are left out; scales of learnable noise are held fixed.
        loss_fn: ``loss_fn(net, batch)``, the *mean* loss of the batch's examples, a scalar.
        sample_batch: ``sample_batch(n, generator)``, a batch of ``n`` fresh examples; the generator is torch's on the CPU.
        batch_size: N.
        estimators: names among :data:`ESTIMATORS`, or estimators.
        draws: gradients an estimator, at least 2.
        repeats: into how many blocks the draws are cut, each of at least 2; None chooses. One block has no interval.
        confidence: of the intervals.
        micro_batch: most examples to run at once. A larger batch is run as equal micro-batches (of the largest divisor of N)
            that share one base perturbation, with independent signs: the same law as in one piece (the paper's appendix C).
            None runs the batch whole, except under Independent, whose dense weights it bounds.
        seed: of all batches and draws. Every draw has its own stream, and estimators meet the same batches.
        on_draw: called after each draw, for a progress bar.

    Returns:
        A mapping from the estimator's name to its :class:`EstimatorVariance`.

    Raises:
        ArgumentError: for a wrong argument, a loss that is no finite scalar, or a gradient that is not finite.
        UnsupportedNoiseError: for an estimator that cannot serve the noise.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 1), flipout.MultiplicativeGaussian(1.0))
        >>> def sample_batch(n, generator):
        ...     return torch.randn(n, 3, generator=generator)
        >>> def loss_fn(net, x):
        ...     return net(x).square().mean()
        >>> found = gradient_variance(net, loss_fn, sample_batch, batch_size=64, draws=40)
        >>> found["flipout"].total.value < found["shared"].total.value
        True
    """
    if not isinstance(net, Perturbed):
        raise ArgumentError(f"expected a flipout.Perturbed, got {type(net).__name__}; wrap the module with its noise first")
    require_count("batch_size", batch_size, 1)
    require_count("seed", seed, 0)
    sizes = block_sizes(draws, repeats)
    found = {}
    for name, estimator in named_estimators(estimators).items():
        blocks: list[dict[str, float]] = []
        index = iter(range(draws))
        with net.using(estimator):
            rows = rows_at_once(net, batch_size, micro_batch)
            for size in sizes:
                moments = Moments()
                for _ in range(size):
                    key = (batch_size, next(index))
                    moments.add(gradient(net, loss_fn, sample_batch, batch_size, rows, seed, key))
                    if on_draw is not None:
                        on_draw()
                blocks.append(_require_finite(moments.variance()))
        values = {parameter: tuple(block[parameter] for block in blocks) for parameter in blocks[0]}
        counts = {parameter: moments.mean[parameter].numel() for parameter in values}
        found[name] = EstimatorVariance(name, batch_size, draws, values, counts, confidence)
    return GradientVariance(found)


def named_estimators(estimators: Iterable[str | Estimator]) -> dict[str, Estimator]:
    """Estimators by name: a name stands for the estimator with its defaults, an estimator for itself.

    Raises:
        ArgumentError: for an unknown name, something that is no estimator, or one that appears twice.

    Example:
        >>> named_estimators(["shared", LowRank(4)])
        {'shared': Shared(), 'LowRank(rank=4)': LowRank(rank=4)}
    """
    if isinstance(estimators, (str, Estimator)):
        estimators = [estimators]
    found: dict[str, Estimator] = {}
    for each in estimators:
        if isinstance(each, str) and each in ESTIMATORS:
            name, estimator = each, ESTIMATORS[each]()
        elif isinstance(each, Estimator):
            name = next((name for name, default in ESTIMATORS.items() if default() == each), repr(each))
            estimator = each
        else:
            raise ArgumentError(f"unknown estimator {each!r}: choose among {', '.join(ESTIMATORS)}, or pass an estimator")
        if name in found:
            raise ArgumentError(f"estimator {name!r} is given twice")
        found[name] = estimator
    if not found:
        raise ArgumentError(f"no estimator given: choose among {', '.join(ESTIMATORS)}")
    return found


def block_sizes(draws: int, repeats: int | None) -> list[int]:
    """Blocks of nearly equal size. The default keeps the interval within a tenth of the narrowest that any choice gives."""
    require_count("draws", draws, 2)
    if repeats is None:
        repeats = max(1, min(20, max(draws // 4, min(draws // 2, 4))))
    if require_count("repeats", repeats, 1) > draws // 2:
        raise ArgumentError(f"draws={draws} do not give {repeats} blocks of at least 2 draws each; lower repeats")
    return [draws // repeats + (i < draws % repeats) for i in range(repeats)]


def _require_finite(variances: dict[str, float]) -> dict[str, float]:
    for name, value in variances.items():
        if not math.isfinite(value):
            raise ArgumentError(
                f"the gradient of {name!r} is not finite, so its variance does not exist; lower the noise, or check the loss "
                "and the batches for NaN"
            )
    return variances
