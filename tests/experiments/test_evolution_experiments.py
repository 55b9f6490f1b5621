"""``reproduce evolution`` and ``train-es`` at their smallest: they run, and a killed run goes on to the same result."""

import json
import re

import pytest
import torch
from PIL import Image

import flipout
from flipout.evolution import EvolutionStrategy
from flipout_experiments.harness.reproduce import find_entry, run_experiment
from flipout_experiments.harness.run import Run, silent
from flipout_experiments.paper.evolution import contest as evolution
from flipout_experiments.paper.evolution import timing as evolution_timing
from flipout_experiments.paper.evolution import train_es
from flipout_experiments.paper.evolution.contestants import Problem, make_net
from flipout_experiments.report.html_console import HtmlConsole


class Killed(BaseException):
    pass


def killer(phase, step):
    def progress(name, done, total):
        if (name, done) == (phase, step):
            raise Killed

    return progress


def shown(result):
    """What is printed of a result, cell after cell."""
    console = HtmlConsole()
    evolution.EXPERIMENT.show(result, console)
    return " ".join(re.sub("<[^>]*>", " ", " ".join(console.parts)).split())


def unpriced(rows):
    return [{name: value for name, value in row.items() if name != "cost_factor"} for row in rows]


def without_seconds(result):
    return {name: value for name, value in result.items() if name != "seconds"}


def test_flipes_keeps_up_with_ideales_however_often_it_is_killed(tmp_path):
    entry = find_entry("evolution")
    whole = run_experiment(entry, "smoke", tmp_path / "whole", figure="2b")
    for resume, phase in enumerate(("ideales-40-seed0", "flipes-40-seed1")):
        with pytest.raises(Killed):
            run_experiment(entry, "smoke", tmp_path / "killed", figure="2b", resume=bool(resume), progress=killer(phase, 11))
    resumed = run_experiment(entry, "smoke", tmp_path / "killed", figure="2b", resume=True)
    assert without_seconds(resumed) == without_seconds(whole)
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert list(whole["curves"]) == ["ideales-40", "flipes-40"]
    assert whole["difference"]["low"] < whole["difference"]["value"] < whole["difference"]["high"]
    assert (tmp_path / "whole/figures/figure-2b.svg").exists()
    told = shown(whole)
    for name, final in whole["final"].items():
        assert f"{name} {final['loss']['value']:.3g}" in told
        assert f"{100 * final['test_accuracy']:.1f} %" in told
    assert f"paired by seed: {whole['difference']['value']:.3g} [" in told
    (claim,) = evolution.EXPERIMENT.claims(whole)
    assert claim.holds in (True, False)


@pytest.mark.parametrize(("figure", "names"), [("2c", ["flipes-124", "flipes-40", "backprop"]), ("2d", ["flipes-40", "backprop"])])
def test_backpropagation_runs_beside_evolution(figure, names, tmp_path):
    result = run_experiment(find_entry("evolution"), "smoke", tmp_path / "run", figure=figure)
    assert list(result["curves"]) == names
    assert all(0 < final["test_accuracy"] < 1 for final in result["final"].values())
    assert [claim.what.split(":")[0] for claim in evolution.EXPERIMENT.claims(result)] == names[:-1]


def test_seconds_per_update_and_their_price(tmp_path, monkeypatch):
    monkeypatch.setattr(evolution, "explicit_seconds", lambda nets, timing, cores: [0.5] * len(nets))
    options = {"figure": "5", "price_gpu": 2.0, "price_cpu": 3.0}
    result = run_experiment(find_entry("evolution"), "smoke", tmp_path / "run", **options)
    for row in result["rows"]:
        assert row["cpues"] == pytest.approx(200 * 0.5 / result["cores"])
        assert row["cpues_40_cores"] == pytest.approx(200 * 0.5 / 40)
        assert row["cost_factor"] == pytest.approx(row["cpues_40_cores"] * 3 / (row["flipes"] * 2))
    assert (tmp_path / "run/figures/figure-5.png").exists()
    told = shown(result)
    assert "cost factor" in told
    for row in result["rows"]:
        assert f"{row['net']} {row['width']:g} {row['flipes']:.3g} {row['cpues']:.3g} {row['cpues_40_cores']:.3g}" in told
    assert "--price-gpu and --price-cpu" in shown({**result, "rows": unpriced(result["rows"])})
    assert all(claim.holds is None for claim in evolution.EXPERIMENT.claims(result))


def test_the_explicit_method_leaves_the_net_near_its_means_and_takes_time():
    module = make_net(Problem("fc", 8, 1, 0, 1), 0)
    seconds = evolution_timing._explicit(module, "fc", torch.randn(20_000), members=4, repeats=1)
    assert 0 < seconds < 1


def settings(**changes):
    return train_es.TrainSettings("CartPole-v1", (4,), 8, generations=6, judged=4, save_every=2, **changes)


def test_a_killed_training_goes_on_to_the_same_policy(tmp_path):
    def train(folder, resume=False, progress=silent, video=False):
        with Run.open(tmp_path / folder, "train-es", settings(), resume) as run:
            return run.finish(train_es.train_es(settings(), run, progress, video))

    whole = train("whole", video=True)
    with pytest.raises(Killed):
        train("killed", progress=killer("train", 5))
    assert without_seconds(train("killed", resume=True)) == without_seconds(whole)
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    with Image.open(tmp_path / "whole/episode.gif") as picture:
        assert picture.n_frames >= 2
    assert len(whole["curve"]) == 6


def test_training_ends_at_its_goal_or_its_time(tmp_path):
    for name, changes, generations in (("goal", {"goal": 1.0}, 3), ("time", {"max_seconds": 1e-9}, 1)):
        with Run.open(tmp_path / name, "train-es", settings(**changes)) as run:
            assert train_es.train_es(settings(**changes), run, silent, video=False)["generations"] == generations


def test_an_environment_s_own_threshold_is_the_goal():
    assert train_es.threshold("CartPole-v1") == 475.0
    assert train_es.threshold("Pendulum-v1") is None


def test_train_es_from_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from flipout_experiments.commands.app import app

    words = [
        "train-es",
        "CartPole-v1",
        "--population",
        "4",
        "--generations",
        "2",
        "--hidden",
        "0",
        "--no-video",
        "--out",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "2 generations; mean return" in done.output
    assert json.loads((tmp_path / "run/result.json").read_text())["settings"]["hidden"] == []
    with pytest.raises(flipout.ArgumentError, match="Nope"):
        CliRunner().invoke(app, ["train-es", "Nope-v0", "--out", str(tmp_path / "nope")], catch_exceptions=False)
    assert not (tmp_path / "nope").exists()
    for hidden in ("x", "4,-1"):
        with pytest.raises(flipout.ArgumentError, match="hidden"):
            train_es.layer_sizes(hidden)


def test_every_preset_makes_strategies_that_can_be_built():
    for preset in ("smoke", "laptop", "paper"):
        for figure in ("2b", "2c", "2d"):
            found = evolution.EvolutionSettings.preset(preset, figure)
            for c in found.contestants:
                if c.samples:
                    EvolutionStrategy(torch.nn.Linear(2, 2), c.std, c.samples, base=c.base, members_per_base=c.members_per_base)
