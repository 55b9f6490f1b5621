"""The criterion of Merity, Keskar & Socher 2017 by which training slows down."""

from __future__ import annotations

from typing import Any

from flipout.arguments import is_count
from flipout.errors import ArgumentError

__all__ = ["NonMonotonic"]


class NonMonotonic:
    """Tells when a validation loss has stopped falling: v_t > min(v_0, ..., v_{t-n}) with t > n.

    Merity et al. start averaging at the first such t (their algorithm 1, with n = 5); the paper divides the learning rate by 4. It
    leaves open what is compared after that: here the record starts anew, so that one bad stretch divides once.

    Args:
        interval: n, at least 1.

    Raises:
        ArgumentError: for an interval below 1.

    Example:
        >>> criterion = NonMonotonic(interval=2)
        >>> [criterion.update(v) for v in (3.0, 2.0, 2.2, 2.1, 2.1, 1.9)]
        [False, False, False, True, False, False]
    """

    def __init__(self, interval: int = 5) -> None:
        if not is_count(interval):
            raise ArgumentError(f"NonMonotonic(interval={interval!r}): expected a number of checks, 1 or more")
        self.interval = interval
        self.values: list[float] = []

    def update(self, value: float) -> bool:
        """Takes in a validation loss; whether it is worse than the best of those at least n checks ago."""
        t, n = len(self.values), self.interval
        triggered = t > n and value > min(self.values[: t - n + 1])
        self.values = [] if triggered else [*self.values, value]
        return triggered

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.values = list(state["values"])
