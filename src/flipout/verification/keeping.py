"""Putting back what a run may change."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flipout.buffers import kept_buffers
from flipout.perturb import Perturbed

__all__ = ["put_back", "seed_all"]


@contextmanager
def put_back(net: Perturbed) -> Iterator[None]:
    """Puts back what running a net may change: modes, buffers, attributes of its parts, random states."""
    modes = [(part, part.training) for part in net.modules()]
    attributes = [(part, _own_attributes(part)) for part in net.module.modules()]
    told = set(net.ledger._told)
    state = None if net.generator is None else net.generator.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), kept_buffers(net):
        try:
            yield
        finally:
            for part, kept in attributes:
                _restore(part, kept)
            for part, mode in modes:
                part.training = mode
            net.ledger._told = told
            if state is not None and net.generator is not None:
                net.generator.set_state(state)


def seed_all(seed: int) -> None:
    """Seeds the global generators, which are put back at the end."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _own_attributes(part: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a part's own, with copies of those that can change in place."""
    own = {name: value for name, value in vars(part).items() if name not in _MODULE_ATTRIBUTES}
    return {name: (value, _copied(value)) for name, value in own.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.layout == torch.strided and type(value) in (Tensor, nn.Parameter) else None
    return value.copy() if type(value) in (list, dict, set, deque) else None


def _restore(part: nn.Module, kept: dict[str, tuple[Any, Any]]) -> None:
    now = vars(part)
    for name in [name for name in now if name not in _MODULE_ATTRIBUTES and name not in kept]:
        del now[name]
    for name, (value, copied) in kept.items():
        now[name] = value
        if isinstance(copied, Tensor):
            with torch.no_grad():
                if value.shape == copied.shape and not torch.equal(value, copied):
                    value.copy_(copied)
        elif isinstance(copied, dict):
            if len(copied) != len(value) or any(value.get(key, now) is not each for key, each in copied.items()):
                value.clear()
                value.update(copied)
        elif isinstance(copied, set):
            if copied != value:
                value.clear()
                value.update(copied)
        elif copied is not None and (len(copied) != len(value) or any(a is not b for a, b in zip(copied, value, strict=True))):
            value.clear()
            value.extend(copied)
