"""A table with ``sparse=True`` gets a sparse gradient, the same as the dense one."""

from __future__ import annotations

import pytest
import torch
from laws import LISTED, MEMBERS
from torch import nn

import flipout

TABLES = {
    "embedding": lambda sparse: nn.Embedding(7, 4, sparse=sparse),
    "bag_sum": lambda sparse: nn.EmbeddingBag(7, 4, mode="sum", sparse=sparse),
    "bag_mean": lambda sparse: nn.EmbeddingBag(7, 4, mode="mean", sparse=sparse, padding_idx=2),
}


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("table", TABLES)
def test_sparse_gradients_are_the_dense_ones(table: str, estimator: str) -> None:
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = flipout.Perturbed(
            TABLES[table](sparse), flipout.Gaussian(0.1), LISTED[estimator], generator=torch.Generator().manual_seed(1)
        )
        y = net(torch.randint(7, (MEMBERS, 5), generator=torch.Generator().manual_seed(2)))
        y.square().sum().backward()
        grad = net.module.weight.grad
        assert grad is not None
        assert grad.is_sparse == sparse
        grads.append(grad.to_dense())
    torch.testing.assert_close(*grads)


def test_the_maximum_of_a_bag_has_no_sparse_gradient() -> None:
    net = flipout.Perturbed(nn.EmbeddingBag(7, 4, mode="max", sparse=True), flipout.Gaussian(0.1))
    with pytest.raises(ValueError, match="sparse"):
        net(torch.zeros(3, 2, dtype=torch.long))
