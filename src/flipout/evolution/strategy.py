"""Evolution strategies on a module: perturb, evaluate a population in batched passes, follow the better half."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flipout.arguments import require_count
from flipout.buffers import kept_buffers
from flipout.errors import ArgumentError, DrawError, MemberError
from flipout.estimators import Estimator, Flipout
from flipout.evolution.counters import Counters
from flipout.evolution.fitness import require_fitness, require_kept, shaped, with_finite_fitness
from flipout.evolution.members import Members
from flipout.evolution.population import Population, perturbed_net, require_members
from flipout.evolution.shaping import Shaping, find_shaping
from flipout.evolution.statistics import BatchGuard
from flipout.in_place import in_place
from flipout.sharded import sharded_as

__all__ = ["Evaluate", "EvolutionStrategy", "Std"]

#: ``evaluate(module, members) -> fitness [members.count]``; larger is better.
Evaluate = Callable[[Any, Members], Any]
#: A standard deviation, or one for each generation.
Std = float | Callable[[int], float]


class EvolutionStrategy:
    """An evolution strategy whose population runs through the module as one batch.

        W_n = W̄ + ΔW_n,      ∇W̄ ≈ 1/(N σ²) Σ_n F_n ΔW_n            Wen et al. 2018, Eq. 1 and 5

    with F the shaped fitness. Under flipout ΔW_n = ΔW ∘ (r_n s_nᵀ): the update is one product a parameter, and nothing is ever in
    memory per member but its signs. :meth:`tell` writes minus that gradient into ``.grad``, so that any ``torch.optim`` optimiser
    ascends the fitness. All noise is a function of (seed, generation, base, parameter, member): the same in any chunks, on any
    machine, and for any single member (:meth:`member`).

    The base perturbation is a Rademacher one, ``|ΔW| = σ``, by default: all members share it, and the update is unbiased over it.
    One *Gaussian* base weighs entries by its own squares, and turns the update away from the gradient: its cosine to it stays
    below 1/√3 however large the population. ``members_per_base`` draws several; the paper has 40 members to a base.

    Args:
        module: any module that the library perturbs. Its trained parameters are perturbed, biases and norms included; those that do
            not require a gradient are left alone.
        std: σ, in units of the weights; or a function from the generation to it.
        population: N, even with antithetic pairs.
        estimator: :class:`flipout.Flipout`, :class:`flipout.LowRank`, or :class:`flipout.Independent` (every member dense).
        base: ``"rademacher"`` or ``"gaussian"``, the law of the base perturbation (of each member's own under the other
            estimators).
        members_per_base: members that share a base perturbation; None for all.
        antithetic: members 2p and 2p + 1 are W̄ + ΔW_p and W̄ - ΔW_p.
        fitness_shaping: ``"centered_rank"``, ``"zscore"``, ``"sign"``, or a function from the whole population's fitness ``[N]`` to
            weights ``[N]``.
        seed: of all noise.
        chunk: members evaluated at once; None for at most 4,096. Changes nothing but speed and memory.
        on_nan: ``"error"`` refuses fitness that is not finite; ``"worst"`` makes it the worst of the generation.
        include, exclude, batch_dim, fallback: as in :class:`flipout.Perturbed`.

    Raises:
        ArgumentError: for a std that is not positive, an odd population with pairs, a population below 2, an unknown name.
        UnsupportedNoiseError: for an estimator that has no members.

    Example:
        >>> import torch, flipout
        >>> module = torch.nn.Linear(3, 1)
        >>> es = flipout.evolution.EvolutionStrategy(module, std=0.1, population=64, seed=0)
        >>> optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
        >>> x, y = torch.randn(20, 3), torch.ones(20, 1)
        >>> def evaluate(module, members):
        ...     return members.mean(-(module(members.expand(x)) - y).square())
        >>> for _ in range(50):
        ...     fitness = es.step(evaluate)
        ...     optimiser.step()
        >>> float(-fitness.mean()) < 0.1, es.generation
        (True, 50)
    """

    def __init__(
        self,
        module: nn.Module,
        std: Std = 0.02,
        population: int = 4096,
        *,
        estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
        base: str = "rademacher",
        members_per_base: int | None = None,
        antithetic: bool = True,
        fitness_shaping: str | Shaping = "centered_rank",
        seed: int = 0,
        chunk: int | None = None,
        on_nan: str = "error",
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        batch_dim: int = 0,
        fallback: str | None = None,
    ) -> None:
        self._net = perturbed_net(module, base, estimator, include, exclude, batch_dim, fallback)
        if on_nan not in ("error", "worst"):
            raise ArgumentError(f'on_nan={on_nan!r}: choose "error" or "worst"')
        each = 2 if antithetic else 1
        self.population = require_members("population", population, 2, each)
        self.members_per_base = None if members_per_base is None else require_members("members_per_base", members_per_base, 1, each)
        self.antithetic, self.base, self.on_nan = antithetic, base, on_nan
        self.seed = require_count("seed", seed, 0)
        self.generation = 0
        self._schedule = std
        self._std_at(0)
        self._shaping = find_shaping(fitness_shaping)
        per_base = self.population if members_per_base is None else members_per_base
        self._population = Population(self._net, base, self.population, per_base, antithetic, Counters(seed))
        self.chunk = self._population.at_once() if chunk is None else require_members("chunk", chunk, 1, each)
        self._asked = False
        self._open = False

    @property
    def module(self) -> nn.Module:
        """The module, whose parameters are the means."""
        return self._net.module

    @property
    def estimator(self) -> Estimator:
        """How members share a draw."""
        return self._net.estimator

    @property
    def std(self) -> float:
        """σ of this generation."""
        return self._std_at(self.generation)

    @contextmanager
    def ask(self, start: int = 0, stop: int | None = None) -> Iterator[Members]:
        """Perturbs the module by members ``start`` to ``stop - 1`` of this generation, in place, without gradients.

        Inside, the module takes ``members.count`` rows, or k times as many in member-major blocks. Each range must lie under one
        base perturbation, and begin and end between antithetic pairs. Whatever is asked, :meth:`tell` wants the whole population.
        Every buffer of the module is afterwards as it was before.

        Yields:
            The :class:`Members`.

        Raises:
            ArgumentError: for a range that is none, cuts a pair, or spans several bases.
            DrawError: inside another ``ask``.
            BatchError: inside, where a batch norm would normalise several members by their common statistics: it is in training
                mode, or keeps no running statistics.
        """
        stop = self.population if stop is None else stop
        if self._open:
            raise DrawError("ask() inside ask(): leave the first, so that the module has its own weights again")
        members = self._population.members(start, stop, self.generation, self.std)
        self._open = True
        try:
            guard = members.guard = BatchGuard(self.module, members.count)
            with torch.no_grad(), kept_buffers(self.module), guard.attached(), in_place(self._net, members):
                yield members
        finally:
            self._open = False
        self._asked = True

    def evaluate(self, evaluate: Evaluate, start: int = 0, stop: int | None = None) -> Tensor:
        """Fitness of members ``start`` to ``stop - 1`` of this generation, chunk by chunk; changes nothing.

        Args:
            evaluate: ``evaluate(module, members) -> fitness [members.count]``, called once a chunk; larger is better.
            start, stop: whole antithetic pairs.

        Returns:
            float64 ``[stop - start]``.

        Raises:
            ArgumentError: if it returns anything else. What it raises itself passes through; the module is as it was.
        """
        stop = self.population if stop is None else stop
        found = []
        for first, last in self._population.chunks(start, stop, self.chunk):
            with self.ask(first, last) as members:
                fitness = evaluate(self.module, members)
            found.append(
                require_fitness(fitness, last - first, f"the fitness that evaluate returned for members {first} to {last - 1}")
            )
        return torch.cat(found)

    def step(self, evaluate: Evaluate) -> Tensor:
        """Evaluates the generation and fills ``.grad``: :meth:`evaluate`, then :meth:`tell`.

        Returns:
            The raw fitness, float64 ``[population]`` on the CPU.
        """
        fitness = self.evaluate(evaluate).cpu()
        self.tell(fitness)
        return fitness

    def evaluated_elsewhere(self) -> None:
        """Says that other processes evaluated this generation, so that :meth:`tell` may follow without :meth:`ask` here."""
        self._asked = True

    def tell(self, fitness: Any, kept: Tensor | None = None) -> None:
        """Fills ``.grad`` with -1/(N σ²) Σ_n F_n ΔW_n, N the members kept and F their shaped fitness, and ends the generation.

        Args:
            fitness: ``[population]``, larger is better.
            kept: bool ``[population]``; members that were not evaluated are False, with their antithetic partners. Shaping and the
                sum are over the others.

        Raises:
            ArgumentError: for fitness of another length or, under ``on_nan="error"``, that is not finite; for half a pair kept.
                Then gradients and the generation are as before.
            DrawError: if members of this generation were never asked for.
        """
        if not self._asked or self._open:
            when = "inside ask()" if self._open else "without ask()"
            raise DrawError(f"tell() {when}: evaluate members of generation {self.generation} first, or call step(evaluate)")
        raw = require_fitness(fitness, self.population, "the fitness").cpu()
        keep = require_kept(kept, self.population, self._population.each)
        found = with_finite_fitness(raw[keep], keep.nonzero().flatten(), self.on_nan)
        weights = torch.zeros_like(raw)
        weights[keep] = shaped(self._shaping, found, self.generation)
        scale = -1 / (int(keep.sum()) * self.std**2)
        gradients = self._population.weighted_sum(weights, scale, self.generation, self.std)
        for site in self._net.sites:
            site.mean.grad = sharded_as(gradients[site.name], site.mean)
        self.generation += 1
        self._asked = False

    def member(self, generation: int, n: int) -> nn.Module:
        """A plain copy of the module with member ``n``'s weights: the means as they stand now plus that generation's ΔW_n.

        Before the optimiser steps, the best of the generation just told is ``es.member(es.generation - 1, fitness.argmax())``.

        Raises:
            MemberError: if ``n`` lies outside the population.
            ArgumentError: if ``generation`` is no integer of at least 0.
        """
        generation, n = require_count("generation", generation, 0), _index(n)
        if not 0 <= n < self.population:
            raise MemberError(f"member {n} is out of range: the population has members 0 to {self.population - 1}")
        each = self._population.each
        first = n - n % each
        return self._population.members(first, first + each, generation, self._std_at(generation)).module(n - first)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside module and optimiser: numbers and names, for ``torch.load(weights_only=True)``."""
        return {"generation": self.generation, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a saved generation; the noise from there on is what it would have been.

        Raises:
            ArgumentError: if the state is of a strategy with other settings, whose noise would differ.
        """
        own = self._identity()
        other = {name: (state.get(name), value) for name, value in own.items() if state.get(name) != value}
        if other or "generation" not in state:
            told = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in other.items()) or "it has no generation"
            raise ArgumentError(f"the state is of another strategy: {told}. Make the strategy as it was made then")
        self.generation = require_count("generation", state["generation"], 0)
        self._asked = False

    def __repr__(self) -> str:
        shared = "all" if self.members_per_base is None else self.members_per_base
        return (
            f"EvolutionStrategy(std={self.std}, population={self.population}, estimator={self.estimator}, base={self.base!r}, "
            f"members_per_base={shared}, antithetic={self.antithetic}, generation={self.generation})"
        )

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "population": self.population,
            "estimator": repr(self.estimator),
            "base": self.base,
            "members_per_base": self.members_per_base,
            "antithetic": self.antithetic,
            "parameters": [f"{site.name} {tuple(site.mean.shape)}" for site in self._net.sites],
        }

    def _std_at(self, generation: int) -> float:
        std = self._schedule(generation) if callable(self._schedule) else self._schedule
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not math.isfinite(std) or std <= 0:
            where = f" at generation {generation}" if callable(self._schedule) else ""
            raise ArgumentError(f"std={std!r}{where}: a standard deviation is positive and finite")
        return float(std)


def _index(n: Any) -> int:
    try:
        return operator.index(n)
    except TypeError:
        raise MemberError(f"member index {n!r} is a {type(n).__name__}; expected an integer") from None
