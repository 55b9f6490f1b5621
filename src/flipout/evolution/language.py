"""Language models by evolution: what each member writes to each prompt, in one batched ``generate`` for the whole population."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flipout.errors import ArgumentError
from flipout.evolution.members import Members

__all__ = ["TokenReward"]

#: ``reward(prompts [n, L], written [n, T]) -> [n]``: larger is better; it need not be differentiable, nor written in torch.
Reward = Callable[[Tensor, Tensor], Any]


class TokenReward:
    """An ``evaluate`` for :meth:`flipout.evolution.EvolutionStrategy.step`: the mean reward of what a member writes to the prompts.

    The rows of one ``model.generate`` are members x prompts. Decoding is greedy, so that a member's fitness is a function of its
    weights; between tokens the draw is held, as it is for the whole generation.

    Args:
        reward: per prompt.
        prompts: token ids ``[k, L]``, all of one length; or a function from the generation to them, for a fresh batch each time.
        max_new_tokens: T.
        options: for ``generate``.

    Raises:
        ArgumentError: if prompts are no matrix of token ids.

    Example:
        >>> import flipout
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=9, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
        >>> def reward(prompts, written):  # large numbers are good
        ...     return written.float().mean(1)
        >>> es = flipout.evolution.EvolutionStrategy(GPT2LMHeadModel(config).eval(), std=0.3, population=8)
        >>> es.step(TokenReward(reward, torch.tensor([[1, 2], [4, 5]]), max_new_tokens=4)).shape
        torch.Size([8])
    """

    def __init__(self, reward: Reward, prompts: Tensor | Callable[[int], Tensor], max_new_tokens: int, **options: Any) -> None:
        self._reward, self._prompts = reward, prompts
        self._options = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, **options, "max_new_tokens": max_new_tokens}

    def prompts(self, generation: int) -> Tensor:
        """The prompts of a generation, ``[k, L]``."""
        found = self._prompts(generation) if callable(self._prompts) else self._prompts
        if not isinstance(found, Tensor) or found.dim() != 2 or found.is_floating_point():
            told = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentError(f"prompts are {told}; expected token ids [k, L], padded to one length")
        return found

    def __call__(self, model: Any, members: Members) -> Tensor:
        """The mean reward of each member, ``[members.count]``."""
        rows = members.repeat(self.prompts(members.generation))
        return members.mean(self.rewards(model, rows))

    @torch.no_grad()
    def rewards(self, model: Any, prompts: Tensor) -> Tensor:
        """The reward of each row of ``prompts`` under whatever weights the model has, ``[n]``."""
        prompts = prompts.to(model.device)
        written = model.generate(prompts, attention_mask=torch.ones_like(prompts), **self._options)[:, prompts.shape[1] :]
        missing = self._options["max_new_tokens"] - written.shape[1]  # where all rows ended early
        written = torch.nn.functional.pad(written, (0, missing), value=self._options["pad_token_id"])
        return torch.as_tensor(self._reward(prompts, written)).to(torch.float32)
