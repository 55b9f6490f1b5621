"""Where rows stand in models as people write them, with sizes that are as long as the batch: each row is its own member,
exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.base import Given
from laws import EXACT, LISTED, distance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import flipout

N = 4
EXPECTED = {"estimator": list(LISTED)}


def floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wrapped(module: nn.Module, estimator: str = "flipout", **options: Any) -> flipout.Perturbed:
    torch.manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3, 0.5)
    return flipout.Perturbed(
        module, flipout.Gaussian(0.3), LISTED[estimator], generator=torch.Generator().manual_seed(0), **options
    )


def leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [part for item in output for part in leaves(item)]


def exact(
    module: nn.Module,
    inputs: tuple[Any, ...],
    estimator: str = "flipout",
    members: int = N,
    axis: int = 0,
    shared: tuple[int, ...] = (),
    **options: Any,
) -> None:
    """Every row of each output is what the plain module of its member makes of this row alone.

    Args:
        axis: where outputs have their rows.
        shared: the arguments that every row has in common.
    """
    net = wrapped(module, estimator, **options)
    dim = net.batch_dim
    with net.hold(members=members) as draw:
        ours = leaves(net(*inputs))
        for n in range(members):
            own = tuple(x if i in shared or not isinstance(x, Tensor) else x.narrow(dim, n, 1) for i, x in enumerate(inputs))
            for y, alone in zip(ours, leaves(draw.module(n)(*own)), strict=True):
                assert distance(y.narrow(axis, n, 1), alone) < EXACT * max(1.0, alone.abs().max().item()), f"row {n}"


class Case:
    """A model as a function of its parts ``m`` and the arguments."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Callable[[], tuple[Any, ...]],
        parts: Callable[[], dict[str, Any]],
        **options: Any,
    ) -> None:
        self.function, self.inputs, self.parts, self.options = function, inputs, parts, options

    def module(self) -> nn.Module:
        module = Given(self.function)
        for name, part in self.parts().items():
            if isinstance(part, nn.Module):
                module.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                module.register_parameter(name, part)
            else:
                module.register_buffer(name, part)
        return module


CASES: dict[str, Case] = {}


def case(inputs: Callable[[], tuple[Any, ...]], parts: Callable[[], dict[str, Any]], **options: Any) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        CASES[function.__name__] = Case(function, inputs, parts, **options)
        return function

    return register


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def linears(*widths: int) -> dict[str, nn.Module]:
    return {f"l{i}": nn.Linear(a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))}


# --- axes ---------------------------------------------------------------------------------------------------------------


@case(lambda: (floats(N, N, 6),), lambda: {"a": nn.MultiheadAttention(6, 2), **linears(6, 6)})
def length_first_inside(m: Any, x: Tensor) -> Tensor:
    """[L, N, E] inside a batch-first model, L = N."""
    y = m.l0(x.transpose(0, 1))
    return (y + m.a(y, y, y, need_weights=False)[0]).transpose(0, 1)


@case(lambda: (floats(N, N, 6),), lambda: {"e": nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0), **linears(6, 6)})
def an_encoder_layer_inside(m: Any, x: Tensor) -> Tensor:
    return m.l0(m.e(x.permute(1, 0, 2)).permute(1, 0, 2))


@case(lambda: (floats(N, N, N),), lambda: linears(N, N, N))
def everything_is_n(m: Any, x: Tensor) -> Tensor:
    return m.l1(m.l0(x).transpose(1, 2)).transpose(1, 2)


@case(lambda: (floats(N, N, 3),), lambda: {**linears(3, 5, 3), "c": nn.Conv1d(5, 5, 1)})
def time_major_folds(m: Any, x: Tensor) -> Tensor:
    """[T, N] into T·N and back."""
    rows = x.shape[0]
    t = x.transpose(0, 1).reshape(N * rows, 3)
    y = m.c(m.l0(t).view(N, rows, 5).permute(1, 2, 0)).permute(2, 0, 1).reshape(N * rows, 5)
    return m.l1(y).view(N, rows, 3).transpose(0, 1)


@case(lambda: (floats(N, N, 3, 4, 4),), lambda: {"c": nn.Conv2d(3, 5, 3, padding=1), **linears(5, 2)})
def frames_in_the_batch(m: Any, x: Tensor) -> Tensor:
    y = m.c(x.flatten(0, 1)).mean((2, 3)).view(-1, N, 5)
    return m.l0(y.mean(1))


