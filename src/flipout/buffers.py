"""Buffers and modes that are put back, and which layers of a module look at a whole batch at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_statistics", "evaluating", "kept_buffers", "normalises_by_batch"]


def normalises_by_batch(part: nn.Module) -> bool:
    """Whether a layer normalises by the statistics of the batch: a batch norm in training mode, or one that keeps no running ones.

    An instance norm does not: its statistics are those of one row.

    Example:
        >>> norm = torch.nn.BatchNorm1d(3)
        >>> normalises_by_batch(norm), normalises_by_batch(norm.eval())
        (True, False)
    """
    return isinstance(part, _BatchNorm) and (part.training or (part.running_mean is None and part.running_var is None))


def batch_statistics(module: nn.Module) -> list[str]:
    """The names of the parts of a module that normalise by the batch as it stands."""
    return [name or type(part).__name__ for name, part in module.named_modules() if normalises_by_batch(part)]


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Puts every buffer of a module back as it was: the same tensors with the same values.

    Example:
        >>> norm = torch.nn.BatchNorm1d(3)
        >>> with kept_buffers(norm):
        ...     y = norm(torch.randn(5, 3))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0., 0., 0.]), tensor(0))
    """
    slots: list[tuple[nn.Module, str, Any]] = []
    values: dict[int, Any] = {}
    for part in module.modules():
        for name, buffer in part._buffers.items():
            slots.append((part, name, buffer))
            if buffer is not None and id(buffer) not in values:
                values[id(buffer)] = buffer.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer in slots:
                part._buffers[name] = buffer
                if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                    buffer.copy_(values[id(buffer)])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; each part's own mode is put back after it."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
