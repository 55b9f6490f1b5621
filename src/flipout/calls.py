"""Calls of a module whose weights are perturbed from outside it: the rows they have, and hooks that put weights in and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from flipout.draw import Draw
from flipout.errors import BatchError, DrawError
from flipout.select import Site, rows_dim, unbatched_rank
from flipout.slots import Placement, first_batch

if TYPE_CHECKING:
    from flipout.perturb import Perturbed

__all__ = ["Calls", "LateDraw", "count_rows", "require_blocks", "slots_of"]


class LateDraw(Draw):
    """A draw whose number of members may be found at the first call."""

    def __init__(self, net: Perturbed, members: int | None) -> None:
        self._net = net
        self.estimator = net.estimator
        self.members = None
        if members is not None:
            self.start(members)

    @property
    def started(self) -> bool:
        return hasattr(self, "_samples")

    def start(self, members: int) -> None:
        net = self._net
        super().__init__(net.module, net._sites, {}, net.estimator, members, net.generator, net.fallback)

    def _require_members(self) -> None:
        if not self.started:
            raise DrawError("the draw has no members yet: call the module first, or pass perturbed(..., members=N)")
        super()._require_members()

    def __repr__(self) -> str:
        return super().__repr__() if self.started else f"Draw(members=None, estimator={self.estimator}, not drawn yet)"


class Calls:
    """Puts the perturbed weights in place for the outermost call among a module's parts, and back after it."""

    def __init__(self, net: Perturbed, draw: Draw) -> None:
        self.net, self.draw = net, draw
        self.depth = 0
        self.placed: Placement | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        for part in self.net.module.modules():
            self._handles.append(part.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True))
            self._handles.append(part.register_forward_hook(self.leave, always_call=True))

    def detach(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Takes the hooks off for a while."""
        self.detach()
        try:
            yield
        finally:
            self.attach()

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        try:
            net, draw = self.net, self.draw
            dim = rows_dim(part, net.batch_dim)
            rows = count_rows(part, dim, args, kwargs)
            if isinstance(draw, LateDraw) and not draw.started:
                draw.start(rows)
            require_blocks(rows, draw, dim)
            self.placed = Placement(slots_of(net._sites), draw.slot_weights(rows, dim))
            self.placed.note(part, args, kwargs)
        except BaseException:
            self.depth = 0
            raise

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            self.restore()

    def restore(self) -> None:
        if self.placed is not None:
            self.placed.undo()
            self.placed = None


def slots_of(sites: Sequence[Site]) -> list[tuple[nn.Module, str]]:
    return [slot for site in sites for slot in site.slots]


def count_rows(module: nn.Module, dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The rows of the first tensor argument on the batch dimension, or its packed sequences; one for an unbatched input."""
    first = first_batch(args, kwargs)
    if first is None:
        raise BatchError(f"{type(module).__name__} was called without a tensor, so its examples cannot be counted")
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])
    if first.dim() == unbatched_rank(module):
        return 1
    if first.dim() <= dim:
        raise BatchError(
            f"the first tensor argument of {type(module).__name__} has shape {tuple(first.shape)}, which has no dimension "
            f"batch_dim={dim}; give it a batch dimension or name the right one"
        )
    return first.shape[dim]


def require_blocks(rows: int, draw: Draw, dim: int) -> None:
    if draw.members is not None and (rows % draw.members or not rows):
        raise BatchError(
            f"the input has {rows} rows on batch_dim={dim}, which do not divide into the {draw.members} members of the held draw; "
            f"give it {draw.members} rows, or k·{draw.members} in member-major blocks"
        )
