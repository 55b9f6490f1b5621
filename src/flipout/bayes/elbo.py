"""The negative ELBO, in nats per example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flipout.arguments import is_count
from flipout.bayes.posterior import require_net
from flipout.errors import ArgumentError, NotFiniteError
from flipout.perturb import Perturbed

__all__ = ["Elbo", "elbo_loss", "require_finite"]


@dataclass(frozen=True, slots=True, eq=False)
class Elbo:
    """A loss and its parts, all 0-d tensors in nats per example.

    Attributes:
        loss: ``nll + temperature * kl``: what to differentiate.
        nll: mean negative log-likelihood of the examples.
        kl: the KL divided by the size of the data set.
        temperature: of the KL; 1 makes ``loss`` the negative ELBO.

    Example:
        >>> found = elbo_loss(torch.tensor(2.0), torch.tensor(50.0), dataset_size=100)
        >>> found.loss, found.nll, found.kl
        (tensor(2.5000), tensor(2.), tensor(0.5000))
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    temperature: float


def elbo_loss(nll: Tensor, kl: Tensor | float, dataset_size: int | None = None, temperature: float = 1.0) -> Elbo:
    """The negative evidence lower bound per example, estimated on a mini-batch.

        loss = nll + temperature · kl / dataset_size

    Unbiased if ``nll`` is the mean over a random mini-batch: the KL of the whole posterior is divided by the number of *training
    examples*, once, whatever the batch size. A temperature below 1 gives a cold posterior; the paper takes 0.1 for large batches.

    Args:
        nll: mean negative log-likelihood per example of the batch (``cross_entropy``, say), a scalar.
        kl: of all weights, in nats, from :func:`flipout.bayes.kl_divergence`.
        dataset_size: examples in the training set.
        temperature: from 0 on; see also :func:`flipout.bayes.linear_annealing`.

    Raises:
        ArgumentError: if ``dataset_size`` is missing or not a positive integer, ``temperature`` is negative or not finite, or a
            part is no scalar.

    Example:
        >>> found = elbo_loss(torch.tensor(2.0), torch.tensor(300.0), dataset_size=100)
        >>> float(found.loss), float(found.nll), float(found.kl)
        (5.0, 2.0, 3.0)
    """
    if not is_count(dataset_size):
        raise ArgumentError(
            f"elbo_loss(dataset_size={dataset_size!r}): expected the number of training examples, by which the KL is divided once; "
            "it is len(dataset), not the size of a batch"
        )
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature >= 0):
        raise ArgumentError(f"elbo_loss(temperature={temperature!r}): expected a finite number from 0 on")
    for name, value in {"nll": nll, "kl": kl}.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ArgumentError(f"elbo_loss({name}): got shape {tuple(value.shape)}; expected a scalar: {_WANTED[name]}")
    if not isinstance(nll, Tensor):
        raise ArgumentError(f"elbo_loss(nll={nll!r}): expected a tensor, {_WANTED['nll']}")
    if not isinstance(kl, Tensor | int | float):
        raise ArgumentError(f"elbo_loss(kl={kl!r}): expected a number or a tensor, {_WANTED['kl']}")
    nll = nll.reshape(())
    per_example = torch.as_tensor(kl, dtype=nll.dtype, device=nll.device).reshape(()) / dataset_size
    return Elbo(nll + temperature * per_example, nll, per_example, float(temperature))


_WANTED = {"nll": "the mean over the examples of the batch", "kl": "the sum over all weights, as kl_divergence returns it"}


def require_finite(net: Perturbed, loss: Any) -> float:
    """The loss as a number, if it is finite. Call it before ``optimizer.step()``; it waits for the device.

    Args:
        net: that was trained.
        loss: a number, a scalar tensor or an :class:`Elbo`.

    Raises:
        NotFiniteError: if the loss is NaN or infinite; names the first parameter whose values, scale or gradient are not finite.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(2, 1), flipout.Gaussian(0.1))
        >>> require_finite(net, torch.tensor(0.5))
        0.5
    """
    value = loss.loss if isinstance(loss, Elbo) else loss
    value = float(value.detach() if isinstance(value, Tensor) else value)
    if math.isfinite(value):
        return value
    raise NotFiniteError(f"the loss is {value}; {_first_culprit(require_net(net))}. Lower the learning rate or the noise")


def _first_culprit(net: Perturbed) -> str:
    for name, parameter in net.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the first parameter that is not finite is {_told(name)!r}"
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"all parameters are finite, and the first gradient that is not is that of {_told(name)!r}"
    return "all parameters and gradients are finite, so look to the batch and the loss function"


def _told(name: str) -> str:
    if name.startswith("log_std."):
        return "the scale of " + name.removeprefix("log_std.").replace("/", ".")
    return name.removeprefix("module.")
