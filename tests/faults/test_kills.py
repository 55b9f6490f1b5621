"""SIGKILL at any moment: in training, in evolution, in the middle of a checkpoint. What goes on ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import deaths
import pytest
import torch
from deaths import DEATHS
from runs import Settings, assert_nothing_lost, resumed

from flipout.storage.states import read_state
from flipout_experiments.harness.run import Run

fcntl = pytest.importorskip("fcntl", reason="kills forked processes")

CASES = [(work.__name__, case) for work, cases in DEATHS.items() for case in cases]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """All deaths, once for all processes in which pytest-xdist may run these tests."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.mktemp("deaths") if session is None else tmp_path_factory.getbasetemp().parent / f"deaths-{session}"
    folder.mkdir(exist_ok=True)
    with open(folder / "turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not (folder / "took.json").exists():
            text = folder / "own.txt"
            text.write_text("The quick brown fox jumps over the lazy dog.\n" * 12, encoding="utf-8")
            found = subprocess.run([sys.executable, deaths.__file__, folder, text], capture_output=True, text=True, check=False)
            assert found.returncode == 0, found.stderr
            (folder / "took.json").write_text(found.stdout)
    return folder, json.loads((folder / "took.json").read_text())


def place(killed, work, case) -> Path:
    folder, processes = killed
    assert processes[work][case] == 2  # it was killed, and another process went on
    return folder / work / case.replace(" ", "-")


@pytest.mark.parametrize(("work", "case"), [each for each in CASES if each[0] != "evolution"])
def test_a_run_killed_anywhere_goes_on_to_the_same_result(killed, work, case):
    assert_nothing_lost(place(killed, work, case), killed[0] / work / "whole")


@pytest.mark.parametrize(("work", "case"), [each for each in CASES if each[0] == "evolution"])
def test_evolution_killed_anywhere_goes_on_to_the_same_weights_and_moments(killed, work, case):
    mine, whole = (read_state(folder / "es.pt") for folder in (place(killed, work, case), killed[0] / work / "whole"))
    assert mine["strategy"] == whole["strategy"]
    assert mine["strategy"]["generation"] == 6
    for name, weight in whole["module"].items():
        assert torch.equal(mine["module"][name], weight)
    for parameter, moments in whole["optimiser"]["state"].items():
        assert all(torch.equal(mine["optimiser"]["state"][parameter][name], moment) for name, moment in moments.items())


def test_an_error_inside_leaves_a_run_that_can_go_on(tmp_path):
    def broken():
        with Run.open(tmp_path / "run", "try", Settings()) as run, run.phase("first"):
            run.save_checkpoint("state", {"x": 1})
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        broken()
    with resumed(tmp_path / "run") as run:
        assert run.load_checkpoint("state") == {"x": 1}
