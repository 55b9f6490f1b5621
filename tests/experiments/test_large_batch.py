"""Races of estimators: what they record, that a killed one goes on to the same end, and that flipout wins on real digits."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from laws import z_mean
from torch.distributions import Normal
from typer.testing import CliRunner

import flipout
from flipout import data
from flipout.streams import stream
from flipout.variance.named import ESTIMATORS
from flipout_experiments.commands.app import app
from flipout_experiments.harness import reproduce
from flipout_experiments.harness.run import Run
from flipout_experiments.nets.networks import FullyConnected, TiedLSTM
from flipout_experiments.nets.pretrain import mean_loss
from flipout_experiments.paper.race import lanes as races
from flipout_experiments.paper.race.lanes import Lane, Objective, RaceSettings, paces, race
from flipout_experiments.paper.race.large_batch import LargeBatchSettings
from flipout_experiments.paper.race.outcome import ratio_over_seeds

ENTRY = reproduce.find_entry("large-batch")
KINDS = {("fc", "bbb"): 1, ("fc", "multiplicative"): 2, ("convle", "auto"): 1, ("lstm", "auto"): 1}
BRIEF = RaceSettings(16, 0.003, (1e-3,), steps=4, window=2, test_every=2, save_every=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The result of every kind of race at its smallest, and its folder."""
    found = {}
    for net, noise in KINDS:
        folder = tmp_path_factory.mktemp("races") / f"{net}-{noise}"
        found[net, noise] = reproduce.run_experiment(ENTRY, "smoke", folder, net=net, noise=noise), folder
    return found


