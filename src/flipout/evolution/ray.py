"""A population over many processes or machines, on Ray.

Workers evaluate ranges of members. Parameters go out once a generation, through the object store; since all noise is a function of
counters, nothing but ranges goes to a worker with them, and nothing but fitness comes back.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from flipout.errors import ArgumentError, EvaluationError
from flipout.evolution.strategy import Evaluate, EvolutionStrategy

__all__ = ["RayWorkers"]

log = logging.getLogger("flipout.evolution")

#: A range of members that workers evaluate at once.
Range = tuple[int, int]


class _Worker:
    """What runs in a worker's process: a replica of the strategy that follows the driver's parameters."""

    def __init__(self, es: EvolutionStrategy, evaluate: Evaluate, threads: int) -> None:
        torch.set_num_threads(threads)
        self._es, self._evaluate = es, evaluate
        self._generation = -1

    def run(self, broadcast: list[Any], generation: int, start: int, stop: int) -> tuple[Any, Any]:
        """Fitness of members ``start`` to ``stop - 1``, and what the evaluation collected besides."""
        if generation != self._generation:
            module, state = ray.get(broadcast[0])
            self._es.module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in module.items()})
            if state is not None:
                self._evaluate.load_state_dict(state)  # type: ignore[attr-defined]
            self._es.generation = self._generation = generation
        fitness = self._es.evaluate(self._evaluate, start, stop).cpu().numpy()
        collect = getattr(self._evaluate, "collect", None)
        return fitness, None if collect is None else collect()


class RayWorkers:
    """Evaluates generations on Ray workers; the update is formed here, bit for bit as on one machine.

    A worker that dies is replaced and its range evaluated again by another, from the same counters: the result is that of an
    undisturbed run. A range that keeps failing is dropped whole, antithetic pairs and all; the others are ranked and normalised
    without it, and the log says so.

    Args:
        es: the strategy; its module's parameters are sent out at every generation.
        evaluate: as for :meth:`~flipout.evolution.EvolutionStrategy.step`, pickled once. What changes from one generation to the
            next must follow from ``members.generation``, or from its own ``state_dict()``, ``load_state_dict(state)``,
            ``begin(generation)``, ``collect()`` and ``merge(collected)``, as :class:`~flipout.evolution.Rollouts` has them.
        workers: processes, one CPU each.
        range_size: members in a range; by default an eighth of the population. The same ranges on the same kind of machine give the
            same bits, however many workers there are.
        retries: how often a range is tried again.
        threads: of torch in each worker.
        options: for Ray's actors, such as ``num_gpus``.

    Raises:
        ArgumentError: for numbers that are too small.

    Example:
        >>> es = EvolutionStrategy(torch.nn.Linear(2, 1), population=16)
        >>> optimiser = torch.optim.SGD(es.module.parameters(), lr=0.1)
        >>> def evaluate(module, members):
        ...     return -module(torch.ones(members.count, 2)).square().sum(1)
        >>> with RayWorkers(es, evaluate, workers=1) as workers:
        ...     fitness = workers.step()
        ...     optimiser.step()
        >>> fitness.shape
        torch.Size([16])
    """

    def __init__(
        self,
        es: EvolutionStrategy,
        evaluate: Evaluate,
        workers: int = 2,
        *,
        range_size: int | None = None,
        retries: int = 3,
        threads: int = 1,
        **options: Any,
    ) -> None:
        each = 2 if es.antithetic else 1
        size = -(-es.population // (8 * each)) * each if range_size is None else range_size
        for name, value, least in (
            ("workers", workers, 1),
            ("range_size", size, each),
            ("retries", retries, 0),
            ("threads", threads, 1),
        ):
            if not isinstance(value, int) or value < least or (name == "range_size" and value % each):
                raise ArgumentError(f"{name}={value!r}: expected {'whole pairs' if name == 'range_size' else f'at least {least}'}")
        self.es, self.retries = es, retries
        self._evaluate = evaluate
        self._ranges: list[Range] = [(first, min(first + size, es.population)) for first in range(0, es.population, size)]
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self._actor = ray.remote(_Worker).options(num_cpus=1, **options)
        self._arguments = (ray.put(es), ray.put(evaluate), threads)
        self._workers: list[Any] = [self._actor.remote(*self._arguments) for _ in range(workers)]

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def step(self) -> Tensor:
        """Evaluates the generation and fills ``.grad``, as :meth:`~flipout.evolution.EvolutionStrategy.step` does.

        Returns:
            The raw fitness, float64 ``[population]``; NaN for members that were dropped.

        Raises:
            EvaluationError: if every range kept failing; gradients and the generation are as before.
        """
        fitness = self.evaluate()
        kept = self._kept
        self.es.evaluated_elsewhere()
        self.es.tell(torch.where(kept, fitness, 0.0), kept=kept)
        return fitness

    def evaluate(self) -> Tensor:
        """The fitness of the generation, float64 ``[population]``; NaN for members that were dropped."""
        es = self.es
        evaluate: Any = self._evaluate
        if hasattr(evaluate, "begin"):
            evaluate.begin(es.generation)
        state = evaluate.state_dict() if hasattr(evaluate, "state_dict") else None
        module = {name: value.detach().cpu().numpy() for name, value in es.module.state_dict().items()}
        found, failures = self._gather([ray.put((module, state))])
        if not found:
            raise EvaluationError(
                f"generation {es.generation}: every range of members failed {self.retries + 1} times; the last error was "
                f"{next(iter(failures.values()))}"
            )
        fitness = torch.full((es.population,), float("nan"), dtype=torch.float64)
        self._kept = torch.zeros(es.population, dtype=torch.bool)
        for start, stop in sorted(found):  # in the order of the members, whoever was first
            values, collected = found[start, stop]
            fitness[start:stop] = torch.from_numpy(values.copy())
            self._kept[start:stop] = True
            if hasattr(evaluate, "merge"):
                evaluate.merge(collected)
        return fitness

    def _gather(self, broadcast: list[Any]) -> tuple[dict[Range, tuple[Any, Any]], dict[Range, str]]:
        """What each range gave, and the last error of each that kept failing."""
        todo, tried = deque(self._ranges), dict.fromkeys(self._ranges, 0)
        idle = deque(range(len(self._workers)))
        busy: dict[Any, tuple[Range, int]] = {}
        found: dict[Range, tuple[Any, Any]] = {}
        failures: dict[Range, str] = {}
        while todo or busy:
            while todo and idle:
                members, worker = todo.popleft(), idle.popleft()
                busy[self._workers[worker].run.remote(broadcast, self.es.generation, *members)] = members, worker
            (done,), _ = ray.wait(list(busy))
            members, worker = busy.pop(done)
            try:
                found[members] = ray.get(done)
            except RayError as error:
                self._failed(members, worker, error, tried, todo, failures)
            idle.append(worker)
        return found, failures

    def _failed(
        self, members: Range, worker: int, error: Any, tried: dict[Range, int], todo: deque[Range], failures: dict[Range, str]
    ) -> None:
        tried[members] += 1
        told = str(error).strip().splitlines()[-1] if isinstance(error, RayTaskError) else type(error).__name__
        where = f"generation {self.es.generation}, members {members[0]} to {members[1] - 1}"
        if not isinstance(error, RayTaskError):  # the process is gone
            with contextlib.suppress(Exception):
                ray.kill(self._workers[worker])
            self._workers[worker] = self._actor.remote(*self._arguments)
            log.warning("%s: worker %d was lost (%s) and is replaced", where, worker, told)
        if tried[members] <= self.retries:
            todo.append(members)
            return
        failures[members] = told
        count = members[1] - members[0]
        log.error(
            "%s: failed %d times, the last time with %s; these %d members are dropped, whole antithetic pairs, and the update is "
            "normalised by those that are left",
            where, tried[members], told, count,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the workers, and Ray if it was started here."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        if self._started:
            ray.shutdown()
            self._started = False
