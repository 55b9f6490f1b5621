"""Rollouts, normalisation and exploration."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import flipout
from flipout.evolution import EvolutionStrategy, ObservationNormalizer, ParameterNoise, load_checkpoint, noisy, save_checkpoint

gym = pytest.importorskip("gymnasium")
from flipout.evolution.environments import action_reader, observation_shape, observation_tensor  # noqa: E402
from flipout.evolution.rollouts import Rollouts  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


class Corridor(gym.Env):
    """Ends after as many steps as its seed says, up to 5; the reward of a step is the action."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-2, 2, (1,))
    fails_at = None

    def reset(self, seed=None, options=None):
        self.left, self.seed = 1 + seed % 5, seed
        return self.observation_space.low * 0 + 0.5, {}

    def step(self, action):
        self.left -= 1
        if self.fails_at is not None and self.left == self.fails_at:
            raise RuntimeError("the corridor is blocked")
        assert self.left >= 0, "stepped after the end"
        return self.observation_space.low * 0 + 0.25, float(action[0]), self.left == 0, False, {}


def test_an_episode_is_played_under_one_members_weights_and_ends_early():
    policy = nn.Linear(2, 1)
    es = EvolutionStrategy(policy, 0.3, 12)
    rollouts = Rollouts(Corridor)
    fitness = es.evaluate(rollouts)
    with es.ask() as members:
        seeds = members.seeds
        assert torch.equal(seeds[::2], seeds[1::2])
        for n, seed in enumerate(seeds.tolist()):  # by hand, one member at a time
            plain = members.module(n)
            left = 1 + seed % 5
            first, later = (float(2 * plain(torch.full((2,), x)).detach().tanh()) for x in (0.5, 0.25))
            assert fitness[n] == pytest.approx(first + (left - 1) * later, rel=1e-5)
    assert rollouts.steps == int((1 + seeds % 5).sum())
    es.chunk = 4
    torch.testing.assert_close(es.evaluate(rollouts), fitness)


def test_an_environment_that_raises_says_where_and_keeps_the_state():
    policy = nn.Linear(2, 1)
    es = EvolutionStrategy(policy, 0.3, 12)
    before = [p.clone() for p in policy.parameters()]

    class Blocked(Corridor):
        fails_at = 2

    with pytest.raises(
        flipout.errors.EvaluationError, match=r"environment \d+ raised RuntimeError at step \d on action .*the corridor is blocked"
    ):
        es.step(Rollouts(Blocked))
    assert es.generation == 0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(p.grad is None for p in policy.parameters())
    es.step(Rollouts(Corridor))
    with pytest.raises(flipout.ArgumentError, match="NoSuchEnv"):
        Rollouts("NoSuchEnv-v0")
    with pytest.raises(flipout.ArgumentError, match="episodes=0"):
        Rollouts(Corridor, episodes=0)


def test_recurrent_policies_keep_state_and_weights_for_the_episode():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 1)

        def forward(self, x, state):
            state = self.cell(x, state)
            return self.head(state), state

    policy = Memory()
    es = EvolutionStrategy(policy, 0.3, 8)
    rollouts = Rollouts(Corridor, initial_state=lambda n: torch.zeros(n, 3))
    fitness = es.evaluate(rollouts)
    with es.ask() as members:
        for n, seed in enumerate(members.seeds.tolist()):
            plain, state, total = members.module(n), torch.zeros(1, 3), 0.0
            for step in range(1 + seed % 5):
                output, state = plain(torch.full((1, 2), 0.5 if step == 0 else 0.25), state)
                total += float(2 * output.detach().tanh())
            assert fitness[n] == pytest.approx(total, rel=1e-4)


def test_spaces():
    score = torch.tensor([[0.1, 0.9, 0.3], [2.0, -1.0, 0.0]])
    assert action_reader(gym.spaces.Discrete(3, start=-1))(score).tolist() == [0, -1]
    assert action_reader(gym.spaces.MultiBinary(3))(score).tolist() == [[1, 1, 1], [1, 0, 0]]
    low, high = torch.tensor([-1.0, 0.0, -math.inf]).numpy(), torch.tensor([3.0, 1.0, math.inf]).numpy()
    read = action_reader(gym.spaces.Box(low, high))(score)
    assert read[0] == pytest.approx([1 + 2 * math.tanh(0.1), 0.5 + 0.5 * math.tanh(0.9), 0.3], abs=1e-6)
    assert observation_shape(gym.spaces.Discrete(4)) == (4,)
    one_hot = observation_tensor(gym.spaces.Discrete(3), [2, 0], torch.device("cpu"), torch.float64)
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(flipout.ArgumentError, match="wrap the environment"):
        observation_shape(gym.spaces.Text(3))
    with pytest.raises(flipout.ArgumentError, match="give Rollouts"):
        action_reader(gym.spaces.Text(3))


