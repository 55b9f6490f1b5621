"""Exploration in the middle of an episode: the scale moves, the directions stay, in whichever thread the agent acts."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from torch import nn

import flipout
from flipout.evolution import ParameterNoise

ENVS = 5
ESTIMATORS = {"flipout": flipout.Flipout(), "independent": flipout.Independent(), "low_rank": flipout.LowRank(2)}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def offsets(noise, policy, x):
    return noise(x) - policy(x).detach()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_adapting_changes_the_scale_and_nothing_else(estimator):
    policy, x = linear(), torch.randn(ENVS, 4).double()
    noise = ParameterNoise(policy, 0.2, ENVS, target=1e9, factor=1.5, estimator=ESTIMATORS[estimator])
    before = offsets(noise, policy, x)
    for _ in range(3):  # far from the target: sigma grows
        noise.adapt(x)
    assert noise.std == pytest.approx(0.2 * 1.5**3)
    torch.testing.assert_close(offsets(noise, policy, x), 1.5**3 * before)
    noise.target = 1e-9  # and shrinks
    for _ in range(3):
        noise.adapt(x)
    torch.testing.assert_close(offsets(noise, policy, x), before)


def test_the_end_of_one_episode_leaves_the_others_directions_after_a_change_of_scale():
    policy, x = linear(), torch.randn(ENVS, 4).double()
    noise = ParameterNoise(policy, 0.2, ENVS, target=1e9, factor=2.0)
    before = offsets(noise, policy, x)
    noise.end([False, True, False, False, True])
    noise.adapt(x)
    after = offsets(noise, policy, x)
    kept = [0, 2, 3]
    torch.testing.assert_close(after[kept], 2 * before[kept])
    assert (after[[1, 4]] - 2 * before[[1, 4]]).abs().max() > 1e-3


def test_without_a_target_nothing_moves():
    policy, x = linear(), torch.randn(ENVS, 4).double()
    noise = ParameterNoise(policy, 0.2, ENVS)
    before = noise(x)
    assert noise.adapt(x) > 0
    assert torch.equal(noise(x), before)


def test_the_law_of_new_weights_has_the_new_scale():
    policy, x = nn.Linear(1, 1, bias=False), torch.ones(4000, 1)
    noise = ParameterNoise(policy, 0.1, 4000, target=1e9, factor=3.0, estimator=flipout.Independent())
    noise.adapt(x)
    noise.end([True] * 4000)
    assert float(offsets(noise, policy, x).std()) == pytest.approx(0.3, rel=0.05)


def test_another_thread_and_another_task_see_the_same_weights():
    policy, x = linear(), torch.randn(ENVS, 4).double()
    noise = ParameterNoise(policy, 0.2, ENVS)
    here, found = noise(x), []
    thread = threading.Thread(target=lambda: found.append(noise(x)))
    thread.start()
    thread.join()

    async def acting():
        return noise(x)

    found.append(asyncio.run(acting()))
    assert all(torch.equal(each, here) for each in found)


def test_the_policy_stays_clean_between_calls_and_has_no_new_parameters():
    policy, x = linear(), torch.randn(ENVS, 4).double()
    names = [name for name, _ in policy.named_parameters()]
    first, second = ParameterNoise(policy, 0.2, ENVS, seed=1), ParameterNoise(policy, 0.2, ENVS, seed=2)
    assert not torch.equal(first(x), second(x))  # two agents of one policy
    assert [name for name, _ in policy.named_parameters()] == names
    assert type(policy.weight) is nn.Parameter
    torch.testing.assert_close(policy(x), nn.functional.linear(x, policy.weight, policy.bias))
