"""Checks of arguments that more than one room makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from flipout.errors import ArgumentError

__all__ = ["broadcasts", "is_count", "require_count"]


def is_count(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an integer of at least ``least``; a boolean is none.

    Example:
        >>> is_count(3), is_count(True), is_count(3.0), is_count(0)
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_count(name: str, value: Any, least: int) -> int:
    """The value, if it is an integer of at least ``least``.

    Raises:
        ArgumentError: if it is not; a boolean is none.

    Example:
        >>> require_count("draws", 3, 2)
        3
    """
    if not is_count(value, least):
        raise ArgumentError(f"{name}={value!r}: expected an integer of at least {least}")
    return value


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to another, which stays as it is.

    Example:
        >>> broadcasts((3, 1), (3, 4)), broadcasts((3, 4), (3, 1)), broadcasts((2,), (3,))
        (True, False, False)
    """
    try:
        return bool(torch.broadcast_shapes(shape, to) == torch.Size(to))
    except RuntimeError:
        return False
