"""KL, prediction, evolution, masks, variance and tables from any arguments: the plain computation's numbers, or a clear error."""

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from clear import attempt, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Exponential, Laplace, Normal

import flipout
from flipout import bayes, regularize, variance
from flipout.evolution import EvolutionStrategy, ObservationNormalizer
from flipout.gradients import gradient
from flipout.sklearn import BayesianClassifier, BayesianRegressor

PRIORS = (
    Normal(0.0, 1.0),
    Normal(0.3, 0.2),
    Laplace(0.0, 0.5),
    Exponential(1.0),
    {"weight": Normal(0.0, 2.0)},
    {"x": Normal(0.0, 1.0)},
    3,
)


@given(st.integers(1, 4), st.floats(1e-3, 3.0), st.sampled_from(PRIORS), st.booleans(), st.sampled_from((1, 0, 2.0)))
def test_the_kl_is_the_sum_over_weights(width, std, prior, bias, samples):
    torch.manual_seed(width)
    net = flipout.Perturbed(nn.Linear(width, 2, bias).double(), flipout.Gaussian(std, learnable=True))
    found = attempt(lambda: bayes.kl_divergence(net, prior, samples))
    known = isinstance(prior, Normal | Laplace) or (isinstance(prior, dict) and "weight" in prior and not bias)
    assert (found is not None) is (known and samples == 1)
    if found is not None:
        law = prior["weight"] if isinstance(prior, dict) else prior
        means = torch.cat([p.detach().flatten() for p in net.module.parameters()])
        expected = torch.distributions.kl_divergence(Normal(means, torch.full_like(means, std)), law).sum()
        assert float(found.detach()) == pytest.approx(float(expected), rel=1e-6)


@settings(max_examples=40)
@given(
    st.integers(0, 3), st.integers(-1, 5), st.sampled_from(("classification", "regression", "x")),
    st.sampled_from((0.0, 0.5, -1.0, float("nan"), "x", torch.ones(2), torch.ones(5, 1, 1))), st.sampled_from((None, 1, 2, 0)),
)  # fmt: skip
def test_predictions_are_averages_over_members(rows, samples, task, noise, at_once):
    torch.manual_seed(0)
    net = flipout.Perturbed(nn.Linear(3, 2).double(), flipout.Gaussian(0.3))
    x = torch.randn(rows, 3, dtype=torch.float64)

    def generator():
        return torch.Generator().manual_seed(1)

    found = attempt(lambda: bayes.predict(net, x, samples, task, noise_variance=noise, generator=generator(), at_once=at_once))
    good = rows > 0 and samples > 0 and task != "x" and at_once != 0
    if task == "regression":
        good = (
            good
            and isinstance(noise, float | torch.Tensor)
            and (noise.dim() == 1 if isinstance(noise, torch.Tensor) else noise >= 0)
        )
    assert (found is not None) is good
    if found is None:
        return
    outputs = bayes.sample_outputs(net, x, samples, generator=generator(), at_once=at_once)
    if task == "classification":
        torch.testing.assert_close(found.mean, outputs.softmax(-1).mean(0))
    else:
        torch.testing.assert_close(found.mean, outputs.mean(0))
        between = outputs.var(0) if samples > 1 else torch.zeros_like(found.mean)
        torch.testing.assert_close(found.variance, between + noise)


# --- evolution -----------------------------------------------------------------------------------------------------------------

