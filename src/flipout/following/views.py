"""Views, permutations, repetitions and padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.following.facts import aligned, argument, first_operand, lost, regrouped
from flipout.following.families import HANDLERS, register, register_with_function
from flipout.following.mixing import leading
from flipout.rows import NONE, UNKNOWN, Mixed, Rows, Tracker, entries, ordered


def _reshaped(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    return regrouped(fact, x.shape, result.shape)


def _moved(tracker: Tracker, args: Any, kwargs: Any, result: Any, func: Any) -> Any:
    """Permutations of axes: torch's own answer, read off a tensor whose strides name its axes."""
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    probe = torch.empty_strided([1] * x.dim(), list(range(x.dim())), device="meta")
    if args:
        order = func(probe, *args[1:], **kwargs).stride()
    else:
        names = dict(kwargs)
        names[next(iter(names))] = probe
        order = func(**names).stride()
    return fact._replace(axis=list(order).index(fact.axis))


def _transposed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    values = [*args[1:], *(v for k, v in kwargs.items() if k not in ("input", "self"))]
    a, b = values[0] % x.dim(), values[1] % x.dim()
    return fact._replace(axis={a: b, b: a}.get(fact.axis, fact.axis))


def _expanded(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    return aligned(fact, x, result.dim()) if isinstance(fact, Rows) else _repeated_for_all(tracker, fact, x, result)


def _repeated_for_all(tracker: Tracker, fact: Any, x: Tensor, result: Tensor) -> Any:
    """A constant that is repeated as often as the batch has rows, on the batch dimension, is repeated for them."""
    if fact is not NONE:
        return fact
    rows, at = tracker.rows, tracker.dim + x.dim() - result.dim()
    if rows is None or tracker.dim >= result.dim() or result.shape[tracker.dim] != rows or (at >= 0 and x.shape[at] != 1):
        return NONE
    return Rows(tracker.dim, rows, sure=False)


def _repeated(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return _repeated_for_all(tracker, fact, x, result)
    axis = fact.axis + result.dim() - x.dim()
    times = result.shape[axis] // max(x.shape[fact.axis], 1)
    return fact._replace(axis=axis, outer=fact.outer * times)


def _interleaved(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return UNKNOWN if fact is NONE else fact
    repeats, dim = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if dim is None:
        flat = regrouped(fact, x.shape, (x.numel(),))
        if not isinstance(flat, Rows):
            return flat
        fact, dim = flat, 0
    elif dim % x.dim() != fact.axis:
        return fact
    if isinstance(repeats, int):
        return fact._replace(axis=dim % max(x.dim(), 1), inner=fact.inner * repeats)
    order = entries(fact, x.device).repeat_interleave(repeats)
    return ordered(fact, order)


def _rolled(tracker: Tracker, args: Any, kwargs: Any, result: Any, func: Any) -> Any:
    """flip and roll: along the rows they change their order."""
    x, fact = first_operand(tracker, args, kwargs)
    dims = argument(args, kwargs, 1 if func in _FLIPS else 2, "dims")
    if not isinstance(fact, Rows):
        return fact
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    if func in _FLIPS and len(args) > 2:
        listed = list(args[1:])
    where = [i for i, dim in enumerate(listed) if dim % max(x.dim(), 1) == fact.axis]
    if not where and listed:
        return fact
    stand = entries(fact, x.device)
    if func in _FLIPS:
        return ordered(fact, stand.flip(0))
    shifts = argument(args, kwargs, 1, "shifts")
    if not listed:
        return lost(x, fact)
    shift = shifts if isinstance(shifts, int) else sum(shifts[i] for i in where)
    return ordered(fact, stand.roll(shift))


_FLIPS = (torch.flip, torch.Tensor.flip)


def _padded(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = first_operand(tracker, args, kwargs)
    if isinstance(fact, Rows) and result.shape[fact.axis] != x.shape[fact.axis]:
        return lost(x, fact)
    return fact


def _windowed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Tensor.unfold: windows along a dimension, on a new last axis."""
    x, fact = first_operand(tracker, args, kwargs)
    dim = argument(args, kwargs, 1, "dimension") % x.dim()
    return lost(x, fact) if isinstance(fact, Rows) and dim == fact.axis else fact


def _strided(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """as_strided: the axis along which the memory holds one row after the other, read off a memory of their numbers."""
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    size, stride = x.shape[fact.axis], x.stride(fact.axis)
    fits = [axis for axis in range(result.dim()) if result.shape[axis] == size and result.stride(axis) == stride]
    if torch.compiler.is_compiling():
        return UNKNOWN
    first = min(x.storage_offset(), result.storage_offset())
    memory = torch.full((x.untyped_storage().nbytes() // x.element_size() - first,), -1, dtype=torch.int32)
    stand = entries(fact, x.device).cpu().int()
    memory.as_strided(x.shape, x.stride(), x.storage_offset() - first)[:] = stand.view(
        [-1 if a == fact.axis else 1 for a in range(x.dim())]
    )
    found = memory.as_strided(result.shape, result.stride(), result.storage_offset() - first)
    for axis in fits or range(result.dim()):
        order = found.movedim(axis, 0).flatten(1)
        if bool((order == order[:, :1]).all()) and bool((order >= 0).all()):
            return ordered(fact, order[:, 0].long().to(x.device), axis)
    return Mixed(f"which reads the memory of one of shape {tuple(x.shape)} in another way, so that its rows cannot be followed")


register(_reshaped, "reshape view flatten unflatten squeeze unsqueeze ravel view_as reshape_as")


register(_transposed, "transpose swapaxes swapdims")


register(_expanded, "expand expand_as broadcast_to")


register(_repeated, "repeat tile")


register(_interleaved, "repeat_interleave")


register(_padded, "pad constant_pad_nd")


register(_windowed, "unfold")
HANDLERS[F.unfold] = leading  # patches of images, where the method of tensors has windows


register(_strided, "as_strided")


for _property in ("mT", "H", "mH"):
    HANDLERS[getattr(torch.Tensor, _property).__get__] = lambda t, a, k, r: _mirrored(t, a, k, r)


def _mirrored(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """t(), .T, .mT: the last two axes change places."""
    x, fact = first_operand(tracker, args, kwargs)
    if not isinstance(fact, Rows) or x.dim() < 2:
        return fact
    a, b = x.dim() - 2, x.dim() - 1
    return fact._replace(axis={a: b, b: a}.get(fact.axis, fact.axis))


def _reversed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """.T: all axes in the other order."""
    x, fact = first_operand(tracker, args, kwargs)
    return fact._replace(axis=x.dim() - 1 - fact.axis) if isinstance(fact, Rows) else fact


HANDLERS[torch.Tensor.T.__get__] = _reversed  # type: ignore[attr-defined]


register(_mirrored, "t adjoint")


register_with_function(_moved, "permute movedim moveaxis")


register_with_function(_rolled, "flip roll")
