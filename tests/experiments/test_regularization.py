"""Tables 2 and 3 at their smallest: every method, the tables printed, wrong input. Faults are in ``faults/``."""

import importlib.util
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flipout.errors import ArgumentError
from flipout.intervals import Estimate
from flipout_experiments.commands.app import app
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.claims import from_json
from flipout_experiments.language.lm import lm_settings
from flipout_experiments.language.paper_tables import Pair, claims, estimates, gains, pairs, variance_sentence
from flipout_experiments.language.settings import METHODS, PAPER, RegularizationSettings, unit

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def page():
    """docs/generate_results.py."""
    specification = importlib.util.spec_from_file_location("generate_results", ROOT / "docs" / "generate_results.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_runs_of_one_method_each_make_one_table_of_the_page_of_results(page, tmp_path, monkeypatch):
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
    assert "Not run at this size: semeniuta, zoneout, gal, gaussian." in text
    assert re.search(r"Not told apart at this size:\n\n- (none and gaussian-flipout|gaussian-flipout and none) are not", text)
    assert "Variance of the gradient at gaussian-flipout's weights, N = 4, 8 draws each: shared" in text
    assert (tmp_path / "docs" / "figures" / "regularization-char.png").exists()
    reproduce.run_experiment(ENTRY, "smoke", tmp_path / "other", level="char", method="gal", seed=5)
    with pytest.raises(SystemExit, match="with other settings"):
        page.main([str(folders[0]), str(tmp_path / "other")])


def test_the_page_names_no_folder_of_this_machine(page):
    result = {"settings": {"data_dir": "/here/data"}, "data": "penn_treebank: 9 words; /here/data; the 5 most frequent words"}
    assert page.source(result) == "penn_treebank: 9 words, from --data-dir; the 5 most frequent words"


def test_pairs_stand_under_what_they_have_in_common(page):
    found = [
        Pair("wd", "none", estimate(9.9, 5.0), 53.41), Pair("gal", "zoneout", estimate(2.0, 1.0), -0.42),
        Pair("a", "b", estimate(2.0, 1.0), None), Pair("gal", "wd", estimate(0.5, 1.0), 0.58),
    ]  # fmt: skip
    parts = page.told_apart(found)
    assert [part.split(":")[0] for part in parts] == [
        "Told apart, in the paper's order", "Told apart, against the paper's order", "Told apart", "Not told apart at this size",
    ]  # fmt: skip
    assert parts[1].endswith("- gal is lower than zoneout by 2.0 [1.0, 3.0] (paper: higher by 0.42).")
    assert page.told_apart([]) == []


def estimate(value, half, degrees=4):
    return Estimate(value, value - half, value + half, half / 2, degrees)


@pytest.mark.parametrize("level", METHODS)
def test_every_two_methods_are_compared_and_said_to_be_alike_where_their_interval_holds_zero(results, level):
    result = results[level][0]
    found, means = pairs(result), estimates(result, "valid")
    assert {frozenset((pair.lower, pair.higher)) for pair in found} == {frozenset(two) for two in combinations(METHODS[level], 2)}
    for pair in found:
        assert means[pair.lower].value <= means[pair.higher].value
        assert pair.by.value == pytest.approx(means[pair.higher].value - means[pair.lower].value)
        assert ("not told apart" in str(pair)) is (0 in pair.by) is not pair.told_apart
        if level != "transformer":
            assert pair.paper == round(PAPER[level][pair.higher][0] - PAPER[level][pair.lower][0], 3)
        else:
            assert pair.paper is None
    assert [pair.told_apart for pair in found] == sorted((pair.told_apart for pair in found), reverse=True)


def test_a_sentence_of_a_pair_has_both_numbers():
    assert str(Pair("wd", "none", estimate(9.949, 5.161), 53.41)) == "wd is lower than none by 9.9 [4.8, 15.1] (paper: by 53.41)"
    told = "gal and zoneout are not told apart: gal is lower by 0.0012 [-0.0018, 0.0042] (paper: higher by 0.029)"
    assert str(Pair("gal", "zoneout", estimate(0.0012, 0.003), -0.029)) == told
    assert str(Pair("wd", "none", estimate(0.5, 0.1), None)) == "wd is lower than none by 0.50 [0.40, 0.60]"


@pytest.mark.parametrize(
    ("half", "ratio", "told"),
    [(0.02, 1.06, "lower under flipout"), (0.02, 0.9, "higher under flipout"), (0.02, 1.015, "not told apart")],
)
def test_a_variance_that_flipout_does_not_lower_is_said_so(half, ratio, told):
    found = {"shared": estimate(0.2, 0.01), "flipout": estimate(0.1, 0.01), "shared / flipout": estimate(ratio, half)}
    sentence = variance_sentence("wd", {"batch_size": 20, "draws": 1000, **{key: value.as_dict() for key, value in found.items()}})
    assert sentence.endswith(told)
    assert "N = 20, 1,000 draws each: shared 0.2 [0.19, 0.21]" in sentence


def test_methods_that_differ_in_the_sharing_alone_meet_the_same_data_and_weights(results):
    """One epoch of none is the same whatever else is run, and all start alike: the smoke text is so short that they are close."""
    alone = reproduce.run_experiment(ENTRY, "smoke", results["char"][1].parent / "none", level="char", method="none")
    assert alone["rows"]["none"] == results["char"][0]["rows"]["none"]


def test_the_paper_s_table_is_printed_beside_ours(tmp_path):
    arguments = ("reproduce", "regularization", "--level", "word", "--method", "wd-flipout", "--preset", "smoke")
    found = run(*arguments, "--out", str(tmp_path / "run"))
    assert found.exit_code == 0, found.output
    for text in ("perplexity", "76.88", "73.2", "paper, valid", "by averaging samples", "of the gradient at wd-flipout's weights"):
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


def test_units_of_the_tables():
    assert unit("char") == unit("transformer") == "bits per character"
