"""Run folders: what is in them, how a run goes on, and what is refused. Faults are in ``faults/``."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import coin
import pytest
import torch

import flipout
from flipout.errors import SaveError
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.run import Run

HERE = Path(__file__).parents[1]  # where coin.py is


def toss(folder, preset="smoke", **options):
    return reproduce.run_experiment(coin.ENTRY, preset, folder, **options)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "coin"
    sys.path.insert(0, str(HERE))
    try:
        toss(folder)
    finally:
        sys.path.remove(str(HERE))
    return folder


def without_seconds(folder: Path) -> dict:
    found = json.loads((folder / "result.json").read_text())
    assert found.pop("seconds").keys() == {"first", "second"}
    return found


def test_a_run_folder_holds_everything(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "seconds.json", "result.json", "lock"}
    config, environment = (json.loads((undisturbed / f"{name}.json").read_text()) for name in ("config", "environment"))
    assert config == {
        "experiment": "coin",
        "preset": "smoke",
        "settings": {"tosses": 20, "coin": "fair", "seed": 0, "device": "cpu", "data_dir": None},
    }
    assert {"torch", "flipout", "python", "platform", "threads", "device", "started"} <= set(environment)
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [(p, s) for p in ("first", "second") for s in range(1, 21)]
    result = without_seconds(undisturbed)
    assert sum(result["first"]) == 20
    assert {key: result[key] for key in config} == config


def test_a_finished_run_is_not_run_again(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    assert toss(folder, resume=True) == json.loads((folder / "result.json").read_text())
    assert {path: path.read_bytes() for path in before} == before


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    rate: float = 0.5
    device: str = "cpu"


def unfinished(folder: Path) -> Path:
    with Run.open(folder, "try", Settings(), preset="smoke") as run, run.phase("first"):
        run.log(step=1, loss=2.0)
        run.save_checkpoint("state", {"x": torch.ones(3)})
        run.log(step=2, loss=1.0)
    return folder


def test_each_process_is_recorded_and_seconds_add_up(tmp_path):
    folder = unfinished(tmp_path / "run")
    before = json.loads((folder / "seconds.json").read_text())["first"]
    with Run.open(folder, "try", Settings(), resume=True, preset="smoke") as run:
        assert run.resumed
        assert not run.finished
        with run.phase("first"):
            assert torch.equal(run.load_checkpoint("state")["x"], torch.ones(3))
            assert run.load_checkpoint("other") is None
        assert run.seconds["first"] > before
    assert len(json.loads((folder / "environment.json").read_text())["resumed"]) == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1  # what came after the checkpoint is logged anew


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (Settings(), {}, r"holds a run that is not finished: go on with it by --resume"),
        (Settings(seed=1), {"resume": True}, r"another configuration \(seed: 0 there, 1 asked for\)"),
        (Settings(rate=0.1), {"resume": True}, r"rate: 0\.5 there, 0\.1 asked for"),
        (Settings(), {"resume": True, "preset": "paper"}, "preset: 'smoke' there, 'paper' asked for"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path, settings, options, message):
    folder = unfinished(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    with (
        pytest.raises(flipout.ArgumentError, match=message),
        Run.open(folder, "try", settings, **{"preset": "smoke", **options}),
    ):
        pass
    assert {path: path.read_bytes() for path in before} == before


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    for name, resume, message in (
        ("file", False, "is a file"),
        ("photos", False, r"holds a\.jpg and no config\.json, so it is no run"),
        ("nothing", True, "there is no run in"),
    ):
        with pytest.raises(flipout.ArgumentError, match=message), Run.open(tmp_path / name, "try", Settings(), resume):
            pass
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [({"x": Settings()}, "more than tensors"), ({"x": lambda: 0}, "more than tensors"), ({"x": Path("a")}, "more than tensors")],
)
def test_a_state_that_could_not_be_loaded_is_refused_at_once(tmp_path, state, message):
    with Run.open(tmp_path / "run", "try", Settings()) as run, pytest.raises(flipout.ArgumentError, match=message):
        run.save_checkpoint("state", state)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_what_the_harness_asks_of_names_phases_numbers_and_results(tmp_path):
    with Run.open(tmp_path / "run", "try", Settings()) as run:
        for refused, message in (
            (lambda: run.save_checkpoint("../x", {}), "a name is of letters"),
            (lambda: run.path("x.pt"), "the run's own"),
            (lambda: run.log(step=0, loss=[1, 2]), "takes single numbers"),
            (lambda: run.log(step=0, phase="x"), "harness's own name"),
            (lambda: run.finish({"seconds": 3}), "which the run adds itself"),
            (lambda: run.finish({"x": object()}), "not for JSON"),
            (lambda: run.result, "cannot be read"),
        ):
            with pytest.raises(flipout.ArgumentError, match=message):
                refused()
        with run.phase("one"), pytest.raises(flipout.ArgumentError, match="begins inside phase 'one'"), run.phase("two"):
            pass
        run.log(step=0, loss=float("nan"), flag=True, word="x", tensor=torch.tensor(2.5))
        result = run.finish({"value": float("inf"), "shape": (1, 2)})
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {
        "step": 0, "loss": None, "flag": True, "word": "x", "tensor": 2.5,
    }  # fmt: skip
    assert result["value"] is None
    assert result["shape"] == [1, 2]


def test_figures_are_the_same_bytes_for_the_same_figure(tmp_path):
    from matplotlib.figure import Figure

    contents = []
    for name in ("a", "b"):
        figure = Figure()
        figure.subplots().plot([1, 2, 3])
        with Run.open(tmp_path / name, "try", Settings()) as run:
            contents.append([path.read_bytes() for path in run.figure("line", figure)])
    assert contents[0][0] == contents[1][0]
    assert contents[0][0][:4] == b"\x89PNG"


def test_tensorboard_files_on_request(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    folder = tmp_path / "run"
    with Run.open(folder, "try", Settings(), tensorboard=True) as run, run.phase("first"):
        run.log(step=1, loss=2.0)
        run.save_checkpoint("state", {})
        run.log(step=2, loss=7.0)  # lost: after the last checkpoint
    with Run.open(folder, "try", Settings(), resume=True, tensorboard=True) as run, run.phase("first"):
        run.log(step=2, loss=1.0)
    found = event_accumulator.EventAccumulator(str(folder / "tensorboard" / "first"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_a_missing_device_and_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(flipout.ArgumentError, match="device 'cuda:99'"), Run.open(tmp_path / "a", "t", Settings(device="cuda:99")):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be made"), Run.open(tmp_path / "file" / "run", "t", Settings()):
        pass
