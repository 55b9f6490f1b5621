"""What a run folder must be before a run opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flipout.errors import ArgumentError
from flipout.storage.files import UNFINISHED, read_json, write_json
from flipout_experiments.harness.lock import FolderLock

__all__ = ["check_state", "clear_unfinished", "compare_config", "record_environment", "refuse_strangers"]


def refuse_strangers(folder: Path) -> None:
    """Raises ArgumentError if the folder is a file, or holds something that is no run: it would be mixed up with one."""
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"{folder} is a file; name a folder for the run with --out")
    if not folder.exists() or (folder / "config.json").exists():
        return
    strangers = sorted(p.name for p in folder.iterdir() if p.name != FolderLock.NAME and not p.name.endswith(UNFINISHED))
    if strangers:
        some = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise ArgumentError(f"{folder} holds {some} and no config.json, so it is no run: name another folder with --out")


def check_state(folder: Path, resume: bool) -> None:
    """Raises ArgumentError if there is a run and it is not to go on, or none where one is."""
    exists = (folder / "config.json").exists()
    if exists and not resume:
        state = "a finished run" if (folder / "result.json").exists() else "a run that is not finished"
        todo = "see its result.json" if (folder / "result.json").exists() else "go on with it by --resume"
        raise ArgumentError(f"{folder} holds {state}: {todo}, or name another folder with --out")
    if resume and not exists:
        raise ArgumentError(f"there is no run in {folder} to go on with: start it without --resume, or mend --out")


def compare_config(folder: Path, config: dict[str, Any]) -> None:
    """Raises ArgumentError naming each setting in which the run of a folder differs from the one asked for."""
    before, now = _flat(read_json(folder / "config.json")), _flat(config)
    missing = object()
    names = [name for name in {**before, **now} if before.get(name, missing) != now.get(name, missing)]
    if names:
        told = "; ".join(f"{name}: {_said(before, name)} there, {_said(now, name)} asked for" for name in names)
        raise ArgumentError(
            f"{folder} holds a run of another configuration ({told}): ask for the same, or name another folder with --out"
        )


def clear_unfinished(folder: Path) -> None:
    """Removes files that a killed process left half written. Only the holder of the lock may do so."""
    for place in (folder, folder / "checkpoints", folder / "figures"):
        for path in place.glob(f"*{UNFINISHED}"):
            path.unlink()


def record_environment(folder: Path, environment: dict[str, Any]) -> None:
    """Writes where the run is at work; where it went on elsewhere or later is added to where it began."""
    path = folder / "environment.json"
    if path.exists():
        first = read_json(path)
        environment = {**first, "resumed": [*first.get("resumed", []), environment]}
    write_json(path, environment)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, of dotted names; the word "settings." is left out."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= _flat(item, "" if not prefix and name == "settings" else f"{prefix}{name}.")
        else:
            found[prefix + name] = item
    return found


def _said(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"
