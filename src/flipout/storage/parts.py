"""The states of several objects in one file, and back into the objects: all of them or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from flipout.errors import ArgumentError
from flipout.storage.states import read_state, write_state

__all__ = ["Stateful", "read_parts", "write_parts"]


class Stateful(Protocol):
    """What has a state: an optimiser, a scheduler, a normaliser."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def write_parts(path: Path, parts: Mapping[str, Stateful]) -> None:
    """Saves the states of the parts into one file.

    Raises:
        ArgumentError: if a state holds anything but tensors, numbers, texts, and lists and dicts of them.
        SaveError: if it cannot be written; the file is as it was.
    """
    write_state(path, {name: part.state_dict() for name, part in parts.items()})


def read_parts(path: Path, parts: Mapping[str, Stateful]) -> None:
    """Loads the states that :func:`write_parts` saved into the parts.

    Raises:
        ArgumentError: if the file is not there or damaged, lacks a part or has one more, or a part refuses its state. The parts
            are as they were then.
    """
    states = read_state(path)
    if set(parts) != set(states):
        raise ArgumentError(f"the checkpoint {path} has {sorted(states)}: pass the parts that it was saved with, by the same names")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    at = ""
    try:
        for at, part in parts.items():
            part.load_state_dict(states[at])
    except Exception as error:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"the checkpoint {path} has another {at} ({str(error).splitlines()[0]}): make every part as it was made then"
        ) from error