def timeless(value):
    """Without what the clock says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.startswith("seconds")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
def test_every_race_has_its_record(runs, kind):
    result, folder = runs[kind]
    assert len(result["races"]) == KINDS[kind]
    expected = {"shared", "flipout"} | ({"local_reparameterization"} if kind[0] == "fc" else set())
    for each in result["races"]:
        assert set(each["runs"]) == expected
        for seeds in each["runs"].values():
            assert len(seeds) == 2
            for one in seeds:
                assert one["steps_to"] == {"10": 2, "0.001": None}
                assert one["seconds_to"]["10"] == pytest.approx(2 * one["seconds_a_step"])
                assert one["seconds_to"]["0.001"] is None
                assert [step for step, _ in one["tests"]] == [2, 4]
                assert one["steps"] == 4
        ratio = each["ratios"]["shared / flipout"]
        assert ratio["10"]["steps_to"]["value"] == 1.0
        assert ratio["0.001"]["steps_to"] is None
        assert ratio["seconds_a_step"]["value"] > 0
    assert {path.name for path in (folder / "figures").iterdir()} == {"large-batch.png", "large-batch.svg"}


def test_the_noise_of_each_net_is_the_papers():
    assert [LargeBatchSettings.preset("paper", net, "auto").noises[0].kind for net in ("fc", "convle", "lstm")] == [
        "bbb", "bbb", "dropconnect",
    ]  # fmt: skip
    multiplicative = LargeBatchSettings.preset("laptop", "fc", "multiplicative")
    assert [noise.std for noise in multiplicative.noises] == [1.0, 0.5]
    for net in ("fc", "convle"):
        paper = LargeBatchSettings.preset("paper", net, "bbb")
        assert (paper.race.batch, paper.race.learning_rate, paper.noises[0].temperature, paper.width) == (8192, 0.003, 0.1, 1.0)
    lstm = LargeBatchSettings.preset("paper", "lstm", "auto")
    assert (lstm.race.batch, lstm.race.learning_rate) == (8192, 0.001)
    assert (lstm.layers, lstm.units, lstm.embedding, lstm.dropout, lstm.level) == (3, 1150, 400, (0.1, 0.4), "word")
    assert LargeBatchSettings.preset("paper", "fc", "dropconnect").estimators == ("shared", "flipout")


@pytest.mark.parametrize("kind", KINDS)
def test_claims_stand_beside_the_papers(runs, kind):
    claims = ENTRY.load().claims(runs[kind][0])
    assert len(claims) == (3 if kind[0] == "fc" else 2) * KINDS[kind]
    assert {claim.paper for claim in claims} <= {3.0, 1.5, 1.0}
    assert all("training NLL of 10" in claim.what for claim in claims)  # the last that all reached
    assert all((claim.holds is None) is (kind[1] == "multiplicative" or kind[0] == "lstm") for claim in claims)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [14])
def test_a_killed_race_goes_on_to_the_same_end(runs, tmp_path, monkeypatch, at):
    result, folder = runs["convle", "auto"]
    real, calls = races._step, 0

    def mortal(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return real(*args)

    monkeypatch.setattr(races, "_step", mortal)
    with pytest.raises(Killed):
        reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run", net="convle")
    monkeypatch.setattr(races, "_step", real)
    again = reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run", net="convle", resume=True)
    assert timeless(again) == timeless({**result, "settings": again["settings"]})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


def test_a_loss_that_is_no_number_names_a_parameter_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real = races._step

    def poisoned(net, optimiser, objective, batch, settings, seed, step):
        if step == 3:
            with torch.no_grad():
                net.module.conv2.bias[0] = float("nan")
        return real(net, optimiser, objective, batch, settings, seed, step)

    monkeypatch.setattr(races, "_step", poisoned)
    with pytest.raises(flipout.NotFiniteError, match=r"the loss is nan; .* is 'conv2.bias'"):
        reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run", net="convle")
    monkeypatch.setattr(races, "_step", real)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "bbb-seed0.pt", weights_only=True)["state"]
    assert saved["step"] == 2
    assert all(value.isfinite().all() for lane in saved["lanes"].values() for value in lane["net"].values())
    assert reproduce.run_experiment(ENTRY, "smoke", tmp_path / "run", net="convle", resume=True)["races"]


def test_the_command_prints_tables(tmp_path):
    arguments = ["reproduce", "large-batch", "--net", "fc", "--preset", "smoke", "--out", str(tmp_path / "run")]
    found = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert found.exit_code == 0, found.output
    for text in ("iterations to a training NLL", "flipout / LRT", "not reached", "a step", "last test error", "result.json"):
        assert text in found.output


def one_step(estimator, micro_batch, prior):
    """The weights after one step from one start."""
    net = flipout.Perturbed(FullyConnected(stream(0), units=16), flipout.Gaussian(0.05, learnable=True), ESTIMATORS[estimator]())
    digits = data.embedded_mnist().train
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    objective = Objective(mean_loss, prior, 40, 1.0)
    settings = replace(BRIEF, micro_batch=micro_batch)
    loss, _ = races._step(net, optimiser, objective, digits.sample(16, stream(1)), settings, 0, 0)
    return loss, torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("prior", [None, Normal(0.0, 1.0)], ids=["nll", "ELBO"])
def test_micro_batches_make_one_step_and_count_the_kl_once(prior):
    whole_loss, whole = one_step("shared", None, prior)
    parts_loss, parts = one_step("shared", 4, prior)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    assert torch.allclose(parts, whole, atol=1e-5)


def test_a_target_is_reached_when_the_mean_of_the_window_is():
    lane, settings = Lane(), RaceSettings(1, 0.1, (2.0, 1.0), steps=10, window=2)
    for loss in (0.5, 3.0, 1.0, 2.0, 0.9):
        lane.add(loss, 0.1, settings)
        assert not lane.ended(settings)
    assert lane.reached == {2.0: 2}  # the first step has no window yet
    assert 2.0 in lane.reached
    lane.add(1.0, 0.1, settings)
    assert lane.reached == {2.0: 2, 1.0: 6}
    assert lane.ended(settings)
    assert lane.curve(2)[-1] == (6, pytest.approx(0.95))
    short = Lane()
    for _ in range(10):
        short.add(5.0, 0.1, settings)
    assert short.ended(settings)
    assert not short.reached


def test_paces_are_medians_of_the_steps_that_all_took():
    lanes = {"a": Lane(seconds=[9.0, 9.0, 1.0, 2.0, 3.0]), "b": Lane(seconds=[9.0, 9.0, 4.0, 4.0, 4.0, 100.0, 100.0])}
    assert paces(lanes) == {"a": 2.0, "b": 4.0}
    assert paces({"a": Lane(seconds=[1.0])}) == {"a": 1.0}


def test_intervals_of_ratios_are_those_of_their_logarithms():
    g = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(300):
        logs = 0.2 * torch.randn(3, generator=g, dtype=torch.float64) + 1.0
        found = ratio_over_seeds([(float(log.exp()), 1.0) for log in logs], 0.9)
        covered.append(2.718281828 in found)
    assert abs(float(z_mean(torch.tensor(covered).double(), 0.9))) < 4
    assert ratio_over_seeds([(3.0, 2.0), (3.0, 2.0)], 0.9).value == pytest.approx(1.5)
    assert ratio_over_seeds([(3.0, None), (3.0, 2.0)], 0.9) is None


def test_flipout_needs_fewer_steps_than_shared_noise_on_real_digits(tmp_path):
    """Sec. 4.3 in small: Bayes by Backprop, half of the paper's units, 1,024 digits a step."""
    digits = data.embedded_mnist().train
    nets = {
        name: flipout.Perturbed(FullyConnected(stream(0), 256), flipout.Gaussian(0.05, learnable=True), ESTIMATORS[name]())
        for name in ("shared", "flipout")
    }
    settings = RaceSettings(1024, 0.003, (1.5,), steps=60, window=3)
    objective = Objective(mean_loss, Normal(0.0, 1.0), len(digits), 0.1)
    with Run.open(tmp_path / "run", "race", settings) as run:
        found = race(nets, objective, digits.sample, lambda net: 0.0, settings, 0, run, "race", lambda done, total: None)
    reached = {name: lane.reached.get(1.5, settings.steps) for name, lane in found.items()}
    assert reached["flipout"] < 0.75 * reached["shared"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["estimator"] for line in lines} == {"shared", "flipout"}


