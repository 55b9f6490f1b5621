"""Bayesian nets for tables, after the manner of scikit-learn: fit, predict, predict_proba, predict with return_std.

Small fully connected nets whose weights have a Gaussian posterior (Blundell et al. 2015), trained by flipout. They pass
scikit-learn's own ``check_estimator``, so pipelines, searches and cross-validation take them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "sklearn":
        raise
    raise ModuleNotFoundError(
        f"flipout.sklearn needs scikit-learn, which cannot be imported ({error}): pip install 'flipout[bayes]'", name=error.name
    ) from error

from flipout.arguments import require_count
from flipout.bayes import elbo_loss, kl_divergence, linear_annealing, require_finite, sample_outputs
from flipout.errors import ArgumentError
from flipout.noise import Gaussian
from flipout.perturb import Perturbed
from flipout.streams import stream
from flipout.variance.named import named_estimators

__all__ = ["BayesianClassifier", "BayesianRegressor"]

#: Streams of the initial weights, the batches, the noise and the predictions.
_WEIGHTS, _DATA, _NOISE, _PREDICT = 0, 1, 2, 3


class _BayesianNet(BaseEstimator):  # type: ignore[misc]
    """What the two have in common: inputs and targets are standardised, the net is trained in float64 on the CPU."""

    def __init__(
        self,
        hidden: tuple[int, ...] = (50,),
        std: float = 0.05,
        prior_std: float = 1.0,
        temperature: float = 1.0,
        steps: int = 400,
        batch_size: int = 128,
        learning_rate: float = 0.01,
        samples: int = 32,
        estimator: str = "flipout",
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.std = std
        self.prior_std = prior_std
        self.temperature = temperature
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.samples = samples
        self.estimator = estimator
        self.random_state = random_state

    def _fit(
        self, X: Any, targets: Tensor, outputs: int, nll: Callable[[Tensor, Tensor], Tensor], extra: list[nn.Parameter]
    ) -> None:
        """Trains ``net_`` on the negative ELBO."""
        steps, rows = self._checked(len(X))
        seed = self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._mean, self._spread = _standard(X, "X")
        inputs = self._inputs(X)
        module = _layers((X.shape[1], *self.hidden, outputs), stream(seed, _WEIGHTS))
        (estimator,) = named_estimators([self.estimator]).values()
        net = self.net_ = Perturbed(module, Gaussian(self.std, learnable=True), estimator)
        prior = Normal(0.0, float(self.prior_std))
        optimiser = torch.optim.Adam([*net.parameters(), *extra], lr=self.learning_rate)
        for step in range(steps):
            index = torch.randperm(len(inputs), generator=stream(seed, _DATA, step))[:rows]
            with net.hold(rows, stream(seed, _NOISE, step)):
                fit = nll(net(inputs[index]), targets[index])
            temperature = self.temperature * linear_annealing(step, max(1, steps // 2))
            loss = elbo_loss(fit, kl_divergence(net, prior), len(inputs), temperature).loss
            optimiser.zero_grad()
            loss.backward()
            require_finite(net, loss)
            optimiser.step()
        self.n_iter_ = steps
        net.eval()

    def _outputs(self, X: Any) -> Tensor:
        """Outputs of every member, ``[samples, N, outputs]``: the same members at every call."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return sample_outputs(self.net_, self._inputs(X), _plain(self.samples), generator=stream(self._seed, _PREDICT))

    def _inputs(self, X: Any) -> Tensor:
        return torch.from_numpy((X - self._mean) / self._spread)

    def _checked(self, rows: int) -> tuple[int, int]:
        """The steps, and the rows in each."""
        counts = {name: require_count(name, _plain(getattr(self, name)), 1) for name in ("steps", "batch_size", "samples")}
        if not isinstance(self.hidden, tuple | list):
            raise ArgumentError(f"hidden={self.hidden!r}: expected the units of each hidden layer, such as (50,)")
        for units in self.hidden:
            require_count("hidden", _plain(units), 1)
        for name in ("std", "prior_std", "learning_rate"):
            value = getattr(self, name)
            if not _is_number(value) or not (value > 0 and math.isfinite(value)):
                raise ArgumentError(f"{name}={value!r}: expected a positive number")
        if not _is_number(self.temperature) or not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ArgumentError(f"temperature={self.temperature!r}: expected a finite number from 0 on")
        return counts["steps"], min(counts["batch_size"], rows)


