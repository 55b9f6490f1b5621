"""The ELBO, its schedules, and a loss that is no number."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import flipout
from flipout import ArgumentError, NotFiniteError, bayes


def test_the_kl_is_divided_by_the_data_set_once():
    nll, kl = torch.tensor(1.5, requires_grad=True), torch.tensor(600.0, requires_grad=True)
    found = bayes.elbo_loss(nll, kl, 300, temperature=0.5)
    assert (found.loss.item(), found.nll.item(), found.kl.item(), found.temperature) == (2.5, 1.5, 2.0, 0.5)
    found.loss.backward()
    assert (nll.grad.item(), kl.grad.item()) == (1.0, pytest.approx(0.5 / 300))


def test_mini_batches_average_to_the_whole_elbo():
    """Whatever the batch size: the mean over an epoch is the loss of the whole set."""
    net = flipout.Perturbed(nn.Linear(3, 2), flipout.Gaussian(0.1, learnable=True)).eval()
    x, y = torch.randn(24, 3), torch.randint(2, (24,))
    kl = bayes.kl_divergence(net, Normal(0.0, 1.0))

    def loss(rows):
        return bayes.elbo_loss(nn.functional.cross_entropy(net(x[rows]), y[rows]), kl, len(x)).loss

    whole = loss(slice(None)).item()
    for size in (1, 8, 12):
        parts = [loss(slice(i, i + size)).item() for i in range(0, 24, size)]
        assert sum(parts) / len(parts) == pytest.approx(whole, rel=1e-5)


def test_the_elbo_is_below_the_evidence_and_meets_it_at_the_exact_posterior():
    """y ~ N(w x, 1), w ~ N(0, 1): the negative ELBO at the exact posterior is minus the log evidence."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, generator=g, dtype=torch.float64)
    y = 0.8 * x + torch.randn(6, 1, generator=g, dtype=torch.float64)
    precision = 1 + float((x * x).sum())
    mean, std = float((x * y).sum()) / precision, precision**-0.5
    covariance = torch.eye(6, dtype=torch.float64) + x @ x.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(y[:, 0])

    def negative_elbo(mean, std):
        layer = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(layer.weight, mean)
        net = flipout.Perturbed(layer, flipout.Gaussian(std, learnable=True))
        square = (y - mean * x).square() + std**2 * x.square()  # E_q of the squared error, exactly
        nll = (0.5 * square + 0.5 * math.log(2 * math.pi)).mean()
        return 6 * bayes.elbo_loss(nll, bayes.kl_divergence(net, Normal(0.0, 1.0)), 6).loss.item()

    assert negative_elbo(mean, std) == pytest.approx(-float(evidence), rel=1e-6)
    for other in ((mean + 0.3, std), (mean, 2 * std), (mean - 0.1, 0.5 * std)):
        assert negative_elbo(*other) > -float(evidence)


@pytest.mark.parametrize("size", [None, 0, -5, 2.5, True, "60000"])
def test_refuses_data_set_sizes(size):
    with pytest.raises(ArgumentError, match=r"dataset_size=.*number of training examples"):
        bayes.elbo_loss(torch.tensor(1.0), torch.tensor(1.0), size)


def test_refuses_what_is_no_scalar_and_temperatures():
    with pytest.raises(ArgumentError, match="mean over the examples"):
        bayes.elbo_loss(torch.ones(4), torch.tensor(1.0), 10)
    with pytest.raises(ArgumentError, match="sum over all weights"):
        bayes.elbo_loss(torch.tensor(1.0), torch.ones(4), 10)
    with pytest.raises(ArgumentError, match="expected a tensor"):
        bayes.elbo_loss(1.0, torch.tensor(1.0), 10)
    for temperature in (-1.0, math.inf, math.nan, "cold"):
        with pytest.raises(ArgumentError, match="temperature"):
            bayes.elbo_loss(torch.tensor(1.0), torch.tensor(1.0), 10, temperature)


def test_schedules():
    rising = [bayes.linear_annealing(step, 10, start=0.2) for step in range(15)]
    assert rising[0] == 0.2
    assert rising[10:] == [1.0] * 5
    assert rising == sorted(rising)
    cycle = [bayes.cyclical_annealing(step, 8, rising=0.5) for step in range(24)]
    assert cycle[:8] == cycle[8:16] == cycle[16:]
    assert cycle[0] == 0.0
    assert cycle[4:8] == [1.0] * 4
    for batches in (1, 2, 7, 500):
        weights = [bayes.minibatch_weight(i, batches) for i in range(batches)]
        assert math.fsum(weights) == pytest.approx(batches)
        assert all(a == pytest.approx(2 * b) for a, b in itertools.pairwise(weights) if b > 1e-300)


@pytest.mark.parametrize(
    "act",
    [
        lambda: bayes.linear_annealing(-1, 10),
        lambda: bayes.linear_annealing(1, 0),
        lambda: bayes.linear_annealing(1, 10, start=2.0),
        lambda: bayes.cyclical_annealing(0, 0),
        lambda: bayes.cyclical_annealing(0, 5, rising=0.0),
        lambda: bayes.minibatch_weight(3, 3),
        lambda: bayes.minibatch_weight(0.5, 3),
    ],
)
def test_schedules_refuse(act):
    with pytest.raises(ArgumentError):
        act()


def test_a_loss_that_is_no_number_names_the_first_parameter():
    net = flipout.Perturbed(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), flipout.Gaussian(0.1, learnable=True))
    assert bayes.require_finite(net, bayes.elbo_loss(torch.tensor(1.0), 0.0, 10)) == 1.0
    with pytest.raises(NotFiniteError, match="look to the batch"):
        bayes.require_finite(net, math.nan)
    net.module[1].bias.grad = torch.full((2,), math.inf)
    with pytest.raises(NotFiniteError, match=r"gradient that is not is that of '1.bias'"):
        bayes.require_finite(net, torch.tensor(math.nan))
    with torch.no_grad():
        net.log_std["1/weight"].fill_(math.nan)
    net.module[1].bias.grad = None
    with pytest.raises(NotFiniteError, match=r"the loss is inf; the first parameter that is not finite is 'the scale of 1.weight'"):
        bayes.require_finite(net, torch.tensor(math.inf))
    with torch.no_grad():
        net.module[0].weight[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"'0.weight'"):
        bayes.require_finite(net, torch.tensor(math.nan))