@case(lambda: (floats(N, 2 * N),), lambda: linears(2 * N, 2 * N))
def features_are_2n(m: Any, x: Tensor) -> Tensor:
    return m.l0(x.view(-1, N, 2).transpose(1, 2).reshape(-1, 2 * N))


@case(lambda: (floats(N, 3), floats(N, 3, seed=2)), lambda: {**linears(3, 5, 4), "n": nn.LayerNorm(5)})
def two_views(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """Augmented views, or guidance: joined along the batch and cut again."""
    y = m.l1(torch.relu(m.n(m.l0(torch.cat([a, b])))))
    first, second = y.chunk(2)
    return first - 0.5 * second


@case(lambda: (floats(N, 3),), lambda: linears(3, 5, 4))
def doubled_batch(m: Any, x: Tensor) -> Tensor:
    y = m.l1(torch.tanh(m.l0(torch.cat([x] * 2))))
    return y[:N] + 2 * y[N:] if len(x) > 1 else y[:1] + 2 * y[1:]


@case(lambda: (floats(N, 2, 5, 5), floats(N, 2, 3, 3, seed=2)), lambda: {"c": nn.Conv2d(2, 4, 3, padding=1), **linears(4, 3)})
def several_scales(m: Any, *scales: Tensor) -> Tensor:
    """A list of levels, each through the same head."""
    levels = [m.c(x).flatten(2).transpose(1, 2) for x in scales]
    return m.l0(torch.cat(levels, 1))


# --- positions ----------------------------------------------------------------------------------------------------------


@case(lambda: (floats(N, N, 6),), lambda: {"p": nn.Embedding(N, 6), **linears(6, 6)})
def flat_positions(m: Any, x: Tensor) -> Tensor:
    return m.l0(x + m.p(torch.arange(x.shape[1])))


@case(lambda: (floats(N, N, 6),), lambda: {"p": nn.Embedding(N, 6), "ids": torch.arange(N), **linears(6, 6)})
def flat_positions_in_a_buffer(m: Any, x: Tensor) -> Tensor:
    return m.l0(x + m.p(m.ids))


@case(lambda: (floats(N, N, 6),), lambda: {"p": nn.Embedding(N, 6), "ids": torch.arange(N).expand(1, -1), **linears(6, 6)})
def positions_of_one_row(m: Any, x: Tensor) -> Tensor:
    return m.l0(x + m.p(m.ids[:, : x.shape[1]]))


@case(lambda: (floats(N, N, 6),), lambda: {"p": nn.Embedding(N, 6), **linears(6, 6)})
def positions_expanded_to_the_batch(m: Any, x: Tensor) -> Tensor:
    return m.l0(x + m.p(torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1)))


@case(
    lambda: (floats(N, 2, N, N),), lambda: {"p": nn.Embedding(9, 2), "index": torch.arange(N * N).view(N, N) % 9, **linears(N, N)}
)
def positions_in_two_axes(m: Any, x: Tensor) -> Tensor:
    """A table of relative positions, [N, N] of which give a bias [1, heads, N, N]."""
    bias = m.p(m.index).permute(2, 0, 1).unsqueeze(0)
    return m.l0((x + bias).softmax(-1))


@case(
    lambda: (floats(N, 2, N, N),), lambda: {"p": nn.Embedding(9, 2), "index": torch.arange(N * N).view(N, N) % 9, **linears(N, N)}
)
def a_position_bias_in_place(m: Any, x: Tensor) -> Tensor:
    scores = m.l0(x)
    scores += m.p(m.index).permute(2, 0, 1).unsqueeze(0)
    return scores.softmax(-1)


@case(lambda: (floats(N, N, 3),), lambda: {"g": weights(3), "b": weights(3), "h": weights(1, N, 3), **linears(3, 3)})
def gains_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.l0(x)
    y *= m.g
    y.add_(m.b).mul_(m.h)
    y -= m.b
    y.div_(m.g.abs() + 2)
    y.sub_(m.h, alpha=2)
    return y.transpose(0, 1).clone().add_(m.h[0].unsqueeze(1)).transpose(0, 1)


@case(
    lambda: (torch.randint(5, (N,), generator=torch.Generator().manual_seed(0)), floats(N, 3)),
    lambda: {"t": nn.Embedding(5, 3), "p": weights(5, 3), **linears(3, 3)},
)
def labels_of_length_n(m: Any, labels: Tensor, x: Tensor) -> Tensor:
    return m.l0(x + m.t(labels) + m.p[labels])


# --- windows ------------------------------------------------------------------------------------------------------------


