"""Saving a run of evolution whole, and going on with it to the same result."""

from __future__ import annotations

from pathlib import Path

from flipout.evolution.strategy import EvolutionStrategy
from flipout.storage.parts import Stateful, read_parts, write_parts

__all__ = ["load_checkpoint", "save_checkpoint"]


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
    write_parts(Path(path), _all(es, parts))


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
    read_parts(Path(path), _all(es, parts))


def _all(es: EvolutionStrategy, parts: dict[str, Stateful]) -> dict[str, Stateful]:
    return {"strategy": es, "module": es.module, **parts}
