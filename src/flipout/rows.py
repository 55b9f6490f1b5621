"""Whose rows? Which axis of a tensor holds the examples of a batch, and which member of a draw each of them belongs to."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from flipout.errors import BatchError

__all__ = [
    "Layout",
    "Mixed",
    "Part",
    "Rows",
    "Tracker",
    "batch_device",
    "count_rows",
    "entries",
    "first_batch",
    "ordered",
    "own_rows_dim",
    "require_blocks",
    "rows_dim",
]


class Rows(NamedTuple):
    """Where the rows of a batch stand in a tensor: axis ``axis`` has ``outer * count * inner`` entries, in this order.

    Attributes:
        axis: which axis.
        count: the rows of the batch.
        outer: how often the whole batch stands there, one after the other (``[T, N]`` folded into ``T * N``).
        inner: how many entries in a run belong to each row (``[N, T]`` folded into ``N * T``).
        order: the row of each entry of a run, where they stand in another order than 0, 1, … ``count - 1``; ``outer`` and ``inner``
            then say how often that run stands there, and how many entries each of its entries has become.
        sure: False for what was read off sizes alone, which gives way to what was followed.
        weight: the name of the weight that was taken to be expanded to the rows; else None.
    """

    axis: int
    count: int  # type: ignore[assignment]  # tuples have a method of this name
    outer: int = 1
    inner: int = 1
    order: Tensor | None = None
    sure: bool = True
    weight: str | None = None

    @property
    def size(self) -> int:
        """Entries of the axis."""
        return self.outer * self.run * self.inner

    @property
    def run(self) -> int:
        """Entries of a run of the batch."""
        return self.count if self.order is None else len(self.order)

    @property
    def blocks(self) -> bool:
        """Whether the entries of each row stand together, and the rows in their order."""
        return self.outer == 1 and self.order is None

    def same(self, other: Rows) -> bool:
        """Whether the rows of two tensors stand alike."""
        return self[1:4] == other[1:4] and self.axis == other.axis and self.order is other.order


class Mixed(NamedTuple):
    """The fact that a tensor's entries depend on several rows, or stand where they cannot be followed; with the reason."""

    why: str


class Part(Mixed):
    """The fact that all entries of a tensor belong to one row, of which it is a part: ``x[i]``."""

    row: int
    count: int  # type: ignore[assignment]

    def __new__(cls, row: int, count: int) -> Part:
        part: Part = super().__new__(cls, "which is a part of one row")
        part.row, part.count = row, count
        return part

    def over(self, axis: int, size: int) -> Rows:
        """The same for an axis with ``size`` entries."""
        return Rows(axis, self.count, order=torch.full((size,), self.row))


#: The fact that a tensor belongs to no row: a parameter, a buffer, positions, a statistic of the whole batch.
NONE = Mixed("")
#: The fact that a tensor is a statistic over rows of the batch: as NONE where it meets rows, but no constant.
BATCH = Mixed("which is a statistic over rows of the batch")
#: The fact that nothing is known of a tensor that was met.
UNKNOWN = object()
#: The fact that a tensor was filled with one number: a constant, until rows are written into it.
FRESH = object()
#: Returned for a tensor that was not met.
UNSEEN = None


