"""Which functions and methods of torch belong to which family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F

from flipout.rows import Tracker

__all__ = ["HANDLERS", "Handler", "functions", "register", "register_with_function"]

_C: Any = torch._C  # whose parts are not annotated

Handler = Callable[[Tracker, tuple[Any, ...], dict[str, Any], Any], Any]
HANDLERS: dict[Any, Any] = {}


def functions(names: str) -> Iterable[Any]:
    """The functions and methods of torch with the given names, and their in-place forms."""
    for name in names.split():
        for home in (
            torch,
            torch.Tensor,
            F,
            torch.special,
            torch.linalg,
            _C._nn,
            torch._VF,
            torch._C.TensorBase,
            torch.functional,
        ):
            for form in (name, f"{name}_"):
                found = getattr(home, form, None)
                if callable(found):
                    yield found


def register(handler: Handler, names: str) -> None:
    for function in functions(names):
        HANDLERS[function] = handler


def register_with_function(handler: Any, names: str) -> None:
    for function in functions(names):
        HANDLERS[function] = lambda t, a, k, r, _f=function: handler(t, a, k, r, _f)