FITNESS = st.one_of(
    st.floats(-10, 10), st.sampled_from((0.1, 0.1, 1.0, 1e200, -1e200, 1.7e308, -1.7e308, 5e-324, 1e-200)),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


def plain_shaping(name, fitness):
    """Weights by rational numbers, or by scipy."""
    values = [np.longdouble(f) for f in fitness]
    if len(set(fitness)) == 1:
        return np.zeros(len(fitness))
    if name == "centered_rank":
        return (scipy.stats.rankdata(fitness) - 1) / (len(fitness) - 1) - 0.5
    if name == "sign":
        ordered = sorted(values)
        median = ordered[(len(values) - 1) // 2] / 2 + ordered[len(values) // 2] / 2
        return np.sign([v - median for v in values]).astype(float)
    centred = np.array(values) - np.mean(np.array(values))
    return (centred / np.sqrt(np.mean(centred**2))).astype(float)


@settings(max_examples=90)
@given(
    st.data(), st.sampled_from(("centered_rank", "zscore", "sign")), st.booleans(), st.sampled_from((None, 4)),
    st.sampled_from((None, 2, 4)), st.sampled_from((flipout.Flipout(), flipout.LowRank(2), flipout.Independent())),
    st.sampled_from(("rademacher", "gaussian")),
)  # fmt: skip
def test_the_update_is_the_sum_over_members(data, shaping, antithetic, per_base, chunk, estimator, base):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    es = EvolutionStrategy(
        module, 0.1, 8, estimator=estimator, base=base, members_per_base=per_base, antithetic=antithetic, fitness_shaping=shaping,
        seed=3, chunk=chunk,
    )  # fmt: skip
    fitness = data.draw(st.lists(FITNESS, min_size=8, max_size=8))
    means = {name: p.detach().clone() for name, p in module.named_parameters()}
    members = [dict(es.member(0, n).named_parameters()) for n in range(8)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "all 8 members .* have the fitness")
        es.step(lambda module, members: torch.tensor(fitness, dtype=torch.float64)[members.start : members.start + members.count])
    weights = plain_shaping(shaping, fitness)
    for name, parameter in module.named_parameters():
        expected = -sum(w * (m[name].detach() - means[name]) for w, m in zip(weights, members, strict=True)) / (8 * 0.1**2)
        assert close(parameter.grad, expected, 1e-8)
        assert torch.equal(parameter.detach(), means[name])


def test_fitness_in_a_list_keeps_all_its_digits():
    es = EvolutionStrategy(nn.Linear(2, 1), 0.1, 4)
    fitness = [1.0, 1.0 + 1e-9, 1e39, 2e39]
    assert es.step(lambda module, members: fitness).tolist() == fitness


@settings(max_examples=60)
@given(
    st.one_of(
        st.lists(st.floats(), max_size=9), st.just(None), st.just("x"), st.just(torch.ones(8, 1)), st.just(torch.ones(8) * 1j),
        st.just(np.arange(8)), st.just(torch.arange(8) > 3), st.just([None] * 8),
    ),
    st.sampled_from(("error", "worst")),
)  # fmt: skip
def test_what_is_no_fitness_leaves_everything_as_it_was(fitness, on_nan):
    module = nn.Linear(2, 1)
    es = EvolutionStrategy(module, 0.1, 8, on_nan=on_nan)
    weights = module.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "all 8 members .* have the fitness")
        found = attempt(lambda: es.step(lambda module, members: fitness))
    assert torch.equal(module.weight, weights)
    assert es.generation == (found is not None)
    assert (module.weight.grad is None) is (found is None)
    if found is not None:
        assert bool(module.weight.grad.isfinite().all())
        finite = torch.as_tensor(fitness, dtype=torch.float64).isfinite()
        assert bool(finite.any())
        assert on_nan == "worst" or bool(finite.all())


@given(
    st.sampled_from((0.1, 0.0, -1.0, float("nan"), True, "x", lambda g: 0.1, lambda g: float("inf"))),
    st.one_of(st.integers(-1, 9), st.just(8.0)), st.booleans(), st.one_of(st.none(), st.integers(-1, 5)),
    st.sampled_from(("centered_rank", "x", 3, torch.square)), st.one_of(st.integers(-1, 2), st.just("0")),
    st.sampled_from((flipout.Flipout(), flipout.Shared(), flipout.LocalReparameterization(), 3)),
)  # fmt: skip
def test_a_strategy_is_made_or_refused(std, population, antithetic, per_base, shaping, seed, estimator):
    def make():
        es = EvolutionStrategy(
            nn.Linear(2, 1), std, population, antithetic=antithetic, members_per_base=per_base, fitness_shaping=shaping, seed=seed,
            estimator=estimator,
        )  # fmt: skip
        return es.step(lambda module, members: torch.arange(float(members.count)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "all .* members .* have the fitness")
        found = attempt(make)
    assert found is None or len(found) == population


@given(
    st.integers(1, 8),
    st.sampled_from((torch.float32, torch.int64, torch.bool, torch.float16)),
    st.integers(0, 3),
    st.integers(-2, 9),
)
def test_means_of_members_and_their_numbers(rows, dtype, dims, n):
    es = EvolutionStrategy(nn.Linear(2, 1), 0.1, 4)
    values = (torch.randn(4 * rows, *[2] * dims) * 3).to(dtype)
    with es.ask() as members:
        found = attempt(lambda: members.mean(values))
    if found is not None:
        expected = values.double().reshape(4, -1).mean(1) if dims == 0 else values.double().flatten(1).mean(1)
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert (found is not None) is (dims == 0 or rows == 1)
    assert (attempt(lambda: es.member(0, n)) is not None) is (0 <= n < 4)
    assert attempt(lambda: es.member(0, 1.5)) is None


@given(
    st.lists(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), max_size=3), max_size=3),
    st.sampled_from((None, float("nan"), "shape")),
)  # fmt: skip
def test_the_normaliser_has_the_mean_and_deviation_of_what_it_saw(batches, spoiled):
    normalizer = ObservationNormalizer((2,), clip=1e9)
    for batch in batches:
        normalizer.observe(torch.tensor(batch, dtype=torch.float64).view(-1, 2))
    if spoiled is not None:
        bad = torch.ones(1, 3) if spoiled == "shape" else torch.tensor([[1.0, spoiled]])
        assert attempt(lambda: normalizer.observe(bad)) is None
        assert attempt(lambda: normalizer.merge(torch.ones(3, 3))) is None
    normalizer.update()
    seen = torch.tensor([row for batch in batches for row in batch], dtype=torch.float64).view(-1, 2)
    assert normalizer.count == len(seen)
    if len(seen) >= 2 and bool((seen.std(0) > 1.0).all()):
        expected = (seen - seen.mean(0)) / seen.std(0, correction=0)
        torch.testing.assert_close(normalizer(seen), expected, rtol=1e-4, atol=1e-4)