class Tracker:
    """What is known of the tensors that a call has met: weights, and where the rows of its data stand.

    Tensors are known by identity and are not kept alive. A compiler traces plain dictionaries only; what it traces has no memory.

    Args:
        members: N of the draw.
        owner: the member of each row, where rows are not in member-major blocks.

    Attributes:
        rows: the rows of the call's input, on its dimension ``dim``.
        logs: where to note what rules are told.
        replay: what rules were told when they ran first.
    """

    def __init__(
        self, members: int | None = None, owner: Tensor | None = None, logs: list[Any] | None = None, replay: Any = None
    ) -> None:
        self.members, self.owner = members, owner
        self.rows: int | None = None
        self.dim = 0
        self.logs: list[Any] = [] if logs is None else logs
        self.replay = replay
        self._facts: dict[int, tuple[Any, Any]] = {}
        self._traced: dict[Tensor, Any] | None = {} if torch.compiler.is_compiling() else None
        self.landed: Rows | None = None

    def consult(self, tensor: Tensor) -> Any:
        """:meth:`find` for a rule: what it is told is noted for a second run of the same operations, and repeated there."""
        fact = self.find(tensor) if self.replay is None else self.replay.next_fact()
        for notes in self.logs:
            notes.facts.append(fact)
        return fact

    def find(self, tensor: Tensor) -> Any:
        """The fact that was noted of a tensor: Rows, Mixed, NONE, the number of a weight; UNSEEN if there is none."""
        if self._traced is not None:
            return self._traced.get(tensor, UNSEEN)
        entry = self._facts.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else UNSEEN

    def note(self, tensor: Tensor, fact: Any) -> None:
        """Notes a fact of a tensor."""
        if self._traced is not None:
            self._traced[tensor] = fact
        else:
            self._facts[id(tensor)] = (weakref.ref(tensor), fact)

    def learn(self, facts: dict[int, tuple[Any, Any]]) -> None:
        """Notes many facts at once: a reference to each tensor, by its id, and its fact."""
        self._facts.update(facts)

    def owners(self, fact: Rows, device: torch.device) -> Tensor:
        """The member of each entry on the axis of rows."""
        rows = entries(fact, device)
        if self.owner is not None:
            return self.owner.to(device)[rows]
        return torch.div(rows, fact.count // max(self.members or 1, 1), rounding_mode="floor")

    def owner_of(self, part: Part) -> int:
        """The member of a part of one row."""
        return int(self.owner[part.row]) if self.owner is not None else part.row // (part.count // max(self.members or 1, 1))

    def agree(self, a: Rows, b: Rows) -> bool:
        """Whether entries of two tensors that meet each other belong to the same members."""
        if a.same(b):
            return True
        if a.axis != b.axis or a.size != b.size or a.count != b.count or torch.compiler.is_compiling():
            return False
        if a.order is None and b.order is None and self.owner is None:
            return False
        orders = [fact.order for fact in (a, b) if fact.order is not None]
        device = orders[0].device if orders else torch.device("cpu")
        return bool(torch.equal(self.owners(a, device), self.owners(b, device)))

    def forget_the_dead(self) -> None:
        """Drops what was noted of tensors that are gone, where it has become much."""
        if len(self._facts) > 4096:
            self._facts = {key: entry for key, entry in self._facts.items() if entry[0]() is not None}


def entries(fact: Rows, device: torch.device) -> Tensor:
    """The row of each entry of the axis of rows."""
    run = torch.arange(fact.count, device=device) if fact.order is None else fact.order
    if fact.inner != 1:
        run = run.repeat_interleave(fact.inner)
    return run if fact.outer == 1 else run.repeat(fact.outer)


def ordered(fact: Rows, order: Tensor, axis: int | None = None) -> Rows:
    """Rows in another order; where the processor can read that it is the plain one, that."""
    axis = fact.axis if axis is None else axis
    readable = order.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if readable and order.numel() % max(fact.count, 1) == 0 and order.numel():
        plain = torch.arange(fact.count)
        for inner in {1, order.numel() // fact.count}:
            if torch.equal(order, plain.repeat_interleave(inner).repeat(order.numel() // (fact.count * inner))):
                return Rows(axis, fact.count, order.numel() // (fact.count * inner), inner)
    return Rows(axis, fact.count, order=order)


class _AtHand(threading.local):
    """The tracker of the call whose operation this thread is at."""

    def __init__(self) -> None:
        self.tracker: Tracker | None = None


AT_HAND = _AtHand()


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which rows of a tensor belong to which member.

    Attributes:
        members: N, the number of different weights; None where each token draws its own (``granularity="token"``).
        rows: the rows of the module's own input on ``dim``: a multiple of N, in member-major blocks; None if unknown.
        dim: the batch dimension of the module's own input.
        owner: the member of each row, ``[rows]``, where rows are not in member-major blocks.
        followed: whether to ask the tracker of the operation at hand where an operand's rows stand.
        place: where the rows of the operand at hand stand, whatever it is; None to ask the tracker.
    """

    members: int | None
    rows: int | None
    dim: int
    owner: Tensor | None = None
    followed: bool = False
    place: Rows | None = None

    @property
    def tracker(self) -> Tracker | None:
        """What follows the rows through the call that the operation at hand belongs to; None where nothing does."""
        return AT_HAND.tracker if self.followed else None

    def where(self, x: Tensor, features: int, what: str) -> tuple[Tensor, Rows]:
        """Finds the rows of ``x``, given that its last ``features`` axes hold none.

        An operand that all examples share (size 1 on the batch dimension) is expanded to the rows.

        Returns:
            ``x`` and where its rows stand.

        Raises:
            BatchError: if no axis can hold the rows, or more than one can.
        """
        if self.members is None:
            raise BatchError(
                f'{what} has no weights per token; granularity="token" serves linear, embedding and pointwise operations'
            )
        fact = self.known(x)
        free = x.dim() - features
        if isinstance(fact, Part) and free > 0:
            fact = fact.over(0, x.shape[0])
        if isinstance(fact, Mixed) and fact is not NONE:
            raise BatchError(f"{what} got an input of shape {tuple(x.shape)} {fact.why}. {_WAYS_OUT}")
        if not isinstance(fact, Rows):
            x, fact = self._by_size(x, free, fact is NONE, what, fact is FRESH)
        elif fact.axis >= free:
            raise BatchError(
                f"{what} got an input of shape {tuple(x.shape)} whose rows stand on axis {fact.axis}, which it reads as features. "
                f"{_WAYS_OUT}"
            )
        if self.tracker is not None:
            self.tracker.landed = fact
        return x, fact

    def known(self, x: Tensor) -> Any:
        """What is known of an operand: Rows, Mixed, NONE, or nothing (UNKNOWN, UNSEEN)."""
        if self.place is not None or self.tracker is None:
            return self.place
        fact = self.tracker.consult(x)
        return NONE if fact is BATCH else fact

    def settled(self, x: Tensor) -> Rows | None:
        """Where the rows of a matrix stand, if they are known to be its first axis, one for each member in their order.

        The short way of :meth:`where`. It notes nothing for a second run, so it answers None where one may follow.
        """
        tracker = self.tracker
        if tracker is None or self.place is not None or self.owner is not None or tracker.logs or tracker.replay is not None:
            return None
        fact = tracker.find(x)
        if type(fact) is not Rows or fact.axis or fact.inner != 1 or not fact.blocks or fact.count != self.members:
            return None
        tracker.landed = fact
        return fact

    def constant(self, x: Tensor) -> bool:
        """Whether an operand is known to be the same whatever the rows are: a parameter, a buffer, positions."""
        return self.place is None and self.tracker is not None and self.tracker.consult(x) is NONE

    def locate(self, x: Tensor, features: int, what: str) -> tuple[Tensor, int]:
        """As :meth:`where`, for rules that want the rows in member-major blocks.

        Returns:
            ``x`` and the axis; the axis has ``k * members`` rows in member-major blocks.

        Raises:
            BatchError: as :meth:`where`; where the rows stand in another order.
        """
        x, place = self.where(x, features, what)
        if self.index(place) is not None:
            raise BatchError(
                f"{what} got an input of shape {tuple(x.shape)} whose rows stand in another order than the members, which its rule "
                f"does not serve. {_WAYS_OUT}"
            )
        return x, place.axis

    def index(self, place: Rows) -> Tensor | None:
        """The member of each entry on the axis of a place; None where they stand in member-major blocks."""
        if place.blocks and self.owner is None:
            return None
        assert self.members is not None
        device = place.order.device if place.order is not None else torch.device("cpu") if self.owner is None else self.owner.device
        rows = entries(place, device)
        if self.owner is not None:
            return self.owner.to(device)[rows]
        return torch.div(rows, place.count // max(self.members, 1), rounding_mode="floor")

    def _by_size(self, x: Tensor, free: int, shared: bool, what: str, fresh: bool = False) -> tuple[Tensor, Rows]:
        """The rows of an operand that was not followed: one axis may have their number, or it may be shared."""
        members, rows, dim = self.members or 1, self.rows, self.dim
        sizes = x.shape[: max(free, 0)]
        fits = [axis for axis, size in enumerate(sizes) if (size == rows if rows is not None else size and size % members == 0)]
        if not shared:
            if len(fits) == 1 or (fits and self.tracker is None) or (fresh and dim in fits):
                axis = dim if dim in fits else fits[0]
                return x, Rows(axis, sizes[axis] if rows is None else rows, sure=False)
            if fits:
                raise BatchError(
                    f"{what} got an input of shape {tuple(x.shape)} of unknown origin, and axes {fits} have the {rows} rows of the "
                    f"batch each, so which of them holds the rows cannot be told. {_WAYS_OUT}"
                )
        for axis in (dim, 0):
            if axis < free and sizes[axis] == 1 and rows is not None and (axis == dim or free == 1):
                return x.expand(*sizes[:axis], rows, *x.shape[axis + 1 :]), Rows(axis, rows)
        folded = free == 1 and dim == 0 and self.tracker is None and not shared  # by a rule, in member-major blocks
        if folded and sizes[0] % max(rows or members, 1) == 0:
            return x, Rows(0, sizes[0])
        known = f"the module's own input has {rows if rows is not None else 'k·' + str(members)} rows on batch_dim={dim}"
        shape = f"an input of shape {tuple(x.shape)}"
        if shared:
            shape += ", which belongs to no row (a parameter, a buffer, positions, a statistic)"
        raise BatchError(
            f"{what} got {shape}, whose rows cannot be matched to the draw: {known}, for {members} members. What all examples "
            f"share needs a batch dimension of size 1. {_WAYS_OUT}"
        )

    def at(self, place: Rows) -> Layout:
        """The layout of an operand whose rows are known to stand at ``place``."""
        return replace(self, place=place)


_WAYS_OUT = (
    "Name the batch dimension or the argument that counts the rows (batch_dim=, rows=), say which member each row has "
    '(hold(members, owner=index)), exclude the parameter, or use Flipout(granularity="token") where rows are routed among examples'
)


# --- the rows of a call -----------------------------------------------------------------------------------------------


def first_batch(args: Any, kwargs: Any) -> Tensor | PackedSequence | None:
    """The first tensor or packed batch of sequences among a module's arguments that is more than a number.

    A scale or a time (a real number, 0-d or ``[1]``) counts no rows where a batch follows.
    """
    if args and isinstance(args[0], Tensor) and args[0].dim() > 1:
        return args[0]
    leaves = tree_leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    batches = [leaf for leaf in leaves if isinstance(leaf, (Tensor, PackedSequence))]
    return next((batch for batch in batches if not _is_number(batch)), batches[0] if batches else None)


def batch_device(batch: Tensor | PackedSequence) -> torch.device:
    """Where a batch lies."""
    return batch.data.device if isinstance(batch, PackedSequence) else batch.device


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.dim() == 0 or (value.dim() == 1 and len(value) == 1 and value.is_floating_point()))


def named_batch(module: nn.Module, rows: str | int, args: Any, kwargs: Any) -> Any:
    """The argument that ``rows=`` names, by position or by name."""
    if isinstance(rows, int):
        if rows >= len(args):
            raise BatchError(f"rows={rows}: {type(module).__name__} was called with {len(args)} positional arguments")
        return first_batch((args[rows],), {})
    if rows in kwargs:
        return first_batch((kwargs[rows],), {})
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    if rows in names and names.index(rows) < len(args):
        return first_batch((args[names.index(rows)],), {})
    raise BatchError(f"rows={rows!r}: {type(module).__name__} was called without such an argument; its arguments are {names}")


def count_rows(module: nn.Module, dim: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: str | int | None = None) -> int:
    """The rows of the argument that counts them on the batch dimension, or its packed sequences; one for an unbatched input."""
    first = first_batch(args, kwargs) if rows is None else named_batch(module, rows, args, kwargs)
    if first is None:
        raise BatchError(f"{type(module).__name__} was called without a tensor, so its examples cannot be counted")
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])
    if first.dim() == unbatched_rank(module):
        return 1
    if rows is None and first.dim() == 1 and len(first) == 1:
        _require_no_larger(module, dim, args, kwargs)
    if first.dim() <= dim:
        raise BatchError(
            f"the first tensor argument of {type(module).__name__} has shape {tuple(first.shape)}, which has no dimension "
            f"batch_dim={dim}; give it a batch dimension, name the right one, or name the argument that counts the rows (rows=)"
        )
    return first.shape[dim]


def _require_no_larger(module: nn.Module, dim: int, args: Any, kwargs: Any) -> None:
    """Raises where a single index comes first and a batch of several rows may follow."""
    larger = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > max(dim, 1)]
    for other in larger:
        if other.shape[dim] > 1:
            raise BatchError(
                f"the first tensor of {type(module).__name__} has one entry, and another has shape {tuple(other.shape)}: which "
                "of them counts the rows cannot be told; pass rows= with the name or the position of the argument that does"
            )


def require_blocks(rows: int, members: int | None, dim: int) -> None:
    """Raises BatchError where rows do not divide into members."""
    if members is not None and (rows % members or not rows):
        raise BatchError(
            f"the input has {rows} rows on batch_dim={dim}, which do not divide into the {members} members of the held draw; "
            f"give it {members} rows, or k·{members} in member-major blocks"
        )


def unbatched_rank(module: nn.Module) -> int | None:
    """The rank of one example without a batch dimension, where the first layer tells; else None."""
    module = _first_layer(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size) + 1
    if isinstance(module, (nn.Linear, nn.RNNCellBase)):
        return 1
    return 2 if isinstance(module, (nn.RNNBase, nn.MultiheadAttention, *_TRANSFORMERS)) else None


def rows_dim(module: nn.Module, batch_dim: int) -> int:
    """The dimension that counts the examples: a recurrent or attention module's own ``batch_first``, else ``batch_dim``."""
    own = own_rows_dim(module)
    return batch_dim if own is None else own


def own_rows_dim(module: nn.Module) -> int | None:
    """The batch dimension that a recurrent or attention module tells by its ``batch_first``; None of any other."""
    module = _first_layer(module)
    while isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.Transformer)):
        return 0 if module.batch_first else 1
    return None


def _first_layer(module: nn.Module) -> nn.Module:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module


_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
