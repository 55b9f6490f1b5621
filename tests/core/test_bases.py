"""Several base perturbations in a batch: exact laws for every case, and the variance α/N + (1/K - 1/N) γ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case
from laws import EXACT, Z_LIMIT, distance, oracle, worst, wrap, z_difference
from torch import Tensor, nn

import flipout
from flipout import registry

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
MEMBERS = 4
TWO = flipout.Flipout(bases=2)
NOISES = [flipout.Gaussian(0.3, relative=True, learnable=True), flipout.Gaussian(0.3, learnable=True), flipout.DropConnect(0.5)]


@every_case
def test_outputs_and_gradients_equal_the_oracles(case: Case) -> None:
    """Two groups of two members, one row or three rows a member; gradients in means, learnable scales and inputs."""
    net = wrap(case, NOISES[CASES.index(case) % len(NOISES)], TWO)
    for rows in (MEMBERS, 3 * MEMBERS):
        x = [v.requires_grad_(v.is_floating_point()) for v in case.draw_inputs(rows)]
        wanted: list[Any] = [*net.parameters(), *(v for v in x if v.requires_grad)]
        with net.hold(MEMBERS) as draw:
            outputs = net(*x), oracle(net, draw, x)
        assert distance(*outputs) <= EXACT
        assert distance(outputs[0], net.module(*x)) > 1e-6
        ours, theirs = (torch.autograd.grad((0.1 * y**2 + y).sum(), wanted, materialize_grads=True) for y in outputs)
        for a, b in zip(ours, theirs, strict=True):
            assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm", "gru"])
def test_second_derivatives_equal_the_oracles(name: str) -> None:
    net = wrap(BY_NAME[name], NOISES[0], TWO)
    x = [v.requires_grad_() for v in BY_NAME[name].draw_inputs(MEMBERS)]
    wanted = [*net.parameters(), *x]

    def twice(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad((y**2).sum(), wanted, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), wanted, materialize_grads=True)

    with net.hold(MEMBERS) as draw:
        ours, theirs = twice(net(*x)), twice(oracle(net, draw, x))
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm", "embedding"])
def test_rows_that_stand_in_no_blocks(name: str) -> None:
    """Members named row by row: those of one base no longer stand together."""
    case, owner = BY_NAME[name], torch.tensor([3, 0, 2, 1, 0, 3])
    net = wrap(case, NOISES[1], TWO)
    x = case.draw_inputs(len(owner))
    with net.hold(MEMBERS, owner=owner) as draw, torch.no_grad():
        y = net(*x)
        for i, n in enumerate(owner):
            row = tuple(v.narrow(net.batch_dim, i, 1) for v in x)
            own = torch.func.functional_call(net.module, draw.weights(int(n)), row)
            assert distance(y.narrow(net.batch_dim, i, 1), own) <= EXACT


def _own(draw: flipout.Draw, net: flipout.Perturbed) -> Tensor:
    """The perturbations of all members, ``[N, entries]``."""
    means = dict(net.module.named_parameters())
    rows = [
        torch.cat([(draw.weights(n)[name] - means[name]).flatten() for name in means]).detach() for n in range(draw.members or 0)
    ]
    return torch.stack(rows)


def test_members_of_a_group_share_a_base_and_no_others_do() -> None:
    net = flipout.Perturbed(nn.Linear(5, 4).double(), flipout.Gaussian(0.3), flipout.Flipout(bases=3))
    with net.hold(6) as draw:
        for again in range(2):
            sizes = _own(draw, net).abs()
            same = torch.cdist(sizes, sizes) < 1e-9
            assert torch.equal(same, torch.eye(3).repeat_interleave(2, 0).repeat_interleave(2, 1).bool())
            draw.resample([0, 5])
            assert torch.allclose(_own(draw, net).abs(), sizes), again


@pytest.mark.parametrize("members", [4, 2])
def test_as_many_bases_as_members_are_independent(members: int) -> None:
    """Squares of entries of two members have no correlation; under one base it is 1."""
    net = flipout.Perturbed(nn.Linear(60, 70).double(), flipout.Gaussian(0.3), flipout.Flipout(bases=members))
    with net.hold(members, torch.Generator().manual_seed(0)) as draw:
        squares = _own(draw, net).square() / 0.3**2 - 1
    products = torch.stack([squares[0] * squares[-1], squares[0] * squares[1]], 1)
    assert worst(products.mean(0) / (products.std(0) / len(products) ** 0.5)) < Z_LIMIT


def test_weighted_sums_are_those_of_the_members() -> None:
    net = wrap(BY_NAME["conv2d"], flipout.Gaussian(0.3, learnable=True), TWO)
    f = torch.randn(MEMBERS, dtype=torch.float64)
    with net.hold(MEMBERS) as draw:
        found = draw.weighted_sum(f)
        for name, mean in net.module.named_parameters():
            expected = sum(f[n] * (draw.weights(n)[name] - mean) for n in range(MEMBERS))
            assert distance(found[name], torch.as_tensor(expected)) <= EXACT


def test_the_variance_falls_with_the_bases() -> None:
    """V(K) - V(N) in units of V(1) - V(N) is (1/K - 1/N) / (1 - 1/N), where the base decides most of the gradient."""
    N, draws = 8, 8000
    gradients: dict[int, Tensor] = {}
    for bases in (1, 2, 4, 8):
        # N · draws members at once: as many groups as bases · draws, so that each run of N is a batch of its own
        net = flipout.Perturbed(
            nn.Linear(2, 1, bias=False), flipout.Gaussian(1.0), flipout.Flipout(bases=bases * draws),
            generator=torch.Generator().manual_seed(bases),
        )  # fmt: skip
        with torch.no_grad():
            net.module.weight.fill_(0.5)
        x = torch.ones(N * draws, 2)
        y = net(x)
        slope = (y.detach() ** 3 * x).view(draws, N, 2).mean(1)  # of y⁴/4 in the mean
        gradients[bases] = slope[:, 0].double()
    spread = {bases: (g - g.mean()).square() for bases, g in gradients.items()}
    whole = spread[1].mean() - spread[8].mean()
    assert whole > 0.5 * spread[8].mean()
    for bases in (2, 4):
        share = (1 / bases - 1 / N) / (1 - 1 / N)
        mixed = share * spread[1] + (1 - share) * spread[8]
        assert worst(z_difference(spread[bases], mixed)) < Z_LIMIT
    assert worst(z_difference(spread[1], spread[8])) > Z_LIMIT


def test_what_cannot_be_grouped_is_refused_by_name() -> None:
    net = flipout.Perturbed(nn.Linear(3, 2), flipout.Gaussian(0.1), flipout.Flipout(bases=3))
    with pytest.raises(flipout.BatchError, match=r"bases=3.*3 groups.*has 4 members"):
        net(torch.ones(4, 3))
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(flipout.ArgumentError, match="bases="):
            flipout.Flipout(bases=wrong)  # type: ignore[arg-type]
    for how in ({"granularity": "token"}, {"per_step": True}):
        with pytest.raises(flipout.ArgumentError, match="bases=2"):
            flipout.Flipout(bases=2, **how)  # type: ignore[arg-type]
    with pytest.raises(flipout.UnsupportedNoiseError, match="bases=2"):
        flipout.LocalReparameterization(bases=2)
    with pytest.raises(flipout.ArgumentError, match="members_per_base"):
        flipout.evolution.EvolutionStrategy(nn.Linear(3, 2), estimator=TWO)


@pytest.mark.parametrize("name", ["linear"])
def test_compiled_whole(name: str) -> None:
    net = wrap(BY_NAME[name], NOISES[1], TWO)
    x = BY_NAME[name].draw_inputs(MEMBERS)
    with net.hold(MEMBERS):
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert distance(compiled(*x), net(*x)) <= EXACT


def test_a_rule_that_does_not_know_of_bases_is_passed_over_or_refused_by_name() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.outer(x, self.weight)

    key = (torch.outer, flipout.Flipout)
    rules = registry._RULES
    net = flipout.Perturbed(Outer(), flipout.Gaussian(0.1), TWO)
    try:
        flipout.rule(torch.outer, flipout.Flipout)(lambda x, w: x[:, None] * (w.mean_weight + w.terms[0].base))
        with pytest.raises(flipout.MissingRuleError, match="bases=True"):
            net(torch.ones(4))
        flipout.rule(torch.outer, flipout.Estimator)(lambda x, w: x[:, None] * w.dense())
        with net.hold(4) as draw:
            assert distance(net(torch.ones(4)), torch.stack([draw.weights(n)["weight"] for n in range(4)])) < 1e-6
        flipout.rule(torch.outer, flipout.Flipout, bases=True)(lambda x, w: x[:, None] * 0)
        assert not net(torch.ones(4)).any()
    finally:
        rules.pop(key, None)
        rules.pop((torch.outer, flipout.Estimator), None)
        registry._OF_BASES.discard(key)
