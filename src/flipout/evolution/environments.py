"""Gymnasium environments as a population meets them: one sub-environment a member, one episode each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from flipout.errors import ArgumentError, EvaluationError

__all__ = ["EpisodeVectorEnv", "action_reader", "make_env", "observation_shape", "observation_tensor"]


class EpisodeVectorEnv(SyncVectorEnv):
    """Sub-environments that play one episode each: those that have ended are left alone, at no cost.

    Args:
        env_fns: what makes each.

    Raises:
        EvaluationError: from ``reset`` and ``step``, if a sub-environment raises.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        super().__init__(env_fns, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self._steps = 0

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        try:
            return super().reset(seed=seed, options=options)
        except Exception as error:
            raise EvaluationError(f"an environment raised {type(error).__name__} in reset(): {error}") from error

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Steps those that have not ended; the others keep their last observation and get no reward."""
        self._steps += 1
        self._rewards[:] = 0.0
        for i in np.flatnonzero(~self._autoreset_envs):
            try:
                self._env_obs[i], self._rewards[i], self._terminations[i], self._truncations[i], _ = self.envs[i].step(actions[i])
            except Exception as error:
                raise EvaluationError(
                    f"environment {i} raised {type(error).__name__} at step {self._steps} on action {actions[i]!r}: {error}"
                ) from error
        self._observations = gym.vector.utils.concatenate(self.single_observation_space, self._env_obs, self._observations)
        self._autoreset_envs = self._terminations | self._truncations
        return self._observations, self._rewards, self._terminations, self._truncations, {}


def make_env(env: str | Callable[[], gym.Env[Any, Any]], **options: Any) -> Callable[[], gym.Env[Any, Any]]:
    """A function that makes an environment, from its id or from such a function.

    Raises:
        ArgumentError: if gymnasium does not know the id, or lacks what it needs.
    """
    if callable(env):
        return env
    try:
        spec = gym.spec(env)
        return lambda: gym.make(spec, disable_env_checker=True, **options)
    except gym.error.Error as error:
        raise ArgumentError(f"environment {env!r}: {error}") from error


def observation_shape(space: gym.Space[Any]) -> tuple[int, ...]:
    """The shape of one observation as a policy sees it: of a Box its own, of a Discrete space one-hot.

    Raises:
        ArgumentError: for other spaces.
    """
    if isinstance(space, gym.spaces.Box):
        return tuple(space.shape)
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    raise ArgumentError(f"observations of {space}: wrap the environment so that they are a Box or Discrete (FlattenObservation)")


def observation_tensor(space: gym.Space[Any], observations: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Observations ``[n, *shape]`` as numbers for a policy."""
    found = torch.as_tensor(np.asarray(observations))
    if isinstance(space, gym.spaces.Discrete):
        found = torch.nn.functional.one_hot(found - int(space.start), int(space.n))
    return found.to(device=device, dtype=dtype)


def action_reader(space: gym.Space[Any]) -> Callable[[Tensor], Any]:
    """What a policy's output ``[n, k]`` means for a space of actions.

    Discrete: the largest of k = n scores. MultiBinary: where the output is positive. Box: tanh of it, stretched to the bounds, or
        the
    output itself where there are none.

    Raises:
        ArgumentError: for other spaces.
    """
    if isinstance(space, gym.spaces.Discrete):
        start = int(space.start)
        return lambda output: output.argmax(-1).cpu().numpy() + start
    if isinstance(space, gym.spaces.MultiBinary):
        return lambda output: (output > 0).to(torch.int8).cpu().numpy()
    if isinstance(space, gym.spaces.Box):
        low, high, shape = space.low, space.high, space.shape
        bounded = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
        middle, half = (low + high) / 2, (high - low) / 2

        def read(output: Tensor) -> Any:
            values = output.double().cpu().numpy().reshape(-1, *shape)
            return np.where(bounded, middle + half * np.tanh(values), values).astype(space.dtype)

        return read
    raise ArgumentError(f"actions of {space}: give Rollouts(action=...), a function from the policy's output [n, ...] to actions")