def test_dropout_of_the_language_model():
    """Whole tokens of the vocabulary, and features of the output: means are kept, masks come from the generator."""
    net = TiedLSTM(stream(0), 50, embedding=8, units=6, embedding_dropout=0.25, output_dropout=0.5)
    tokens = torch.arange(50).repeat(2, 1)
    net.eval()
    clean = net(tokens)
    assert torch.equal(clean, net(tokens))
    net.train()
    net.dropout_generator = stream(1)
    first = net(tokens)
    net.dropout_generator = stream(1)
    assert torch.equal(first, net(tokens))
    assert not torch.equal(first, clean)
    dropped = []
    net.embedding.register_forward_hook(lambda module, inputs, output: dropped.append(output))
    net.lstms[0].register_forward_pre_hook(lambda module, inputs: dropped.append(inputs[0]))
    for _ in range(100):
        net(tokens)
    whole = torch.stack(dropped[1::2])
    kept = (whole[:, 0] != 0).any(-1)
    assert torch.equal(kept, (whole[:, 1] != 0).any(-1))  # the same tokens in every row of the batch
    assert abs(float(z_mean(kept.double().mean(1), 0.75))) < 4
    assert torch.allclose(
        whole[kept[:, None].expand(-1, 2, -1)], (dropped[0] / 0.75).expand(100, -1, -1, -1)[kept[:, None].expand(-1, 2, -1)]
    )
    assert statistics.fmean(float((net(tokens) - net.decoder.bias == 0).all(-1).float().mean()) for _ in range(5)) < 0.1
