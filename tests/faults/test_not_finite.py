"""Losses, gradients and fitness that are no numbers: training stops, and what was saved before is good."""

import math
from dataclasses import replace

import pytest
import torch
from runs import Settings

import flipout
from flipout.errors import ArgumentError, NotFiniteError
from flipout.evolution import EvolutionStrategy
from flipout.storage.states import read_state
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.run import Run
from flipout_experiments.language.lm import lm_settings, run_lm
from flipout_experiments.nets.pretrain import PretrainingSettings, pretrain_classifier
from flipout_experiments.paper import uncertainty
from flipout_experiments.paper.evolution.contestants import Contestant, Problem, train

NAN = float("nan")


def assert_good(folder) -> int:
    """Every tensor of every checkpoint is finite; returns how many checkpoints there are."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            yield from tensors(item)

    paths = list(folder.glob("*.pt"))
    for path in paths:
        assert all(bool(tensor.isfinite().all()) for tensor in tensors(read_state(path)) if tensor.is_floating_point())
    return len(paths)


@pytest.mark.parametrize("where", ["x", "net.weight", "moments.1"])
def test_a_state_with_nan_is_never_saved_over_a_good_one(where, tmp_path):
    with Run.open(tmp_path / "run", "try", Settings()) as run:
        state = {"x": torch.ones(2), "net": {"weight": torch.ones(2)}, "moments": [1, torch.ones(2)], "step": torch.tensor(1)}
        run.save_checkpoint("state", state)
        bad = {"x": state["x"], "net.weight": state["net"]["weight"], "moments.1": state["moments"][1]}[where]
        saved = run.load_checkpoint("state")
        bad[1] = NAN
        with pytest.raises(NotFiniteError, match=rf"'{where}' has NaN.*the checkpoint before it is kept\. Lower the learning rate"):
            run.save_checkpoint("state", state)
        assert torch.equal(run.load_checkpoint("state")["x"], saved["x"])
        with pytest.raises(NotFiniteError, match="there is none before it"):
            run.save_checkpoint("first", state)
    assert assert_good(tmp_path / "run" / "checkpoints") == 1


def test_an_exploding_language_model_is_told_and_what_was_saved_is_kept(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 12, encoding="utf-8")
    settings = lm_settings(path, units=4, epochs=2)
    training = replace(settings.training, batch=4, window=10, save_steps=4, optimiser="sgd", learning_rate=1e30, clip=1e30)
    with pytest.raises(ArgumentError, match=r"the loss exploded: at step \d+ it is .* its gradient has norm"):
        run_lm(replace(settings, training=training), tmp_path / "run")
    assert_good(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("good", [3, 15])  # of a plain net's six steps, and of a posterior's, the third training
def test_a_loss_between_two_looks_is_seen_before_its_weights_are_saved(good, tmp_path, monkeypatch):
    """The looks of this experiment are fifty steps apart."""
    real, calls = uncertainty.mean_loss, 0

    def loss(net, batch):
        nonlocal calls
        calls += 1
        return real(net, batch) * (1.0 if calls <= good else NAN)

    monkeypatch.setattr(uncertainty, "mean_loss", loss)
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        reproduce.run_experiment(reproduce.find_entry("uncertainty"), "smoke", tmp_path / "run")
    assert_good(tmp_path / "run" / "checkpoints")


def test_a_net_is_not_taken_for_trained_whose_last_loss_is_no_number():
    net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1))
    inputs, labels = torch.full((32, 4), NAN), torch.zeros(32, dtype=torch.long)
    examples = flipout.data.Examples(inputs, labels)
    with pytest.raises(ArgumentError, match="the loss is nan after 7 steps: lower the learning rate"):
        pretrain_classifier(net, examples, PretrainingSettings(True, None, 7, 8, 0.05))


def test_a_race_against_evolution_stops_at_a_loss_that_is_no_number():
    images, labels = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
    data = flipout.data.Dataset("d", "", *[flipout.data.Examples(images, labels)] * 2)
    problem = Problem("fc", 4, 8, updates=60, judge_every=2)
    saved = []
    with pytest.raises(NotFiniteError, match=r"the loss is (nan|inf) after \d+ updates: lower the learning rate"):
        train(
            problem, Contestant("backprop", 0, 0.0, 1e30), data, 0, load=lambda: None, save=saved.append,
            log=lambda **line: None, report=lambda done, total: None,
        )  # fmt: skip
    assert all(weight.isfinite().all() for state in saved for weight in state["module"].values())


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_fitness_that_is_no_number_changes_nothing(bad):
    module = torch.nn.Linear(3, 1)
    es = EvolutionStrategy(module, 0.1, 8)
    weights = module.weight.detach().clone()
    with pytest.raises(ArgumentError, match=r"the fitness of 1 members is not finite \(members 5\); on_nan="):
        es.step(lambda module, members: torch.where(torch.arange(8) == 5, bad, torch.arange(8.0)))
    assert es.generation == 0
    assert module.weight.grad is None
    assert torch.equal(module.weight, weights)
    again, other = (EvolutionStrategy(torch.nn.Linear(3, 1), 0.1, 8) for _ in range(2))
    again.module.load_state_dict(module.state_dict())
    other.module.load_state_dict(module.state_dict())
    es.step(lambda module, members: torch.arange(8.0))  # the same generation, with good numbers
    again.step(lambda module, members: torch.arange(8.0))
    assert torch.equal(module.weight.grad, again.module.weight.grad)
    assert es.generation == 1
