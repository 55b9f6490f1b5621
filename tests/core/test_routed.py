"""Rows that were routed to the matrices of a stack: exact per token, refused per example."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from laws import EXACT, distance
from torch import Tensor, nn
from torch.nn import functional as F

import flipout
from flipout.rules.routed import grouped_product

STACK, OUT, IN, ROWS = 4, 6, 8, 10
ENDS = torch.tensor([3, 3, 8, 10], dtype=torch.int32)  # the second matrix gets no row
GROUP = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3, 3])
TOKEN = flipout.Flipout(granularity="token")


class Experts(nn.Module):
    """A stack of matrices that a function meets."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(STACK, OUT, IN, generator=torch.Generator().manual_seed(0)))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.stack)


def by_run(x: Tensor, stack: Tensor) -> Tensor:
    """The grouped product, one run of rows at a time."""
    starts = [0, *ENDS.tolist()]
    return torch.cat([x[a:b] @ stack[g] for g, (a, b) in enumerate(pairwise(starts))])


def test_every_row_sees_a_matrix_of_its_own() -> None:
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    net = flipout.Perturbed(Experts(lambda x, _: x).double(), flipout.Gaussian(0.5), TOKEN)
    (stack,) = net.draw(ROWS).carriers(ROWS, 0)
    drawn = stack.transpose(-2, -1).for_tokens(ROWS)  # type: ignore[attr-defined]
    y, dense = grouped_product(x, drawn, ENDS, by_run), drawn.dense()
    expected = torch.einsum("ti,tio->to", x, dense[torch.arange(ROWS), GROUP])
    assert distance(y, expected) < EXACT
    assert len(torch.unique(dense.flatten(1), dim=0)) == ROWS


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
def test_torchs_grouped_product() -> None:
    module = Experts(lambda x, stack: F.grouped_mm(x, stack.transpose(-2, -1), offs=ENDS))
    x = torch.randn(ROWS, IN)
    plain = module(x)
    tiny = flipout.Perturbed(module, flipout.Gaussian(1e-6), TOKEN)
    assert distance(tiny(x), plain) < 1e-4
    net = flipout.Perturbed(module, flipout.Gaussian(0.5), TOKEN, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([net(x).detach() for _ in range(400)])
    noise = 0.5 * x.norm(dim=-1, keepdim=True).expand(ROWS, OUT)
    assert bool(((draws.std(0) / noise - 1).abs() < 0.25).all())  # seven standard errors of 400 draws
    with pytest.raises(flipout.BatchError, match=r"'stack'.*granularity=\"token\""):
        flipout.Perturbed(module, flipout.Gaussian(0.5))(x)


def test_one_matrix_picked_by_a_router() -> None:
    picked = torch.tensor(2)
    module = Experts(lambda x, stack: F.linear(x, stack[picked]))
    x = torch.randn(ROWS, IN)
    y = flipout.Perturbed(module, flipout.Gaussian(0.5), TOKEN)(x[:1].expand(ROWS, IN))
    assert len(torch.unique(y, dim=0)) > 1  # equal rows, unequal signs
    with pytest.raises(flipout.BatchError, match="'stack'"):
        flipout.Perturbed(module, flipout.Gaussian(0.5))(x)


def test_a_stack_picked_by_each_examples_own_index_is_exact() -> None:
    class Picked(Experts):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
            return torch.einsum("ni,noi->no", x, self.stack[index])

    module = Picked(lambda x, _: x).double()
    net = flipout.Perturbed(module, flipout.Gaussian(0.5), generator=torch.Generator().manual_seed(0))
    x = torch.randn(ROWS, IN, dtype=torch.float64)
    with net.hold(members=ROWS) as draw:
        y = net(x, GROUP)
        expected = [draw.weights(n)["stack"][GROUP[n]] @ x[n] for n in range(ROWS)]
    assert distance(y, torch.stack(expected)) < EXACT
