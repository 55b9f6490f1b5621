"""Products with a large single-precision matrix on a CPU, through oneDNN where torch is built with it.

torch hands ``mm`` in float32 to the BLAS it was built with, and a plain recurrent layer to oneDNN. Products of large matrices are
faster that way: by a tenth to a quarter where both were measured, and by half where a few rows meet a matrix again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["favours_rows", "product", "stepwise"]

_lay_out: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
#: Entries of a matrix from which on its products are faster this way.
_LARGE = 2**18
#: Rows from which on Dᵀ X is as fast without a copy.
_LONG = 2**11


def _serves(weight: Tensor) -> bool:
    if _lay_out is None or _linear is None or not torch.backends.mkldnn.enabled:
        return False
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _LARGE


def favours_rows(d: Tensor, x: Tensor) -> bool:
    """Whether the products Dᵀ X are worth a transposed copy of D: of many rows it takes longer than it saves."""
    return _serves(x) and d.shape[1] * x.shape[1] >= _LARGE and len(x) < _LONG


def product(x: Tensor, weight: Tensor, y: Tensor | None = None) -> Tensor:
    """x Wᵀ, and y besides. ``weight`` may be a transposed view, and nothing is differentiated."""
    if not _serves(weight) or not len(x):
        return torch.mm(x, weight.t()) if y is None else torch.addmm(y, x, weight.t())
    return _linear_of(x, weight.detach(), y)


def stepwise(weight: Tensor, rows: int, times: int) -> Callable[..., Tensor] | None:
    """x ↦ x Wᵀ, or (x, y) ↦ y + x Wᵀ, for ``times`` products of a few rows; None where there is nothing faster than ``mm``.

    Such a product spends much of its time on bringing W into the layout that it computes in, so that is done once, unless W is a
    transposed view, which is read as fast as it stands.
    """
    if not rows or times < 8 or not _serves(weight):
        return None
    prepared = weight.detach()
    if weight.is_contiguous():
        prepared = _lay_out(prepared, rows)
    return lambda x, y=None: _linear_of(x, prepared, y)


def _linear_of(x: Tensor, weight: Tensor, y: Tensor | None) -> Tensor:
    found: Tensor = _linear(x, weight, None, "none", [], "") if y is None else _linear.binary(x, y, weight, None, "add")
    return found
