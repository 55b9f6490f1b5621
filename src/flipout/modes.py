"""How the current call is being run: compiled, transformed, differentiated or autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flipout.errors import DrawError

__all__ = [
    "autocast",
    "autocasts",
    "composed",
    "functional",
    "owned",
    "require_randomness",
    "selective",
    "transformed",
    "uncounted",
]


def functional() -> bool:
    """Whether a ``torch.func`` transform is active: under ``vmap`` a draw differs per mapped example only out of place."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def require_randomness() -> None:
    """Raises DrawError under a ``vmap`` that was not told what to do with random numbers."""
    if torch.compiler.is_compiling() or not functional():
        return
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters

    for level in retrieve_all_functorch_interpreters():
        if isinstance(level, VmapInterpreter) and level.randomness() == "error":
            raise DrawError(
                "random weights are drawn under torch.vmap, which was not told whether its elements share them: pass "
                'randomness="different" (each element its own weights) or randomness="same" to vmap, or hold a draw around it '
                "(with net.hold(...))"
            )


def transformed() -> bool:
    """Whether ``torch.compile`` or a ``torch.func`` transform is tracing: then nothing may be written in place.

    Selective checkpointing counts as one: it keeps the results of operations, and refuses those that were written into.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and selective()


def selective() -> bool:
    """Whether selective checkpointing counts the operations of this thread, in a region's first run or the second."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    modes = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
    return any(type(mode).__name__ in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode") for mode in modes)


def uncounted() -> AbstractContextManager[None]:
    """Hides from selective checkpointing what is computed inside: what a region does in its first run alone, and what it draws."""
    return _uncounted() if selective() else nullcontext()


@contextmanager
def _uncounted() -> Iterator[None]:
    from torch.utils._python_dispatch import _pop_mode, _push_mode

    modes: list[Any] = []
    try:
        while selective():  # a mode outside of others takes these off with it
            modes.append(_pop_mode())
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def composed(*tensors: Tensor | None) -> bool:
    """Whether to compose plain torch operations instead of a hand-written backward.

    Under ``torch.compile`` the compiler fuses them itself; under ``torch.func`` transforms only plain operations
    differentiate; without a gradient there is no backward to save.
    """
    if not torch.is_grad_enabled() or transformed():
        return True
    return all(tensor is None or not tensor.requires_grad for tensor in tensors)


def owned(y: Tensor) -> Tensor:
    """The result of a custom autograd Function as a tensor that is no view.

    torch lets nobody write into a view that a custom Function returned, not even ``nn.ReLU(inplace=True)``: what the Function
    returns must stand for itself. The numbers are not copied.
    """
    result: Tensor = torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
    return result


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device; never for "meta", which torch has no autocast for."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The operands in autocast's dtype where autocast is on, as the matrix products of torch would take them."""
    for first in tensors:
        if first is not None:
            break
    else:
        return tensors
    kind = first.device.type
    if not autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
