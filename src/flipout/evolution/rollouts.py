"""Reinforcement learning: every sub-environment of a vector environment is one member of the population."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from flipout.errors import ArgumentError
from flipout.evolution.environments import EpisodeVectorEnv, action_reader, make_env, observation_shape, observation_tensor
from flipout.evolution.members import Members
from flipout.evolution.observations import ObservationNormalizer

__all__ = ["Rollouts"]


class Rollouts:
    """An ``evaluate`` for :meth:`flipout.evolution.EvolutionStrategy.step`: the return of an episode under each member's weights.

    The two members of an antithetic pair play from the same seeds (common random numbers). All members step together, one row of
    the policy's batch each; an episode that ends early costs nothing from then on.

    Args:
        env: a gymnasium id, or a function that makes an environment.
        episodes: played by each member; the fitness is their mean return.
        normalize: whether observations are normalised by an :class:`~flipout.evolution.ObservationNormalizer`.
        max_steps: cuts episodes, beside the environment's own limit.
        action: from the policy's output ``[n, ...]`` to actions; by default argmax for discrete spaces and a stretched tanh for
            bounded ones.
        initial_state: for recurrent policies, which are called as ``policy(observations, state) -> (output, state)``: makes the
            state of ``n`` episodes. Weights and state are held for the whole episode.
        options: for ``gymnasium.make``.

    Raises:
        ArgumentError: for an environment that is not there, or spaces that need a wrapper.

    Example:
        >>> import torch, flipout
        >>> policy = torch.nn.Linear(4, 2)
        >>> es = flipout.evolution.EvolutionStrategy(policy, std=0.5, population=16, seed=0)
        >>> rollouts = flipout.evolution.Rollouts("CartPole-v1")
        >>> fitness = es.step(rollouts)
        >>> fitness.shape, bool((fitness >= 1).all())
        (torch.Size([16]), True)
        >>> rollouts.returns(policy, episodes=3).shape
        torch.Size([3])
    """

    def __init__(
        self,
        env: str | Callable[[], gym.Env[Any, Any]],
        *,
        episodes: int = 1,
        normalize: bool = False,
        max_steps: int | None = None,
        action: Callable[[Tensor], Any] | None = None,
        initial_state: Callable[[int], Any] | None = None,
        **options: Any,
    ) -> None:
        if episodes < 1:
            raise ArgumentError(f"episodes={episodes!r}: each member plays at least one")
        self.make = make_env(env, **options)
        self.episodes, self.max_steps, self.initial_state = episodes, max_steps, initial_state
        self.steps = 0
        self._envs: EpisodeVectorEnv | None = None
        self._generation: int | None = None
        one = self._environments(1)
        self.observation_space, self.action_space = one.single_observation_space, one.single_action_space
        self.shape = observation_shape(self.observation_space)
        self._action = action_reader(self.action_space) if action is None else action
        self.normalizer = ObservationNormalizer(self.shape) if normalize else None

    def __call__(self, module: nn.Module, members: Members) -> Tensor:
        """The mean return of each member, float64 ``[members.count]``.

        Raises:
            EvaluationError: if an environment raises; the strategy's state is kept, and environments are made anew.
        """
        self.begin(members.generation)
        seeds = members.seeds.numpy()
        total = np.zeros(members.count)
        for episode in range(self.episodes):
            total += self._play(module, (seeds + 7919 * episode) % 2**31)
        return torch.from_numpy(total / self.episodes)

    @torch.no_grad()
    def returns(self, policy: nn.Module, episodes: int = 100, seed: int = 10**9) -> Tensor:
        """Returns of a plain policy in ``episodes`` episodes side by side, float64 ``[episodes]``.

        Args:
            policy: without noise.
            episodes: how many.
            seed: of the first; they count up. The default keeps clear of nothing but is the same at every call.
        """
        kept, self._observing = self._observing, False
        try:
            return torch.from_numpy(self._play(policy, np.arange(seed, seed + episodes) % 2**31))
        finally:
            self._observing = kept

    @torch.no_grad()
    def act(self, policy: nn.Module, observations: Any) -> Any:
        """The actions of a plain feed-forward policy on observations ``[n, ...]`` as the environment gives them."""
        like = next(policy.parameters())
        seen = observation_tensor(self.observation_space, observations, like.device, like.dtype)
        return self._action(policy(seen if self.normalizer is None else self.normalizer(seen)))

    def collect(self) -> Any:
        """What the normalisation has observed, for another process to :meth:`merge`."""
        return None if self.normalizer is None else self.normalizer.collect()

    def merge(self, collected: Any) -> None:
        """Takes what another process has collected."""
        if self.normalizer is not None and collected is not None:
            self.normalizer.merge(collected)

    def state_dict(self) -> dict[str, Any]:
        """The normalisation and the count of steps, for a checkpoint or for workers."""
        normalizer = None if self.normalizer is None else self.normalizer.state_dict()
        return {"generation": self._generation, "steps": self.steps, "normalizer": normalizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved normalisation."""
        self._generation, self.steps = state["generation"], state["steps"]
        if self.normalizer is not None:
            self.normalizer.load_state_dict(state["normalizer"])

    def close(self) -> None:
        """Closes the environments."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None

    _observing = True

    def begin(self, generation: int) -> None:
        """Lets what the generation before has observed count from now on. Called by each evaluation."""
        if self.normalizer is not None and self._generation is not None and generation != self._generation:
            self.normalizer.update()
        self._generation = generation

    def _play(self, module: nn.Module, seeds: Any) -> Any:
        envs = self._environments(len(seeds))
        try:
            return self._episode(envs, module, seeds)
        except BaseException:
            self.close()
            raise

    def _episode(self, envs: EpisodeVectorEnv, module: nn.Module, seeds: Any) -> Any:
        like = next(module.parameters())
        found, _ = envs.reset(seed=[int(seed) for seed in seeds])
        total, alive = np.zeros(len(seeds)), np.ones(len(seeds), dtype=bool)
        state = None if self.initial_state is None else self.initial_state(len(seeds))
        steps = 0
        while alive.any() and (self.max_steps is None or steps < self.max_steps):
            observations = observation_tensor(self.observation_space, found, like.device, like.dtype)
            if self.normalizer is not None:
                if self._observing:
                    self.normalizer.observe(observations[torch.from_numpy(alive)])
                observations = self.normalizer(observations)
            if self.initial_state is None:
                output = module(observations)
            else:
                output, state = module(observations, state)
            found, rewards, terminated, truncated, _ = envs.step(self._action(output))
            total += rewards
            steps += 1
            self.steps += int(alive.sum())
            alive = ~(terminated | truncated)
        return total

    def _environments(self, count: int) -> EpisodeVectorEnv:
        if self._envs is None or self._envs.num_envs != count:
            self.close()
            self._envs = EpisodeVectorEnv([self.make] * count)
        return self._envs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_envs": None}
