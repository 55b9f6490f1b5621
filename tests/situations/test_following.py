"""Where the rows stand after an operation, told by the handlers of following and judged by what each entry depends on.

The law: where a handler says that entry i of an axis is of row n, changing all other rows leaves that entry as it was. It
may say that
it does not know, but not for the forms that models are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import flipout
from flipout.following import follow
from flipout.rows import BATCH, Part, Rows, Tracker, entries

Operation = Callable[[Tensor], Any]


class Following(TorchFunctionMode):
    """What a call does after each of its operations."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        follow(self.tracker, func, args, kwargs or {}, result)
        return result


def followed(operation: Operation, x: Tensor, fact: Rows) -> list[tuple[Tensor, Any]]:
    """The tensors that an operation returns, with what is known of them."""
    tracker = Tracker(fact.count)
    tracker.note(x, fact)
    with Following(tracker):
        result = operation(x)
    parts = [result] if isinstance(result, Tensor) else list(result)
    return [(part, tracker.find(part)) for part in parts if isinstance(part, Tensor)]


def changed(x: Tensor, fact: Rows, row: int, other: Tensor) -> Tensor:
    """``x`` with the entries of all rows but one taken from another tensor."""
    shape = [1] * x.dim()
    shape[fact.axis] = -1
    return torch.where((entries(fact, x.device) == row).view(shape), x, other)


def check(operation: Operation, x: Tensor, fact: Rows, must: bool = True, statistic: bool = False) -> None:
    """The law, for each tensor that the operation returns; ``must``: the rows have to be known."""
    found = followed(operation, x, fact)
    other = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    for at, (y, said) in enumerate(found):
        if must and not statistic:
            assert isinstance(said, Rows), (said, tuple(x.shape), fact, tuple(y.shape))
        if statistic:
            assert said is BATCH
        if isinstance(said, Part):
            z = operation(changed(x, fact, said.row, other))
            assert torch.equal(y, z if isinstance(z, Tensor) else [part for part in z if isinstance(part, Tensor)][at])
        if not isinstance(said, Rows):
            continue
        assert said.axis < y.dim()
        assert y.shape[said.axis] == said.size, (said, tuple(y.shape))
        assert said.count == fact.count
        stand = entries(said, y.device)
        for row in range(fact.count):
            again = operation(changed(x, fact, row, other))
            z = again if isinstance(again, Tensor) else [part for part in again if isinstance(part, Tensor)][at]
            index = (stand == row).nonzero().flatten()
            a, b = y.index_select(said.axis, index), z.index_select(said.axis, index)
            assert ((a == b) | ((a != a) & (b != b))).all(), (said, row, fact)


@st.composite
def placed(draw: Any, least: int = 1, most: int = 4, orders: bool = True, axes: Any = None) -> tuple[Tensor, Rows]:
    """A tensor and where its rows stand; other axes are often as long as the batch."""
    count, ndim = draw(st.integers(2, 5)), draw(st.integers(least, most))
    axis = draw(st.integers(0, ndim - 1) if axes is None else axes(ndim))
    outer, inner = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (count, 1), (1, count), (2, 3)]))
    fact = Rows(axis, count, outer, inner)
    if orders and draw(st.integers(0, 4)) == 0:
        fact = Rows(axis, count, order=torch.tensor(draw(st.permutations(range(count)))))
    shape = [draw(st.sampled_from([1, 2, 3, count, count])) for _ in range(ndim)]
    shape[axis] = fact.size
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))), fact


def other_axis(draw: Any, x: Tensor, fact: Rows) -> int:
    """An axis that holds no rows, counted from either end."""
    axes = [axis for axis in range(x.dim()) if axis != fact.axis]
    assume(axes)
    axis = draw(st.sampled_from(axes))
    return axis - x.dim() if draw(st.booleans()) else axis


def any_axis(draw: Any, x: Tensor) -> int:
    return draw(st.integers(-x.dim(), x.dim() - 1))


# --- views ------------------------------------------------------------------------------------------------------------


