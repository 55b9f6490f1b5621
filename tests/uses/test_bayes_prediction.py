"""Prediction, its metrics and its figures: laws, agreement with hand-made numbers, and what is refused."""

import math

import pytest
import torch
from laws import z_mean
from matplotlib.figure import Figure
from torch import nn

import flipout
from flipout import ArgumentError, bayes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classifier(std=0.5, **options):
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return flipout.Perturbed(module, flipout.Gaussian(std), **options)


def test_the_numbers_belong_together():
    found = bayes.predict(classifier(), torch.randn(5, 4), samples=16, generator=generator())
    p = found.samples
    assert p.shape == (16, 5, 3)
    assert torch.allclose(p.sum(-1), torch.ones(16, 5))
    assert torch.allclose(found.mean, p.mean(0))
    entropy = -(found.mean * found.mean.log()).sum(-1)
    assert torch.allclose(found.entropy, entropy)
    assert torch.allclose(found.mutual_information, entropy + (p * p.log()).sum(-1).mean(0), atol=1e-6)
    assert (found.mutual_information >= 0).all()
    assert (found.entropy <= math.log(3) + 1e-6).all()


@pytest.mark.parametrize("at_once", [1, 4, None])
@pytest.mark.parametrize("estimator", [flipout.Flipout(), flipout.Shared(), flipout.LocalReparameterization(), flipout.LowRank(1)])
def test_every_member_is_one_function_of_independent_weights(estimator, at_once):
    """Of a linear layer the outputs give the weights back; over members these have the noise's law and are independent."""
    module = nn.Linear(2, 1, bias=False).double()
    net = flipout.Perturbed(module, flipout.Gaussian(0.3), estimator)
    x = torch.eye(2, dtype=torch.float64)
    twice = torch.cat([x, x])
    weights = bayes.sample_outputs(net, twice, 4000, generator=generator(), at_once=at_once)[..., 0]
    assert torch.allclose(weights[:, :2], weights[:, 2:])
    change = weights[:, :2] - module.weight.detach()
    assert z_mean(change, 0.0).abs().max() < 4
    assert z_mean(change.square(), 0.09).abs().max() < 4
    assert z_mean(change[:, :1] * change[:, 1:], 0.0).abs().max() < 4
    assert z_mean(change[1:] * change[:-1], 0.0).abs().max() < 4
    assert z_mean((change[1:].square() - 0.09) * (change[:-1].square() - 0.09), 0.0).abs().max() < 4  # nor do they share |ΔW|


def test_rows_in_blocks_see_the_same_members(monkeypatch):
    net, x = classifier(), torch.randn(40, 4)
    whole = bayes.predict(net, x, 6, generator=generator())
    monkeypatch.setattr(bayes.prediction, "_ROWS", 24)
    assert torch.allclose(bayes.predict(net, x, 6, generator=generator()).samples, whole.samples, atol=1e-6)


def test_the_same_generator_gives_the_same_prediction_and_no_other_state_moves():
    net, x = classifier(), torch.randn(3, 4)
    before = torch.get_rng_state()
    a, b = (bayes.predict(net, x, 8, generator=generator(3)).mean for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a, bayes.predict(net, x, 8, generator=generator(4)).mean)


class Answer:
    """What a model of Hugging Face returns: an object with ``.logits``."""

    def __init__(self, logits):
        self.logits = logits


