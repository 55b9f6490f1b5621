"""What does ``import flipout`` cost beside ``import torch``, which it needs anyway?"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.harness import MIN_ROUNDS, PATIENCE, race
from benchmarks.report import Section

BOUND = 1.15

TEXT = """A fresh interpreter that imports and exits, from its start to its end; one after the other in each round. `flipout`
imports torch and numpy, and of its own what a forward pass needs and the names of its uses."""


def fresh(statement: str) -> None:
    """Runs a statement in an interpreter of its own."""
    subprocess.run([sys.executable, "-c", statement], check=True)


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races the two imports, each in fresh processes."""
    section = Section("imports", "Import", TEXT)
    statements = ("import torch", "import flipout")
    timings = race({statement: partial(fresh, statement) for statement in statements}, rounds=rounds, patience=patience)
    section.add_race("fresh process", timings)
    section.add_target("import flipout / import torch", timings["import flipout"], BOUND)
    return section


if __name__ == "__main__":
    print(run().markdown())
