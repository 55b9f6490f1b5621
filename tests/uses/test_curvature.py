"""The diagonal of the Hessian against the exact one, and the posterior made of it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flipout
from flipout import ArgumentError, bayes

DTYPE = torch.float64


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DTYPE)


def batches(count=3, rows=16):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 3, generator=g, dtype=DTYPE), torch.randint(2, (rows,), generator=g)) for _ in range(count)]


def loss_fn(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def exact(module, data):
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    found = {}
    for name, p in module.named_parameters():
        (g,) = torch.autograd.grad(F.cross_entropy(module(x), y), p, create_graph=True)
        rows = [torch.autograd.grad(each, p, retain_graph=True)[0].flatten()[i] for i, each in enumerate(g.flatten())]
        found[name] = torch.stack(rows).view(p.shape)
    return found


@pytest.mark.parametrize("estimator", [flipout.Flipout(), flipout.Shared(), flipout.Independent()], ids=lambda e: type(e).__name__)
def test_is_the_exact_diagonal(estimator):
    module, data = net(), batches()
    found = bayes.diagonal_hessian(
        module, loss_fn, data, 60, std=1e-4, estimator=estimator, generator=torch.Generator().manual_seed(0)
    )
    truth = exact(module, data)
    assert set(found) == set(truth)
    z = torch.cat([((found[n] - truth[n]) / found.errors[n].clamp_min(1e-9)).flatten() for n in truth])
    assert float(z.abs().max()) < 4.5
    low, high = zip(*(found.interval(n) for n in truth), strict=True)
    inside = torch.cat([((lo < truth[n]) & (truth[n] < hi)).flatten() for n, lo, hi in zip(truth, low, high, strict=True)])
    assert abs(float(inside.double().mean()) - 0.9) < 4 * math.sqrt(0.09 / 26)


def test_signs_per_example_have_the_smaller_error():
    module, data = net(), batches(1, 256)
    errors = {}
    for estimator in (flipout.Flipout(), flipout.Shared()):
        g = torch.Generator().manual_seed(0)
        found = bayes.diagonal_hessian(module, loss_fn, data, 20, std=1e-3, estimator=estimator, generator=g)
        errors[type(estimator).__name__] = math.sqrt(sum(float(e.square().sum()) for e in found.errors.values()))
    assert errors["Flipout"] < 0.6 * errors["Shared"]


def test_batches_of_unequal_size_count_by_their_examples():
    x = torch.tensor([[1.0], [2.0], [3.0]], dtype=DTYPE)
    layer = nn.Linear(1, 1, bias=False, dtype=DTYPE)
    found = bayes.diagonal_hessian(layer, lambda net, x: 0.5 * net(x).square().mean(), [x[:2], x[2:]], 2)
    assert found["weight"].item() == pytest.approx(14 / 3)
    assert found.errors["weight"].item() == pytest.approx(0.0, abs=1e-9)


def test_leaves_the_net_as_it_is():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).to(DTYPE)
    module[0].weight.requires_grad_(False)
    module[3].weight.grad = torch.ones(2, 4, dtype=DTYPE)
    before = copy.deepcopy(module.state_dict())
    wrapped = flipout.Perturbed(module, flipout.Gaussian(0.1))
    for each in (module, wrapped):
        found = bayes.diagonal_hessian(each, loss_fn, batches(), 2, include="*weight")
        assert sorted(found) == ["0.weight", "1.weight", "3.weight"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert not module[0].weight.requires_grad
    assert torch.equal(module[3].weight.grad, torch.ones(2, 4, dtype=DTYPE))


def test_a_posterior_of_it_is_laplaces():
    """For a linear model the posterior is known: precision N E x² + prior."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g, dtype=DTYPE)
    layer = nn.Linear(3, 1, bias=False, dtype=DTYPE)
    found = bayes.diagonal_hessian(layer, lambda net, x: 0.5 * net(x).square().mean(), [x], 40, generator=g)
    posterior = bayes.from_pretrained(layer, curvature=found, dataset_size=200, prior_precision=3.0)
    expected = (x.square().sum(0) + 3.0).rsqrt()
    torch.testing.assert_close(posterior.scales["weight"].exp()[0], expected, rtol=0.05, atol=0)
    bayes.IVON(posterior, 0.1, 200, hess_init=None, weight_decay=3.0 / 200)


def test_negative_entries_count_as_zero_or_are_refused():
    layer = nn.Linear(2, 1, bias=False)
    h = {"weight": torch.tensor([[1.0, -0.5]])}
    found = bayes.DiagonalHessian(h, {"weight": torch.ones(1, 2)}, 3)
    assert "1 negative" in repr(found)
    scales = bayes.from_pretrained(layer, curvature=found, dataset_size=8, prior_precision=1.0).scales["weight"].exp()
    torch.testing.assert_close(scales, torch.tensor([[1 / 3, 1.0]]))
    with pytest.raises(ArgumentError, match="1 negative entries"):
        bayes.from_pretrained(layer, curvature=h, dataset_size=8)
    bayes.from_pretrained(layer, curvature=found.positive(), dataset_size=8)
    assert torch.equal(found.saliency(layer)["weight"], 0.5 * torch.tensor([[1.0, 0.0]]) * layer.weight.detach() ** 2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"curvature": {"weight": torch.ones(1, 2)}}, "give both"),
        ({"dataset_size": 8}, "give both"),
        ({"curvature": {"other": torch.ones(1, 2)}, "dataset_size": 8}, "not 'weight'"),
        ({"curvature": {"weight": torch.ones(2)}, "dataset_size": 8}, "expected finite numbers of shape"),
        ({"curvature": {"weight": torch.full((1, 2), math.nan)}, "dataset_size": 8}, "not finite"),
        ({"curvature": {"weight": torch.ones(1, 2)}, "dataset_size": 8, "prior_precision": 0.0}, "positive number"),
    ],
)
def test_refuses_curvature_that_is_none(options, told):
    with pytest.raises(ArgumentError, match=told):
        bayes.from_pretrained(nn.Linear(2, 1, bias=False), **options)


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((loss_fn, iter([])), {}, "can be read once"),
        ((loss_fn, []), {}, "no batches"),
        ((loss_fn, batches(1), 1), {}, "at least 2"),
        ((loss_fn, batches(1)), {"std": 0.0}, "a positive number"),
        ((loss_fn, batches(1)), {"confidence": 1.0}, r"inside \(0, 1\)"),
        ((loss_fn, batches(1)), {"estimator": flipout.LocalReparameterization()}, "members have weights"),
        ((lambda net, b: net(b[0]), batches(1)), {}, r"returned a tensor of shape \(16, 2\)"),
        ((lambda net, b: net(b[0]).mean() * math.nan, batches(1)), {}, "loss of a batch is nan"),
        ((loss_fn, ["text"]), {}, "has no tensor with examples"),
    ],
)
def test_refuses_what_has_no_curvature(arguments, options, told):
    with pytest.raises(ArgumentError, match=told):
        bayes.diagonal_hessian(net(), *arguments, **options)
