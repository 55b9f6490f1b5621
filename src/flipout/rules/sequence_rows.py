"""Which member each sequence of a recurrent operation belongs to, and weights arranged for the rows of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from flipout.errors import BatchError, UnsupportedNoiseError
from flipout.estimators import LocalReparameterization
from flipout.rows import Mixed, Rows, entries, ordered
from flipout.weight import Layout, PerturbedWeight

__all__ = [
    "Batch",
    "Weights",
    "batch_of",
    "first_rows",
    "is_fresh",
    "on_rows",
    "place_of",
    "per_step",
    "refuse_local",
    "require_states",
]


class Weights(NamedTuple):
    """The parameters of one direction of one layer, or of a cell; any of them may be perturbed."""

    ih: Any
    hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    hr: Any = None

    def map(self, function: Callable[[Any], Any]) -> Weights:
        return Weights(*(None if weight is None else function(weight) for weight in self))


@dataclass(frozen=True)
class Batch:
    """Which member each of B sequences belongs to.

    Attributes:
        rows: B.
        owner: the member of each sequence, ``[B]``; None where they are in member-major blocks.
    """

    rows: int
    owner: Tensor | None

    def gathered(self, weight: Any) -> Any:
        """The weight with one member a sequence, in the sequences' order."""
        if not isinstance(weight, PerturbedWeight) or is_fresh(weight):
            return weight
        owner, members = self.owner, weight.batch.members or 0
        if owner is not None:
            owner = owner.to(weight.mean_weight.device)
            terms = tuple(term.members(owner) for term in weight.terms)
        elif members == self.rows:
            terms = weight.terms
        else:
            terms = tuple(term.repeated(self.rows // max(members, 1)) for term in weight.terms)
        return weight.with_rows(Layout(self.rows, self.rows, 0), terms)


def is_fresh(weight: PerturbedWeight) -> bool:
    """Whether signs are drawn anew at each step: the linear rule draws them for every row that it meets."""
    return weight.batch.members is None


def per_step(weight: Any) -> Any:
    """Under ``per_step``, the weight without the signs of its members."""
    if not isinstance(weight, PerturbedWeight) or not getattr(weight.origin.estimator, "per_step", False) or is_fresh(weight):
        return weight
    terms = tuple(replace(term, factors=tuple(replace(f, values=None, packed=True) for f in term.factors)) for term in weight.terms)
    return weight.with_rows(Layout(None, None, 0), terms)


def on_rows(weight: Any, rows: int, dim: int) -> Any:
    """The weight, for an operand whose rows are on ``dim``."""
    if not isinstance(weight, PerturbedWeight) or is_fresh(weight):
        return weight
    return weight.with_rows(Layout(weight.batch.members, rows, dim))


def first_rows(weight: Any, size: int) -> Any:
    """The weights of the first sequences only."""
    if not isinstance(weight, PerturbedWeight) or is_fresh(weight):
        return weight
    terms = tuple(term.members(slice(0, size)) for term in weight.terms)
    return weight.with_rows(Layout(size, size, 0), terms)


def place_of(carriers: Sequence[PerturbedWeight], x: Tensor, axis: int, what: str) -> Rows:
    """Where the sequences of an operand stand, which must be on ``axis``.

    Raises:
        BatchError: if its rows are not those of the draw, or stand elsewhere.
    """
    carrier = carriers[0]
    layout, name, size = carrier.batch, carrier.origin.name, x.shape[axis]
    fact = layout.known(x)
    if isinstance(fact, Rows) and fact.axis == axis:
        return fact
    unknown = not isinstance(fact, (Rows, Mixed))
    if unknown and (size == layout.rows if layout.rows is not None else size % (layout.members or 1) == 0):
        return Rows(axis, size)
    told = (
        f" {fact.why}" if isinstance(fact, Mixed) else f", whose rows stand on axis {fact.axis}" if isinstance(fact, Rows) else ""
    )
    raise BatchError(
        f"{what} met {name!r} with a batch of {size} sequences in an input of shape {tuple(x.shape)}{told}, but the module's own "
        f"input has {layout.rows if layout.rows is not None else 'k·' + str(layout.members)} rows on batch_dim={layout.dim}, for "
        f"{layout.members} members. A recurrent layer takes its sequences from its own batch_first (or from the packed batch); "
        "check batch_first and batch_dim, or exclude the layer"
    )


def batch_of(carriers: Sequence[PerturbedWeight], rows: int, x: Tensor, packed: bool, batch_first: bool, what: str) -> Batch:
    """The members of the sequences of a batch."""
    layout, name = carriers[0].batch, carriers[0].origin.name
    if layout.members is None:
        return Batch(rows, None)
    if not packed:
        return Batch(rows, layout.index(place_of(carriers, x, 0 if batch_first else 1, what)))
    fact = layout.known(x)
    if not isinstance(fact, Rows) or fact.order is None:
        raise BatchError(
            f"{what} met {name!r} with a packed batch of unknown origin, so the order in which its sequences were sorted is "
            "unknown; give the module the PackedSequence, pack inside the call, or pass a padded batch"
        )
    if layout.rows is not None and rows != layout.rows:
        raise BatchError(
            f"{what} met {name!r} with a packed batch of {rows} sequences, but the module's own input has {layout.rows} rows"
        )
    return Batch(rows, layout.index(ordered(fact, entries(fact, x.device)[:rows])))


def require_states(state: Tensor, rows: int, carrier: PerturbedWeight, what: str) -> None:
    if state.dim() != 3 or state.shape[1] != rows:
        raise BatchError(
            f"{what} met {carrier.origin.name!r} with an initial state of shape {tuple(state.shape)} for a batch of {rows} "
            f"sequences; expected [layers·directions, {rows}, hidden]"
        )


def refuse_local(carriers: Sequence[PerturbedWeight], what: str) -> None:
    for carrier in carriers:
        if isinstance(carrier.origin.estimator, LocalReparameterization) and carrier.mean_weight.dim() > 1:
            raise UnsupportedNoiseError(
                f"LocalReparameterization met {carrier.origin.name!r} in {what}: a recurrent layer uses its weights at every "
                "time step, and independent noise on the pre-activations would be biased there; use Flipout(), or exclude it"
            )
