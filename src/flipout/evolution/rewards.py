"""Rewards that any Python function gives to texts: called safely, checked, in a pool of processes where that is asked for."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.errors import ArgumentError, EvaluationError

__all__ = ["Reward", "Rewarder"]

#: ``reward(prompts, texts) -> n numbers``: a prompt is what was given as such, a text what was written to it; larger is better.
Reward = Callable[[list[Any], list[str]], Any]


class Rewarder:
    """Calls a reward on texts, in this process or in a pool of others, and checks what it returns.

    Args:
        reward: of prompts and texts.
        processes: 0 for this process. Others are started afresh (``spawn``), so the reward is a function of a module.

    Raises:
        ArgumentError: if the reward cannot be called, or not be sent to other processes.
    """

    def __init__(self, reward: Reward, processes: int = 0) -> None:
        if not callable(reward):
            raise ArgumentError(f"reward={reward!r} is a {type(reward).__name__}; expected reward(prompts, texts) -> n numbers")
        self.reward, self.processes = reward, require_count("processes", processes, 0)
        if processes:
            try:
                pickle.dumps(reward)
            except Exception as error:
                raise ArgumentError(
                    f"reward={reward!r} cannot be sent to other processes ({error}): define it at the top level of a module, or "
                    "pass processes=0"
                ) from error
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, prompts: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """The rewards, float64 ``[n]``.

        Raises:
            EvaluationError: if the reward raises, or the processes die.
            ArgumentError: if it returns anything but n finite numbers.
        """
        if not self.processes or len(texts) < 2:
            return self._checked(self._called(list(prompts), list(texts)), prompts, texts)
        parts = min(self.processes, len(texts))
        bounds = [len(texts) * i // parts for i in range(parts + 1)]
        spans = list(itertools.pairwise(bounds))
        try:
            futures = [self._processes().submit(self.reward, list(prompts[a:b]), list(texts[a:b])) for a, b in spans]
            found = [future.result() for future in futures]
        except BrokenProcessPool as error:
            self.close()
            raise EvaluationError(
                "a process that computes rewards has died; others are started at the next call. Try processes=0, to see why"
            ) from error
        except Exception as error:
            raise self._told(error, texts) from error
        return torch.cat([self._checked(f, prompts[a:b], texts[a:b]) for f, (a, b) in zip(found, spans, strict=True)])

    def close(self) -> None:
        """Ends the processes; others are started where rewards are asked for again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"))
        return self._pool

    def _called(self, prompts: list[Any], texts: list[str]) -> Any:
        try:
            return self.reward(prompts, texts)
        except Exception as error:
            raise self._told(error, texts) from error

    def _told(self, error: Exception, texts: Sequence[str]) -> EvaluationError:
        return EvaluationError(
            f"{self._name} raised {type(error).__name__} on {len(texts)} texts, the first of them {_short(texts[0])}: {error}"
        )

    def _checked(self, found: Any, prompts: Sequence[Any], texts: Sequence[str]) -> Tensor:
        count = len(texts)
        try:
            if isinstance(found, str):
                raise TypeError("a text")
            rewards = torch.as_tensor(found, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"{self._name} returned a {type(found).__name__}, not a number for each of {count} texts ({error})"
            ) from error
        if rewards.shape != (count,):
            raise ArgumentError(
                f"{self._name} returned {tuple(rewards.shape)} numbers for {count} texts; expected one for each, in their order"
            )
        bad = (~rewards.isfinite()).nonzero().flatten()
        if len(bad):
            i = int(bad[0])
            raise ArgumentError(
                f"{self._name} returned {float(rewards[i])} for {len(bad)} of {count} texts, the first of them "
                f"{_short(texts[i])} to the prompt {_short(prompts[i])}; return a low number where a text is worth nothing"
            )
        return rewards

    @property
    def _name(self) -> str:
        return f"the reward {getattr(self.reward, '__name__', type(self.reward).__name__)}"


def _short(text: Any, most: int = 60) -> str:
    told = repr(text)
    return told if len(told) <= most else f"{told[: most - 3]}..."
