"""The weights of the members, listed for the rows of a batch."""

from __future__ import annotations

from torch import Tensor

from flipout.weight import PerturbedWeight

__all__ = ["per_row"]


def per_row(weight: PerturbedWeight | Tensor, rows: int) -> Tensor:
    """The weights that ``rows`` rows in member-major blocks see, ``[rows, *shape]`` (``[1, *shape]`` if all see one)."""
    if not isinstance(weight, PerturbedWeight):
        return weight.unsqueeze(0)
    values = weight.dense()
    members = values.shape[0]
    return values if members == rows else values.repeat_interleave(rows // members, 0)
