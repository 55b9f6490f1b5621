"""The registry of experiments, its commands, and the variance experiments at their smallest."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import coin
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flipout
from flipout import data
from flipout.intervals import Estimate
from flipout.streams import stream
from flipout.variance import VarianceComponents, VarianceCurve, variance_components
from flipout_experiments.commands import reproduce_command as reproduce_commands
from flipout_experiments.commands.app import app
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.claims import from_json
from flipout_experiments.harness.run import silent
from flipout_experiments.nets.networks import FullyConnected
from flipout_experiments.nets.pretrain import PretrainingSettings, mean_loss, pretrain_classifier
from flipout_experiments.paper.variance.measured_curves import VarianceSettings
from flipout_experiments.paper.variance.predicted_curves import ComponentsSettings

HERE = Path(__file__).parents[1]  # where coin.py is
NETS = ("fc", "convle", "convgg", "lstm")
PANELS = {
    "fc": {"FC1", "FC2", "FC3"},
    "convle": {"Conv1", "Conv2", "FC1", "FC2"},
    "convgg": {"Conv1", "Conv8"},
    "lstm": {"W_f", "W_i", "W_o", "W_c"},
}


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder in CIFAR-10's format, for no package ships the set itself."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 64), ("test_batch.bin", 16)):
        rows = generator.integers(256, size=(count, 3073))
        rows[:, 0] %= 10
        (folder / name).write_bytes(rows.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def variance(tmp_path_factory, pictures):
    """The result of each net, and its folder."""
    found, entry = {}, reproduce.find_entry("variance")
    for net in NETS:
        folder, where = tmp_path_factory.mktemp("variance") / net, pictures if net == "convgg" else None
        found[net] = reproduce.run_experiment(entry, "smoke", folder, net=net, data_dir=where), folder
    return found


@pytest.mark.parametrize("net", NETS)
def test_variance_has_every_layer_of_the_figure_under_every_estimator(variance, net):
    result, folder = variance[net]
    assert set(result["panels"]) == PANELS[net]
    curve = VarianceCurve.from_dict(result["curve"])
    local = {"local_reparameterization"} if net == "fc" else set()
    assert set(curve.points) == {"shared", "flipout", "independent"} | local
    for names in result["panels"].values():
        for name in curve.points:
            assert all(value > 0 for value in curve.values(name, names))
    for summary in result["summary"].values():
        assert {"shared / flipout", "flipout / independent"} == set(summary["ratio"])
        assert isinstance(from_json(summary["slope"]["flipout"]), Estimate)
    assert {path.name for path in (folder / "figures").iterdir()} == {"variance.png", "variance.svg"}
    assert result["data"]
    assert result["pretraining"]["steps"] == 4


def test_parts_of_the_lstm_are_its_gates(variance):
    """The four parts are all rows of the first layer's recurrent matrix, so their variances add up to its own."""
    curve = VarianceCurve.from_dict(variance["lstm"][0]["curve"])
    gates = curve.values("flipout", ["W_i", "W_f", "W_c", "W_o"])
    whole = curve.values("flipout", ["lstm.weight_hh_l0"])
    assert [float(v) for v in gates] == pytest.approx([float(v) for v in whole])


def test_a_smaller_measurement_goes_on_where_it_was_killed(variance, tmp_path):
    """The finished blocks and phases of a folder are kept; what is lost is drawn again, to the same numbers."""
    result, folder = variance["fc"]
    copied = shutil.copytree(folder, tmp_path / "run")
    (copied / "result.json").unlink()
    (copied / "checkpoints" / "independent.pt").unlink()
    blocks = json.loads((copied / "checkpoints" / "curve-flipout.json").read_text())
    blocks["blocks"]["flipout/16"] = []
    (copied / "checkpoints" / "curve-flipout.json").write_text(json.dumps(blocks))
    again = reproduce.run_experiment(reproduce.find_entry("variance"), "smoke", copied, net="fc", resume=True)
    assert {**again, "seconds": None} == {**result, "seconds": None}


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components") / "run"
    return reproduce.run_experiment(reproduce.find_entry("components"), "smoke", folder, net="fc"), folder


def test_components_have_predictions_beside_every_point(components):
    result, folder = components
    assert set(result["components"]) == PANELS["fc"] | {"all weights"}
    assert len(result["points"]) == 4 * 2 * 3  # panels, estimators, sizes
    assert result["within"] == sum(point["within"] for point in result["points"]) / 24
    found = VarianceComponents.from_dict(result["suggestion"]["components"])
    assert found.alpha.as_dict() == result["components"]["all weights"]["alpha"]
    assert (folder / "figures" / "components.svg").exists()


def test_commands_print_tables_and_a_finished_run_is_shown_again(tmp_path):
    for name, texts in (
        ("variance", ("FC1: variance of the gradient", "slope", "shared / flipout at N = 16", "result.json")),
        ("components", ("Theorem 2", "alpha", "a batch is worth half", "predicted within the interval")),
    ):
        arguments = ("reproduce", name, "--net", "fc", "--preset", "smoke", "--out", str(tmp_path / name))
        first = run(*arguments)
        assert first.exit_code == 0, first.output
        for text in texts:
            assert text in first.output
        again = run(*arguments, "--resume")
        assert "nothing was left to do" in again.output
        assert re.search(texts[0], again.output)


def test_list_names_every_experiment_and_its_options():
    found = run("reproduce", "list").output
    for entry in reproduce.ENTRIES:
        assert entry.name in found
        assert all(choice in found for option in entry.options for choice in option.choices)
    assert all(preset in found for preset in reproduce.PRESETS)