@given(st.data(), placed(1, 4))
def test_folds_and_back(data: Any, given_: tuple[Tensor, Rows]) -> None:
    """Neighbouring axes are folded into one, and unfolded as they were."""
    x, fact = given_
    first = data.draw(st.integers(0, x.dim() - 1))
    last = data.draw(st.integers(first, x.dim() - 1))
    folded = (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])
    unknown = [n if i != first else -1 for i, n in enumerate(folded)]
    for fold in (
        lambda t: t.reshape(folded),
        lambda t: t.view(unknown),
        lambda t: t.flatten(first, last),
        lambda t: torch.reshape(t, folded),
    ):
        check(fold, x, fact)
        check(lambda t, fold=fold: fold(t).view(x.shape), x, fact, must=fact.order is None)
        check(lambda t, fold=fold: fold(t).unflatten(first, x.shape[first : last + 1]), x, fact, must=fact.order is None)


@given(st.data(), placed(1, 4, orders=False))
def test_any_regrouping(data: Any, given_: tuple[Tensor, Rows]) -> None:
    """Regrouped in any way: nothing wrong is said, and what is merely folded is known."""
    x, fact = given_
    total, shape = x.numel(), []
    while total > 1 and len(shape) < 4:
        n = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
        shape.append(n)
        total //= n
    shape.append(total)
    check(lambda t: t.reshape(shape), x, fact, must=False)


@given(st.data(), placed(1, 4, orders=False))
def test_folded_rows_are_unfolded(data: Any, given_: tuple[Tensor, Rows]) -> None:
    """[outer·N·inner] into [outer, N, inner], and in part."""
    x, fact = given_
    for sizes in ([fact.outer, fact.count, fact.inner], [fact.outer, -1], [-1, fact.inner], [fact.outer * fact.count, fact.inner]):
        check(lambda t, sizes=sizes: t.unflatten(fact.axis, sizes), x, fact, must=fact.outer == 1 or sizes[0] == fact.outer)


