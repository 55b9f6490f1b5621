"""A Stable-Baselines3 DQN with learnable noise on its weights (NoisyNet, Fortunato et al. 2018), drawn for every row by itself."""

import argparse
from typing import Any

from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from flipout.evolution import noisy


class NoisyPolicy(DQNPolicy):
    """Values from a noisy net: fresh weights for each row, at every step of acting and of learning."""

    def make_q_net(self) -> QNetwork:
        net = super().make_q_net()
        net.q_net = noisy(net.q_net, std=0.1)
        return net

    def _predict(self, obs: Any, deterministic: bool = True) -> Any:
        if deterministic:
            return super()._predict(obs, deterministic)
        with self.q_net.q_net.sampling():
            return super()._predict(obs, deterministic)


def train(steps: int = 50_000, envs: int = 4, seed: int = 0) -> float:
    """Trains on CartPole, without any epsilon, and returns the mean return of the mean weights over 20 episodes."""
    env = make_vec_env("CartPole-v1", n_envs=envs, seed=seed)
    model = DQN(
        NoisyPolicy, env, learning_rate=1e-3, learning_starts=min(1000, steps // 2), train_freq=4, gradient_steps=8, seed=seed,
        exploration_initial_eps=0.0, exploration_final_eps=0.0, target_update_interval=200, batch_size=128, gamma=0.98,
        policy_kwargs={"net_arch": [128, 128]},
    )  # fmt: skip
    model.learn(steps)
    return float(evaluate_policy(model, make_vec_env("CartPole-v1", seed=seed + 1), n_eval_episodes=20)[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    print(f"mean return over 20 episodes: {train(**vars(parser.parse_args())):.0f}")
