"""Rewards on text: prompts and strings instead of tensors, for any causal language model of Hugging Face's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.errors import ArgumentError
from flipout.evolution.counters import Counters
from flipout.evolution.decoding import Sampler, Sampling, uniforms
from flipout.evolution.members import Members
from flipout.evolution.rewards import Reward, Rewarder

__all__ = ["TextRewards"]

#: Prompts: texts, or mappings with a text under ``"prompt"``; or a function from the generation to them.
Prompts = Sequence[Any] | Callable[[int], Sequence[Any]]
#: Added to a generation for the dice of plain models, whose texts are no member's.
_PLAIN = 2**62


@dataclass(frozen=True)
class _Who:
    """Whose dice are thrown: directions ``start`` to ``stop - 1`` of a generation, each for ``each`` members."""

    generation: int
    start: int
    stop: int
    each: int

    @property
    def members(self) -> int:
        return (self.stop - self.start) * self.each


class TextRewards:
    """An ``evaluate`` for :meth:`flipout.evolution.EvolutionStrategy.step`: the mean reward of what a member writes to prompts.

    The rows of one ``model.generate`` are members x prompts; prompts of unequal length are padded on the left and masked. A row
    ends at the end-of-sequence token. Sampled decoding takes its dice from (seed, generation, antithetic pair, prompt, step), so
    that a fitness can be had again, in any chunks and by any single member; both members of a pair have the same dice.

    All members write to the same prompts, so a prompt's difficulty cancels out of ranks and z-scores of the fitness. Where prompts
    differ in how far their rewards spread, ``EvolutionStrategy(fitness_shaping=rewards.zscore)`` compares members prompt by prompt.

    Args:
        tokenizer: of Hugging Face's form.
        reward: ``reward(prompts, texts) -> n numbers``, any Python function; a prompt is the item that was given, a text what was
            written to it, without special tokens.
        prompts: texts, or mappings with a text under ``"prompt"`` and whatever else the reward wants (an answer); or a function
            from the generation to them.
        max_new_tokens: at most so many a text.
        temperature, top_k, top_p: of sampled decoding; a temperature of 0 takes the likeliest token.
        prompts_at_once: in one ``generate``, for memory; None for all. The rows are as many times the members of a chunk.
        processes: for the reward; 0 for this process. Others are started afresh, so the reward is a function of a module.
        seed: of the dice.
        pad_token_id, eos_token_id: None for the tokenizer's.
        options: for ``generate``, such as ``cache_implementation="static"``.

    Raises:
        ArgumentError: for arguments that mean nothing, a tokenizer without a padding token.

    Example:
        >>> import flipout
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tokenizer = flipout.evolution.character_tokenizer("abc ")
        >>> config = GPT2Config(
        ...     vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
        ... )
        >>> model = GPT2LMHeadModel(config).eval()
        >>> def reward(prompts, texts):
        ...     return [text.count("a") for text in texts]
        >>> rewards = flipout.evolution.TextRewards(tokenizer, reward, ["ab", "a cab"], max_new_tokens=4)
        >>> es = flipout.evolution.EvolutionStrategy(model, std=0.3, population=8)
        >>> es.step(rewards).shape, rewards.table.shape
        (torch.Size([8]), torch.Size([8, 2]))
    """

    def __init__(
        self,
        tokenizer: Any,
        reward: Reward,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        prompts_at_once: int | None = None,
        processes: int = 0,
        seed: int = 0,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        **options: Any,
    ) -> None:
        self.max_new_tokens = require_count("max_new_tokens", max_new_tokens, 1)
        self.prompts_at_once = None if prompts_at_once is None else require_count("prompts_at_once", prompts_at_once, 1)
        self._sampling = Sampling(temperature, top_k, top_p)
        self._counters = Counters(require_count("seed", seed, 0))
        self._tokenizer, self._prompts, self._rewarder = tokenizer, prompts, Rewarder(reward, processes)
        taken = {"do_sample", "num_beams", "num_return_sequences", "logits_processor", "max_length"} & set(options)
        if taken:
            raise ArgumentError(
                f"{sorted(taken)[0]}= is set by TextRewards itself: one text a row, greedy or, with temperature=, sampled by the "
                "row's own dice"
            )
        pad = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
        if pad is None:
            raise ArgumentError(
                "the tokenizer has no padding token, which prompts of unequal length and texts that end early need: pass "
                "pad_token_id=tokenizer.eos_token_id (padding is masked), or set tokenizer.pad_token"
            )
        self._pad, eos = int(pad), tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        self._eos = None if eos is None else int(eos)
        self._options = options
        self._generation: int | None = None
        self._collected: dict[int, Tensor] = {}
        self.tokens = 0

    def __call__(self, model: Any, members: Members) -> Tensor:
        """The mean reward of each member, float64 ``[members.count]``."""
        self.begin(members.generation)
        each = 1 + members.paired
        first = members.start // each
        who = _Who(members.generation, first, first + members.count // each, each)
        table = self._table(model, self.prompts(members.generation), who)
        self._collected[members.start] = table
        return table.mean(1)

    def prompts(self, generation: int) -> list[Any]:
        """The prompts of a generation.

        Raises:
            ArgumentError: if they are no texts, nor mappings with a ``"prompt"``, or there are none.
        """
        found = self._prompts(generation) if callable(self._prompts) else self._prompts
        if isinstance(found, str) or not isinstance(found, Sequence) or not found:
            raise ArgumentError(f"prompts={found!r}: expected a list of texts, one at least, or a function that returns one")
        for i, prompt in enumerate(found):
            if not isinstance(_text(prompt), str):
                raise ArgumentError(f'prompt {i} is {prompt!r}: expected a text, or a mapping with a text under "prompt"')
        return list(found)

    def rewards(self, model: Any, prompts: Sequence[Any] | None = None, generation: int = 0) -> Tensor:
        """The reward of each prompt under the weights that the model has, without members: float64 ``[k]``.

        Args:
            model: a plain one.
            prompts: None for those of the generation.
            generation: names the dice.
        """
        prompts = self.prompts(generation) if prompts is None else list(prompts)
        return self._table(model, prompts, _Who(_PLAIN + generation, 0, 1, 1))[0]

    def write(self, model: Any, prompts: Sequence[Any], generation: int = 0) -> list[str]:
        """What the model writes to each prompt."""
        return self._written(model, list(prompts), _Who(_PLAIN + generation, 0, 1, 1))

    @property
    def table(self) -> Tensor:
        """The rewards of the last generation, float64 ``[members, prompts]``: of those that were evaluated, in their order."""
        if not self._collected:
            raise ArgumentError("no member has been evaluated yet")
        return torch.cat([self._collected[start] for start in sorted(self._collected)])

    def zscore(self, fitness: Tensor) -> Tensor:
        """A shaping of fitness: the mean over prompts of each member's z-score among all members on that prompt, ``[n]``.

        A prompt on which all members have one reward counts nothing.

        Raises:
            ArgumentError: if the fitness is not that of the members that were evaluated last.
        """
        table = self.table.to(fitness.device)
        if len(table) != len(fitness) or not torch.allclose(table.mean(1), fitness.double()):
            raise ArgumentError(
                f"zscore() is of {len(fitness)} members, and the rewards at hand are of {len(table)} others: it shapes the fitness "
                "that this very object returned in the same generation"
            )
        centered = table - table.mean(0)
        spread = centered.square().mean(0).sqrt()
        return torch.where(spread > 0, centered / spread.clamp_min(1e-300), 0.0).mean(1)

    def close(self) -> None:
        """Ends the processes of the reward."""
        self._rewarder.close()

    # --- as workers and resumed runs want it (see RayWorkers) ---------------------------------------------------------------

    def begin(self, generation: int) -> None:
        """Forgets the rewards of an earlier generation."""
        if generation != self._generation:
            self._generation, self._collected = generation, {}

    def collect(self) -> dict[str, Any]:
        """Takes out what was evaluated since the last time, for another process to :meth:`merge`."""
        found, self._collected = {start: table.numpy() for start, table in self._collected.items()}, {}
        tokens, self.tokens = self.tokens, 0
        return {"tables": found, "tokens": tokens}

    def merge(self, collected: dict[str, Any]) -> None:
        """Takes what another process has evaluated."""
        self._collected.update({start: torch.from_numpy(table.copy()) for start, table in collected["tables"].items()})
        self.tokens += collected["tokens"]

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _table(self, model: Any, prompts: list[Any], who: _Who) -> Tensor:
        """The rewards ``[members, prompts]``."""
        texts = self._written(model, prompts, who)
        return self._rewarder(prompts * who.members, texts).view(who.members, len(prompts))

    @torch.no_grad()
    def _written(self, model: Any, prompts: list[Any], who: _Who) -> list[str]:
        """What each member writes to each prompt, member-major."""
        require_generator(model)
        ids = self._encoded(model, prompts)
        size, parts = self.prompts_at_once or len(ids), []
        for first in range(0, len(ids), size):
            parts.append(self._generated(model, ids[first : first + size], first, who))
        return [text for n in range(who.members) for part in parts for text in part[n]]

    def _encoded(self, model: Any, prompts: list[Any]) -> list[list[int]]:
        ids = [list(map(int, row)) for row in self._tokenizer([_text(prompt) for prompt in prompts])["input_ids"]]
        most = getattr(model.config, "max_position_embeddings", None)
        for i, row in enumerate(ids):
            if not row:
                raise ArgumentError(f"prompt {i}, {prompts[i]!r}, has no tokens; begin it with one, such as tokenizer.bos_token")
            if most is not None and len(row) + self.max_new_tokens > most:
                raise ArgumentError(
                    f"prompt {i} has {len(row)} tokens, and with max_new_tokens={self.max_new_tokens} that is more than the {most} "
                    "positions of the model: shorten the prompt, or lower max_new_tokens"
                )
            if max(row) >= (known := model.get_input_embeddings().weight.shape[0]):
                raise ArgumentError(
                    f"prompt {i} has the token {max(row)}, and the model knows 0 to {known - 1}: the tokenizer is of another model"
                )
        return ids

    def _generated(self, model: Any, ids: list[list[int]], first: int, who: _Who) -> list[list[str]]:
        """What each member writes to some of the prompts, ``[members][prompts]``."""
        length = max(map(len, ids))
        rows = torch.tensor([[self._pad] * (length - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        options: dict[str, Any] = {} if self._eos is None else {"eos_token_id": self._eos}
        if not self._sampling.greedy:
            steps = self.max_new_tokens
            dice = [uniforms(self._counters, who.generation, who.start, who.stop, first + j, steps) for j in range(len(ids))]
            rowwise = torch.stack(dice, 1).repeat_interleave(who.each, 0).flatten(0, 1)
            options["logits_processor"] = [Sampler(self._sampling, rowwise, length)]
        written = model.generate(
            rows.repeat(who.members, 1).to(model.device),
            attention_mask=mask.repeat(who.members, 1).to(model.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self._pad,
            **options,
            **self._options,
        )[:, length:].tolist()
        texts = self._tokenizer.batch_decode([self._until_end(row) for row in written], skip_special_tokens=True)
        return [texts[n * len(ids) : (n + 1) * len(ids)] for n in range(who.members)]

    def _until_end(self, row: list[int]) -> list[int]:
        length = row.index(self._eos) if self._eos in row else len(row)
        self.tokens += min(length + 1, len(row))
        return row[:length]


def require_generator(model: Any) -> None:
    """Raises ArgumentError where a model does not write texts as they are written here."""
    name = type(model).__name__
    if not callable(getattr(model, "generate", None)) or not getattr(model, "can_generate", lambda: True)():
        raise ArgumentError(f"{name} cannot write: it has no language model's head. Load it with AutoModelForCausalLM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ArgumentError(
            f"{name} is an encoder and a decoder, and what it writes does not go on from its prompt; TextRewards takes causal "
            "language models. For others, write evaluate(model, members) with model.generate"
        )
    if any(part.training for part in model.modules()):
        raise ArgumentError(f"{name} is in training mode, where dropout acts on what it writes: call model.eval()")


def _text(prompt: Any) -> Any:
    return prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
