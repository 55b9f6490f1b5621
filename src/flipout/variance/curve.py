"""The variance of a gradient over batch sizes: the law 1/N, its slope, and the plateau at which it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flipout.arguments import require_count
from flipout.errors import ArgumentError
from flipout.estimators import Estimator
from flipout.gradients import LossFunction, SampleBatch, rows_at_once
from flipout.intervals import Estimate, combine, log_log_slope, ratio
from flipout.perturb import Perturbed
from flipout.storage.blocks import BlockFile
from flipout.variance.identity import describe_net
from flipout.variance.measure import Parts, block_sizes, check_net, check_parts, measured, point
from flipout.variance.named import named_estimators
from flipout.variance.results import EstimatorVariance
from flipout.variance.sampling import check_loss
from flipout.variance.variance_table import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["VarianceCurve", "variance_curve"]

Draws = int | Mapping[str, int | Sequence[int]]


@dataclass(frozen=True)
class VarianceCurve:
    """The variance of the gradient over batch sizes, under several estimators.

    Everywhere, ``names`` are the parameters or parts to sum over, for example those of a layer; None is all.

    Attributes:
        points: for each estimator, what was found at each batch size.
        confidence: of the intervals.

    Example:
        >>> one = EstimatorVariance("flipout", 1, draws=40, blocks={"weight": (8.0, 8.4)}, sizes={"weight": 3})
        >>> eight = EstimatorVariance("flipout", 8, draws=40, blocks={"weight": (1.0, 1.05)}, sizes={"weight": 3})
        >>> round(VarianceCurve({"flipout": (one, eight)}).slope("flipout").value, 2)
        -1.0
    """

    points: dict[str, tuple[EstimatorVariance, ...]]
    confidence: float = 0.9

    def batch_sizes(self, estimator: str) -> tuple[int, ...]:
        """The batch sizes at which the estimator was measured."""
        return tuple(each.batch_size for each in self._curve(estimator))

    def values(self, estimator: str, names: Iterable[str] | None = None) -> list[Estimate]:
        """The variance at each batch size."""
        names = None if names is None else list(names)
        return [each.total if names is None else each.of(names) for each in self._curve(estimator)]

    def at(self, estimator: str, batch_size: int, names: Iterable[str] | None = None) -> Estimate:
        """The variance at one batch size.

        Raises:
            ArgumentError: if it was not measured there.
        """
        sizes = self.batch_sizes(estimator)
        if batch_size not in sizes:
            raise ArgumentError(f"{estimator!r} was not measured at N = {batch_size}, but at {', '.join(map(str, sizes))}")
        return self.values(estimator, names)[sizes.index(batch_size)]

    def slope(self, estimator: str, names: Iterable[str] | None = None) -> Estimate:
        """Of the variance against N on log-log axes, by least squares: -1 is the law 1/N."""
        return log_log_slope(self.batch_sizes(estimator), self.values(estimator, names), self.confidence)

    def plateau(self, estimator: str, names: Iterable[str] | None = None) -> Estimate:
        """The variance that no batch gets below: b of V(N) = a/N + (1 - 1/N) b, fitted by weighted least squares.

        Weights are the inverse squares of the fitted values, times the draws, three times over. Under Theorem 2 b is β + γ for
        shared noise and γ for flipout (Eq. 11, 12). An interval with 0 in it says that no plateau was seen.

        Raises:
            ArgumentError: for fewer than two batch sizes.
        """
        sizes, values = self.batch_sizes(estimator), self.values(estimator, names)
        if len(set(sizes)) < 2:
            raise ArgumentError(f"a plateau needs two different batch sizes, got {list(sizes)}")
        x = 1 / np.asarray(sizes, dtype=np.float64)
        design, y = np.stack([x, 1 - x], 1), np.asarray(values, dtype=np.float64)
        draws = np.asarray([each.draws for each in self._curve(estimator)], dtype=np.float64)
        solver = _least_squares(design, draws / np.square(y))
        for _ in range(2):
            a, b = solver @ y
            fitted = np.maximum(design @ [a, b], max(a, b) * x * 1e-3)
            solver = _least_squares(design, draws / np.square(fitted))
        return combine(solver[1].tolist(), values, self.confidence)

    def ratio(self, numerator: str, denominator: str, batch_size: int, names: Iterable[str] | None = None) -> Estimate:
        """The variance under one estimator relative to another's."""
        names = None if names is None else list(names)
        top, bottom = (self.at(each, batch_size, names) for each in (numerator, denominator))
        return ratio(top, bottom, self.confidence)

    def joined(self, other: VarianceCurve) -> VarianceCurve:
        """This curve with another's estimators beside its own."""
        return VarianceCurve({**self.points, **other.points}, self.confidence)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` gives the same back."""
        points = {name: [each.as_dict() for each in curve] for name, curve in self.points.items()}
        return {"confidence": self.confidence, "points": points}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> VarianceCurve:
        """What :meth:`as_dict` wrote."""
        points = {name: tuple(map(EstimatorVariance.from_dict, curve)) for name, curve in found["points"].items()}
        return cls(points, found["confidence"])

    def to_pandas(self, by: str = "parameter") -> Any:
        """A ``pandas.DataFrame`` with a row for each estimator, batch size and group.

        Raises:
            ArgumentError: if pandas is not installed, or for an unknown grouping.
        """
        return table(row for curve in self.points.values() for each in curve for row in each.rows(by))

    def plot(self, names: Iterable[str] | None = None, axes: Axes | None = None) -> Axes:
        """Draws the curves with their intervals on log-log axes; makes a figure of its own if given none.

        Raises:
            ArgumentError: if matplotlib is not installed.
        """
        from flipout.variance.curve_plot import plot_curves

        chosen = None if names is None else list(names)
        return plot_curves({name: (self.batch_sizes(name), self.values(name, chosen)) for name in self.points}, axes)

    def _curve(self, estimator: str) -> tuple[EstimatorVariance, ...]:
        if estimator not in self.points:
            raise ArgumentError(f"estimator {estimator!r} was not measured: there are {', '.join(self.points)}")
        return self.points[estimator]


def _least_squares(design: Any, weight: Any) -> Any:
    """The matrix that takes values to the coefficients of their weighted fit."""
    return np.linalg.solve(design.T @ (weight[:, None] * design), design.T * weight)


def variance_curve(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_sizes: Sequence[int],
    estimators: Iterable[str | Estimator] = ("shared", "flipout"),
    draws: Draws = 200,
    *,
    repeats: int | None = None,
    parts: Parts | None = None,
    confidence: float = 0.9,
    micro_batch: int | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    on_draw: Callable[[], None] | None = None,
    of: str = "mean",
) -> VarianceCurve:
    """The variance of the gradient at several batch sizes: at each what :func:`flipout.variance.gradient_variance` gives.

    Args:
        net, loss_fn, sample_batch, estimators, repeats, parts, confidence, micro_batch, seed, of: as there.
        batch_sizes: N, each once.
        draws: gradients at each point; or by the estimator's name, one number or one for each batch size.
        checkpoint: a file for the finished blocks of draws. If it is there the measurement goes on from it, with the same result
            as if it had never stopped.
        on_draw: called after each draw, also for draws that the checkpoint has.

    Raises:
        ArgumentError: as there; if the checkpoint is of another measurement.
        SaveError: if the checkpoint cannot be written; the version before it is kept.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 1), flipout.MultiplicativeGaussian(1.0))
        >>> def sample_batch(n, generator):
        ...     return torch.randn(n, 3, generator=generator)
        >>> def loss_fn(net, x):
        ...     return net(x).square().mean()
        >>> curve = variance_curve(net, loss_fn, sample_batch, batch_sizes=(1, 8, 64), draws=100)
        >>> abs(curve.slope("flipout") + 1) < abs(curve.slope("shared") + 1)
        True
    """
    check_net(net, seed, confidence)
    sizes = _checked_sizes(batch_sizes)
    parts = check_parts(net, parts, of)
    named = named_estimators(estimators)
    counts = {name: _counts(draws, name, len(sizes)) for name in named}
    if isinstance(draws, Mapping) and set(draws) - set(named):
        raise ArgumentError(f"draws for {', '.join(sorted(set(draws) - set(named)))}, which is not among the estimators")
    for each in counts.values():
        for count in each:
            block_sizes(count, repeats)
    check_loss(net, loss_fn, sample_batch, seed)
    question = {
        "what": "variance_curve",
        "batch_sizes": sizes,
        "estimators": {name: repr(estimator) for name, estimator in named.items()},
        "draws": counts,
        "repeats": repeats,
        "parts": {name: [parameter, str(rows)] for name, (parameter, rows) in parts.items()},
        "micro_batch": micro_batch,
        "seed": seed,
        **({} if of == "mean" else {"of": of}),
        **describe_net(net),
    }
    saved = BlockFile(None if checkpoint is None else Path(checkpoint), question)
    points: dict[str, tuple[EstimatorVariance, ...]] = {}
    for name, estimator in named.items():
        found = []
        with net.using(estimator):
            for size, count in zip(sizes, counts[name], strict=True):
                key, blocks_of = f"{name}/{size}", block_sizes(count, repeats)
                done = len(saved.of(key))
                for _ in range(sum(blocks_of[:done]) if on_draw is not None else 0):
                    on_draw()  # type: ignore[misc]
                rows = rows_at_once(net, size, micro_batch)
                for block in measured(net, loss_fn, sample_batch, size, rows, blocks_of, seed, parts, on_draw, done, of):
                    saved.add(key, block)
                found.append(point(net, name, size, count, saved.of(key), parts, confidence, "parameter"))
        points[name] = tuple(found)
    return VarianceCurve(points, confidence)


def _checked_sizes(batch_sizes: Sequence[int]) -> list[int]:
    sizes = [require_count("batch_sizes", size, 1) for size in batch_sizes]
    if not sizes or len(set(sizes)) != len(sizes):
        raise ArgumentError(f"batch_sizes={list(batch_sizes)}: expected at least one size, each once")
    return sizes


def _counts(draws: Draws, name: str, points: int) -> list[int]:
    """How many gradients to draw at each batch size."""
    if isinstance(draws, Mapping) and name not in draws:
        raise ArgumentError(f"draws has no entry for {name!r}; give one number for all, or one for each estimator")
    own = draws[name] if isinstance(draws, Mapping) else draws
    counts = [own] * points if isinstance(own, int) else list(own)
    if len(counts) != points:
        raise ArgumentError(f"draws for {name!r}: {len(counts)} numbers for {points} batch sizes")
    return [require_count("draws", count, 2) for count in counts]
