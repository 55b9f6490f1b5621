"""One process to a run folder, by a lock of the operating system: it goes with the process, however that ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flipout.errors import ArgumentError
from flipout.storage.files import save_failed

__all__ = ["FolderLock"]

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Holds the file ``lock`` of a folder until closed. The file stays; what counts is the lock on it.

    Raises:
        ArgumentError: if another process holds it.
        SaveError: if the file cannot be made.
    """

    NAME = "lock"

    def __init__(self, folder: Path) -> None:
        path = folder / self.NAME
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise save_failed(path, error) from error
        try:
            _take(self._descriptor)
        except OSError:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise ArgumentError(
                f"{folder} is in use by another process{f' (number {holder})' if holder else ''}: "
                "wait for it, or name another folder with --out"
            ) from None
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(self._descriptor)
            raise save_failed(path, error) from error

    def close(self) -> None:
        """Lets the folder go."""
        os.close(self._descriptor)
