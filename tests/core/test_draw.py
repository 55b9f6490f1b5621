"""A held draw: its members, resampling, weighted sums, and optimiser steps while it is held."""

from __future__ import annotations

import pytest
import torch
from laws import EXACT, LISTED, distance, oracle
from torch import Tensor, nn

import flipout

MEMBERS = 5


class Small(nn.Module):
    """Every kind of parameter: matrix, bias, kernel, table, gain, scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.kernel = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.layer = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, i: Tensor) -> Tensor:
        hidden = self.kernel(self.table(i).mT).mT
        return self.layer(self.norm(torch.tanh(hidden))) * self.gain


def net_of(estimator: str = "flipout", **noise: bool) -> flipout.Perturbed:
    return flipout.Perturbed(
        Small().double(), flipout.Gaussian(0.3, **noise), LISTED[estimator], generator=torch.Generator().manual_seed(1)
    )


def tokens(rows: int = 2 * MEMBERS) -> Tensor:
    return torch.randint(6, (rows, 7))


every_estimator = pytest.mark.parametrize("estimator", LISTED)


@every_estimator
def test_the_module_of_a_member_is_plain_and_its_own(estimator: str) -> None:
    net, i = net_of(estimator), tokens()
    with net.hold(MEMBERS) as draw, torch.no_grad():
        y = net(i).unflatten(0, (MEMBERS, 2))
        for n in range(MEMBERS):
            member = draw.module(n)
            assert type(member) is Small
            assert all(type(p) is nn.Parameter for p in member.parameters())
            assert distance(member(i[2 * n : 2 * n + 2]), y[n]) <= EXACT
            member.layer.weight.zero_()
    assert net.module.layer.weight.abs().sum() > 0


def test_the_module_of_a_member_keeps_its_ties() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    net = flipout.Perturbed(module, flipout.Gaussian(0.3))
    with net.hold(2) as draw:
        member = draw.module(1)
    assert member[0].weight is member[1].weight
    assert not torch.equal(member[0].weight, module[0].weight)


@every_estimator
def test_weights_are_differentiable_in_means_and_scales(estimator: str) -> None:
    net = net_of(estimator, learnable=True, relative=True)
    with net.hold(MEMBERS) as draw:
        total = sum(w.square().sum() for w in draw.weights(3).values())
    grads = torch.autograd.grad(total, list(net.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("estimator", [name for name in LISTED if name != "shared"])
def test_resampling_changes_those_members_alone(estimator: str) -> None:
    net, i = net_of(estimator), tokens()
    with net.hold(MEMBERS) as draw, torch.no_grad():
        before, y = [draw.weights(n) for n in range(MEMBERS)], net(i)
        draw.resample([3, 0])
        after, z = [draw.weights(n) for n in range(MEMBERS)], net(i)
        for n in range(MEMBERS):
            same = [torch.equal(before[n][name], after[n][name]) for name in before[n]]
            assert all(same) if n not in (0, 3) else not all(same)
        changed = (y != z).unflatten(0, (MEMBERS, 2)).flatten(1).any(1)
        assert changed.tolist() == [True, False, False, True, False]
        assert distance(z, oracle(net, draw, [i])) <= EXACT
        draw.resample([])
        assert torch.equal(net(i), z)


def test_flipouts_members_go_on_sharing_their_base() -> None:
    net = net_of()
    mean = net.module.layer.weight
    with net.hold(MEMBERS) as draw, torch.no_grad():
        size = (draw.weights(0)["layer.weight"] - mean).abs()
        draw.resample([2])
        for n in range(MEMBERS):
            assert torch.allclose((draw.weights(n)["layer.weight"] - mean).abs(), size, atol=1e-12)


def test_resampling_is_seeded() -> None:
    net, i = net_of(), tokens()

    def run() -> Tensor:
        with net.hold(MEMBERS, torch.Generator().manual_seed(9)) as draw, torch.no_grad():
            draw.resample([1, 2])
            return net(i)

    assert torch.equal(run(), run())


@every_estimator
@pytest.mark.parametrize("relative", [False, True])
def test_the_weighted_sum_is_the_explicit_one(estimator: str, relative: bool) -> None:
    net = net_of(estimator, relative=relative)
    means = dict(net.module.named_parameters())
    f = torch.randn(MEMBERS, dtype=torch.float64)
    with net.hold(MEMBERS) as draw, torch.no_grad():
        sums = draw.weighted_sum(f)
        members = [draw.weights(n) for n in range(MEMBERS)]
        draw.resample([0]) if estimator != "shared" else None
        again = draw.weighted_sum(f)
    for name, mean in means.items():
        explicit = sum(f[n] * (members[n][name] - mean) for n in range(MEMBERS))
        assert sums[name].shape == mean.shape
        assert distance(sums[name], explicit) <= EXACT  # type: ignore[arg-type]
    assert any(not torch.equal(sums[name], again[name]) for name in sums) is (estimator != "shared")


def test_the_weighted_sum_differentiates() -> None:
    """Σ f ΔW is linear in f and in the scale."""
    net = net_of(learnable=True)
    f = torch.randn(MEMBERS, dtype=torch.float64, requires_grad=True)
    with net.hold(MEMBERS) as draw:
        assert torch.autograd.gradcheck(lambda g: draw.weighted_sum(g)["layer.weight"], (f,))


@every_estimator
@pytest.mark.parametrize("learnable", [False, True])
def test_a_held_draw_follows_the_optimiser(estimator: str, learnable: bool) -> None:
    """After a step the same unit draw applies to the new means and scales, and backward works again."""
    net, i = net_of(estimator, relative=True, learnable=learnable), tokens()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    with net.hold(MEMBERS) as draw:
        outputs = []
        for _ in range(3):
            optimiser.zero_grad()
            y = net(i)
            assert distance(y, oracle(net, draw, [i])) <= EXACT
            y.square().mean().backward()
            expected = torch.autograd.grad(oracle(net, draw, [i]).square().mean(), list(net.parameters()))
            assert all(distance(p.grad, g) <= EXACT for p, g in zip(net.parameters(), expected, strict=True))  # type: ignore[arg-type]
            optimiser.step()
            outputs.append(y.detach())
    assert not torch.equal(outputs[0], outputs[1])


def test_a_held_draw_follows_a_new_parameter_and_a_loaded_state() -> None:
    net, i = net_of(), tokens()
    with net.hold(MEMBERS) as draw, torch.no_grad():
        net(i)
        net.load_state_dict({k: v + 0.5 for k, v in net.state_dict().items()})
        assert distance(net(i), oracle(net, draw, [i])) <= EXACT
        net.module.layer.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        assert distance(net(i), oracle(net, draw, [i])) <= EXACT
        net.module.layer.weight.data = torch.randn(3, 4, dtype=torch.float64)
        assert distance(net(i), oracle(net, draw, [i])) <= EXACT


def test_blocks_of_rows_belong_to_members_in_order() -> None:
    net = net_of()
    row = tokens(1)
    with net.hold(MEMBERS), torch.no_grad():
        y = net(row.expand(3 * MEMBERS, -1)).unflatten(0, (MEMBERS, 3))
        assert torch.allclose(y, y[:, :1].expand_as(y), atol=1e-12)
        assert torch.allclose(y[:, 0], net(row.expand(MEMBERS, -1)), atol=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [0, -1, 2.0, True, "3", None])
def test_members_are_a_positive_number(members: object) -> None:
    with pytest.raises(flipout.ArgumentError, match="expected a positive number of members"), net_of().hold(members):  # type: ignore[arg-type]
        pytest.fail("entered")


@pytest.mark.parametrize("rows", [1, 7, 11, 0])
def test_rows_must_divide_into_the_members(rows: int) -> None:
    net = net_of()
    before = {name: id(p) for name, p in net.module.named_parameters()}
    with net.hold(MEMBERS):
        with pytest.raises(flipout.BatchError, match=rf"{rows} rows on batch_dim=0.*5 members.*k·5 in member-major blocks"):
            net(tokens(rows))
        assert net(tokens()).shape == (10, 7, 3)
    assert {name: id(p) for name, p in net.module.named_parameters()} == before


@pytest.mark.parametrize("n", [5, -1, 100])
def test_a_member_index_lies_in_the_draw(n: int) -> None:
    with net_of().hold(MEMBERS) as draw:
        for use in (draw.weights, draw.module, lambda k: draw.resample([k])):
            with pytest.raises(flipout.MemberError, match=rf"member {n} is out of range.*0 to 4"):
                use(n)
        assert isinstance(draw.weights(4)["gain"], Tensor)


@pytest.mark.parametrize("n", [1.0, "1", None, [0]])
def test_a_member_index_is_an_integer(n: object) -> None:
    with net_of().hold(MEMBERS) as draw, pytest.raises(flipout.MemberError, match="expected an integer"):
        draw.weights(n)  # type: ignore[arg-type]


def test_members_are_resampled_once_each_and_not_when_shared() -> None:
    with net_of().hold(MEMBERS) as draw, pytest.raises(flipout.ArgumentError, match="each member once"):
        draw.resample([1, 1])
    with net_of("shared").hold(MEMBERS) as draw, pytest.raises(flipout.UnsupportedNoiseError, match="one perturbation"):
        draw.resample([1])


@pytest.mark.parametrize("f", [torch.ones(4), torch.ones(5, 1), [1.0] * 5, 1.0])
def test_the_weighted_sum_takes_a_weight_a_member(f: object) -> None:
    with net_of().hold(MEMBERS) as draw, pytest.raises(flipout.ArgumentError, match="one weight for each of 5 members"):
        draw.weighted_sum(f)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", [flipout.LocalReparameterization(), flipout.Flipout(granularity="token")], ids=str)
def test_estimators_without_members_have_none_to_give(estimator: flipout.Estimator) -> None:
    net = flipout.Perturbed(nn.Linear(4, 3), flipout.Gaussian(0.1), estimator)
    with net.hold(MEMBERS) as draw:
        for use in (draw.weights, draw.module, lambda n: draw.resample([n])):
            with pytest.raises(flipout.DrawError, match="no weights of their own"):
                use(0)
        with pytest.raises(flipout.DrawError, match="no weights of their own"):
            draw.weighted_sum(torch.ones(MEMBERS))
        assert net(torch.ones(MEMBERS, 4)).shape == (MEMBERS, 3)


def test_a_draw_prints_what_it_is() -> None:
    with net_of().hold(MEMBERS) as draw:
        assert "members=5" in repr(draw)
        assert "layer.weight" in repr(draw)
