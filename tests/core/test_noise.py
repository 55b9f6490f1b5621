"""Noises: moments, densities, symmetry, scale."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from laws import Z_LIMIT, worst, z_mean
from torch import distributions as D

import flipout
from flipout.noise import Noise

CPU = torch.device("cpu")

#: Each noise with the second moment of its unit draw.
NOISES: dict[str, tuple[Noise, float]] = {
    "gaussian": (flipout.Gaussian(0.3), 1.0),
    "gaussian_relative": (flipout.Gaussian(0.3, relative=True), 1.0),
    "gaussian_learnable": (flipout.Gaussian(0.3, learnable=True), 1.0),
    "multiplicative": (flipout.MultiplicativeGaussian(0.3), 1.0),
    "rademacher": (flipout.Rademacher(0.3), 1.0),
    "rademacher_relative": (flipout.Rademacher(0.3, relative=True), 1.0),
    "dropconnect": (flipout.DropConnect(), 1.0),
    "dropconnect_low": (flipout.DropConnect(0.2), 0.25),
    "dropconnect_high": (flipout.DropConnect(0.9), 9.0),
    "laplace": (flipout.FromDistribution(D.Laplace(0.0, 0.2)), 0.08),
    "uniform": (flipout.FromDistribution(D.Uniform(-0.6, 0.6)), 0.12),
    "student": (flipout.FromDistribution(D.StudentT(9.0, 0.0, 0.1)), 0.01 * 9 / 7),
    "normal": (flipout.FromDistribution(D.Normal(0.0, 0.3), relative=True), 0.09),
    "skewed": (
        flipout.FromDistribution(D.TransformedDistribution(D.Exponential(2.0), [D.AffineTransform(-0.5, 1.0)])),
        0.25,
    ),
}

every_noise = pytest.mark.parametrize("name", NOISES)


def _unit(noise: Noise, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return noise.unit(torch.Size(shape), generator=torch.Generator().manual_seed(seed), dtype=dtype, device=CPU)


@every_noise
def test_the_unit_draw_has_mean_zero_and_its_variance(name: str) -> None:
    noise, second = NOISES[name]
    unit = _unit(noise, 200, 300).flatten()
    assert abs(z_mean(unit, 0.0)) < Z_LIMIT
    square = unit.square()
    if square.std() > 1e-9:
        assert abs(z_mean(square, second)) < Z_LIMIT
    else:
        assert torch.allclose(square, torch.full_like(square, second))


@every_noise
def test_entries_are_uncorrelated(name: str) -> None:
    unit = _unit(NOISES[name][0], 5000, 12)
    products = (unit[:, :, None] * unit[:, None, :])[:, ~torch.eye(12, dtype=torch.bool)]
    assert worst(z_mean(products, 0.0)) < Z_LIMIT


@every_noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_draw_has_the_dtype_and_shape_asked_for(name: str, dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3,), (2, 0, 4), (2, 3, 4)):
        unit = _unit(NOISES[name][0], *shape, dtype=dtype)
        assert unit.shape == shape
        assert unit.dtype == dtype
        assert not unit.requires_grad
        assert unit.isfinite().all()


@every_noise
def test_one_seed_one_draw_and_the_global_state_untouched(name: str) -> None:
    noise, _ = NOISES[name]
    before = torch.random.get_rng_state()
    assert torch.equal(_unit(noise, 4, 5), _unit(noise, 4, 5))
    assert not torch.equal(_unit(noise, 40, 5), _unit(noise, 40, 5, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


SYMMETRIC = {name: "low" not in name and "high" not in name and "skewed" not in name for name in NOISES}


@every_noise
def test_the_flag_of_symmetry_is_right(name: str) -> None:
    assert NOISES[name][0].symmetric is SYMMETRIC[name]
    third = _unit(NOISES[name][0], 60_000).pow(3)
    if SYMMETRIC[name]:
        assert abs(z_mean(third, 0.0)) < Z_LIMIT
    else:
        assert abs(z_mean(third, 0.0)) > Z_LIMIT


@pytest.mark.parametrize("name", [name for name in NOISES if not NOISES[name][0].discrete])
@pytest.mark.parametrize("mean", [0.7, -1.3])
def test_the_density_integrates_to_one(name: str, mean: float) -> None:
    noise, second = NOISES[name]
    w = torch.tensor(mean, dtype=torch.float64)
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = noise.log_prob(grid, w.expand_as(grid)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-3)
    assert torch.trapezoid(density * grid, grid).item() == pytest.approx(0.0, abs=1e-3)
    variance = second * noise.scale(w).item() ** 2
    assert torch.trapezoid(density * grid**2, grid).item() == pytest.approx(variance, rel=1e-2)


@pytest.mark.parametrize("name", [name for name in NOISES if NOISES[name][0].discrete])
@pytest.mark.parametrize("mean", [0.7, -1.3])
def test_the_masses_sum_to_one(name: str, mean: float) -> None:
    noise, _ = NOISES[name]
    w = torch.full((2000,), mean, dtype=torch.float64)
    support = noise.perturbation(_unit(noise, 2000), w).unique()
    masses = noise.log_prob(support, torch.full_like(support, mean)).exp()
    assert masses.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert (masses * support).sum().item() == pytest.approx(0.0, abs=1e-9)
    assert noise.log_prob(support + 0.1, torch.full_like(support, mean)).max() == -math.inf


def test_densities_are_those_of_torch() -> None:
    at, mean = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.full((7,), -2.0, dtype=torch.float64)
    assert torch.allclose(flipout.Gaussian(0.3).log_prob(at, mean), D.Normal(0, 0.3).log_prob(at).double())
    assert torch.allclose(flipout.MultiplicativeGaussian(0.3).log_prob(at, mean), D.Normal(0, 0.6).log_prob(at).double())
    assert torch.allclose(flipout.FromDistribution(D.Laplace(0.0, 0.2)).log_prob(at, mean), D.Laplace(0, 0.2).log_prob(at).double())
    log_std = torch.full((7,), math.log(0.4), dtype=torch.float64)
    learnable = flipout.Gaussian(0.1, learnable=True)
    assert torch.allclose(learnable.log_prob(at, mean, log_std), D.Normal(0, 0.4).log_prob(at).double())


def test_draws_follow_the_inverse_distribution_function() -> None:
    """Kolmogorov-Smirnov distance of every continuous law to its own distribution function."""
    for name in ("laplace", "uniform", "normal"):
        noise, _ = NOISES[name]
        assert isinstance(noise, flipout.FromDistribution)
        sorted_cdf = noise.dist.cdf(_unit(noise, 40_000)).sort().values
        distance = (sorted_cdf - torch.linspace(0, 1, 40_000)).abs().max().item()
        assert distance < 2.2 / 200, name  # chance below 2e-4


@every_noise
def test_the_scale_is_the_size_of_the_unit_perturbation(name: str) -> None:
    noise, _ = NOISES[name]
    mean = torch.tensor([[0.5, -2.0], [1.0, 3.0]], dtype=torch.float64)
    log_std = noise.initial_log_std(mean) if noise.learnable else None
    scale = noise.scale(mean, log_std)
    std = float(noise.std)
    assert torch.allclose(scale, mean.abs() * std if noise.relative else torch.full_like(mean, std))
    unit = _unit(noise, 2, 2)
    assert torch.allclose(noise.perturbation(unit, mean, log_std).abs(), unit.abs() * scale)


def test_a_tensor_of_scales_broadcasts() -> None:
    noise = flipout.Gaussian(torch.tensor([0.1, 0.2]))
    mean = torch.ones(3, 2)
    assert torch.allclose(noise.scale(mean), torch.tensor([0.1, 0.2]).expand(3, 2))
    learnable = flipout.Gaussian(torch.tensor([0.1, 0.2]), learnable=True)
    assert torch.allclose(learnable.initial_log_std(mean).exp(), torch.tensor([0.1, 0.2]).expand(3, 2))
    net = flipout.Perturbed(torch.nn.Linear(2, 3, bias=False), noise)
    assert net(torch.ones(4, 2)).shape == (4, 3)


@pytest.mark.parametrize("relative", [False, True])
def test_the_perturbation_differentiates_in_mean_and_scale(relative: bool) -> None:
    noise = flipout.Gaussian(0.3, relative=relative, learnable=True)
    mean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    log_std = noise.initial_log_std(mean.detach()).requires_grad_()
    unit = _unit(noise, 3, 4)
    assert torch.autograd.gradcheck(lambda m, s: noise.perturbation(unit, m, s), (mean, log_std))
    assert torch.autograd.gradgradcheck(lambda m, s: noise.perturbation(unit, m, s), (mean, log_std))
    per_member = _unit(noise, 5, 3, 4)
    assert torch.autograd.gradcheck(lambda m, s: noise.perturbation(per_member, m, s), (mean, log_std))


def test_dropconnect_drops_and_rescales() -> None:
    mean = torch.full((20_000,), 1.5, dtype=torch.float64)
    for p in (0.2, 0.5, 0.9):
        noise = flipout.DropConnect(p)
        weight = mean + noise.perturbation(_unit(noise, 20_000), mean)
        dropped = torch.isclose(weight, torch.zeros_like(weight), atol=1e-12)
        assert torch.allclose(weight[~dropped], torch.tensor(1.5 / (1 - p), dtype=torch.float64))
        assert abs(z_mean(dropped.double(), p)) < Z_LIMIT


def test_noises_are_values() -> None:
    assert flipout.Gaussian(0.3) == flipout.Gaussian(0.3)
    assert flipout.Gaussian(0.3) != flipout.Gaussian(0.4)
    for noise, _ in NOISES.values():
        assert repr(pickle.loads(pickle.dumps(noise))) == repr(noise)
        with pytest.raises(AttributeError):
            noise.std = 2.0  # type: ignore[misc]


def test_a_constant_of_symmetry_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    flipout.FromDistribution(D.StudentT(5.0))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0, 0.0, -1.0, math.nan, math.inf, True, "0.1", None, torch.tensor([0.1, -0.1]), torch.tensor(1)])
@pytest.mark.parametrize("kind", [flipout.Gaussian, flipout.Rademacher, flipout.MultiplicativeGaussian])
def test_a_scale_is_positive_and_finite(kind: type[Noise], std: object) -> None:
    with pytest.raises(flipout.ArgumentError, match=r"a standard deviation is positive and finite; for no noise .* exclude"):
        kind(std)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0, 0.0, 1.0, 1.5, -0.1, math.nan, True, "0.5", None])
def test_dropconnect_takes_a_probability(p: object) -> None:
    with pytest.raises(flipout.ArgumentError, match=r"DropConnect\(p=.*0 < p < 1"):
        flipout.DropConnect(p)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dist", "message"),
    [
        ("normal", "expected a torch.distributions.Distribution"),
        (D.Normal(1.0, 1.0), "its mean is"),
        (D.MultivariateNormal(torch.zeros(2), torch.eye(2)), "event shape"),
        (D.Exponential(1.0), "its mean is"),
    ],
    ids=["text", "shifted", "vector", "positive"],
)
def test_distributions_must_be_centred_laws_of_one_entry(dist: object, message: str) -> None:
    with pytest.raises(flipout.ArgumentError, match=message):
        flipout.FromDistribution(dist)  # type: ignore[arg-type]
