"""Members that normalise by one another: refused at the moment such a layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flipout.buffers import normalises_by_batch
from flipout.errors import BatchError

__all__ = ["BatchGuard"]


class BatchGuard:
    """Refuses batch statistics over several members, from the batch norms of a module, while it is attached.

    The fitness of a member would depend on who shares its chunk, and on the size of chunks. It is asked when a layer runs, since an
    evaluation may set the module's mode itself.

    Args:
        module: whose batch norms.
        members: how many share a batch; one alone may have its own statistics.
    """

    def __init__(self, module: nn.Module, members: int) -> None:
        self._members = members
        self._norms: dict[nn.Module, str] = {}
        if members > 1:
            self._norms = {part: name for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
        self._handles: list[Any] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watches for the length of the context."""
        self._attach()
        try:
            yield
        finally:
            self._detach()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Takes the hooks off, for a copy of the module, which would have them too."""
        was = bool(self._handles)
        self._detach()
        try:
            yield
        finally:
            if was:
                self._attach()

    def _attach(self) -> None:
        self._handles = [part.register_forward_pre_hook(self._before) for part in self._norms]

    def _detach(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _before(self, part: nn.Module, args: Any) -> None:
        if normalises_by_batch(part):
            name, kind = self._norms.get(part, ""), type(part).__name__
            why = "is in training mode" if part.training else "keeps no running statistics"
            out = "call module.eval() before the evaluation" if part.training else "make it with track_running_stats=True"
            raise BatchError(
                f"{kind} {name!r} {why}, so it would normalise {self._members} members of the population by their common "
                f"statistics, and a member's fitness would depend on the others in its chunk; {out}, use a LayerNorm or "
                "GroupNorm, or evaluate one member at a time (chunk=1, antithetic=False)"
            )
