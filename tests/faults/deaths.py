"""Processes that kill themselves (SIGKILL) at a named place, and others that go on with what they left.

As a script, ``deaths.py FOLDER TEXT`` does so with every work and every case, forking from one process so that it is quick, and
prints for each how many processes it took. ``"save 7 torn"`` is the seventh time that a file is written, half of it; ``"log"`` is a
line of the metrics, ``"move"`` a file's taking its name; ``"before"`` and ``"after"`` are what they say.
"""

import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import coin
import gymnasium  # noqa: F401  (before the forks, which would each import it)
import torch
import torch._dynamo  # optimisers import it at their first step
from matplotlib import figure  # noqa: F401
from torch import nn

from flipout.evolution import (
    EvolutionStrategy,
    load_checkpoint,
    rollouts,  # noqa: F401
    save_checkpoint,
)
from flipout.storage import files
from flipout_experiments.harness import metrics_file as metrics
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.run import Run, silent
from flipout_experiments.language import lm
from flipout_experiments.paper.evolution import train_es


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(what: str, count: int, when: str) -> None:
    """Replaces what writes lines (log) or files (save), or moves them, by one that ends the process at its so-manieth call."""
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


# --- works: a folder, and what is done in it, from the beginning or from where it stands ---------------------------------------


def coins(place: Path, text: Path) -> None:
    reproduce.run_experiment(coin.ENTRY, "smoke", place, resume=begun(place))


def table(place: Path, text: Path) -> None:
    """A row of the table of regularised language models."""
    entry = reproduce.find_entry("regularization")
    reproduce.run_experiment(entry, "smoke", place, level="char", method="gaussian-flipout", resume=begun(place))


def own_text(place: Path, text: Path) -> None:
    """``flipout lm``."""
    settings = lm.lm_settings(text, units=4, epochs=2)
    lm.run_lm(replace(settings, training=replace(settings.training, batch=4, window=10, save_steps=4)), place, begun(place))


def policy(place: Path, text: Path) -> None:
    """``flipout train-es``."""
    settings = train_es.TrainSettings("CartPole-v1", (4,), 8, generations=5, judged=4, save_every=2)
    with Run.open(place, "train-es", settings, begun(place)) as run:
        if not run.finished:
            run.finish(train_es.train_es(settings, run, silent, video=False))


def evolution(place: Path, text: Path) -> None:
    """A loop of a user's own around ``save_checkpoint``."""
    place.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    es = EvolutionStrategy(module, 0.1, 32, seed=3, members_per_base=8)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    if (place / "es.pt").exists():
        load_checkpoint(place / "es.pt", es, optimiser=optimiser)
    x = torch.linspace(-1, 1, 12).view(4, 3)
    while es.generation < 6:
        es.step(lambda module, members: members.mean(-(module(members.expand(x)) - 1).square()))
        optimiser.step()
        save_checkpoint(place / "es.pt", es, optimiser=optimiser)


def begun(place: Path) -> bool:
    return (place / "config.json").exists()


#: Each work, and where it is killed.
DEATHS = {
    coins: (
        *(f"log {n} {when}" for n in (1, 2, 7, 20, 21, 40) for when in ("before", "torn", "after")),
        *(f"save {n} {when}" for n in (1, 2, 3, 4, 5, 9, 16, 17, 18, 31, 32, 33) for when in ("before", "torn", "after")),
        "move 33 before",
        *(f"move {n} {when}" for n in (1, 2, 3, 4, 17, 18, 31, 32) for when in ("before", "after")),
    ),
    table: ("save 7 torn", "move 10 before", "log 2 torn", "save 28 torn"),
    own_text: ("save 7 torn", "move 10 before", "log 2 torn"),
    policy: ("log 2 torn", "log 4 after", "save 3 torn", "move 4 before", "move 6 after"),
    evolution: ("save 1 torn", "move 1 before", "save 4 before", "save 4 torn", "move 4 before", "move 4 after", "save 6 after"),
}


def killed_and_resumed(work, place: Path, text: Path, case: str) -> int:
    """A work that dies at the place the case names, and goes on until it is done. Returns how many processes that took."""
    what, count, when = case.split()

    def die_once() -> None:
        die_at(what, int(count), when)
        work(place, text)

    if in_child(die_once) == 0:
        return 1
    assert in_child(lambda: work(place, text)) == 0
    return 2


if __name__ == "__main__":
    sys.modules["deaths"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    root, text = map(Path, sys.argv[1:])
    took: dict[str, dict[str, int]] = {}
    for work, cases in DEATHS.items():
        (root / work.__name__).mkdir()
        assert in_child(lambda work=work: work(root / work.__name__ / "whole", text)) == 0
        took[work.__name__] = {
            case: killed_and_resumed(work, root / work.__name__ / case.replace(" ", "-"), text, case) for case in cases
        }
    print(json.dumps(took))
