"""Batch norms under a population, a prediction, a measurement: no member is normalised by others, and no buffer moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flipout
from flipout.evolution import EvolutionStrategy

ROWS = 6


def normed(**options) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 2)).double()
    for _ in range(3):
        module(torch.randn(16, 4).double())
    return module


def fitness(module, members):
    x = torch.linspace(-1, 1, ROWS * 4).view(ROWS, 4).double()
    return members.mean(module(members.repeat(x)).square().sum(1))


def state(module):
    return {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}


def as_before(module, before):
    return all(buffer is before[name][0] and torch.equal(buffer, before[name][1]) for name, buffer in module.named_buffers())


def test_a_batch_norm_in_training_mode_is_refused():
    module = normed()
    before = state(module)
    es = EvolutionStrategy(module, 0.1, 8)
    with pytest.raises(flipout.BatchError, match=r"BatchNorm1d '1' is in training mode.*8 members.*module\.eval\(\)"):
        es.step(fitness)
    assert as_before(module, before)
    assert not any(part._forward_pre_hooks for part in module.modules())
    module.eval()
    es.step(fitness)  # and the strategy goes on


def test_one_without_running_statistics_is_refused_in_evaluation_mode_too():
    es = EvolutionStrategy(normed(track_running_stats=False).eval(), 0.1, 8)
    with pytest.raises(flipout.BatchError, match=r"keeps no running statistics.*track_running_stats=True"):
        es.step(fitness)


def test_the_mode_that_counts_is_that_of_the_run():
    """An evaluation may set the mode itself."""
    module = normed()

    def evaluate(module, members):
        return fitness(module.eval(), members)

    assert EvolutionStrategy(module, 0.1, 8).step(evaluate).shape == (8,)


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_fitness_does_not_depend_on_the_chunk(chunk):
    module = normed().eval()
    whole = EvolutionStrategy(module, 0.1, 8).step(fitness)
    torch.testing.assert_close(EvolutionStrategy(module, 0.1, 8, chunk=chunk).step(fitness), whole)


def test_a_member_alone_may_have_statistics_of_its_own():
    module = normed()
    before = state(module)
    es = EvolutionStrategy(module, 0.1, 4, chunk=1, antithetic=False)
    found = es.evaluate(fitness)
    x = torch.linspace(-1, 1, ROWS * 4).view(ROWS, 4).double()
    for n in range(4):
        torch.testing.assert_close(found[n], es.member(0, n)(x).square().sum(1).mean().detach())
    assert as_before(module, before)


class Counting(nn.Module):
    """A module that keeps more than statistics: a count, and a buffer that it replaces."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.layer, self.broken = nn.Linear(4, 2), broken
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls += 1
        y = self.layer(x)
        self.last = y.detach().mean(0)
        if self.broken:
            raise RuntimeError("broken")
        return y


@pytest.mark.parametrize("broken", [False, True])
def test_an_evaluation_leaves_every_buffer_as_it_was(broken):
    module = Counting(broken).double()
    before = state(module)
    es = EvolutionStrategy(module, 0.1, 8, chunk=4)
    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            es.step(fitness)
    else:
        es.step(fitness)
    assert as_before(module, before)
    assert module.nothing is None


def test_instance_norms_look_at_one_row_and_their_running_statistics_stay():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True, affine=True), nn.Flatten(), nn.Linear(15, 1)
    )
    module = module.double()
    before = state(module)
    x = torch.randn(8, 2, 5).double()

    def evaluate(module, members):
        return module(x[members.start : members.start + members.count]).flatten()

    whole = EvolutionStrategy(module, 0.1, 8).step(evaluate)
    torch.testing.assert_close(EvolutionStrategy(module, 0.1, 8, chunk=2).step(evaluate), whole)
    assert as_before(module, before)


def test_copies_of_members_have_no_hooks():
    module = normed()
    es = EvolutionStrategy(module, 0.1, 8)
    with es.ask() as members:
        plain = members.module(3)
        with pytest.raises(flipout.BatchError):
            fitness(module, members)
        members.weights(0)  # so that the evaluation is no call without noise
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in plain.modules())
    plain.train()(torch.randn(5, 4).double())


def test_predictions_of_a_net_without_running_statistics_are_those_of_its_members():
    net = flipout.Perturbed(normed(track_running_stats=False), flipout.Gaussian(0.3), generator=torch.Generator())
    x = torch.randn(9, 4).double()
    found = flipout.bayes.sample_outputs(net, x, 3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for n in range(3):
        with net.using(flipout.Shared()), net.hold(1, generator) as draw:
            torch.testing.assert_close(found[n], draw.module(0)(x).detach())


def test_predictions_leave_running_statistics_alone():
    module = normed().train()
    before = state(module)
    flipout.bayes.predict(flipout.Perturbed(module, flipout.Gaussian(0.1)), torch.randn(9, 4).double(), 4)
    assert as_before(module, before)
    assert module.training


def sample_batch(n, generator):
    return torch.randn(n, 4, generator=generator).double()


def loss_fn(net, x):
    return net(x).square().mean()


def test_measurements_of_variance_leave_running_statistics_alone():
    module = normed()
    before = state(module)
    net = flipout.Perturbed(module, flipout.MultiplicativeGaussian(0.5))
    flipout.variance.gradient_variance(net, loss_fn, sample_batch, batch_size=8, draws=4)
    flipout.variance.variance_curve(net, loss_fn, sample_batch, batch_sizes=(4, 8), draws=4)
    assert as_before(module, before)


def test_statistics_of_micro_batches_are_not_taken_for_those_of_the_batch():
    net = flipout.Perturbed(normed(), flipout.MultiplicativeGaussian(0.5))
    with pytest.raises(flipout.ArgumentError, match=r"'1' normalises by the statistics of its batch.*micro_batch=8"):
        flipout.variance.gradient_variance(net, loss_fn, sample_batch, batch_size=8, micro_batch=4, draws=4)
    with pytest.raises(flipout.ArgumentError, match=r"'1' normalises.*depends on the other examples"):
        flipout.variance.variance_components(net, loss_fn, sample_batch, batch_size=8, draws=8)
    net.module[1].eval()
    flipout.variance.gradient_variance(net, loss_fn, sample_batch, batch_size=8, micro_batch=4, draws=4)
    flipout.variance.variance_components(net, loss_fn, sample_batch, batch_size=8, draws=8)


def test_buffers_that_are_shared_come_back_shared():
    module = Counting()
    pair = nn.ModuleList([module, copy.copy(module)])
    pair[1]._buffers = dict(module._buffers)
    with flipout.buffers.kept_buffers(pair):
        module(torch.ones(3, 4))
        pair[1].calls += 5
    assert pair[0].calls is pair[1].calls
    assert int(module.calls) == 0
