"""Processes at one place, for ``test_two_processes.py``: ``crowd.py FOLDER``."""

import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import coin
import torch

from flipout.errors import ArgumentError
from flipout.storage.states import read_state, write_state
from flipout_experiments.harness import reproduce


def together(count: int, work) -> list[int]:
    """Runs ``work(i)`` in so many forked processes at once; returns their exit codes."""
    children = []
    for i in range(count):
        if (child := os.fork()) == 0:
            code = 9
            try:
                code = work(i)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def one_folder(folder: Path) -> list[int]:
    """All begin a run in one folder that is not there yet."""

    def run(i: int) -> int:
        try:
            reproduce.run_experiment(coin.ENTRY, "smoke", folder / "run")
        except ArgumentError as error:
            return 1 if "in use by another process" in str(error) or "holds a" in str(error) else 2
        return 0

    return together(4, run)


def one_file(path: Path) -> list[int]:
    """Two save states under one name, a third reads: always a whole state of either."""
    write_state(path, {"x": torch.zeros(5000)})

    def use(i: int) -> int:
        for _ in range(60):
            if i < 2:
                write_state(path, {"x": torch.full((5000,), float(i))}, prove=False)
            elif len(read_state(path)["x"].unique()) != 1:
                return 1
        return 0

    return together(3, use)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    print(sorted(one_folder(place)), one_file(place / "state.pt"), sep="\n")
