"""Clocks that jump: the time that a run took, and the time that it may take, are those of a clock that only goes forward."""

import itertools
import json
import time

import pytest
from runs import Settings, assert_nothing_lost, toss

from flipout_experiments.harness.run import Run, silent
from flipout_experiments.paper.evolution import train_es

DAY = 86_400.0


@pytest.fixture
def jumping(monkeypatch):
    """The time of day goes ten days on, twenty back, ten on, ... at every look."""
    real, jumps = time.time, itertools.cycle([10 * DAY, -10 * DAY])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))


def test_a_run_is_the_same_and_its_seconds_are_those_that_went_by(undisturbed, tmp_path, jumping):
    start = time.monotonic()
    toss(tmp_path / "run")
    whole = time.monotonic() - start
    assert_nothing_lost(tmp_path / "run", undisturbed)
    seconds = json.loads((tmp_path / "run" / "result.json").read_text())["seconds"]
    assert 0 < sum(seconds.values()) <= whole


def test_a_limit_on_time_neither_ends_early_nor_never(tmp_path, jumping):
    for name, limit, generations in (("long", 3600.0, 3), ("short", 1e-9, 1)):
        settings = train_es.TrainSettings("CartPole-v1", (), 4, generations=3, judged=2, max_seconds=limit)
        with Run.open(tmp_path / name, "train-es", settings) as run:
            found = run.finish(train_es.train_es(settings, run, silent, video=False))
        assert found["generations"] == generations
        assert 0 < found["seconds"]["train"] < 60


@pytest.mark.parametrize("jump", [-10 * DAY, 0.0, 10 * DAY])
def test_tensorboard_shows_the_run_that_went_on_wherever_the_clock_was_set(tmp_path, monkeypatch, jump):
    """TensorBoard reads files in the order of the seconds in their names."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    folder, real = tmp_path / "run", time.time
    with Run.open(folder, "try", Settings(), tensorboard=True) as run, run.phase("first"):
        run.log(step=1, loss=2.0)
        run.save_checkpoint("state", {})
        run.log(step=2, loss=7.0)  # lost: after the last checkpoint
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    with Run.open(folder, "try", Settings(), resume=True, tensorboard=True) as run, run.phase("first"):
        run.log(step=2, loss=1.0)
        run.log(step=3, loss=0.5)
    found = events.EventAccumulator(str(folder / "tensorboard" / "first"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.0), (2, 1.0), (3, 0.5)]
