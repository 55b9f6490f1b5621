"""Lookups, bags of lookups, tied tables."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.base import Case, Inputs, floats, given, indices

NO_SECOND = {"second derivatives": "torch has none of a bag"}
PADDING = {"finite differences": "torch gives the row of the padding index no gradient, though it is added like others"}


class Bags(nn.Module):
    """Bags of unequal length: a flat list of indices and offsets, as text classifiers use them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.last = options.get("include_last_offset", False)
        self.bag = nn.EmbeddingBag(7, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0] % x.shape[1]  # 0 to T-1: empty bags too
        flat = x[torch.arange(x.shape[1]) < lengths[:, None]]
        ends = lengths.cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        return self.bag(flat, starts if self.last else starts[:-1])


class Tied(nn.Module):
    """One matrix as embedding and as output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(i)))


def _weighted(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randint(7, (rows, 3), generator=g), torch.randn(rows, 3, generator=g, dtype=torch.float64)


class WeightedBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="sum")

    def forward(self, i: Tensor, w: Tensor) -> Tensor:
        return self.bag(i, per_sample_weights=w)


def _bag(name: str, inputs: Inputs, **options: Any) -> Case:
    return Case(
        name,
        partial(nn.EmbeddingBag, 7, 4, **options),
        inputs,
        affine=options.get("mode") != "max",
        exempt=NO_SECOND | (PADDING if "padding_idx" in options else {}),
    )


CASES = [
    Case("embedding", lambda: nn.Embedding(7, 4), indices(7, 3)),
    Case("embedding_per_example", lambda: nn.Embedding(7, 4), indices(7)),
    Case("embedding_3d", lambda: nn.Embedding(7, 4), indices(7, 2, 3)),
    Case("embedding_padding", lambda: nn.Embedding(7, 4, padding_idx=2), indices(7, 5), exempt=PADDING),
    Case("embedding_last_is_padding", lambda: nn.Embedding(7, 4, padding_idx=-1), indices(7, 5), exempt=PADDING),
    Case("embedding_batch_second", lambda: nn.Embedding(7, 4), lambda n, g: (torch.randint(7, (3, n), generator=g),), batch_dim=1),
    Case("embedding_by_index", given(lambda m, i: m.w[i], w=(7, 4)), indices(7, 3)),
    Case("embedding_vector", given(lambda m, i: m.w[i], w=(7,)), indices(7, 3)),
    Case("embedding_transposed", given(lambda m, i: F.embedding(i, m.w.t()), w=(4, 7)), indices(7, 3)),
    _bag("bag_mean", indices(7, 3), mode="mean"),
    _bag("bag_sum", indices(7, 3), mode="sum"),
    _bag("bag_max", indices(7, 3), mode="max"),
    _bag("bag_padding", indices(7, 5), mode="mean", padding_idx=1),
    _bag("bag_max_padding", indices(7, 5), mode="max", padding_idx=1),
    Case("bag_offsets", lambda: Bags(mode="mean"), indices(7, 5), exempt=NO_SECOND),
    Case("bag_offsets_sum_last", lambda: Bags(mode="sum", include_last_offset=True), indices(7, 5), exempt=NO_SECOND),
    Case("bag_offsets_max", lambda: Bags(mode="max"), indices(7, 5), affine=False, exempt=NO_SECOND),
    Case("bag_weighted", WeightedBag, _weighted, exempt=NO_SECOND),
    Case("tied", Tied, indices(7, 3), affine=False),
    Case("positions", given(lambda m, x: x + m.w, w=(1, 4, 5)), floats(4, 5), local=True),
    Case("positions_sliced", given(lambda m, x: x + m.w[:, : x.shape[1]], w=(1, 6, 5)), floats(4, 5), local=True),
    Case("positions_matrix", given(lambda m, x: x + m.w[: x.shape[1]], w=(6, 5)), floats(4, 5)),
    Case(
        "class_token", given(lambda m, x: torch.cat([m.w.expand(x.shape[0], -1, -1), x], 1), w=(1, 1, 5)), floats(4, 5), local=True
    ),
    Case(
        "class_token_repeat", given(lambda m, x: torch.cat([m.w.expand(len(x), 2, 5), x], 1), w=(1, 1, 5)), floats(4, 5), local=True
    ),
]
