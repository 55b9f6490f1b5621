"""What does a direction for each example buy, and what memory do gradients from losses take?

python -m benchmarks.zeroth_order variance --steps 400      the variance of the update, after so many steps of training
python -m benchmarks.zeroth_order memory --how flipout      the peak of one process: inference, flipout, low-rank, backprop
"""

from __future__ import annotations

import argparse
import gc
import math
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import flipout
from flipout.data import tiny_shakespeare
from flipout.evolution import ZerothOrder

BATCH, WINDOW, STD = 64, 32, 1e-3
MIB = 2**20


def losses(model: Any, rows: Tensor) -> Tensor:
    """The loss of each row, nats a token."""
    logits = model(rows).logits[:, :-1]
    return F.cross_entropy(logits.mT, rows[:, 1:], reduction="none").mean(1)


def gpt2(vocabulary: int, width: int, layers: int) -> Any:
    """A GPT-2 with its initial weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=layers, n_head=4, bos_token_id=1, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def flat(model: Any) -> Tensor:
    """The gradient of all parameters."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def variance(steps: int, draws: int) -> str:
    """The second moment of the update about the gradient of 256 examples, fresh batches, with 95 % intervals.

    To leading order it is d/N (|G|² + tr Σ) for a direction an example and d (|G|² + tr Σ/N) for one a batch, with d weights, the
    mean gradient G and the covariance Σ of the gradients of examples: a ratio of (1 + B)/(N + B), B = tr Σ/|G|² (the gradient
    noise scale, McCandlish et al. 2018).
    """
    text, generator = tiny_shakespeare(download=False), torch.Generator().manual_seed(0)
    model = gpt2(len(text.vocabulary), 32, 2)

    def batch(count: int) -> Tensor:
        starts = torch.randint(len(text.train) - WINDOW, (count,), generator=generator)
        return torch.stack([text.train[i : i + WINDOW] for i in starts.tolist()])

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        losses(model, batch(BATCH)).mean().backward()
        optimiser.step()
    each, rows = [], batch(256)
    for row in rows:
        model.zero_grad()
        losses(model, row[None]).mean().backward()
        each.append(flat(model))
    table = torch.stack(each)
    mean, trace = table.mean(0), float(table.var(0).sum())
    scale = trace / (float(mean.square().sum()) - trace / len(table))
    found = {}
    for directions, count in (("example", draws), (1, 4 * draws)):
        zeroth, seen = ZerothOrder(model, STD, directions=directions, seed=3), []
        for _ in range(count):
            model.zero_grad()
            zeroth.backward(losses, batch(BATCH))
            seen.append(float((flat(model) - mean).square().sum()))
        values = torch.tensor(seen)
        found[directions] = float(values.mean()), float(values.std()) / math.sqrt(count)
    (a, of_a), (b, of_b) = found["example"], found[1]
    half = 1.96 * a / b * math.hypot(of_a / a, of_b / b)
    return (
        f"after {steps} steps, {float(losses(model, rows).mean().detach()):.2f} nats: B = {scale:.1f}, ratio {a / b:.3f} "
        f"[{a / b - half:.3f}, {a / b + half:.3f}], by the formula {(1 + scale) / (BATCH + scale):.3f}"
    )


def memory(how: str, width: int, layers: int, vocabulary: int, rows: int, tokens: int) -> str:
    """How far the resident set of this process climbs, with the model made and one step taken."""
    estimators = {"flipout": flipout.Flipout(), "low-rank": flipout.LowRank(1)}

    def step(model: Any, batch: Tensor) -> None:
        if how == "backprop":
            losses(model, batch).mean().backward()
        elif how == "inference":
            with torch.no_grad():
                losses(model, batch)
        else:
            ZerothOrder(model, estimator=estimators[how]).backward(losses, batch)

    step(gpt2(32, 16, 1), torch.randint(32, (2, 8)))  # what the first use of the code itself takes
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model = gpt2(vocabulary, width, layers)
    step(model, torch.randint(vocabulary, (rows, tokens)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return f"{how}, width {width}, {rows} x {tokens} tokens: peak {peak / MIB:.0f} MiB, weights {weights / MIB:.0f} MiB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["variance", "memory"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--how", choices=["inference", "flipout", "low-rank", "backprop"], default="flipout")
    parser.add_argument(
        "--shape", type=int, nargs=5, default=[512, 6, 8192, 16, 64], help="width, layers, vocabulary, rows, tokens"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(variance(given.steps, given.draws) if given.what == "variance" else memory(given.how, *given.shape))
