"""What the tests of faults share: runs to disturb, and what is left of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import coin
import torch

from flipout.storage import files
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.run import Run


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    device: str = "cpu"


def toss(folder: Path, **options):
    return reproduce.run_experiment(coin.ENTRY, "smoke", folder, **options)


def unfinished(folder: Path) -> Path:
    """A run with one line before its checkpoint and one after it."""
    with Run.open(folder, "try", Settings()) as run, run.phase("first"):
        run.log(step=1, loss=2.0)
        run.save_checkpoint("state", {"x": torch.ones(3)})
        run.log(step=2, loss=1.0)
    return folder


def resumed(folder: Path, **options):
    return Run.open(folder, "try", Settings(), resume=True, **options)


def outcome(folder: Path) -> dict:
    """The result without what the clock says."""
    found = json.loads((folder / "result.json").read_text())
    assert all(value >= 0 for value in found.pop("seconds").values())
    return found


def assert_nothing_lost(folder: Path, whole: Path) -> None:
    """A run that was disturbed and went on is, to the byte of its metrics, the one that was not."""
    assert outcome(folder) == outcome(whole)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not list(folder.rglob(f"*{files.UNFINISHED}"))


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder but its lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
