"""Sampled decoding whose dice belong to a row: the same text again for the same member, prompt and seed, in whatever batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipout.arguments import is_count
from flipout.errors import ArgumentError
from flipout.evolution.counters import Counters, Place

__all__ = ["Sampler", "Sampling", "uniforms"]

#: The base word of the counters that decode: no base perturbation has it, and no seeds of members.
_DECODING = 2**63 + 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: choose among so many likeliest tokens; None for all.
        top_p: choose among the fewest likeliest tokens that have this probability together; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not 0 <= self.temperature < float("inf"):
            raise ArgumentError(f"temperature={self.temperature!r}: 0 for the likeliest token, or a positive number")
        if self.top_k is not None and not is_count(self.top_k):
            raise ArgumentError(f"top_k={self.top_k!r}: expected a number of tokens of at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p={self.top_p!r}: expected a probability above 0, at most 1, or None")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def choose(self, scores: Tensor, dice: Tensor) -> Tensor:
        """The next token of each row by inversion: the first whose cumulative probability is above its die.

        Args:
            scores: logits ``[rows, vocabulary]``.
            dice: uniform in [0, 1), ``[rows]``.

        Returns:
            int64 ``[rows]``.

        Example:
            >>> scores = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -99.0]])
            >>> Sampling(temperature=1.0).choose(scores, torch.tensor([0.1, 0.9, 0.9])).tolist()
            [0, 1, 0]
        """
        scores = scores.double() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        law = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = law.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            law = law.masked_fill(torch.zeros_like(law, dtype=torch.bool).scatter(1, index, before >= self.top_p), 0)
        below = law.cumsum(-1)
        wanted = dice.to(below).unsqueeze(1) * below[:, -1:]
        return torch.searchsorted(below, wanted, right=True).squeeze(1).clamp_max(scores.shape[1] - 1)


class Sampler:
    """Leaves one token possible in each row, for ``generate(do_sample=False, logits_processor=[...])``.

    Args:
        sampling: how it is chosen.
        dice: uniform in [0, 1), ``[rows, steps]``: a row's numbers, one a step.
        length: of the prompts, so that the step is known.
    """

    def __init__(self, sampling: Sampling, dice: Tensor, length: int) -> None:
        self._sampling, self._dice, self._length = sampling, dice, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._sampling.choose(scores, self._dice[:, input_ids.shape[1] - self._length].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.unsqueeze(1), 0.0)


def uniforms(counters: Counters, generation: int, start: int, stop: int, prompt: int, steps: int) -> Tensor:
    """Uniform numbers in [0, 1) of directions ``start`` to ``stop - 1`` on one prompt: float64 ``[stop - start, steps]``."""
    words = counters.words(Place(generation, _DECODING, prompt), start, stop, steps)
    return torch.from_numpy((words >> 11).astype("float64") / 2**53)