# --- masks, variance, tables ---------------------------------------------------------------------------------------------------

CHANCE = st.one_of(st.floats(-0.5, 1.5), st.sampled_from((0, True, "x", None, float("nan"))))


@given(CHANCE, st.sampled_from(("sequence", "step", "batch", "x")), st.integers(0, 4), st.integers(0, 4))
def test_masks_are_none_or_the_inverse_of_what_is_kept(p, per, rows, features):
    like = torch.zeros((), dtype=torch.float64)
    valid = isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p < 1
    for make, ways, first in (
        (lambda: regularize.Dropout(p, per).mask(3, rows, features, like=like, generator=None), ("sequence", "step"), 1),
        (lambda: regularize.EmbeddingDropout(p, per).mask(rows, features, like=like, generator=None), ("sequence", "batch"), None),
    ):
        mask = attempt(make)
        assert (mask is not None) is (valid and per in ways)
        if mask is not None:
            allowed = torch.tensor([0.0, 1 / (1 - p)], dtype=torch.float64)
            assert bool(torch.isclose(mask[..., None], allowed).any(-1).all())
            assert mask.shape[-1] == features
            assert first is None or mask.shape[0] == (3 if per == "step" else 1)
    assert (attempt(lambda: regularize.Zoneout(p, 0.5)) is not None) is valid


