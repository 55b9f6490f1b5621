"""Recomputation: parts of a call that autograd runs again in the backward pass, as ``torch.utils.checkpoint`` makes it.

A non-reentrant checkpoint keeps a frame for each region, and a function that runs the region again when its saved tensors are
asked for: by then the call is over, and the draw may have been resampled or the module put into another mode. So each region notes
what its first run met, and runs again under that: the calls that it was part of, as modes of their own, and the calls of wrappers
inside it, with the draws that they made. Rows are not followed a second time, since the inputs of the region are other tensors
then: what rules found is noted, and read in the same order.

What is noted refers to draws and modules, never to a call: a graph that is kept keeps no activations.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from flipout.errors import DrawError
from flipout.modes import uncounted
from flipout.rows import AT_HAND

if TYPE_CHECKING:
    from flipout.draw import Draw
    from flipout.samples import Sample

__all__ = [
    "HIDDEN",
    "HIDDEN_CALL",
    "Event",
    "Notes",
    "Regions",
    "Replay",
    "inside_function",
    "level",
    "note",
    "noted",
    "sources",
    "unseen",
]

_C: Any = torch._C  # whose parts are not annotated

_top: Any = _C._autograd._top_saved_tensors_default_hooks
_push = _C._autograd._push_saved_tensors_default_hooks
_pop = _C._autograd._pop_saved_tensors_default_hooks
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_PACK = "_checkpoint_hook.__init__.<locals>.pack_hook"
_PACK_AGAIN = "_recomputation_hook.__init__.<locals>.pack_hook"

_WAY_OUT = (
    'pass use_reentrant=False (Hugging Face: gradient_checkpointing_kwargs={"use_reentrant": False}, in newer versions '
    "activation_checkpointing_kwargs)"
)
HIDDEN = (
    "it did so inside a torch.autograd.Function, whose own backward would drop the gradient. Reentrant checkpointing is one: "
    f"{_WAY_OUT}"
)
HIDDEN_CALL = (
    "a perturbed net was called inside the forward of a torch.autograd.Function, which would call it again in the backward pass "
    f"under another draw. Reentrant checkpointing is one: {_WAY_OUT}"
)


def inside_function() -> bool:
    """Whether the caller runs in the forward of a custom autograd Function, into which autograd does not look."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _frames() -> list[Any]:
    """The frames of the checkpointed regions that the caller runs in, innermost first."""
    with _bare() as hooks:
        return [_closed_over(pack, "frame") for pack, _ in hooks if _is_checkpoint(pack)]


def _is_checkpoint(pack: Any) -> bool:
    """Whether a hook is that of a region in its first run.

    Raises:
        DrawError: where this version of torch makes them in a way that is not known here.
    """
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return False
    name = getattr(pack, "__qualname__", "")
    if name == _PACK_AGAIN:
        return False
    if name == _PACK and "frame" in pack.__code__.co_freevars:
        return True
    raise DrawError(
        f"a perturbed weight was used in a checkpointed region, and torch {torch.__version__} keeps such regions in a way ({name}) "
        "that this version of flipout does not know, so it could not be run again under the same weights; upgrade flipout, or "
        "switch checkpointing off"
    )


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


@contextmanager
def _bare() -> Iterator[list[Any]]:
    """Takes the hooks on saved tensors off: what is computed inside is saved as it is, and no region computes it again."""
    hooks: list[Any] = []
    try:
        while (top := _top(True)) is not None:
            hooks.append(top)
            _pop()
        yield hooks
    finally:
        for pack, unpack in reversed(hooks):
            _push(pack, unpack)


# --- what a region notes ----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """An operation that met perturbed weights: the layout that they had, and the states of the generators it drew from."""

    layout: Any
    states: tuple[torch.Tensor, ...] = ()


