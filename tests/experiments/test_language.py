"""Training and evaluation of language models: exact numbers over whole splits, schedules, kills, explosions, texts."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import flipout
from flipout.data import Text
from flipout.errors import ArgumentError
from flipout.regularize import CHAR, TRANSFORMER, WORD, Regularized
from flipout.streams import stream
from flipout_experiments.language.evaluation import (
    bits,
    draw_text,
    evaluate,
    evaluate_samples,
    perplexity,
    token_log_probabilities,
)
from flipout_experiments.language.models import ModelSettings, Transformer, build_model
from flipout_experiments.language.schedule import NonMonotonic
from flipout_experiments.language.tokens import cut, encode, limit_vocabulary, own_text, split_tokens
from flipout_experiments.language.training import TrainingSettings, train_language_model

VOCABULARY = 7


def tokens(n, seed=0):
    """A text with some order in it: mostly each token is the one before plus one."""
    steps = (torch.rand(n, generator=stream(seed)) < 0.2) * torch.randint(VOCABULARY, (n,), generator=stream(seed, 1))
    return (torch.arange(n) + steps) % VOCABULARY


def make(kind="char", method=None, seed=0, units=6):
    model = build_model(ModelSettings(kind, units, 2 if kind == "word" else 1, 2), VOCABULARY, 10, seed)
    table = {"char": CHAR, "word": WORD, "transformer": TRANSFORMER}[kind]
    return Regularized(model, table[method or "none"])


# --- evaluation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "word"])
def test_every_token_but_the_first_is_predicted_once_from_all_before_it(kind):
    net, text = make(kind), tokens(53)
    with torch.no_grad():
        logits, _ = net.module(text[None, :-1], net.module.initial_state(1))
    whole = F.cross_entropy(logits[0].double(), text[1:])
    for window in (1, 10, 52, 100):
        assert evaluate(net, text, rows=1, window=window) == pytest.approx(float(whole), abs=1e-6)
    assert net.training


@pytest.mark.parametrize("rows", [2, 5, 8, 60])
def test_streams_lose_no_token_and_count_none_twice(rows):
    net, text = make(), tokens(53)
    found = token_log_probabilities(net.eval(), text, rows, window=4)
    assert found.shape == (52,)
    length = math.ceil(52 / rows)
    for first in range(0, 52, length):  # each stream alone, from a state of zeros
        alone = token_log_probabilities(net, text[first : first + length + 1])
        torch.testing.assert_close(found[first : first + length], alone)


def test_units():
    """Uniform predictions over 8 symbols cost 3 bits, and are as hard as 8 words."""
    nats = math.log(8)
    assert bits(nats) == pytest.approx(3)
    assert perplexity(nats) == pytest.approx(8)
    assert perplexity(1e4) == math.inf


def test_averaging_samples_is_the_mean_of_probabilities():
    net, text = make("char", "gaussian-flipout"), tokens(40)
    found = evaluate_samples(net, text, samples=3, rows=2, window=7, seed=5)
    probabilities = []
    net.eval()
    for s in range(3):
        with net.drawing(2, stream(5, s)):
            probabilities.append(token_log_probabilities(net, text, 2, 7).double().exp())
    assert found == pytest.approx(-float(torch.stack(probabilities).mean(0).log().mean()), abs=1e-9)
    assert len({float(p.sum()) for p in probabilities}) == 3
    with pytest.raises(ArgumentError, match="no random weights"):
        evaluate_samples(make(), text, 2)
    with pytest.raises(ArgumentError, match="samples=0"):
        evaluate_samples(net, text, 0)


@pytest.mark.parametrize("text", [torch.tensor([]).long(), torch.tensor([1])])
def test_an_empty_split_is_told(text):
    with pytest.raises(ArgumentError, match=rf"the split has {len(text)} tokens, of which none can be predicted"):
        evaluate(make(), text)


def test_tokens_that_the_model_has_not_are_told():
    with pytest.raises(ArgumentError, match="a token numbered 7, and the model knows 0 to 6"):
        evaluate(make(), torch.tensor([1, 7, 2]))


def test_drawn_text_follows_the_predictions():
    net = make()
    with torch.no_grad():
        net.module.decoder.weight.zero_()
        net.module.decoder.bias.copy_(torch.tensor([0.0, 1, 2, -math.inf, 0, 0, 0]))
    drawn = draw_text(net, torch.tensor([0]), 600, stream(0), never=torch.tensor([6]))
    counts = torch.bincount(drawn, minlength=VOCABULARY).double()
    law = torch.softmax(torch.tensor([0.0, 1, 2, -math.inf, 0, 0, -math.inf]).double(), 0)
    z = (counts - 600 * law) / (600 * law * (1 - law)).clamp(min=1e-12).sqrt()
    assert counts[3] == counts[6] == 0
    assert float(z[law > 0].abs().max()) < 4
    assert draw_text(net, torch.tensor([0]), 3, stream(0), temperature=0.0).tolist() == [2, 2, 2]
    assert len(draw_text(net, torch.tensor([0]), 0, stream(0))) == 0
    with pytest.raises(ArgumentError, match="a prompt of 0 tokens"):
        draw_text(net, torch.tensor([]).long(), 3, stream(0))


# --- schedules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_criterion_is_meritys_algorithm_up_to_its_first_trigger(n):
    values = (3 + torch.rand(40, generator=stream(n)) - 0.05 * torch.arange(40).clamp(max=20)).tolist()
    logs, first = [], None
    for t, v in enumerate(values):  # algorithm 1 of Merity et al. 2017, with a check after each epoch
        if t > n and v > min(logs[: t - n + 1]):
            first = t
            break
        logs.append(v)
    criterion = NonMonotonic(n)
    found = [criterion.update(v) for v in values]
    assert first is not None
    assert found.index(True) == first
    again = NonMonotonic(n)
    again.load_state_dict(criterion.state_dict())
    assert again.values == criterion.values
    with pytest.raises(ArgumentError, match="interval=0"):
        NonMonotonic(0)


# --- training -----------------------------------------------------------------------------------------------------------------

FAST = TrainingSettings(4, 4, 10, "amsgrad", 0.02, clip=1.0, save_steps=3)
SGD = replace(FAST, optimiser="sgd", learning_rate=5.0, clip=0.25, quarter_after=1)
CASES = [("char", "none", FAST), ("char", "gaussian-flipout", FAST), ("word", "wd-flipout", SGD), ("word", "gal", FAST)]


@pytest.mark.parametrize(("kind", "method", "settings"), CASES)
def test_training_lowers_the_loss_and_keeps_the_best_weights(kind, method, settings):
    net, lines = make(kind, method, units=8), []
    before = evaluate(net, tokens(100, 1))
    found = train_language_model(net, tokens(400), tokens(100, 1), settings, log=lambda **line: lines.append(line))
    assert evaluate(net, tokens(100, 1)) == pytest.approx(min(found.valid)) == found.valid[found.best - 1]
    assert min(found.valid) < before
    assert [line["step"] for line in lines] == list(range(1, len(found.valid) + 1))
    assert found.steps == 9 * len(found.valid)


@pytest.mark.parametrize(("kind", "method", "settings"), CASES)
@pytest.mark.parametrize("at", [0, 2, 3, 6])
def test_a_killed_training_goes_on_to_the_same_weights(kind, method, settings, at):
    states, lines = [], []
    net = make(kind, method)
    whole = train_language_model(net, tokens(400), tokens(100, 1), settings, save=lambda s: states.append(copy.deepcopy(s)))
    other = make(kind, method, seed=9)
    found = train_language_model(
        other, tokens(400), tokens(100, 1), settings, load=lambda: states[at], log=lambda **line: lines.append(line)
    )
    assert found == whole
    for mine, theirs in zip(net.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert len(lines) == len(whole.valid) - len(states[at]["valid"])


def test_the_same_seed_gives_the_same_weights_and_the_state_of_torch_is_left_alone():
    weights, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        net = make("char", "gaussian-flipout")
        train_language_model(net, tokens(200), tokens(50, 1), replace(FAST, epochs=1), seed)
        weights.append(net.module.lstm.weight_hh_l0.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_training_stops_when_nothing_gets_better():
    found = train_language_model(make(), tokens(400), tokens(100, 1), replace(FAST, epochs=9, learning_rate=1e-9, patience=2))
    assert len(found.valid) <= found.best + 2 < 9 + 2
    worse = train_language_model(make(), tokens(60), torch.arange(60).flip(0) % VOCABULARY, replace(FAST, epochs=9, patience=2))
    assert len(worse.valid) == worse.best + 2 < 9


def test_the_learning_rate_is_divided_by_four_where_the_criterion_says():
    lines = []
    train_language_model(
        make(), tokens(60), torch.arange(60).flip(0) % VOCABULARY, replace(SGD, epochs=8), log=lambda **line: lines.append(line)
    )
    criterion, expected = NonMonotonic(1), 5.0
    for line in lines:
        expected = expected / 4 if criterion.update(line["valid_loss"]) else expected
        assert line["learning_rate"] == pytest.approx(expected)
    assert expected < 5.0


def test_the_state_is_carried_from_window_to_window():
    """At a learning rate of zero the training loss of an epoch is that of the streams read from end to end."""
    net = make()
    found = train_language_model(net, tokens(400), tokens(50, 1), replace(FAST, epochs=1, learning_rate=0.0))
    streams = tokens(400).view(4, 100)[:, :91]
    with torch.no_grad():
        logits, _ = net.module(streams[:, :-1], net.module.initial_state(4))
    assert found.train[0] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), streams[:, 1:].flatten())), abs=1e-6)


@pytest.mark.parametrize("broken", ["nan", "far"])
def test_an_exploding_loss_stops_and_names_step_and_norm(broken):
    net, states = make(units=8), []
    calls = 0
    real = net.module.forward

    def forward(read, state):
        nonlocal calls
        calls += net.training
        logits, after = real(read, state)
        return (logits * (math.nan if broken == "nan" else 1e6), after) if calls >= 14 and net.training else (logits, after)

    net.module.forward = forward
    with pytest.raises(
        ArgumentError, match=r"the loss exploded: at step 14 it is .* its gradient has norm .*last\s+good checkpoint"
    ):
        train_language_model(net, tokens(400), tokens(50, 1), FAST, save=lambda s: states.append(copy.deepcopy(s)))
    assert states[-1]["step"] == 12  # what was saved is from before
    assert all(weight.isfinite().all() for weight in states[-1]["module"].values())


def test_texts_that_are_too_short_are_told():
    with pytest.raises(ArgumentError, match="43 tokens do not fill 4 streams with a window of 10"):
        train_language_model(make(), tokens(43), tokens(50), FAST)
    with pytest.raises(ArgumentError, match="the validation split has 1 tokens"):
        train_language_model(make(), tokens(400), tokens(1), FAST)
    with pytest.raises(ArgumentError, match="optimiser 'lbfgs': choose amsgrad or sgd"):
        replace(FAST, optimiser="lbfgs")


# --- the transformer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMER)
def test_a_gpt2_trains_under_every_noise(name):
    net = make("transformer", name, units=8)
    if name.endswith("flipout"):
        assert {key.rsplit(".", 2)[1] for key in net.net.noises} == {"c_attn", "c_proj", "c_fc"}
    before = evaluate(net, tokens(100, 1), 1, 10)
    found = train_language_model(net, tokens(400), tokens(100, 1), replace(FAST, epochs=2, learning_rate=0.01))
    assert min(found.valid) < before
    same = tokens(10).expand(2, -1)
    assert torch.equal(*net.train()(same)[0]) is (name in ("none", "gaussian"))


def test_a_gpt2_comes_from_its_generator_and_leaves_torchs_alone():
    state = torch.get_rng_state()
    first, again, other = (Transformer(stream(seed), 5, 8, 1, 2, 4).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings("gru", 8), "model 'gru': choose char, word, transformer"),
        (ModelSettings("char", 8, layers=2), "the character model has one"),
        (ModelSettings("transformer", 9, 1, 2), "9 units cannot be parted among 2 heads"),
    ],
)
def test_models_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        build_model(settings, 5, 10, 0)


# --- texts --------------------------------------------------------------------------------------------------------------------


def test_fewer_words_keep_the_frequent_ones_in_every_split():
    words = ("the", "cat", "<unk>", "sat", "rare")
    splits = {"train": torch.tensor([0, 1, 0, 3, 1, 4, 2]), "valid": torch.tensor([4, 0]), "test": torch.tensor([3, 2])}
    text = limit_vocabulary(Text("t", "source", "word", words, splits), 3)
    assert text.vocabulary == ("<unk>", "the", "cat")
    assert {name: split.tolist() for name, split in text.splits.items()} == {
        "train": [1, 2, 1, 0, 2, 0, 0], "valid": [0, 1], "test": [0, 0],
    }  # fmt: skip
    assert "the 2 most frequent words" in text.source
    assert limit_vocabulary(text, 3) is limit_vocabulary(text, None) is text
    assert cut(text, 2).train.tolist() == [1, 2]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("ab " * 60 + "Ω" + "ab é" * 5, encoding="utf-8")
    text = own_text(path, "char")
    assert text.vocabulary == ("<unk>", "a", "b", " ")  # what training has but once is unknown
    assert {name: len(split) for name, split in text.splits.items()} == {"train": 180, "valid": 10, "test": 11}
    assert "6 of those to validate and test on are not known" in text.source
    words = own_text(path, "word")
    assert words.level == "word"
    assert words.vocabulary == ("<unk>", "ab")


def test_words_and_lines_can_be_put_together_again():
    assert split_tokens("a b\n\nc", "word") == ["a", "b", "\n", "\n", "c"]
    with pytest.raises(ArgumentError, match="level 'line'"):
        split_tokens("a", "line")


def test_unknown_words_are_named_where_there_is_no_word_for_them():
    with pytest.raises(ArgumentError, match=r"does not know 2 of the text's tokens \('dog', 'ate'\).* has no <unk>"):
        encode(["the", "dog", "ate", "the", "dog"], ("the", "cat"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no\.txt cannot be read \(No such file or directory\)"),
        ("folder", r"no\.txt cannot be read \(Is a directory\)"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        ("caf\u00e9".encode("latin1"), r"is no text in UTF-8: byte 3 is 0xe9.*iconv"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    path = tmp_path / "no.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        own_text(path, "char")


def test_a_held_draw_lasts_over_a_window_cut_in_pieces():
    net, text = make("word", "wd-flipout"), tokens(20).view(2, 10)
    net.method = replace(net.method, inputs=None, between=None, outputs=None, embedding=None)  # masks are anew at each call
    outputs = []
    for pieces in ([text], text.split(3, 1)):
        with net.drawing(2, stream(8)):
            state, found = net.module.initial_state(2), []
            for piece in pieces:
                logits, state = net(piece, state)
                found.append(logits)
            outputs.append(torch.cat(found, 1))
    torch.testing.assert_close(*outputs)
    assert isinstance(net.net, flipout.Perturbed)
