"""``flipout lm``: what it prints and saves, short texts, and what it refuses."""

import json
import math

import pytest
from typer.testing import CliRunner

from flipout.errors import ArgumentError
from flipout_experiments.commands.app import app
from flipout_experiments.language.lm import lm_settings, run_lm

FOX = "The quick brown fox jumps over the lazy dog.\n"


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(FOX * 12, encoding="utf-8")
    return path


def test_lm_trains_evaluates_and_writes(tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("The lazy dog ate Ωμέγα.\n", encoding="utf-8")
    arguments = ("lm", "--text", str(text), "--out", str(tmp_path / "again"), "--units", "4", "--epochs", "1")
    late = run(*arguments, "--evaluate", str(tmp_path / "none.txt"))  # told before anything is trained
    assert "none.txt cannot be read" in str(late.exception)
    assert not (tmp_path / "again").exists()
    found = run(*arguments, "--prompt", "The ", "--sample", "30", "--evaluate", str(other))
    assert found.exit_code == 0, found.output
    assert "the prompt has what" not in found.output
    for part in ("char by char", "bits per character: ", "by the mean weights", "unknown 5", "temperature 1", "\nThe "):
        assert part in found.output
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["epochs"] == 1
    assert result["valid"] > 0
    train, test = (FOX * 12)[:486], FOX[-27:]
    counts = {char: train.count(char) + 1 for char in set(train)}
    total = sum(counts.values()) + 1  # and one for <unk>
    by_frequency = sum(math.log2(total / counts[char]) for char in test[1:]) / 26
    assert result["test_by_frequency"] == pytest.approx(by_frequency)
    again = run(*arguments, "--resume", "--prompt", "The ", "--sample", "30")
    assert found.output.split("\nThe ")[1][:30] == again.output.split("\nThe ")[1][:30]
    assert "the prompt has what the text has not: 'Ω', 'é'" in run(*arguments, "--resume", "--prompt", "ΩéΩ").output


@pytest.mark.parametrize(("level", "window", "most"), [("char", 50, 32), ("word", 35, 20)])
def test_a_short_text_is_cut_into_fewer_streams(tmp_path, level, window, most):
    for count, streams in ((window * 2, 1), (window * 20 * 3, 3), (window * 20 * 100, most)):
        path = tmp_path / "text.txt"
        path.write_text(("ab" if level == "char" else "a b ") * (count * 10 // 9 // 2 + 1), encoding="utf-8")
        training = lm_settings(path, level).training
        assert (training.window, training.batch) == (window, streams)


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
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match=f"learning_rate={rate}: expected a number above 0"):
            lm_settings(text, learning_rate=rate)
    short = tmp_path / "short.txt"
    short.write_text("hello world\n" * 4, encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"short\.txt has 43 chars to train on, .* a window takes 50 .* name a longer text"):
        lm_settings(short)
    short.write_text(" ".join(map(str, range(200))), encoding="utf-8")
    with pytest.raises(ArgumentError, match="has no word twice in its first nine tenths, so there is nothing to learn"):
        lm_settings(short, "word")
    assert lm_settings(text, learning_rate=0.5).training.learning_rate == 0.5
    settings = lm_settings(text, units=4, epochs=1)
    run_lm(settings, tmp_path / "run")
    text.write_text(FOX * 12 + "more", encoding="utf-8")
    with pytest.raises(ArgumentError, match="another configuration"):
        run_lm(lm_settings(text, units=4, epochs=1), tmp_path / "run", resume=True)


def test_an_interrupt_of_lm_tells_how_to_go_on(tmp_path, text, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("flipout_experiments.language.lm.run_lm", interrupted)
    found = run("lm", "--text", str(text), "--out", str(tmp_path / "run"))
    assert found.exit_code == 130
    assert "the same command with --resume" in found.output
