"""Temperatures of the KL over a training, for :func:`flipout.bayes.elbo_loss`. Each is a function of the step alone."""

from __future__ import annotations

from flipout.arguments import require_count
from flipout.errors import ArgumentError

__all__ = ["cyclical_annealing", "linear_annealing", "minibatch_weight"]


def linear_annealing(step: int, steps: int, start: float = 0.0) -> float:
    """From ``start`` at step 0 up to 1 at ``steps``, and 1 from there on (Bowman et al. 2016).

    Raises:
        ArgumentError: for a negative step, no steps, or a start outside [0, 1].

    Example:
        >>> [linear_annealing(step, 4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    require_count("step", step, 0)
    require_count("steps", steps, 1)
    if not isinstance(start, int | float) or not 0.0 <= start <= 1.0:
        raise ArgumentError(f"start={start!r}: expected a temperature from 0 to 1")
    return start + (1.0 - start) * min(step / steps, 1.0)


def cyclical_annealing(step: int, period: int, rising: float = 0.5) -> float:
    """Rises from 0 to 1 over the first ``rising`` part of each period, then stays at 1 until it ends (Fu et al. 2019).

    Raises:
        ArgumentError: for a negative step, no period, or a part outside (0, 1].

    Example:
        >>> [cyclical_annealing(step, 4) for step in range(6)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """
    require_count("step", step, 0)
    require_count("period", period, 1)
    if not isinstance(rising, int | float) or not 0.0 < rising <= 1.0:
        raise ArgumentError(f"rising={rising!r}: expected a part of the period, more than 0 and at most 1")
    return min((step % period) / (rising * period), 1.0)


def minibatch_weight(batch: int, batches: int) -> float:
    """The share of the KL that Blundell et al. (2015, Sec. 3.4) give to the i-th of M mini-batches of an epoch, times M.

        M · 2^(M-i) / (2^M - 1)      i = 1 ... M

    As a temperature it lets the prior rule the first batches and the data the last; its mean over the epoch is 1.

    Args:
        batch: i - 1, counted from 0.
        batches: M.

    Raises:
        ArgumentError: if there is no such batch.

    Example:
        >>> [minibatch_weight(i, 2) for i in range(2)]
        [1.3333333333333333, 0.6666666666666666]
    """
    require_count("batches", batches, 1)
    require_count("batch", batch, 0)
    if batch >= batches:
        raise ArgumentError(f"batch={batch}: batches are counted from 0 to {batches - 1}")
    return batches * 0.5 ** (batch + 1) / (1.0 - 0.5**batches)
