"""The open registry of rules: which function answers for a torch operation under an estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["find_rule", "otherwise", "rule", "rules", "unruled"]

Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)

_RULES: dict[tuple[Any, type], Rule] = {}
#: The keys of rules that were told to know of several bases.
_OF_BASES: set[tuple[Any, type]] = set()


def rule(operation: Any, *estimators: type, bases: bool = False) -> Callable[[_R], _R]:
    """Registers how ``operation`` meets a perturbed weight under the given estimators.

    The decorated function is called with the arguments of the torch operation, in which perturbed weights are
    :class:`flipout.PerturbedWeight` carriers, and returns what the operation returns. It serves subclasses of the
    estimators too; a rule for a more derived estimator wins. A later registration replaces an earlier one.

    Args:
        operation: the function that torch dispatches on, for example ``torch.nn.functional.linear``, or a tuple of
            aliases of it, for example ``(torch.matmul, torch.Tensor.matmul)``.
        *estimators: estimator classes, for example :class:`flipout.Flipout`.
        bases: whether a rule for Flipout reads the terms of ``Flipout(bases=K)`` as well, whose bases have a leading axis. One that
            does not is passed over there for a rule of a base class, such as ``flipout.Estimator``, or refused by name.

    Example:
        ``torch.outer(w, x)`` of a perturbed vector ``w`` is linear in ``w``, so it is exact per example:

        >>> import torch, flipout
        >>> @flipout.rule(torch.outer, flipout.Estimator)
        ... def outer(x, weight):
        ...     return x[:, None] * weight.dense()  # [N] and [N, d]
        >>> class Outer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return torch.outer(x, self.weight)
        >>> flipout.Perturbed(Outer(), flipout.Gaussian(0.1))(torch.ones(4)).shape
        torch.Size([4, 3])
    """
    operations = operation if isinstance(operation, tuple) else (operation,)
    if not estimators or not all(isinstance(kind, type) for kind in estimators):
        raise TypeError("@flipout.rule takes an operation and at least one estimator class")

    def register(function: _R) -> _R:
        for each in operations:
            for kind in estimators:
                _RULES[each, kind] = function
                (_OF_BASES.add if bases else _OF_BASES.discard)((each, kind))
        return function

    return register


def find_rule(operation: Any, estimator: type, several: bool = False) -> Rule | None:
    """The rule for ``operation`` under ``estimator`` or its nearest base class, or None.

    Args:
        operation, estimator: as registered.
        several: whether members have several bases, which a rule for an estimator that offers them must be told to know.
    """
    for kind in estimator.__mro__:
        found = _RULES.get((operation, kind))
        if found is not None and not (several and hasattr(kind, "bases") and (operation, kind) not in _OF_BASES):
            return found
    return None


_OTHERWISE: list[Rule] = []


def otherwise(function: _R) -> _R:
    """Registers what answers where no rule does, or a rule refuses: ``function(operation, args, kwargs, error)``."""
    _OTHERWISE[:] = [function]
    return function


def unruled(operation: Any, args: Any, kwargs: Any, error: Exception) -> Any:
    """The answer for an operation without a rule, by what :func:`otherwise` registered; else raises ``error``."""
    if not _OTHERWISE:
        raise error
    return _OTHERWISE[0](operation, args, kwargs, error)


def rules() -> dict[tuple[Any, type], Rule]:
    """A copy of the registry: ``{(operation, estimator class): rule}``."""
    return dict(_RULES)
