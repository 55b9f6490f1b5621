"""Files that are either whole or not there: written beside their place, forced to disk, then moved into it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flipout.errors import ArgumentError, SaveError

__all__ = ["UNFINISHED", "make_folder", "plain", "read_json", "replace_file", "save_failed", "write_all", "write_json"]

#: Ends the names of files that are being written. One that is left over belongs to a process that was killed.
UNFINISHED = ".tmp"


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Puts a new content in the place of a file, or leaves the file as it was.

    The bytes go into a file beside it and to the disk (``fsync``) before that takes the name (``os.replace``), so that a process
    killed at any moment, or a full disk, leaves the old file or the new one, never a part of either.

    Raises:
        SaveError: if the content cannot be written. The old file is still there; what was written of the new one is removed.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")  # two processes never write into one file
    try:
        with open(unfinished, "wb", buffering=0) as file:
            write_all(file.fileno(), content)
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise save_failed(path, error) from error


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Writes every byte, at once as far as the rest of the process can tell; raises OSError where the disk is full."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def save_failed(path: Path, error: OSError) -> SaveError:
    """The error that says what became of a file that could not be written."""
    kept = "the version saved before is kept" if path.exists() else "nothing of it was kept"
    reason = error.strerror or str(error)
    return SaveError(
        f"{path} could not be written ({reason}); {kept}. Make room or mend the folder, then go on from what was saved"
    )


def make_folder(path: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        SaveError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"the folder {path} cannot be made ({reason}); name another folder") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, see :func:`plain`, whole or not at all.

    Raises:
        ArgumentError: if the value holds something that JSON cannot say.
        SaveError: if it cannot be written.
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    replace_file(path, (text + "\n").encode(errors="backslashreplace"))  # half a character, from a path say, as JSON escapes it


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArgumentError: if the file cannot be read or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read ({error}); it was damaged or is something else: name another") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} holds a {type(found).__name__}, not a JSON object: name another folder")
    return found


def plain(value: Any) -> Any:
    """The same value of nothing but dicts with names for keys, lists, texts, finite numbers, booleans and None.

    What has an ``as_dict`` (an estimate with its interval) and dataclasses become dicts, tuples lists, paths texts, tensors
    numbers or lists. A number that is not finite becomes None, since JSON has no word for it and a long run should not fail at
    its last line.

    Raises:
        ArgumentError: if something is none of these.

    Example:
        >>> plain({"sizes": (1, 8), "out": Path("runs"), "high": float("inf")})
        {'sizes': [1, 8], 'out': 'runs', 'high': None}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "as_dict"):
        return plain(value.as_dict())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.number | np.bool_ | np.ndarray):
        return plain(value.tolist())
    raise ArgumentError(f"{value!r} is a {type(value).__name__}, not for JSON: pass numbers, texts, lists and dicts")


def _sync_folder(folder: Path) -> None:
    """Forces the new name of a file to disk, where the system opens folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