@given(st.data(), placed())
def test_axes_of_one(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    at = data.draw(st.integers(-x.dim() - 1, x.dim()))
    check(lambda t: t.unsqueeze(at), x, fact)
    check(lambda t: t.unsqueeze(at).squeeze(at), x, fact)
    check(lambda t: t.squeeze(), x, fact)
    check(lambda t: t[None, ..., None], x, fact)
    check(lambda t: torch.squeeze(t, any_axis_of_one), x, fact) if (
        any_axis_of_one := next((i for i, n in enumerate(x.shape) if n == 1), None)
    ) is not None else None


@given(st.data(), placed())
def test_orders_of_axes(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    order = data.draw(st.permutations(range(x.dim())))
    a, b = any_axis(data.draw, x), any_axis(data.draw, x)
    check(lambda t: t.permute(order), x, fact)
    check(lambda t: t.permute(*order), x, fact)
    check(lambda t: torch.permute(t, order), x, fact)
    check(lambda t: torch.permute(input=t, dims=order), x, fact)
    check(lambda t: t.transpose(a, b), x, fact)
    check(lambda t: torch.transpose(t, dim0=a, dim1=b), x, fact)
    check(lambda t: t.swapaxes(a, b), x, fact)
    check(lambda t: torch.swapdims(t, a, b), x, fact)
    check(lambda t: t.movedim(a, b), x, fact)
    check(lambda t: torch.moveaxis(t, [a], [b]), x, fact)
    if x.dim() > 1:
        check(lambda t: t.mT, x, fact)
        check(lambda t: t.adjoint(), x, fact)
    if x.dim() == 2:
        check(lambda t: t.T, x, fact)
        check(lambda t: t.t(), x, fact)
        check(lambda t: torch.t(t), x, fact)
        check(lambda t: t.H, x, fact)


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")
@given(placed(3, 4))
def test_all_axes_reversed(given_: tuple[Tensor, Rows]) -> None:
    check(lambda t: t.T, *given_)


@given(st.data(), placed())
def test_repeats(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    lead = data.draw(st.lists(st.integers(1, 3), max_size=2))
    times = [data.draw(st.integers(1, 3)) for _ in range(x.dim())]
    k = data.draw(st.integers(1, 3))
    check(lambda t: t.expand(*lead, *t.shape), x, fact)
    check(lambda t: t.expand(*lead, *[-1] * t.dim()), x, fact)
    check(lambda t: torch.broadcast_to(t, (*lead, *t.shape)), x, fact)
    check(lambda t: t.repeat(*lead, *times), x, fact)
    check(lambda t: torch.tile(t, times), x, fact)
    check(lambda t: t.tile(times[-1]), x, fact)
    for dim in range(-x.dim(), x.dim()):
        check(lambda t, dim=dim: t.repeat_interleave(k, dim), x, fact)
        check(lambda t, dim=dim: torch.repeat_interleave(t, k, dim=dim), x, fact)
        check(lambda t, dim=dim: torch.repeat_interleave(t, torch.tensor([k] * t.shape[dim]), dim=dim), x, fact)
        check(lambda t, dim=dim: torch.repeat_interleave(t, torch.arange(t.shape[dim]) + 1, dim=dim), x, fact)
    check(lambda t: t.repeat_interleave(k), x, fact)


# --- joining and cutting ----------------------------------------------------------------------------------------------


@given(st.data(), placed())
def test_joins(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    for dim in range(-x.dim(), x.dim()):
        for join in (torch.cat, torch.concat):
            check(lambda t, join=join, dim=dim: join([t, t * 2], dim), x, fact)
        check(lambda t, dim=dim: torch.cat([t, t.flip(dim)], dim=dim), x, fact)
    for dim in range(-x.dim() - 1, x.dim() + 1):
        check(lambda t, dim=dim: torch.stack([t, t.exp()], dim), x, fact)
    if x.dim() > 1:
        check(lambda t: torch.hstack([t, t + 1]), x, fact)
        check(lambda t: torch.vstack([t, t + 1]), x, fact)


@given(st.data(), placed())
def test_cuts(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    dim = any_axis(data.draw, x)
    size = data.draw(st.integers(1, x.shape[dim]))
    start = data.draw(st.integers(0, x.shape[dim] - 1))
    length = data.draw(st.integers(1, x.shape[dim] - start))
    check(lambda t: t.chunk(size, dim), x, fact)
    check(lambda t: torch.split(t, size, dim), x, fact)
    check(lambda t: t.split(size, dim=dim), x, fact)
    check(lambda t: t.split([start, t.shape[dim] - start], dim), x, fact)
    check(lambda t: torch.tensor_split(t, size, dim), x, fact)
    check(lambda t: t.narrow(dim, start, length), x, fact)
    check(lambda t: torch.narrow(t, dim, start - t.shape[dim], length), x, fact)
    if dim % x.dim() != fact.axis:
        check(lambda t: t.unbind(dim), x, fact)
        check(lambda t: t.select(dim, start), x, fact)
        check(lambda t: torch.select(t, dim, start - t.shape[dim]), x, fact)
    else:
        check(lambda t: t.unbind(dim), x, fact, must=False)
        check(lambda t: t.select(dim, start), x, fact, must=False)
        check(lambda t: t.select(dim, start).exp().sum(), x, fact, must=False)
        check(lambda t: torch.stack([part.flip(0) if part.dim() else part for part in t.unbind(dim)]), x, fact)
        check(lambda t: torch.cat([part.view(1, -1) for part in t.unbind(dim)]), x, fact)
    if fact.axis != 0:
        check(lambda t: list(t), x, fact)


@given(st.data(), placed(1, 4))
def test_basic_indices(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    items: list[Any] = []
    for axis, size in enumerate(x.shape):
        kinds = ["slice", "all"] if axis == fact.axis else ["slice", "all", "int"]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "int":
            items.append(data.draw(st.integers(-size, size - 1)))
        elif kind == "all":
            items.append(slice(None))
        else:
            start = data.draw(st.integers(0, size - 1))
            items.append(slice(start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 2))))
        if data.draw(st.integers(0, 4)) == 0:
            items.append(None)
    index = tuple(items)
    check(lambda t: t[index], x, fact)
    cut = data.draw(st.integers(0, x.dim()))
    check(lambda t: t[(Ellipsis, *[slice(None)] * cut)], x, fact)
    check(lambda t: t[-1:], x, fact)


@given(st.data(), placed(1, 4))
def test_advanced_indices(data: Any, given_: tuple[Tensor, Rows]) -> None:
    """One or two tensors of indices, neighbours or apart, among slices, integers and new axes."""
    x, fact = given_
    shape = data.draw(st.sampled_from([(3,), (1,), (2, 2), (1, 3), (2, 1)]))
    items: list[Any] = []
    tensors = 0
    for axis, size in enumerate(x.shape):
        kinds = ["all", "tensor"] + (["int"] if axis != fact.axis else []) + (["mask"] if len(shape) == 1 else [])
        kind = data.draw(st.sampled_from(kinds))
        if kind == "tensor":
            tensors += 1
            items.append(
                torch.tensor(
                    data.draw(st.lists(st.integers(-size, size - 1), min_size=math.prod(shape), max_size=math.prod(shape)))
                ).view(shape)
            )
        elif kind == "mask" and not tensors:
            tensors += 1
            mask = torch.zeros(size, dtype=torch.bool)
            mask[0] = True
            items.append(mask)
        elif kind == "int":
            items.append(data.draw(st.integers(-size, size - 1)))
        else:
            items.append(slice(None))
        if data.draw(st.integers(0, 5)) == 0:
            items.append(None)
    index = tuple(items)
    on_rows = any(isinstance(item, Tensor) for item in items)
    check(lambda t: t[index], x, fact, must=not on_rows)


@given(st.data(), placed(1, 4))
def test_one_index_along_an_axis(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    dim = any_axis(data.draw, x)
    size = x.shape[dim]
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    before = (slice(None),) * (dim % x.dim())
    check(lambda t: t.index_select(dim, index), x, fact)
    check(lambda t: torch.index_select(t, dim, index), x, fact)
    check(lambda t: t[(*before, index)], x, fact)
    check(lambda t: t[(*before, index.tolist())], x, fact)
    check(lambda t: t[(*before, mask)], x, fact)
    check(lambda t: t[(..., index % t.shape[-1])], x, fact)
    order = torch.randperm(x.shape[fact.axis])
    check(lambda t: t.index_select(fact.axis, order).index_select(fact.axis, torch.argsort(order)), x, fact)
    shift = data.draw(st.integers(-3, 3))
    check(lambda t: t.roll(shift, dim), x, fact)
    check(lambda t: torch.roll(t, (shift, 1), (dim, fact.axis)), x, fact)
    check(lambda t: t.flip(dim), x, fact)
    check(lambda t: torch.flip(t, [dim]), x, fact)
    check(lambda t: t.flip(*range(x.dim())), x, fact)
    check(lambda t: t.roll(shift), x, fact, must=False)


@given(st.data(), placed(2, 4, orders=False))
def test_masks_over_several_axes(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    ndim = data.draw(st.integers(1, x.dim()))
    mask = torch.rand(x.shape[:ndim], generator=torch.Generator().manual_seed(3)) > 0.4
    check(lambda t: t[mask], x, fact)
    check(lambda t: torch.masked_select(t, mask.view(*mask.shape, *[1] * (t.dim() - ndim))), x, fact, must=False)


@given(st.data(), placed(2, 4))
def test_gathers_and_sorts_along_another_axis(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    dim = other_axis(data.draw, x, fact)
    index = torch.randint(x.shape[dim], x.shape, generator=torch.Generator().manual_seed(1))
    check(lambda t: t.gather(dim, index), x, fact)
    check(lambda t: torch.gather(t, dim, t.argsort(dim)), x, fact)
    check(lambda t: torch.take_along_dim(t, index, dim), x, fact)
    check(lambda t: t.sort(dim), x, fact)
    check(lambda t: torch.sort(t, dim=dim, descending=True), x, fact)
    check(lambda t: t.argsort(dim), x, fact)
    check(lambda t: t.topk(1, dim), x, fact)
    check(lambda t: t.cumsum(dim), x, fact)
    check(lambda t: torch.cumprod(t, dim=dim), x, fact)
    check(lambda t: t.diff(dim=dim), x, fact, must=False)
    check(lambda t: torch.zeros_like(t).scatter(dim, index, t), x, fact)
    check(lambda t: torch.zeros_like(t).scatter_add(dim, index, t), x, fact)
    check(lambda t: torch.zeros_like(t).scatter_reduce(dim, index, t, "amax"), x, fact)
    check(lambda t: t.clone().scatter_(dim, index, 0.5), x, fact)
    check(lambda t: t.kthvalue(1, dim), x, fact)


@given(st.data(), placed(1, 3))
def test_gathers_and_sorts_along_the_rows(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    dim = fact.axis
    index = torch.randint(x.shape[dim], x.shape, generator=torch.Generator().manual_seed(1))
    for operation in (
        lambda t: t.gather(dim, index),
        lambda t: t.sort(dim),
        lambda t: t.cumsum(dim),
        lambda t: t.topk(1, dim),
        lambda t: t.argsort(dim),
        lambda t: torch.zeros_like(t).scatter(dim, index, t),
        lambda t: t.softmax(dim),
        lambda t: t.log_softmax(dim),
        lambda t: F.normalize(t, dim=dim),
        lambda t: t.clone().scatter_add_(dim, index, t),
        lambda t: torch.take_along_dim(t, index, dim),
        lambda t: t.diff(dim=dim),
        lambda t: torch.take_along_dim(t, index),
        lambda t: F.layer_norm(t, t.shape[dim:]),
        lambda t: F.glu(torch.cat([t, t], dim), dim),
        lambda t: torch.cummax(t, dim),
        lambda t: t.take(index),
        lambda t: t.logcumsumexp(dim),
        lambda t: torch.logsumexp(t, dim),
        lambda t: F.gumbel_softmax(t.exp(), dim=dim).detach() * 0,
        lambda t: t.softmax(-1),
        lambda t: F.softmax(t, dim=0),
        lambda t: F.softmin(t, dim),
        lambda t: F.rms_norm(t, t.shape[dim:]),
    ):
        check(operation, x, fact, must=False)


@given(st.data(), placed(2, 4))
def test_pads_and_windows(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    dim = other_axis(data.draw, x, fact) % x.dim()
    pads = [0] * (2 * (x.dim() - dim))
    pads[-2:] = [1, 2]
    check(lambda t: F.pad(t, pads), x, fact)
    check(lambda t: F.pad(t, pads, value=2.0), x, fact)
    check(lambda t: t.unfold(dim, 1, 1), x, fact)
    check(lambda t: F.pad(t, pads).unfold(dim, 3, 1), x, fact)
    everywhere = [1] * (2 * x.dim())
    check(lambda t: F.pad(t, everywhere), x, fact, must=False)


# --- entries and reductions -------------------------------------------------------------------------------------------


@given(st.data(), placed())
def test_entry_by_entry(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    vector = torch.randn(x.shape[-1], dtype=x.dtype)
    for operation in (
        lambda t: F.gelu(t) + 1,
        lambda t: torch.where(t > 0, t, 0.0),
        lambda t: t.masked_fill(t < 0, 0.0),
        lambda t: t.clamp(min=0),
        lambda t: 1 - t,
        lambda t: 1 / t,
        lambda t: 2**t,
        lambda t: -t,
        lambda t: t.to(torch.float32),
        lambda t: F.dropout(t, 0.0),
        lambda t: torch.zeros_like(t) + t,
        lambda t: t.clone().add_(1),
        lambda t: t.new_zeros(t.shape) + t,
        lambda t: t.detach().contiguous(),
        lambda t: torch.maximum(t, t * 2),
        lambda t: torch.add(t, t, alpha=2),
        lambda t: torch.lerp(t, t * 2, 0.5),
        lambda t: t.abs().pow(0.5),
        lambda t: torch.nan_to_num(t),
        lambda t: F.silu(t, inplace=False),
        lambda t: (t > 0) & (t < 1),
        lambda t: ~(t > 0),
        lambda t: t.round().long() % 2,
        lambda t: torch.view_as_real(torch.complex(t, t)),
        lambda t: torch.polar(t.abs(), t).real,
        lambda t: F.threshold(t, 0, 0),
    ):
        check(operation, x, fact)
    if fact.axis != x.dim() - 1:
        check(lambda t: t * vector, x, fact, must=False)


@given(st.data(), placed(2, 4))
def test_reductions(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    dim, keep = other_axis(data.draw, x, fact), data.draw(st.booleans())
    for name in (
        "sum",
        "mean",
        "amax",
        "amin",
        "prod",
        "logsumexp",
        "argmax",
        "argmin",
        "std",
        "var",
        "max",
        "min",
        "median",
        "norm_",
        "any",
        "all",
    ):
        if name == "norm_":
            check(lambda t: t.norm(2, dim, keep), x, fact)
            check(lambda t: t.norm(dim=dim, keepdim=keep), x, fact)
            check(lambda t: torch.linalg.vector_norm(t, 2, dim, keep), x, fact)
            check(lambda t: torch.linalg.norm(t, dim=dim, keepdim=keep), x, fact)
            check(lambda t: torch.norm(t, dim=dim, keepdim=keep), x, fact)
        elif name in ("std", "var"):
            check(lambda t, name=name: getattr(t, name)(dim, False, keep), x, fact)
            check(lambda t, name=name: getattr(torch, name)(t, dim=dim, unbiased=False, keepdim=keep), x, fact)
        else:
            check(lambda t, name=name: getattr(t, name)(dim, keep), x, fact)
            check(lambda t, name=name: getattr(torch, name)(t, dim=dim, keepdim=keep), x, fact)
    check(lambda t: torch.var_mean(t, dim, correction=0, keepdim=keep), x, fact)
    check(lambda t: t.softmax(dim), x, fact)
    check(lambda t: F.normalize(t, dim=dim), x, fact)
    check(lambda t: t.sum(fact.axis), x, fact, statistic=True)
    check(lambda t: t.mean(), x, fact, statistic=True)
    rest = [axis for axis in range(x.dim()) if axis != fact.axis]
    check(lambda t: t.sum(rest), x, fact)
    check(lambda t: t.mean(tuple(rest), keepdim=True), x, fact)
    check(lambda t: t.any(dim).all(), x, fact, statistic=True)
    check(lambda t: torch.cdist(t, t * 2), x, fact, must=False)


# --- products and layers ----------------------------------------------------------------------------------------------


@given(st.data(), placed(2, 4))
def test_products(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    size = x.shape[-1]
    matrix, vector = torch.randn(size, 3, dtype=x.dtype), torch.randn(size, dtype=x.dtype)
    inside = fact.axis != x.dim() - 1
    check(lambda t: t @ matrix, x, fact, must=inside)
    check(lambda t: torch.matmul(t, matrix), x, fact, must=inside)
    check(lambda t: t @ vector, x, fact, must=inside)
    check(lambda t: F.linear(t, matrix.T), x, fact, must=inside)
    check(lambda t: matrix.T @ t.mT, x, fact, must=inside)
    check(lambda t: t @ t.mT, x, fact, must=fact.axis < x.dim() - 2)
    if x.dim() == 3:
        check(lambda t: torch.bmm(t, t.mT), x, fact, must=fact.axis == 0)
        check(lambda t: torch.baddbmm(torch.zeros(1, 1, 1, dtype=t.dtype), t, t.mT), x, fact, must=fact.axis == 0)
    if x.dim() == 2:
        check(lambda t: torch.mm(t, matrix), x, fact, must=inside)
        check(lambda t: torch.addmm(torch.zeros(3, dtype=t.dtype), t, matrix), x, fact, must=inside)
        check(lambda t: torch.mv(t, vector), x, fact, must=inside)
    if x.dim() == 2:
        check(lambda t: torch.outer(t[:, 0], t[0]), x, fact, must=False)


@given(st.data(), placed(3, 4, axes=lambda ndim: st.integers(0, 1)))
def test_einsums(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    letters = "abcd"[: x.dim()]
    row = letters[fact.axis]
    kept = "".join(data.draw(st.permutations(sorted({row, *data.draw(st.sets(st.sampled_from(letters)))}))))
    check(lambda t: torch.einsum(f"{letters}->{kept}", t), x, fact)
    check(lambda t: torch.einsum(f"{letters},{letters}->{kept}", t, t), x, fact)
    check(lambda t: torch.einsum(f"{letters},{letters}->{kept}", [t, t]), x, fact)
    check(
        lambda t: torch.einsum(
            f"...{letters[-1]},{letters[-1]}e->...e",
            t,
            torch.randn(t.shape[-1], 2, dtype=t.dtype, generator=torch.Generator().manual_seed(1)),
        ),
        x,
        fact,
    )
    check(lambda t: torch.einsum("...i,...j->...ij", t, t), x, fact)
    check(lambda t: torch.einsum("...ij->...ji", t), x, fact)
    rest = letters.replace(row, "z")
    check(lambda t: torch.einsum(f"{letters},{rest}->{row}z", t, t), x, fact, must=False)


@given(st.data(), placed(3, 5, axes=lambda ndim: st.just(0)))
def test_layers_over_positions(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    rank = x.dim() - 2
    channels = x.shape[1]
    kernel = torch.randn(2, channels, *[1] * rank, dtype=x.dtype)
    name = f"{rank}d"
    check(lambda t: getattr(F, "conv" + name)(t, kernel), x, fact)
    check(lambda t: getattr(F, "conv_transpose" + name)(t, kernel.transpose(0, 1)), x, fact)
    for pool in ("max_pool", "avg_pool"):
        check(lambda t, pool=pool: getattr(F, pool + name)(t, 1), x, fact)
    for pool in ("adaptive_avg_pool", "adaptive_max_pool"):
        check(lambda t, pool=pool: getattr(F, pool + name)(t, 1), x, fact)
    check(lambda t: F.interpolate(t, scale_factor=2), x, fact)
    check(lambda t: F.interpolate(t, size=[3] * rank), x, fact)
    check(lambda t: F.layer_norm(t, t.shape[-1:]), x, fact)
    check(lambda t: F.group_norm(t, 1) if t[0].numel() > 1 else t, x, fact)
    if rank == 2:
        check(lambda t: F.unfold(t, 1), x, fact)
        check(lambda t: F.fold(F.unfold(t, 1), t.shape[2:], 1), x, fact)
        check(lambda t: F.pixel_unshuffle(F.pixel_shuffle(t.repeat(1, 4, 1, 1), 2), 2), x, fact)
        check(lambda t: F.pad(t, (1, 1, 1, 1), mode="replicate"), x, fact)


@given(st.data(), placed(3, 4))
def test_attention(data: Any, given_: tuple[Tensor, Rows]) -> None:
    x, fact = given_
    check(lambda t: F.scaled_dot_product_attention(t, t, t), x, fact, must=fact.axis < x.dim() - 2)
    check(lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True), x, fact, must=fact.axis < x.dim() - 2)


@given(placed(2, 3, axes=lambda ndim: st.just(0)))
def test_bmm_of_queries_and_keys_in_heads(given_: tuple[Tensor, Rows]) -> None:
    """[N, L, E] into [N·heads, L, d], attention by hand, and back."""
    x, fact = given_
    x = x if x.dim() == 3 else x.unsqueeze(1)
    x = torch.cat([x, x * 2, x * 3, x * 4], -1)
    heads = 2

    def attention(t: Tensor) -> Tensor:
        rows, length, width = t.shape
        q = t.view(rows, length, heads, width // heads).transpose(1, 2).reshape(rows * heads, length, width // heads)
        p = torch.bmm(q, q.transpose(1, 2)).softmax(-1)
        return torch.bmm(p, q).view(rows, heads, length, -1).transpose(1, 2).reshape(rows, length, width)

    check(attention, x, fact)


@given(placed(3, 4, orders=False, axes=lambda ndim: st.just(0)))
def test_windows_of_an_image(given_: tuple[Tensor, Rows]) -> None:
    """Swin's partition into windows and its reverse, with a shift."""
    x, fact = given_
    x = x.reshape(x.shape[0], -1)[:, :1, None, None] + torch.randn(
        x.shape[0], 4, 6, 2, dtype=x.dtype, generator=torch.Generator().manual_seed(2)
    )
    fact = fact._replace(axis=0)

    def partition(t: Tensor) -> Tensor:
        rows, height, width, channels = t.shape
        t = torch.roll(t, (-1, -1), (1, 2)).view(rows, height // 2, 2, width // 2, 2, channels)
        return t.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, channels)

    def back(t: Tensor) -> Tensor:
        return torch.roll(t.view(-1, 2, 3, 2, 2, 2).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6, 2), (1, 1), (1, 2))

    check(partition, x, fact)
    check(lambda t: back(partition(t)), x, fact)


def test_einops() -> None:
    einops = pytest.importorskip("einops")
    x, fact = torch.randn(3, 3, 4, dtype=torch.float64), Rows(0, 3)
    check(lambda t: einops.rearrange(t, "n t d -> (n t) d"), x, fact)
    check(lambda t: einops.rearrange(t, "n t d -> (t n) d"), x, fact)
    check(lambda t: einops.rearrange(einops.rearrange(t, "n t d -> (t n) d"), "(t n) d -> n t d", n=3), x, fact)
    check(lambda t: einops.rearrange(t, "n t (h d) -> (n h) t d", h=2), x, fact)
    check(lambda t: einops.repeat(t, "n t d -> (n k) t d", k=2), x, fact)
    check(lambda t: einops.repeat(t, "n t d -> n k t d", k=3), x, fact)
    check(lambda t: einops.reduce(t, "n t d -> n d", "mean"), x, fact)


def test_a_function_of_one_tensor_may_give_several():
    class Indexed(nn.Linear):
        def forward(self, x):
            rows, columns = torch.where(x > 0)
            return super().forward(x) * (rows.numel() == columns.numel())

    x = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    net = flipout.Perturbed(Indexed(2, 3), flipout.Gaussian(0.1))
    with net.hold(2) as draw:
        for n, y in enumerate(net(x)):
            torch.testing.assert_close(y, draw.module(n)(x[n : n + 1])[0])
