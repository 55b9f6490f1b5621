"""Regression with a learnt noise of the observations, and the likelihood of several points at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.bayes.metrics import labelled
from flipout.bayes.prediction import Classification, Regression
from flipout.errors import ArgumentError

__all__ = ["gaussian_nll", "joint_log_likelihood"]


def gaussian_nll(outputs: Tensor, target: Tensor) -> Tensor:
    """The mean negative log-likelihood of a Gaussian head, in nats.

        -log N(y; μ, s) = ½ (log s + (y - μ)² / s + log 2π)

    A net with a Gaussian head returns for each example the means μ and the logarithms of the variances
    log s of the observations (Nix and Weigend 1994), so that it learns where the data are noisy.
    ``predict(net, x, task="gaussian")`` adds that noise to what the members disagree about.

    Args:
        outputs: ``[N, 2 D]``, D means and then D log-variances.
        target: ``[N, D]``; ``[N]`` where D = 1.

    Returns:
        The mean over examples of the sum over the D targets, a scalar.

    Raises:
        ArgumentError: for shapes that do not belong together.

    Example:
        >>> outputs = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # μ = 0 and 1, s = 1
        >>> gaussian_nll(outputs, torch.tensor([0.0, 2.0]))
        tensor(1.1689)
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] % 2 or not len(outputs):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ArgumentError(f"gaussian_nll: outputs are {found}; expected [N, 2 D], D means and then D log-variances")
    mean, log_variance = outputs.chunk(2, 1)
    target = target[:, None] if isinstance(target, Tensor) and target.dim() == 1 else target
    if not isinstance(target, Tensor) or target.shape != mean.shape:
        found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ArgumentError(f"gaussian_nll: the target is {found}; expected {tuple(mean.shape)}, one number for each mean")
    return _log_density(target, mean, log_variance.exp(), log_variance).neg().sum(1).mean()


def joint_log_likelihood(prediction: Classification | Regression, target: Tensor, points: int = 10) -> float:
    """The log-likelihood of several points at once under the posterior, in nats a point.

        1/τ log 1/S Σ_s Π_i p(y_i | x_i, W_s)      over groups of τ points, averaged over the groups

    Members must be right about all points of a group together, so it tells a posterior that knows what
    its errors have in common from one that has the same marginals (Osband et al. 2022). At ``points=1`` it
    is the predictive log-likelihood. Groups are consecutive; an incomplete one at the end is left out.

    Args:
        prediction: with its samples, from :func:`flipout.bayes.predict`; of a regression with a noise of
            the observations (``noise_variance=``, or ``task="gaussian"``).
        target: labels ``[N]`` of a classification, or numbers of the shape of ``prediction.mean``.
        points: τ.

    Raises:
        ArgumentError: for a prediction without samples or without noise, a target of another shape, or
            fewer than ``points`` examples.

    Example:
        >>> sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> found = Classification.of(torch.stack([sure, 1 - sure]))  # either both are 0, or both are 1
        >>> labels = torch.tensor([0, 0])
        >>> round(joint_log_likelihood(found, labels, points=1), 4), round(joint_log_likelihood(found, labels, points=2), 4)
        (-0.6931, -0.3466)
    """
    require_count("points", points, 1)
    if prediction.samples is None:
        raise ArgumentError("joint_log_likelihood needs the members' own outputs; predict with keep_samples=True")
    logs = _by_member(prediction, target)
    count = logs.shape[1]
    if count < points:
        raise ArgumentError(f"joint_log_likelihood(points={points}): there are {count} examples, which make no group")
    groups = count // points
    joint = logs[:, : groups * points].double().unflatten(1, (groups, points)).sum(2)
    together = torch.logsumexp(joint, 0) - math.log(len(joint))
    return float(together.mean()) / points


def _by_member(prediction: Any, target: Any) -> Tensor:
    """log p(y | x, W_s), ``[samples, N]``."""
    samples: Tensor = prediction.samples
    if isinstance(prediction, Classification):
        _, labels = labelled(prediction, target)
        chosen = samples.gather(2, labels[None, :, None].expand(len(samples), -1, 1))[..., 0]
        return chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()
    if not isinstance(target, Tensor) or target.shape != prediction.mean.shape:
        found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ArgumentError(f"the target is {found}; expected numbers of the prediction's shape, {tuple(prediction.mean.shape)}")
    noise = torch.as_tensor(prediction.noise, dtype=samples.dtype, device=samples.device)
    if not bool((noise > 0).all()):
        raise ArgumentError(
            "the regression has no noise of the observations, under which one member would have an infinite likelihood or none: "
            'predict with noise_variance=, or with task="gaussian"'
        )
    each = _log_density(target, samples, noise, noise.log())
    return each.flatten(2).sum(2) if each.dim() > 2 else each


def _log_density(value: Tensor, mean: Tensor, variance: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * ((value - mean).square() / variance + log_variance + math.log(2 * math.pi))
