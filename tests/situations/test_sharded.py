"""Modules of which every process keeps a part (FSDP) or a copy (DDP), on two gloo processes: exact, or told by a flipout error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED

NOISES = ("fixed", "relative", "learnable", "learnable_relative")
PAIRS = [(estimator, noise) for estimator in LISTED for noise in NOISES if estimator != "low_rank" or "relative" not in noise]
every_pair = pytest.mark.parametrize(("estimator", "noise"), PAIRS)
every_estimator = pytest.mark.parametrize("estimator", LISTED)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    pytest.importorskip("torch.distributed.fsdp", reason="needs fully_shard")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch has no torch.distributed.fsdp.fully_shard")
    folder = tmp_path_factory.mktemp("sharded")
    worker = Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker), str(folder)]
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def _require_exact(ranks: list[dict[str, Any]], name: str) -> None:
    for seen in ranks:
        assert isinstance(seen[name], list), seen[name]
        for gaps in seen[name]:
            assert gaps.pop("spread") > 0.01  # there was something to be equal in
            assert max(gaps.values()) <= EXACT, gaps


def _require_told(ranks: list[dict[str, Any]], name: str, *words: str) -> None:
    for seen in ranks:
        assert isinstance(seen[name], str), seen[name]
        assert all(word in seen[name] for word in words), seen[name]


@pytest.mark.parametrize("where", ["before", "after", "wrapper"])
@pytest.mark.parametrize("how", ["train", "hold"])
@every_pair
def test_sharded_by_fsdp2(ranks: list[dict[str, Any]], how: str, where: str, estimator: str, noise: str) -> None:
    """Outputs, members' weights, sums and gathered gradients are those of the net that is whole."""
    _require_exact(ranks, f"{how} {where} {estimator} {noise}")


@every_estimator
@pytest.mark.parametrize("noise", ["fixed", "relative"])
def test_perturbed_around_a_sharded_module(ranks: list[dict[str, Any]], estimator: str, noise: str) -> None:
    if (estimator, noise) in PAIRS:
        _require_exact(ranks, f"perturbed {estimator} {noise}")


@every_estimator
@pytest.mark.parametrize("where", ["before", "wrapper"])
def test_mixed_precision(ranks: list[dict[str, Any]], where: str, estimator: str) -> None:
    for seen in ranks:
        found = seen[f"mixed {where} {estimator}"]
        assert isinstance(found, dict), found
        assert found["relative"] < 0.03  # bfloat16 has 8 bits
        assert found["finite"]


@pytest.mark.parametrize("original", [True, False])
@every_estimator
def test_fsdp1(ranks: list[dict[str, Any]], estimator: str, original: bool) -> None:
    _require_exact(ranks, f"fsdp1 around {original} {estimator}")
    _require_told(ranks, f"fsdp1 inside {original} {estimator}", "ArgumentError", "fully_shard")
    _require_told(ranks, f"fsdp1 nested {original} {estimator}", "ArgumentError", "auto_wrap_policy")
    if original:
        _require_told(ranks, f"fsdp1 held {original} {estimator}", "Error: ", "weight")  # a draw of what is in pieces between calls
    else:
        _require_exact(ranks, f"fsdp1 held {original} {estimator}")


@pytest.mark.parametrize("where", ["around", "inside", "perturbed"])
@every_pair
def test_replicated_by_ddp(ranks: list[dict[str, Any]], where: str, estimator: str, noise: str) -> None:
    if where != "perturbed" or "learnable" not in noise:
        _require_exact(ranks, f"ddp {where} {estimator} {noise}")


def test_what_cannot_be_whole_is_told(ranks: list[dict[str, Any]]) -> None:
    _require_told(ranks, "module", "DrawError", "cannot be copied", "weights(1)")
    _require_told(ranks, "outside", "DrawError", "in pieces", "second.weight")


def test_an_evolution_strategy_on_a_sharded_module(ranks: list[dict[str, Any]]) -> None:
    _require_exact(ranks, "evolution")


@pytest.mark.parametrize("where", ["before", "after", "wrapper"])
def test_the_kl_of_a_sharded_net(ranks: list[dict[str, Any]], where: str) -> None:
    for seen in ranks:
        found = seen[f"bayes {where}"]
        assert isinstance(found, dict), found
        assert max(found.values()) <= EXACT
