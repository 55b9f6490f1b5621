"""An experiment for the tests of the harness: tosses coins, in two phases, and dies when it is told to.

As a script, ``coin.py FOLDER "log 7 torn" ...`` runs it once for each case, in a process that kills itself (SIGKILL) at the seventh
line of the metrics, half of it written, and then in another that goes on.
"""

import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from flipout import files
from flipout.experiments import metrics, reproduce
from flipout.experiments.reproduce import Entry, Experiment, Option, choose

ENTRY = Entry("coin", "heads are half", "Figure 0", "coin", (Option("coin", ("fair", "bent"), "Which coin."),))


@dataclass(frozen=True)
class CoinSettings:
    tosses: int
    coin: str = "fair"
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None

    @classmethod
    def preset(cls, name, **options):
        return cls(choose(name, {"smoke": 20, "laptop": 60, "paper": 10_000}, "preset"), **options)


def run_coin(settings, run, progress):
    generator = torch.Generator().manual_seed(settings.seed)
    found = {}
    for phase, chance in (("first", 0.5), ("second", 0.5 if settings.coin == "fair" else 0.9)):
        with run.phase(phase, progress) as report:
            state = run.load_checkpoint(phase) or {"done": 0, "heads": torch.zeros(2), "generator": generator.get_state()}
            generator.set_state(state["generator"])
            for done in range(state["done"] + 1, settings.tosses + 1):
                state["heads"][int(torch.rand((), generator=generator) < chance)] += 1
                run.log(step=done, heads=state["heads"][1], share=float(state["heads"][1]) / done)
                if done % 3 == 0 or done == settings.tosses:
                    run.save_checkpoint(phase, {**state, "done": done, "generator": generator.get_state()})
                report(done, settings.tosses)
        found[phase] = state["heads"]
    return found


def show_coin(result, console):
    console.print(f"heads: {result['first'][1]:.0f}, then {result['second'][1]:.0f}")


EXPERIMENT = Experiment(CoinSettings.preset, run_coin, show_coin)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(what: str, count: int, when: str) -> None:
    """Replaces what writes lines (log) or files (save) by one that ends the process at its so-manieth call."""
    module, name = {"log": (metrics, "write_all"), "save": (files, "write_all"), "move": (files.os, "replace")}[what]
    real, calls = getattr(module, name), 0

    def last(target, content):
        nonlocal calls
        calls += 1
        if calls < count:
            return real(target, content)
        if when == "torn":
            os.write(target, bytes(content)[: len(content) // 2])
        elif when == "after":
            real(target, content)
        return die()

    setattr(module, name, last)


def in_child(work) -> int:
    """Runs ``work()`` in a forked process; returns the signal that ended it, or 0."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WEXITSTATUS(status), "the run in a child failed"
    return os.WTERMSIG(status)


def killed_and_resumed(folder: Path, case: str) -> int:
    """A run that dies at the place the case names, and goes on until it is finished. Returns how many processes that took."""
    what, count, when = case.split()

    def die_once() -> None:
        die_at(what, int(count), when)
        reproduce.run_experiment(ENTRY, "smoke", folder)

    if in_child(die_once) == 0:
        return 1
    resume = (folder / "config.json").exists()
    assert in_child(lambda: reproduce.run_experiment(ENTRY, "smoke", folder, resume=resume) and None) == 0
    return 2


if __name__ == "__main__":
    sys.modules["coin"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    place, *cases = sys.argv[1:]
    print(json.dumps({case: killed_and_resumed(Path(place, case.replace(" ", "-")), case) for case in cases}))
