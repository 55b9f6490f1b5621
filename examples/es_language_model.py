"""A small GPT-2 learns to sort by evolution: the reward of what it writes is all it is told. No gradient, no teacher forcing.

Each prompt is a few digits and a mark; the reward is the share of places at which what the model writes is the sorted sequence.
"""

import argparse

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import flipout
from flipout.evolution import TokenReward

DIGITS, LENGTH = 6, 3
MARK, PAD = DIGITS, DIGITS + 1


def prompts(n: int, generator: torch.Generator) -> Tensor:
    """``[n, LENGTH + 1]``: digits, then the mark."""
    digits = torch.randint(DIGITS, (n, LENGTH), generator=generator)
    return torch.cat([digits, torch.full((n, 1), MARK)], 1)


def reward(asked: Tensor, written: Tensor) -> Tensor:
    """The share of places that are right, ``[n]``."""
    return (written == asked[:, :LENGTH].sort(1).values).float().mean(1)


def train(generations: int = 300, population: int = 256, batch: int = 24, seed: int = 0) -> tuple[float, float]:
    """Returns the mean reward before and after, on 500 prompts."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=PAD + 1, n_positions=2 * LENGTH + 1, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None,
        pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    es = flipout.evolution.EvolutionStrategy(model, std=0.03, population=population, seed=seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    evaluate = TokenReward(
        reward, lambda generation: prompts(batch, torch.Generator().manual_seed(generation)), LENGTH, pad_token_id=PAD
    )  # fmt: skip
    held_out = prompts(500, torch.Generator().manual_seed(10**6))
    before = float(evaluate.rewards(model, held_out).mean())
    for generation in range(generations):
        fitness = es.step(evaluate)
        optimiser.step()
        if generation % 20 == 0:
            print(f"generation {generation}: mean reward of the population {fitness.mean():.3f}", flush=True)
    return before, float(evaluate.rewards(model, held_out).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=300)
    parser.add_argument("--population", type=int, default=256)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    before, after = train(**vars(parser.parse_args()))
    print(f"share of places right on 500 new prompts: {before:.3f} before, {after:.3f} after")
