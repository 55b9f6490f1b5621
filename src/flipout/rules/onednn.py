"""Products with a large single-precision matrix on a CPU, through oneDNN where torch is built with it.

torch hands ``mm`` in float32 to the BLAS it was built with, and a plain recurrent layer to oneDNN. Of the products of a sequence some
are faster the one way and some the other; those that are faster here take the way of the plain layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["laid_out", "product"]

_lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
#: Entries of a matrix from which on the other way is worth its preparation.
_LARGE = 2**19


def _serves(weight: Tensor) -> bool:
    if _lay_out is None or _linear is None or not torch.backends.mkldnn.enabled:
        return False
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= 2**18


def favours_rows(d: Tensor) -> bool:
    """Whether products Dᵀ X are worth a transposed copy of D."""
    return d.dtype == torch.float32 and _serves(d)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, for one product. ``weight`` may be a transposed view, and nothing is differentiated."""
    if not _serves(weight) or not len(x):
        return torch.mm(x, weight.t())
    y: Tensor = _linear(x, weight.detach(), None, "none", [], "")
    return y


def laid_out(weight: Tensor, rows: int, times: int) -> Callable[..., Tensor] | None:
    """x ↦ x Wᵀ, or (x, y) ↦ y + x Wᵀ, with W brought once into the layout that the product computes in, for ``times`` products.

    A product of a few rows with a large matrix spends much of its time on that layout. None where that is not to be had, or no faster.
    """
    if not rows or times < 8 or not _serves(weight):
        return None
    packed = _lay_out(weight.detach(), rows)

    def of(x: Tensor, y: Tensor | None = None) -> Tensor:
        found: Tensor = _linear(x, packed, None, "none", [], "") if y is None else _linear.binary(x, y, packed, None, "add")
        return found

    return of
