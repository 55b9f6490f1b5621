"""IVON: the reference package step for step, the exact posterior of a linear model, and what training loops do to an optimiser."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flipout
from flipout import ArgumentError, DrawError, bayes

DTYPE = torch.float64


def data(rows=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=g, dtype=DTYPE), torch.randint(3, (rows,), generator=g)


def module(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(DTYPE)


def random_net(estimator=flipout.Shared(), std=0.1):  # noqa: B008
    return flipout.Perturbed(module(), flipout.Gaussian(std, learnable=True), estimator)


def ivon(net, **options):
    return bayes.IVON(net, **{"lr": 0.1, "effective_sample_size": 48, "betas": (0.9, 0.99), **options})


def backward(net, x, y, times=1):
    for _ in range(times):
        (F.cross_entropy(net(x), y) / times).backward()


def distance(net, plain):
    return max(float((a - b).detach().abs().max()) for a, b in zip(net.module.parameters(), plain.parameters(), strict=True))


CASES = {
    "defaults": {},
    "clipped": {"clip": 1e-2},
    "biased": {"debias": False},
    "plain step": {"rescale_lr": False, "lr": 0.05},
    "wide prior": {"weight_decay": 1e-2, "hess_init": 0.3},
    "fast curvature": {"betas": (0.8, 0.7)},
    "samples": {"samples": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_step_for_step(case):
    reference = pytest.importorskip("ivon", reason="needs ivon-opt: pip install --no-deps ivon-opt==0.1.3")
    options = {"weight_decay": 1e-3, "hess_init": 0.5, **CASES[case]}
    net, plain, (x, y) = random_net(), module(), data()
    optimiser = ivon(net, **options)
    names = {"betas": None, "clip": "clip_radius", "samples": "mc_samples", "lr": "lr"}
    theirs = {names.get(name, name): value for name, value in {"lr": 0.1, **options}.items() if names.get(name, name)}
    beta1, beta2 = options.get("betas", (0.9, 0.99))
    other = reference.IVON(plain.parameters(), ess=48, beta1=beta1, beta2=beta2, **theirs)
    for i in range(20):
        torch.manual_seed(i)
        optimiser.zero_grad()
        backward(net, x, y, optimiser.samples)
        optimiser.step()
        torch.manual_seed(i)
        for _ in range(optimiser.samples):
            with other.sampled_params(train=True):
                other.zero_grad()
                F.cross_entropy(plain(x), y).backward()
        other.step()
        assert distance(net, plain) < 1e-6
        curvature = torch.cat([h.flatten() for h in optimiser.curvature().values()])
        assert float((curvature - other.param_groups[0]["hess"]).abs().max()) < 1e-6
    assert distance(net, module()) > 1e-3


@pytest.mark.parametrize("estimator", [flipout.Flipout(), flipout.Independent()], ids=lambda e: type(e).__name__)
def test_finds_the_posterior_of_a_linear_model(estimator):
    """For a squared loss the mean-field posterior is known: precision N · E x² + λ δ, mean that of ridge regression."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 3, generator=g, dtype=DTYPE) @ torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=DTYPE))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=DTYPE) + torch.randn(512, 1, generator=g, dtype=DTYPE)
    layer = nn.Linear(3, 1, bias=False, dtype=DTYPE)
    net = flipout.Perturbed(layer, flipout.Gaussian(0.1, learnable=True), estimator, generator=g)
    optimiser = ivon(net, effective_sample_size=512, betas=(0.9, 0.99), weight_decay=0.1, lr=0.2)
    means, variances = [], []
    for step in range(600):
        optimiser.zero_grad()
        (0.5 * F.mse_loss(net(x), y)).backward()
        optimiser.step()
        if step >= 150:
            means.append(layer.weight.detach().clone())
            variances.append(net.scales["weight"].detach().mul(2).exp())
    precision = x.square().mean(0) + 0.1
    ridge = torch.linalg.solve(x.T @ x / 512 + 0.1 * torch.eye(3, dtype=DTYPE), x.T @ y / 512)
    torch.testing.assert_close(torch.stack(means).mean(0).T, ridge, atol=0.03, rtol=0)
    found = 1 / torch.stack(variances).mean(0)[0]
    torch.testing.assert_close(found / 512, precision, rtol=0.1, atol=0)


def test_accumulation_is_one_step_of_the_whole_batch():
    """Under one held draw two halves give the gradients of the whole."""
    whole, halves, (x, y) = random_net(), random_net(), data()
    first, second = ivon(whole), ivon(halves)
    for i in range(3):
        for net, parts in ((whole, [slice(None)]), (halves, [slice(0, 24), slice(24, 48)])):
            with net.hold(1, torch.Generator().manual_seed(i)):
                for rows in parts:
                    (F.cross_entropy(net(x[rows]), y[rows]) / len(parts)).backward()
        for optimiser in (first, second):
            optimiser.step()
            optimiser.zero_grad()
    assert distance(whole, halves.module) < 1e-12
    for name, h in first.curvature().items():
        torch.testing.assert_close(h, second.curvature()[name])


