"""Batches from tensors, and what can be checked of a loss and its batches before hours are spent on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipout.buffers import kept_buffers
from flipout.errors import ArgumentError
from flipout.gradients import LossFunction, SampleBatch
from flipout.perturb import Perturbed
from flipout.streams import stream

__all__ = ["check_loss", "without_replacement"]

#: Rows of the batch that is put twice, and how far its mean loss may move.
_ROWS, _TOLERANCE = 4, 1e-3


def without_replacement(*tensors: Tensor) -> Callable[[int, torch.Generator], tuple[Tensor, ...]]:
    """A ``sample_batch`` whose examples are distinct within a batch (within a micro-batch, where one is run in several).

    Args:
        tensors: inputs, labels and so on, all with the same number of rows.

    Raises:
        ArgumentError: if the tensors have different numbers of rows; by the sampler, for a batch of more rows than there are.

    Example:
        >>> sample_batch = without_replacement(torch.arange(5), torch.arange(5) * 10)
        >>> rows, tens = sample_batch(5, torch.Generator().manual_seed(0))
        >>> rows.sort().values, torch.equal(tens, rows * 10)
        (tensor([0, 1, 2, 3, 4]), True)
    """
    counts = {len(tensor) for tensor in tensors}
    if len(counts) != 1:
        raise ArgumentError(f"tensors of {[len(tensor) for tensor in tensors]} rows: expected one number of rows for all")
    (count,) = counts

    def sample_batch(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        if n > count:
            raise ArgumentError(
                f"a batch of {n} distinct examples was asked of a data set of {count}; lower the batch size, or draw "
                "with replacement"
            )
        index = torch.randperm(count, generator=generator)[:n]
        return tuple(tensor[index.to(tensor.device)] for tensor in tensors)

    return sample_batch


def check_loss(net: Perturbed, loss_fn: LossFunction, sample_batch: SampleBatch, seed: int) -> None:
    """Refuses a loss that is no mean over examples: without noise, the mean over a batch put twice is that over the batch.

    Variance under a sum would grow with N, and no law of the paper would hold. Batches whose examples cannot be found (no tensor
    with the rows asked for) are let through.

    Raises:
        ArgumentError: if the loss moves when every example is put twice.
    """
    once = sample_batch(_ROWS, stream(seed, 2**32 - 1))
    twice = _twice(once, net.batch_dim)
    if twice is None:
        return
    with _mean_mode(net), kept_buffers(net), torch.no_grad():
        try:
            before, after = float(loss_fn(net, once)), float(loss_fn(net, twice))
        except Exception:  # a batch that cannot be put twice, or a loss whose own error comes with its first draw
            return
    if math.isfinite(before) and abs(after - before) > _TOLERANCE * max(abs(before), abs(after)):
        raise ArgumentError(
            f"loss_fn gives {before:.6g} for {_ROWS} examples and {after:.6g} for the same examples put twice: it is not their "
            "mean (a sum, perhaps, or examples compared with one another); return the mean loss of the batch"
        )


def _twice(batch: Any, batch_dim: int) -> Any:
    """The batch with every example twice, or None where no tensor has the rows."""
    leaves, structure = pytree.tree_flatten(batch)
    found = False
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            continue
        for dim in (batch_dim, 0):
            if leaf.dim() > dim and leaf.shape[dim] == _ROWS:
                leaves[i], found = torch.cat([leaf, leaf], dim), True
                break
    return pytree.tree_unflatten(leaves, structure) if found else None


@contextmanager
def _mean_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, that is mean weights and no dropout, with every module's own mode put back."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
