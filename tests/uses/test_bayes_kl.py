"""The KL of a net: closed forms against Monte Carlo, each weight once, gradients, and what is refused."""

import math

import pytest
import torch
from laws import z_mean
from torch import nn
from torch.distributions import Categorical, Gumbel, HalfNormal, Laplace, MixtureSameFamily, Normal, Poisson, Uniform, kl

import flipout
from flipout import ArgumentError, Gaussian, bayes
from flipout.bayes.dawson import dawson_integral

SAMPLES = 10**6

#: Posteriors of one weight and priors whose pair has a closed form, far and near, wide and narrow.
NOISES = {
    "gaussian": lambda std: Gaussian(std, learnable=True),
    "relative": lambda std: flipout.MultiplicativeGaussian(std),
    "laplace": lambda std: flipout.FromDistribution(Laplace(0.0, std)),
    "normal": lambda std: flipout.FromDistribution(Normal(0.0, std)),
}
PRIORS = {
    "normal": Normal(0.3, 0.8),
    "laplace": Laplace(-0.2, 0.7),
    "log_uniform": bayes.LogUniform(),
    "gumbel": Gumbel(0.1, 0.9),
}
POINTS = ((0.7, 0.3), (-1.5, 0.05), (0.02, 1.2))
REGISTERED = [
    (noise, prior) for noise in NOISES for prior in PRIORS if not (noise == "laplace" and prior in ("log_uniform", "gumbel"))
]


class One(nn.Module):
    """A net of one weight."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def one(noise, mean, std):
    return flipout.Perturbed(One(mean), NOISES[noise](std))


def log_ratios(net, prior, count):
    """log q(w) - log p(w) of independent draws w ~ q, by the noise's own sampler and density."""
    (site,) = net.sites
    mean = site.mean.detach()
    shape = torch.Size([count, *mean.shape])
    unit = site.noise.unit(shape, generator=torch.Generator().manual_seed(1), dtype=mean.dtype, device=mean.device)
    scale = net.scales.get(site.name)
    perturbation = site.noise.perturbation(unit, mean, None if scale is None else scale.detach())
    found = site.noise.log_prob(perturbation, mean, None if scale is None else scale.detach())
    return (found - prior.log_prob(mean + perturbation)).flatten()


@pytest.mark.parametrize(("noise", "prior"), REGISTERED)
def test_closed_forms_equal_monte_carlo(noise, prior):
    for mean, std in POINTS:
        net = one(noise, mean, std)
        exact = bayes.kl_divergence(net, PRIORS[prior]).item()
        z = z_mean(log_ratios(net, PRIORS[prior], SAMPLES), exact)
        assert abs(float(z)) < 4, (mean, std, exact)


@pytest.mark.parametrize(("noise", "prior"), REGISTERED)
def test_registered_pairs_draw_nothing(noise, prior, monkeypatch):
    monkeypatch.setattr(bayes.posterior.Posterior, "sample", lambda *_: pytest.fail("a draw was made"))
    assert bayes.kl_divergence(one(noise, 0.5, 0.2), PRIORS[prior]).isfinite()


MIXTURE = MixtureSameFamily(Categorical(torch.tensor([0.4, 0.6])), Normal(torch.zeros(2), torch.tensor([1.0, 0.1])))


def test_torchs_own_mixture_is_the_scale_mixture():
    net = flipout.Perturbed(nn.Linear(3, 2), Gaussian(0.2))
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = bayes.kl_divergence(net, bayes.ScaleMixture(0.4, 1.0, 0.1), 3, g[0])
    assert ours.item() == pytest.approx(bayes.kl_divergence(net, MIXTURE, 3, g[1]).item(), rel=1e-5)


@pytest.mark.parametrize("prior", [bayes.ScaleMixture(0.4, 1.0, 0.1), torch.distributions.StudentT(3.0)])
@pytest.mark.parametrize("noise", [Gaussian(0.3, learnable=True), flipout.FromDistribution(Uniform(-0.5, 0.5))])
def test_other_pairs_are_estimated_without_bias(noise, prior):
    net = flipout.Perturbed(One(0.4), noise)
    reference = log_ratios(net, prior, SAMPLES)
    g = torch.Generator().manual_seed(5)
    estimates = torch.stack([bayes.kl_divergence(net, prior, samples=5, generator=g).detach() for _ in range(400)])
    z = (estimates.mean() - reference.mean()) / (estimates.var() / 400 + reference.var() / SAMPLES).sqrt()
    assert abs(float(z)) < 4


