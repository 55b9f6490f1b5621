"""Putting perturbed weights into the parameter slots of a module for one call, and leaving no trace after it.

Recurrent modules of torch keep a second list of their parameters, ``_flat_weights``, with weak references that tell it from a stale
one. Both are replaced for the call and put back as the very objects they were.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

__all__ = ["FlatWeights", "Placement", "first_batch"]


class FlatWeights(list[Any]):
    """A recurrent module's flat weights, with what the module was called with but does not tell the operation.

    Attributes:
        order: which sequence of the caller's batch each sequence of the packed batch is, ``[B]``; None if they are the same.
    """

    order: Tensor | None = None

    def note(self, args: Any, kwargs: Any) -> None:
        """Reads the order off the module's arguments."""
        packed = next((leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, PackedSequence)), None)
        self.order = None if packed is None else packed.sorted_indices


class Placement:
    """Weights put into slots until :meth:`undo`.

    Args:
        slots: (owning module, attribute) of each parameter.
        values: what to put there.
    """

    def __init__(self, slots: Sequence[tuple[nn.Module, str]], values: Sequence[Any]) -> None:
        self._slots = slots
        self._means = [owner._parameters[attribute] for owner, attribute in slots]
        self._flat: dict[nn.RNNBase, tuple[Any, Any]] = {}
        self._hooks: list[Any] = []
        try:
            for (owner, attribute), value in zip(slots, values, strict=True):
                owner._parameters[attribute] = value
                if isinstance(owner, nn.RNNBase):
                    self._flat[owner] = owner.__dict__["_flat_weights"], owner.__dict__["_flat_weight_refs"]
            for layer in self._flat:
                self._flatten(layer)
        except BaseException:
            self.undo()
            raise

    def _flatten(self, owner: nn.RNNBase) -> None:
        weights: list[Any] = [getattr(owner, name, None) for name in owner._flat_weights_names]
        if not torch.compiler.is_compiling():  # the compiler knows plain lists only, and no packed batch
            weights = noted = FlatWeights(weights)
            self._hooks.append(owner.register_forward_pre_hook(lambda _, args, kwargs: noted.note(args, kwargs), with_kwargs=True))
        owner._flat_weights = weights
        owner._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]

    def note(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        """For a call of ``part`` that had already begun when its weights were placed."""
        if isinstance(part, nn.RNNBase) and part in self._flat:
            part.__dict__["_flat_weights"].note(args, kwargs)

    def undo(self) -> None:
        """Puts everything back."""
        for hook in self._hooks:
            hook.remove()
        for layer, (weights, references) in self._flat.items():
            layer._flat_weights = weights
            layer._flat_weight_refs = references
        for (owner, attribute), mean in zip(self._slots, self._means, strict=True):
            owner._parameters[attribute] = mean
        self._flat, self._hooks = {}, []


def first_batch(args: Any, kwargs: Any) -> Tensor | PackedSequence | None:
    """The first tensor or packed batch of sequences among a module's arguments."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    leaves = tree_leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    return next((leaf for leaf in leaves if isinstance(leaf, (Tensor, PackedSequence))), None)
