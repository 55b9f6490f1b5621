"""A call carries its draw: a mode of the thread that runs it, in which operations meet perturbed weights instead of parameters.

The module is never touched. Whatever torch operation meets a selected parameter, wherever that came from (an attribute, a list, a
closure), is given its carrier, and the carrier hands the operation to its rule. Parameters are known by identity, looked up in the
slots of the module as they stand at that moment, so that one which a hook has just put there (FSDP's whole one, an offloaded one)
is found as well.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flipout import recompute
from flipout.draw import Draw
from flipout.errors import BatchError, DrawError, UnmetWarning
from flipout.following import follow, followed_alone
from flipout.rows import AT_HAND, NONE, UNKNOWN, UNSEEN, Layout, Rows, Tracker
from flipout.select import held
from flipout.sharded import is_sharded
from flipout.weight import METADATA, PerturbedWeight, missing_rule_for

__all__ = ["Call", "Ledger", "Repetition", "take_off"]

_C: Any = torch._C  # whose parts are not annotated


class Ledger:
    """Which selected parameters have met an operation, over the calls of a wrapper.

    Args:
        unmet: what to do where some did not: ``"ignore"``, ``"warn"`` (once for each name) or ``"raise"``.
    """

    def __init__(self, unmet: str) -> None:
        self.unmet = unmet
        self._told: set[str] = set()

    def settle(self, call: Call, lost: Iterable[str] = ()) -> None:
        """Tells of the parameters that did not meet an operation in a call, and of those that are no longer in the module.

        Raises:
            DrawError: if none of them did; if some did not, under ``unmet="raise"``.
        """
        met, sites = call.met, call.sites
        if (len(met) == len(sites) and not lost) or self.unmet == "ignore":
            return
        kind = type(call.module).__name__
        if not met:
            raise DrawError(
                f"none of the perturbed parameters of {kind} ({_listed([site.name for site in sites])}) met an operation, so "
                f"the call "
                "had no noise: its weights are hidden from torch's operations (compiled or TorchScript code, a C++ extension, "
                "copies "
                'made before the call), or it does not use them. Pass unmet="ignore" if that is meant'
            )
        absent = [site.name for i, site in enumerate(sites) if i not in met] + list(lost)
        text = (
            f"{_listed(absent)} of {kind} met no operation in a call, so no noise on them had an effect. Exclude them if the "
            "call does not use them; if it does, they are hidden from torch's operations (a C++ extension, TorchScript, a part "
            "that was replaced)"
        )
        if self.unmet == "raise":
            raise DrawError(text)
        if not self._told.issuperset(absent):
            self._told.update(absent)
            warnings.warn(text, UnmetWarning, stacklevel=5)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


class Call(TorchFunctionMode):
    """Runs what is inside under the weights of a draw.

    Args:
        module: whose parameters are perturbed.
        draw: of them.
        layout: the rows of the call's input.
    """

    #: Whether it has ended, though it may stand on a thread's stack of modes yet.
    over = False

    def __init__(self, module: nn.Module, draw: Draw, layout: Layout) -> None:
        super().__init__()
        self.module, self.draw, self.layout = module, draw, layout
        self.sites = draw.sites
        self.met: set[int] = set()
        self._carried = self._entered = False
        self._tracing = torch.compiler.is_compiling()
        self._plain = draw.is_one_weight or draw.members is None
        self._graded = torch.is_grad_enabled()
        self._weights: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._derived: list[Any] = []
        self._listed: list[tuple[nn.Module, str, int]] | None = None
        self._buffers: set[int] | None = None
        self._unselected: set[int] | None = None
        self._memory: dict[int, list[tuple[int, int, int]]] | None = None
        if self._tracing:
            self.tracker = Tracker(draw.members, draw.owner)
        else:
            self._task = torch._C._current_graph_task_id()
            self.regions = recompute.Regions(Repetition)
            self.tracker = self._new_tracker()
        self.learn()

    def _new_tracker(self) -> Tracker:
        return Tracker(self.draw.members, self.draw.owner, self.regions.logs)

    @property
    def _slots(self) -> list[tuple[nn.Module, str, int]]:
        if self._listed is None:
            self._listed = [(owner, name, i) for i, site in enumerate(self.sites) for owner, name in site.slots]
        return self._listed

    def learn(self) -> None:
        """Notes what stands in the slots now."""
        selection = self.draw.selection
        known = None if selection is None or self._tracing else selection.known(self.sites)
        if known is not None:
            self.tracker.learn(known)
            return
        for owner, name, i in self._slots:
            tensor = held(owner, name)
            if tensor is not None:
                self.tracker.note(tensor, i)

    def arguments(self, args: Any, kwargs: Any) -> None:
        """Notes the rows of the arguments of a call: of those with as many on the batch dimension as the one that counts them."""
        dim, rows = self.layout.dim, self.layout.rows
        self.tracker.dim, self.tracker.rows = dim, rows
        if self._plain or not rows:
            return
        sure = True
        flat = not kwargs and all(isinstance(arg, Tensor) for arg in args)
        for leaf in args if flat else tree_leaves((args, kwargs), is_leaf=_is_packed):
            if isinstance(leaf, PackedSequence):
                self.tracker.note(leaf.data, _packed_rows(leaf))
            elif isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == rows:
                self.tracker.note(leaf, Rows(dim, rows, sure=sure))
                sure = False

    # --- operations -----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _RAW or (func in _SOMETIMES_RAW and _is_raw(func, args, kwargs)):
            return func(*args, **kwargs)
        if not (self._plain or self._tracing) and (fact := followed_alone(self.tracker, func, args, kwargs)) is not None:
            result = func(*args, **kwargs)
            if type(result) is Tensor:
                self.tracker.note(result, fact)
            else:  # the indices that torch.where(condition) gives
                follow(self.tracker, func, args, kwargs, result)
            return result
        self._carried = self._entered = False
        given = tuple([self._swap(arg, func) for arg in args])
        named = {key: self._swap(value, func) for key, value in kwargs.items()} if kwargs else kwargs
        if self._plain and self._weights and not self._tracing and _writes(func, kwargs):
            self._require_unwritten(func, given, named)
        if not self._carried or self.draw.is_one_weight:
            result = func(*given, **named)
        else:
            before, AT_HAND.tracker = AT_HAND.tracker, self.tracker
            try:
                if self._tracing:
                    result = func(*given, **named)
                else:  # where the operation would lead, without its way there
                    result = PerturbedWeight.__torch_function__(func, types, given, named)
            finally:
                AT_HAND.tracker = before
        if type(result) is PerturbedWeight:
            self.tracker.landed = None
            if not self._tracing:
                self._derived.append(weakref.ref(result))
        elif not self._plain:
            if self._carried and type(result) in (tuple, list) and not torch.compiler.is_compiling():
                self._derived += [weakref.ref(each) for each in result if type(each) is PerturbedWeight]
            follow(self.tracker, func, given, named, result)
        return result

    def _swap(self, value: Any, func: Any) -> Any:
        """The argument of an operation, with carriers instead of the selected parameters."""
        if isinstance(value, Tensor):
            if type(value) is PerturbedWeight:
                self._require_own(value)
                return self._meet_carrier(value, func)
            fact = self.tracker.find(value)
            if fact is UNSEEN or (type(value) is not Tensor and type(fact) is not int and self._may_be_new(value)):
                fact = self._classify(value)
            return self._meet(fact, value, func) if type(fact) is int else value
        kind = type(value)
        if kind is list or kind is tuple:
            swapped = [self._swap(item, func) for item in value]
            same = all(new is old for new, old in zip(swapped, value, strict=True))
            return value if same else kind(swapped)
        if kind is dict:
            return {key: self._swap(item, func) for key, item in value.items()}
        return value

    def _meet(self, i: int, mean: Tensor, func: Any) -> Tensor:
        """The carrier of a parameter that an operation meets."""
        if mean.is_meta and self.draw._has_values:
            return mean  # a placeholder of what is offloaded, of which no numbers can come
        if self._tracing:
            self.met.add(i)
            return self._weight(i, mean)
        if torch._C._current_graph_task_id() != self._task:
            return mean  # the backward of an operation, whose own operands these are
        if self._graded and not torch.is_grad_enabled():
            self._require_visible(self.sites[i].name, func)
        self.met.add(i)
        return self._weight(i, mean) if self._enter() else mean

    def _meet_carrier(self, weight: PerturbedWeight, func: Any) -> PerturbedWeight:
        """A weight that is in place already: made of one in the call, or of one that an inner call has put there."""
        if torch.compiler.is_compiling():
            self._carried = True
            return weight
        if torch._C._current_graph_task_id() == self._task and AT_HAND.tracker is None:
            self._require_visible(weight.origin.name, func)
            self._carried = True
            self._enter()
        return weight

    def _enter(self) -> bool:
        """Notes, once for each operation, that it meets weights. Returns whether it is to have them, and not the means."""
        if not self._entered:
            self._entered = True
            self.regions.enter(self)
        return True

    def _weight(self, i: int, mean: Tensor) -> Tensor:
        key = (i, torch.is_grad_enabled())
        made = self._weights.get(key)
        if type(mean) is not nn.Parameter and is_sharded(mean):
            raise DrawError(
                f"an operation met the perturbed parameter {self.sites[i].name!r} in pieces (a DTensor of {tuple(mean.shape)}): "
                "tensor parallelism, or an operation on FSDP2's parameters outside the call of the part that gathers them. "
                f"Perturbed weights are whole; pass exclude={self.sites[i].name!r}, or read the parameter in its own part"
            )
        if made is None or made[0] is not mean:
            if self._tracing or not self.regions.inside():
                weight = self.draw.carrier(i, mean, self.layout)
            else:
                with recompute.unseen():
                    weight = self.draw.carrier(i, mean, self.layout)
            made = self._weights[key] = (mean, weight)
        self._carried = True
        return made[1]

    def _require_visible(self, name: str, func: Any) -> None:
        """Raises where a weight has reached the forward of a custom autograd Function, into which autograd does not look."""
        if self._graded and not torch.is_grad_enabled() and not self._tracing and recompute.inside_function():
            raise missing_rule_for(func, name, self.draw.estimator, (), recompute.HIDDEN)

    def _require_unwritten(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises where an operation in place would write into a weight that all rows see, and so leave the mean as it is."""
        written = kwargs.get("out", args[0] if args else next(iter(kwargs.values()), None))
        if torch.compiler.is_compiling():
            return
        for tensor in written if isinstance(written, (tuple, list)) else (written,):
            if not isinstance(tensor, Tensor) or not _has_memory(tensor):
                continue
            for (i, _), (_, weight) in self._weights.items():
                if _has_memory(weight) and _lies_in(tensor, weight):
                    raise missing_rule_for(func, self.sites[i].name, self.draw.estimator, args, _WRITTEN)

    def _require_own(self, weight: PerturbedWeight) -> None:
        """Raises for a perturbed weight that was kept from a call under another draw."""
        ref = weight.origin.draw
        if ref is None or ref() is self.draw or torch.compiler.is_compiling():
            return
        draw = ref()
        if draw is None or not draw.running:
            raise DrawError(
                f"an operation met {weight.origin.name!r} as it was perturbed in an earlier call, whose draw is over: something "
                "keeps it (a cache of weights) and would go on with old noise; compute it in each call, or pass "
                f"exclude={weight.origin.name!r}"
            )

    # --- what a tensor is -------------------------------------------------------------------------------------------------

    def _classify(self, value: Tensor) -> Any:
        """What a tensor is that the call has not met: a parameter that was put into a slot meanwhile, or something else."""
        if self._tracing:
            return UNSEEN
        fact = self._fact_of(value)
        self.tracker.note(value, fact)
        return fact

    def _may_be_new(self, value: Tensor) -> bool:
        """Whether a tensor is a parameter that something (offloading) makes and handles before it puts it into a slot."""
        return isinstance(value, nn.Parameter) and not torch.compiler.is_compiling() and id(value) not in self._others()

    def _others(self) -> set[int]:
        """The parameters of the module that are not perturbed."""
        if self._unselected is None:
            own = {(id(owner), name) for owner, name, _ in self._slots}
            self._unselected = {
                id(parameter)
                for part in self.module.modules()
                for name, parameter in part._parameters.items()
                if parameter is not None and (id(part), name) not in own
            }
        return self._unselected

    def _fact_of(self, value: Tensor) -> Any:
        for owner, name, i in self._slots:
            if held(owner, name) is value:
                return i
        if isinstance(value, nn.Parameter):
            which = None if id(value) in self._others() else self._sharing(value)
            if which is not None:
                raise self._copied(which)
            return NONE
        self._refuse_copies(value)
        if self._buffers is None:
            self._buffers = {
                id(buffer) for part in self.module.modules() for buffer in part._buffers.values() if buffer is not None
            }
        return NONE if id(value) in self._buffers else UNKNOWN

    def _refuse_copies(self, value: Tensor) -> None:
        """Raises for what shares a selected parameter's memory, but is not the parameter: a view made before the call."""
        base, inner = value._base, value
        while _C._functorch.is_functorch_wrapped_tensor(inner):
            inner = _C._functorch.get_unwrapped(inner)
        found = [self.tracker.find(t) for t in (base, inner) if t is not None and t is not value]
        which = next((fact for fact in found if type(fact) is int), None)
        if which is None and inner is value and not value.requires_grad:
            which = self._sharing(value)
        if which is not None:
            raise self._copied(which)

    def _copied(self, i: int) -> DrawError:
        name = self.sites[i].name
        return DrawError(
            f"an operation met a view or a copy of the perturbed parameter {name!r} that was made before the call (a cached "
            "transpose, .detach(), an argument of torch.func), so its noise would be dropped in silence; make it inside the "
            f"call, or pass exclude={name!r}"
        )

    def _sharing(self, value: Tensor) -> int | None:
        """The parameter in whose memory a tensor lies."""
        if not _has_memory(value):
            return None
        if self._memory is None:
            self._memory = {}
            for owner, name, i in self._slots:
                tensor = held(owner, name)
                if tensor is not None and _has_memory(tensor):
                    start = tensor.data_ptr()
                    stretch = (start, start + tensor.numel() * tensor.element_size(), i)
                    self._memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(stretch)
        stretches = self._memory.get(value.untyped_storage().data_ptr(), ())
        start = value.data_ptr() if stretches else 0
        found = next((i for first, last, i in stretches if first <= start < last), None)
        if found is not None and not any(
            i == found and (tensor := held(owner, name)) is not None and _has_memory(tensor) and _lies_in(value, tensor)
            for owner, name, i in self._slots
        ):
            self._memory = None  # the parameter is gone, and its memory is another tensor's
            return self._sharing(value)
        return found

    def require_rows(self, output: Any) -> None:
        """Raises BatchError where a call returns a perturbed weight itself, which has no rows."""
        for leaf in (output,) if type(output) is Tensor else tree_leaves(output):
            if isinstance(leaf, Tensor):
                fact = self.tracker.find(leaf)
                name = leaf.origin.name if type(leaf) is PerturbedWeight else self.sites[fact].name if type(fact) is int else None
                if name is not None:
                    raise BatchError(
                        f"{type(self.module).__name__} returned the perturbed weight {name!r} {tuple(leaf.shape)} itself, which "
                        "has no rows; combine it with the input first, or read it with hold() and draw.weights(n)"
                    )

    # --- the end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leaves no carrier in the module: hooks that compute a weight (weight_norm, prune) store it as an attribute."""
        if self._tracing:
            return
        if self._plain or any(weight() is not None for weight in self._derived):
            with recompute.unseen():
                for part in self.module.modules():
                    _compute_again(part)
                    if not self._plain:
                        _clear(part.__dict__)
        self._derived.clear()


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence)


