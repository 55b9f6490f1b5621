"""Stable-Baselines3's actor-critic policies: an action and its log-probability under one and the same weights.

The policy acts by ``forward`` and learns by ``evaluate_actions``, a method of its own that reads the parameter ``log_std`` outside
any module's call.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import flipout

N = 4


@pytest.fixture
def policy():
    gymnasium = pytest.importorskip("gymnasium", reason="needs the gymnasium package")
    policies = pytest.importorskip("stable_baselines3.common.policies", reason="needs the stable_baselines3 package")
    torch.manual_seed(0)
    box = gymnasium.spaces.Box
    made = policies.ActorCriticPolicy(box(-1, 1, (3,)), box(-1, 1, (2,)), lambda _: 1e-3)
    with torch.no_grad():
        made.action_net.weight.normal_()
    return made


class Acting(nn.Module):
    """The policy with both of its methods behind ``forward``, so that both run under the draw."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observations, actions=None):
        return self.policy(observations) if actions is None else self.policy.evaluate_actions(observations, actions)


def of_members(draw, policy_of, observations, actions):
    """Log-probabilities of each member's own plain policy."""
    found = []
    for n in range(N):
        plain = policy_of(draw.module(n))
        found.append(plain.evaluate_actions(observations[n : n + 1], actions[n : n + 1])[1])
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("estimator", [flipout.Flipout(), flipout.Independent(), flipout.Shared()], ids=str)
def test_a_wrapper_with_both_methods_acts_and_learns_under_one_draw(policy, estimator):
    net = flipout.Perturbed(Acting(policy), flipout.Gaussian(0.3), estimator)
    assert "policy.log_std" in net.noises  # the policy's own parameter, of its actions
    observations = torch.randn(N, 3)
    with net.hold(N) as draw:
        actions, values, log_prob = net(observations)
        again, learned, _ = net(observations, actions)
        torch.testing.assert_close(again, values)
        torch.testing.assert_close(learned, log_prob)
        torch.testing.assert_close(
            learned, of_members(draw, lambda plain: plain.policy, observations, actions), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_without_its_log_std_the_policy_acts_and_learns_under_one_draw(policy):
    observations = torch.randn(N, 3)
    with flipout.perturbed(policy, flipout.Gaussian(0.3), members=N, exclude="log_std") as draw:
        actions, values, log_prob = policy(observations)
        again, learned, _ = policy.evaluate_actions(observations, actions)
        torch.testing.assert_close(again, values)
        torch.testing.assert_close(learned, log_prob)
        torch.testing.assert_close(learned, of_members(draw, lambda plain: plain, observations, actions), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_perturbed_reaches_a_parameter_that_a_method_reads_by_itself(policy):
    observations = torch.randn(N, 3)
    with flipout.perturbed(policy, flipout.Gaussian(0.3), members=N) as draw:
        actions, _, log_prob = policy(observations)
        _, learned, _ = policy.evaluate_actions(observations, actions)
        torch.testing.assert_close(learned, log_prob)
        torch.testing.assert_close(learned, of_members(draw, lambda plain: plain, observations, actions), rtol=1e-4, atol=1e-5)


class Gaussian(nn.Module):
    """A policy that makes its distribution by a function of its mean and its log_std."""

    def __init__(self, make):
        super().__init__()
        self.mean, self.log_std, self.make = nn.Linear(3, 2), nn.Parameter(torch.zeros(2)), make

    def forward(self, x, actions):
        return self.make(self.mean(x), self.log_std).log_prob(actions).sum(-1)


WAYS = {
    "ones": lambda mean, log_std: Normal(mean, torch.ones_like(mean) * log_std.exp()),
    "expanded": lambda mean, log_std: Normal(mean, log_std.exp().expand_as(mean)),
    "clamped": lambda mean, log_std: Normal(mean, torch.ones_like(mean) * log_std.clamp(-2, 2).exp()),
    "alone": lambda mean, log_std: Normal(mean, log_std.exp()),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_distribution_has_each_members_std(way):
    """torch.distributions never gets a std that belongs to nobody."""
    net = flipout.Perturbed(Gaussian(WAYS[way]), flipout.Gaussian(0.3))
    x, actions = torch.randn(N, 3), torch.randn(N, 2)
    with net.hold(N) as draw:
        found = net(x, actions)
        for n in range(N):
            torch.testing.assert_close(found[n], draw.module(n)(x[n : n + 1], actions[n : n + 1])[0], rtol=1e-4, atol=1e-5)
