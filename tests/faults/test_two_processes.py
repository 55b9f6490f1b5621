"""Two processes at one place: one works, the other is told which, and nothing of either is mixed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import coin
import crowd
import pytest
from runs import assert_nothing_lost, contents, resumed, toss, unfinished

import flipout
from flipout.errors import SaveError
from flipout.storage import files
from flipout_experiments.harness.lock import FolderLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and stops processes")

#: Tosses coins, and stops in the second phase, as a process does that waits for a disk.
STOPPED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import coin
from flipout_experiments.harness import reproduce

def stop(phase, done, total):
    if (phase, done) == ("second", 8):
        os.kill(os.getpid(), signal.SIGSTOP)

reproduce.run_experiment(coin.ENTRY, "smoke", Path(sys.argv[1]), progress=stop)
"""


def test_a_folder_at_which_another_process_works_is_refused_until_that_is_gone(undisturbed, tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", STOPPED, str(folder), str(Path(coin.__file__).parent)])
    try:
        _, status = os.waitpid(other.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        before = contents(folder)
        for options in ({"resume": True}, {}):
            with pytest.raises(flipout.ArgumentError, match=rf"in use by another process \(number {other.pid}\)|holds a run"):
                toss(folder, **options)
        assert contents(folder) == before
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    toss(folder, resume=True)  # the lock went with the process
    assert_nothing_lost(folder, undisturbed)


def test_a_lock_is_told_with_the_number_of_its_holder(tmp_path):
    folder = unfinished(tmp_path / "run")
    lock = FolderLock(folder)
    try:
        with (
            pytest.raises(flipout.ArgumentError, match=rf"in use by another process \(number {os.getpid()}\): wait for it, or"),
            resumed(folder),
        ):
            pass
    finally:
        lock.close()
    with resumed(folder):
        pass


def test_a_lock_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "run" / FolderLock.NAME).mkdir(parents=True)
    with pytest.raises(SaveError, match=r"lock could not be written"):
        toss(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FolderLock.NAME]


def test_of_many_that_begin_at_once_one_runs_and_files_are_never_mixed(undisturbed, tmp_path):
    found = subprocess.run([sys.executable, crowd.__file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    folder, file = found.stdout.splitlines()
    assert folder == "[0, 1, 1, 1]", found.stderr
    assert_nothing_lost(tmp_path / "run", undisturbed)
    assert file == "[0, 0, 0]", found.stderr
    assert not list(tmp_path.glob(f"*{files.UNFINISHED}"))
