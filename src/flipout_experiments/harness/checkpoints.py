"""The checkpoint files of a run: a state, and how much of ``metrics.jsonl`` stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flipout.errors import ArgumentError, NotFiniteError
from flipout.storage.states import read_state, write_state

__all__ = ["metrics_kept", "read_checkpoint", "write_checkpoint"]

_ANEW = "start anew in another folder with --out"


def write_checkpoint(path: Path, state: Mapping[str, Any], metrics: int, prove: bool) -> None:
    """Saves a state in the place of the one before it, whole or not at all.

    Args:
        path: of the file.
        state: tensors, numbers, texts, and lists, tuples and dicts of them.
        metrics: bytes of the metrics written before.
        prove: as in :func:`flipout.storage.states.write_state`.

    Raises:
        ArgumentError: if the state cannot be loaded again.
        NotFiniteError: if a tensor in it has NaN, from which nothing can go on; the file is as it was.
        SaveError: if it cannot be written; the file is as it was.
    """
    for name, tensor in _tensors(state, ""):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            kept = "the checkpoint before it is kept" if path.exists() else "there is none before it"
            raise NotFiniteError(
                f"{name!r} has NaN, and a run cannot go on from that, so {path} is not written; {kept}. Lower the learning rate or "
                "the noise, in another folder"
            )
    write_state(path, {"state": dict(state), "metrics": metrics}, prove)


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What :func:`write_checkpoint` saved, under the keys ``state`` and ``metrics``; tensors on the CPU.

    Args:
        path: of the file.
        mmap: leave tensors on the disk until they are looked at.

    Raises:
        ArgumentError: if the file is damaged.
    """
    found = read_state(path, mmap, _ANEW)
    if not {"state", "metrics"} <= set(found):
        raise ArgumentError(f"the checkpoint {path} cannot be read (it was not saved by a run); {_ANEW}")
    return found


def metrics_kept(folder: Path) -> int:
    """Bytes of the metrics of a run folder that its latest checkpoint stands for; all of them if the run is finished."""
    metrics = folder / "metrics.jsonl"
    if (folder / "result.json").exists():
        return metrics.stat().st_size if metrics.exists() else 0
    paths = sorted((folder / "checkpoints").glob("*.pt"))
    return max((int(read_checkpoint(path, mmap=True)["metrics"]) for path in paths), default=0)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a state, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}.{i}")
