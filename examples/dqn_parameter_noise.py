"""A Stable-Baselines3 DQN that explores by noisy weights, one set for each sub-environment's episode (Plappert et al. 2018)."""

import argparse
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from flipout.evolution import ParameterNoise


def policy_distance(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """KL divergence between the softmaxes of the values, in nats: the distance of Plappert et al. for a DQN."""
    return torch.nn.functional.kl_div(noisy.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean")


class ParameterNoiseDQN(DQN):
    """Acts by its values under noisy weights; learns its clean ones."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.noise = ParameterNoise(self.q_net, std=0.05, envs=self.n_envs, target=0.05, seed=self.seed or 0)

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        if deterministic or len(observation) != self.n_envs:
            return super().predict(observation, state, episode_start, deterministic)
        values = self.noise(self.policy.obs_to_tensor(observation)[0])
        return values.argmax(1).cpu().numpy(), state

    def _update_info_buffer(self, infos: Any, dones: Any = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is not None and np.any(dones):
            self.noise.end(dones)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        super().train(gradient_steps, batch_size)
        rows = batch_size // self.n_envs * self.n_envs
        self.noise.adapt(self.replay_buffer.sample(rows).observations, distance=policy_distance)


def train(steps: int = 50_000, envs: int = 4, seed: int = 0) -> float:
    """Trains on CartPole and returns the mean return of the clean policy over 20 episodes."""
    env = make_vec_env("CartPole-v1", n_envs=envs, seed=seed)
    model = ParameterNoiseDQN(
        "MlpPolicy", env, learning_rate=2.3e-3, learning_starts=min(1000, steps // 2), train_freq=64, gradient_steps=128, seed=seed,
        exploration_initial_eps=0.05, exploration_final_eps=0.0, target_update_interval=10, batch_size=64,
        policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip
    model.learn(steps)
    print(f"σ of the weights' noise at the end: {model.noise.std:.4f}")
    return float(evaluate_policy(model, make_vec_env("CartPole-v1", seed=seed + 1), n_eval_episodes=20)[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    print(f"mean return over 20 episodes: {train(**vars(parser.parse_args())):.0f}")
