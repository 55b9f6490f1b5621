"""Functions of weights alone: computed once per member, and carried on as a weight.

``softmax(W)``, ``W / W.norm()``, ``linalg.inv(W)``, ``W1 @ W2``: a function of perturbed weights and of constants that belong to no
row has no rows either, so its result is a weight again, of which every member has its own. In general nothing of a factored
perturbation is left in it, and the members' values are listed: exact, and N times the memory. That is what ``Independent()`` does
anyway; other estimators do it under ``fallback="loop"``, and refuse by name without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from flipout.errors import MissingRuleError
from flipout.estimators import Independent
from flipout.registry import otherwise
from flipout.rows import NONE, Mixed, Rows
from flipout.rules.constants import is_listed
from flipout.rules.pointwise import fits
from flipout.weight import PerturbedWeight, Term, can_loop, loop

__all__ = ["of_members"]

_C: Any = torch._C  # whose parts are not annotated


@otherwise
def without_rule(operation: Any, args: Any, kwargs: Any, error: Exception) -> Any:
    """What answers for an operation that no rule serves.

    Raises:
        MissingRuleError: where the estimator does not list its members, nobody asked for the loop over them, or it has no meaning.
    """
    leaves, _ = tree_flatten((args, kwargs))
    carriers = [leaf for leaf in leaves if isinstance(leaf, PerturbedWeight)]
    if not carriers or not can_loop(operation):
        raise error
    estimator, looped = carriers[0].origin.estimator, carriers[0].origin.fallback == "loop"
    listed = looped or isinstance(estimator, Independent) or all(map(is_listed, carriers))
    entrywise = getattr(operation, "__name__", "") in _ENTRYWISE
    if listed and estimator.has_members and all(_is_constant(leaf, carriers, entrywise) for leaf in leaves):
        return of_members(operation, args, kwargs, error)
    if looped:
        return loop(operation, args, kwargs)
    raise error


#: Functions of each entry by itself, whose plain operands may lie on the axes of a weight.
_ENTRYWISE = frozenset(
    """where masked_fill lerp addcmul addcdiv maximum minimum fmax fmin atan2 hypot fmod remainder copysign
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ dropout""".split()  # noqa: SIM905
)


def _is_constant(value: Any, carriers: list[PerturbedWeight], entrywise: bool) -> bool:
    """Whether an operand is a weight, or certainly holds no rows of the batch."""
    if isinstance(value, (PerturbedWeight, torch.nn.Parameter)) or not isinstance(value, Tensor) or not value.dim():
        return True
    fact = carriers[0].batch.known(value)
    if isinstance(fact, (Rows, Mixed)):
        return fact is NONE
    if entrywise and any(fits(carrier, value) for carrier in carriers):
        return True
    layout = carriers[0].batch
    rows = layout.rows or layout.members or 1
    return all(value.shape[axis] == 1 or value.shape[axis] % rows for axis in {0, layout.dim} if axis < value.dim())


#: Casts and views as bits, whose whole numbers would have no noise left.
_CASTS = frozenset({"to", "type", "type_as", "view", "long", "int", "short", "char", "byte", "bool"})


def of_members(operation: Any, args: Any, kwargs: Any, error: Exception) -> Any:
    """The result for every member as a carrier, or a tuple of carriers where the operation returns several tensors.

    Raises:
        MissingRuleError: ``error``, if the operation returns what is no tensor.
    """
    leaves, tree = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, PerturbedWeight)]
    first: PerturbedWeight = leaves[places[0]]

    def call(*weights: Tensor) -> Any:
        given = list(leaves)
        for place, weight in zip(places, weights, strict=True):
            given[place] = weight
        positional, named = tree_unflatten(given, tree)
        return operation(*positional, **named)

    found = _each(call, [leaves[place].dense() for place in places], [leaves[place].mean_weight for place in places])

    def carried(values: Any) -> PerturbedWeight:
        if not isinstance(values, Tensor):
            raise error
        zero = values.new_zeros(values.shape[1:])
        return PerturbedWeight(zero, (Term(values, per_member=True),), first.batch, first.origin)

    if isinstance(found, Tensor):
        if getattr(operation, "__name__", "") in _CASTS and not (found.is_floating_point() or found.is_complex()):
            raise error
        return carried(found)
    if not isinstance(found, (tuple, list)):
        raise error
    return tree_map(carried, found)


def _each(call: Callable[..., Any], weights: list[Tensor], means: list[Tensor]) -> Any:
    """``call`` at each member's weights, its tensors stacked on a new first axis: at once where torch can, else in a loop."""
    members = weights[0].shape[0]
    if not members:
        return tree_map(lambda value: value.new_empty(0, *value.shape) if isinstance(value, Tensor) else value, call(*means))
    if not torch.compiler.is_compiling():
        functorch: Any = _C._functorch
        before = functorch._is_vmap_fallback_enabled()
        functorch._set_vmap_fallback_enabled(False)  # a slow loop of its own, which warns
        try:
            return torch.func.vmap(call)(*weights)
        except MissingRuleError:
            raise
        except Exception:
            pass
        finally:
            functorch._set_vmap_fallback_enabled(before)
    results = [tree_flatten(call(*(weight[n] for weight in weights))) for n in range(members)]
    columns = zip(*(leaves for leaves, _ in results), strict=True)
    return tree_unflatten(
        [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns], results[0][1]
    )