def test_a_closure_is_called_for_each_sample():
    one, many, (x, y) = random_net(), random_net(), data()
    by_hand, by_closure = ivon(one), ivon(many, samples=4)
    calls = []

    def closure():
        by_closure.zero_grad()
        loss = F.cross_entropy(many(x), y)
        loss.backward()
        calls.append(loss)
        return loss

    torch.manual_seed(3)
    loss = by_closure.step(closure)
    torch.manual_seed(3)
    backward(one, x, y, 4)
    by_hand.step()
    assert len(calls) == 4
    assert loss.item() == pytest.approx(sum(call.item() for call in calls) / 4)
    assert distance(one, many.module) < 1e-12


def test_state_goes_on_where_it_was_saved(tmp_path):
    (x, y), net = data(), random_net(flipout.Flipout())
    optimiser = ivon(net)

    def steps(net, optimiser, first, last):
        for i in range(first, last):
            torch.manual_seed(i)
            optimiser.zero_grad()
            backward(net, x, y)
            optimiser.step()

    steps(net, optimiser, 0, 5)
    torch.save({"net": net.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "c.pt")
    steps(net, optimiser, 5, 9)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    for order in (["net", "optimiser"], ["optimiser", "net"]):
        other = random_net(flipout.Flipout(), std=0.7)
        again = ivon(other, lr=0.9, hess_init=3.0)
        for each in order:
            {"net": other, "optimiser": again}[each].load_state_dict(saved[each])
        steps(other, again, 5, 9)
        assert distance(net, other.module) < 1e-12
        for name, scale in net.scales.items():
            torch.testing.assert_close(other.scales[name], scale)
    twin_net, twin = copy.deepcopy((net, optimiser))
    steps(net, optimiser, 9, 11)
    steps(twin_net, twin, 9, 11)
    assert distance(net, twin_net.module) == 0


def test_what_a_step_did_not_use_stays():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    net = flipout.Perturbed(Two().to(DTYPE), flipout.Gaussian(0.1, learnable=True), unmet="ignore")
    optimiser, (x, y) = ivon(net), data()
    before = copy.deepcopy(net.state_dict())
    curvature = optimiser.curvature()
    backward(net, x, y)
    optimiser.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) is ("idle" in name)
    assert torch.equal(curvature["idle.weight"], optimiser.curvature()["idle.weight"])
    net.module.used.weight.requires_grad_(False)
    frozen = net.module.used.weight.clone()
    optimiser.zero_grad()
    backward(net, x, y)
    optimiser.step()
    assert torch.equal(frozen, net.module.used.weight)


def test_options_may_change_between_steps():
    net, (x, y) = random_net(), data()
    optimiser = ivon(net, lr=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.5, 2)
    before = module()
    for _ in range(2):
        backward(net, x, y)
        optimiser.step()
        schedule.step()
    assert distance(net, before) == 0
    wide = {name: scale.exp().clone() for name, scale in net.scales.items()}
    optimiser.param_groups[0].update(temperature=0.25, betas=(0.9, 1 - 1e-12), lr=0.1)
    optimiser.zero_grad()
    backward(net, x, y)
    optimiser.step()
    for name, scale in net.scales.items():  # a quarter of the temperature, half the scale
        torch.testing.assert_close(2 * scale.exp(), wide[name], rtol=1e-6, atol=0)
    assert distance(net, before) > 0


def test_predicts_at_any_time():
    net, (x, y) = random_net(flipout.Flipout()), data()
    optimiser = ivon(net, lr=0.2)
    first = bayes.predict(net, x, samples=8, generator=torch.Generator().manual_seed(0))
    for _ in range(150):
        optimiser.zero_grad()
        backward(net, x, y)
        assert bayes.predict(net, x[:2], samples=2).mean.shape == (2, 3)
        optimiser.step()
    last = bayes.predict(net, x, samples=8, generator=torch.Generator().manual_seed(0))
    assert bayes.negative_log_likelihood(last, y) < bayes.negative_log_likelihood(first, y)
    assert net.training


