"""Code that is compiled inside a module: it runs as Python while weights are perturbed, since its graph has the mean weights
in it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["leave_to_python", "run_eagerly"]

_C: Any = torch._C  # whose parts are not annotated

_LOCK = threading.RLock()  # a context that the collector closes may come in between
_STANCES: list[Any] = []
_INSIDE = [0]


class _Here(threading.local):
    """How many times this thread is inside: a number of its own, which another thread may lower where it closes a context."""

    def __init__(self) -> None:
        self.depth = [0]


_HERE = _Here()


class _Stance:
    """The compiler's stance, of which torch has one for the process: ``force_eager`` in the threads that are inside, and in the
    others as it was before."""

    def __init__(self, elsewhere: Any) -> None:
        self._elsewhere = elsewhere

    @property
    def stance(self) -> str:
        stance: str = "force_eager" if _HERE.depth[0] else self._elsewhere.stance
        return stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_elsewhere"], name)


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Lets compiled functions and modules run their own Python code inside, where operations meet perturbed weights.

    Other threads go on as they are. Compile the wrapper instead to have the perturbed weights in the graph.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
        return
    frames = _C._dynamo.eval_frame
    # In what the compiler left to Python it would go on with every function that is called; it may not, and is put back.
    before = frames.set_eval_frame(None)
    with _LOCK:
        if not _INSIDE[0]:
            _STANCES.append(_installed())
        _INSIDE[0] += 1
    depth, thread = _HERE.depth, threading.get_ident()
    depth[0] += 1
    try:
        yield
    finally:
        depth[0] -= 1
        callback = frames.set_eval_frame(None)
        with _LOCK:
            _INSIDE[0] -= 1
            if not _INSIDE[0]:
                _STANCES.pop().__exit__(None, None, None)
        frames.set_eval_frame(before if thread == threading.get_ident() else callback)


def leave_to_python() -> None:
    """Where a compiler is at work: keeps it from what follows."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()


def _installed() -> Any:
    """A stance that depends on the thread; where torch keeps it otherwise than is known here, that of the whole process."""
    made: Any = torch.compiler.set_stance("force_eager")
    before = getattr(made, "prev", None)
    if hasattr(before, "stance") and hasattr(made, "stance"):
        made.stance = _Stance(before)
        made.__enter__()
    return made
