"""The variance curve of fully independent noise, at the price of its largest batch alone.

A dense perturbation for each example is what makes independent noise dear, and what makes a batch of N nothing but N batches of
one. So every member's gradient is computed once: 4 of them make a draw at N = 4, four such draws one at N = 16, and so on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from flipout.errors import ArgumentError
from flipout.estimators import Independent
from flipout.gradients import LossFunction, SampleBatch, gradient
from flipout.moments import Moments
from flipout.perturb import Perturbed
from flipout.variance import EstimatorVariance
from flipout.variance.measure import Block, Parts, add_parts, block_sizes, check_parts, point

__all__ = ["independent_curve"]


def independent_curve(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_sizes: Sequence[int],
    pairs: int = 2,
    most_draws: int = 32,
    seed: int = 0,
    confidence: float = 0.9,
    on_member: Callable[[], None] | None = None,
    parts: Parts | None = None,
) -> list[EstimatorVariance]:
    """The variance of the gradient under Independent at several batch sizes.

    Costs ``2 * pairs * batch_sizes[-1]`` forward and backward passes of one example each, spread over as many threads as torch
    may use on a CPU. Draws at different sizes are built from the same members, so the points of the curve are each unbiased
    but not independent of one another.

    Args:
        net, loss_fn, sample_batch, seed, confidence: as in :func:`flipout.variance.gradient_variance`.
        batch_sizes: increasing, each a multiple of the one before.
        pairs: pairs of draws at the largest size; one pair gives no interval there.
        most_draws: at most so many draws a pair at the smaller sizes.
        on_member: called after each member, from several threads.
        parts: as in :func:`flipout.variance.gradient_variance`.

    Returns:
        One result a batch size.

    Raises:
        ArgumentError: if a batch size is no multiple of the one before.
    """
    steps = [size // before for size, before in zip(batch_sizes, [1, *batch_sizes], strict=False)]
    if not steps or 0 in steps or math.prod(steps) != batch_sizes[-1]:
        raise ArgumentError(f"batch_sizes={tuple(batch_sizes)}: expected sizes of which each is a multiple of the one before")
    parts = check_parts(net, parts)
    members = 2 * batch_sizes[-1]
    draws = [min(most_draws, members // size) for size in batch_sizes]

    def run(pair: int) -> list[list[Block]]:
        own = copy.deepcopy(net)  # a wrapper holds one draw at a time
        levels = [_Level(step, block_sizes(count, None)) for step, count in zip(steps, draws, strict=True)]
        with own.using(Independent()):
            for member in range(pair * members, (pair + 1) * members):
                drawn = gradient(own, loss_fn, sample_batch, 1, 1, seed, (member,))
                _push(levels, add_parts(drawn, parts))
                if on_member is not None:
                    on_member()
        return [level.blocks for level in levels]

    with _one_thread_each(net) as workers, ThreadPoolExecutor(min(workers, pairs)) as pool:
        runs = list(pool.map(run, range(pairs)))
    return [
        point(net, "independent", size, count * pairs, [b for each in runs for b in each[i]], parts, confidence, "parameter")
        for i, (size, count) in enumerate(zip(batch_sizes, draws, strict=True))
    ]


class _Level:
    """One batch size: gathers gradients of the size below until they make a draw of its own."""

    def __init__(self, step: int, sizes: list[int]) -> None:
        self.step = step
        self.blocks: list[Block] = []
        self._sizes = sizes
        self._moments = Moments()
        self._sum: dict[str, Tensor] = {}
        self._count = 0

    def add(self, gradient: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Takes a gradient in; returns the draw that it completes, if it does."""
        for name, part in gradient.items():
            self._sum[name] = self._sum[name] + part if self._count else part
        self._count += 1
        if self._count < self.step:
            return None
        draw = {name: total / self.step for name, total in self._sum.items()} if self.step > 1 else self._sum
        self._sum, self._count = {}, 0
        self._record(draw)
        return draw

    def _record(self, draw: dict[str, Tensor]) -> None:
        if len(self.blocks) == len(self._sizes):
            return
        self._moments.add(draw)
        if self._moments.count == self._sizes[len(self.blocks)]:
            self.blocks.append(self._moments.variance())
            self._moments = Moments()


def _push(levels: Sequence[_Level], gradient: dict[str, Tensor] | None) -> None:
    for level in levels:
        if gradient is None:
            return
        gradient = level.add(gradient)


@contextmanager
def _one_thread_each(net: Perturbed) -> Iterator[int]:
    """How many workers to run; each gets one of torch's threads, since drawing normals uses no more than one."""
    if next(net.module.parameters()).device.type != "cpu":
        yield 1
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
