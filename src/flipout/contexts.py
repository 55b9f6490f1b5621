"""What holds for the calls inside a ``with`` block, in the thread or the async task that entered it and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["entered", "setting"]


class _Entry:
    """A value that holds until its block is left, wherever that happens.

    Attributes:
        value: what is set.
        outer: the entry around it.
        left: whether the block was left.
    """

    __slots__ = ("left", "outer", "value")

    def __init__(self, value: Any, outer: _Entry | None) -> None:
        self.value, self.outer, self.left = value, outer, False


_SETTINGS: ContextVar[Mapping[tuple[int, str], _Entry]] = ContextVar("flipout_settings", default={})  # noqa: B039  (never changed)


class _Traced(threading.local):
    """The settings of this thread once more: a compiler reads no context variables. It does not tell async tasks apart."""

    def __init__(self) -> None:
        self.settings: Mapping[tuple[int, str], Any] = {}


_TRACED = _Traced()


def setting(owner: Any, name: str, default: Any) -> Any:
    """What ``name`` is for ``owner`` here, or the default."""
    if torch.compiler.is_compiling():
        return _TRACED.settings.get((id(owner), name), default)
    settings = _SETTINGS.get()
    entry = _standing(settings.get((id(owner), name))) if settings else None
    return default if entry is None else entry.value


def _standing(entry: _Entry | None) -> _Entry | None:
    """The innermost entry whose block has not been left: it may have been, in another thread or task."""
    while entry is not None and entry.left:
        entry = entry.outer
    return entry


@contextmanager
def entered(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets ``name`` for ``owner`` inside."""
    key = (id(owner), name)
    settings = _SETTINGS.get()
    entry = _Entry(value, _standing(settings.get(key)))
    _set({**settings, key: entry})
    try:
        yield
    finally:
        entry.left = True
        _set(_SETTINGS.get())


def _set(settings: Mapping[tuple[int, str], _Entry]) -> None:
    standing = {key: found for key, entry in settings.items() if (found := _standing(entry)) is not None}
    _SETTINGS.set(standing)
    _TRACED.settings = {key: entry.value for key, entry in standing.items()}
