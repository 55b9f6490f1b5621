"""Run folders: what is in them, how a run that was killed goes on, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import coin
import pytest
import torch

import flipout
from flipout import files
from flipout.errors import SaveError
from flipout.experiments import reproduce
from flipout.experiments.lock import FolderLock
from flipout.experiments.run import Run

HERE = Path(__file__).parent


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


#: Where a process dies: at a line of the metrics, at bytes of a file, at a file's taking its name; before, during or after.
DEATHS = [
    *(f"log {n} {when}" for n in (1, 2, 7, 20, 21, 40) for when in ("before", "torn", "after")),
    *(f"save {n} {when}" for n in (1, 2, 3, 4, 5, 9, 16, 17, 18, 31, 32, 33) for when in ("before", "torn", "after")),
    "move 33 before",
    *(f"move {n} {when}" for n in (1, 2, 3, 4, 17, 18, 31, 32) for when in ("before", "after")),
]


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deaths")
    found = subprocess.run(
        [sys.executable, str(HERE / "coin.py"), str(folder), *DEATHS], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return folder, json.loads(found.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("case", DEATHS)
def test_a_run_killed_anywhere_goes_on_to_the_same_result(case, deaths, undisturbed):
    folder, processes = deaths[0] / case.replace(" ", "-"), deaths[1][case]
    assert without_seconds(folder) == without_seconds(undisturbed)
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert not list(folder.rglob(f"*{files.UNFINISHED}"))
    assert processes == 2


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


def test_two_processes_do_not_share_a_folder(tmp_path):
    folder = unfinished(tmp_path / "run")
    lock = FolderLock(folder)
    try:
        with (
            pytest.raises(flipout.ArgumentError, match=rf"in use by another process \(number {os.getpid()}\)"),
            Run.open(folder, "try", Settings(), resume=True, preset="smoke"),
        ):
            pass
    finally:
        lock.close()
    with Run.open(folder, "try", Settings(), resume=True, preset="smoke"):
        pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[]", "not a JSON object"),
        ("checkpoints/state.pt", b"garbage", "the checkpoint .* cannot be read"),
        ("metrics.jsonl", b"", "had .* when the last checkpoint was saved"),
    ],
)
def test_damage_is_told(tmp_path, name, content, message):
    folder = unfinished(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(flipout.ArgumentError, match=message), Run.open(folder, "try", Settings(), resume=True, preset="smoke"):
        pass


def full_disk(monkeypatch):
    def write(descriptor, content):
        os.write(descriptor, bytes(content)[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_all", write)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    folder = unfinished(tmp_path / "run")
    with Run.open(folder, "try", Settings(), resume=True, preset="smoke") as run:
        with monkeypatch.context() as patch:
            full_disk(patch)
            with pytest.raises(SaveError, match=r"No space left on device\); the version saved before is kept.*--resume"):
                run.save_checkpoint("state", {"x": torch.zeros(3)})
        assert torch.equal(run.load_checkpoint("state")["x"], torch.ones(3))
        assert not list(folder.rglob(f"*{files.UNFINISHED}"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
def test_a_disk_that_is_really_full_ends_a_run_that_can_go_on(undisturbed, tmp_path):
    """The system itself refuses to write beyond so many bytes of a file, as it does on a full disk."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]); import coin\n"
        "from pathlib import Path; from flipout.errors import SaveError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1200, resource.RLIM_INFINITY))\n"
        "try: coin.reproduce.run_experiment(coin.ENTRY, 'smoke', Path(sys.argv[1]))\n"
        "except SaveError as error: sys.exit(f'SaveError: {error}')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(HERE)], capture_output=True, text=True, check=False
    )
    assert found.stderr.startswith("SaveError: ")
    assert "File too large" in found.stderr
    toss(tmp_path / "run", resume=True)
    assert without_seconds(tmp_path / "run") == without_seconds(undisturbed)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


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


def test_an_error_inside_leaves_a_run_that_can_go_on(tmp_path):
    def broken():
        with Run.open(tmp_path / "run", "try", Settings()) as run, run.phase("first"):
            run.save_checkpoint("state", {"x": 1})
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        broken()
    with Run.open(tmp_path / "run", "try", Settings(), resume=True) as run:
        assert run.load_checkpoint("state") == {"x": 1}


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
