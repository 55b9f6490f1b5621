"""How good and how honest predictions are, by torchmetrics where it has the number."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.bayes.prediction import Classification, Regression
from flipout.errors import ArgumentError

__all__ = ["accuracy", "brier_score", "calibration_error", "negative_log_likelihood", "ood_auroc"]


def accuracy(prediction: Classification | Tensor, labels: Tensor) -> float:
    """The fraction of examples whose likeliest class is the right one.

    Args:
        prediction: of a classification, or its mean probabilities ``[N, classes]``.
        labels: ``[N]``, integers.

    Raises:
        ArgumentError: for a regression, probabilities that do not sum to one or are not finite, labels of another shape; so do the
            metrics below.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        0.5
    """
    mean, labels = labelled(prediction, labels)
    found = float(_torchmetrics().multiclass_accuracy(mean, labels, mean.shape[1], average="micro"))
    return round(found * len(labels)) / len(labels)  # the exact fraction, out of single precision


def calibration_error(prediction: Classification | Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over equal bins of confidence (Guo et al. 2017).

    Example:
        >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 4)
        0.4
    """
    require_count("bins", bins, 1)
    mean, labels = labelled(prediction, labels)
    return float(_torchmetrics().multiclass_calibration_error(mean, labels, mean.shape[1], n_bins=bins))


def negative_log_likelihood(prediction: Classification | Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats.

    Example:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
        0.6931
    """
    mean, labels = labelled(prediction, labels)
    chosen = mean.gather(1, labels[:, None]).clamp_min(torch.finfo(mean.dtype).tiny)
    return float(-chosen.log().double().mean())


def brier_score(prediction: Classification | Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the one-hot label, summed over classes: 0 to 2.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    mean, labels = labelled(prediction, labels)
    truth = torch.nn.functional.one_hot(labels, mean.shape[1]).to(mean.dtype)
    return float((mean - truth).square().sum(1).double().mean())


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that a strange input has a higher uncertainty than a familiar one.

    Args:
        inside: ``[N]``, an uncertainty (entropy, mutual information) of inputs like the training data.
        outside: ``[M]``, of inputs that are not.

    Raises:
        ArgumentError: if either is no vector of numbers.

    Example:
        >>> ood_auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.15, 0.9]))
        0.75
    """
    for name, scores in {"inside": inside, "outside": outside}.items():
        if not isinstance(scores, Tensor) or scores.dim() != 1 or not len(scores) or not bool(scores.isfinite().all()):
            raise ArgumentError(
                f"ood_auroc({name}): expected a vector, one finite uncertainty an input, such as prediction.entropy"
            )
    scores = torch.cat([inside, outside]).double()
    ranks = torch.unique(scores, return_inverse=True)[1].double()  # torchmetrics takes scores beyond [0, 1] for logits
    truth = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)]).long()
    return float(_torchmetrics().binary_auroc(ranks / max(float(ranks.max()), 1.0), truth))


def labelled(prediction: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Mean probabilities ``[N, classes]`` and labels ``[N]``, int64."""
    if isinstance(prediction, Regression):
        raise ArgumentError(
            "this metric is of class probabilities, and the prediction is a Regression; predict with task='classification', or "
            "look at prediction.mean and prediction.variance"
        )
    mean = prediction.mean if isinstance(prediction, Classification) else prediction
    if not isinstance(mean, Tensor) or mean.dim() != 2 or not mean.is_floating_point() or not len(mean):
        found = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
        raise ArgumentError(f"expected a Classification, or probabilities [N, classes], got {found}")
    if not bool(mean.isfinite().all()):
        raise ArgumentError("a probability is not finite: look to the weights and the inputs for NaN")
    if bool(((mean.sum(1) - 1).abs() > 1e-3).any()) or bool((mean < 0).any()):
        raise ArgumentError("the rows do not sum to 1: are they logits, or outputs of a regression? Logits take softmax first")
    if not isinstance(labels, Tensor) or labels.shape != mean.shape[:1] or labels.is_floating_point():
        told = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ArgumentError(f"labels are {told}; expected one integer for each of {len(mean)} examples")
    if bool((labels < 0).any()) or bool((labels >= mean.shape[1]).any()):
        raise ArgumentError(f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to {mean.shape[1] - 1}")
    return mean.detach(), labels.long()


def _torchmetrics() -> Any:
    try:
        return importlib.import_module("torchmetrics.functional.classification")
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"this metric needs torchmetrics, which cannot be imported ({error}): pip install 'flipout[bayes]'"
        ) from error
