"""The finished runs among some folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipout.errors import ArgumentError
from flipout.storage.files import read_json
from flipout_experiments.harness.reproduce import ENTRIES, Entry

__all__ = ["FinishedRun", "find_runs"]


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder holds.

    Attributes:
        folder: of the run.
        entry: the experiment's, or None for one that this installation does not know.
        result, environment: the files of that name.
        figures: SVG files, in the order of their names.
    """

    folder: Path
    entry: Entry | None
    result: dict[str, Any]
    environment: dict[str, Any]
    figures: tuple[Path, ...]

    @property
    def title(self) -> str:
        """The folder's name, which tells the experiment, its options and the preset unless it was chosen otherwise."""
        return self.folder.name

    @property
    def seconds(self) -> float:
        """Wall time of all phases."""
        return float(sum(self.result.get("seconds", {}).values()))


def find_runs(places: Sequence[Path]) -> tuple[list[FinishedRun], list[Path]]:
    """The finished runs in these folders, and the folders of runs that are not finished.

    Args:
        places: run folders, or folders of run folders.

    Raises:
        ArgumentError: if a place does not exist or has no run in it, or a result cannot be read.
    """
    finished, unfinished = [], []
    for place in places:
        if not place.is_dir():
            raise ArgumentError(f"{place}: no such folder; name run folders, or a folder of run folders such as runs")
        folders = [place] if (place / "config.json").exists() else sorted(p.parent for p in place.glob("*/config.json"))
        if not folders:
            raise ArgumentError(f"{place} holds no run: make one with `flipout reproduce`, or name the folder of one")
        for folder in folders:
            if (folder / "result.json").exists():
                finished.append(_read(folder))
            else:
                unfinished.append(folder)
    return finished, unfinished


def _read(folder: Path) -> FinishedRun:
    result = read_json(folder / "result.json")
    if not all(isinstance(result.get(part, {}), dict) for part in ("seconds", "settings")):
        raise ArgumentError(f"{folder / 'result.json'} has no seconds or settings that can be read; leave it out, or run it anew")
    environment = read_json(folder / "environment.json") if (folder / "environment.json").exists() else {}
    entry = next((entry for entry in ENTRIES if entry.name == result.get("experiment")), None)
    return FinishedRun(folder, entry, result, environment, tuple(sorted((folder / "figures").glob("*.svg"))))