def test_an_estimated_kl_has_the_gradient_of_the_exact_one():
    """Through a pair with a closed form, hidden from the registry."""

    class Hidden(torch.distributions.Distribution):
        arg_constraints, support = {}, torch.distributions.constraints.real

        def log_prob(self, value):
            return Normal(0.3, 0.8).log_prob(value)

    net = one("gaussian", 0.7, 0.3)
    parameters = list(net.parameters())
    exact = torch.autograd.grad(bayes.kl_divergence(net, Normal(0.3, 0.8)), parameters)
    g = torch.Generator().manual_seed(3)
    drawn = [torch.autograd.grad(bayes.kl_divergence(net, Hidden(validate_args=False), 5, g), parameters) for _ in range(500)]
    for i, found in enumerate(exact):
        z = z_mean(torch.stack([each[i] for each in drawn]), found)
        assert float(z.abs().max()) < 4


@pytest.mark.parametrize("prior", ["normal", "laplace", "log_uniform"])
def test_gradients_match_finite_differences(prior):
    layer = nn.Linear(3, 2).double()
    net = flipout.Perturbed(layer, Gaussian(0.3, learnable=True))
    names = [name for name, _ in net.named_parameters()]

    def value(*parameters):
        with torch.no_grad():
            pass
        return torch.func.functional_call(_Kl(net, PRIORS[prior]), {f"net.{n}": p for n, p in zip(names, parameters, strict=True)})

    inputs = [p.detach().clone().requires_grad_() for p in net.parameters()]
    assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=2e-4 if prior == "log_uniform" else 1e-6)


class _Kl(nn.Module):
    def __init__(self, net, prior):
        super().__init__()
        self.net, self.prior = net, prior

    def forward(self):
        return bayes.kl_divergence(self.net, self.prior)


def test_the_integral_of_dawson_s_function_is_that_of_its_series():
    """Against 2 ∫ D = Σ (-1)^k 2^(k+1) x^(2k+2) / ((2k+1)!! (2k+2)), and its derivative against 2 D."""
    x = torch.linspace(0.0, 3.0, 61, dtype=torch.float64, requires_grad=True)
    total, slope = torch.zeros_like(x), torch.zeros_like(x)
    term = x.detach().clone()
    for k in range(120):
        slope = slope + 2 * term
        total = total + 2 * term * x.detach() / (2 * k + 2)
        term = term * -2 * x.detach().square() / (2 * k + 3)
    found = dawson_integral(x)
    assert (found - total).abs().max() < 1e-8
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert (gradient - slope).abs().max() < 1e-6


def test_the_series_takes_over_without_a_step():
    around = torch.tensor([8 - 1e-9, 8 + 1e-9], dtype=torch.float64)
    low, high = dawson_integral(around)
    assert abs(low - high) < 1e-8
    far = torch.tensor([50.0, 1e4], dtype=torch.float64)
    assert torch.allclose(dawson_integral(far), far.log() + math.log(2) + 0.5772156649015329 / 2, atol=1e-3)


def hand(mean, std, prior=Normal(0.0, 0.7)):  # noqa: B008
    """KL of normals, in Python's own arithmetic."""
    p, m = float(prior.scale), float(prior.loc)
    return sum(math.log(p / std) + (std**2 + (w - m) ** 2) / (2 * p**2) - 0.5 for w in mean.detach().double().flatten().tolist())


