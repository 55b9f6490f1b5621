"""Predictions averaged over the posterior, and what the members disagree about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flipout.arguments import broadcasts, require_count
from flipout.bayes.posterior import require_net
from flipout.buffers import batch_statistics, evaluating
from flipout.errors import ArgumentError, MissingRuleError
from flipout.estimators import Independent, Shared
from flipout.perturb import Perturbed
from flipout.rows import count_rows

__all__ = ["Classification", "Prediction", "Regression", "predict", "sample_outputs"]

#: Entries of members' dense weights, and rows of members' inputs, that are held at once. Beyond the first, members run one by one.
_ENTRIES, _ROWS = 2**22, 2**14


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """Class probabilities averaged over members of the posterior. Entropies are in nats.

    Attributes:
        mean: ``[N, classes]``, the predictive probabilities.
        entropy: ``[N]``, of ``mean``: the whole uncertainty.
        mutual_information: ``[N]``, between the label and the weights: the part that knowing the weights would take away. It is
            large where members contradict one another (far from the data) and small where all of them hesitate.
        samples: ``[samples, N, classes]``, each member's own probabilities, or None.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.5))
        >>> found = flipout.bayes.predict(net, torch.ones(4, 3), samples=8)
        >>> found.mean.shape, bool((found.mutual_information <= found.entropy).all())
        (torch.Size([4, 2]), True)
    """

    mean: Tensor
    entropy: Tensor
    mutual_information: Tensor
    samples: Tensor | None = None

    @classmethod
    def of(cls, probabilities: Tensor, keep: bool = True) -> Classification:
        """From members' probabilities ``[samples, N, classes]``, of an ensemble say.

        Raises:
            ArgumentError: if they are no probabilities: negative, or with rows that do not sum to one.

        Example:
            >>> sure, torn = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
            >>> float(Classification.of(torch.stack([torn, torn])).mutual_information)  # both hesitate
            0.0
            >>> found = Classification.of(torch.stack([sure, 1 - sure]))  # each is sure, of another class
            >>> bool(torch.isclose(found.mutual_information, torch.tensor(2.0).log()))
            True
        """
        if not isinstance(probabilities, Tensor) or probabilities.dim() < 2 or not len(probabilities):
            raise ArgumentError("expected the probabilities of each member, [samples, N, classes]")
        if bool(((probabilities.sum(-1) - 1).abs() > 1e-3).any()) or bool((probabilities < 0).any()):
            raise ArgumentError("members' rows do not sum to 1: are they logits? Those take softmax first")
        mean = probabilities.mean(0)
        entropy = torch.special.entr(mean).sum(-1)
        each = torch.special.entr(probabilities).sum(-1).mean(0)
        return cls(mean, entropy, (entropy - each).clamp_min(0.0), probabilities if keep else None)


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """Outputs averaged over members of the posterior.

    Attributes:
        mean: ``[N, ...]``.
        variance: ``[N, ...]``, between members (unbiased), and that of the observations if it was given.
        samples: ``[samples, N, ...]``, each member's own outputs, or None.
        noise: variance of the observations: as it was given, or each member's own ``[samples, N, ...]`` (Gaussian heads).

    Example:
        >>> found = Regression.of(torch.tensor([[[1.0]], [[3.0]]]), noise_variance=2.0)
        >>> found.mean, found.std
        (tensor([[2.]]), tensor([[2.]]))
    """

    mean: Tensor
    variance: Tensor
    samples: Tensor | None = None
    noise: float | Tensor = 0.0

    @property
    def std(self) -> Tensor:
        """The standard deviation, of the variance's shape."""
        return self.variance.sqrt()

    @classmethod
    def of(cls, outputs: Tensor, noise_variance: float | Tensor = 0.0, keep: bool = True) -> Regression:
        """From members' outputs ``[samples, N, ...]``.

        Raises:
            ArgumentError: if there is no member, or ``noise_variance`` is no variance of their outputs.

        Example:
            >>> found = Regression.of(torch.tensor([[1.0], [3.0]]), noise_variance=0.5)
            >>> float(found.mean), float(found.variance)
            (2.0, 2.5)
        """
        if not isinstance(outputs, Tensor) or outputs.dim() < 1 or not len(outputs):
            raise ArgumentError("expected the outputs of each member, [samples, N, ...]")
        _require_variance(noise_variance, outputs[0])
        between = outputs.var(0) if len(outputs) > 1 else torch.zeros_like(outputs[0])
        return cls(outputs.mean(0), between + noise_variance, outputs if keep else None, noise_variance)

    @classmethod
    def of_gaussians(cls, outputs: Tensor, keep: bool = True) -> Regression:
        """From members with Gaussian heads: outputs ``[samples, N, 2 D]``, D means and then D log-variances of the observations.

        Raises:
            ArgumentError: if the last dimension is odd, or there is no member.

        Example:
            >>> found = Regression.of_gaussians(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
            >>> found.mean, found.variance  # 2 between the members, 1 of the observations
            (tensor([[2.]]), tensor([[3.]]))
        """
        if not isinstance(outputs, Tensor) or outputs.dim() < 3 or outputs.shape[-1] % 2:
            found = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ArgumentError(f"a Gaussian head returns [N, 2 D], D means and then D log-variances; found {found}")
        means, log_variances = outputs.chunk(2, -1)
        plain, noise = cls.of(means), log_variances.exp()
        return cls(plain.mean, plain.variance + noise.mean(0), means if keep else None, noise if keep else noise.mean(0))


