"""Perturbing a module that cannot be wrapped: every operation of the thread meets perturbed weights while a context lasts."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flipout.calls import Call, take_off
from flipout.compiled import leave_to_python, run_eagerly
from flipout.contexts import entered, setting
from flipout.draw import Draw
from flipout.errors import ArgumentError, DrawError
from flipout.estimators import Estimator, Flipout
from flipout.hooks import attach
from flipout.noise import Noise
from flipout.perturb import Perturbed, member_count
from flipout.recompute import level, note, noted
from flipout.rows import Layout, Rows, batch_device, count_rows, first_batch, require_blocks, rows_dim
from flipout.select import held
from flipout.weight import operation_name

__all__ = ["in_place", "perturbed"]


@contextmanager
def perturbed(
    module: nn.Module,
    noise: Noise | Mapping[str, Noise],
    estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
    fallback: str | None = None,
    members: int | None = None,
    unmet: str = "warn",
    rows: str | int | None = None,
) -> Iterator[Draw]:
    """Perturbs a module in place for a while: for loops that own the model and cannot be handed a wrapper.

    One draw is made and held, whatever the module's mode, for every operation of this thread on the module's parameters inside the
    context: calls of the module, of its parts and of its methods. Its parameters stay its own, so checkpoints, clipping and
    optimisers see nothing unusual, and other threads see the mean weights.

    Args:
        module, noise, estimator, include, exclude, batch_dim, generator, fallback, unmet, rows: as in :class:`Perturbed`.
        members: N. None takes the number of rows of the first call.

    Yields:
        The :class:`flipout.Draw`; with ``members=None`` its members are known after the first call.

    Raises:
        ArgumentError: for learnable noise, whose scales need a :class:`Perturbed` to live in; else as in ``Perturbed``.
        DrawError: if the context ends and no operation has met a perturbed parameter.

    Example:
        >>> import torch, flipout
        >>> layer = torch.nn.Linear(4, 3)
        >>> with flipout.perturbed(layer, flipout.Gaussian(0.1)) as draw:
        ...     y = layer(torch.ones(2, 4))
        >>> torch.equal(*y), draw.members
        (False, 2)
    """
    leave_to_python()
    with run_eagerly():
        net = Perturbed(module, noise, estimator, include, exclude, batch_dim, generator, fallback, unmet, rows)
        if any(site.noise.learnable for site in net.sites):
            raise ArgumentError("learnable noise needs flipout.Perturbed: perturbed() has no place to keep its scales")
        draw = LateDraw(net, None if members is None else member_count(members))
        with in_place(net, draw):
            yield draw


class LateDraw(Draw):
    """A draw whose number of members may be found at the first call."""

    def __init__(self, net: Perturbed, members: int | None) -> None:
        self._net = net
        self._sites = net.sites
        self.estimator = net.estimator
        self.members, self.owner, self.read, self.is_one_weight = None, None, False, False
        self.started = False
        self._again, self._event = noted(net.module, "draw"), note(net.module, "draw")
        if members is not None:
            self.start(members, None)

    def start(self, members: int, device: torch.device | None) -> None:
        net, again = self._net, None if self._again is None else self._again.repeated()
        if again is None:
            super().__init__(net.module, net.sites, {}, net.estimator, members, net.generator, net.fallback, device=device)
            self.selection = net._selection
        else:  # in a checkpointed region that runs again
            vars(self).update(vars(again))
        self.started = True
        if self._event is not None:
            self._event.settle(self, True)
        self._again = self._event = None
        self.stays_in_this_thread()

    def _require_members(self) -> None:
        if not self.started:
            raise DrawError("the draw has no members yet: call the module first, or pass perturbed(..., members=N)")
        super()._require_members()

    def __repr__(self) -> str:
        return super().__repr__() if self.started else f"Draw(members=None, estimator={self.estimator}, not drawn yet)"


@contextmanager
def in_place(net: Perturbed, draw: Draw) -> Iterator[None]:
    """Perturbs ``net.module`` by a draw of it, for the operations of this thread inside the context.

    Hooks on the module's parts learn how many rows a call has. Copies of it do without them.
    """
    span = Span(net, draw)
    draw.running += 1
    try:
        span.attach()
        with run_eagerly(), entered(span, "on", True), span:
            yield
        if not draw.read and (span.called or isinstance(draw, LateDraw)):  # members may also be evaluated elsewhere
            net.ledger.settle(span)
    finally:
        draw.running -= 1
        span.detach()
        span.close()


class Span(Call):
    """A stretch of code in which a module is perturbed: calls of its parts, and operations on its parameters outside of them.

    Outside of the parts' calls a parameter is also what optimisers step, checkpoints save and copies are made of: these have the
    mean. What was made of it there may not be used as a weight.
    """

    def __init__(self, net: Perturbed, draw: Draw) -> None:
        self.net = net
        self.depth, self.called = 0, False
        self.thread, self.level = threading.get_ident(), level()
        self._handles: list[Any] = []
        self._copies: dict[int, tuple[Any, int]] = {}
        super().__init__(net.module, draw, Layout(draw.members, None, net.batch_dim, followed=True))

    def __enter__(self) -> Any:
        take_off()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *reason: Any) -> None:
        self.over = True
        take_off()

    # --- calls of parts ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self._handles = attach(self.module, self.enter, self.leave)

    def detach(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def enter(self, part: nn.Module, args: Any, kwargs: Any = None) -> None:
        if not self._is_here():
            return
        self.depth += 1
        if self.depth > 1:
            return
        try:
            self.called = True
            net, draw = self.net, self.draw
            kwargs = kwargs or {}
            first = first_batch(args, kwargs)
            fact = self.tracker.find(first) if isinstance(first, Tensor) else None
            if isinstance(fact, Rows) and part is not self.module:  # what another part returned
                rows, dim = fact.count, fact.axis
            else:
                dim = rows_dim(part, net.batch_dim)
                rows = count_rows(part, dim, args, kwargs, net.rows if part is net.module else None)
            if isinstance(draw, LateDraw) and not draw.started:
                draw.start(rows, None if first is None else batch_device(first))
            else:
                draw._require_standing(net.sites)
            require_blocks(rows, draw.members, dim)
            if part is self.module:  # what other calls returned stands as this call has it
                self.tracker = self._new_tracker()
            self.tracker.members = draw.members
            self.tracker.forget_the_dead()
            self.layout = draw.layout(rows, dim)
            self._weights.clear()
            self._memory = self._buffers = self._unselected = None
            self._plain = draw.is_one_weight or draw.members is None
            self.learn()
            self.arguments(args, kwargs)
        except BaseException:
            self.depth = 0
            raise

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        if self._is_here():
            self.depth = max(self.depth - 1, 0)

    def _is_here(self) -> bool:
        """Whether a call of a part belongs to this stretch.

        Not in other threads and async tasks, nor where a backward pass runs a region again.
        """
        if threading.get_ident() != self.thread or self.level != level() or self._task != torch._C._current_graph_task_id():
            return False
        return bool(setting(self, "on", False))

    # --- operations outside of them -------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not setting(self, "on", False):  # another async task of this thread
            return func(*args, **(kwargs or {}))
        if self.depth == 0 and ((upkeep := _is_upkeep(func)) or _inside_optimizer()):
            if self._meets(args, kwargs):
                self.regions.pass_by(self)
            result = func(*args, **(kwargs or {}))
            if upkeep and func in _COPIES and type(result) is Tensor and args and result is not args[0]:
                self._note_copy(result, args[0])
            return result
        return super().__torch_function__(func, types, args, kwargs)

    def _note_copy(self, copy: Tensor, original: Any) -> None:
        i = next((i for owner, name, i in self._slots if held(owner, name) is original), None)
        if i is not None:
            self._copies[id(copy)] = (weakref.ref(copy), i)

    def _refuse_copies(self, value: Tensor) -> None:
        ref, i = self._copies.get(id(value), (None, 0))
        if ref is not None and ref() is value:
            raise self._copied(i)
        super()._refuse_copies(value)

    def _meets(self, args: Any, kwargs: Any) -> bool:
        """Whether selected parameters are among the arguments, where a checkpointed region has to know."""
        if not self.regions.inside():
            return False
        found = [self.tracker.find(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return any(type(fact) is int for fact in found)

    def _meet(self, i: int, mean: Tensor, func: Any) -> Tensor:
        if isinstance(self.draw, LateDraw) and not self.draw.started:
            raise DrawError(
                f"{operation_name(func)} met the perturbed parameter {self.sites[i].name!r} before any call of the module told "
                "how many rows there are; call the module first, or pass perturbed(..., members=N)"
            )
        return super()._meet(i, mean, func)


def _is_upkeep(func: Any) -> bool:
    """Whether an operation copies, moves or overwrites its first operand, as checkpoints and initialisations do."""
    name = getattr(func, "__name__", "")
    return func in _COPIES or name.startswith("_foreach_") or (name.endswith("_") and not name.endswith("__"))


def _inside_optimizer() -> bool:
    """Whether an optimiser of torch, or one that derives from its class, is stepping."""
    if torch.is_grad_enabled():
        return False
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _OPTIMIZER:
        frame = frame.f_back
    return frame is not None


_OPTIMIZER = torch.optim.Optimizer.step.__code__.co_filename
_COPIES = {
    torch.Tensor.detach,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.Tensor.clone,
    torch.clone,
    torch.detach,
    torch.Tensor.to,
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.cpu,
    torch.Tensor.cuda,
    torch._has_compatible_shallow_copy_type,  # pyright: ignore[reportPrivateImportUsage]
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
}
