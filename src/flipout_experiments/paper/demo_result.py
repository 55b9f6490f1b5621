"""What the demonstration runs, and every number that it finds."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flipout.intervals import Estimate, log_log_slope, ratio
from flipout.variance import EstimatorVariance

__all__ = ["DemoResult", "DemoSettings", "TrainingRun"]


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration runs. The defaults take about a minute and a half on two cores.

    The noise is the paper's for variance: multiplicative Gaussian with σ = 1, on the weight matrices. Biases have none, as in
    the paper's equations; the gradient whose variance is measured is that of all parameters.

    Attributes:
        batch_sizes: N, each a multiple of the one before.
        shared_draws, flipout_draws: gradients at each N.
        independent_pairs: pairs of draws at the largest N under independent noise, where each draw takes N dense weights.
        accuracy: training accuracy at which the plain net is frozen.
        training_steps, training_batch, learning_rate: of the noisy training runs, by plain gradient descent.
    """

    seed: int = 0
    device: str = "cpu"
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    shared_draws: int = 80
    flipout_draws: int = 50
    independent_pairs: int = 2
    accuracy: float = 0.87
    std: float = 1.0
    training_steps: int = 30
    training_batch: int = 32
    learning_rate: float = 0.1
    confidence: float = 0.9

    def quick(self) -> DemoSettings:
        """The same in seconds: fewer draws, smaller batches, wide intervals."""
        return replace(
            self, batch_sizes=(1, 4, 16, 64), shared_draws=24, flipout_draws=16, training_steps=5, training_batch=16, accuracy=0.8
        )


@dataclass(frozen=True)
class TrainingRun:
    """One training run with noise, from the frozen net on.

    Attributes:
        losses: the noisy training loss before each step, in nats.
        accuracy: test accuracy of the mean weights after the last step.
        seconds: wall time of the run.
    """

    losses: list[float]
    accuracy: float
    seconds: float

    @property
    def mean_loss(self) -> float:
        """Over the whole run, in nats."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation of the loss from step to step, in nats."""
        return statistics.stdev(self.losses)


@dataclass
class DemoResult:
    """Every number of the demonstration."""

    settings: DemoSettings
    environment: dict[str, Any]
    source: str
    pretraining: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[EstimatorVariance]] = field(default_factory=dict)
    training: dict[str, TrainingRun] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def slope(self, estimator: str) -> Estimate:
        """Of the total variance against N, on log-log axes."""
        curve = self.curves[estimator]
        return log_log_slope(self.settings.batch_sizes, [point.total for point in curve], self.settings.confidence)

    def ratio(self, numerator: str, denominator: str, index: int) -> Estimate:
        """The total variance under one estimator relative to another's, at the batch size of the given index."""
        top, bottom = (self.curves[name][index].total for name in (numerator, denominator))
        return ratio(top, bottom, self.settings.confidence)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sizes = self.settings.batch_sizes
        return {
            "experiment": "demo",
            "settings": asdict(self.settings),
            "environment": self.environment,
            "data": self.source,
            "pretraining": self.pretraining,
            "variance": {name: [point.as_dict() for point in curve] for name, curve in self.curves.items()},
            "slopes": {name: self.slope(name).as_dict() for name in self.curves},
            "ratios_to_independent": {
                name: {str(size): self.ratio(name, "independent", i).as_dict() for i, size in enumerate(sizes)}
                for name in ("shared", "flipout")
            },
            "training": {name: asdict(run) for name, run in self.training.items()},
            "seconds": self.seconds,
        }
