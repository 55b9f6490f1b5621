"""The numbers of a run as they come: ``metrics.jsonl``, one JSON object a line, and TensorBoard's files on request."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipout.errors import ArgumentError
from flipout.storage.files import plain, save_failed, write_all

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Boards", "MetricsFile", "record_of"]


class MetricsFile:
    """Lines appended to a file, each handed to the system before the next is taken.

    Args:
        path: of the file, made if it is not there.
        length: bytes of it to keep: those written before the last checkpoint. The rest is cut off, and written anew by a run
            that goes on from there.

    Raises:
        ArgumentError: if the file is shorter than that.
        SaveError: if it cannot be opened or cut.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise save_failed(path, error) from error
        try:
            found = os.fstat(self._descriptor).st_size
            if found < length:
                raise ArgumentError(
                    f"{path} has {found:,} bytes, and had {length:,} when the last checkpoint was saved: "
                    "it was changed since, and the run cannot go on; name another folder with --out"
                )
            os.ftruncate(self._descriptor, length)
        except OSError as error:
            self.close()
            raise save_failed(path, error) from error
        except ArgumentError:
            self.close()
            raise
        self.length = length

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            SaveError: if it cannot be written; what was written of it is cut off.
        """
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        try:
            write_all(self._descriptor, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.length)
            raise save_failed(self._path, error) from error
        self.length += len(line)

    def sync(self) -> int:
        """Forces what was written to disk; returns its length in bytes."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise save_failed(self._path, error) from error
        return self.length

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of the file, as they are now.

        Raises:
            ArgumentError: if one cannot be read.
        """
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ArgumentError(
                        f"line {number} of {self._path} cannot be read ({error}): it was changed after it was written; name "
                        "another folder with --out"
                    ) from error


class Boards:
    """TensorBoard's files of a run: a subfolder for each phase, which has a count of steps of its own.

    Args:
        folder: for the subfolders.
        kept: the records that a run which goes on has kept. Of a phase whose files are there, TensorBoard is told to hide what lies
            beyond them (``purge_step``); of one that has none yet, they are written now. TensorBoard reads files in the order of
            the seconds in their names: where the clock was set back, and a new file would come before those there, all is
            written anew.

    Raises:
        ArgumentError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path, kept: list[dict[str, Any]]) -> None:
        self._create = self.check()
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}
        self._next: dict[str, int] = {}
        for record in kept:
            phase = record.get("phase") or "run"
            self._next[phase] = max(self._next.get(phase, 0), record["step"] + 1)
        missing = {phase for phase in self._next if not self._follows(phase)}
        for phase in missing:
            shutil.rmtree(folder / phase, ignore_errors=True)
        for record in kept:
            if (record.get("phase") or "run") in missing:
                self.add(record)

    @staticmethod
    def check() -> type[SummaryWriter]:
        """The class that writes, if tensorboard is installed.

        Raises:
            ArgumentError: if it is not.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                f"--tensorboard needs tensorboard, which cannot be imported ({error}): pip install 'flipout[tensorboard]', "
                "or leave the option out: metrics.jsonl has the same numbers"
            ) from error
        return SummaryWriter

    def _follows(self, phase: str) -> bool:
        """Whether there are files of a phase, all of which TensorBoard reads before one that is made now."""
        now = f"events.out.tfevents.{int(time.time()):010d}"
        names = [path.name for path in (self._folder / phase).glob("events.out.tfevents.*")]
        return bool(names) and max(names) < now

    def add(self, record: dict[str, Any]) -> None:
        """Writes the numbers of a record of the metrics."""
        phase = record.get("phase") or "run"
        if phase not in self._writers:
            folder = self._folder / phase
            purge = self._next.get(phase, 0) if folder.exists() else None
            self._writers[phase] = self._create(str(folder), purge_step=purge)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writers[phase].add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Hands everything to the system, so that it outlives this process."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()


def record_of(phase: str | None, step: int, numbers: dict[str, Any]) -> dict[str, Any]:
    """A record of the metrics: the phase, if there is one, the step and the numbers.

    Raises:
        ArgumentError: if a value is no single number, truth value or text.
    """
    record: dict[str, Any] = {"step": int(step)} if phase is None else {"phase": phase, "step": int(step)}
    for name, value in numbers.items():
        found = plain(float(value) if isinstance(value, float) else value)  # of an estimate its value alone
        if isinstance(found, list | dict) or name in ("phase", "step"):
            why = "is the harness's own name" if name in ("phase", "step") else f"is a {type(value).__name__}"
            raise ArgumentError(f"log({name}=...): {name} {why}; a line of metrics.jsonl takes single numbers and texts")
        record[name] = found
    return record
