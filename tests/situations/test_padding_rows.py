"""The padding row of a table has no noise, in whichever way the table is used."""

from __future__ import annotations

import pytest
import torch
from laws import EXACT, LISTED, MEMBERS, distance, oracle
from torch import Tensor, nn

import flipout

NOISES = {
    "additive": flipout.Gaussian(0.3),
    "relative": flipout.Gaussian(0.3, relative=True),
    "learnable": flipout.Gaussian(0.3, learnable=True),
    "signs": flipout.Rademacher(0.3),
}


class Tied(nn.Module):
    def __init__(self, padding: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=padding)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(i)))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("build", [lambda: nn.Embedding(7, 4, padding_idx=-2), lambda: nn.EmbeddingBag(7, 4, padding_idx=5)])
def test_padding_alone_stays_zero(build, estimator: str, noise: str) -> None:
    net = flipout.Perturbed(build().double(), NOISES[noise], LISTED[estimator]).eval()
    i = torch.randint(7, (MEMBERS, 6))
    with net.hold(MEMBERS) as draw:
        assert not net(torch.full((MEMBERS, 6), 5)).any()
        assert all(not draw.weights(n)["weight"][5].any() for n in range(MEMBERS))
        assert distance(net(i), oracle(net, draw, [i])) <= EXACT
        if estimator != "shared":
            draw.resample([1])
            assert not draw.weights(1)["weight"][5].any()
            assert draw.weights(1)["weight"][4].any()


@pytest.mark.parametrize("estimator", LISTED)
def test_a_tied_output_layer_has_none_there_either(estimator: str) -> None:
    net = flipout.Perturbed(Tied(0).double(), flipout.Gaussian(0.3, learnable=True), LISTED[estimator])
    i = torch.randint(1, 7, (MEMBERS, 5))
    with net.hold(MEMBERS) as draw:
        y = net(i)
        assert distance(y, oracle(net, draw, [i])) <= EXACT
        assert not y[..., 0].any()
    y.square().sum().backward()
    (scale,) = net.noise_parameters()
    assert not scale.grad[0].any()
    assert scale.grad[1:].any()


def test_per_token_signs_leave_it_alone() -> None:
    net = flipout.Perturbed(nn.Embedding(7, 4, padding_idx=5), flipout.Gaussian(0.3), flipout.Flipout(granularity="token"))
    assert not net(torch.full((3, 2), 5)).any()
    assert net(torch.full((3, 2), 4)).any()
