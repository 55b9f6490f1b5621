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

from flipout.errors import BatchError, FlipoutError
from flipout.rows import BATCH, FRESH, NONE, UNKNOWN, UNSEEN, Mixed, Part, Rows, Tracker, entries, ordered
from flipout.weight import PerturbedWeight

__all__ = ["follow", "followed_alone"]

_C: Any = torch._C  # whose parts are not annotated

Handler = Callable[[Tracker, tuple[Any, ...], dict[str, Any], Any], Any]
_HANDLERS: dict[Any, Any] = {}


def followed_alone(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """The fact of the result of an elementwise function of one tensor of data, before it runs; None for any other operation."""
    if len(args) != 1 or _HANDLERS.get(func) is not _elementwise or type(args[0]) is not Tensor or tracker.replay is not None:
        return None
    for value in kwargs.values():
        if type(value) not in _NUMBERS:
            return None
    fact = tracker.find(args[0])
    return None if fact is UNSEEN or type(fact) is int else fact


_NUMBERS = frozenset({bool, int, float, str, type(None)})


def follow(tracker: Tracker, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Notes where the rows of an operation's result stand."""
    landed, tracker.landed = tracker.landed, None
    if tracker.replay is not None:
        return
    handler: Handler = _HANDLERS.get(func, _unknown)
    if handler is _linear and landed is not None and args and tracker.find(args[0]) is landed and _fits(landed, result):
        tracker.note(result, landed)
        return
    if not isinstance(result, (Tensor, tuple, list)) and handler is not _set_item:
        return
    try:
        fact = handler(tracker, args, kwargs, result)
    except FlipoutError:
        raise
    except (IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError, StopIteration, RuntimeError):
        fact = UNKNOWN  # a way to call it that its family does not know
    if isinstance(result, Tensor):
        if (fact is UNKNOWN or fact is NONE) and landed is not None and _fits(landed, result):
            fact = landed  # where a rule has put the rows of what all examples share
        _note(tracker, result, fact)
        if args and result is args[0] and result._base is not None:
            _spoil(tracker, result, fact)
    elif isinstance(result, (tuple, list)):
        facts = fact if isinstance(fact, list) else [fact] * len(result)
        for each, of_each in zip(result, facts, strict=True):
            if isinstance(each, Tensor) and type(each) is not PerturbedWeight:
                _note(tracker, each, of_each)


def _note(tracker: Tracker, result: Tensor, fact: Any) -> None:
    if type(fact) is Rows and not _fits(fact, result):
        if fact.size == 1 and fact.axis < result.dim():  # a part of one row, broadcast
            fact = Rows(fact.axis, fact.count, order=entries(fact, result.device).expand(result.shape[fact.axis]))
        else:
            fact = Mixed(f"which has not the {fact.size} entries on axis {fact.axis} that its rows have")
    tracker.note(result, fact)


def _spoil(tracker: Tracker, view: Tensor, fact: Any) -> None:
    """What is written in place into a view is in the whole as well."""
    base = view._base
    if base is None or fact is NONE or fact is BATCH or fact is FRESH:
        return
    before = tracker.find(base)
    if isinstance(fact, Mixed) and isinstance(before, Rows):
        tracker.note(base, fact)
    elif before is FRESH:
        tracker.note(base, UNKNOWN)


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
    if "out" in kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _joined(tracker: Tracker, facts: Iterable[Any]) -> Any:
    """The fact of a result whose operands stand as they say in it already."""
    facts = list(facts)
    known = [fact for fact in facts if fact is not NONE]
    if not known:
        return NONE
    known = [fact for fact in known if fact is not BATCH]
    if not known:
        return BATCH
    mixed = [fact for fact in known if isinstance(fact, Mixed)]
    if mixed:
        first = mixed[0]
        if not isinstance(first, Part) or (len(mixed) == len(known) and all(_same_part(tracker, first, fact) for fact in mixed)):
            return first
        if len(mixed) == len([fact for fact in known if fact is not UNKNOWN]) and all(_same_part(tracker, first, f) for f in mixed):
            return first
        return next((fact for fact in mixed if not isinstance(fact, Part)), Mixed("which was made of parts of different rows"))
    rows = [fact for fact in known if isinstance(fact, Rows)]
    if not rows:
        return UNKNOWN if any(fact is not FRESH for fact in known) else FRESH if len(known) == len(facts) else NONE
    if len(rows) == 1 or all(tracker.agree(fact, rows[0]) for fact in rows[1:]):
        return rows[0]
    sure = [fact for fact in rows if fact.sure]
    if sure and all(tracker.agree(fact, sure[0]) for fact in sure):
        return sure[0]
    assumed = next((fact.weight for fact in rows if fact.weight is not None), None)
    axes = sorted({fact.axis for fact in rows})
    if assumed is not None:
        raise BatchError(
            f"the perturbed weight {assumed!r} was expanded to as many entries as the batch has rows, and meets data whose rows "
            f"stand on another axis (axes {axes} of the result), so whether these entries were meant as rows cannot be told; "
            f"exclude={assumed!r} leaves it unperturbed"
        )
    return Mixed(f"which was made of tensors whose rows stand in different places (axes {axes}), so that rows are mixed")


def _same_part(tracker: Tracker, a: Part, b: Any) -> bool:
    if not isinstance(b, Part) or a.count != b.count:
        return False
    return a.row == b.row or tracker.owner_of(a) == tracker.owner_of(b)


def _aligned(fact: Any, x: Tensor, ndim: int) -> Any:
    """A fact of an operand of ``ndim`` broadcast axes."""
    return fact._replace(axis=fact.axis + ndim - x.dim()) if isinstance(fact, Rows) and ndim != x.dim() else fact


def _unknown(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    facts = [_of(tracker, x) for x in _operands(args, kwargs)]
    parts = [fact for fact in facts if isinstance(fact, Part)]
    if parts:
        return _joined(tracker, facts)
    mixed = next((fact for fact in facts if isinstance(fact, Mixed) and fact is not NONE and fact is not BATCH), None)
    if mixed is not None:
        return mixed
    if facts and all(fact is NONE or fact is BATCH for fact in facts) and BATCH in facts:
        return BATCH
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
    x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
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


def _scattered(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Operations whose entries come from anywhere in their operands."""
    for x in _operands(args, kwargs):
        fact = _of(tracker, x)
        if isinstance(fact, Rows):
            return Mixed(f"which was picked from entries of one of shape {tuple(x.shape)}, whoever's they are")
    return _unknown(tracker, args, kwargs, result)


def _matrixwise(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Functions of the matrices in the last two axes, which may hold no rows."""
    facts = []
    for x in _operands(args, kwargs):
        fact = _of(tracker, x)
        facts.append(_lost(x, fact) if isinstance(fact, Rows) and fact.axis >= x.dim() - 2 else fact)
    return _joined(tracker, facts)


def _across(at: int, default: Any = None) -> Handler:
    """Operations that mix the entries along a dimension, which is their argument at a position."""

    def handler(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
        x, fact = _first(tracker, args, kwargs)
        if not isinstance(fact, Rows):
            return fact
        dim = _argument(args, kwargs, at, "dim", default)
        dims = range(x.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
        return _lost(x, fact) if fact.axis in {d % x.dim() for d in dims} else fact

    return handler


def _beyond(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Layer norms, which mix the axes of their normalized shape."""
    x, fact = _first(tracker, args, kwargs)
    shape = _argument(args, kwargs, 1, "normalized_shape")
    width = 1 if isinstance(shape, int) else len(shape)
    return _lost(x, fact) if isinstance(fact, Rows) and fact.axis >= x.dim() - width else fact


def _before(axes: int) -> Handler:
    """Norms over channels or positions, which keep their first axes apart, or see a whole batch on purpose."""

    def handler(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
        x, fact = _first(tracker, args, kwargs)
        return _lost(x, fact) if isinstance(fact, Rows) and fact.axis >= axes else fact

    return handler


def _copied(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """x.copy_(y): what was in x is gone."""
    y = _argument(args, kwargs, 1, "src")
    fact = _aligned(_of(tracker, y), y, result.dim())
    return _of(tracker, args[0]) if fact is NONE and isinstance(_of(tracker, args[0]), Rows) else fact


def _cast(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return _first(tracker, args, kwargs)[1]


def _compared(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """cosine_similarity(x1, x2, dim=1) and pairwise_distance, whose axis goes."""
    a, b = _operands(args, kwargs)[:2]
    ndim = max(a.dim(), b.dim())
    fact = _joined(tracker, [_aligned(_of(tracker, x), x, ndim) for x in (a, b)])
    if not isinstance(fact, Rows):
        return fact
    dim = _argument(args, kwargs, 2, "dim", 1) % ndim
    return _lost(a, fact) if dim == fact.axis else fact if result.dim() == ndim else _dropped(fact, dim, a)


def _lost(x: Tensor, fact: Rows) -> Mixed:
    return Mixed(f"which was made of one of shape {tuple(x.shape)} by an operation along its axis of rows, {fact.axis}")


# --- the entries of the axis of rows ----------------------------------------------------------------------------------


def _cut(fact: Rows, index: slice, device: torch.device) -> Any:
    """The rows of a slice of the axis of rows."""
    start, stop, step = index.indices(fact.size)
    whole = fact.run * fact.inner
    if start == 0 and stop == fact.size and step == 1:
        return fact
    if step == 1 and start % whole == 0 and (stop - start) % whole == 0 and stop > start:
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
    size = fact.run
    if not size or 0 in new:
        return UNKNOWN
    before = 1
    for axis, n in enumerate(new):
        after = _product(new[axis + 1 :])
        if before * n >= left * size and before <= left:
            if not after or left % before or right % after or n != left // before * size * (right // after):
                break
            return fact._replace(axis=axis, outer=left // before, inner=right // after)
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
    return _aligned(fact, x, result.dim()) if isinstance(fact, Rows) else _repeated_for_all(tracker, fact, x, result)


def _repeated_for_all(tracker: Tracker, fact: Any, x: Tensor, result: Tensor) -> Any:
    """A constant that is repeated as often as the batch has rows, on the batch dimension, is repeated for them."""
    if fact is not NONE:
        return fact
    rows, at = tracker.rows, tracker.dim + x.dim() - result.dim()
    if rows is None or tracker.dim >= result.dim() or result.shape[tracker.dim] != rows or (at >= 0 and x.shape[at] != 1):
        return NONE
    return Rows(tracker.dim, rows, sure=False)


def _repeated(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return _repeated_for_all(tracker, fact, x, result)
    axis = fact.axis + result.dim() - x.dim()
    times = result.shape[axis] // max(x.shape[fact.axis], 1)
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
    if isinstance(repeats, int):
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
    where = [i for i, dim in enumerate(listed) if dim % max(x.dim(), 1) == fact.axis]
    if not where and listed:
        return fact
    stand = entries(fact, x.device)
    if func in _FLIPS:
        return ordered(fact, stand.flip(0))
    shifts = _argument(args, kwargs, 1, "shifts")
    if not listed:
        return _lost(x, fact)
    shift = shifts if isinstance(shifts, int) else sum(shifts[i] for i in where)
    return ordered(fact, stand.roll(shift))


_FLIPS = (torch.flip, torch.Tensor.flip)


# --- joining and cutting ----------------------------------------------------------------------------------------------


def _concatenated(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    pieces = _argument(args, kwargs, 0, "tensors")
    dim = _argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % result.dim()
    pieces = [piece for piece in pieces if piece.shape != (0,)]
    facts = [_of(tracker, piece) for piece in pieces]
    if len(facts) > 1 and all(isinstance(fact, Part) for fact in facts):
        if all(fact.row == facts[0].row for fact in facts):
            return facts[0]
        return ordered(
            facts[0].over(dim, 1), torch.cat([f.over(0, p.shape[dim]).order for f, p in zip(facts, pieces, strict=True)])
        )
    facts = [f.over(dim, p.shape[dim]) if isinstance(f, Part) else f for f, p in zip(facts, pieces, strict=True)]
    along = [fact for fact in facts if isinstance(fact, Rows) and fact.axis == dim]
    if not along:
        return _joined(tracker, facts)
    if len(along) < len(facts):
        return Mixed("which joins rows of the batch with entries that belong to no row")
    if any(fact.count != along[0].count for fact in along):
        return Mixed("which joins batches of different sizes")
    if all(fact.order is along[0].order and fact.inner == along[0].inner for fact in along):
        return along[0]._replace(outer=sum(fact.outer for fact in along))
    return ordered(along[0], torch.cat([entries(fact, result.device) for fact in along]))


def _joined_on(axis: int, least: int) -> Handler:
    """hstack and its kin: cat() along an axis of pieces that have got axes of one."""

    def handler(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
        pieces = list(_argument(args, kwargs, 0, "tensors"))
        dim = 0 if axis == 1 and result.dim() == 1 else axis
        if any(piece.dim() < least for piece in pieces):
            return UNKNOWN
        return _concatenated(tracker, (pieces, dim), {}, result)

    return handler


def _stacked(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    pieces = _argument(args, kwargs, 0, "tensors")
    dim = _argument(args, kwargs, 1, "dim", 0) % result.dim()
    facts = [_of(tracker, piece) for piece in pieces]
    if all(isinstance(fact, Part) for fact in facts):
        return ordered(facts[0].over(dim, 1), torch.tensor([fact.row for fact in facts]))
    fact = _joined(tracker, facts)
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
    return _dropped(fact, dim, x) if dim != fact.axis else [_part(fact, i) for i in range(len(result))]


def _part(fact: Rows, index: Any) -> Any:
    """The fact of ``x[index]``, of the axis of rows."""
    if isinstance(index, Tensor) and (torch.compiler.is_compiling() or _C._functorch.is_functorch_wrapped_tensor(index)):
        return Mixed("which is a part of one row")
    at = int(index) % fact.size
    run = at // fact.inner % fact.run
    return Part(run if fact.order is None else int(fact.order[run]), fact.count)


def _dropped(fact: Rows, dim: int, x: Tensor) -> Any:
    """The fact where an axis is gone."""
    if dim == fact.axis:
        return Mixed(f"which is a part of one row of an input of shape {tuple(x.shape)}")
    return fact._replace(axis=fact.axis - (dim < fact.axis))


def _selected(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    dim = _argument(args, kwargs, 1, "dim") % x.dim()
    return _dropped(fact, dim, x) if dim != fact.axis else _part(fact, _argument(args, kwargs, 2, "index"))


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
                return _part(fact, item)
            axis += 1
    rows_in_index = [of for of in (_of(tracker, item) for item in advanced) if isinstance(of, Rows)]
    if isinstance(found, Rows) and rows_in_index:
        if not first <= found.axis < first + max(wide, 1):
            return Mixed("which was indexed by rows along another axis")
        if any(item.dtype != torch.bool for item in advanced):
            placed = [
                of._replace(axis=of.axis + first + wide - item.dim())
                for item in advanced
                if item.dtype != torch.bool and isinstance(of := _of(tracker, item), Rows)
            ]
            return _joined(tracker, [found, *placed])
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
    """x[...] = y: a tensor that is filled with rows has them, and one with rows keeps them if each gets what is its own."""
    x, index, value = args
    if isinstance(value, Tensor) and type(value) is not PerturbedWeight:
        tracker.note(x, _written(tracker, x, index, value, _of(tracker, x), _of(tracker, value)))
    return None


def _written(tracker: Tracker, x: Tensor, index: Any, value: Tensor, fact: Any, of_value: Any) -> Any:
    if isinstance(of_value, Part):
        items = list(index) if isinstance(index, tuple) else [index]
        if all(isinstance(item, (int, slice)) for item in items):
            whole = [axis for axis, item in enumerate(items) if isinstance(item, int)]
            axis = fact.axis if isinstance(fact, Rows) else whole[0] if whole else 0
            if axis in whole:
                return _placed(tracker, x, axis, torch.tensor([items[axis] % x.shape[axis]]), fact, of_value.over(axis, 1))
    if isinstance(of_value, Mixed):
        return fact if of_value is NONE else _of_statistic(fact) if of_value is BATCH else of_value
    if of_value is UNKNOWN or (isinstance(fact, Mixed) and fact is not NONE):
        return fact
    items = list(index) if isinstance(index, tuple) else [index]
    part = x[index]
    if isinstance(fact, Rows):
        of_part = _indexed(tracker, (x, index), {}, part)
        of_value = _aligned(of_value, value, part.dim())
        if isinstance(of_part, Rows) and (value.dim() == 0 or tracker.agree(of_part, of_value)):
            return fact
    advanced = [i for i, item in enumerate(items) if isinstance(item, (Tensor, list))]
    filled: list[Any] = []
    for item in items:
        width = sum(_width(each) for each in items)
        filled += [slice(None)] * (x.dim() - width) if item is Ellipsis else [item]
    filled += [slice(None)] * (x.dim() - sum(_width(item) for item in filled))
    if not advanced and all(isinstance(item, (int, slice)) for item in filled):
        kept = [axis for axis, item in enumerate(filled) if isinstance(item, slice)]
        at = of_value.axis + len(kept) - value.dim() if not isinstance(fact, Rows) else of_value.axis
        axis = kept[at]
        return _placed(tracker, x, axis, torch.arange(x.shape[axis])[filled[axis]], fact, of_value)
    if len(advanced) == 1 and all(isinstance(item, (int, slice, Tensor, list)) for item in filled):
        where = filled.index(next(item for item in filled if isinstance(item, (Tensor, list))))
        picked = torch.as_tensor(filled[where], device=x.device)
        kept = [axis for axis, item in enumerate(filled) if not isinstance(item, int)]
        at = of_value.axis + len(kept) - value.dim() if not isinstance(fact, Rows) else of_value.axis
        if picked.dim() == 1:
            stand = torch.arange(x.shape[kept[at]], device=x.device)
            return _placed(tracker, x, kept[at], stand[picked if kept[at] == where else filled[kept[at]]], fact, of_value)
    return Mixed("into which rows were written at places that cannot be followed")


def _of_statistic(fact: Any) -> Any:
    return BATCH if fact is NONE else fact


def _placed(tracker: Tracker, x: Tensor, axis: int, index: Tensor, fact: Any, source: Rows) -> Any:
    """The fact of ``x`` after rows of ``source`` were put, or added, at entries ``index`` of its axis."""
    if torch.compiler.is_compiling():
        return UNKNOWN
    size, device = x.shape[axis], index.device
    wanted = tracker.owners(source, device)
    if len(wanted) != len(index):
        return Mixed("into which rows were written at places that cannot be followed")
    if isinstance(fact, Rows):
        agree = fact.axis == axis and torch.equal(tracker.owners(fact, device)[index], wanted)
        return fact if agree else Mixed(f"in which entries of axis {axis} were made of rows of different members")
    else:  # zeros, say: as many entries for each row
        inner, left = divmod(size, source.count)
        guess = Rows(axis, source.count, 1, inner)
        if not left and inner and torch.equal(tracker.owners(guess, device)[index], wanted):
            return guess
    order = torch.full((size,), -1, device=device)
    order[index] = entries(source, device)
    full = Rows(axis, source.count, order=order.clamp(min=0))
    if bool((order >= 0).all()) and torch.equal(tracker.owners(full, device)[index], wanted):
        return ordered(source, order, axis)
    return Mixed(f"in which entries of axis {axis} were made of rows of different members, or of none")


def _put(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """index_put(input, indices, values, accumulate)."""
    x, indices, value = args[0], _argument(args, kwargs, 1, "indices"), _argument(args, kwargs, 2, "values")
    before, of_value = _of(tracker, x), _of(tracker, value)
    return _written(tracker, result, tuple(indices), value, before, of_value)


def _scattered_at(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """scatter(input, dim, index, src) and its kin: along the rows, each entry must be given what belongs to its own member."""
    x = args[0]
    dim, index = _argument(args, kwargs, 1, "dim") % max(x.dim(), 1), _argument(args, kwargs, 2, "index")
    source = _argument(args, kwargs, 3, "src")
    source = kwargs.get("value") if source is None else source
    if not isinstance(source, Tensor) or source.dim() != x.dim():
        return _joined(tracker, [_of(tracker, x), _of(tracker, index) if _of(tracker, x) is not UNKNOWN else UNKNOWN])
    fact, of_source = _of(tracker, x), _of(tracker, source)
    along = [f for f in (fact, of_source) if isinstance(f, Rows) and f.axis == dim]
    if not along:
        return _along_dim(tracker, x, dim, [x, index, source])
    if not isinstance(of_source, Rows) or of_source.axis != dim:
        return _lost(x, along[0]) if of_source is not NONE else fact
    if index.shape[dim] != source.shape[dim] or torch.compiler.is_compiling():
        return _lost(source, of_source)
    flat = index.movedim(dim, 0).flatten(1)
    first = flat[:, 0]
    if bool((flat == first.unsqueeze(1)).all()):
        return _placed(tracker, result, dim, first, fact, of_source)
    stand = fact if isinstance(fact, Rows) else Rows(dim, of_source.count, 1, x.shape[dim] // of_source.count)
    if stand.axis == dim and stand.size == x.shape[dim]:
        given = tracker.owners(stand, index.device)[flat]
        if torch.equal(given, tracker.owners(of_source, index.device).unsqueeze(1).expand_as(given)):
            return stand
    return _lost(source, of_source)


def _filled_in(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """masked_scatter(input, mask, source): the entries of the source, one after the other, where the mask is set."""
    x, mask, source = args[0], _argument(args, kwargs, 1, "mask"), _argument(args, kwargs, 2, "source")
    fact, of_source = _of(tracker, x), _of(tracker, source)
    if not isinstance(of_source, Rows):
        return _joined(tracker, [fact, of_source])
    if isinstance(fact, Rows) and not torch.compiler.is_compiling():
        own = tracker.owners(fact, x.device).view([-1 if axis == fact.axis else 1 for axis in range(x.dim())])
        theirs = tracker.owners(of_source, x.device).view([-1 if axis == of_source.axis else 1 for axis in range(source.dim())])
        wanted = own.expand(x.shape)[mask.expand(x.shape)]
        if torch.equal(wanted, theirs.expand(source.shape).flatten()[: len(wanted)]):
            return fact
    return Mixed("into which rows were scattered by a mask, not each its own")


def _along(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """Gathers, scatters, sorts and running sums along a dimension: along the rows they mix them."""
    x, _ = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 1, "dim", -1)
    if not isinstance(dim, int):
        dim = kwargs.get("dim", -1)
    return _along_dim(tracker, x, dim, [t for t in _operands(args, kwargs) if t.dim() == x.dim()])


def _along_dim(tracker: Tracker, x: Tensor, dim: int, operands: list[Tensor]) -> Any:
    facts = [_of(tracker, t) for t in operands]
    for t, fact in zip(operands, facts, strict=True):
        if isinstance(fact, Rows) and dim % max(x.dim(), 1) == fact.axis:
            return _lost(t, fact)
    return _joined(tracker, facts)


def _taken(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """take_along_dim(input, indices, dim)."""
    x, index, dim = args[0], _argument(args, kwargs, 1, "indices"), _argument(args, kwargs, 2, "dim")
    return _scattered(tracker, args, kwargs, result) if dim is None else _along_dim(tracker, x, dim, [x, index])


def _added_at(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """index_add and index_copy: along the rows, each entry must be given what belongs to its own member."""
    x, fact = _first(tracker, args, kwargs)
    dim = _argument(args, kwargs, 1, "dim") % x.dim()
    index, source = _argument(args, kwargs, 2, "index"), _argument(args, kwargs, 3, "source")
    of_source = _of(tracker, source)
    if not isinstance(of_source, Rows) or of_source.axis != dim:
        return (
            _lost(x, fact)
            if isinstance(fact, Rows) and fact.axis == dim and of_source is not NONE
            else _joined(tracker, [fact, of_source])
        )
    return _placed(tracker, result, dim, index, fact, of_source)


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
    """as_strided: the axis along which the memory holds one row after the other, read off a memory of their numbers."""
    x, fact = _first(tracker, args, kwargs)
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
        return BATCH
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)} or set(range(x.dim()))
    if fact.axis in dims:
        return BATCH
    return fact if y.dim() == x.dim() else fact._replace(axis=fact.axis - sum(d < fact.axis for d in dims))


def _normed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """norm(x, p, dim): the order comes first."""
    rest = (args[0], *args[2:])
    return _reduced(tracker, rest, {k: v for k, v in kwargs.items() if k in ("dim", "keepdim")}, result)


def _multiplied(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """a @ b."""
    a, b = _operands(args, kwargs)[:2]
    return _joined(tracker, [_left_factor(_of(tracker, a), a, b, result), _right_factor(_of(tracker, b), a, b, result)])


def _distances(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """cdist: rows of points stand on the last axis but one, those of the points they are compared with on the last."""
    a, b = _operands(args, kwargs)[:2]
    of_a, of_b = _of(tracker, a), _of(tracker, b)
    if isinstance(of_a, Rows):
        of_a = _lost(a, of_a) if of_a.axis == a.dim() - 1 else of_a._replace(axis=of_a.axis + result.dim() - a.dim())
    if isinstance(of_b, Rows):
        last = of_b.axis == b.dim() - 2
        of_b = _lost(b, of_b) if of_b.axis == b.dim() - 1 else of_b._replace(axis=of_b.axis + result.dim() - b.dim() + last)
    return _joined(tracker, [of_a, of_b])


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
    fact, of_table = _of(tracker, index), _of(tracker, table)
    if isinstance(of_table, Rows):
        return _index_selected(tracker, (table, 0, index), {}, result) if index.dim() == 1 else _lost(table, of_table)
    if of_table is not NONE and isinstance(of_table, Mixed):
        return of_table
    return fact if fact is not NONE or of_table is NONE else UNKNOWN


def _bags(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    index, offsets = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 2, "offsets")
    return _of(tracker, index if index.dim() == 2 else offsets)


def _attended(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """scaled_dot_product_attention: the batch axes of queries, keys and values."""
    operands = _operands(args, kwargs)
    facts = [_aligned(_of(tracker, x), x, result.dim()) for x in operands]
    fact = _joined(tracker, facts)
    return _lost(operands[0], fact) if isinstance(fact, Rows) and fact.axis >= result.dim() - 2 else fact


def _multi_head(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    operands = _operands(args, kwargs)[:3]
    fact = _joined(tracker, [_of(tracker, x) for x in operands])
    if isinstance(fact, Rows) and fact.axis != operands[0].dim() - 2:
        fact = _lost(operands[0], fact)
    return [fact, fact._replace(axis=0) if isinstance(fact, Rows) else fact]


def _recurrent(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """torch.lstm and its kin: the output stands as the input, final states have the sequences on axis 1."""
    x, fact = _first(tracker, args, kwargs)
    if not isinstance(fact, Rows):
        return fact
    if x.dim() == 2 and (isinstance(args[1], Tensor) and args[1].dim() == 1):  # packed
        first = int(args[1][0])
        states = Rows(1, fact.count, order=entries(fact, x.device)[:first])
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
    if not isinstance(fact, Rows):
        return fact
    axis = 0 if args[2] else 1
    return [ordered(fact, entries(fact, args[0].device)[: int(sizes[0])], axis), NONE]


def _fresh(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """new_zeros and its kin: of the operand they have the dtype and the device."""
    return FRESH


def _random(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return UNKNOWN


def _constant(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    return NONE if not _operands(args, kwargs) else UNKNOWN


def _filled(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """zeros_like and its kin: a tensor in the shape of one with rows has them; in the shape of anything else, it may."""
    _, fact = _first(tracker, args, kwargs)
    return fact if isinstance(fact, Rows) and fact.order is None else FRESH


def _filled_at_random(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    fact = _filled(tracker, args, kwargs, result)
    return UNKNOWN if fact is FRESH else fact


# --- the families -----------------------------------------------------------------------------------------------------


def _functions(names: str) -> Iterable[Any]:
    """The functions and methods of torch with the given names, and their in-place forms."""
    for name in names.split():
        for home in (
            torch,
            torch.Tensor,
            F,
            torch.special,
            torch.linalg,
            _C._nn,
            torch._VF,
            torch._C.TensorBase,
            torch.functional,
        ):
            for form in (name, f"{name}_"):
                found = getattr(home, form, None)
                if callable(found):
                    yield found


def _register(handler: Handler, names: str) -> None:
    for function in _functions(names):
        _HANDLERS[function] = handler


_ELEMENTWISE = """abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin
acos atan
arcsin arccos arctan sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc erfinv relu relu6 elu selu celu gelu silu mish softplus
softsign hardtanh hardswish hardsigmoid leaky_relu tanhshrink softshrink hardshrink threshold logsigmoid rrelu prelu dropout
dropout1d
dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout native_dropout clamp clip clamp_min clamp_max round
floor ceil
trunc fix frac sign sgn isnan isinf isfinite nan_to_num add sub subtract mul multiply div divide true_divide floor_divide
remainder fmod
pow float_power maximum minimum fmax fmin lerp addcmul addcdiv where eq ne lt le gt ge not_equal equal greater less greater_equal
less_equal logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor masked_fill atan2 hypot
copysign float double half bfloat16 int long short bool clone contiguous detach cpu cuda fill zero normal
uniform bernoulli exponential real conj angle complex polar rsub heaviside deg2rad rad2deg digamma lgamma
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__
__idiv__ __pow__ __rpow__ __ipow__ __neg__ __abs__ __invert__ __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __eq__ __ne__ __lt__
__le__ __gt__ __ge__ __mod__ __floordiv__ __rand__ __ror__ pin_memory requires_grad triu tril"""

_register(_elementwise, _ELEMENTWISE)
_register(_filled, "zeros_like ones_like full_like empty_like")
_register(_filled_at_random, "rand_like randn_like randint_like")
_register(_cast, "to type type_as view_as_real view_as_complex")
_register(_copied, "copy")
_register(_fresh, "new_zeros new_ones new_full new_empty zeros ones full empty")
_register(_random, "new_tensor rand randn randint randperm")
_register(_across(1), "softmax log_softmax softmin")
_register(_across(4, -1), "gumbel_softmax")
_register(_across(2, 1), "normalize")
_register(_across(1, -1), "glu diff")
_register(_beyond, "layer_norm rms_norm native_layer_norm")
_register(_before(1), "group_norm local_response_norm")
_register(_before(2), "instance_norm batch_norm")
_register(_compared, "cosine_similarity pairwise_distance")
_register(
    _scattered,
    "take masked_select cov corrcoef unique unique_consecutive nonzero argwhere bincount histc cartesian_prod combinations pdist "
    "block_diag",
)
_register(
    _matrixwise,
    "inverse inv pinv pinverse qr svd svdvals cholesky eigh eigvalsh eig eigvals det slogdet logdet matrix_exp matrix_power "
    "matrix_norm solve lstsq lu_factor cond matrix_rank",
)
_register(_joined_on(1, 2), "hstack")
_register(_joined_on(0, 2), "vstack row_stack")
_register(_joined_on(1, 2), "column_stack")
_register(_joined_on(2, 3), "dstack")
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
_register(_along, "gather cumsum cumprod cummax cummin logcumsumexp sort argsort")
_register(_added_at, "index_add index_copy index_reduce")
_register(_scattered_at, "scatter scatter_add scatter_reduce")
_register(_put, "index_put")
_register(_filled_in, "masked_scatter")
_register(_along, "index_fill")
_register(_taken, "take_along_dim")
_register(_ranked, "topk kthvalue")
_register(_padded, "pad constant_pad_nd")
_register(_windowed, "unfold")
_HANDLERS[F.unfold] = _HANDLERS[F.fold] = _leading
_register(_strided, "as_strided")
_register(
    _reduced,
    "sum mean amax amin max min var std prod logsumexp any all argmax argmin median nanmedian mode nansum nanmean std_mean "
    "var_mean aminmax count_nonzero",
)
_register(_normed, "norm vector_norm")
_register(_multiplied, "matmul bmm mm mv dot inner __matmul__")
_register(_distances, "cdist")
_register(_reflected_product, "__rmatmul__")
_register(_added_product, "addmm baddbmm addmv")
_register(_linear, "linear")
_register(_bilinear, "bilinear")
_register(_einsum, "einsum")
_register(
    _leading,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d lp_pool1d lp_pool2d interpolate upsample grid_sample pixel_shuffle pixel_unshuffle one_hot multinomial "
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
for _property in ("mT", "H", "mH"):
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


def _reversed(tracker: Tracker, args: Any, kwargs: Any, result: Any) -> Any:
    """.T: all axes in the other order."""
    x, fact = _first(tracker, args, kwargs)
    return fact._replace(axis=x.dim() - 1 - fact.axis) if isinstance(fact, Rows) else fact


_HANDLERS[torch.Tensor.T.__get__] = _reversed  # type: ignore[attr-defined]
_register(_mirrored, "t adjoint")


def _with_function(handler: Any, names: str) -> None:
    for function in _functions(names):
        _HANDLERS[function] = lambda t, a, k, r, _f=function: handler(t, a, k, r, _f)


_with_function(_moved, "permute movedim moveaxis")
_with_function(_rolled, "flip roll")
