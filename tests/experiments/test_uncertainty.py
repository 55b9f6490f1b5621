"""The experiment on uncertainty at its smallest: what it records, and that a killed run goes on to the same end."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flipout
from flipout import data
from flipout_experiments.commands.app import app
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.run import Run
from flipout_experiments.paper import uncertainty
from flipout_experiments.paper.uncertainty import METHODS, UncertaintySettings, strange_inputs

ENTRY = reproduce.find_entry("uncertainty")
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist_uncertainty.py"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncertainty") / "run"
    return reproduce.run_experiment(ENTRY, "smoke", folder), folder


def test_every_method_has_every_number_with_its_interval(smoke):
    result, folder = smoke
    assert set(result["methods"]) == set(METHODS)
    assert set(result["beyond_point"]) == set(METHODS) - {"point"}
    names = {"accuracy", "nll", "ece", "brier", *(f"auroc {name}" for name in result["strange"])}
    for method, numbers in result["methods"].items():
        assert set(numbers) == names
        for name, found in numbers.items():
            seeds = [each[name] for each in result["seeds"][method]]
            assert len(seeds) == 2
            assert found["value"] == pytest.approx(sum(seeds) / 2)
            assert found["low"] <= found["value"] <= found["high"]
        assert sum(row[0] for row in result["reliability"][method][0]) == 100
    assert {path.name for path in (folder / "figures").iterdir()} == {"uncertainty.png", "uncertainty.svg"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [60])
def test_a_killed_run_goes_on_to_the_same_end(smoke, tmp_path, monkeypatch, at):
    result, folder = smoke
    real, calls = uncertainty._Seed._loss, 0

    def mortal(self, *args):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(uncertainty, "_SAVE", 2)
    monkeypatch.setattr(uncertainty._Seed, "_loss", mortal)
    with pytest.raises(Killed):
        reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run")
    monkeypatch.setattr(uncertainty._Seed, "_loss", real)
    again = reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run", resume=True)
    assert {**again, "seconds": None} == {**result, "seconds": None}
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


def test_fashion_is_asked_where_the_folder_has_it(tmp_path, monkeypatch):
    fashion = data.embedded_mnist(seed=5)
    monkeypatch.setattr(uncertainty, "fashion_mnist", lambda **where: fashion)
    _, strange = uncertainty._load(UncertaintySettings.preset("smoke"))
    assert list(strange) == ["rotated", "noisy", "fashion"]
    assert len(strange["fashion"]) == 100


def test_strange_inputs_are_digits_in_disguise():
    digits = data.embedded_mnist().test.inputs[:20]
    found = strange_inputs(digits, UncertaintySettings())
    assert torch.equal(found["rotated"].rot90(-1, (-2, -1)), digits)
    assert found["noisy"].min() >= 0
    assert found["noisy"].max() <= 1
    assert torch.equal(found["noisy"], strange_inputs(digits, UncertaintySettings())["noisy"])
    assert not torch.equal(found["noisy"], strange_inputs(digits, UncertaintySettings(seed=1))["noisy"])


def test_the_members_of_the_ensemble_start_apart_and_its_first_is_the_point_estimate(tmp_path):
    settings = replace(UncertaintySettings.preset("smoke"), steps=2)
    digits, strange = uncertainty._load(settings)
    with Run.open(tmp_path / "run", "uncertainty", settings) as run:
        seed = uncertainty._Seed(settings, digits, strange, 0, run, lambda done, total: None)
        nets = [seed.train("point", index) for index in (0, 1, 0)]
    first, second, again = (net.fc1.weight for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("method", "message"), [("point", "after 0 steps"), ("flipout", "the loss is nan")])
def test_a_loss_that_is_no_number_stops_it(tmp_path, monkeypatch, method, message):
    settings = UncertaintySettings.preset("smoke")
    digits, strange = uncertainty._load(settings)
    monkeypatch.setattr(uncertainty, "mean_loss", lambda net, batch: net(batch[0]).sum() * float("nan"))
    with Run.open(tmp_path / "run", "uncertainty", settings) as run:
        seed = uncertainty._Seed(settings, digits, strange, 0, run, lambda done, total: None)
        with pytest.raises(flipout.NotFiniteError, match=message):
            seed.train(method)


def test_the_command_prints_tables(tmp_path):
    found = CliRunner(env={"COLUMNS": "220"}).invoke(
        app, ["reproduce", "uncertainty", "--preset", "smoke", "--out", str(tmp_path / "run")]
    )
    assert found.exit_code == 0, found.output
    for text in ("Beyond the point estimate", "auroc rotated", "ensemble", "LRT", "result.json"):
        assert text in found.output


def test_the_example_draws_its_figure(tmp_path, monkeypatch, capsys):
    figure = tmp_path / "digits.png"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "5", "--samples", "2", "--out", str(figure)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "calibration error" in capsys.readouterr().out
    assert figure.stat().st_size > 10_000
