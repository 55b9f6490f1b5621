"""Scales that are a function of the mean weight."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import flipout
from flipout import ArgumentError, bayes


def largest(weight):
    """A twentieth of the largest weight of each output."""
    return 0.05 * weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))


def polynomial(weight):
    return 0.01 + 0.2 * weight.abs() - 0.05 * weight.square()


MODULES = {"linear": (lambda: nn.Linear(5, 3), (5,)), "conv": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5))}
ESTIMATORS = [flipout.Flipout(), flipout.Shared(), flipout.Independent(), flipout.LowRank(2)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("function", [largest, polynomial], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", MODULES)
def test_has_the_scale_of_the_weights(kind, function, estimator):
    make, shape = MODULES[kind]
    net = flipout.Perturbed(make().double(), flipout.Gaussian(function), estimator, include="*weight")
    weight = net.module.weight
    g = torch.Generator().manual_seed(0)
    squares = torch.zeros_like(weight)
    draws = 200
    for _ in range(draws):
        with net.hold(1, g) as draw, torch.no_grad():
            squares += (draw.weights(0)["weight"] - weight).square() / draws
    spread = math.sqrt(2 / draws) if not isinstance(estimator, flipout.LowRank) else math.sqrt(8 / draws)
    z = (squares / function(weight.detach()).square() - 1) / spread
    assert float(z.detach().abs().max()) < 5
    with net.hold(4, g) as draw:
        x = torch.randn(4, *shape, dtype=torch.float64, generator=g)
        rows = torch.cat([draw.module(n)(x[n : n + 1]) for n in range(4)])
        torch.testing.assert_close(net(x), rows)


def test_follows_the_mean_and_takes_no_gradient_through_the_scale():
    layer = nn.Linear(4, 2, bias=False).double()
    net = flipout.Perturbed(layer, flipout.Gaussian(lambda W: W.abs()))
    x = torch.randn(3, 4, dtype=torch.float64)
    with net.hold(3) as draw:
        before = draw.weights(0)["weight"].detach() - layer.weight.detach()
        net(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 4))  # as if the scale stood still
        with torch.no_grad():
            layer.weight.mul_(2)
        torch.testing.assert_close(draw.weights(0)["weight"].detach() - layer.weight.detach(), 2 * before)
        torch.testing.assert_close(net(x)[0], draw.module(0)(x[0]))


def test_chips_are_members_of_one_batch():
    torch.manual_seed(0)
    net = flipout.Perturbed(nn.Linear(4, 2), flipout.Gaussian(largest), include="*weight").eval()
    x = torch.randn(6, 4)
    with net.using(flipout.Independent()), net.hold(members=8) as draw:
        outputs = net(x.repeat(8, 1)).view(8, 6, 2)
        for n in range(8):
            torch.testing.assert_close(outputs[n], draw.module(n)(x))
    assert bool((outputs.std(0) > 0).all())


def test_can_start_learnable_scales_and_relative_noise():
    layer = nn.Linear(4, 2)
    net = flipout.Perturbed(layer, flipout.Gaussian(polynomial, learnable=True))
    torch.testing.assert_close(net.scales["weight"].exp(), polynomial(layer.weight.detach()))
    twice = flipout.Gaussian(lambda W: torch.full_like(W, 0.5), relative=True)
    torch.testing.assert_close(twice.scale(layer.weight), 0.5 * layer.weight.detach().abs())
    assert copy.deepcopy(net)(torch.ones(2, 4)).shape == (2, 2)
    assert bayes.kl_divergence(flipout.Perturbed(layer, flipout.Gaussian(polynomial)), Normal(0.0, 1.0)) > 0


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda W: W.new_ones(7), r"shape \(7,\) for a weight of shape \(2, 4\)"),
        (lambda W: 0.1, "gave float"),
        (lambda W: W.abs() - 10.0, "not negative"),
        (lambda W: W / 0, "finite"),
        (lambda W: W.abs() * torch.ones(1, requires_grad=True), "with a graph"),
    ],
)
def test_refuses_what_is_no_scale_and_changes_nothing(function, told):
    layer = nn.Linear(4, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ArgumentError, match=f"the noise of 'weight': .*{told}"):
        flipout.Perturbed(layer, flipout.Gaussian(function))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer(torch.ones(1, 4)).shape == (1, 2)


def test_refuses_a_scale_that_became_none_and_a_zero_where_it_is_infinite():
    layer = nn.Linear(4, 2, bias=False)
    net = flipout.Perturbed(layer, flipout.Gaussian(lambda W: 3.0 - W.abs()))
    with torch.no_grad():
        layer.weight[0, 0] = 4.0
    with pytest.raises(ArgumentError, match="from -1 to"):
        net(torch.ones(2, 4))
    with torch.no_grad():
        layer.weight[0, 0] = 3.0
    net(torch.ones(2, 4))
    with pytest.raises(ArgumentError, match="add a floor"):
        bayes.kl_divergence(net, Normal(0.0, 1.0))
    with pytest.raises(ArgumentError, match="add a floor"):
        flipout.Perturbed(layer, flipout.Gaussian(lambda W: 3.0 - W.abs(), learnable=True))
