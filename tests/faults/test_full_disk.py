"""Full disks: the file that was there before is kept, the error says so, and a run goes on once there is room."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import coin
import pytest
import runs
import torch
from runs import assert_nothing_lost, resumed, toss, unfinished

from flipout.data.sources import Remote, fetch
from flipout.errors import DownloadError, SaveError
from flipout.evolution import EvolutionStrategy, load_checkpoint, save_checkpoint
from flipout.storage import files
from flipout_experiments.language.lm import lm_settings, run_lm
from flipout_experiments.report import write_report


def fills_after(monkeypatch, calls: int) -> None:
    """A disk that takes so many more files, and one byte of the next."""
    real = files.write_all

    def write(descriptor, content):
        nonlocal calls
        calls -= 1
        if calls >= 0:
            return real(descriptor, content)
        os.write(descriptor, bytes(content)[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_all", write)


def test_the_last_good_checkpoint_is_kept(tmp_path, monkeypatch):
    folder = unfinished(tmp_path / "run")
    with resumed(folder) as run:
        with monkeypatch.context() as patch:
            fills_after(patch, 0)
            with pytest.raises(SaveError, match=r"No space left on device\); the version saved before is kept.*what was saved"):
                run.save_checkpoint("state", {"x": torch.zeros(3)})
        assert torch.equal(run.load_checkpoint("state")["x"], torch.ones(3))
        assert not list(folder.rglob(f"*{files.UNFINISHED}"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
def test_a_disk_that_is_really_full_ends_a_run_that_can_go_on(undisturbed, tmp_path):
    """The system itself refuses to write beyond so many bytes of a file, as it does on a full disk."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]); import coin\n"
        "from pathlib import Path; from flipout.errors import SaveError; from flipout_experiments.harness import reproduce\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1200, resource.RLIM_INFINITY))\n"
        "try: reproduce.run_experiment(coin.ENTRY, 'smoke', Path(sys.argv[1]))\n"
        "except SaveError as error: sys.exit(f'SaveError: {error}')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(Path(coin.__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stderr.startswith("SaveError: ")
    assert "File too large" in found.stderr
    toss(tmp_path / "run", resume=True)
    assert_nothing_lost(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 8, 20, 32])
def test_a_run_goes_on_once_there_is_room(room, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fills_after(patch, room)
        with pytest.raises(SaveError, match="No space left on device"):
            toss(tmp_path / "run")
    toss(tmp_path / "run", resume=(tmp_path / "run" / "config.json").exists())
    assert_nothing_lost(tmp_path / "run", undisturbed)


def test_a_language_model_goes_on_once_there_is_room(tmp_path, monkeypatch):
    path = tmp_path / "own.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 12, encoding="utf-8")
    settings = lm_settings(path, units=4, epochs=2)
    settings = replace(settings, training=replace(settings.training, batch=4, window=10, save_steps=4))
    run_lm(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fills_after(patch, 6)
        with pytest.raises(SaveError, match="the version saved before is kept"):
            run_lm(settings, tmp_path / "full")
    run_lm(settings, tmp_path / "full", resume=True)
    assert_nothing_lost(tmp_path / "full", tmp_path / "whole")


def test_a_checkpoint_of_evolution_is_as_it_was(tmp_path, monkeypatch):
    es = EvolutionStrategy(torch.nn.Linear(3, 1), 0.1, 8)
    save_checkpoint(tmp_path / "es.pt", es)
    weights = es.module.weight.detach().clone()
    with monkeypatch.context() as patch, torch.no_grad():
        fills_after(patch, 0)
        es.module.weight.zero_()
        with pytest.raises(SaveError, match="the version saved before is kept"):
            save_checkpoint(tmp_path / "es.pt", es)
    load_checkpoint(tmp_path / "es.pt", es)
    assert torch.equal(es.module.weight, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["es.pt"]


def test_a_report_is_as_it_was(undisturbed, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("the old one")
    fills_after(monkeypatch, 0)
    with pytest.raises(SaveError, match=r"report\.html could not be written .* the version saved before is kept"):
        write_report([undisturbed], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "the old one"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be made"):
        toss(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == ""


def test_a_download_that_finds_no_room_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    import pooch

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    remote = Remote("d", ("http://127.0.0.1:9",), {"a": "md5:00"})
    with pytest.raises(DownloadError, match=r"a could not be downloaded .*OSError, No space left on device"):
        fetch(remote, "a", tmp_path)
    assert not list((tmp_path / "d").iterdir())


def test_metrics_are_cut_where_the_last_whole_line_ends(tmp_path, monkeypatch):
    from flipout_experiments.harness import metrics_file as metrics

    real, left = metrics.write_all, 3

    def write(descriptor, content):
        nonlocal left
        left -= 1
        if left >= 0:
            return real(descriptor, content)
        real(descriptor, content[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with runs.Run.open(tmp_path / "run", "try", runs.Settings()) as run:
        monkeypatch.setattr(metrics, "write_all", write)
        for step in range(3):
            run.log(step=step, loss=1.0)
        with pytest.raises(SaveError, match=r"metrics\.jsonl could not be written"):
            run.log(step=3, loss=1.0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
