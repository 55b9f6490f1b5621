"""Other forwards for the parts of a module, for one call in one context.

A part whose forward is replaced somewhere has a :class:`Forward` in the place of its own. It asks the context of the caller (thread
or asynchronous task) what to run, so that calls at the same time do not meet each other's masks, and a caller from elsewhere meets
the part's own forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

__all__ = ["current_forward", "replaced"]

#: What the present context runs instead of the forward of each part.
_active: ContextVar[Mapping[nn.Module, Callable[..., Any]] | None] = ContextVar("flipout_replaced_forwards", default=None)
#: How many contexts replace the forward of each part now.
_counts: dict[nn.Module, int] = {}
_lock = threading.Lock()


class Forward:
    """The forward of a part while any context replaces it.

    A copy of the part made meanwhile has a copy of this, which runs the copy's own forward.
    """

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.own = part.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = _active.get()
        found = None if active is None else active.get(self.part)
        return self.plain(*args, **kwargs) if found is None else found(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The part's own forward."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.part).forward(self.part, *args, **kwargs)


def current_forward(part: nn.Module) -> Callable[..., Any]:
    """What the present context runs for the part: a replacement of an outer call, or its own forward."""
    active = _active.get()
    if active is not None and part in active:
        return active[part]
    forward = part.__dict__.get("forward")
    return forward.plain if isinstance(forward, Forward) else part.forward


@contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Gives parts other forwards in this context; their hooks go on as ever. Afterwards nothing of it is left in them."""
    parts = dict(forwards)
    with _lock:
        for part in parts:
            _counts[part] = _counts.get(part, 0) + 1
            if not isinstance(part.__dict__.get("forward"), Forward):
                part.__dict__["forward"] = Forward(part)
    token = _active.set({**(_active.get() or {}), **parts})
    try:
        yield
    finally:
        _active.reset(token)
        with _lock:
            for part in parts:
                _counts[part] -= 1
                if not _counts[part]:
                    del _counts[part]
                    _restore(part)


def _restore(part: nn.Module) -> None:
    forward = part.__dict__.get("forward")
    if not isinstance(forward, Forward):
        return
    if forward.own is None:
        del part.__dict__["forward"]
    else:
        part.__dict__["forward"] = forward.own