def _compute_again(part: nn.Module) -> None:
    """Has the old-style hooks of a part compute its weights from the means, without another step of a power iteration."""
    pruning: Any = sys.modules.get("torch.nn.utils.prune")  # which torch does not import by itself
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            setattr(part, hook.name, hook.compute_weight(part))
        elif isinstance(hook, SpectralNorm):
            setattr(part, hook.name, hook.compute_weight(part, do_power_iteration=False))
        elif pruning is not None and isinstance(hook, pruning.BasePruningMethod):
            hook(part, ())


def _clear(values: Any) -> Any:
    """A value without carriers: their means are in their places, in dictionaries and lists in place."""
    if type(values) is PerturbedWeight:
        return values.mean_weight
    if type(values) in (dict, OrderedDict):
        for key, value in values.items():
            if type(value) in _HOLDERS and (new := _clear(value)) is not value:
                values[key] = new
    elif type(values) is list:
        for i, value in enumerate(values):
            if type(value) in _HOLDERS and (new := _clear(value)) is not value:
                values[i] = new
    elif type(values) is tuple:
        new = tuple(_clear(value) if type(value) in _HOLDERS else value for value in values)
        return values if all(a is b for a, b in zip(new, values, strict=True)) else new
    return values


_HOLDERS = (PerturbedWeight, dict, OrderedDict, list, tuple)


