"""The settings of the preset ``paper``, item by item, as the paper's Sec. 4.2 and Appendix D have them."""

import pytest
import torch

import flipout
from flipout.regularize import CHAR, WORD, Dropout, EmbeddingDropout, Regularized, Zoneout
from flipout_experiments.language.models import build_model
from flipout_experiments.language.settings import METHODS, PAPER, RegularizationSettings
from flipout_experiments.language.training import _Run
from flipout_experiments.nets.networks import count_parameters


def paper(level):
    return RegularizationSettings.preset("paper", level, "all")


# --- the character model ------------------------------------------------------------------------------------------------------


def test_char_is_a_one_layer_lstm_of_1000_units_with_one_hot_inputs_and_4_26_million_parameters():
    settings = paper("char")
    assert (settings.model.kind, settings.model.units, settings.model.layers) == ("char", 1000, 1)
    model = build_model(settings.model, 50, settings.training.window, seed=0)
    assert round(count_parameters(model) / 1e6, 2) == 4.26
    assert model.lstm.input_size == 50  # one-hot


def test_char_reads_non_overlapping_sequences_of_100_characters_in_batches_of_32():
    assert (paper("char").training.window, paper("char").training.batch) == (100, 32)


def test_char_is_trained_by_amsgrad_at_0_002():
    training = paper("char").training
    assert (training.optimiser, training.learning_rate, training.quarter_after) == ("amsgrad", 0.002, None)
    optimiser = _Run(Regularized(build_model(paper("char").model, 50, 100, 0), CHAR["none"]), training, 0).optimiser
    assert isinstance(optimiser, torch.optim.Adam)
    assert optimiser.defaults["amsgrad"]
    assert optimiser.defaults["lr"] == 0.002


def test_char_stops_early_on_validation():
    assert paper("char").training.patience is not None


def test_char_gradients_are_clipped_at_1():
    assert paper("char").training.clip == 1.0


def test_char_recurrent_matrices_start_orthogonal():
    model = build_model(paper("char").model, 50, 100, seed=0)
    for gate in model.lstm.weight_hh_l0.split(1000):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(1000), rtol=0, atol=1e-4)


def test_char_has_no_dropout_at_inputs_and_outputs():
    assert all((method.inputs, method.outputs, method.embedding) == (None, None, None) for method in CHAR.values())


def test_char_methods():
    assert CHAR["semeniuta"].update == Dropout(0.25, per="step")
    assert CHAR["zoneout"].zoneout == Zoneout(cell=0.5, hidden=0.05)
    assert CHAR["gal"].hidden == Dropout(0.25, per="sequence")
    for name, estimator in (("gaussian", flipout.Shared()), ("gaussian-flipout", flipout.Flipout())):
        method = CHAR[name]
        assert (method.noise, method.estimator) == (flipout.MultiplicativeGaussian(1.0), estimator)
        assert set(Regularized(torch.nn.LSTM(3, 4), method).net.noises) == {"weight_hh_l0"}  # hidden-to-hidden only


# --- the word model -----------------------------------------------------------------------------------------------------------


def test_word_is_a_two_layer_lstm_of_650_units_with_650_dimensional_embeddings_and_19_8_million_parameters():
    settings = paper("word")
    assert (settings.model.kind, settings.model.units, settings.model.layers) == ("word", 650, 2)
    assert settings.vocabulary is None  # all 10,000 words
    model = build_model(settings.model, 10_000, settings.training.window, seed=0)
    assert round(count_parameters(model) / 1e6, 1) == 19.8
    assert model.embedding.embedding_dim == 650


def test_word_reads_sequences_of_35_in_batches_of_40_for_100_epochs():
    training = paper("word").training
    assert (training.window, training.batch, training.epochs, training.patience) == (35, 40, 100, None)


def test_word_is_trained_by_sgd_at_30_divided_by_4_on_meritys_criterion():
    training = paper("word").training
    assert (training.optimiser, training.learning_rate, training.quarter_after) == ("sgd", 30.0, 5)
    run = _Run(Regularized(torch.nn.LSTM(3, 4), WORD["none"]), training, 0)
    assert isinstance(run.optimiser, torch.optim.SGD)
    assert {run.optimiser.defaults[name] for name in ("momentum", "weight_decay", "dampening")} == {0}


def test_word_gradients_are_clipped_at_0_25():
    assert paper("word").training.clip == 0.25


def test_word_embedding_dropout_is_0_1_for_all_regularised_models_but_gals_0_2():
    assert WORD["none"].embedding is None
    assert {name: method.embedding.p for name, method in WORD.items() if name != "none"} == {
        "zaremba": 0.1, "semeniuta": 0.1, "gal": 0.2, "zoneout": 0.1, "wd": 0.1, "wd-flipout": 0.1,
    }  # fmt: skip


def test_gal():
    gal = WORD["gal"]
    assert (gal.inputs, gal.outputs, gal.hidden) == (Dropout(0.35), Dropout(0.35), Dropout(0.2))
    assert gal.embedding == EmbeddingDropout(0.2, per="sequence")
    assert {gal.inputs.per, gal.outputs.per, gal.hidden.per} == {"sequence"}


def test_semeniuta():
    semeniuta = WORD["semeniuta"]
    assert (semeniuta.inputs.p, semeniuta.outputs.p) == (0.5, 0.5)
    assert semeniuta.update == Dropout(0.3, per="step")


def test_zoneout():
    zoneout = WORD["zoneout"]
    assert (zoneout.inputs.p, zoneout.outputs.p, zoneout.zoneout) == (0.5, 0.5, Zoneout(cell=0.25, hidden=0.025))


@pytest.mark.parametrize(("name", "estimator"), [("wd", flipout.Shared()), ("wd-flipout", flipout.Flipout())])
def test_weight_drop(name, estimator):
    wd = WORD[name]
    assert (wd.inputs, wd.outputs, wd.between) == (Dropout(0.4), Dropout(0.4), Dropout(0.3))  # fixed over the sequence
    assert (wd.noise, wd.estimator) == (flipout.DropConnect(0.5), estimator)
    noises = Regularized(build_model(paper("word").model, 10, 35, 0), wd).net.noises
    assert set(noises) == {"lstm.weight_hh_l0", "lstm.weight_hh_l1"}  # hidden-to-hidden


# --- both ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["char", "word"])
def test_each_table_has_its_methods_and_numbers_on_the_whole_text(level):
    settings = paper(level)
    assert settings.methods == tuple(METHODS[level]) == tuple(PAPER[level])
    assert settings.train_tokens is None
    assert settings.training.watched is None
    assert settings.training.evaluation_rows == 1  # one stream: every token is predicted from all that came before it
    assert settings.seeds >= 3
    best = min(PAPER[level], key=lambda name: PAPER[level][name][0])
    assert best.endswith("flipout")
