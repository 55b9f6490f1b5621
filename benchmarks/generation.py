"""How many tokens a second does a population write, against plain batched generation and against one member at a time?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import flipout
from benchmarks.harness import MIN_ROUNDS, PATIENCE, THREADS, race
from benchmarks.report import Section
from flipout.evolution import EvolutionStrategy

VOCABULARY, WIDTH, LAYERS, PROMPT, WRITTEN, ROWS = 96, 256, 4, 16, 24, 256
#: Members, and prompts of each.
CASES = [(256, 1), (32, 8)]
CONTESTANTS: dict[str, flipout.Estimator] = {
    "low rank 1": flipout.LowRank(1),
    "flipout": flipout.Flipout(),
    "flipout, bfloat16 noise": flipout.Flipout(noise_dtype=torch.bfloat16),
}
#: Limits of the time over plain generation's: the inverse of tokens a second.
BOUNDS = {"low rank 1": 1 / 0.8, "flipout": 1 / 0.6, "flipout, bfloat16 noise": 1 / 0.7}

TEXT = f"""GPT-2 of width {WIDTH} with {LAYERS} layers, {ROWS} rows, prompts of {PROMPT} tokens, {WRITTEN} new ones, greedy,
float32, dynamic key-value caches. *plain*: one `generate` of the mean weights with as many rows. *in place*: one member after the other, its
perturbation added to the weights from a seed and taken away again (ES at Scale, arXiv 2509.24372). Drawing the members is part of
every time; {THREADS} threads."""


def model() -> Any:
    """The model with its initial weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=PROMPT + WRITTEN, n_embd=WIDTH, n_layer=LAYERS, n_head=4, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def written(net: Any, prompts: torch.Tensor) -> torch.Tensor:
    """What the model writes to rows of prompts."""
    found: torch.Tensor = net.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0
    )
    return found


def contestants(members: int, prompts: int) -> dict[str, Callable[[], Any]]:
    """Everyone who writes to ``members`` x ``prompts`` rows."""
    net = model()
    asked = torch.randint(1, VOCABULARY, (prompts, PROMPT), generator=torch.Generator().manual_seed(1))
    rows = asked.repeat(members, 1)

    def population(estimator: flipout.Estimator) -> Callable[[], Any]:
        es = EvolutionStrategy(net, 0.01, members, estimator=estimator)

        def once() -> None:
            with es.ask():
                written(net, rows)

        return once

    return {"plain": lambda: written(net, rows), **{name: population(each) for name, each in CONTESTANTS.items()}}


@torch.no_grad()
def in_place(net: Any, prompts: torch.Tensor, members: int) -> None:
    """One member after the other, as ES at Scale has it."""
    for n in range(members):
        for sign in (1, -1):
            generator = torch.Generator().manual_seed(n)
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01 * sign)
            if sign == 1:
                written(net, prompts)


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """All cases; the one that goes member by member runs a sixteenth of the members, and counts for as much."""
    section = Section("generation", "Generation", TEXT)
    for members, prompts in CASES:
        name = f"{members} members × {prompts} prompts"
        timings = race(contestants(members, prompts), rounds=rounds, patience=patience)
        section.add_race(name, timings)
        for label, bound in BOUNDS.items():
            section.add_target(f"{name}, {label}", timings[label], bound)
        some = max(members // 16, 2)
        net, asked = model(), torch.randint(1, VOCABULARY, (prompts, PROMPT))
        part = EvolutionStrategy(net, 0.01, members, estimator=flipout.LowRank(1))
        rows = asked.repeat(members, 1)

        def whole(part: Any = part, net: Any = net, rows: Any = rows) -> None:
            with part.ask():
                written(net, rows)

        def alone(net: Any = net, asked: Any = asked, some: int = some) -> None:
            in_place(net, asked, some)

        slow = {"low rank 1, all": whole, "in place, a sixteenth": alone}
        section.add_race(f"{name}, member by member", race(slow, rounds=rounds, patience=patience))
    return section


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    print(run(**vars(parser.parse_args())).markdown())