class Running(Protocol):
    """What a region asks of the call that runs in it (:class:`flipout.calls.Call`)."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def draw(self) -> Draw: ...
    @property
    def layout(self) -> Any: ...
    @property
    def regions(self) -> Regions: ...


class Notes:
    """What a region found of a call that it is part of.

    Attributes:
        facts: where rows stood, as rules were told.
        steps: the operations that met a weight; None for one that was to have the means.
    """

    def __init__(self, call: Running, region: Region) -> None:
        self.module, self.make, self.began = call.module, call.regions.make, call.regions.began
        self.draw, self.samples = call.draw, call.draw.samples
        self._region = weakref.ref(region)
        self.facts: list[Any] = []
        self.steps: list[Step | None] = []

    def over(self) -> bool:
        """Whether the first run came to its end: one that goes on may have more to tell."""
        region = self._region()
        return region is None or region.over()


class Replay:
    """Reads notes in the order in which they were made."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._facts, self._steps = iter(notes.facts), iter(notes.steps)
        self.strays = False

    def next_fact(self) -> Any:
        return self._next(self._facts)

    def next_step(self) -> Step | None:
        step: Step | None = self._next(self._steps)
        return step

    def _next(self, notes: Iterator[Any]) -> Any:
        for each in notes:
            return each
        if self._notes.over():
            raise DrawError(_STRAYED)
        self.strays = True  # a backward pass inside the region, which runs on to where it stands for nothing
        return None


_STRAYED = (
    "a checkpointed region did not do in the backward pass what it had done in the forward pass: it used perturbed weights, "
    "or called perturbed nets, in another order or more often. A region must depend on its arguments alone; make what it depends "
    "on one of them"
)


class Event:
    """A call of a wrapper, or a draw made, inside a region.

    Attributes:
        module: the id of the module that was called or drawn for.
        kind: ``"call"`` or ``"draw"``.
        draw: of the call; None for one with the mean weights.
    """

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.module, self.kind = id(module), kind
        self.draw: Draw | None = None
        self._samples: list[Sample] = []
        self._states: list[tuple[torch.Generator, torch.Tensor]] = []

    def settle(self, draw: Draw, advanced: bool) -> None:
        """Notes the draw; ``advanced``: whether a generator has just been drawn from, or the call itself will."""
        self.draw, self._samples = draw, draw.samples
        if not self._states and (advanced or not draw.estimator.has_members):
            self._states = [(generator, generator.get_state()) for generator in sources(draw)]

    def generators(self) -> list[torch.Generator]:
        """The global generators that a second run puts where the first one had them."""
        return [] if self.draw is None or self.draw.generator is not None else [generator for generator, _ in self._states]

    def repeated(self) -> Draw | None:
        """The draw as it was. Global generators are put where they were after it."""
        draw = self.draw
        if draw is None:
            return None
        own = draw.generator
        if own is None:
            for generator, state in self._states:
                generator.set_state(state)
        elif self._states:  # never the user's own: what else draws from it goes on
            own = _cloned(own, self._states[0][1])
        unchanged = draw.samples is self._samples and draw.estimator.has_members
        return draw if unchanged and self.kind == "call" else draw.as_it_was(self._samples, own)


def sources(draw: Draw) -> list[torch.Generator]:
    """The generators that a draw is made from."""
    if draw.generator is not None:
        return [draw.generator]
    devices = {site.mean.device for site in draw.sites}
    return [_global_generator(device) for device in sorted(devices, key=str) if device.type != "meta"]


def _global_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator


def _cloned(generator: torch.Generator, state: torch.Tensor) -> torch.Generator:
    own = torch.Generator(device=generator.device)
    own.set_state(state)
    return own


class Region:
    """A checkpointed region, which runs again under what it noted."""

    def __init__(self, frame: Any) -> None:
        self._frame, self._again = weakref.ref(frame), frame.recompute_fn
        self.parts: list[Notes] = []
        self.events: list[Event] = []
        frame.recompute_fn = self.run_again

    @staticmethod
    def of(frame: Any) -> Region:
        region: Region | None = frame.__dict__.get("_flipout_region")
        if region is None:
            region = frame._flipout_region = Region(frame)
        return region

    def over(self) -> bool:
        frame = self._frame()
        return frame is None or getattr(frame, "forward_completed", True)

    def run_again(self, *args: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in self._generators()]
        before, at_hand = (_LOCAL.level, _LOCAL.events, _LOCAL.region), AT_HAND.tracker
        _LOCAL.level, _LOCAL.events, _LOCAL.region = _LOCAL.level + 1, iter(tuple(self.events)), self
        AT_HAND.tracker = None
        try:
            with ExitStack() as stack:
                for notes in sorted(self.parts, key=_beginning):
                    stack.enter_context(notes.make(notes))
                return self._again(*args)
        finally:
            (_LOCAL.level, _LOCAL.events, _LOCAL.region), AT_HAND.tracker = before, at_hand
            for generator, state in states:
                generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        found = [generator for event in self.events for generator in event.generators()]
        for notes in self.parts:
            if notes.draw.generator is None and not notes.draw.estimator.has_members:
                found += sources(notes.draw)
        return list({id(generator): generator for generator in found}.values())


