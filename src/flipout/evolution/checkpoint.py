"""Saving a run of evolution whole, and going on with it to the same result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Protocol

from flipout.errors import ArgumentError
from flipout.evolution.strategy import EvolutionStrategy
from flipout.states import read_state, write_state

__all__ = ["load_checkpoint", "save_checkpoint"]


class Stateful(Protocol):
    """What has a state: an optimiser, a scheduler, a normaliser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def save_checkpoint(path: Path | str, es: EvolutionStrategy, **parts: Stateful) -> None:
    """Saves the strategy, its module and the given parts into one file, whole or not at all.

    Args:
        path: of the file.
        es: the strategy.
        **parts: what else must go on as it was: ``optimiser=``, ``scheduler=``, ``normalizer=``.

    Raises:
        ArgumentError: if a part's state holds anything but tensors, numbers, texts, and lists and dicts of them.
        SaveError: if it cannot be written; the file is as it was.

    Example:
        >>> import tempfile, torch, flipout
        >>> module = torch.nn.Linear(3, 1)
        >>> es = flipout.evolution.EvolutionStrategy(module, population=8)
        >>> optimiser = torch.optim.Adam(module.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/es.pt", es, optimiser=optimiser)
        ...     load_checkpoint(f"{folder}/es.pt", es, optimiser=optimiser)
    """
    write_state(Path(path), {name: part.state_dict() for name, part in _all(es, parts).items()})


def load_checkpoint(path: Path | str, es: EvolutionStrategy, **parts: Stateful) -> None:
    """Brings the strategy, its module and the parts to where :func:`save_checkpoint` left them.

    Raises:
        ArgumentError: if the file is not there or damaged, lacks a part or has one more, or is of another strategy. The parts are
            as they were then.

    Example:
        >>> import torch, flipout
        >>> es = flipout.evolution.EvolutionStrategy(torch.nn.Linear(3, 1), population=8)
        >>> load_checkpoint("nowhere.pt", es)
        Traceback (most recent call last):
            ...
        flipout.errors.ArgumentError: the checkpoint nowhere.pt cannot be read ...
    """
    states, wanted = read_state(Path(path)), _all(es, parts)
    if set(wanted) != set(states):
        raise ArgumentError(f"the checkpoint {path} has {sorted(states)}: pass the parts that it was saved with, by the same names")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in wanted.items()}
    at = ""
    try:
        for at, part in wanted.items():
            part.load_state_dict(states[at])
    except Exception as error:
        for name, part in wanted.items():
            part.load_state_dict(before[name])
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"the checkpoint {path} has another {at} ({str(error).splitlines()[0]}): make every part as it was made then"
        ) from error


def _all(es: EvolutionStrategy, parts: dict[str, Stateful]) -> dict[str, Stateful]:
    return {"strategy": es, "module": es.module, **parts}
