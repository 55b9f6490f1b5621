"""What a measurement of the variance found, for one estimator at one batch size and for several estimators."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flipout.errors import ArgumentError
from flipout.intervals import Estimate, estimate_mean, ratio
from flipout.variance.variance_table import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GROUPINGS", "EstimatorVariance", "GradientVariance", "require_grouping"]

#: By what a result can be reported.
GROUPINGS = ("parameter", "module", "total")


@dataclass(frozen=True)
class EstimatorVariance:
    """The variance of the gradient under one estimator.

    Attributes:
        estimator: its name.
        batch_size: N.
        draws: how many gradients were drawn.
        blocks: for each parameter, and each part that was asked for, the unbiased variance within each block of draws, summed
            over the entries; intervals come from the spread between blocks.
        sizes: the number of entries of each.
        confidence: of the intervals.
        parts: names in ``blocks`` that are rows of a parameter, which the total leaves out.
        by: what :attr:`groups` groups by: ``"parameter"``, ``"module"`` or ``"total"``.

    Example:
        >>> found = EstimatorVariance("flipout", 8, draws=40, blocks={"weight": (1.0, 1.2)}, sizes={"weight": 3})
        >>> found.total.value
        1.1
    """

    estimator: str
    batch_size: int
    draws: int
    blocks: dict[str, tuple[float, ...]]
    sizes: dict[str, int]
    confidence: float = 0.9
    parts: tuple[str, ...] = ()
    by: str = "parameter"

    @property
    def total(self) -> Estimate:
        """The variance summed over all weights."""
        return self.of(name for name in self.blocks if name not in self.parts)

    @property
    def parameters(self) -> dict[str, Estimate]:
        """The variance summed over the entries of each parameter."""
        return {name: self.of([name]) for name in self.blocks if name not in self.parts}

    @property
    def groups(self) -> dict[str, Estimate]:
        """The variance of each group of :attr:`by`: a module's is that of its own parameters; parts follow."""
        return {name: self.of(names) for name, names in self.grouped(self.by).items()}

    def grouped(self, by: str) -> dict[str, list[str]]:
        """The names in each group.

        Raises:
            ArgumentError: for another grouping than ``"parameter"``, ``"module"`` and ``"total"``.
        """
        require_grouping(by)
        found: dict[str, list[str]] = {}
        for name in self.blocks:
            if name in self.parts:
                found[name] = [name]
                continue
            group = {"parameter": name, "module": name.rpartition(".")[0] or "(itself)", "total": "total"}[by]
            found.setdefault(group, []).append(name)
        return found

    def of(self, names: Iterable[str]) -> Estimate:
        """The variance summed over the entries of the named parameters or parts, for example those of a layer.

        Raises:
            ArgumentError: for a name that was not measured.
        """
        names = list(names)
        unknown = [name for name in names if name not in self.blocks]
        if unknown or not names:
            raise ArgumentError(f"no parameter {', '.join(map(repr, unknown))}: there are {', '.join(self.blocks)}")
        sums = [math.fsum(values) for values in zip(*(self.blocks[name] for name in names), strict=True)]
        found = estimate_mean(sums, self.confidence)
        return Estimate(found.value, max(found.low, 0.0), found.high, found.standard_error, found.degrees)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` gives the same back."""
        return {
            **asdict(self),
            "total": self.total.as_dict(),
            "parameters": {name: {**found.as_dict(), "entries": self.sizes[name]} for name, found in self.parameters.items()},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> EstimatorVariance:
        """What :meth:`as_dict` wrote."""
        blocks = {name: tuple(values) for name, values in found["blocks"].items()}
        plain = {key: found[key] for key in ("estimator", "batch_size", "draws", "sizes", "confidence", "by")}
        return cls(**plain, blocks=blocks, parts=tuple(found["parts"]))

    def rows(self, by: str | None = None) -> list[dict[str, Any]]:
        """One row a group, for a table."""
        return [
            {
                "estimator": self.estimator,
                "batch_size": self.batch_size,
                "group": group,
                "variance": float(estimate),
                "low": estimate.low,
                "high": estimate.high,
                "entries": sum(self.sizes[name] for name in names),
                "draws": self.draws,
            }
            for group, names in self.grouped(by or self.by).items()
            for estimate in [self.of(names)]
        ]


class GradientVariance(Mapping[str, EstimatorVariance]):
    """What :func:`flipout.variance.gradient_variance` found, by estimator.

    Example:
        >>> shared = EstimatorVariance("shared", 8, draws=40, blocks={"weight": (4.0, 4.8)}, sizes={"weight": 3})
        >>> flipout = EstimatorVariance("flipout", 8, draws=40, blocks={"weight": (1.0, 1.2)}, sizes={"weight": 3})
        >>> GradientVariance({"shared": shared, "flipout": flipout}).ratio("shared", "flipout").value
        4.0
    """

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

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> GradientVariance:
        """What :meth:`as_dict` wrote."""
        return cls({name: EstimatorVariance.from_dict(each) for name, each in found.items()})

    def to_pandas(self, by: str | None = None) -> Any:
        """A ``pandas.DataFrame`` with a row for each estimator and group.

        Raises:
            ArgumentError: if pandas is not installed.
        """
        return table(row for found in self.values() for row in found.rows(by))

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws the variance of each group with its interval; makes a figure of its own if given no axes.

        Raises:
            ArgumentError: if matplotlib is not installed.
        """
        from flipout.variance.curve_plot import plot_groups

        return plot_groups({name: each.groups for name, each in self.items()}, axes)

    def __repr__(self) -> str:
        return f"GradientVariance({', '.join(f'{name}={found.total}' for name, found in self.items())})"


def require_grouping(by: str) -> str:
    """The grouping, if it is one of :data:`GROUPINGS`; else raises ArgumentError."""
    if by not in GROUPINGS:
        raise ArgumentError(f"by={by!r}: choose {', '.join(map(repr, GROUPINGS))}")
    return by
