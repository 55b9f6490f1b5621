"""How well a language model predicts a split: bits per character, perplexity, and text drawn from it.

With n tokens x_1 ... x_n in a split, every one but the first is predicted once, from those before it:

    nats = -1/(n-1) Σ_{t=2..n} log p(x_t | x_1 ... x_{t-1}),    BPC = nats / log 2,    perplexity = exp(nats)

The state is carried through the whole split. It may be cut into ``rows`` streams that run side by side; each but the first then
begins without what came before it, and nothing else changes: no token is left out or counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.errors import ArgumentError
from flipout.regularize import Regularized
from flipout.streams import stream

__all__ = ["bits", "draw_text", "evaluate", "evaluate_samples", "perplexity", "token_log_probabilities"]

_IGNORED = -100


def bits(nats: float) -> float:
    """Bits of so many nats: bits per character, of a mean over characters.

    Example:
        >>> bits(math.log(2.0))
        1.0
    """
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """The number of equally likely words that would be as hard to predict; infinite where it is beyond all numbers.

    Example:
        >>> round(perplexity(math.log(80.0)), 9)
        80.0
    """
    return math.exp(nats) if nats < 700 else math.inf


def evaluate(net: Regularized, tokens: Tensor, rows: int = 1, window: int = 100) -> float:
    """Mean loss of the mean weights over a split, in nats a token.

    Args:
        net: the model; its mode is put back.
        tokens: ``[n]``, on the device of the model.
        rows: streams that run side by side.
        window: tokens of a stream in one call, which the result does not depend on.

    Raises:
        ArgumentError: if the split has fewer than two tokens, or tokens that the model does not know.

    Example:
        >>> from flipout_experiments.nets.networks import CharLSTM
        >>> from flipout.regularize import CHAR
        >>> net = Regularized(CharLSTM(stream(0), vocabulary=4, units=3), CHAR["none"])
        >>> round(evaluate(net, torch.tensor([0, 1, 2, 3] * 5)), 1)  # untrained: near log 4
        1.5
    """
    with _mode(net, train=False):
        return -float(token_log_probabilities(net, tokens, rows, window).double().mean())


def evaluate_samples(net: Regularized, tokens: Tensor, samples: int, rows: int = 1, window: int = 100, seed: int = 0) -> float:
    """Mean loss over a split of the average prediction of ``samples`` nets with weights drawn from their noise, in nats a token:

        -1/(n-1) Σ_t log( 1/S Σ_s p(x_t | x_1 ... x_{t-1}, W_s) )

    Each stream has one set of weights a sample, held over the whole split. Masks of activations, if the method has any, are off.

    Args:
        net, tokens, rows, window: as in :func:`evaluate`.
        samples: S, at least 1.
        seed: of the draws.

    Raises:
        ArgumentError: as :func:`evaluate`, and for a method without random weights.
    """
    if net.method.noise is None:
        raise ArgumentError(f"{net.method} has no random weights, so there are no samples to average over; use evaluate()")
    if samples < 1:
        raise ArgumentError(f"samples={samples}: expected 1 or more")
    total: Tensor | None = None
    with _mode(net, train=False):
        for s in range(samples):
            with net.drawing(rows, stream(seed, s, device=tokens.device)):
                found = token_log_probabilities(net, tokens, rows, window).double()
            total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return math.log(samples) - float(total.mean())


@torch.no_grad()
def token_log_probabilities(net: Any, tokens: Tensor, rows: int = 1, window: int = 100) -> Tensor:
    """log p of each token but the first given those before it in its stream, ``[n - 1]``, in the model's present mode."""
    predicted = len(tokens) - 1
    if predicted < 1:
        raise ArgumentError(f"the split has {len(tokens)} tokens, of which none can be predicted from another; give it two or more")
    _require_known(net, tokens)
    length = -(-predicted // rows)
    missing = rows * length - predicted
    inputs = F.pad(tokens[:-1], (0, missing)).view(rows, length)
    targets = F.pad(tokens[1:], (0, missing), value=_IGNORED).view(rows, length)
    module: Any = net.module
    state = module.initial_state(rows)
    found = []
    for at in range(0, length, window):
        logits, state = net(inputs[:, at : at + window], state)
        wanted = targets[:, at : at + window]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=_IGNORED)
        found.append(-loss.view(wanted.shape))
    return torch.cat(found, 1).flatten()[:predicted]


def draw_text(
    net: Regularized, prompt: Tensor, count: int, generator: torch.Generator, temperature: float = 1.0, never: Tensor | None = None
) -> Tensor:
    """Tokens drawn one after another from the mean weights' predictions.

    Args:
        net: the model.
        prompt: ``[k]`` tokens to begin after, at least one.
        count: tokens to draw.
        generator: source of the draws, on the device of the model.
        temperature: below 1 likely tokens come more often than the model has them; 0 always takes the likeliest.
        never: tokens that are not to be drawn.

    Returns:
        ``[count]`` tokens.

    Raises:
        ArgumentError: for an empty or unknown prompt, or a temperature below 0.
    """
    if not len(prompt) or temperature < 0 or count < 0:
        raise ArgumentError(
            f"a prompt of {len(prompt)} tokens, temperature {temperature}, count {count}: expected at least one token and no "
            "negative number"
        )
    _require_known(net, prompt)
    drawn: list[Tensor] = []
    with _mode(net, train=False), torch.no_grad():
        module: Any = net.module
        state = module.initial_state(1)
        read = prompt.view(1, -1)
        for _ in range(count):
            logits, state = net(read, state)
            last = logits[0, -1].double()
            if never is not None:
                last[never] = -math.inf
            if temperature == 0:
                token = last.argmax().view(1)
            else:
                token = torch.multinomial(torch.softmax(last / temperature, 0), 1, generator=generator)
            drawn.append(token)
            read = token.view(1, 1)
    return torch.cat(drawn) if drawn else prompt.new_empty(0)


def _require_known(net: Any, tokens: Tensor) -> None:
    least, most, known = int(tokens.min()), int(tokens.max()), net.module.vocabulary
    if least < 0 or most >= known:
        raise ArgumentError(
            f"the text has a token numbered {most if most >= known else least}, and the model knows 0 to {known - 1}: encode it "
            "with the vocabulary that the model was trained with, where unknown tokens become <unk>"
        )


@contextmanager
def _mode(net: Regularized, train: bool) -> Iterator[None]:
    before = net.training
    try:
        net.train(train)
        yield
    finally:
        net.train(before)
