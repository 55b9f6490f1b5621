"""Masks: which activations are dropped, and how long a mask lasts.

A mask for ``p`` has entries 0 with probability p and 1/(1-p) otherwise, so that its mean is one and nothing is scaled in evaluation
mode. Masks come from an explicit generator, which ``torch.nn.functional.dropout`` does not take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flipout.errors import ArgumentError

__all__ = ["Dropout", "EmbeddingDropout", "Zoneout", "bernoulli"]


@dataclass(frozen=True)
class Dropout:
    """Dropout of the activations of a sequence.

    Args:
        p: probability of dropping an entry, 0 <= p < 1.
        per: ``"sequence"`` draws one mask for each sequence, which lasts over all its time steps (variational dropout, Gal &
            Ghahramani 2016); ``"step"`` draws one for each time step (Zaremba et al. 2014).

    Raises:
        ArgumentError: for another probability or ``per``.

    Example:
        >>> Dropout(0.5).mask(3, 2, 4, like=torch.zeros(()), generator=None).shape  # steps, sequences, features
        torch.Size([1, 2, 4])
        >>> Dropout(0.5, per="step").mask(3, 2, 4, like=torch.zeros(()), generator=None).shape
        torch.Size([3, 2, 4])
    """

    p: float
    per: str = "sequence"

    def __post_init__(self) -> None:
        _require_probability("Dropout(p", self.p)
        if self.per not in ("sequence", "step"):
            raise ArgumentError(f'Dropout(per={self.per!r}): choose "sequence" or "step"')

    def mask(self, steps: int, rows: int, features: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """A mask ``[steps or 1, rows, features]`` in the dtype and on the device of ``like``."""
        lasting = 1 if self.per == "sequence" else steps
        return bernoulli(1 - self.p, (lasting, rows, features), like, generator).div_(1 - self.p)


@dataclass(frozen=True)
class EmbeddingDropout:
    """Dropout of whole words: every occurrence of a word of the vocabulary goes at once (Gal & Ghahramani 2016).

    Args:
        p: probability of dropping a word, 0 <= p < 1.
        per: ``"sequence"`` drops words of its own in each sequence; ``"batch"`` the same words in the whole batch, as Merity et al.
            2017 do.

    Raises:
        ArgumentError: for another probability or ``per``.

    Example:
        >>> EmbeddingDropout(0.1).mask(2, 10, like=torch.zeros(()), generator=None).shape  # sequences, words
        torch.Size([1, 10])
    """

    p: float
    per: str = "batch"

    def __post_init__(self) -> None:
        _require_probability("EmbeddingDropout(p", self.p)
        if self.per not in ("sequence", "batch"):
            raise ArgumentError(f'EmbeddingDropout(per={self.per!r}): choose "sequence" or "batch"')

    def mask(self, rows: int, words: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """A mask ``[rows or 1, words]`` in the dtype and on the device of ``like``."""
        return bernoulli(1 - self.p, (1 if self.per == "batch" else rows, words), like, generator).div_(1 - self.p)


@dataclass(frozen=True)
class Zoneout:
    """Units that keep their value of the step before (Krueger et al. 2017).

        c_t = z_c ∘ c_{t-1} + (1 - z_c) ∘ c̃_t,      h_t = z_h ∘ h_{t-1} + (1 - z_h) ∘ h̃_t

    with c̃, h̃ what the layer would have had, and new z at every step: 1 with the probabilities given. In evaluation mode z is its
    expectation, so the layer is not the plain one there.

    Args:
        cell: probability for the cells of an LSTM; 0 for other layers, which have none.
        hidden: probability for the hidden units.

    Raises:
        ArgumentError: for a number outside [0, 1).

    Example:
        >>> from flipout.regularize import Method, Regularized
        >>> net = Regularized(torch.nn.LSTM(3, 4), Method(zoneout=Zoneout(cell=0.5, hidden=0.05)))
        >>> net(torch.ones(6, 2, 3))[0].shape
        torch.Size([6, 2, 4])
    """

    cell: float = 0.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        _require_probability("Zoneout(cell", self.cell)
        _require_probability("Zoneout(hidden", self.hidden)


def bernoulli(p: float, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Entries 1 with probability ``p`` and 0 otherwise, in the dtype and on the device of ``like``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(p, generator=generator)


def _require_probability(what: str, p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise ArgumentError(f"{what}={p!r}): expected a probability of dropping, 0 or more and below 1")