class TwoUses(nn.Module):
    """A submodule used twice under two names, and a decoder tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.embedding = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.again(self.first(self.embedding(tokens))))


@pytest.mark.parametrize(
    ("module", "distinct"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), 4),
        (TwoUses(), 3),
        (nn.LSTM(3, 4, num_layers=2, batch_first=True), 8),
    ],
    ids=["two layers", "tied and shared", "LSTM"],
)
def test_every_weight_counts_once(module, distinct):
    std, prior = 0.2, Normal(0.0, 0.7)
    net = flipout.Perturbed(module, Gaussian(std, learnable=True))
    parts = bayes.kl_by_parameter(net, prior)
    parameters = dict(module.named_parameters())
    assert len(parts) == distinct == len(parameters)
    for name, parameter in parameters.items():
        assert parts[name].item() == pytest.approx(hand(parameter, std), rel=1e-4)
    total = sum(hand(parameter, std) for parameter in parameters.values())
    assert bayes.kl_divergence(net, prior).item() == pytest.approx(total, rel=1e-4)


def test_a_kl_is_a_sum_not_a_mean():
    kls = []
    for copies in (1, 3):
        layer = nn.Linear(2, 2 * copies, bias=False)
        with torch.no_grad():
            layer.weight.fill_(0.5)
        kls.append(bayes.kl_divergence(flipout.Perturbed(layer, Gaussian(0.1)), Normal(0.0, 1.0)).item())
    assert kls[1] == pytest.approx(3 * kls[0])


def test_priors_by_name_and_by_entry():
    net = flipout.Perturbed(nn.Linear(3, 2), Gaussian(0.2), exclude="bias")
    wide = torch.tensor([0.5, 1.0, 2.0])
    found = bayes.kl_divergence(net, {"weight": Normal(torch.zeros(3), wide)})
    weight = net.module.weight
    assert found.item() == pytest.approx(sum(hand(weight[:, i], 0.2, Normal(0.0, float(wide[i]))) for i in range(3)), rel=1e-5)
    both = flipout.Perturbed(nn.Linear(3, 2), Gaussian(0.2))
    parts = bayes.kl_by_parameter(both, {"bias": Normal(0.0, 3.0), "*": Normal(0.0, 1.0)})
    assert parts["bias"].item() == pytest.approx(hand(both.module.bias, 0.2, Normal(0.0, 3.0)), rel=1e-5)


def test_a_tied_weight_takes_a_prior_under_either_name():
    net = flipout.Perturbed(TwoUses(), Gaussian(0.2), include="decoder.weight")
    for name in ("decoder.weight", "embedding.weight"):
        assert list(bayes.kl_by_parameter(net, {name: Normal(0.0, 1.0)})) == ["embedding.weight"]


def test_a_users_own_pair_joins_the_registry(monkeypatch):
    class Flat(torch.distributions.Distribution):
        arg_constraints, support = {}, torch.distributions.constraints.real

    monkeypatch.setattr(kl, "_KL_REGISTRY", dict(kl._KL_REGISTRY))
    monkeypatch.setattr(kl, "_KL_MEMOIZE", {})
    kl.register_kl(Normal, Flat)(lambda q, p: torch.full_like(q.loc, 2.0))
    net = flipout.Perturbed(nn.Linear(3, 2), Gaussian(0.2))
    assert bayes.kl_divergence(net, Flat(validate_args=False)).item() == 16.0


def test_log_uniform_cares_for_the_ratio_alone_and_vanishes_where_nothing_is_known():
    net = one("relative", 3.0, 0.5)
    before = bayes.kl_divergence(net, bayes.LogUniform()).item()
    with torch.no_grad():
        net.module.weight.mul_(-0.01)
    assert bayes.kl_divergence(net, bayes.LogUniform()).item() == pytest.approx(before)
    assert 0 <= bayes.kl_divergence(one("relative", 1.0, 1e4), bayes.LogUniform()).item() < 1e-7


def test_log_uniform_agrees_with_molchanovs_approximation():
    """-KL ≈ 0.63576 σ(1.87320 + 1.48695 log α) - log(1 + 1/α)/2 - 0.63576, whose error they give as below 0.01."""
    for log_alpha in (-4.0, -1.0, 0.0, 2.0):
        sigmoid = 1 / (1 + math.exp(-(1.87320 + 1.48695 * log_alpha)))
        approximate = -(0.63576 * sigmoid - 0.5 * math.log1p(math.exp(-log_alpha)) - 0.63576)
        exact = bayes.kl_divergence(one("gaussian", 1.0, math.exp(log_alpha / 2)), bayes.LogUniform()).item()
        assert exact == pytest.approx(approximate, abs=0.02)


def test_the_density_of_a_scale_mixture_integrates_to_one():
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    assert torch.trapezoid(bayes.ScaleMixture(0.3, 1.0, 0.05).log_prob(x).exp(), x).item() == pytest.approx(1.0, abs=1e-6)


def test_a_prior_around_pretrained_weights():
    module = nn.Linear(3, 2)
    net = bayes.from_pretrained(module, relative_std=0.1, floor=0.01)
    same = bayes.centred_prior(net, relative_std=0.1, floor=0.01)
    assert bayes.kl_divergence(net, same).item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        module.weight.add_(1.0)  # the prior stays where it was
    moved = bayes.kl_divergence(net, same)
    assert moved.item() > 10
    (gradient,) = torch.autograd.grad(moved, module.weight)
    assert gradient.min() > 0
    assert set(bayes.centred_prior(flipout.Perturbed(nn.Linear(3, 2), Gaussian(0.1), include="weight"), std=1.0)) == {"weight"}


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_zero_pretrained_weights_have_a_finite_kl(value):
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    net = bayes.from_pretrained(module)
    for prior in (Normal(0.0, 1.0), bayes.LogUniform(), bayes.centred_prior(net, relative_std=0.1)):
        kl_value = bayes.kl_divergence(net, prior)
        kl_value.backward()
        assert kl_value.isfinite()
        assert kl_value < 8 * 8
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_from_pretrained_keeps_the_function_and_scales_with_the_weights():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net = bayes.from_pretrained(module, relative_std=0.2, floor=1e-3, include="*weight", estimator=flipout.Shared())
    x = torch.randn(5, 4)
    assert torch.equal(net.eval()(x), module(x))
    assert net.estimator == flipout.Shared()
    assert set(net.noises) == {"0.weight", "2.weight"}
    for name, log_std in net.scales.items():
        weight = module.get_parameter(name).detach()
        assert torch.allclose(log_std.exp(), (0.2 * weight.abs()).clamp_min(1e-3))


LAYER = nn.Linear(3, 2)


def net_of(**options):
    return flipout.Perturbed(nn.Linear(3, 2), Gaussian(0.2), **options)


REFUSED = {
    "prior on what is not random": (
        lambda: bayes.kl_divergence(net_of(include="weight"), {"*": Normal(0, 1), "bias": Normal(0, 1)}),
        "not random",
    ),
    "prior on what is not there": (
        lambda: bayes.kl_divergence(net_of(), {"wieght": Normal(0, 1), "*": Normal(0, 1)}),
        "nearest random",
    ),
    "no prior for a random one": (
        lambda: bayes.kl_divergence(net_of(), {"weight": Normal(0.0, 1.0)}),
        "'bias' is random and has no prior",
    ),
    "no law": (lambda: bayes.kl_divergence(net_of(), 1.0), "expected a law"),
    "law of vectors": (
        lambda: bayes.kl_divergence(net_of(), torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))),
        "law of vectors",
    ),
    "shape": (lambda: bayes.kl_divergence(net_of(), Normal(torch.zeros(5), 1.0)), "does not broadcast"),
    "larger shape": (
        lambda: bayes.kl_divergence(net_of(include="weight"), Normal(torch.zeros(4, 2, 3), 1.0)),
        "does not broadcast",
    ),
    "prior on half the line": (lambda: bayes.kl_divergence(net_of(), HalfNormal(1.0)), "infinite"),
    "prior on an interval": (lambda: bayes.kl_divergence(net_of(), Uniform(-1.0, 1.0)), "infinite"),
    "discrete prior": (lambda: bayes.kl_divergence(net_of(), Poisson(1.0)), "infinite"),
    "discrete posterior": (
        lambda: bayes.kl_divergence(flipout.Perturbed(LAYER, flipout.DropConnect(0.5)), Normal(0.0, 1.0)),
        "discrete",
    ),
    "no net": (lambda: bayes.kl_divergence(LAYER, Normal(0.0, 1.0)), "flipout.Perturbed"),
    "samples": (lambda: bayes.kl_divergence(net_of(), bayes.ScaleMixture(), samples=0), "at least 1"),
    "mixture weight": (lambda: bayes.ScaleMixture(1.0), "share"),
    "mixture std": (lambda: bayes.ScaleMixture(0.5, -1.0), "positive"),
    "two widths": (lambda: bayes.centred_prior(net_of(), std=0.1, relative_std=0.1), "one of the two"),
    "no width": (lambda: bayes.centred_prior(net_of()), "one of the two"),
    "zero width": (lambda: bayes.centred_prior(net_of(), std=0.0), "positive"),
    "relative std": (lambda: bayes.from_pretrained(nn.Linear(2, 2), relative_std=0.0), "positive"),
    "floor": (lambda: bayes.from_pretrained(nn.Linear(2, 2), floor=-1.0), "positive"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what):
    act, told = REFUSED[what]
    with pytest.raises(ArgumentError, match=told):
        act()


def test_refuses_zero_weights_under_relative_noise_and_untrained_nets():
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.bias)
    with pytest.raises(ArgumentError, match="'bias' has weights of zero"):
        bayes.kl_divergence(flipout.Perturbed(module, flipout.MultiplicativeGaussian(0.5)), Normal(0.0, 1.0))
    nn.init.constant_(module.bias, float("nan"))
    with pytest.raises(ArgumentError, match="'bias' is not finite"):
        bayes.from_pretrained(module)
