"""Recomputation: parts of a call that autograd runs again in the backward pass, as ``torch.utils.checkpoint`` makes it.

A non-reentrant checkpoint keeps a frame for each region, and a function that runs the region again when its saved tensors are asked
for: by then the call is over. The regions that a call goes through are made to run again under its mode and its draw. Rows are not
followed a second time, since the inputs of the region are other tensors then: what rules found is noted, and read in the same order.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flipout.calls import Call
    from flipout.draw import Draw

__all__ = ["HIDDEN_CALL", "Regions", "inside_function", "outer_draws", "repeated_draw"]

_top = torch._C._autograd._top_saved_tensors_default_hooks
_push = torch._C._autograd._push_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def inside_function() -> bool:
    """Whether the caller runs in the forward of a custom autograd Function, into which autograd does not look."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _frames() -> list[Any]:
    """The frames of the checkpointed regions that the caller runs in, innermost first."""
    hooks = []
    try:
        while (top := _top(True)) is not None:
            hooks.append(top)
            _pop()
    finally:
        for pack, unpack in reversed(hooks):
            _push(pack, unpack)
    return [_closed_over(pack, "frame") for pack, _ in hooks if getattr(pack, "__qualname__", "") == _PACK]


HIDDEN_CALL = (
    "a perturbed net was called inside the forward of a torch.autograd.Function, which would call it again in the backward pass under "
    "another draw. Reentrant checkpointing is one: pass use_reentrant=False"
)
_PACK = "_checkpoint_hook.__init__.<locals>.pack_hook"


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


class Regions:
    """The checkpointed regions that a call goes through.

    Args:
        draw: of the call.
    """

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        top = _top(True)
        self._outside = [] if top is None else [id(frame) for frame in _frames()]
        self._last: Any = None if top is None else top[0]
        self._notes: dict[int, _Notes] = {}

    def enter(self, call: Call) -> None:
        """Called where an operation meets a weight: sees to it that the regions around it run again under the call."""
        top = _top(True)
        pack = None if top is None else top[0]
        if pack is not self._last:
            self._last = pack
            self._enter(call)
        tracker = call.tracker
        if not (tracker.logs or tracker.replay) or self._draw.estimator.has_members:
            return
        for notes in tracker.logs:
            notes.states.append(_generator(self._draw).get_state())
        if tracker.replay is not None:
            _generator(self._draw).set_state(tracker.replay.next_state())

    def _enter(self, call: Call) -> None:
        found = []
        for frame in _frames() if self._last is not None else ():
            if id(frame) in self._outside:
                continue
            notes = frame.__dict__.get("_flipout_notes")
            if notes is None or notes.call is not call:
                notes = _Notes(call, frame.recompute_fn)
                frame._flipout_notes = notes
                frame.recompute_fn = notes.run_again
            found.append(notes)
        call.tracker.logs = found

    @property
    def none(self) -> bool:
        """Whether the call is in no region."""
        return self._last is None

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Hides what is computed inside from the regions: it is not computed again."""
        _push(_itself, _itself)
        try:
            yield
        finally:
            _pop()


def _itself(tensor: Any) -> Any:
    return tensor


def _generator(draw: Draw) -> torch.Generator:
    if draw._generator is not None:
        return draw._generator
    device = draw.sites[0].mean.device
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


class _Notes:
    """What a region found in its first run, to be found again: where rows stood, and states of the generator."""

    def __init__(self, call: Call, recompute_fn: Any) -> None:
        self.call, self.tracker, self.layout = call, call.tracker, call.layout
        self._again = recompute_fn
        self.facts: list[Any] = []
        self.states: list[Any] = []

    def run_again(self, *args: Any) -> Any:
        call, tracker = self.call, self.tracker
        before = tracker.replay, tracker.logs, call.repeats, call.regions._last, call.tracker, call.layout
        generator = None if call.draw.estimator.has_members else _generator(call.draw)
        state = None if generator is None else generator.get_state()
        for _, weight in call._weights.values():
            getattr(getattr(weight, "origin", None), "uses", []).clear()
        tracker.replay, tracker.logs, call.repeats, call.regions._last = _Replay(self), [], True, None
        call.tracker, call.layout = tracker, self.layout
        call.draw.running += 1
        try:
            with call:
                return self._again(*args)
        finally:
            call.draw.running -= 1
            tracker.replay, tracker.logs, call.repeats, call.regions._last, call.tracker, call.layout = before
            if generator is not None:
                generator.set_state(state)


class _Replay:
    """Reads notes in the order in which they were made."""

    def __init__(self, notes: _Notes) -> None:
        self._facts, self._states = iter(notes.facts), iter(notes.states)

    def next_fact(self) -> Any:
        return next(self._facts)

    def next_state(self) -> Any:
        return next(self._states)


# --- regions around a call --------------------------------------------------------------------------------------------

_LOCAL = threading.local()


def outer_draws(owner: Any, draw: Draw) -> None:
    """Notes the draw of a wrapper's call in the regions around it, which will call the wrapper again."""
    if _top(True) is None:
        return
    for frame in _frames():
        again = frame.__dict__.get("_flipout_draws")
        if again is None:
            again = frame._flipout_draws = _Draws(frame.recompute_fn)
            frame.recompute_fn = again.run_again
        again.draws.append((id(owner), draw))


def repeated_draw(owner: Any) -> Draw | None:
    """The draw of the call of a wrapper that is being repeated; None where none is."""
    queue = getattr(_LOCAL, "queue", None)
    if not queue:
        return None
    key, draw = queue.pop(0)
    assert key == id(owner), "a checkpointed region called its wrappers in another order than at first"
    return draw  # type: ignore[no-any-return]


class _Draws:
    """The draws that the wrappers in a region made in its first run."""

    def __init__(self, recompute_fn: Any) -> None:
        self._again = recompute_fn
        self.draws: list[tuple[int, Draw]] = []

    def run_again(self, *args: Any) -> Any:
        before = getattr(_LOCAL, "queue", None)
        _LOCAL.queue = list(self.draws)
        try:
            return self._again(*args)
        finally:
            _LOCAL.queue = before