@settings(max_examples=40)
@given(
    st.sampled_from((nn.LSTM, nn.GRU, nn.RNN)), st.sampled_from(list({**regularize.CHAR, **regularize.WORD}.values())),
    st.integers(1, 2), st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_a_method_leaves_the_plain_net_in_evaluation(kind, method, count, bidirectional, rows):
    torch.manual_seed(0)
    layer = kind(2, 3, count, bidirectional=bidirectional)
    net = attempt(lambda: regularize.Regularized(layer, method, torch.Generator().manual_seed(0)))
    if net is None:
        return
    x = torch.randn(4, rows, 2)
    found = attempt(lambda: net(x)[0])
    if found is not None:
        assert found.shape == layer(x)[0].shape
        assert bool(found.isfinite().all())
    if method.zoneout is None:
        assert torch.equal(net.eval()(x)[0], layer(x)[0])


@settings(max_examples=25)
@given(
    st.one_of(st.integers(-1, 5), st.just(2.0)), st.integers(-1, 5), st.one_of(st.none(), st.integers(0, 3)),
    st.sampled_from(("shared", "flipout", "independent", "x", 3)), st.floats(-0.2, 1.2), st.one_of(st.none(), st.integers(-1, 4)),
)  # fmt: skip
def test_the_variance_is_that_of_the_gradients_drawn(batch, draws, repeats, estimator, confidence, micro):
    torch.manual_seed(0)
    net = flipout.Perturbed(nn.Linear(2, 1).double(), flipout.Gaussian(0.3))

    def sample(n, generator):
        return torch.randn(n, 2, dtype=torch.float64, generator=generator)

    def loss(net, x):
        return net(x).square().mean()

    found = attempt(
        lambda: variance.gradient_variance(
            net, loss, sample, batch, [estimator], draws, repeats=repeats, confidence=confidence, micro_batch=micro
        )
    )
    good = (
        type(batch) is int
        and batch > 0
        and draws >= 2
        and estimator not in ("x", 3)
        and micro not in (-1, 0)
        and 0 < confidence < 1
    )
    good = good and (repeats is None or 1 <= repeats <= draws // 2)
    assert (found is not None) is good
    if good and repeats == 1:
        with net.using(variance.ESTIMATORS[estimator]()):
            rows = next(rows for rows in range(min(micro or batch, batch), 0, -1) if batch % rows == 0)
            drawn = [gradient(net, loss, sample, batch, rows, 0, (batch, i))["weight"].flatten() for i in range(draws)]
        if estimator != "independent":
            expected = float(torch.stack(drawn).var(0).sum())
            assert found[estimator].of(["weight"]).value == pytest.approx(expected, rel=1e-8)


#: Values of each parameter, first the good and then the bad.
PARAMETERS = {
    "hidden": ([(2,), ()], [3, (0,), ("x",)]),
    "std": ([0.05, np.float64(0.1)], [0, "x", float("nan")]),
    "prior_std": ([1.0], [-1, None]),
    "temperature": ([1.0, 0], [-1, "x", float("inf")]),
    "steps": ([2], [0, "x"]),
    "batch_size": ([4], [0]),
    "learning_rate": ([0.01], [float("inf")]),
    "samples": ([3, 1], [0]),
    "estimator": (["flipout", "shared"], ["x"]),
}


@settings(max_examples=60)
@given(
    st.fixed_dictionaries({}, optional={name: st.sampled_from(good) for name, (good, _) in PARAMETERS.items()}),
    st.one_of(st.none(), st.sampled_from([(name, value) for name, (_, bad) in PARAMETERS.items() for value in bad])),
    st.sampled_from((1.0, 1e-200, 1e-5, 1e100, 1e200, 0.0)),
    st.sampled_from((1.0, 1e-200, 1e150, 1e200, 0.0)),
)
def test_tables_give_finite_predictions_or_an_error(parameters, spoilt, scale, width):
    X = scale * np.array([[math.sin(i), math.cos(2 * i)] for i in range(9)])
    y = width * np.array([math.sin(i) for i in range(9)])
    options = {"steps": 2, "samples": 2, "hidden": (2,), "random_state": 0, **parameters}
    options |= {} if spoilt is None else dict([spoilt])
    for model, target in ((BayesianRegressor, y), (BayesianClassifier, np.array(list("abcabcabc")))):
        fitted = attempt(lambda model=model, target=target: model(**options).fit(X, target))
        large = scale == 1e200 or (width == 1e200 and model is BayesianRegressor)  # their squares overflow
        assert (fitted is not None) is (spoilt is None and not large)
        if fitted is None:
            continue
        if model is BayesianClassifier:
            np.testing.assert_allclose(fitted.predict_proba(X).sum(1), 1.0)
        else:
            mean, std = fitted.predict(X, return_std=True)
            assert np.isfinite(mean).all()
            assert (std >= 0).all()
            assert np.isfinite(std).all()


def test_every_pair_of_estimator_and_law_is_served_or_refused_at_once():
    laws = (flipout.Gaussian(0.1), flipout.Rademacher(0.1), flipout.DropConnect(0.3), flipout.DropConnect(0.5))
    estimators = (flipout.Flipout(), flipout.Shared(), flipout.Independent(), flipout.LowRank(1), flipout.LocalReparameterization())
    served = {
        (str(law), str(estimator)): attempt(lambda law=law, estimator=estimator: flipout.Perturbed(nn.Linear(2, 2), law, estimator))
        for law, estimator in itertools.product(laws, estimators)
    }
    refused = {pair for pair, net in served.items() if net is None}
    assert (str(flipout.DropConnect(0.3)), str(flipout.Flipout())) in refused
    assert not any(estimator in (str(flipout.Shared()), str(flipout.Independent())) for _, estimator in refused)
