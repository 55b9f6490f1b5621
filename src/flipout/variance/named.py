"""Estimators by the names that results, tables and the command line use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, Independent, LocalReparameterization, LowRank, Shared

__all__ = ["ESTIMATORS", "label", "named_estimators"]

#: Each name with the estimator of its defaults.
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "shared": Shared,
    "flipout": Flipout,
    "independent": Independent,
    "local_reparameterization": LocalReparameterization,
    "low_rank": LowRank,
}


def label(name: str) -> str:
    """An estimator's name as tables and figures have room for it.

    Example:
        >>> label("local_reparameterization"), label("flipout")
        ('LRT', 'flipout')
    """
    return {"local_reparameterization": "LRT"}.get(name, name)


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
