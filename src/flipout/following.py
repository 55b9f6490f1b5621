"""Following the rows of a batch through torch's operations on activations.

Each function here says, for a family of operations, where the rows of the result stand, given where those of the operands do. An
operation of no family leaves its result unknown: then rules go by sizes, and raise where these do not settle it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import BatchError
from flipout.rows import NONE, UNKNOWN, UNSEEN, Mixed, Rows, Tracker, entries, ordered
from flipout.weight import PerturbedWeight

__all__ = ["follow"]

Handler = Callable[[Tracker, tuple[Any, ...], dict[str, Any], Any], Any]
_HANDLERS: dict[Any, Handler] = {}


def follow(tracker: Tracker, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Notes where the rows of an operation's result stand."""
    landed, tracker.landed = tracker.landed, None
    if tracker.replay is not None:
        return
    handler = _HANDLERS.get(func, _unknown)
    if not isinstance(result, (Tensor, tuple, list)) and handler is not _set_item:
        return
    try:
        fact = handler(tracker, args, kwargs, result)
    except (IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError, StopIteration):
        fact = UNKNOWN  # a way to call it that its family does not know
    if isinstance(result, Tensor):
        if (fact is UNKNOWN or fact is NONE) and landed is not None and _fits(landed, result):
            fact = landed  # where a rule has put the rows of what all examples share
        tracker.note(result, fact)
    elif isinstance(result, (tuple, list)):
        facts = fact if isinstance(fact, list) else [fact] * len(result)
        for each, of_each in zip(result, facts, strict=True):
            if isinstance(each, Tensor) and type(each) is not PerturbedWeight:
                tracker.note(each, of_each)


def _fits(place: Rows, tensor: Tensor) -> bool:
    return place.axis < tensor.dim() and tensor.shape[place.axis] == place.size


def _of(tracker: Tracker, value: Any) -> Any:
    """The fact of an operand; weights and numbers belong to no row."""
    if not isinstance(value, Tensor) or type(value) is PerturbedWeight:
        return NONE
    fact = tracker.find(value)
    if type(fact) is int:
        return NONE
    return UNKNOWN if fact is UNSEEN else fact


