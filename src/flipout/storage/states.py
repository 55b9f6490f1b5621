"""States of training in files: whole or not there, proven to load without running code, and with a check sum.

A file is what ``torch.save`` makes of the state, so ``torch.load(weights_only=True)`` reads it. As the comment of its zip archive
it has a check sum of all the rest: torch itself does not notice a flipped bit, and would go on from another number.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flipout.errors import ArgumentError
from flipout.storage.files import replace_file

__all__ = ["read_state", "write_state"]

_SUM = re.compile(rb"crc32:([0-9a-f]{8})")
_SUM_LENGTH = len(b"crc32:00000000")


def write_state(path: Path, state: Mapping[str, Any], prove: bool = True) -> None:
    """Saves a state in the place of the one before it, whole or not at all.

    Args:
        path: of the file.
        state: tensors, numbers, texts, and lists, tuples and dicts of them.
        prove: load what is about to be saved, so that a state which cannot be loaded is refused now and not after a kill.

    Raises:
        ArgumentError: if the state cannot be loaded again.
        SaveError: if it cannot be written; the file is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_state(Path(folder, "a.pt"), {"x": torch.ones(2), "step": 3})
        ...     read_state(Path(folder, "a.pt"))
        {'x': tensor([1., 1.]), 'step': 3}
    """
    content = io.BytesIO()  # not straight to the file: torch.save reports a full disk in several ways, some of them fatal
    try:
        torch.save(dict(state), content)
        if prove:
            content.seek(0)
            torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"the state for {path} holds more than tensors, numbers, texts, and lists and dicts of them, and could not be loaded "
            "again without running code from the file: save state_dict() or get_state() of what is in it"
        ) from error
    content.seek(-2, os.SEEK_END)
    content.write(_SUM_LENGTH.to_bytes(2, "little"))  # the length of the archive's comment, which torch leaves out
    with content.getbuffer() as whole:
        found = zlib.crc32(whole)
    content.write(b"crc32:%08x" % found)
    replace_file(path, content.getbuffer())


def read_state(path: Path, mmap: bool = False, todo: str = "take another copy of it, or start anew") -> dict[str, Any]:
    """What :func:`write_state` saved, with tensors on the CPU. A file without a check sum is taken as it is.

    Args:
        path: of the file.
        mmap: leave tensors on the disk until they are looked at.
        todo: what the error advises.

    Raises:
        ArgumentError: if the file is not there, is damaged, or holds something else.

    Example:
        >>> read_state(Path("nowhere.pt"))
        Traceback (most recent call last):
            ...
        flipout.errors.ArgumentError: the checkpoint nowhere.pt cannot be read ...
    """
    try:
        _require_intact(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ArgumentError(
            f"the checkpoint {path} cannot be read ({reason}): it is not there, was damaged after it was saved, or is something "
            f"else; {todo}"
        ) from error
    return found


def _require_intact(path: Path) -> None:
    """Raises ValueError if the file has a check sum, and it is that of other bytes."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _SUM_LENGTH
        if left < 0:
            raise ValueError("it is too short")
        file.seek(left)
        noted = _SUM.fullmatch(file.read())
        if noted is None:
            return
        file.seek(0)
        found = 0
        while left:
            piece = file.read(min(left, 2**20))
            left -= len(piece)
            found = zlib.crc32(piece, found)
    if found != int(noted[1], 16):
        raise ValueError("its check sum is that of other bytes")
