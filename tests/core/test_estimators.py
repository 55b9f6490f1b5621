"""Estimators: which noise each takes, and that they can be switched on the same weights."""

from __future__ import annotations

import pickle

import pytest
import torch
from laws import LISTED
from torch import distributions as D
from torch import nn

import flipout

SKEWED = flipout.FromDistribution(D.TransformedDistribution(D.Exponential(1.0), [D.AffineTransform(-1.0, 1.0)]))
LAPLACE = flipout.FromDistribution(D.Laplace(0.0, 0.2))
EVERY = [
    flipout.Flipout(),
    flipout.Flipout(granularity="token"),
    flipout.Shared(),
    flipout.Independent(),
    flipout.LocalReparameterization(),
    flipout.LowRank(),
    flipout.LowRank(rank=3),
]


@pytest.mark.parametrize("noise", [flipout.DropConnect(0.2), SKEWED], ids=["dropconnect", "skewed"])
@pytest.mark.parametrize("granularity", ["example", "token"])
def test_flipout_refuses_asymmetric_noise(noise: flipout.Noise, granularity: str) -> None:
    with pytest.raises(flipout.UnsupportedNoiseError, match=r"symmetric about zero.*'weight'.*use Independent\(\) or Shared\(\)"):
        flipout.Perturbed(nn.Linear(3, 2), noise, flipout.Flipout(granularity=granularity))


@pytest.mark.parametrize("estimator", [flipout.Shared(), flipout.Independent()], ids=str)
@pytest.mark.parametrize("noise", [flipout.DropConnect(0.2), SKEWED], ids=["dropconnect", "skewed"])
def test_asymmetric_noise_is_served_by_what_draws_no_signs(noise: flipout.Noise, estimator: flipout.Estimator) -> None:
    net = flipout.Perturbed(nn.Linear(3, 2), noise, estimator)
    assert net(torch.ones(4, 3)).shape == (4, 2)


@pytest.mark.parametrize(
    "noise", [flipout.Rademacher(0.1), flipout.DropConnect(), LAPLACE], ids=["rademacher", "dropconnect", "laplace"]
)
def test_local_reparameterization_is_gaussian(noise: flipout.Noise) -> None:
    with pytest.raises(flipout.UnsupportedNoiseError, match=r"Gaussian noise only, and 'weight' has .*use Flipout\(\)"):
        flipout.Perturbed(nn.Linear(3, 2), noise, flipout.LocalReparameterization())


@pytest.mark.parametrize("noise", [flipout.DropConnect(), LAPLACE], ids=["dropconnect", "laplace"])
def test_low_rank_needs_unit_variance(noise: flipout.Noise) -> None:
    with pytest.raises(flipout.UnsupportedNoiseError, match=r"Gaussian or Rademacher noise, and 'weight' has"):
        flipout.Perturbed(nn.Linear(3, 2), noise, flipout.LowRank())


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "2"])
def test_a_rank_is_a_positive_integer(rank: object) -> None:
    with pytest.raises(flipout.ArgumentError, match="rank is a positive integer"):
        flipout.LowRank(rank=rank)  # type: ignore[arg-type]


def test_granularity_is_example_or_token() -> None:
    with pytest.raises(flipout.ArgumentError, match='choose "example" or "token"'):
        flipout.Flipout(granularity="pixel")


@pytest.mark.parametrize("value", ["flipout", flipout.Flipout, None])
def test_an_estimator_is_an_instance(value: object) -> None:
    with pytest.raises(flipout.ArgumentError, match=r"expected an estimator such as flipout\.Flipout\(\)"):
        flipout.Perturbed(nn.Linear(3, 2), flipout.Gaussian(0.1), value)  # type: ignore[arg-type]


def test_local_reparameterization_refuses_a_kernel_by_name() -> None:
    net = flipout.Perturbed(nn.Sequential(nn.Conv2d(2, 3, 3)), flipout.Gaussian(0.1), flipout.LocalReparameterization())
    with pytest.raises(flipout.UnsupportedNoiseError, match=r"met the kernel '0\.weight'.*biased.*use Flipout\(\), or exclude"):
        net(torch.zeros(2, 2, 4, 4))
    assert all(type(p) is nn.Parameter for p in net.module.parameters())


def test_local_reparameterization_refuses_sequences_and_reuse() -> None:
    layer = nn.Linear(3, 3)
    local = flipout.LocalReparameterization()
    with pytest.raises(flipout.UnsupportedNoiseError, match=r"input of shape \(4, 5, 3\).*use Flipout\(\) for sequences"):
        flipout.Perturbed(layer, flipout.Gaussian(0.1), local)(torch.zeros(4, 5, 3))
    with pytest.raises(flipout.UnsupportedNoiseError, match="twice in one forward pass"):
        flipout.Perturbed(nn.Sequential(layer, layer), flipout.Gaussian(0.1), local)(torch.zeros(4, 3))


def test_estimators_are_values() -> None:
    for estimator in EVERY:
        assert pickle.loads(pickle.dumps(estimator)) == estimator
        assert hash(estimator) == hash(pickle.loads(pickle.dumps(estimator)))
    assert len(set(EVERY)) == len(EVERY)


@pytest.mark.parametrize("estimator", EVERY, ids=str)
def test_switching_at_call_time(estimator: flipout.Estimator) -> None:
    net = flipout.Perturbed(nn.Linear(3, 2), flipout.Gaussian(0.1), flipout.Independent())
    x = torch.ones(4, 3)
    with net.using(estimator):
        assert net.estimator is estimator
        rows = net(x)
        same = all(torch.equal(rows[0], row) for row in rows)
        assert same is isinstance(estimator, flipout.Shared)
    assert net.estimator == flipout.Independent()


def test_a_refused_switch_changes_nothing() -> None:
    net = flipout.Perturbed(nn.Linear(3, 2), flipout.DropConnect(0.2), flipout.Independent())
    with pytest.raises(flipout.UnsupportedNoiseError), net.using(flipout.Flipout()):
        pytest.fail("entered")
    assert net.estimator == flipout.Independent()


@pytest.mark.parametrize("estimator", LISTED)
def test_a_mixture_of_noises_by_name(estimator: str) -> None:
    net = flipout.Perturbed(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        {"0.weight": flipout.Rademacher(0.3), "1.*": flipout.Gaussian(0.1, learnable=True)},
        LISTED[estimator],
    )
    assert list(net.noises) == ["0.weight", "1.weight", "1.bias"]
    assert {tuple(p.shape) for p in net.noise_parameters()} == {(2, 4), (2,)}
    with net.hold(3) as draw:
        weights = draw.weights(2)
    assert sorted(weights) == ["0.weight", "1.bias", "1.weight"]
    if estimator != "low_rank":
        assert torch.allclose((weights["0.weight"] - net.module[0].weight).abs(), torch.tensor(0.3), atol=1e-6)