@pytest.mark.parametrize("entry", reproduce.ENTRIES, ids=lambda entry: entry.name)
def test_every_experiment_has_help_and_loads(entry):
    found = run("reproduce", entry.name, "--help")
    assert found.exit_code == 0
    assert all(f"--{option.name}" in found.output for option in entry.options)
    assert callable(entry.load().run)


def test_an_experiment_is_a_module_and_a_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    commands = reproduce_commands.typer.Typer()
    reproduce_commands.add_command(commands, coin.ENTRY)
    reproduce_commands.add_command(commands, replace(coin.ENTRY, name="again"))
    found = CliRunner().invoke(commands, ["coin", "--coin", "bent", "--preset", "smoke", "--out", str(tmp_path / "run")])
    assert found.exit_code == 0, found.output
    assert "heads: " in found.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["coin"] == "bent"


def test_an_interrupt_tells_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    commands = reproduce_commands.typer.Typer()
    reproduce_commands.add_command(commands, coin.ENTRY)
    reproduce_commands.add_command(commands, replace(coin.ENTRY, name="again"))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce_commands, "run_experiment", interrupted)
    found = CliRunner(env={"COLUMNS": "300"}).invoke(commands, ["coin", "--out", str(tmp_path / "a b"), "--tensorboard"])
    assert found.exit_code == 130
    assert "--preset laptop" in found.output
    assert f"--out '{tmp_path / 'a b'}' --device cpu --seed 0 --tensorboard --resume" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset 'huge' is unknown: choose smoke, laptop, paper"),
        ({"net": "resnet"}, "net 'resnet' is unknown: choose fc, convle, convgg, lstm"),
        ({"colour": "red"}, "option 'colour' is unknown: choose net"),
        ({"data_dir": Path("no/such/folder")}, r"--data-dir no/such/folder: no such folder"),
    ],
)
def test_what_is_unknown_is_told_with_what_there_is(tmp_path, arguments, message):
    with pytest.raises(flipout.ArgumentError, match=message):
        reproduce.run_experiment(reproduce.find_entry("variance"), **{"preset": "smoke", "folder": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


def test_unknown_experiments_and_missing_modules(tmp_path):
    with pytest.raises(flipout.ArgumentError, match="experiment 'figure-9' is unknown: choose variance, components"):
        reproduce.find_entry("figure-9")
    with pytest.raises(flipout.ArgumentError, match=r"has no module flipout_experiments\.paper\.nothing"):
        reproduce.Entry("nothing", "", "", "flipout_experiments.paper.nothing").load()


@pytest.mark.parametrize("net", NETS)
def test_presets_have_the_papers_settings(net):
    """Sec. 4.1 and Appendix C: N to 8192, 200 draws in each of 50 runs, 90 % intervals, multiplicative noise of variance 1."""
    paper = VarianceSettings.preset("paper", net)
    assert paper.curve.batch_sizes == tuple(2**i for i in range(14))
    assert {count / paper.curve.repeats for count in paper.curve.draws} == {200}
    assert paper.curve.confidence == 0.9
    assert paper.subject.std == 1.0
    assert ("local_reparameterization" in paper.estimators) is (net == "fc")
    assert paper.subject.width == 1.0
    if net == "lstm":
        assert (paper.subject.units, paper.subject.window, paper.subject.include) == (650, 35, "lstm.weight_hh*")
        assert paper.curve.micro_batch == 64
        assert paper.subject.pretraining.steps == round(3 * 929_589 / (40 * 35))
    else:
        assert paper.subject.pretraining.accuracy == 0.85
    for name in reproduce.PRESETS:
        settings = ComponentsSettings.preset(name, net)
        assert settings.subject.net == net
        assert len(settings.curve.draws) == len(settings.curve.batch_sizes)
        assert settings.bases >= 8
        assert len(VarianceSettings.preset(name, net).curve.draws) == len(VarianceSettings.preset(name, net).curve.batch_sizes)


def test_pictures_that_no_package_ships_are_asked_for(tmp_path):
    with pytest.raises(flipout.ArgumentError, match=r"CIFAR-10: .* no package ships it; name a folder"):
        reproduce.run_experiment(reproduce.find_entry("variance"), "smoke", tmp_path / "run", net="convgg")


def test_the_same_seed_gives_the_same_run(variance, tmp_path):
    entry = reproduce.find_entry("variance")
    again = reproduce.run_experiment(entry, "smoke", tmp_path / "a", net="convle", progress=silent)
    other = reproduce.run_experiment(entry, "smoke", tmp_path / "b", net="convle", seed=1)
    assert {**again, "seconds": None} == {**variance["convle"][0], "seconds": None}
    assert again["curve"] != other["curve"]


def test_runs_leave_threads_and_random_state_alone(tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    reproduce.run_experiment(reproduce.find_entry("variance"), "smoke", tmp_path / "run", net="fc")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_components_are_orders_apart_on_real_digits():
    """α ≫ β ≫ γ (Sec. 3.2), on the paper's FC, trained with its noise to about 80 % and frozen."""
    digits = data.embedded_mnist().train
    net = flipout.Perturbed(FullyConnected(stream(0)), flipout.MultiplicativeGaussian(1.0), include="*weight")
    pretrain_classifier(net, digits, PretrainingSettings(True, 0.8, 200, 64, 1e-3))
    found = variance_components(net, mean_loss, digits.sample, draws=24, batch_size=256)
    assert found.alpha.low > 10 * found.beta.high
    assert found.beta.low > 10 * found.gamma.high