class Reader(nn.Module):
    """Takes keyword arguments, of which one has no rows."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask=None, scale=1.0, wrap=dict):
        hidden = self.table(tokens)
        hidden = hidden if mask is None else hidden * mask.unsqueeze(-1)
        return wrap(logits=self.head(hidden.mean(1)) * scale)


@pytest.mark.parametrize("wrap", [dict, Answer])
def test_takes_keyword_arguments_and_reads_logits(wrap, monkeypatch):
    net = flipout.Perturbed(Reader(), flipout.Gaussian(0.3)).eval()
    tokens, mask = torch.arange(10).remainder(7).view(5, 2), torch.ones(5, 2)
    monkeypatch.setattr(bayes.prediction, "_ROWS", 6)  # in several blocks of rows
    x = {"tokens": tokens, "mask": mask, "scale": torch.tensor(2.0), "wrap": wrap}
    found = bayes.sample_outputs(net, x, samples=3, generator=torch.Generator().manual_seed(1))
    assert found.shape == (3, 5, 3)
    with net.using(flipout.Independent()), net.hold(3, torch.Generator().manual_seed(1)):
        whole = net(tokens.repeat(3, 1), mask.repeat(3, 1), scale=2.0)["logits"].unflatten(0, (3, 5))
    torch.testing.assert_close(found, whole)
    assert bayes.predict(net, x, samples=3).mean.shape == (5, 3)


def test_mode_estimator_and_gradients_are_as_they_were():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    net = flipout.Perturbed(module, flipout.Gaussian(0.1), include="*weight").train()
    module[2].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = bayes.predict(net, torch.randn(6, 4), 4)
    assert not found.mean.requires_grad
    assert net.training
    assert not module[2].training
    assert net.estimator == flipout.Flipout()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with pytest.raises(RuntimeError, match="batch2"):
        bayes.predict(net, torch.randn(6, 5), 4)
    assert net.training
    assert net.estimator == flipout.Flipout()
    bayes.predict(net, torch.randn(6, 4), 4)  # no draw is held


def test_without_noise_worth_the_name_it_is_the_net_itself():
    net = classifier(std=1e-9)
    x = torch.randn(5, 4)
    found = bayes.predict(net, x, 4)
    assert torch.allclose(found.mean, net.module(x).softmax(-1), atol=1e-5)
    assert found.mutual_information.abs().max() < 1e-5


def test_members_that_disagree_have_mutual_information_and_those_that_hesitate_have_none():
    one_hot = torch.eye(3)[:, None, :]
    apart = bayes.Classification.of(one_hot)
    assert torch.allclose(apart.entropy, torch.tensor([math.log(3)]))
    assert torch.allclose(apart.mutual_information, torch.tensor([math.log(3)]))
    torn = bayes.Classification.of(torch.full((5, 1, 3), 1 / 3))
    assert torn.mutual_information.abs().max() < 1e-6
    assert bayes.Classification.of(one_hot, keep=False).samples is None


def test_a_regression_s_variance_is_the_exact_one():
    """Of a Gaussian linear model: Var(y | x) = σ² Σ x² + noise."""
    net = flipout.Perturbed(nn.Linear(3, 1, bias=False).double(), flipout.Gaussian(0.2))
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    found = bayes.predict(net, x, 20_000, "regression", noise_variance=0.5, generator=generator())
    expected = 0.04 * x.square().sum(1, keepdim=True)
    error = expected * math.sqrt(2 / 20_000)
    assert ((found.variance - 0.5 - expected) / error).abs().max() < 4
    assert torch.equal(found.std, found.variance.sqrt())
    assert bayes.predict(net, x, 1, "regression").variance.abs().max() == 0.0
    assert bayes.predict(net, x, 3, "regression", keep_samples=False).samples is None


def test_a_net_that_no_rule_serves_is_asked_member_by_member():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ torch.linalg.matrix_exp(self.weight)

    net = flipout.Perturbed(Odd(), flipout.Gaussian(0.1))
    x = torch.randn(4, 3)
    assert bayes.sample_outputs(net, x, 5, generator=generator()).var(0).min() > 0
    assert bayes.sample_outputs(net, x, 5, generator=generator(), at_once=2).var(0).min() > 0


def test_recurrent_nets_put_their_rows_where_they_belong():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 5), nn.Linear(5, 3)

        def forward(self, x):  # [T, N, 2]
            return self.head(self.lstm(x)[0])

    net = flipout.Perturbed(Last(), flipout.Gaussian(0.3), batch_dim=1)
    x = torch.randn(7, 4, 2)
    samples = bayes.predict(net, x, 3, generator=generator()).samples
    assert samples.shape == (3, 7, 4, 3)
    one = bayes.predict(net, x[:, 1:2], 3, generator=generator()).samples
    assert torch.allclose(samples[:, :, 1:2], one, atol=1e-6)


CONFIDENT = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
LABELS = torch.tensor([0, 0, 1, 1])


def test_metrics_by_hand():
    assert bayes.accuracy(CONFIDENT, LABELS) == pytest.approx(0.75)
    nll = -(math.log(0.9) + math.log(0.8) + math.log(0.3) + math.log(0.6)) / 4
    assert bayes.negative_log_likelihood(CONFIDENT, LABELS) == pytest.approx(nll, rel=1e-6)
    assert bayes.brier_score(CONFIDENT, LABELS) == pytest.approx((2 * 0.01 + 2 * 0.04 + 2 * 0.49 + 2 * 0.16) / 4, rel=1e-5)
    assert bayes.calibration_error(CONFIDENT, LABELS, bins=10) == pytest.approx((0.1 + 0.2 + 0.7 + 0.4) / 4, rel=1e-5)
    found = bayes.Classification.of(CONFIDENT[None])
    assert bayes.accuracy(found, LABELS) == pytest.approx(0.75)


def test_honest_probabilities_are_calibrated():
    g = generator()
    p = torch.rand(40_000, generator=g) * 0.5 + 0.5
    labels = (torch.rand(40_000, generator=g) > p).long()
    honest, proud = torch.stack([p, 1 - p], 1), torch.stack([p.sqrt(), 1 - p.sqrt()], 1)
    assert bayes.calibration_error(honest, labels) < 0.02 < 0.08 < bayes.calibration_error(proud, labels)
    assert bayes.negative_log_likelihood(honest, labels) < bayes.negative_log_likelihood(proud, labels)


def test_auroc_counts_pairs():
    inside, outside = torch.randn(30, generator=generator()), torch.randn(20, generator=generator(1)) + 0.5
    outside[:3] = inside[:3]  # ties count a half
    pairs = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    assert bayes.ood_auroc(inside, outside) == pytest.approx(float(pairs.mean()), abs=1e-6)
    assert bayes.ood_auroc(torch.zeros(5), torch.zeros(5)) == pytest.approx(0.5)


def test_figures():
    axes = bayes.plot_reliability(CONFIDENT, LABELS, label="net")
    assert axes.get_legend().get_texts()[0].get_text() == "net: ECE 0.350"
    confidence, right = axes.lines[1].get_data()
    assert list(confidence) == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert list(right) == [1, 0, 1, 1]
    own = Figure().subplots()
    assert bayes.plot_reliability(CONFIDENT, LABELS, axes=own) is own
    x = torch.tensor([2.0, 0.0, 1.0])
    band = bayes.plot_band(x, bayes.Regression.of(torch.stack([x, x + 2, x + 1])), functions=2)
    assert list(band.lines[-1].get_xdata()) == [0.0, 1.0, 2.0]
    assert list(band.lines[-1].get_ydata()) == [1.0, 2.0, 3.0]
    assert len(band.lines) == 3


REGRESSION = bayes.Regression.of(torch.randn(3, 4, 1))
REFUSED = {
    "no samples": (lambda: bayes.predict(classifier(), torch.randn(2, 4), 0), "samples=0"),
    "half a sample": (lambda: bayes.predict(classifier(), torch.randn(2, 4), 1.5), "samples=1.5"),
    "task": (lambda: bayes.predict(classifier(), torch.randn(2, 4), task="ranking"), "choose 'classification'"),
    "no net": (lambda: bayes.predict(nn.Linear(4, 3), torch.randn(2, 4)), "flipout.Perturbed"),
    "no batch": (lambda: bayes.predict(classifier(), [1.0]), "examples on dimension 0"),
    "one output": (
        lambda: bayes.predict(flipout.Perturbed(nn.Linear(4, 1), flipout.Gaussian(0.1)), torch.randn(2, 4)),
        "task='regression'",
    ),
    "two outputs": (
        lambda: bayes.predict(flipout.Perturbed(nn.LSTM(4, 3), flipout.Gaussian(0.1)), torch.randn(5, 2, 4)),
        "returned tuple",
    ),
    "probabilities": (lambda: bayes.Classification.of(torch.ones(3)), r"\[samples, N, classes\]"),
    "regression": (lambda: bayes.accuracy(REGRESSION, LABELS), "Regression"),
    "calibration of a regression": (lambda: bayes.calibration_error(REGRESSION, LABELS), "task='classification'"),
    "raw regression": (lambda: bayes.brier_score(REGRESSION.mean, LABELS), "do not sum to 1"),
    "logits": (lambda: bayes.negative_log_likelihood(torch.randn(4, 2) * 9, LABELS), "softmax"),
    "labels' shape": (lambda: bayes.accuracy(CONFIDENT, LABELS[:3]), "one integer for each of 4"),
    "labels' kind": (lambda: bayes.accuracy(CONFIDENT, LABELS.float()), "one integer"),
    "labels' range": (lambda: bayes.accuracy(CONFIDENT, LABELS + 1), "expected 0 to 1"),
    "vectors": (lambda: bayes.ood_auroc(CONFIDENT, LABELS.float()), "inside"),
    "numbers": (lambda: bayes.ood_auroc(torch.zeros(2), torch.tensor([math.nan])), "outside"),
    "plot of a regression": (lambda: bayes.plot_reliability(REGRESSION, LABELS), "Regression"),
    "band of a classification": (lambda: bayes.plot_band(torch.zeros(4), CONFIDENT), "task='regression'"),
    "band of other points": (lambda: bayes.plot_band(torch.zeros(5), REGRESSION), "one output for each"),
    "more functions": (lambda: bayes.plot_band(torch.zeros(4), REGRESSION, functions=4), "kept fewer samples"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what):
    act, told = REFUSED[what]
    with pytest.raises(ArgumentError, match=told):
        act()


def test_says_what_is_not_installed(monkeypatch):
    import builtins

    real = builtins.__import__
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ArgumentError, match=r"flipout\[bayes\]"):
        bayes.accuracy(CONFIDENT, LABELS)
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: _missing(name) if "matplotlib" in name else real(name, *rest))
    with pytest.raises(ArgumentError, match=r"flipout\[experiments\]"):
        bayes.plot_band(torch.zeros(4), REGRESSION)


def _missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
