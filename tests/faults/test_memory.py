"""Batches that memory does not hold: one error that says what is kept, and a run that goes on where there is more."""

import subprocess
import sys
from pathlib import Path

import coin
import numpy as np
import pytest
import torch
from runs import assert_nothing_lost, toss

from flipout.errors import OutOfMemoryError
from flipout_experiments.harness.memory import shortage_told

HUNGRY = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import coin, torch
from flipout.errors import OutOfMemoryError
from flipout_experiments.harness import reproduce

def batch(phase, done, total):
    if (phase, done) == ("second", 8):
        torch.empty(2**33, dtype=torch.uint8)

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
try:
    reproduce.run_experiment(coin.ENTRY, "smoke", Path(sys.argv[1]), progress=batch)
except OutOfMemoryError as error:
    sys.exit(f"OutOfMemoryError: {error}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by setrlimit, and reads /proc")
def test_a_run_that_memory_does_not_hold_goes_on_where_there_is_more(undisturbed, tmp_path):
    command = [sys.executable, "-c", HUNGRY, str(tmp_path / "run"), str(Path(coin.__file__).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stderr.startswith("OutOfMemoryError: memory does not suffice (DefaultCPUAllocator: can't allocate memory"), (
        found.stderr
    )
    assert "up to its last checkpoint is kept" in found.stderr
    toss(tmp_path / "run", resume=True)
    assert_nothing_lost(tmp_path / "run", undisturbed)


def accelerator():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), "allocate"),
        (lambda: np.empty(2**60, np.uint8), "Unable to allocate"),
        (lambda: bytearray(2**62), "MemoryError"),
        (accelerator, r"CUDA out of memory\. Tried to allocate 20\.00 GiB"),
    ],
)
def test_whoever_runs_out_of_memory_it_is_one_error(work, told, tmp_path):
    message = rf"memory does not suffice \(.*{told}.*is kept\. Go on with it by --resume"
    with pytest.raises(OutOfMemoryError, match=message), shortage_told(tmp_path):
        work()


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), shortage_told(tmp_path):
        torch.ones(2, 3) @ torch.ones(2, 3)