def test_a_grad_scaler_skips_a_step_that_overflowed():
    net, (x, y) = random_net(), data()
    plain = random_net()
    optimiser, other = ivon(net), ivon(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(1)
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    scaler.step(optimiser)
    scaler.update()
    torch.manual_seed(1)
    backward(plain, x, y)
    other.step()
    assert distance(net, plain.module) < 1e-12
    before = copy.deepcopy(net.state_dict())
    optimiser.zero_grad()
    scaler.scale(F.cross_entropy(net(x), y) * math.inf).backward()
    scaler.step(optimiser)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_half_precision_keeps_its_curvature_in_single():
    net = flipout.Perturbed(nn.Linear(4, 3).bfloat16(), flipout.Gaussian(0.1, learnable=True))
    optimiser = bayes.IVON(net, lr=0.1, effective_sample_size=100)
    for _ in range(3):
        optimiser.zero_grad()
        net(torch.randn(8, 4).bfloat16()).float().square().mean().backward()
        optimiser.step()
    assert {h.dtype for h in optimiser.curvature().values()} == {torch.float32}
    again = bayes.IVON(net, lr=0.1, effective_sample_size=100, hess_init=2.0)
    again.load_state_dict(optimiser.state_dict())
    for name, h in optimiser.curvature().items():
        assert torch.equal(h, again.curvature()[name])


def test_the_scales_of_the_net_can_be_the_start():
    net = random_net(std=0.05)
    before = {name: scale.clone() for name, scale in net.scales.items()}
    optimiser = ivon(net, hess_init=None, effective_sample_size=100)
    for name, scale in net.scales.items():
        torch.testing.assert_close(scale, before[name])
        torch.testing.assert_close(optimiser.curvature()[name], torch.full_like(scale, 1 / (100 * 0.05**2) - 1e-4))
    with pytest.raises(ArgumentError, match="wider than its prior"):
        ivon(random_net(std=0.5), hess_init=None, weight_decay=1.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight_decay": 0.0}, "precision of zero is no prior"),
        ({"weight_decay": -1.0}, "a positive number"),
        ({"effective_sample_size": 0.5}, "1 or more"),
        ({"effective_sample_size": True}, "1 or more"),
        ({"hess_init": -1.0}, "positive curvature"),
        ({"hess_init": 0.0}, "positive curvature"),
        ({"lr": math.nan}, "finite step size"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"betas": 0.9}, "two numbers"),
        ({"clip": 0.0}, "a positive number"),
        ({"temperature": math.inf}, "a positive number"),
        ({"samples": 0}, "at least 1"),
        ({"rest": "adam"}, '"ignore"'),
    ],
)
def test_refuses_numbers_out_of_range(options, told):
    net = random_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ArgumentError, match=told):
        ivon(net, **options)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "noise",
    [flipout.Gaussian(0.1), flipout.Gaussian(0.1, relative=True, learnable=True), flipout.Rademacher(0.1, learnable=True)],
    ids=repr,
)
def test_refuses_noise_that_it_cannot_learn(noise):
    with pytest.raises(ArgumentError, match=r"learnable=True\) that is not relative"):
        ivon(flipout.Perturbed(module(), noise))


def test_refuses_what_would_be_moved_twice_or_never():
    net = random_net()
    with pytest.raises(ArgumentError, match="takes a net, not a list"):
        ivon([net, net])
    with pytest.raises(ArgumentError, match="no random weights"):
        ivon(net.module)
    twice = nn.ModuleList([net, flipout.Perturbed(net.module, flipout.Gaussian(0.1, learnable=True))])
    with pytest.raises(ArgumentError, match="one parameter with two noises"):
        ivon(twice)
    half = flipout.Perturbed(module(), flipout.Gaussian(0.1, learnable=True), include="*weight")
    with pytest.raises(ArgumentError, match="are not random"):
        ivon(half)
    optimiser = ivon(half, rest="ignore")
    assert sorted(optimiser.curvature()) == ["0.weight", "2.weight"]
    with pytest.raises(ArgumentError, match="takes its parameters from a net"):
        optimiser.add_param_group({"params": [half.module[0].bias]})


def test_refuses_a_step_without_noise_and_scales_that_others_moved():
    net, (x, y) = random_net(), data()
    optimiser = ivon(net)
    before = copy.deepcopy(net.state_dict())
    backward(net.eval(), x, y)
    with pytest.raises(DrawError, match="computed with mean weights"):
        optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.train()
    optimiser.zero_grad()
    backward(net, x, y)
    optimiser.param_groups[0]["weight_decay"] = 0
    with pytest.raises(ArgumentError, match="no prior"):
        optimiser.step()
    optimiser.param_groups[0]["weight_decay"] = 1e-4
    torch.optim.SGD(net.noise_parameters(), lr=10.0).step()
    with torch.no_grad():
        next(net.noise_parameters()).add_(0.5)
    with pytest.raises(DrawError, match="not what IVON wrote"):
        optimiser.step()


def test_refuses_the_state_of_another_net():
    optimiser = ivon(random_net())
    other = bayes.IVON(flipout.Perturbed(nn.Linear(2, 1), flipout.Gaussian(0.1, learnable=True)), 0.1, 10)
    with pytest.raises(ArgumentError, match="expected that of an IVON of"):
        optimiser.load_state_dict(other.state_dict())
    with pytest.raises(ArgumentError, match="another optimiser"):
        optimiser.load_state_dict(torch.optim.Adam(random_net().parameters()).state_dict())


def test_weights_that_are_wrapped_deeper_are_found():
    net = nn.Sequential(nn.Tanh(), random_net())
    optimiser, (x, y) = ivon(net), data()
    assert list(optimiser.curvature()) == ["1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"]
    backward(net, x, y)
    optimiser.step()