def _operands(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _joined(tracker: Tracker, facts: Iterable[Any]) -> Any:
    """The fact of a result whose operands stand as they say in it already."""
    known = [fact for fact in facts if fact is not NONE]
    if not known:
        return NONE
    mixed = [fact for fact in known if isinstance(fact, Mixed)]
    if mixed:
        return mixed[0]
    rows = [fact for fact in known if isinstance(fact, Rows)]
    if not rows:
        return UNKNOWN
    if len(rows) == 1 or all(tracker.agree(fact, rows[0]) for fact in rows[1:]):
        return rows[0]
    sure = [fact for fact in rows if fact.sure]
    if sure and all(tracker.agree(fact, sure[0]) for fact in sure):
        return sure[0]
    assumed = next((fact.weight for fact in rows if fact.weight is not None), None)
    axes = sorted({fact.axis for fact in rows})
    if assumed is not None:
        raise BatchError(
            f"the perturbed weight {assumed!r} was expanded to as many entries as the batch has rows, and meets data whose rows stand on "
            f"another axis (axes {axes} of the result), so whether these entries were meant as rows cannot be told; exclude={assumed!r} "
            "leaves it unperturbed"
        )
    return Mixed(f"which was made of tensors whose rows stand in different places (axes {axes}), so that rows are mixed")


def _aligned(fact: Any, x: Tensor, ndim: int) -> Any:
    """A fact of an operand of ``ndim`` broadcast axes."""
    return fact._replace(axis=fact.axis + ndim - x.dim()) if isinstance(fact, Rows) and ndim != x.dim() else fact


def _unknown(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    facts = [_of(tracker, x) for x in _operands(args, kwargs)]
    mixed = next((fact for fact in facts if isinstance(fact, Mixed) and fact is not NONE), None)
    if mixed is not None:
        return mixed
    return NONE if facts and all(fact is NONE for fact in facts) else UNKNOWN


def _elementwise(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    ndim = result.dim()
    return _joined(tracker, [_aligned(_of(tracker, x), x, ndim) for x in _operands(args, kwargs)])


def _broadcast(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """The data stand where they stood; a weight that met data has got their rows."""
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    facts = [_aligned(_of(tracker, x), x, result[0].dim()) for x in tensors]
    rows = _joined(tracker, facts)
    return [
        rows if type(x) is PerturbedWeight or (isinstance(rows, Rows) and fact is NONE) else fact
        for x, fact in zip(tensors, facts, strict=True)
    ]


def _first(tracker: Tracker, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
    x = args[0] if args else next(iter(kwargs.values()))
    return x, _of(tracker, x)


def _argument(args: Any, kwargs: Any, at: int, name: str, default: Any = None) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _leading(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Operations that keep the leading axes and change the last ones: pooling, resizing, convolutions, lookups."""
    x, fact = _first(tracker, args, kwargs)
    y = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(fact, Rows):
        return fact if isinstance(fact, Mixed) else UNKNOWN
    return fact if fact.axis < y.dim() and y.shape[fact.axis] == x.shape[fact.axis] else _lost(x, fact)


def _lost(x: Tensor, fact: Rows) -> Mixed:
    return Mixed(f"which was made of one of shape {tuple(x.shape)} by an operation along its axis of rows, {fact.axis}")


# --- the entries of the axis of rows ----------------------------------------------------------------------------------


def _cut(fact: Rows, index: slice, device: torch.device) -> Any:
    """The rows of a slice of the axis of rows."""
    start, stop, step = index.indices(fact.size)
    whole = fact.count * fact.inner
    if start == 0 and stop == fact.size and step == 1:
        return fact
    if step == 1 and fact.order is None and start % whole == 0 and (stop - start) % whole == 0 and stop > start:
        return fact._replace(outer=(stop - start) // whole)
    return ordered(fact, entries(fact, device)[index])


# --- views ------------------------------------------------------------------------------------------------------------


def _reshaped(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    return _regrouped(fact, x.shape, result.shape)


def _regrouped(fact: Rows, old: Sequence[int], new: Sequence[int]) -> Any:
    """The axis of a regrouped shape in which the rows stand, whatever is folded around them."""
    left, right = _product(old[: fact.axis]) * fact.outer, _product(old[fact.axis + 1 :]) * fact.inner
    size = fact.count if fact.order is None else len(fact.order)
    if not size or 0 in new:
        return UNKNOWN
    before = 1
    for axis, n in enumerate(new):
        after = _product(new[axis + 1 :])
        if before * n >= left * size and before <= left and n > 1:
            if not after or left % before or right % after or n != left // before * size * (right // after):
                break
            outer, inner = left // before, right // after
            if fact.order is None:
                return fact._replace(axis=axis, outer=outer, inner=inner)
            return Rows(axis, fact.count, order=fact.order.repeat_interleave(inner).repeat(outer))
        before *= n
    return Mixed(f"which was regrouped from {tuple(old)} to {tuple(new)} so that its rows are spread over several axes")


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _moved(tracker: Tracker, args: Any, kwargs: Any, result: Any, func: Any) -> Any:
    """Permutations of axes: torch's own answer, read off a tensor whose strides name its axes."""
    x, fact = _first(tracker, args, kwargs)
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
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    values = [*args[1:], *(v for k, v in kwargs.items() if k not in ("input", "self"))]
    a, b = values[0] % x.dim(), values[1] % x.dim()
    return fact._replace(axis={a: b, b: a}.get(fact.axis, fact.axis))


def _expanded(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    return _aligned(fact, x, result.dim()) if isinstance(fact, Rows) else (UNKNOWN if fact is NONE else fact)


def _repeated(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return UNKNOWN if fact is NONE else fact
    axis = fact.axis + result.dim() - x.dim()
    times = result.shape[axis] // max(x.shape[fact.axis], 1)
    if fact.order is not None:
        return Rows(axis, fact.count, order=fact.order.repeat(times))
    return fact._replace(axis=axis, outer=fact.outer * times)


def _interleaved(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return UNKNOWN if fact is NONE else fact
    repeats, dim = _argument(args, kwargs, 1, "repeats"), _argument(args, kwargs, 2, "dim")
    if dim is None:
        flat = _regrouped(fact, x.shape, (x.numel(),))
        if not isinstance(flat, Rows):
            return flat
        fact, dim = flat, 0
    elif dim % x.dim() != fact.axis:
        return fact
    if isinstance(repeats, int) and fact.order is None:
        return fact._replace(axis=dim % max(x.dim(), 1), inner=fact.inner * repeats)
    order = entries(fact, x.device).repeat_interleave(repeats)
    return ordered(fact, order)


def _rolled(tracker: Tracker, args: Any, kwargs: Any, result: Any, func: Any) -> Any:
    """flip and roll: along the rows they change their order."""
    x, fact = _first(tracker, args, kwargs)
    dims = _argument(args, kwargs, 1 if func in _FLIPS else 2, "dims")
    if not isinstance(fact, Rows):
        return fact
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    if func in _FLIPS and len(args) > 2:
        listed = list(args[1:])
    where = [i for i, dim in enumerate(listed) if dim % x.dim() == fact.axis]
    if not where and listed:
        return fact
    stand = entries(fact, x.device)
    if func in _FLIPS:
        return ordered(fact, stand.flip(0))
    shifts = _argument(args, kwargs, 1, "shifts")
    if not listed:
        return _lost(x, fact)
    shift = shifts if isinstance(shifts, int) else shifts[where[0]]
    return ordered(fact, stand.roll(shift))


_FLIPS = (torch.flip, torch.Tensor.flip)


# --- joining and cutting ----------------------------------------------------------------------------------------------


def _concatenated(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    pieces = _argument(args, kwargs, 0, "tensors")
    dim = _argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % result.dim()
    pieces = [piece for piece in pieces if piece.shape != (0,)]
    facts = [_of(tracker, piece) for piece in pieces]
    along = [fact for fact in facts if isinstance(fact, Rows) and fact.axis == dim]
    if not along:
        return _joined(tracker, facts)
    if len(along) < len(facts):
        return Mixed("which joins rows of the batch with entries that belong to no row")
    if any(fact.count != along[0].count for fact in along):
        return Mixed("which joins batches of different sizes")
    if all(fact.order is None and fact.inner == along[0].inner for fact in along):
        return along[0]._replace(outer=sum(fact.outer for fact in along))
    return ordered(along[0], torch.cat([entries(fact, result.device) for fact in along]))


def _stacked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    pieces = _argument(args, kwargs, 0, "tensors")
    dim = _argument(args, kwargs, 1, "dim", 0) % result.dim()
    fact = _joined(tracker, [_of(tracker, piece) for piece in pieces])
    return fact._replace(axis=fact.axis + (fact.axis >= dim)) if isinstance(fact, Rows) else fact


def _split(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    dim = _argument(args, kwargs, 2, "dim", 0) % x.dim()
    if dim != fact.axis:
        return fact
    facts, start = [], 0
    for piece in result:
        facts.append(_cut(fact, slice(start, start + piece.shape[dim]), x.device))
        start += piece.shape[dim]
    return facts


def _unbound(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    dim = _argument(args, kwargs, 1, "dim", 0) % x.dim()
    return _dropped(fact, dim, x)


def _dropped(fact: Rows, dim: int, x: Tensor) -> Any:
    """The fact where an axis is gone."""
    if dim == fact.axis:
        return Mixed(f"which is a part of one row of an input of shape {tuple(x.shape)}")
    return fact._replace(axis=fact.axis - (dim < fact.axis))


def _selected(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    return _dropped(fact, _argument(args, kwargs, 1, "dim") % x.dim(), x) if isinstance(fact, Rows) else fact


def _narrowed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 1, "dim") % x.dim()
    if not isinstance(fact, Rows) or dim != fact.axis:
        return fact
    start = int(_argument(args, kwargs, 2, "start")) % max(fact.size, 1)
    return _cut(fact, slice(start, start + result.shape[dim]), x.device)


def _index_selected(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    dim, index = _argument(args, kwargs, 1, "dim") % x.dim(), _argument(args, kwargs, 2, "index")
    if not isinstance(fact, Rows):
        return _looked_up(tracker, index, dim, fact)
    if dim != fact.axis:
        return fact if not isinstance(_of(tracker, index), Rows) else Mixed("which was indexed by rows along another axis")
    return ordered(fact, entries(fact, x.device)[index])


def _looked_up(tracker: Tracker, index: Tensor, axis: int, fact: Any) -> Any:
    """A lookup in what belongs to no row: the rows are those of the index."""
    of_index = _of(tracker, index)
    if fact is NONE and isinstance(of_index, Rows):
        return of_index._replace(axis=of_index.axis + axis)
    return _joined(tracker, [fact, UNKNOWN if isinstance(of_index, Rows) else of_index])


def _indexed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """x[...]: basic and advanced."""
    x, fact = args[0], _of(tracker, args[0])
    items = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    items = [torch.as_tensor(item, device=x.device) if isinstance(item, list) else item for item in items]
    width = sum(_width(item) for item in items)
    filled: list[Any] = []
    for item in items:
        filled += [slice(None)] * (x.dim() - width) if item is Ellipsis else [item]
    filled += [slice(None)] * (x.dim() - sum(_width(item) for item in filled))
    advanced = [item for item in filled if isinstance(item, Tensor) and (item.dim() or item.dtype == torch.bool)]
    if not isinstance(fact, Rows):
        if len(advanced) == 1 and advanced[0].dtype != torch.bool:
            before = next(i for i, item in enumerate(filled) if item is advanced[0])
            return _looked_up(tracker, advanced[0], sum(not isinstance(item, int) for item in filled[:before]), fact)
        return _joined(tracker, [fact, *(_of(tracker, item) for item in advanced)]) if not advanced else UNKNOWN
    # where each axis of x, and the joint axes of the advanced indices, come to stand
    places = [i for i, item in enumerate(filled) if isinstance(item, Tensor) and (item.dim() or item.dtype == torch.bool)]
    adjacent = bool(places) and places == list(range(places[0], places[0] + len(places)))
    wide = max((1 if item.dtype == torch.bool else item.dim() for item in advanced), default=0)
    axis, out, found = 0, 0 if adjacent or not advanced else wide, None
    first = 0
    for i, item in enumerate(filled):
        if i in places and adjacent and i == places[0]:
            first, out = out, out + wide
        if item is None:
            out += 1
        elif isinstance(item, slice):
            if axis == fact.axis:
                cut = _cut(fact, item, x.device)
                found = cut._replace(axis=out) if isinstance(cut, Rows) else cut
            axis, out = axis + 1, out + 1
        elif i in places:
            if axis <= fact.axis < axis + _width(item):
                found = _gathered(fact, x, item, fact.axis - axis, first, wide)
            axis += _width(item)
        else:  # an integer
            if axis == fact.axis:
                return _dropped(fact, axis, x)
            axis += 1
    rows_in_index = [of for of in (_of(tracker, item) for item in advanced) if isinstance(of, Rows)]
    if isinstance(found, Rows) and rows_in_index and not first <= found.axis < first + max(wide, 1):
        return Mixed("which was indexed by rows along another axis")
    return UNKNOWN if found is None else found


def _width(item: Any) -> int:
    """How many axes an index takes up."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _gathered(fact: Rows, x: Tensor, index: Tensor, within: int, first: int, wide: int) -> Any:
    """The rows of an advanced index on the axis of rows."""
    stand = entries(fact, x.device)
    if index.dtype == torch.bool:
        return ordered(fact, stand[index.nonzero(as_tuple=True)[within]], first)
    long = [axis for axis, size in enumerate(index.shape) if size != 1]
    if len(long) > 1:
        return Mixed(f"which gathers rows of an input of shape {tuple(x.shape)} by an index of shape {tuple(index.shape)}")
    return ordered(fact, stand[index.flatten()], first + wide - index.dim() + (long[0] if long else 0))


def _set_item(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """x[...] = y: a tensor that is filled with rows has them."""
    x, index, value = args
    fact, of_value = _of(tracker, x), _of(tracker, value)
    if not isinstance(of_value, Rows) or fact is not UNKNOWN:
        return None
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(item, (int, slice)) and item is not Ellipsis for item in items):
        return None
    filled: list[Any] = []
    for item in items:
        filled += [slice(None)] * (x.dim() - len(items) + 1) if item is Ellipsis else [item]
    filled += [slice(None)] * (x.dim() - len(filled))
    kept = [axis for axis, item in enumerate(filled) if isinstance(item, slice)]
    axis = kept[of_value.axis + len(kept) - value.dim()]
    if x.shape[axis] == value.shape[of_value.axis]:
        tracker.note(x, of_value._replace(axis=axis))
    return None


def _along(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Gathers, scatters, sorts and running sums along a dimension: along the rows they mix them."""
    x, fact = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 1, "dim", -1)
    if not isinstance(dim, int):
        dim = kwargs.get("dim", -1)
    of_all = [_aligned(_of(tracker, t), t, x.dim()) for t in _operands(args, kwargs) if t.dim() == x.dim()]
    fact = _joined(tracker, of_all)
    if isinstance(fact, Rows) and dim % max(x.dim(), 1) == fact.axis:
        return _lost(x, fact)
    return fact


def _added_at(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """index_add and index_copy: along the rows, each entry must be given what belongs to its own member."""
    x, fact = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 1, "dim") % x.dim()
    index, source = _argument(args, kwargs, 2, "index"), _argument(args, kwargs, 3, "source")
    of_source = _of(tracker, source)
    if not isinstance(of_source, Rows) or of_source.axis != dim:
        return _joined(tracker, [fact, of_source])
    inner, left = divmod(x.shape[dim], of_source.count)
    if fact is UNKNOWN and not left and inner and not torch.compiler.is_compiling():  # zeros, say: as many entries for each row
        guess = Rows(dim, of_source.count, 1, inner)
        given = tracker.owners(guess, index.device)[index]
        return guess if torch.equal(given, tracker.owners(of_source, index.device)) else _lost(source, of_source)
    if isinstance(fact, Rows) and fact.axis == dim:
        given = tracker.owners(fact, index.device)[index]
        return fact if torch.equal(given, tracker.owners(of_source, index.device)) else _lost(source, of_source)
    return _lost(source, of_source)


def _ranked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """topk and kthvalue."""
    x, fact = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 2, "dim", -1) % max(x.dim(), 1)
    if not isinstance(fact, Rows):
        return fact
    if dim == fact.axis:
        return _lost(x, fact)
    y = result[0]
    return fact if y.dim() == x.dim() else _dropped(fact, dim, x)


def _padded(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if isinstance(fact, Rows) and result.shape[fact.axis] != x.shape[fact.axis]:
        return _lost(x, fact)
    return fact


def _windowed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Tensor.unfold: windows along a dimension, on a new last axis."""
    x, fact = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 1, "dimension") % x.dim()
    return _lost(x, fact) if isinstance(fact, Rows) and dim == fact.axis else fact


def _strided(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """as_strided: the axis with the size and the stride of the rows', if only one has them."""
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    size, stride = x.shape[fact.axis], x.stride(fact.axis)
    fits = [axis for axis in range(result.dim()) if result.shape[axis] == size and result.stride(axis) == stride]
    return fact._replace(axis=fits[0]) if len(fits) == 1 else UNKNOWN


# --- reductions and products ------------------------------------------------------------------------------------------


def _reduced(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    others = [value for value in args[1:] if isinstance(value, Tensor)]
    if others:  # max and min of two tensors
        return _elementwise(tracker, args, kwargs, result)
    if not isinstance(fact, Rows):
        return fact
    y = result[0] if isinstance(result, (tuple, list)) else result
    named = [kwargs[name] for name in ("dim", "axis", "dims") if name in kwargs]
    listed = [v for v in args[1:] if (isinstance(v, int) and not isinstance(v, bool)) or (isinstance(v, (tuple, list)) and v)]
    dim = named[0] if named else (listed[0] if listed else None)
    if dim is None:
        return NONE
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)} or set(range(x.dim()))
    if fact.axis in dims:
        return NONE
    return fact if y.dim() == x.dim() else fact._replace(axis=fact.axis - sum(d < fact.axis for d in dims))


def _normed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """norm(x, p, dim): the order comes first."""
    rest = (args[0], *args[2:])
    return _reduced(tracker, rest, {k: v for k, v in kwargs.items() if k in ("dim", "keepdim")}, result)


def _multiplied(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """a @ b."""
    a, b = _operands(args, kwargs)[:2]
    return _joined(tracker, [_left_factor(_of(tracker, a), a, b, result), _right_factor(_of(tracker, b), a, b, result)])


def _left_factor(fact: Any, a: Tensor, b: Tensor, result: Tensor) -> Any:
    if not isinstance(fact, Rows):
        return fact
    if fact.axis == a.dim() - 1:
        return _lost(a, fact)
    return fact._replace(axis=fact.axis + result.dim() - a.dim() + (b.dim() == 1))


def _right_factor(fact: Any, a: Tensor, b: Tensor, result: Tensor) -> Any:
    if not isinstance(fact, Rows):
        return fact
    if fact.axis == max(b.dim() - 2, 0):
        return _lost(b, fact)
    if fact.axis == b.dim() - 1:
        return fact._replace(axis=result.dim() - 1)
    return fact._replace(axis=fact.axis + result.dim() - b.dim() + (a.dim() == 1))


def _reflected_product(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return _multiplied(tracker, (args[1], args[0]), kwargs, result)


def _added_product(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """addmm, baddbmm, addmv: input + a @ b."""
    x, a, b = _operands(args, kwargs)[:3]
    fact = _multiplied(tracker, (a, b), {}, result)
    return _joined(tracker, [_aligned(_of(tracker, x), x, result.dim()), fact])


def _linear(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if isinstance(fact, Rows):
        return _lost(x, fact) if fact.axis == x.dim() - 1 else fact
    return fact


def _bilinear(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return _joined(tracker, [_of(tracker, x) for x in _operands(args, kwargs)[:2]])


def _einsum(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    equation, *operands = args
    if not isinstance(equation, str):
        return UNKNOWN
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        counts = {c: inputs.count(c) for c in inputs if c not in ",."}
        output = ("..." if "..." in inputs else "") + "".join(sorted(c for c, n in counts.items() if n == 1))
    facts = []
    for term, x in zip(terms, operands, strict=True):
        fact = _of(tracker, x)
        if not isinstance(fact, Rows):
            facts.append(fact)
            continue
        letters = _letters(term, x.dim())
        letter = letters[fact.axis]
        target = _letters(output, result.dim())
        facts.append(fact._replace(axis=target.index(letter)) if letter in target else _lost(x, fact))
    return _joined(tracker, facts)


def _letters(term: str, ndim: int) -> list[str]:
    """The letters of a term, axis by axis; axes under an ellipsis are counted from their right."""
    head, dots, tail = term.partition("...")
    hidden = ndim - len(head) - len(tail) if dots else 0
    return [*head, *(f".{hidden - i}" for i in range(hidden)), *tail]


# --- whole layers -----------------------------------------------------------------------------------------------------


def _lookup(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    index = _argument(args, kwargs, 0, "input")
    table = _argument(args, kwargs, 1, "weight")
    fact = _of(tracker, index)
    return fact if fact is not NONE or _of(tracker, table) is NONE else UNKNOWN


def _bags(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    index, offsets = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 2, "offsets")
    return _of(tracker, index if index.dim() == 2 else offsets)


def _attended(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """scaled_dot_product_attention: the batch axes of queries, keys and values."""
    operands = _operands(args, kwargs)[:3]
    facts = [_aligned(_of(tracker, x), x, result.dim()) for x in operands]
    fact = _joined(tracker, facts)
    return _lost(operands[0], fact) if isinstance(fact, Rows) and fact.axis >= result.dim() - 2 else fact


def _multi_head(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    query = _argument(args, kwargs, 0, "query")
    fact = _of(tracker, query)
    if not isinstance(fact, Rows):
        fact = _joined(tracker, [_of(tracker, x) for x in _operands(args, kwargs)[:3]])
    return [fact, fact._replace(axis=0) if isinstance(fact, Rows) else fact]


def _recurrent(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """torch.lstm and its kin: the output stands as the input, final states have the sequences on axis 1."""
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    if x.dim() == 2 and (isinstance(args[1], Tensor) and args[1].dim() == 1):  # packed
        first = int(args[1][0])
        states = Rows(1, fact.count, order=fact.order[:first]) if fact.order is not None else UNKNOWN
    else:
        states = fact._replace(axis=1)
    return [fact, *[states] * (len(result) - 1)]


def _cell(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return _of(tracker, _argument(args, kwargs, 0, "input"))


def _packed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """_pack_padded_sequence(input, lengths, batch_first) -> data, batch_sizes."""
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    stand = entries(fact, x.device)
    order = torch.cat([stand[: int(size)] for size in result[1]])
    return [Rows(0, fact.count, order=order), NONE]


def _unpacked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """_pad_packed_sequence(data, batch_sizes, batch_first, …) -> padded, lengths."""
    fact, sizes = _of(tracker, args[0]), args[1]
    if not isinstance(fact, Rows) or fact.order is None:
        return fact if not isinstance(fact, Rows) else UNKNOWN
    axis = 0 if args[2] else 1
    return [ordered(fact, fact.order[: int(sizes[0])], axis), NONE]


def _constant(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return NONE if not _operands(args, kwargs) else UNKNOWN


def _filled(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """zeros_like and its kin: a tensor in the shape of one with rows has them; in the shape of anything else, it may."""
    _, fact = _first(tracker, args, kwargs)
    return fact if isinstance(fact, Rows) and fact.order is None else UNKNOWN


# --- the families -----------------------------------------------------------------------------------------------------


def _functions(names: str) -> Iterable[Any]:
    """The functions and methods of torch with the given names, and their in-place forms."""
    for name in names.split():
        for home in (torch, torch.Tensor, F, torch.special, torch.linalg, torch._C._nn, torch._VF, torch._C.TensorBase, torch.functional):
            for form in (name, f"{name}_"):
                found = getattr(home, form, None)
                if callable(found):
                    yield found


def _register(handler: Handler, names: str) -> None:
    for function in _functions(names):
        _HANDLERS[function] = handler


_ELEMENTWISE = """abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan
arcsin arccos arctan sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc erfinv relu relu6 elu selu celu gelu silu mish softplus
softsign hardtanh hardswish hardsigmoid leaky_relu tanhshrink softshrink hardshrink threshold logsigmoid rrelu prelu dropout dropout1d
dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout clamp clip clamp_min clamp_max round floor ceil
trunc fix frac sign sgn isnan isinf isfinite nan_to_num add sub subtract mul multiply div divide true_divide floor_divide remainder fmod
pow float_power maximum minimum fmax fmin lerp addcmul addcdiv where eq ne lt le gt ge not_equal equal greater less greater_equal
less_equal logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor masked_fill atan2 hypot
copysign to float double half bfloat16 int long short bool type type_as clone contiguous detach cpu cuda copy fill zero normal
uniform bernoulli exponential real conj angle softmax log_softmax softmin gumbel_softmax normalize layer_norm rms_norm batch_norm
group_norm instance_norm local_response_norm native_layer_norm rsub heaviside deg2rad rad2deg digamma lgamma
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__
__idiv__ __pow__ __rpow__ __ipow__ __neg__ __abs__ __invert__ __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __eq__ __ne__ __lt__
__le__ __gt__ __ge__ __mod__ __floordiv__ __rand__ __ror__ pin_memory requires_grad triu tril"""

_register(_elementwise, _ELEMENTWISE)
_register(_filled, "zeros_like ones_like rand_like randn_like full_like empty_like randint_like")
_register(_reshaped, "reshape view flatten unflatten squeeze unsqueeze ravel view_as reshape_as")
_register(_transposed, "transpose swapaxes swapdims")
_register(_expanded, "expand expand_as broadcast_to")
_register(_repeated, "repeat tile")
_register(_interleaved, "repeat_interleave")
_register(_concatenated, "cat concat concatenate")
_register(_stacked, "stack")
_register(_split, "split chunk tensor_split split_with_sizes")
_register(_unbound, "unbind __iter__")
_register(_selected, "select")
_register(_narrowed, "narrow")
_register(_index_selected, "index_select")
_register(_along, "gather take_along_dim scatter scatter_add scatter_reduce cumsum cumprod cummax cummin logcumsumexp sort argsort")
_register(_added_at, "index_add index_copy")
_register(_along, "index_fill")
_register(_ranked, "topk kthvalue")
_register(_padded, "pad constant_pad_nd")
_register(_windowed, "unfold")
_HANDLERS[F.unfold] = _HANDLERS[F.fold] = _leading
_register(_strided, "as_strided")
_register(
    _reduced,
    "sum mean amax amin max min var std prod logsumexp any all argmax argmin median nanmedian mode nansum nanmean std_mean var_mean "
    "aminmax count_nonzero",
)
_register(_normed, "norm vector_norm")
_register(_multiplied, "matmul bmm mm mv dot inner __matmul__")
_register(_reflected_product, "__rmatmul__")
_register(_added_product, "addmm baddbmm addmv")
_register(_linear, "linear")
_register(_bilinear, "bilinear")
_register(_einsum, "einsum")
_register(
    _leading,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d lp_pool1d lp_pool2d interpolate upsample grid_sample pixel_shuffle pixel_unshuffle one_hot glu "
    "max_pool1d_with_indices max_pool2d_with_indices fractional_max_pool2d max_unpool1d max_unpool2d channel_shuffle",
)
_register(_lookup, "embedding")
_register(_bags, "embedding_bag")
_register(_attended, "scaled_dot_product_attention")
_HANDLERS[F.multi_head_attention_forward] = _multi_head
_register(_recurrent, "lstm gru rnn_tanh rnn_relu")
_register(_cell, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
_register(_packed, "_pack_padded_sequence")
_register(_unpacked, "_pad_packed_sequence")
_HANDLERS[torch.functional.broadcast_tensors] = _broadcast
_register(_constant, "arange linspace logspace eye tril_indices triu_indices")
_HANDLERS[torch.Tensor.__getitem__] = _indexed
_HANDLERS[torch.Tensor.__setitem__] = _set_item
for _property in ("T", "mT", "H", "mH"):
    _HANDLERS[getattr(torch.Tensor, _property).__get__] = lambda t, a, k, r: _mirrored(t, a, k, r)
for _property in ("data", "real", "imag"):
    _HANDLERS[getattr(torch.Tensor, _property).__get__] = _elementwise


def _mirrored(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """t(), .T, .mT: the last two axes change places."""
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows) or x.dim() < 2:
        return fact
    a, b = x.dim() - 2, x.dim() - 1
    return fact._replace(axis={a: b, b: a}.get(fact.axis, fact.axis))


_register(_mirrored, "t adjoint")


def _with_function(handler: Any, names: str) -> None:
    for function in _functions(names):
        _HANDLERS[function] = lambda t, a, k, r, _f=function: handler(t, a, k, r, _f)  # type: ignore[misc]


_with_function(_moved, "permute movedim moveaxis")
_with_function(_rolled, "flip roll")
