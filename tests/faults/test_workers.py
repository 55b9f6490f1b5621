"""Ray workers give the bits of an undisturbed run, whoever dies."""

import logging
import os
import signal

import pytest
import torch
from torch import nn

import flipout
from flipout.evolution import EvolutionStrategy

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def strategy():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    return EvolutionStrategy(module, 0.1, 64, seed=2), torch.optim.Adam(module.parameters(), lr=0.05)


def evaluator(flag=None, fails=()):
    """A fitness that depends on the generation; kills its worker once, at ``flag``, and always fails at the ranges ``fails``."""

    def evaluate(module, members):
        if flag is not None and members.start == 16 and members.generation == 1 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if members.start in fails:
            raise ValueError(f"no luck with {members.start}")
        x = torch.linspace(-1, 1, 40).view(5, 8) + members.generation
        return members.mean(-(module(members.expand(x)) - 1).square())

    return evaluate


def run(generations=3, workers=2, **options):
    es, optimiser = strategy()
    fitness = []
    with flipout.evolution.RayWorkers(es, evaluator(**options), workers=workers, range_size=8, retries=1) as pool:
        for _ in range(generations):
            fitness.append(pool.step())
            optimiser.step()
    return es, torch.stack(fitness)


def test_a_worker_killed_in_mid_generation_changes_no_bit(tmp_path, caplog):
    flag = tmp_path / "killed"
    undisturbed, fitness = run()
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "flipout.evolution"):
        disturbed, other = run(flag=flag)
    assert flag.exists()
    assert "generation 1, members 16 to 23: worker" in caplog.text
    assert "is replaced" in caplog.text
    assert torch.equal(fitness, other)
    for a, b in zip(undisturbed.module.parameters(), disturbed.module.parameters(), strict=True):
        assert torch.equal(a, b)
    es, optimiser = strategy()  # and of one process, with the same ranges as chunks
    es.chunk = 8
    for _ in range(3):
        es.step(evaluator())
        optimiser.step()
    for a, b in zip(undisturbed.module.parameters(), es.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_range_that_keeps_failing_is_dropped_in_whole_pairs(caplog):
    with caplog.at_level(logging.WARNING, "flipout.evolution"):
        es, fitness = run(generations=1, workers=1, fails=(24, 40))
    assert (
        "members 24 to 31: failed 2 times, the last time with ValueError: no luck with 24; these 8 members are dropped"
        in caplog.text
    )
    assert fitness[0].isnan().nonzero().flatten().tolist() == [*range(24, 32), *range(40, 48)]
    single, _ = strategy()
    single.chunk = 8
    whole = single.evaluate(evaluator())
    single.tell(whole, kept=~fitness[0].isnan())
    torch.testing.assert_close(fitness[0][~fitness[0].isnan()], whole[~fitness[0].isnan()])
    for a, b in zip(es.module.parameters(), single.module.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_generation_without_any_fitness_raises_and_keeps_the_state():
    es, _ = strategy()
    failing = flipout.evolution.RayWorkers(es, evaluator(fails=range(64)), workers=1, range_size=32, retries=0)
    with failing, pytest.raises(flipout.errors.EvaluationError, match=r"every range of members failed 1 times; .*no luck with"):
        failing.step()
    assert es.generation == 0
    assert all(p.grad is None for p in es.module.parameters())


def test_rollouts_share_their_normalisation_over_workers():
    pytest.importorskip("gymnasium")

    def train(distributed):
        torch.manual_seed(0)
        policy = nn.Linear(4, 2)
        es = EvolutionStrategy(policy, 0.3, 16, seed=0, chunk=8)
        rollouts = flipout.evolution.Rollouts("CartPole-v1", normalize=True, max_steps=40)
        if distributed:
            with flipout.evolution.RayWorkers(es, rollouts, workers=1, range_size=8) as workers:
                fitness = [workers.step(), workers.step()]
        else:
            fitness = [es.step(rollouts), es.step(rollouts)]
        rollouts.begin(2)
        return torch.stack(fitness), rollouts.normalizer

    (fitness, alone), (other, shared) = train(False), train(True)
    assert torch.equal(fitness, other)
    assert alone.count == shared.count > 0
    torch.testing.assert_close(alone(torch.ones(1, 4)), shared(torch.ones(1, 4)))


@pytest.mark.parametrize("options", [{"workers": 0}, {"range_size": 3}, {"retries": -1}, {"threads": 0}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(flipout.ArgumentError, match=next(iter(options))):
        flipout.evolution.RayWorkers(strategy()[0], evaluator(), **options)
