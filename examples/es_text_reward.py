"""A character model is trained by gradient on a real text, then tuned towards a reward that has none: real words.

    python examples/es_text_reward.py                 trains, then tunes by evolution
    python examples/es_text_reward.py --compare       against MeZO's and ES at Scale's settings and REINFORCE

at equal processor time, each with the better of two step sizes.

The reward of a text is the share of its characters that stand in words of three letters or more which the training text has.
"""

import argparse
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, logging

import flipout
from flipout.data import tiny_shakespeare
from flipout.evolution import EvolutionStrategy, TextRewards, character_tokenizer

WINDOW, PROMPT = 64, 16
#: Step sizes that each method is tried with; the better one counts.
RATES = {"flipout": (1e-3, 3e-3), "mezo": (1e-4, 1e-3), "es at scale": (0.3, 1.0), "reinforce": (3e-4, 1e-3)}


class Task:
    """A text, its tokenizer, prompts out of it and the reward."""

    def __init__(self, new: int) -> None:
        text = tiny_shakespeare(download=False)
        self.source, self.new = text.source, new
        self.tokenizer = character_tokenizer(text.vocabulary)
        self.train = text.train + 3  # after the special tokens
        held_out = "".join(text.vocabulary[i] for i in text.valid.tolist())
        found = Counter(re.findall(r"[a-z]{3,}", "".join(text.vocabulary[i] for i in text.train.tolist()).lower()))
        self.words = {word for word, count in found.items() if count > 2}
        self.prompts = [held_out[i : i + PROMPT] for i in range(0, len(held_out) - PROMPT, 61)]

    def reward(self, prompts: list[Any], texts: list[str]) -> list[float]:
        """The share of characters in words; the first and the last run of letters may be parts of words."""
        shares = []
        for text in texts:
            runs = re.findall(r"(?<=[^a-z])[a-z]{3,}(?=[^a-z])", text.lower())
            shares.append(sum(len(run) for run in runs if run in self.words) / self.new)
        return shares

    def rewards(self, prompts: Any, seed: int = 0) -> TextRewards:
        return TextRewards(self.tokenizer, self.reward, prompts, self.new, temperature=1.0, seed=seed)

    def batch(self, size: int, seed: int) -> Callable[[int], list[str]]:
        """Prompts for each generation, out of the first two thirds."""

        def prompts(generation: int) -> list[str]:
            generator = torch.Generator().manual_seed(1000 * seed + generation)
            chosen = torch.randint(2 * len(self.prompts) // 3, (size,), generator=generator)
            return [self.prompts[i] for i in chosen.tolist()]

        return prompts

    def judge(self, model: GPT2LMHeadModel, prompts: int = 200) -> float:
        """The mean reward on held-out prompts."""
        asked = self.prompts[2 * len(self.prompts) // 3 :][:prompts]
        return float(self.rewards(asked, seed=99).rewards(model).mean())


def pretrained(task: Task, steps: int, width: int) -> GPT2LMHeadModel:
    """A character model, trained by gradient."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(task.tokenizer), n_positions=WINDOW, n_embd=width, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(task.train) - WINDOW, (24,), generator=generator)
        rows = torch.stack([task.train[i : i + WINDOW] for i in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    print(f"trained by gradient for {steps} steps, to {float(loss):.3f} nats a character", flush=True)
    return model.eval()


def evolution(task: Task, model: GPT2LMHeadModel, rate: float, seed: int) -> Iterator[None]:
    """32 antithetic pairs under flipout, all in one batch, on 6 prompts."""
    rewards = task.rewards(task.batch(6, seed), seed)
    es = EvolutionStrategy(model, 0.02, 64, seed=seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    while True:
        es.step(rewards)
        optimiser.step()
        yield


def mezo(task: Task, model: GPT2LMHeadModel, rate: float, seed: int) -> Iterator[None]:
    """One Gaussian direction, forwards and backwards, all rows on it, SGD (Malladi et al. 2023)."""
    rewards = task.rewards(task.batch(192, seed), seed)
    es = EvolutionStrategy(model, 1e-2, 2, base="gaussian", seed=seed, fitness_shaping=lambda f: f)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    while True:
        es.step(rewards)
        optimiser.step()
        yield


@torch.no_grad()
def at_scale(task: Task, model: GPT2LMHeadModel, rate: float, seed: int) -> Iterator[None]:
    """30 members one after the other, in place, z-scores (Qiu et al. 2025)."""
    rewards, std, generation = task.rewards(task.batch(12, seed), seed), 0.02, 0

    def add(n: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(10**6 * seed + 1000 * generation + n)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)

    while True:
        found = []
        for n in range(30):
            add(n, std)
            found.append(rewards.rewards(model, generation=generation).mean())
            add(n, -std)
        fitness = torch.stack(found)
        for n, z in enumerate(((fitness - fitness.mean()) / (fitness.std() + 1e-8)).tolist()):
            add(n, rate * std * z / 30)
        generation += 1
        yield


def reinforce(task: Task, model: GPT2LMHeadModel, rate: float, seed: int) -> Iterator[None]:
    """The gradient of the log-probability of sampled texts, times their reward less the batch's mean (Williams 1992)."""
    prompts, generator = task.batch(96, seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    generation = 0
    while True:
        asked = prompts(generation)
        rows = torch.tensor(task.tokenizer(asked)["input_ids"])
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        written = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, max_new_tokens=task.new, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        new = written[:, PROMPT:]
        reward = torch.tensor(task.reward(asked, task.tokenizer.batch_decode(new, skip_special_tokens=True)))
        law = model(input_ids=written).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        likely = law.gather(2, new.unsqueeze(2)).squeeze(2).sum(1)
        optimiser.zero_grad()
        (-(reward - reward.mean()) * likely).mean().backward()
        optimiser.step()
        generation += 1
        yield


METHODS = {"flipout": evolution, "mezo": mezo, "es at scale": at_scale, "reinforce": reinforce}


def tuned(task: Task, start: GPT2LMHeadModel, method: str, rate: float, seed: int, seconds: float) -> tuple[float, int]:
    """The reward on held-out prompts after so many processor seconds, and the updates made."""
    model = GPT2LMHeadModel(start.config).eval()
    model.load_state_dict(start.state_dict())
    begun, updates = time.process_time(), 0
    for _ in METHODS[method](task, model, rate, seed):
        updates += 1
        if time.process_time() - begun > seconds:
            break
    return task.judge(model), updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900, help="of training by gradient")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="characters of a text")
    parser.add_argument("--seconds", type=float, default=20.0, help="processor seconds of tuning, for each run")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of generations in which all members are equal
    torch.set_num_threads(1)
    task = Task(options.new)
    print(task.source)
    model = pretrained(task, options.steps, options.width)
    before = task.judge(model)
    print(f"reward on held-out prompts before: {before:.3f}", flush=True)
    for method in METHODS if options.compare else ["flipout"]:
        for rate in RATES[method] if options.compare else RATES[method][1:]:
            found = [tuned(task, model, method, rate, seed, options.seconds) for seed in range(options.seeds)]
            rewards, updates = ([each[i] for each in found] for i in (0, 1))
            print(json.dumps({"method": method, "rate": rate, "rewards": rewards, "updates": updates}), flush=True)
    print(f"flipout {flipout.__version__}")


if __name__ == "__main__":
    main()
