"""What the paper says and what a run saw, side by side, for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flipout.intervals import Estimate

__all__ = ["Claim", "from_json"]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper's, beside the same of a run.

    Attributes:
        what: is stated, in a few words.
        paper: the paper's number, or its words.
        seen: the run's, with its interval where it has one.
        holds: whether the run bears it out; None where it cannot tell.

    Example:
        >>> claim = Claim("shared / flipout, iterations to a loss", 3.0, Estimate(2.7, 2.4, 3.0, 0.1, 4), True)
        >>> round(claim.ratio, 2), claim.verdict
        (0.9, 'reproduced')
    """

    what: str
    paper: float | str
    seen: Estimate | float | str
    holds: bool | None

    @property
    def ratio(self) -> float | None:
        """What was seen over the paper's number, where both are numbers."""
        if isinstance(self.paper, str) or isinstance(self.seen, str) or not self.paper:
            return None
        found = float(self.seen) / self.paper
        return found if math.isfinite(found) else None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return {True: "reproduced", False: "not reproduced", None: "cannot tell"}[self.holds]


def from_json(found: Mapping[str, Any]) -> Estimate:
    """An estimate out of a result; an unknown bound is infinitely far."""
    infinite = {"low": -float("inf"), "high": float("inf"), "standard_error": float("inf"), "value": float("nan"), "degrees": 0.0}
    return Estimate(**{name: default if found[name] is None else found[name] for name, default in infinite.items()})
