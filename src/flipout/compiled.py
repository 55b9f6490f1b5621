"""Code that is compiled inside a module: it runs as Python while weights are perturbed, since its graph has the mean weights in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["run_eagerly"]

_LOCK = threading.Lock()
_STANCES: list[Any] = []
_INSIDE = [0]


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Lets compiled functions and modules run their own Python code inside, where operations meet perturbed weights.

    Torch has one such setting for the process: it stands as long as any thread is inside. Compile the wrapper instead to have the
    perturbed weights in the graph.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
        return
    frames = torch._C._dynamo.eval_frame
    callback = frames.get_eval_frame_callback()
    if callback is not None and callback is not False:  # what the compiler left to Python: it stays there
        before = frames.set_eval_frame(None)
        try:
            yield
        finally:
            frames.set_eval_frame(before)
        return
    with _LOCK:
        if not _INSIDE[0]:
            _STANCES.append(torch.compiler.set_stance("force_eager"))
        _INSIDE[0] += 1
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE[0] -= 1
            if not _INSIDE[0]:
                _STANCES.pop().__exit__(None, None, None)