class BayesianClassifier(ClassifierMixin, _BayesianNet):  # type: ignore[misc]
    """A classifier whose probabilities are averaged over a posterior of nets.

    Args:
        hidden: units of each hidden layer.
        std: where the posterior's scales start, in the units of the weights.
        prior_std: of the normal prior.
        temperature: of the KL; 1 is the ELBO. It rises from 0 over the first half of the steps.
        steps: of Adam.
        batch_size: rows in a step, at most.
        learning_rate: of Adam.
        samples: nets that a prediction averages.
        estimator: of the gradients: ``"flipout"``, ``"shared"``, ``"local_reparameterization"``, ``"independent"``.
        random_state: seed of everything; as in scikit-learn.

    Attributes:
        classes_: the labels.
        net_: the trained :class:`flipout.Perturbed`, of standardised inputs.
        n_features_in_, n_iter_: as in scikit-learn.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> found = BayesianClassifier(random_state=0).fit(X, y)
        >>> found.predict_proba(X[:2]).shape, bool(found.score(X, y) > 0.9)
        ((2, 3), True)
    """

    def fit(self, X: Any, y: Any) -> BayesianClassifier:
        """Fits the posterior.

        Args:
            X: ``[N, features]``.
            y: ``[N]``, labels of any kind.

        Raises:
            ValueError: for tables that scikit-learn refuses, fewer than two classes, or a parameter that means nothing.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ArgumentError(f"y has 1 class, {self.classes_[0]!r}; a classifier needs 2 or more classes")
        self._fit(X, torch.from_numpy(codes), len(self.classes_), nn.functional.cross_entropy, [])
        return self

    def predict_proba(self, X: Any) -> Any:
        """The mean probabilities of the members, ``[N, classes]``."""
        return self._outputs(X).softmax(-1).mean(0).numpy()

    def predict(self, X: Any) -> Any:
        """The likeliest labels, ``[N]``."""
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]


class BayesianRegressor(RegressorMixin, _BayesianNet):  # type: ignore[misc]
    """A regressor that knows how unsure it is: a posterior of nets, and observations with normal noise of a learnt width.

    Args:
        hidden, std, prior_std, temperature, steps, batch_size, learning_rate, samples, estimator, random_state: as for
            :class:`BayesianClassifier`.

    Attributes:
        noise_std_: of the observations, in the units of ``y``.
        net_, n_features_in_, n_iter_: as there.

    Example:
        >>> X = np.linspace(-1, 1, 80)[:, None]
        >>> found = BayesianRegressor(random_state=0).fit(X, np.sin(3 * X[:, 0]))
        >>> mean, std = found.predict([[0.5], [9.0]], return_std=True)
        >>> bool(std[1] > 2 * std[0])  # far from the data it is less sure
        True
    """

    def fit(self, X: Any, y: Any) -> BayesianRegressor:
        """Fits the posterior and the noise of the observations.

        Args:
            X: ``[N, features]``.
            y: ``[N]``.

        Raises:
            ValueError: for tables that scikit-learn refuses, or a parameter that means nothing.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self._centre, self._width = map(float, _standard(y, "y"))
        log_noise = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

        def nll(outputs: Tensor, targets: Tensor) -> Tensor:
            error = (outputs[:, 0] - targets) * (-log_noise).exp()
            return 0.5 * error.square().mean() + log_noise

        self._fit(X, torch.from_numpy((y - self._centre) / self._width), 1, nll, [log_noise])
        self.noise_std_ = self._width * math.exp(float(log_noise.detach()))
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The mean of the members' outputs, ``[N]``.

        Args:
            X: ``[N, features]``.
            return_std: also return the standard deviation of an observation: that between members and that of the noise.
        """
        standardised = self._outputs(X)[..., 0]
        outputs = self._centre + self._width * standardised
        mean = outputs.mean(0).numpy()
        if not return_std:
            return mean
        between = outputs.var(0).numpy() if len(outputs) > 1 else np.zeros_like(mean)
        return mean, np.sqrt(between + self.noise_std_**2)


def _layers(sizes: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """Linear layers with ReLU between them, weights from He's law, biases from zero, in float64."""
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, before, after, dtype=torch.float64))
        with torch.no_grad():
            layer.weight.normal_(0.0, math.sqrt(2 / before), generator=generator)
            layer.bias.zero_()
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _standard(values: Any, what: str) -> tuple[Any, Any]:
    """Mean and standard deviation along axis 0, where a column that does not vary has 1.

    Raises:
        ArgumentError: if the values are so large that float64 has no number for the squares.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean, spread = values.mean(0), values.std(0)
    if not np.isfinite(spread).all():
        raise ArgumentError(f"{what} goes up to {np.abs(values).max():.3g}, whose squares overflow; divide it by something")
    return mean, np.where(spread > 0, spread, 1.0)


def _plain(value: Any) -> Any:
    """An integer of numpy's as Python's: searches hand these over."""
    return int(value) if isinstance(value, np.integer) else value