def _is_raw(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function of :data:`_SOMETIMES_RAW` is to have the parameters themselves."""
    return _to_meta(args, kwargs) if func is torch.Tensor.to else _flattens()


def _to_meta(args: Any, kwargs: Any) -> bool:
    """Whether a cast gives a placeholder without values, as offloading leaves it in the place of a parameter."""
    target = args[1] if len(args) > 1 else kwargs.get("device")
    return (isinstance(target, str) and target == "meta") or (isinstance(target, torch.device) and target.type == "meta")


def _lies_in(value: Tensor, tensor: Tensor) -> bool:
    return value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


class Repetition(Call):
    """Runs a checkpointed region again, under the weights that its first run met.

    Args:
        notes: what it found then.
    """

    def __init__(self, notes: recompute.Notes) -> None:
        first = notes.draw
        self._replay = recompute.Replay(notes)
        self._source = first.generator
        if first.estimator.has_members:
            draw = first if first.samples is notes.samples else first.as_it_was(notes.samples, first.generator)
        else:  # never the user's own generator: what else draws from it goes on
            own = None if first.generator is None else torch.Generator(device=first.generator.device)
            draw = first.as_it_was(notes.samples, own)
        super().__init__(notes.module, draw, Layout(None, None, 0))
        self.regions.began = notes.began
        self._perturbs = True

    def _new_tracker(self) -> Tracker:
        return Tracker(self.draw.members, self.draw.owner, self.regions.logs, self._replay)

    def _meet_carrier(self, weight: PerturbedWeight, func: Any) -> PerturbedWeight:
        weight = super()._meet_carrier(weight, func)
        source = weight.origin.generator
        if source is None or source is not self._source:
            return weight
        return PerturbedWeight(
            weight.mean_weight, weight.terms, weight.batch, replace(weight.origin, generator=self.draw.generator)
        )

    def _require_own(self, weight: PerturbedWeight) -> None:
        """Those of its first run are its own."""

    def _enter(self) -> bool:
        if self._entered:
            return self._perturbs
        self._entered = True
        step = self._replay.next_step()
        self._perturbs = step is not None or self._replay.strays
        if not self._perturbs:
            self.regions.pass_by(self)
            return False
        if step is not None:
            if step.layout is not self.layout:
                self.layout = step.layout
                self._weights.clear()
            for generator, state in zip(recompute.sources(self.draw), step.states, strict=False):
                generator.set_state(state)
        self.regions.enter(self)
        return True

    def __exit__(self, *reason: Any) -> None:
        self.over = True
        take_off()
        self.close()  # hooks of a part may have stored weights again


def take_off() -> None:
    """Takes the calls that are over off this thread's stack of modes, wherever they stand there: async tasks end in any order.

    What was closed in another thread goes with the next one that is closed or entered here; until then it does nothing.
    """
    stack: list[Any] = []
    while _len_torch_function_stack():
        stack.append(_pop_torch_function_stack())
    for mode in reversed(stack):
        if not (isinstance(mode, Call) and mode.over):
            _push_on_torch_function_stack(mode)


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory of its own process, at an address."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta" or tensor.layout != torch.strided:
        return False
    return not _C._functorch.is_functorch_wrapped_tensor(tensor)


def _packed_rows(batch: PackedSequence) -> Rows:
    device = batch.data.device
    order = torch.cat([torch.arange(int(size), device=device) for size in batch.batch_sizes])
    if batch.sorted_indices is not None:
        order = batch.sorted_indices[order]
    return Rows(0, int(batch.batch_sizes[0]), order=order)


_WRITTEN = (
    "it writes into it, which would change the weights of one call instead of the mean (do it outside the call, to the parameter)"
)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SOMETIMES_RAW = frozenset({torch.Tensor.to, _DATA})
_IN_PLACE: dict[Any, bool] = {torch.Tensor.__setitem__: True, torch.Tensor.data.__set__: True}  # type: ignore[attr-defined]


def _writes(func: Any, kwargs: Any) -> bool:
    """Whether an operation writes into its first operand, or into ``out``."""
    found = _IN_PLACE.get(func)
    if found is None:
        name = getattr(func, "__name__", "")
        found = _IN_PLACE[func] = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    return found or ("out" in kwargs and kwargs["out"] is not None)


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor", "mod")
)


def _flattens() -> bool:
    """Whether ``flatten_parameters`` of a recurrent layer looks at where its parameters lie."""
    frame = sys._getframe(3)
    return not torch.compiler.is_compiling() and frame.f_code is nn.RNNBase.flatten_parameters.__code__


def _accessors(*names: str) -> set[Any]:
    """The functions that read and write properties of tensors."""
    found = [getattr(torch.Tensor, name) for name in names]
    return {accessor for each in found for accessor in (each.__get__, each.__set__)}


#: What reads of a parameter nothing that noise would change, or has it for its own sake.
_RAW = (
    METADATA
    | _accessors("grad", "_backward_hooks")
    | {
        torch.autograd.grad,  # by the means, which are the leaves
        torch.autograd.backward,
        torch.Tensor.backward,
        torch.Tensor.data_ptr,
        torch.Tensor.requires_grad_,
        torch.Tensor.register_hook,
        torch.Tensor.register_post_accumulate_grad_hook,
        torch.Tensor.untyped_storage,
        torch.Tensor._typed_storage,
        torch.Tensor.storage,
        torch.Tensor._reduce_ex_internal,
        torch.Tensor.is_shared,
        torch.Tensor.__repr__,
        torch._C.TensorBase.requires_grad.__set__,  # type: ignore[attr-defined]
        getattr(torch, "_cudnn_rnn_flatten_weight", None),
    }
)
