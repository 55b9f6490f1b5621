"""The front for tables: scikit-learn's own checks, what is predicted far from the data, and what is refused."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.exceptions import SkipTestWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import flipout
from flipout.sklearn import BayesianClassifier, BayesianRegressor

QUICK = {"hidden": (8,), "steps": 40, "samples": 4, "learning_rate": 0.1, "random_state": 0}


@pytest.mark.parametrize("kind", [BayesianClassifier, BayesianRegressor])
def test_passes_scikit_learn_s_own_checks(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        found = check_estimator(kind(**QUICK))
    assert len(found) > 40
    assert not [each["check_name"] for each in found if each["status"] == "failed"]


def test_learns_a_bent_boundary_and_is_unsure_far_from_it():
    X, y = make_moons(300, noise=0.15, random_state=0)
    labels = np.array(["left", "right"])[y]
    net = BayesianClassifier(random_state=0).fit(X, labels)
    assert net.score(X, labels) > 0.95
    assert set(net.predict(X)) == {"left", "right"}
    p = net.predict_proba(X)
    assert np.allclose(p.sum(1), 1)
    assert isinstance(net.net_, flipout.Perturbed)


def test_learns_a_function_with_its_noise_and_its_ignorance():
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (400, 1))
    y = 5 + 10 * np.sin(3 * X[:, 0]) + rng.normal(0, 1.0, 400)
    net = BayesianRegressor(steps=800, random_state=0).fit(X, y)
    assert net.score(X, y) > 0.9
    assert 0.7 < net.noise_std_ < 1.8
    mean, std = net.predict(X, return_std=True)
    assert np.array_equal(mean, net.predict(X))
    assert 0.8 < np.mean(np.abs(mean - y) < 2 * std) <= 1.0
    _, far = net.predict([[6.0]], return_std=True)
    assert far[0] > 2 * std.mean()


def test_one_random_state_is_one_net_and_every_estimator_serves():
    X, y = make_moons(60, random_state=0)
    for estimator in ("flipout", "shared", "local_reparameterization", "independent"):
        first, second = (BayesianClassifier(**{**QUICK, "steps": 5, "estimator": estimator}).fit(X, y) for _ in range(2))
        assert np.array_equal(first.predict_proba(X), second.predict_proba(X))


def test_pipelines_and_searches_take_it():
    X, y = make_moons(60, random_state=0)
    net = make_pipeline(StandardScaler(), BayesianClassifier(**{**QUICK, "steps": 5}))
    search = GridSearchCV(net, {"bayesianclassifier__steps": np.array([2, 5])}, cv=2).fit(X, y)
    assert search.best_params_["bayesianclassifier__steps"] in (2, 5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples": 0}, "samples=0"),
        ({"steps": 0}, "steps=0"),
        ({"hidden": (0,)}, "hidden=0"),
        ({"std": 0.0}, "std=0.0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"estimator": "flippant"}, "unknown estimator"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_refuses_parameters(options, told):
    X, y = make_moons(20, random_state=0)
    with pytest.raises(flipout.ArgumentError, match=told):
        BayesianClassifier(**{**QUICK, **options}).fit(X, y)


def test_a_loss_that_is_no_number_stops_it():
    X, y = make_moons(20, random_state=0)
    with pytest.raises(flipout.NotFiniteError, match="loss is"):
        BayesianClassifier(**{**QUICK, "learning_rate": 1e200}).fit(X, y)
