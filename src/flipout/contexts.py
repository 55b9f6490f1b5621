"""What holds for the calls inside a ``with`` block, in the thread or the async task that entered it and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["entered", "setting"]

_SETTINGS: ContextVar[Mapping[tuple[int, str], Any]] = ContextVar("flipout_settings", default={})  # noqa: B039  (never changed)


class _Traced(threading.local):
    """The settings of this thread once more: a compiler reads no context variables. It does not tell async tasks apart."""

    def __init__(self) -> None:
        self.settings: Mapping[tuple[int, str], Any] = {}


_TRACED = _Traced()


def setting(owner: Any, name: str, default: Any) -> Any:
    """What ``name`` is for ``owner`` here, or the default."""
    settings = _TRACED.settings if torch.compiler.is_compiling() else _SETTINGS.get()
    return settings.get((id(owner), name), default) if settings else default


@contextmanager
def entered(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets ``name`` for ``owner`` inside."""
    key, missing = (id(owner), name), object()
    before = _SETTINGS.get().get(key, missing)
    _set({**_SETTINGS.get(), key: value})
    try:
        yield
    finally:
        now = {k: v for k, v in _SETTINGS.get().items() if k != key}
        _set(now if before is missing else {**now, key: before})


def _set(settings: Mapping[tuple[int, str], Any]) -> None:
    _SETTINGS.set(settings)
    _TRACED.settings = settings
