"""Deprecated names: they give what they gave, and say what to use instead."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["renamed"]


def renamed(module: str, name: str, names: Mapping[str, str], since: str = "0.2", until: str = "0.4") -> Any:
    """The value of a deprecated name, for the ``__getattr__`` of a module.

    Args:
        module: the module's ``__name__``.
        name: what is asked of it.
        names: its deprecated names, with what they are called now.
        since, until: the releases that deprecate the names and take them away.

    Raises:
        AttributeError: if the name is not one of them.

    Warns:
        DeprecationWarning: with the new name, at the line that asks for the old one.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    told = f"{module}.{name} is deprecated since {since} and goes in {until}: use {module}.{names[name]}"
    warnings.warn(told, DeprecationWarning, stacklevel=3)
    return getattr(sys.modules[module], names[name])
