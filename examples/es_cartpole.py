"""CartPole by evolution: 64 policies in one batched pass, one sub-environment each. Takes a few seconds."""

import argparse

import torch
from torch import nn

import flipout


def train(population: int = 64, generations: int = 40, seed: int = 0) -> float:
    """Trains a policy and returns its mean return over 100 episodes."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    es = flipout.evolution.EvolutionStrategy(policy, std=0.3, population=population, seed=seed)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.3)
    rollouts = flipout.evolution.Rollouts("CartPole-v1")
    for generation in range(generations):
        fitness = es.step(rollouts)
        optimiser.step()
        print(f"generation {generation}: mean return {fitness.mean():.0f}, best {fitness.max():.0f}")
        if fitness.mean() > 470:
            break
    return float(rollouts.returns(policy, episodes=100).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--generations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    print(f"mean return of the mean policy over 100 episodes: {train(**vars(parser.parse_args())):.0f}")
