"""What the fast paths cost: how many products run, and what is kept between forward and backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import flipout


class Products(TorchDispatchMode):
    """Counts the matrix products and convolutions that reach the machine."""

    NAMES = frozenset({"mm", "addmm", "linear", "bmm", "baddbmm", "convolution"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.count += 1
        if name == "convolution_backward":
            self.count += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


def products(net: nn.Module, x: Tensor) -> tuple[int, int]:
    """Forward and backward, where the input needs a gradient too."""
    x = x.clone().requires_grad_()
    with Products() as forward:
        y = net(x)
    with Products() as backward:
        y.sum().backward()
    return forward.count, backward.count


LAYERS = {
    "linear": (nn.Linear(6, 5), (8, 6)),
    "linear_3d": (nn.Linear(6, 5), (8, 3, 6)),
    "conv": (nn.Conv2d(2, 3, 3), (8, 2, 5, 5)),
}


@pytest.mark.parametrize("estimator", [flipout.Flipout()], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_two_products_forward_and_four_or_three_backward(layer: str, estimator: flipout.Estimator) -> None:
    """A plain layer takes one and two. The gradient of a fixed additive perturbation is nobody's, so its product is not run."""
    module, shape = LAYERS[layer]
    x = torch.randn(shape)
    assert products(module, x) == (1, 2)
    assert products(flipout.Perturbed(module, flipout.Gaussian(0.1, learnable=True), estimator), x) == (2, 4)
    assert products(flipout.Perturbed(module, flipout.Gaussian(0.1, relative=True), estimator), x) == (2, 4)
    assert products(flipout.Perturbed(module, flipout.Gaussian(0.1), estimator), x) == (2, 3)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_draw_that_all_rows_share_costs_what_a_plain_layer_costs(layer: str) -> None:
    module, shape = LAYERS[layer]
    x = torch.randn(shape)
    assert products(flipout.Perturbed(module, flipout.Gaussian(0.1, learnable=True), flipout.Shared()), x) == (1, 2)
    assert products(flipout.Perturbed(module, flipout.Gaussian(0.1)).eval(), x) == (1, 2)


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, without the parameters and the input."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), x)}
    kept: Counter[int] = Counter()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    held = sum(kept.values())
    y.sum().backward()
    return held


@pytest.mark.parametrize("learnable", [False, True])
def test_a_linear_layer_keeps_one_perturbation_and_a_bit_a_sign(learnable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flipout.estimators._FEW_SIGNS", 0)
    rows, inside, outside = 512, 96, 64
    module, x = nn.Linear(inside, outside, bias=False), torch.randn(rows, inside)
    noise = flipout.Gaussian(0.1, learnable=learnable)
    allowed = kept_bytes(module, x) + 4 * inside * outside + rows * (inside + outside) // 8
    assert kept_bytes(flipout.Perturbed(module, noise), x) <= 1.1 * allowed


@pytest.mark.parametrize("estimator", [flipout.Flipout(), flipout.LowRank(1)], ids=str)
def test_members_that_see_one_batch_share_its_mean_product(estimator: flipout.Estimator) -> None:
    """An expanded axis of members: W̄ x once, not once a member; values and gradients as for a copy of it."""
    module = nn.Linear(24, 16)
    net = flipout.Perturbed(module, flipout.Gaussian(0.1), estimator)
    batch = torch.randn(5, 24)
    with net.hold(members=32):
        x = batch.clone().requires_grad_()
        shared = net(x.unsqueeze(0).expand(32, 5, 24))
        y = batch.clone().requires_grad_()
        copied = net(y.repeat(32, 1, 1))
        torch.testing.assert_close(shared, copied)
        weights = torch.randn_like(shared)
        (shared * weights).sum().backward()
        (copied * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        one = net(batch[0].expand(32, 24))
        torch.testing.assert_close(one, shared.detach()[:, 0])
        counts = []
        for rows in (batch.unsqueeze(0).expand(32, 5, 24), batch.repeat(32, 1, 1)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(rows)
            counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 31 * 5 * 2 * 24 * 16
