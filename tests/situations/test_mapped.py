"""torch.func: under vmap each mapped element has the weights that its randomness says, and every number is a member's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from laws import EXACT, LISTED, Z_LIMIT, distance, worst, z_difference
from torch import Tensor, nn
from torch.func import functional_call

import flipout

N, MAPPED = 4, 5
ESTIMATORS: dict[str, flipout.Estimator] = {
    **LISTED,
    "local": flipout.LocalReparameterization(),
    "per_step": flipout.Flipout(per_step=True),
    "token": flipout.Flipout(granularity="token"),
}
NOISES: dict[str, flipout.Noise] = {
    "gaussian": flipout.Gaussian(0.3),
    "relative": flipout.Gaussian(0.3, relative=True),
    "learnable": flipout.Gaussian(0.3, learnable=True),
    "rademacher": flipout.Rademacher(0.3),
    "dropconnect": flipout.DropConnect(0.5),
    "uniform": flipout.FromDistribution(torch.distributions.Uniform(-0.3, 0.3)),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).double()


MODULES: dict[str, Callable[[], nn.Module]] = {"mlp": build, "conv": convolutional}


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def served(estimator: str, noise: str) -> bool:
    if estimator == "local":
        return noise in ("gaussian", "relative", "learnable")
    return not (estimator == "low_rank" and noise in ("dropconnect", "uniform"))


CROSSED = [(estimator, noise) for estimator in ESTIMATORS for noise in NOISES if served(estimator, noise)]


@pytest.mark.parametrize(("estimator", "noise"), [pair for pair in CROSSED if pair[0] in LISTED])
@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("module", MODULES)
def test_every_row_is_its_members(estimator: str, noise: str, randomness: str, module: str) -> None:
    net = flipout.Perturbed(MODULES[module](), NOISES[noise], LISTED[estimator], generator=torch.Generator().manual_seed(1))
    x = data(MAPPED, N)

    def held(v: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        with net.hold(N) as draw:
            return net(v), [draw.weights(n) for n in range(N)]

    y, weights = torch.vmap(held, randomness=randomness)(x)
    for e in range(MAPPED):
        for n in range(N):
            own = functional_call(net.module, {name: w[e] for name, w in weights[n].items()}, (x[e, n : n + 1],))
            assert distance(y[e, n : n + 1], own) <= EXACT
    for member in weights:
        entries = torch.cat([w.flatten(1) for w in member.values()], 1)
        assert all(torch.equal(entries[0], entries[e]) == (randomness == "same") for e in range(1, MAPPED))


@pytest.mark.parametrize(("estimator", "noise"), CROSSED)
def test_randomness(estimator: str, noise: str) -> None:
    net = flipout.Perturbed(build(), NOISES[noise], ESTIMATORS[estimator])
    x = data(1, N).expand(MAPPED, N, 5)
    same = torch.vmap(net, randomness="same")(x)
    assert distance(same, same[:1].expand_as(same)) <= EXACT
    assert distance(same[0], net.module(x[0])) > 1e-6
    different = torch.vmap(net, randomness="different")(x)
    assert all(distance(different[0], different[e]) > 1e-6 for e in range(1, MAPPED))
    with pytest.raises(flipout.errors.DrawError, match=r'randomness="different".*randomness="same"'):
        torch.vmap(net)(x)
    net.eval()
    assert distance(torch.vmap(net)(x), net.module(x)) <= EXACT


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_under_different_the_law_is_that_of_separate_calls(estimator: str) -> None:
    net = flipout.Perturbed(build(), flipout.Gaussian(0.3), ESTIMATORS[estimator], generator=torch.Generator().manual_seed(1))
    x, count = data(N), 3000
    with torch.no_grad():
        mapped = torch.vmap(net, randomness="different")(x.expand(count, N, 5))
        separate = torch.stack([net(x) for _ in range(count)])
    assert worst(z_difference(mapped, separate)) < Z_LIMIT
    centre = separate.mean(0)
    assert worst(z_difference((mapped - centre).square(), (separate - centre).square())) < Z_LIMIT
    products = (mapped[:-1] - centre) * (mapped[1:] - centre)  # of one element and the next
    assert worst(products.mean(0) / products.std(0) * math.sqrt(count - 1)) < Z_LIMIT


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_a_draw_held_around_the_map_is_shared_by_its_elements(estimator: str, randomness: str) -> None:
    net, x = flipout.Perturbed(build(), flipout.Gaussian(0.3, relative=True), LISTED[estimator]), data(MAPPED, N)
    with net.hold(N):
        y = torch.vmap(net, randomness=randomness)(x)
        assert distance(y, torch.stack([net(v) for v in x])) <= EXACT
        other = torch.vmap(net, in_dims=1, out_dims=1, randomness=randomness)(x.transpose(0, 1)).transpose(0, 1)
        assert distance(other, y) <= EXACT


@pytest.mark.parametrize("estimator", LISTED)
def test_examples_mapped_one_by_one(estimator: str) -> None:
    """The usual per-example use: an element is one example, and a batch of one row in the function."""
    net = flipout.Perturbed(build(), flipout.Gaussian(0.3), LISTED[estimator])
    x = data(1).expand(MAPPED, 5)
    y = torch.vmap(lambda v: net(v.unsqueeze(0)).squeeze(0), randomness="different")(x)
    assert y.shape == (MAPPED, 2)
    assert all(distance(y[0], y[e]) > 1e-6 for e in range(1, MAPPED))
    assert torch.vmap(net, randomness="different")(x).shape == (MAPPED, 2)


@pytest.mark.parametrize("estimator", LISTED)
def test_gradients_by_example(estimator: str) -> None:
    net, x = flipout.Perturbed(build(), flipout.Gaussian(0.3, learnable=True), LISTED[estimator]), data(N)
    values = {name: p.detach() for name, p in net.named_parameters()}

    def loss(p: dict[str, Tensor], v: Tensor) -> Tensor:
        return functional_call(net, p, (v.unsqueeze(0),)).square().sum()  # type: ignore[no-any-return]

    with net.hold(1):
        ours = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
        for n in range(N):
            wanted = torch.autograd.grad(net(x[n : n + 1]).square().sum(), list(net.parameters()))
            for name, gradient in zip(values, wanted, strict=True):
                assert distance(ours[name][n], gradient) <= EXACT
    drawn = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(values, x)
    assert all(g.isfinite().all() for g in drawn.values())


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("noise", ["gaussian", "relative", "learnable"])
def test_what_a_transform_computes_does_not_outlive_it(estimator: str, noise: str) -> None:
    net, x = flipout.Perturbed(build(), NOISES[noise], LISTED[estimator]), data(N)
    with net.hold(N) as draw:
        first = torch.func.jacrev(net)(x)
        slopes = torch.func.grad(lambda v: net(v).square().sum())(x)
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        assert distance(torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)[0], slopes) <= EXACT
        assert distance(torch.func.jacrev(net)(x), first) <= EXACT
        for n in range(N):
            own = torch.func.jacrev(lambda v, n=n: functional_call(net.module, draw.weights(n), (v,)))(x[n : n + 1])
            assert distance(first[n, :, n], own[0, :, 0]) <= EXACT
    wanted = list(net.parameters())
    assert all(g is not None for g in torch.autograd.grad(y.sum() + net(x).sum(), wanted, allow_unused=True)[:1])


def test_an_ensemble_of_parameters() -> None:
    """vmap over stacked parameters (the recipe of torch.func for ensembles), each with noise of its own."""
    net, x = flipout.Perturbed(build(), flipout.Gaussian(0.3)), data(N)
    stacked = {name: torch.stack([p.detach() + k for k in range(3)]) for name, p in net.named_parameters()}

    def call(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with net.hold(N):
            return functional_call(net, p, (x,)), functional_call(net, p, (x,))

    y, again = torch.vmap(call, randomness="different")(stacked)
    assert y.shape == (3, N, 2)
    assert distance(y, again) <= EXACT
    net.eval()
    means = torch.vmap(lambda p: functional_call(net, p, (x,)))(stacked)
    for k in range(3):
        own = functional_call(build(), {name.removeprefix("module."): p[k] for name, p in stacked.items()}, (x,))
        assert distance(means[k], own) <= EXACT


def test_noise_that_draws_in_place_is_told() -> None:
    class InPlace(flipout.Gaussian):
        def unit(self, shape, *, generator, dtype, device):  # type: ignore[no-untyped-def]
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    net, x = flipout.Perturbed(build(), InPlace(0.3)), data(MAPPED, N)
    with pytest.raises(flipout.errors.DrawError, match=r"InPlace noise.*torch\.randn"):
        torch.vmap(net, randomness="different")(x)
    with net.hold(N):
        assert torch.vmap(net)(x).shape == (MAPPED, N, 2)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_perturbed_in_place_under_a_map(randomness: str) -> None:
    module, x = build(), data(MAPPED, N)

    def call(v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with flipout.perturbed(module, flipout.Gaussian(0.3)) as draw:
            return module(v), draw.weights(1)

    y, weights = torch.vmap(call, randomness=randomness)(x)
    for e in range(MAPPED):
        own = functional_call(module, {name: w[e] for name, w in weights.items()}, (x[e, 1:2],))
        assert distance(y[e, 1:2], own) <= EXACT
    with pytest.raises(flipout.errors.DrawError, match="randomness"):
        torch.vmap(call)(x)
