"""Gaussian heads, and the likelihood of several points at once."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import flipout
from flipout import ArgumentError, bayes


def test_the_loss_is_the_density_of_torch():
    g = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(7, 6, generator=g), torch.randn(7, 3, generator=g)
    expected = -Normal(outputs[:, :3], outputs[:, 3:].mul(0.5).exp()).log_prob(y).sum(1).mean()
    torch.testing.assert_close(bayes.gaussian_nll(outputs, y), expected)


def test_a_head_learns_where_the_data_are_noisy():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.rand(400, 1, generator=g) * 2 - 1
    y = x + torch.where(x > 0, 0.5, 0.05) * torch.randn(400, 1, generator=g)
    net = flipout.Perturbed(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)), flipout.Gaussian(0.01))
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(300):
        optimiser.zero_grad()
        bayes.gaussian_nll(net(x), y).backward()
        optimiser.step()
    found = bayes.predict(net, torch.tensor([[-0.6], [0.6]]), samples=16, task="gaussian", generator=g)
    assert found.noise.shape == (16, 2, 1)
    assert 0.03 < float(found.std[0]) < 0.12
    assert 0.35 < float(found.std[1]) < 0.65
    short = bayes.predict(net, x[:2], samples=16, task="gaussian", keep_samples=False)
    assert short.samples is None
    assert short.noise.shape == (2, 1)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_the_joint_likelihood_is_that_of_the_exact_posterior(points):
    """Of y = w x + noise with w ~ N(0, 1) it is a multivariate normal of covariance x xᵀ + s I."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.linspace(0.2, 1.0, points, dtype=torch.float64)[:, None], 0.5
    y = 0.7 * x
    weights = torch.randn(200_000, generator=g, dtype=torch.float64)
    found = bayes.Regression.of(weights[:, None, None] * x, noise)
    exact = MultivariateNormal(torch.zeros(points, dtype=torch.float64), x @ x.T + noise * torch.eye(points)).log_prob(y[:, 0])
    assert bayes.joint_log_likelihood(found, y, points) == pytest.approx(float(exact) / points, abs=0.01)


def test_groups_are_consecutive_and_one_point_is_the_predictive_likelihood():
    g = torch.Generator().manual_seed(0)
    found = bayes.Classification.of(torch.randn(6, 11, 3, generator=g).softmax(-1))
    labels = torch.randint(3, (11,), generator=g)
    assert bayes.joint_log_likelihood(found, labels, 1) == pytest.approx(-bayes.negative_log_likelihood(found, labels), abs=1e-6)
    first = bayes.Classification.of(found.samples[:, :10])
    assert bayes.joint_log_likelihood(found, labels, 5) == bayes.joint_log_likelihood(first, labels[:10], 5)


def test_two_targets_count_once_each():
    outputs = torch.zeros(3, 4, 2)
    found = bayes.Regression.of(outputs, torch.tensor([1.0, 4.0]))
    expected = -math.log(2 * math.pi) - 0.5 * math.log(4.0)
    assert bayes.joint_log_likelihood(found, torch.zeros(4, 2), 2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: bayes.gaussian_nll(torch.zeros(3, 3), torch.zeros(3)), "D means and then D log-variances"),
        (lambda: bayes.gaussian_nll(torch.zeros(3, 4), torch.zeros(3)), r"expected \(3, 2\)"),
        (lambda: bayes.Regression.of_gaussians(torch.zeros(2, 3, 3)), r"found \(3, 3\)"),
        (lambda: bayes.joint_log_likelihood(bayes.Regression.of(torch.zeros(2, 3)), torch.zeros(3)), "no noise of the"),
        (lambda: bayes.joint_log_likelihood(bayes.Regression.of(torch.zeros(2, 3), 1.0), torch.zeros(2)), "prediction's shape"),
        (lambda: bayes.joint_log_likelihood(bayes.Regression.of(torch.zeros(2, 3), 1.0), torch.zeros(3)), "make no group"),
        (lambda: bayes.joint_log_likelihood(bayes.Regression.of(torch.zeros(2, 3), 1.0, False), torch.zeros(3)), "keep_samples"),
        (lambda: bayes.joint_log_likelihood(bayes.Regression.of(torch.zeros(2, 3), 1.0), torch.zeros(3), 0), "at least 1"),
    ],
)
def test_refuses_what_does_not_belong_together(call, told):
    with pytest.raises(ArgumentError, match=told):
        call()
