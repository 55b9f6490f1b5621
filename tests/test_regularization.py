"""Tables 2 and 3 and ``flipout lm`` at their smallest: every method, the tables printed, wrong input. Faults are in ``faults/``."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flipout.errors import ArgumentError
from flipout.experiments import reproduce
from flipout.experiments.commands import app
from flipout.experiments.language.settings import METHODS, PAPER, RegularizationSettings, unit
from flipout.experiments.language.tables import claims, estimates, gains
from flipout.experiments.lm import lm_settings, run_lm
from flipout.experiments.variance import from_json

HERE = Path(__file__).parent
ENTRY = reproduce.find_entry("regularization")


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The result of each level, of all its methods."""
    folder = tmp_path_factory.mktemp("runs")
    return {level: (reproduce.run_experiment(ENTRY, "smoke", folder / level, level=level), folder / level) for level in METHODS}


@pytest.mark.parametrize("level", METHODS)
def test_every_method_of_a_table_runs_and_is_evaluated_on_whole_splits(results, level):
    result, folder = results[level]
    assert list(result["rows"]) == list(METHODS[level])
    assert result["unit"] == ("perplexity" if level == "word" else "bits per character")
    for name, row in result["rows"].items():
        assert len(row["valid"]) == len(row["test"]) == result["settings"]["seeds"] == 2
        assert row["valid"][0] != row["valid"][1]
        assert all(1 <= epoch <= 2 for epoch in row["best_epoch"])
        assert (row["sampled"][0] is None) is (METHODS[level][name].noise is None)
        estimate = estimates(result, "valid")[name]
        assert estimate.low < estimate.value < estimate.high
    assert {path.name for path in (folder / "figures").iterdir()} == {"regularization.png", "regularization.svg"}
    assert result["trained_on"] == 400
    assert {("none", name) for name in METHODS[level] if name != "none"} <= set(gains(result))


@pytest.mark.parametrize(("level", "name"), [("char", "gaussian-flipout"), ("word", "wd-flipout"), ("transformer", "wd-flipout")])
def test_the_variance_is_measured_where_flipout_is_trained(results, level, name):
    found = results[level][0]["variance"][name]
    assert found["batch_size"] == 4
    for key in ("shared", "flipout", "shared / flipout"):
        estimate = from_json(found[key])
        assert 0 < estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize("level", METHODS)
def test_claims_of_the_paper_stand_beside_what_was_seen(results, level):
    result = results[level][0]
    found = claims(result)
    assert len(found) == len(gains(result)) + len(result["variance"])
    if level == "char":
        by_name = {claim.what: claim for claim in found}
        claim = by_name["none − gaussian-flipout, bits per character on validation"]
        assert claim.paper == 0.212  # 1.468 - 1.256
        assert claim.holds in (True, False, None)
    assert all("reproduced" in claim.verdict or claim.verdict == "cannot tell" for claim in found)


