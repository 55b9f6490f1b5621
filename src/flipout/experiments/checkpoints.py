"""The checkpoint files of a run: a state, and how much of ``metrics.jsonl`` stands behind it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flipout.errors import ArgumentError
from flipout.files import replace_file

__all__ = ["metrics_kept", "read_checkpoint", "write_checkpoint"]


def write_checkpoint(path: Path, state: Mapping[str, Any], metrics: int, prove: bool) -> None:
    """Saves a state in the place of the one before it, whole or not at all.

    Args:
        path: of the file.
        state: tensors, numbers, texts, and lists, tuples and dicts of them.
        metrics: bytes of the metrics written before.
        prove: load what is about to be saved, so that a state which cannot be loaded is refused now and not after a kill.

    Raises:
        ArgumentError: if the state cannot be loaded again.
        SaveError: if it cannot be written; the file is as it was.
    """
    content = io.BytesIO()  # not straight to the file: torch.save reports a full disk in several ways, some of them fatal
    try:
        torch.save({"state": dict(state), "metrics": metrics}, content)
        if prove:
            content.seek(0)
            torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"the state for {path} holds more than tensors, numbers, texts, and lists and dicts of them, and could not be loaded "
            "again without running code from the file: save state_dict() or get_state() of what is in it"
        ) from error
    replace_file(path, content.getbuffer())


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What :func:`write_checkpoint` saved, under the keys ``state`` and ``metrics``; tensors on the CPU.

    Args:
        path: of the file.
        mmap: leave tensors on the disk until they are looked at.

    Raises:
        ArgumentError: if the file is damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(found, dict) or not {"state", "metrics"} <= set(found):
            raise ValueError("it was not saved by a run")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ArgumentError(
            f"the checkpoint {path} cannot be read ({str(error).splitlines()[0]}): it was damaged after it was saved; "
            "start anew in another folder with --out"
        ) from error
    return found


def metrics_kept(folder: Path) -> int:
    """Bytes of the metrics of a run folder that its latest checkpoint stands for; all of them if the run is finished."""
    if (folder / "result.json").exists():
        return (folder / "metrics.jsonl").stat().st_size
    paths = sorted((folder / "checkpoints").glob("*.pt"))
    return max((int(read_checkpoint(path, mmap=True)["metrics"]) for path in paths), default=0)