def test_normalisation_counts_from_the_next_generation_on():
    seen = ObservationNormalizer((3,), clip=2.0)
    x = 5 + 3 * torch.randn(500, 3)
    assert torch.equal(seen(x), x)
    seen.observe(x[:200])
    seen.observe(x[200:])
    assert torch.equal(seen(x), x)
    seen.update()
    expected = ((x - x.mean(0)) / x.std(0, correction=0)).clamp(-2, 2)
    torch.testing.assert_close(seen(x), expected, atol=1e-4, rtol=1e-4)
    other = ObservationNormalizer((3,))
    other.load_state_dict(seen.state_dict())
    assert torch.equal(other(x), seen(x))
    with pytest.raises(flipout.ArgumentError, match=r"of shape \(3,\), not \(4,\)"):
        ObservationNormalizer((4,)).load_state_dict(seen.state_dict())
    with pytest.raises(flipout.ArgumentError, match="clip=0"):
        ObservationNormalizer((4,), clip=0)


def test_a_run_saved_and_loaded_goes_on_to_the_same_result(tmp_path):
    def make():
        torch.manual_seed(0)
        policy = nn.Linear(4, 2)
        es = EvolutionStrategy(policy, 0.3, 8, seed=1)
        return es, torch.optim.Adam(policy.parameters(), lr=0.01), Rollouts("CartPole-v1", normalize=True, max_steps=80)

    def go(es, optimiser, rollouts, generations):
        for _ in range(generations):
            es.step(rollouts)
            optimiser.step()
        return [p.detach().clone() for p in es.module.parameters()]

    whole = go(*make(), 5)
    es, optimiser, rollouts = make()
    go(es, optimiser, rollouts, 2)
    save_checkpoint(tmp_path / "es.pt", es, optimiser=optimiser, rollouts=rollouts)
    es, optimiser, rollouts = make()
    load_checkpoint(tmp_path / "es.pt", es, optimiser=optimiser, rollouts=rollouts)
    assert all(torch.equal(a, b) for a, b in zip(whole, go(es, optimiser, rollouts, 3), strict=True))
    with pytest.raises(flipout.ArgumentError, match="pass the parts that it was saved with"):
        load_checkpoint(tmp_path / "es.pt", es)
    (tmp_path / "es.pt").write_bytes(b"no checkpoint")
    with pytest.raises(flipout.ArgumentError, match="cannot be read"):
        load_checkpoint(tmp_path / "es.pt", es)

    class Odd:
        def state_dict(self):
            return {"function": math.sqrt, "path": Path("x")}

    with pytest.raises(flipout.ArgumentError, match="could not be loaded again"):
        save_checkpoint(tmp_path / "odd.pt", es, odd=Odd())
    assert not (tmp_path / "odd.pt").exists()


def test_parameter_noise_keeps_weights_for_an_episode():
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    noise, x = ParameterNoise(policy, 0.2, envs=5, seed=3), torch.ones(5, 4)
    first = noise(x)
    assert (first.std(0) > 0).all()
    assert torch.equal(noise(x), first)
    noise.end([False, True, False, True, False])
    after = noise(x)
    assert torch.equal(after[::2], first[::2])
    assert (after[1::2] != first[1::2]).all()
    assert torch.equal(policy(x)[0], policy(x)[1])
    with torch.no_grad():
        policy[2].bias += 1  # the noise rides on whatever the policy has learned
    torch.testing.assert_close(noise(x), after + 1)
    with pytest.raises(flipout.ArgumentError, match="done has 2 entries for 5"):
        noise.end([True, False])
    for bad in ({"std": 0}, {"target": 0}, {"factor": 1}):
        with pytest.raises(flipout.ArgumentError):
            ParameterNoise(policy, **bad)


def test_the_scale_of_parameter_noise_finds_its_target():
    policy, x = nn.Linear(4, 2), torch.randn(256, 4)
    noise = ParameterNoise(policy, 1.0, envs=256, target=0.1, factor=1.1)
    found = [noise.adapt(x) for _ in range(60)]
    assert found[0] > 1
    assert sum(found[-20:]) / 20 == pytest.approx(0.1, rel=0.15)


def test_noisy_nets_learn_their_scales():
    net = noisy(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)), std=0.5)
    scales = {name: float(p.detach().exp().mean()) for name, p in net.log_std.items()}
    assert scales == {
        key: pytest.approx(0.5 / math.sqrt(3 if key[0] == "0" else 4)) for key in ("0/weight", "0/bias", "3/weight", "3/bias")
    }
    net(torch.randn(6, 1, 4)).square().mean().backward()
    assert all(p.grad is not None for p in net.noise_parameters())
    with pytest.raises(flipout.ArgumentError, match="no linear layer or convolution"):
        noisy(nn.LayerNorm(3))


def test_the_cartpole_example_learns():
    train = runpy.run_path(str(EXAMPLES / "es_cartpole.py"))["train"]
    assert train(population=32, generations=8) > 60