def _beginning(notes: Notes) -> int:
    return notes.began


class _Local(threading.local):
    """What this thread is running again: how many regions deep, what the innermost one noted, and which one it is."""

    def __init__(self) -> None:
        self.level = 0
        self.events: Iterator[Event] | None = None
        self.region: Region | None = None


_LOCAL = _Local()


def level() -> int:
    """How many regions deep this thread is running something again."""
    return _LOCAL.level


# --- calls that began outside of a region -----------------------------------------------------------------------------

_BEGAN = itertools.count()


class Regions:
    """The checkpointed regions that a call goes through.

    Args:
        make: from notes, what runs a region again: a mode.

    Attributes:
        began: the number of the call among all calls.
        logs: the notes of the regions around the operation at hand.
    """

    def __init__(self, make: Callable[[Notes], Any]) -> None:
        self.make, self.began = make, next(_BEGAN)
        self.logs: list[Notes] = []
        self._outside: list[weakref.ref[Any]] = []
        self._pack: Callable[[], Any] = _nothing
        self._notes: weakref.WeakKeyDictionary[Region, Notes] | None = None
        if _top(True) is not None:
            self._outside = [weakref.ref(frame) for frame in _frames()]

    def enter(self, call: Running) -> None:
        """Called where an operation meets a weight: sees to it that the regions around it run again under the call."""
        top = _top(True)
        if top is None:
            if self.logs:
                self.logs.clear()
                self._pack = _nothing
            return
        if top[0] is not self._pack():
            self._pack = _reference(top[0])
            outside = [frame() for frame in self._outside]
            self.logs[:] = [self._of(Region.of(frame), call) for frame in _frames() if not any(frame is each for each in outside)]
        if self.logs:
            drawing = not call.draw.estimator.has_members
            step = Step(call.layout, tuple([generator.get_state() for generator in sources(call.draw)]) if drawing else ())
            for notes in self.logs:
                notes.steps.append(step)

    def inside(self) -> bool:
        """Whether the operation at hand may be in a region."""
        return _top(True) is not None

    def pass_by(self, call: Running) -> None:
        """Called where an operation meets a weight and is to have its mean."""
        if not self.inside():
            return
        self.enter(call)
        for notes in self.logs:
            notes.steps[-1] = None

    def _of(self, region: Region, call: Running) -> Notes:
        if self._notes is None:
            self._notes = weakref.WeakKeyDictionary()
        notes = self._notes.get(region)
        if notes is None:
            notes = self._notes[region] = Notes(call, region)
            region.parts.append(notes)
        return notes


def _nothing() -> None:
    return None


def _reference(hook: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(hook)
    except TypeError:
        return _nothing


@contextmanager
def unseen() -> Iterator[None]:
    """Hides what is computed inside from the regions around: it is computed once, and not again with them."""
    if _top(True) is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_bare())
        stack.enter_context(uncounted())
        yield


# --- calls inside a region --------------------------------------------------------------------------------------------


def note(module: nn.Module, kind: str, draw: Draw | None = None, advanced: bool = False) -> Event | None:
    """Notes a call of a wrapper, or a draw, in the regions around it, which will do the same again.

    Returns:
        What was noted; None outside of regions.
    """
    if _top(True) is None:
        return None
    frames = _frames()
    if not frames:
        return None
    event = Event(module, kind)
    if draw is not None:
        event.settle(draw, advanced)
    for frame in frames:
        Region.of(frame).events.append(event)
    return event


def noted(module: nn.Module, kind: str) -> Event | None:
    """What was noted of the call or the draw that is being repeated; None where nothing is."""
    if _LOCAL.events is None:
        return None
    for event in _LOCAL.events:
        if event.module != id(module) or event.kind != kind:
            raise DrawError(_STRAYED)
        return event
    region = _LOCAL.region
    if region is None or region.over():
        raise DrawError(_STRAYED)
    return None
