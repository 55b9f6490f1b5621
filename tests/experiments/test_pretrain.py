"""Pre-training: to the accuracy asked for, with or without noise, and on after a kill to the same weights."""

import copy

import pytest
import torch
from torch import nn

import flipout
from flipout.data import Examples, Text
from flipout.streams import stream
from flipout_experiments.nets.networks import WordLSTM
from flipout_experiments.nets.pretrain import (
    PretrainingSettings,
    mean_loss,
    pretrain_classifier,
    pretrain_language_model,
    token_loss,
)


def problem(std=0.3):
    """Three clusters in the plane, and a net that can tell them apart."""
    generator = stream(3)
    labels = torch.randint(3, (600,), generator=generator)
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    inputs = centres[labels] + 0.5 * torch.randn(600, 2, generator=generator)
    module = nn.Linear(2, 3)
    with torch.no_grad():
        module.weight.fill_(0.01)
        module.bias.zero_()
    return flipout.Perturbed(module, flipout.Gaussian(std)), Examples(inputs, labels)


SETTINGS = PretrainingSettings(noisy=True, accuracy=0.9, steps=500, batch=32, learning_rate=0.05)


@pytest.mark.parametrize("noisy", [True, False])
def test_stops_at_the_accuracy(noisy):
    net, examples = problem()
    found = pretrain_classifier(net, examples, PretrainingSettings(noisy, 0.9, 500, 32, 0.05))
    assert 0 < found.steps < 500
    assert found.steps % 10 == 0
    assert found.measures["accuracy"] >= 0.9
    assert net.training
    assert all(p.grad is None for p in net.module.parameters())


def test_noisy_accuracy_is_that_of_noisy_weights():
    net, examples = problem(std=3.0)
    found = pretrain_classifier(net, examples, PretrainingSettings(False, 0.9, 500, 32, 0.05))
    noisy = pretrain_classifier(copy.deepcopy(net), examples, PretrainingSettings(True, None, 1, 32, 1e-6))
    assert found.measures["accuracy"] == found.measures["accuracy_of_means"] >= 0.9
    assert noisy.measures["accuracy"] < 0.85 < noisy.measures["accuracy_of_means"]


@pytest.mark.parametrize("stop", [50, 100])
def test_goes_on_after_a_kill_to_the_same_weights(stop):
    settings = PretrainingSettings(True, None, 130, 32, 0.05, clip=1.0)
    net, examples = problem()
    states = []
    pretrain_classifier(net, examples, settings, save=lambda state: states.append(copy.deepcopy(state)))
    assert [state["step"] for state in states] == [50, 100]
    other, _ = problem()
    pretrain_classifier(other, examples, settings, load=lambda: states[stop // 50 - 1])
    assert torch.equal(net.module.weight, other.module.weight)


def test_same_seed_same_weights():
    weights = []
    for seed in (0, 0, 1):
        net, examples = problem()
        pretrain_classifier(net, examples, PretrainingSettings(True, None, 20, 16, 0.05), seed)
        weights.append(net.module.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_accuracy_out_of_reach_is_told():
    net, examples = problem()
    with pytest.raises(flipout.ArgumentError, match=r"after 20 steps the accuracy is 0\.\d+, not yet 0\.9999: allow more steps"):
        pretrain_classifier(net, examples, PretrainingSettings(True, 0.9999, 20, 32, 1e-4))


def test_a_loss_that_is_not_finite_stops():
    net, examples = problem()
    broken = Examples(torch.full_like(examples.inputs, float("nan")), examples.labels)
    with pytest.raises(flipout.ArgumentError, match="the loss is nan after 50 steps: lower the learning rate"):
        pretrain_classifier(net, broken, PretrainingSettings(True, None, 60, 32, 0.05))


def language(length=400):
    tokens = torch.arange(length) % 5  # each token tells the next
    return Text("cycle", "", "word", tuple("abcde"), {"train": tokens, "valid": tokens[:50], "test": tokens[:50]})


def test_a_language_model_learns_a_cycle():
    module = WordLSTM(stream(0), vocabulary=5, units=8)
    net = flipout.Perturbed(module, flipout.MultiplicativeGaussian(0.5), include="lstm.weight_hh*")
    steps = []
    found = pretrain_language_model(
        net, language(), 6, PretrainingSettings(True, None, 80, 8, 0.03, clip=0.25), report=lambda done, total: steps.append(done)
    )
    assert found.steps == 80
    assert steps == list(range(1, 81))
    assert 1.0 <= found.measures["perplexity"] < 2.0  # 5 before


def test_a_text_shorter_than_a_window_is_told():
    net = flipout.Perturbed(WordLSTM(stream(0), 5, 8), flipout.Gaussian(0.1))
    with pytest.raises(flipout.ArgumentError, match="windows of 6 tokens"):
        pretrain_language_model(net, language(5), 6, PretrainingSettings(True, None, 2, 2, 0.1))


def test_losses_are_means():
    module = WordLSTM(stream(0), vocabulary=5, units=8)
    tokens = torch.randint(5, (4, 7), generator=stream(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = module(inputs).log_softmax(-1)
    by_hand = -logits.gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(token_loss(module, (inputs, targets)), by_hand)
    net, examples = problem()
    rows = net.module(examples.inputs).log_softmax(-1)[torch.arange(600), examples.labels]
    torch.testing.assert_close(mean_loss(net.module, (examples.inputs, examples.labels)), -rows.mean())