def _windows(x: Tensor, size: int) -> Tensor:
    rows, height, width, channels = x.shape
    x = x.view(rows, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, channels)


def _image(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    rows = windows.shape[0] // (height * width // size // size)
    x = windows.view(rows, height // size, width // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(rows, height, width, -1)


@case(
    lambda: (floats(N, N, N, 3),),
    lambda: {"t": nn.Embedding(16, 1), "index": torch.arange(16).view(4, 4), "l0": nn.Linear(3, 9), "l1": nn.Linear(3, 3)},
)
def shifted_windows(m: Any, x: Tensor) -> Tensor:
    """Swin: rolled, cut into windows (N of each image), attended with a relative bias, put back."""
    w = _windows(torch.roll(x, (-1, -1), (1, 2)), 2)
    q, k, v = m.l0(w).chunk(3, -1)
    scores = q @ k.transpose(-2, -1) + m.t(m.index.view(-1)).view(4, 4)
    return torch.roll(_image(m.l1(scores.softmax(-1) @ torch.cat([v], -1)), 2, N, N), (1, 1), (1, 2))


@case(lambda: (floats(N, N, N, 4),), lambda: {"n": nn.LayerNorm(16), **linears(16, 8)})
def merged_patches(m: Any, x: Tensor) -> Tensor:
    pieces = [x[:, i::2, j::2, :] for j in range(2) for i in range(2)]
    return m.l0(m.n(torch.cat(pieces, -1)))


# --- adapters -----------------------------------------------------------------------------------------------------------


def _adapter() -> dict[str, Any]:
    return {"W": weights(8, 6), "A": weights(2, 6), "B": weights(8, 2), "g": weights(8), "h": weights(8, 1), "c": weights(6)}


@case(lambda: (floats(N, 6),), _adapter, exclude=("W", "B", "g", "h", "c"))
def lora_of_a_frozen_matrix(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.W + m.B @ m.A)


@case(lambda: (floats(N, 6),), _adapter, exclude=("W", "A", "B"))
def a_frozen_matrix_and_gains(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.W * m.g[:, None] + m.h) + F.linear(x, m.W * m.h) + F.linear(x, m.W * m.c)


@case(lambda: (floats(N, 6),), lambda: {"g": weights(8), "h": weights(8, 1), "c": weights(6), "W": floats(8, 6)})
def a_frozen_buffer_and_gains(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.W * m.g.unsqueeze(1)) + F.linear(x, m.W * m.h) + F.linear(x, m.W + m.h) + F.linear(x, m.W * m.c + m.c)


@case(lambda: (floats(N, 6),), _adapter, exclude=("W", "A", "B", "c"))
def dora_gains(m: Any, x: Tensor) -> Tensor:
    V = m.W + m.B @ m.A
    return F.linear(x, V) * (m.g / V.norm(dim=1)) + F.linear(x, m.h * V / V.norm(dim=1, keepdim=True))


@case(lambda: (floats(N, 6),), _adapter, exclude=("W", "B", "g", "c"), fallback="loop")
def dora(m: Any, x: Tensor) -> Tensor:
    V = m.W + m.B @ m.A
    return F.linear(x, m.h * V / V.norm(dim=1, keepdim=True))


# --- order --------------------------------------------------------------------------------------------------------------


_ORDER = torch.tensor([2, 0, 3, 1])


@case(
    lambda: (floats(N, N, 3), torch.tensor([2, 4, 1, 3])),
    lambda: {"r": nn.LSTM(3, 4, batch_first=True), **linears(3, 3), "q": nn.Linear(4, 4)},
)
def sorted_by_length(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """x[order], through layers, and back."""
    order = lengths.argsort(descending=True)
    y = m.l0(x[order])
    y = m.q(m.r(y)[0])
    return m.q(y[order.argsort()])


@case(lambda: (floats(N, N, 3), torch.tensor([2, 4, 1, 3])), lambda: linears(3, 6, 3))
def sorted_and_put_back_by_assignment(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    order = lengths.argsort()
    y = m.l0(x.index_select(0, order))
    back = torch.empty_like(y)
    back[order] = y
    again = torch.zeros(y.shape, dtype=y.dtype)
    again.index_copy_(0, order, y)
    third = y.new_zeros(y.shape).index_put((order,), y)
    fourth = torch.zeros_like(y).scatter(0, order[:, None, None].expand_as(y), y)
    return m.l1(back + again + third + fourth)


@case(
    lambda: (floats(N, 5, 3), torch.tensor([2, 5, 1, 3])),
    lambda: {"r": nn.GRU(3, 4, batch_first=True, bidirectional=True), **linears(3, 3), "q": nn.Linear(8, 2)},
)
def packed_inside(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(m.l0(x), lengths, batch_first=True, enforce_sorted=False)
    y, _ = pad_packed_sequence(m.r(packed)[0], batch_first=True, total_length=5)
    return m.q(y)


@case(lambda: (floats(N, 5, 3), torch.tensor([2, 5, 1, 3])), lambda: {"r": nn.LSTM(4, 4, batch_first=True), **linears(3, 4)})
def packed_data_used_directly(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    data = torch.tanh(m.l0(packed.data))
    y, (h, c) = m.r(PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices))
    return m.l0(pad_packed_sequence(y, batch_first=True, total_length=5)[0][..., :3]) + (h + c).transpose(0, 1)


@case(lambda: (floats(N, N, 3),), lambda: linears(3, 5, 3))
def one_row_after_the_other(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.l1(m.l0(x[i : i + 1]).relu()) for i in range(len(x))])


@case(lambda: (floats(N, N, 3),), lambda: linears(3, 5, 3))
def example_by_example(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i] = m.l1(m.l0(x[i]).relu())
    return m.l1(m.l0(out)) + torch.stack([m.l1(m.l0(row).relu()) for row in x])


@case(lambda: (floats(N, 3),), lambda: {"g": weights(5), **linears(3, 5, 3)})
def vector_by_vector(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.l1(m.l0(row) * m.g) for row in x])


# --- states and tokens --------------------------------------------------------------------------------------------------


@case(lambda: (floats(N, N, 6),), lambda: {"cls": weights(1, 1, 6), "pos": weights(1, N + 3, 6), **linears(6, 6)})
def class_tokens(m: Any, x: Tensor) -> Tensor:
    rows = x.shape[0]
    x = torch.cat([m.cls.repeat(rows, 1, 1), torch.tile(m.cls, (rows, 1, 1)), m.cls.expand(rows, -1, -1), x], 1)
    return m.l0(x + m.pos)[:, 0]


@case(lambda: (floats(N, 3, 5),), lambda: {"r": nn.LSTM(5, 4, 2, batch_first=True), "h": weights(2, 1, 4), "c": weights(2, 1, 4)})
def learnt_states(m: Any, x: Tensor) -> Tensor:
    rows = x.shape[0]
    return m.r(x, (m.h.repeat(1, rows, 1), m.c.expand(-1, rows, -1).contiguous()))[0]


@case(lambda: (floats(N, N, 5),), lambda: {"i": nn.Linear(5, N), "h": nn.Linear(N, N)})
def a_loop_over_time(m: Any, x: Tensor) -> Tensor:
    """Hidden size, length and batch alike."""
    h = torch.zeros(x.shape[0], N, dtype=x.dtype)
    states = []
    for t in range(x.shape[1]):
        h = torch.tanh(m.i(x[:, t]) + m.h(h))
        states.append(h)
    return torch.stack(states, 1)


@case(lambda: (floats(N, N, 5),), lambda: {"c": nn.GRUCell(5, N), "h0": weights(N)})
def cells_with_a_buffer_of_results(m: Any, x: Tensor) -> Tensor:
    h = m.h0.expand(x.shape[0], -1)
    out = torch.zeros(x.shape[0], N, N, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = m.c(x[:, t], h)
        out[:, t] = h
    return out


@case(
    lambda: (floats(N, N, N),), lambda: {"q": weights(2, N, 3), "k": weights(2, N, 3), "v": weights(N, 2, 3), "o": weights(2, 3, N)}
)
def attention_by_einsum(m: Any, x: Tensor) -> Tensor:
    q, k = torch.einsum("bld,hdk->bhlk", x, m.q), torch.einsum("bld,hdk->bhlk", x, m.k)
    v = torch.einsum("bld,dhk->bhlk", x, m.v)
    p = torch.einsum("bhik,bhjk->bhij", q, k).softmax(-1)
    return torch.einsum("bhlk,hkd->bld", torch.einsum("bhij,bhjk->bhik", p, v), m.o)


@case(lambda: (floats(N, N, 8),), lambda: {**linears(8, 24), "o": nn.Linear(8, 8)})
def heads_folded_into_the_batch(m: Any, x: Tensor) -> Tensor:
    rows, length, _ = x.shape
    q, k, v = (t.view(rows, length, 4, 2).transpose(1, 2).reshape(rows * 4, length, 2) for t in m.l0(x).chunk(3, -1))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return m.o(y.view(rows, 4, length, 2).transpose(1, 2).reshape(rows, length, 8))


@case(lambda: (floats(N, N, 6), torch.tensor([0, 3, 1, 2])), lambda: {**linears(6, 6, 2)})
def the_state_at_an_index(m: Any, x: Tensor, last: Tensor) -> Tensor:
    y = m.l0(x)
    rows = torch.arange(len(y))
    one = y[rows, last] + y.gather(1, last.view(-1, 1, 1).expand(-1, 1, 6)).squeeze(1)
    return m.l1(one)


@case(lambda: (floats(N, N, 6),), lambda: {"q": weights(3, 6), **linears(6, 6)})
def learnt_queries(m: Any, x: Tensor) -> Tensor:
    q = m.q.unsqueeze(0).expand(x.shape[0], -1, -1)
    return m.l0(F.scaled_dot_product_attention(m.l0(q), x, x))


@case(lambda: (floats(N, N, 6),), lambda: {"pos": floats(N, 3), **linears(3, 6, 6)})
def positions_through_a_net(m: Any, x: Tensor) -> Tensor:
    """A net of constants: its results are weights again."""
    return m.l1(x + torch.tanh(m.l0(m.pos)))


@case(
    lambda: (floats(N, 2, N, N),),
    lambda: {
        "t": floats(1, 3, 3, 2),
        "index": torch.arange(N * N).view(N, N) % 9,
        "a": nn.Linear(2, 5),
        "b": nn.Linear(5, 2, bias=False),
    },
)
def a_bias_made_by_a_net(m: Any, x: Tensor) -> Tensor:
    """SwinV2's: coordinates through a net give a table, of which an index makes a bias."""
    table = m.b(F.relu(m.a(m.t))).view(-1, 2)
    bias = 16 * torch.sigmoid(table[m.index.view(-1)].view(N, N, 2).permute(2, 0, 1).contiguous())
    return x + bias.unsqueeze(0)


@pytest.mark.parametrize("estimator", list(LISTED))
@pytest.mark.parametrize("name", CASES)
def test_every_row_is_its_member(name: str, estimator: str) -> None:
    case = CASES[name]
    exact(case.module(), case.inputs(), estimator, **case.options)


# --- what counts the rows -----------------------------------------------------------------------------------------------


class Timed(nn.Module):
    """A net of a time and a batch, as diffusion and neural ODEs have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.e = nn.Linear(3, N), nn.Linear(N, 3), nn.Embedding(9, N)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        h = self.e(t) if not t.is_floating_point() else t.reshape(-1, 1) * self.e.weight[:1]
        return self.b(torch.tanh(self.a(x) + h))


@pytest.mark.parametrize("estimator", list(LISTED))
@pytest.mark.parametrize("t", [torch.tensor(0.5).double(), torch.tensor([0.5]).double(), torch.tensor([7])])
@pytest.mark.parametrize("rows", [None, "x", 1])
def test_a_time_before_the_batch(t: Tensor, rows: Any, estimator: str) -> None:
    options = {} if rows is None else {"rows": rows}
    if rows is None and not t.is_floating_point():
        with pytest.raises(flipout.BatchError, match="rows="):
            wrapped(Timed(), estimator)(t, floats(N, 3))
        return
    exact(Timed(), (t, floats(N, 3)), estimator, shared=(0,), **options)


# --- graphs -------------------------------------------------------------------------------------------------------------

#: Three graphs of 2, 4 and 2 nodes: as many nodes in all as features, and edges inside of each graph.
OWNER = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 2, 5, 6, 7, 7], [1, 0, 3, 4, 5, 2, 5, 3, 7, 6, 7]])
CROSSING = torch.tensor([[0, 1, 2], [1, 2, 6]])


class Graph(nn.Module):
    """Two rounds of messages, summed over the edges that reach a node, and a mean over each graph."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3), how

    def aggregate(self, x: Tensor, index: Tensor, size: int) -> Tensor:
        out = x.new_zeros(size, x.shape[1])
        wide = index.unsqueeze(-1).expand_as(x)
        if self.how == "index_add":
            return out.index_add(0, index, x)
        if self.how == "scatter_add_":
            return out.scatter_add_(0, wide, x)
        if self.how == "index_put_":
            return out.index_put_((index,), x, accumulate=True)
        return out.scatter_reduce(0, wide, x, "sum")

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = torch.relu(self.aggregate(layer(x)[edges[0]], edges[1], len(x)) + x)
        return self.c(self.aggregate(x, batch, int(batch.max()) + 1))


HOW = ["index_add", "scatter_add_", "index_put_", "scatter_reduce"]


@pytest.mark.parametrize("estimator", list(LISTED))
@pytest.mark.parametrize("how", HOW)
def test_graphs_whose_nodes_have_owners(how: str, estimator: str) -> None:
    net, x = wrapped(Graph(how), estimator), floats(8, 8)
    with net.hold(members=3, owner=OWNER) as draw:
        y = net(x, EDGES, OWNER)
        for n in range(3):
            nodes = (n == OWNER).nonzero().flatten()
            edges = torch.stack([e[OWNER[EDGES[0]] == n] for e in EDGES]) - nodes[0]
            assert distance(y[n : n + 1], draw.module(n)(x[nodes], edges, torch.zeros(len(nodes), dtype=torch.long))) < EXACT


@pytest.mark.parametrize("how", HOW)
def test_graphs_without_owners_are_refused(how: str) -> None:
    net = wrapped(Graph(how))
    with pytest.raises(flipout.BatchError, match=r"owner="):
        net(floats(8, 8), EDGES, OWNER)
    with net.hold(members=3, owner=OWNER), pytest.raises(flipout.BatchError, match=r"owner="):
        net(floats(8, 8), CROSSING, OWNER)


# --- rows that are mixed --------------------------------------------------------------------------------------------------


def _mixing(function: Callable[..., Any], **parts: Any) -> nn.Module:
    return Case(function, lambda: (), lambda: {**linears(N, N, N), **parts}).module()


def test_a_contrastive_product_is_no_error_until_a_weight_meets_it() -> None:
    x = floats(N, N)
    similarity = wrapped(_mixing(lambda m, x: F.cross_entropy(m.l1(m.l0(x)) @ m.l0(x).T, torch.arange(N))))
    assert similarity(x).isfinite()
    for function in (
        lambda m, x: m.l1(m.l0(x) @ x.T),
        lambda m, x: m.l1(torch.cdist(m.l0(x), x)),
        lambda m, x: m.l1(torch.einsum("if,jf->ij", m.l0(x), x)),
    ):
        with pytest.raises(flipout.BatchError, match=r"rows=.*owner="):
            wrapped(_mixing(function))(x)


MIXERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "softmax over the batch": lambda m, x: m.l1(m.l0(x).softmax(0)),
    "sorted by value": lambda m, x: m.l1(m.l0(x).sort(0).values),
    "summed up over the batch": lambda m, x: m.l1(m.l0(x).cumsum(0)),
    "attention between examples": lambda m, x: m.l1(F.scaled_dot_product_attention(m.l0(x)[None], x[None], x[None])[0]),
    "gathered by value": lambda m, x: m.l1(m.l0(x).gather(0, x.argsort(0))),
    "a whole batch as features": lambda m, x: m.l1(m.l0(x).T),
    "joined with what has no row": lambda m, x: m.l1(
        torch.cat([m.l0(x), torch.ones(N, N, dtype=x.dtype).exp()]).view(2, N, N)[0] * 1
    ),
    "the matrix of the batch": lambda m, x: m.l1(torch.linalg.qr(m.l0(x)).Q),
    "entries of several rows": lambda m, x: m.l1(m.l0(x).take(torch.arange(N * N).flip(0)).view(N, N)),
    "written over": lambda m, x: m.l1(_written(m.l0(x))),
    "written over by a view": lambda m, x: m.l1(_written_by_a_view(m.l0(x))),
    "another row's values": lambda m, x: m.l1(m.l0(x) + m.l0(x).flip(0)),
    "assigned to other rows": lambda m, x: m.l1(_assigned(m.l0(x))),
}


def _written(x: Tensor) -> Tensor:
    x[:, 0] = x.cumsum(0)[:, 1]
    return x


def _written_by_a_view(x: Tensor) -> Tensor:
    x[:, :2].copy_(x.cumsum(0)[:, :2])
    return x


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[_ORDER[:2]] = x[:2]
    return y


@pytest.mark.parametrize("name", MIXERS)
def test_mixed_rows_are_refused_where_a_weight_meets_them(name: str) -> None:
    with pytest.raises(flipout.BatchError, match=r"rows=.*owner=.*exclude"):
        wrapped(_mixing(MIXERS[name]))(floats(N, N))
