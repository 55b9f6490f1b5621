"""The members that an evaluation sees: a draw of part of a generation, and what helps to evaluate it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flipout.draw import Draw
from flipout.errors import BatchError, DrawError
from flipout.evolution.counters import Place
from flipout.evolution.noise import Directions
from flipout.evolution.statistics import BatchGuard
from flipout.perturb import Perturbed
from flipout.samples import Sample

__all__ = ["Members"]

#: The base word of the counters that seed environments and the like: no base perturbation has it.
_SEEDS = 2**63


class Members(Draw):
    """Members ``start`` to ``start + count - 1`` of a generation, while the module is perturbed by them.

    All that a :class:`flipout.Draw` offers, ``weights(n)`` and ``module(n)`` among it, counts members from ``start``.

    Attributes:
        generation: which.
        start: the first member's index in the population.
        count: how many there are.
        paired: whether members 2p and 2p + 1 are an antithetic pair.
        seeds: int64 ``[count]`` on the CPU, below 2³¹; equal for the two members of an antithetic pair, so that what an evaluation
            draws from them (an episode's start, a unit's noise) does not tell one from the other.

    Example:
        >>> import flipout
        >>> es = flipout.evolution.EvolutionStrategy(torch.nn.Linear(3, 1), population=8)
        >>> with es.ask() as members:
        ...     members.start, members.count, members.expand(torch.ones(3)).shape
        (0, 8, torch.Size([8, 3]))
    """

    #: What refuses batch statistics while the module is perturbed by these members.
    guard: BatchGuard | None = None

    def __init__(self, net: Perturbed, directions: Directions, samples: Sequence[Sample]) -> None:
        each = 1 + directions.paired
        self.paired = directions.paired
        self.generation = directions.generation
        self.start = each * directions.start
        self.count = each * (directions.stop - directions.start)
        self._directions = directions
        super().__init__(net.module, net.sites, {}, net.estimator, self.count, None, net.fallback, samples)
        self.selection = net._selection

    def module(self, n: int) -> nn.Module:
        with contextlib.nullcontext() if self.guard is None else self.guard.lifted():
            return super().module(n)

    module.__doc__ = Draw.module.__doc__

    @property
    def seeds(self) -> Tensor:
        """A number for each member, int64 ``[count]``; one for both members of an antithetic pair."""
        d = self._directions
        words = d.counters.words(Place(d.generation, _SEEDS, 0), d.start, d.stop, 1)
        seeds = torch.from_numpy((words[:, 0] >> 33).astype("int64"))
        return seeds.repeat_interleave(1 + d.paired)

    def expand(self, batch: Tensor) -> Tensor:
        """One batch for every member, without a copy of it: ``[k, ...]`` to ``[count, k, ...]``.

        For modules that act on the last axis (linear maps, norms, activations). The first linear map computes W̄ x once for all
        members. Others want row blocks: :meth:`repeat`.

        Example:
            >>> import torch, flipout
            >>> module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
            >>> es = flipout.evolution.EvolutionStrategy(module, population=8)
            >>> with es.ask() as members:
            ...     y = module(members.expand(torch.randn(7, 5)))
            >>> y.shape
            torch.Size([8, 7, 2])
        """
        return batch.unsqueeze(0).expand(self.count, *batch.shape)

    def repeat(self, batch: Tensor) -> Tensor:
        """One batch for every member in member-major row blocks: ``[k, ...]`` to ``[count * k, ...]``, a copy where k > 1."""
        return self.expand(batch).flatten(0, 1)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of what each member's rows got: ``[count, k]`` or ``[count * k]`` to ``[count]``.

        Raises:
            BatchError: if the values do not divide into the members.
        """
        values = values if values.is_floating_point() else values.double()  # right or wrong, counts
        if values.shape[:1] == (self.count,):
            return values if values.dim() == 1 else values.flatten(1).mean(1)
        if values.dim() != 1 or not values.numel() or values.numel() % self.count:
            raise BatchError(
                f"values of shape {tuple(values.shape)} do not divide into {self.count} members; give {self.count} rows, or one "
                f"value for each of k·{self.count} rows in member-major blocks"
            )
        return values.view(self.count, -1).mean(1)

    def resample(self, members: Sequence[int]) -> None:
        """Refused: a member of a generation is what its counters say.

        Raises:
            DrawError: always.
        """
        raise DrawError("members of a generation are fixed by their counters and cannot be resampled; see flipout.Perturbed.hold")