def test_runs_of_one_method_each_make_one_table_of_the_page_of_results(results, tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("generate_results", HERE.parent / "docs" / "generate_results.py")
    page = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(page)
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "page.md").write_text("<!-- regularization-char: begin -->\nold\n<!-- regularization-char: end -->\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    folders = [tmp_path / name for name in ("none", "gaussian-flipout")]
    for folder in folders:
        reproduce.run_experiment(ENTRY, "smoke", folder, level="char", method=folder.name)
    page.main([str(folder) for folder in folders])
    text = (tmp_path / "page.md").read_text()
    assert re.search(r"\| none \| 1\.468 \| 1\.423 \| .*\n\| gaussian-flipout \| 1\.256 \| 1\.227 \|", text)
    assert "gaussian-flipout is lower than none by" in text
    assert "Variance of the gradient at gaussian-flipout's weights, N = 4" in text
    assert (tmp_path / "docs" / "figures" / "regularization-char.png").exists()
    reproduce.run_experiment(ENTRY, "smoke", tmp_path / "other", level="char", method="gal", seed=5)
    with pytest.raises(SystemExit, match="with other settings"):
        page.main([str(folders[0]), str(tmp_path / "other")])


def test_methods_that_differ_in_the_sharing_alone_meet_the_same_data_and_weights(results):
    """One epoch of none is the same whatever else is run, and all start alike: the smoke text is so short that they are close."""
    alone = reproduce.run_experiment(ENTRY, "smoke", results["char"][1].parent / "none", level="char", method="none")
    assert alone["rows"]["none"] == results["char"][0]["rows"]["none"]


def test_the_paper_s_table_is_printed_beside_ours(tmp_path):
    arguments = ("reproduce", "regularization", "--level", "word", "--method", "wd-flipout", "--preset", "smoke")
    found = run(*arguments, "--out", str(tmp_path / "run"))
    assert found.exit_code == 0, found.output
    for text in ("perplexity", "76.88", "73.2", "paper, valid", "by averaging samples", "variance of the gradient at wd-flipout"):
        assert text in found.output
    again = run(*arguments, "--out", str(tmp_path / "run"), "--resume")
    assert "nothing was left to do" in again.output
    assert "76.88" in again.output


def test_numbers_of_the_paper():
    """Tables 2 and 3, validation and test."""
    assert PAPER["char"]["gaussian-flipout"] == (1.256, 1.227)
    assert PAPER["char"]["none"] == (1.468, 1.423)
    assert PAPER["word"]["wd"] == (78.82, 75.71)
    assert PAPER["word"]["zaremba"] == (80.40, 76.81)
    assert all(test < valid for table in PAPER.values() for valid, test in table.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "char", "method": "wd"}, "char: method 'wd' is unknown: choose none, semeniuta"),
        ({"level": "word", "method": "gaussian"}, "word: method 'gaussian' is unknown"),
        ({"level": "line"}, "level 'line' is unknown: choose char, word, transformer"),
        ({"method": "batchnorm"}, "method 'batchnorm' is unknown: choose all, none"),
    ],
)
def test_what_the_table_has_not_is_told(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("level", METHODS)
@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_presets_grow_from_smoke_to_paper(level, preset):
    settings = RegularizationSettings.preset(preset, level, "none")
    assert settings.methods == ("none",)
    sizes = [RegularizationSettings.preset(name, level, "none").model.units for name in reproduce.PRESETS]
    assert sizes == sorted(sizes)
    assert settings.download is (preset != "smoke")
    assert settings.seeds >= (2 if preset == "smoke" else 3)


# --- flipout lm ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 12, encoding="utf-8")
    return path


def small(text, **changes):
    settings = lm_settings(text, units=4, epochs=2)
    return replace(settings, training=replace(settings.training, batch=4, window=10, save_steps=4, **changes))


def test_lm_trains_evaluates_and_writes(tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("The lazy dog ate Ωμέγα.\n", encoding="utf-8")
    arguments = ("lm", "--text", str(text), "--out", str(tmp_path / "run"), "--units", "4", "--epochs", "1")
    short = run(*arguments)
    assert "486 tokens do not fill 32 streams with a window of 50" in str(short.exception)
    text = tmp_path / "longer.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    arguments = ("lm", "--text", str(text), "--out", str(tmp_path / "again"), "--units", "4", "--epochs", "1")
    found = run(*arguments, "--prompt", "The ", "--sample", "30", "--evaluate", str(other))
    assert found.exit_code == 0, found.output
    for part in ("gaussian-flipout, char by char", "bits per character: ", "by the mean weights", "unknown 5", "\nThe "):
        assert part in found.output
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["epochs"] == 1
    assert result["valid"] > 0
    again = run(*arguments, "--resume", "--prompt", "The ", "--sample", "30")
    assert found.output.split("\nThe ")[1][:30] == again.output.split("\nThe ")[1][:30]


def test_lm_by_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 100, encoding="utf-8")
    model = run_lm(lm_settings(path, "word", units=4, epochs=1), tmp_path / "run")
    assert model.result["unit"] == "perplexity"
    assert set(model.vocabulary) == {"<unk>", "\n", *["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]}
    drawn = model.sample(12, "the lazy", temperature=0.5)
    assert drawn.startswith("the lazy ")
    assert "<unk>" not in drawn
    assert model.sample(12) == model.sample(12) != model.sample(12, seed=1)
    unseen = tmp_path / "unseen.txt"
    unseen.write_text("the slow fox\n", encoding="utf-8")
    assert model.evaluate(unseen)["unknown"] == 1


def test_lm_refuses_what_it_cannot_use(tmp_path, text):
    with pytest.raises(ArgumentError, match="cannot be read"):
        lm_settings(tmp_path / "none.txt")
    with pytest.raises(ArgumentError, match="char: method 'wd' is unknown"):
        lm_settings(text, method="wd")
    with pytest.raises(ArgumentError, match="level 'line' is unknown"):
        lm_settings(text, level="line")
    with pytest.raises(ArgumentError, match="0 units"):
        lm_settings(text, units=0)
    run_lm(small(text), tmp_path / "run")
    changed = tmp_path / "own.txt"
    changed.write_text(text.read_text() + "more")
    with pytest.raises(ArgumentError, match="another configuration"):
        run_lm(replace(small(changed), text=text.resolve()), tmp_path / "run", resume=True)


def test_an_interrupt_of_lm_tells_how_to_go_on(tmp_path, text, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("flipout.experiments.lm.run_lm", interrupted)
    found = run("lm", "--text", str(text), "--out", str(tmp_path / "run"))
    assert found.exit_code == 130
    assert "the same command with --resume" in found.output


def test_units_of_the_tables():
    assert unit("char") == unit("transformer") == "bits per character"
