"""Estimates with confidence intervals, and intervals of what is computed from several estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from flipout.errors import ArgumentError

__all__ = ["Estimate", "combine", "estimate_mean", "log_log_slope", "ratio", "t_quantile"]


class Estimate(float):
    """A number with its confidence interval; a float wherever a float is wanted.

    Attributes:
        value: the estimate, as a plain float.
        low, high: the interval; infinitely wide where there is nothing to judge the spread by.
        standard_error: of ``value``.
        degrees: degrees of freedom of the standard error.

    Example:
        >>> estimate = Estimate(1.0, 0.9, 1.1, 0.05, 9)
        >>> print(estimate, estimate / 2)
        1 [0.9, 1.1] 0.5
    """

    low: float
    high: float
    standard_error: float
    degrees: float

    def __new__(cls, value: float, low: float, high: float, standard_error: float, degrees: float) -> Estimate:
        self = super().__new__(cls, value)
        self.low, self.high, self.standard_error, self.degrees = low, high, standard_error, degrees
        return self

    @property
    def value(self) -> float:
        """The estimate, as a plain float."""
        return float(self)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def __repr__(self) -> str:
        return f"Estimate({', '.join(f'{name}={value!r}' for name, value in self._fields().items())})"

    def __getnewargs__(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(self._fields().values())

    def _fields(self) -> dict[str, float]:
        return {"value": self.value, **{name: getattr(self, name) for name in ("low", "high", "standard_error", "degrees")}}

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: an unknown bound is None."""
        return {name: value if math.isfinite(value) else None for name, value in self._fields().items()}

    def __contains__(self, value: float) -> bool:
        """Whether a number lies in the interval."""
        return self.low <= value <= self.high


def estimate_mean(samples: Sequence[float], confidence: float = 0.9) -> Estimate:
    """The mean of independent numbers with Student's t-interval.

    Raises:
        ArgumentError: for no numbers, or a confidence that is no probability inside (0, 1).

    Example:
        >>> print(estimate_mean([1.0, 2.0, 3.0]))
        2 [0.314, 3.69]
    """
    count = len(samples)
    if not count or not 0 < confidence < 1:
        raise ArgumentError(f"a mean of {count} numbers, confidence={confidence}: expected 1 or more, and 0 < confidence < 1")
    value = math.fsum(samples) / count
    error = math.sqrt(math.fsum((s - value) ** 2 for s in samples) / (count - 1) / count) if count > 1 else math.inf
    return _interval(value, error, count - 1, confidence)


def ratio(numerator: Estimate, denominator: Estimate, confidence: float = 0.9) -> Estimate:
    """The ratio of two independent positive estimates; its interval is symmetric in the logarithm.

    Example:
        >>> a, b = Estimate(4.0, 3.6, 4.4, 0.2, 30), Estimate(2.0, 1.9, 2.1, 0.05, 30)
        >>> print(ratio(a, b))
        2 [1.82, 2.2]
    """
    log = _log_combination([1.0, -1.0], [numerator, denominator], confidence)
    value = _exp(log.value)
    return Estimate(value, _exp(log.low), _exp(log.high), value * log.standard_error, log.degrees)


def log_log_slope(sizes: Sequence[float], estimates: Sequence[Estimate], confidence: float = 0.9) -> Estimate:
    """The least-squares slope of log(estimate) against log(size), for independent estimates.

    The error of each point is carried through to the slope, so a curve that is not straight does not widen the interval.

    Raises:
        ArgumentError: for fewer than two distinct sizes.

    Example:
        >>> points = [Estimate(1 / n, 0.9 / n, 1.1 / n, 0.05 / n, 9) for n in (1, 10, 100)]
        >>> print(log_log_slope([1, 10, 100], points))
        -1 [-1.03, -0.973]
    """
    if len(set(sizes)) < 2 or min(sizes) <= 0:
        raise ArgumentError(f"a slope needs two different sizes, both positive, got {list(sizes)}")
    x = np.log(np.asarray(sizes, dtype=np.float64))
    x = x - x.mean()
    return _log_combination((x / np.square(x).sum()).tolist(), estimates, confidence)


def combine(factors: Sequence[float], estimates: Sequence[Estimate], confidence: float = 0.9) -> Estimate:
    """Σ_i c_i e_i of independent estimates, with Welch and Satterthwaite's degrees of freedom.

    Example:
        >>> a, b = Estimate(4.0, 3.6, 4.4, 0.3, 30), Estimate(2.0, 1.9, 2.1, 0.4, 30)
        >>> combine([1.0, -1.0], [a, b]).standard_error
        0.5
    """
    value = math.fsum(factor * estimate.value for factor, estimate in zip(factors, estimates, strict=True))
    parts = [(abs(f) * e.standard_error, e.degrees) for f, e in zip(factors, estimates, strict=True)]
    return _welch(value, parts, confidence)


def _log_combination(factors: Sequence[float], estimates: Sequence[Estimate], confidence: float) -> Estimate:
    """Σ_i c_i log e_i by the delta method, with Welch and Satterthwaite's degrees of freedom."""
    value, parts = 0.0, []
    for factor, estimate in zip(factors, estimates, strict=True):
        if estimate.value <= 0:
            raise ArgumentError(f"the logarithm of {estimate.value} does not exist: the estimate must be positive")
        value += factor * math.log(estimate.value)
        parts.append((abs(factor) * estimate.standard_error / estimate.value, estimate.degrees))
    return _welch(value, parts, confidence)


def _welch(value: float, parts: Sequence[tuple[float, float]], confidence: float) -> Estimate:
    """A sum of independent numbers from their errors and degrees of freedom."""
    error = math.hypot(*(part for part, _ in parts))
    if not math.isfinite(error) or error == 0:
        return _interval(value, error, 0 if error else 1, confidence)
    # shares of the squared error, which unlike the squares themselves neither overflow nor vanish
    degrees = 1 / math.fsum((part / error) ** 4 / max(each, 1e-9) for part, each in parts)
    return _interval(value, error, degrees, confidence)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _interval(value: float, error: float, degrees: float, confidence: float) -> Estimate:
    half = t_quantile(confidence, degrees) * error if degrees >= 1 - 1e-9 and math.isfinite(error) else math.inf
    return Estimate(value, value - half, value + half, error, degrees)


@cache
def t_quantile(confidence: float, degrees: float) -> float:
    """How many standard errors a two-sided Student interval of the given confidence reaches.

    With t = √ν tan θ the density in θ is proportional to cos^(ν-1) θ, which is integrated on a grid.

    Raises:
        ArgumentError: if ``confidence`` is no probability inside (0, 1), or for less than one degree of freedom, which two
            numbers have.

    Example:
        >>> round(t_quantile(0.9, 49), 4)
        1.6766
    """
    if not 0 < confidence < 1 or not degrees >= 1 - 1e-9:
        raise ArgumentError(f"confidence={confidence}, degrees={degrees}: expected 0 < confidence < 1 and degrees >= 1")
    # u = θ^(1/2) crowds the grid towards 0, where the mass is for many degrees of freedom
    theta = np.linspace(0.0, 1.0, 20_001) ** 2 * (math.pi / 2)
    with np.errstate(divide="ignore"):
        density = np.exp((degrees - 1) * np.log(np.cos(np.minimum(theta, math.pi / 2 - 1e-12))))
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) * np.diff(theta) / 2)])
    angle = float(np.interp(confidence * mass[-1], mass, theta))
    return math.sqrt(degrees) * math.tan(angle)
