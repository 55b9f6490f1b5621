"""Hooks on the parts of a module that stay out of its copies: another thread may copy or save it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Hook", "attach", "clear"]

#: torch numbers hooks without a lock.
_LOCK = threading.RLock()


class Hook:
    """A hook that does nothing in a copy of the module."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return None if self._function is None else self._function(*args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> Any:
        return Hook, ()


def attach(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> list[Any]:
    """Calls ``before(part, args, kwargs)`` and ``after(part, args, output)`` around the calls of each part, the latter in any case.

    Returns:
        Handles that take them off.
    """
    handles: list[Any] = []
    with _LOCK:
        for part in module.modules():
            handles.append(part.register_forward_pre_hook(Hook(before), with_kwargs=True, prepend=True))
            handles.append(part.register_forward_hook(Hook(after), always_call=True))
    return handles


def clear(copy: nn.Module) -> None:
    """Takes the hooks off that a copy of a module was made with."""
    for part in copy.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if type(hook) is Hook]:
                del hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
                part._forward_hooks_always_called.pop(key, None)