Prediction = Classification | Regression


def _require_variance(value: Any, like: Tensor) -> None:
    """Raises ArgumentError for what is no variance of outputs such as these."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number and not isinstance(value, Tensor):
        raise ArgumentError(f"noise_variance={value!r}: expected a number or a tensor")
    found = torch.as_tensor(value)
    if not bool(((found >= 0) & found.isfinite()).all()):
        raise ArgumentError(f"noise_variance={value!r}: a variance is finite and not negative")
    if not broadcasts(found.shape, like.shape):
        raise ArgumentError(
            f"noise_variance has the shape {tuple(found.shape)}, which does not broadcast to the outputs' {tuple(like.shape)}; "
            "give one number, or one for each output"
        )


def predict(
    net: Perturbed,
    x: Tensor | Mapping[str, Any],
    samples: int = 32,
    task: str = "classification",
    *,
    noise_variance: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
    keep_samples: bool = True,
    at_once: int | None = None,
) -> Any:
    """The posterior predictive: outputs under ``samples`` independent draws of all weights, averaged.

        p(y | x) ≈ 1/S Σ_s p(y | x, W_s),      W_s ~ q

    Every member is one function: it is held for all rows of ``x``, and shares nothing with the others, whatever estimator the net
    trains with (members of one flipout draw share a base perturbation). The net runs in evaluation mode, without gradients. A batch
    norm that keeps no running statistics has those of all rows of ``x`` under one member, as in the plain module.

    Args:
        net: with its noise.
        x: a batch, or keyword arguments of the net such as a tokenizer gives: ``{"input_ids": …, "attention_mask": …}``. Of these
            every tensor with as many rows as the first is cut with it.
        samples: S.
        task: ``"classification"``, where the net returns logits ``[N, ..., classes]``
            or an object with ``.logits``, ``"regression"``, or ``"gaussian"``, a
            regression where it returns means and log-variances ``[N, 2 D]`` (:func:`flipout.bayes.gaussian_nll`).
        noise_variance: of the observations, to be added to the variance in a regression.
        generator: of the draws; None for the net's own.
        keep_samples: whether the result has every member's output.
        at_once: members that run at once, each with dense weights of its own; None chooses by their size. Another number gives
            other draws of the same law.

    Returns:
        A :class:`Classification` with ``.mean``, ``.entropy``, ``.mutual_information`` and ``.samples``, or a :class:`Regression`
        with ``.mean``, ``.variance`` and ``.samples``.

    Raises:
        ArgumentError: if ``samples`` is less than 1, the task is unknown, the outputs are no logits, or ``noise_variance`` is no
            variance of them.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.5))
        >>> found = predict(net, torch.ones(2, 4), samples=8)
        >>> found.mean.shape, found.entropy.shape, found.samples.shape
        (torch.Size([2, 3]), torch.Size([2]), torch.Size([8, 2, 3]))
        >>> predict(net, torch.ones(2, 4), task="regression").variance.shape
        torch.Size([2, 3])
    """
    if task not in ("classification", "regression", "gaussian"):
        raise ArgumentError(f"predict(task={task!r}): choose 'classification', 'regression' or 'gaussian'")
    outputs = sample_outputs(net, x, samples, generator=generator, at_once=at_once)
    if task == "regression":
        return Regression.of(outputs, noise_variance, keep_samples)
    if task == "gaussian":
        return Regression.of_gaussians(outputs, keep_samples)
    if outputs.dim() < 3 or outputs.shape[-1] < 2:
        raise ArgumentError(
            f"predict: the net returned {tuple(outputs.shape[1:])} for a batch of {_rows(net, x)}; classification takes "
            "logits [N, classes] with 2 classes or more; is it task='regression'?"
        )
    return Classification.of(outputs.softmax(-1), keep_samples)


def sample_outputs(
    net: Perturbed,
    x: Tensor | Mapping[str, Any],
    samples: int = 32,
    *,
    generator: torch.Generator | None = None,
    at_once: int | None = None,
) -> Tensor:
    """The net's outputs under independent draws of its weights, ``[samples, N, ...]``; arguments as for :func:`predict`.

    Raises:
        ArgumentError: if ``samples`` is less than 1, ``x`` is no batch, or the net does not return a tensor.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(1, 1, bias=False), flipout.Gaussian(1.0))
        >>> outputs = sample_outputs(net, torch.tensor([[1.0], [2.0]]), samples=3)
        >>> torch.allclose(2 * outputs[:, 0], outputs[:, 1])  # each member is one linear function
        True
    """
    require_net(net)
    require_count("samples", samples, 1)
    if isinstance(x, Mapping):
        x = dict(x)
    if not isinstance(x, dict) and (not isinstance(x, Tensor) or x.dim() <= net.batch_dim):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(
            f"predict: x is {shape}; expected a tensor with the examples on dimension {net.batch_dim}, or a dict of keyword "
            "arguments"
        )
    weights = sum(site.mean.numel() for site in net.sites)
    most = require_count("at_once", at_once, 1) if at_once is not None else max(1, min(_ENTRIES // weights, samples))
    with torch.no_grad(), evaluating(net):
        if batch_statistics(net.module):  # those of one member, over the whole of x
            return torch.cat([_members(net, x, 1, generator, whole=True) for _ in range(samples)])
        try:
            return torch.cat([_members(net, x, min(most, samples - i), generator) for i in range(0, samples, most)])
        except MissingRuleError:  # one member has ordinary weights, and needs no rules
            if at_once is not None or most == 1:
                raise
            return torch.cat([_members(net, x, 1, generator) for _ in range(samples)])


def _rows(net: Perturbed, x: Any) -> int:
    """The rows of a batch, or of keyword arguments."""
    return count_rows(net.module, net.batch_dim, (), x, net.rows) if isinstance(x, dict) else int(x.shape[net.batch_dim])


def _called(net: Perturbed, x: Any, rows: int, part: slice, members: int) -> Tensor:
    """The output for a part of the rows, once for each member."""
    dim = net.batch_dim

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() <= dim or value.shape[dim] != rows:
            return value
        return torch.cat([value.narrow(dim, part.start, part.stop - part.start)] * members, dim)

    output = net(**tree_map(repeated, x)) if isinstance(x, dict) else net(repeated(x))
    if not isinstance(output, Tensor):
        output = output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)
    wanted = members * (part.stop - part.start)
    if not isinstance(output, Tensor) or output.dim() <= dim or output.shape[dim] != wanted:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ArgumentError(
            f"predict: the net returned {found}; expected a tensor, or an object with .logits, with the rows of x on dimension "
            f"{dim}"
        )
    return output


def _members(net: Perturbed, x: Any, members: int, generator: torch.Generator | None, whole: bool = False) -> Tensor:
    """Outputs of some members, ``[members, N, ...]``: in blocks of rows under one held draw."""
    dim, parts = net.batch_dim, []
    estimator = Shared() if members == 1 else Independent()
    with net.using(estimator), net.hold(members, generator):
        rows = _rows(net, x)
        step = rows if whole else max(1, _ROWS // members)
        for start in range(0, rows, max(step, 1)):
            output = _called(net, x, rows, slice(start, min(start + step, rows)), members)
            parts.append(output.unflatten(dim, (members, -1)).movedim(dim, 0))
    return torch.cat(parts, 1 + dim)
