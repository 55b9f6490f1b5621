"""Products of the noise in another precision than the mean's: which one, and whether a device gains by it."""

from __future__ import annotations

import time
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flipout.errors import PrecisionWarning

__all__ = ["lowered", "multiplies_faster", "product_dtype", "raised"]

#: A product in the lower precision must take less than this part of the time that it takes in float32.
_GAIN = 0.9
_ROWS, _WIDTH, _ROUNDS = 512, 512, 5


def product_dtype(estimator: Any, x: Tensor) -> torch.dtype | None:
    """The dtype in which the noise meets an operand ``x`` under an estimator; None for the operand's own."""
    asked: torch.dtype | None = getattr(estimator, "noise_dtype", None)
    if asked is None or x.dtype.itemsize <= asked.itemsize:
        return None
    return asked if multiplies_faster(x.device.type, asked) else None


def multiplies_faster(kind: str, dtype: torch.dtype) -> bool:
    """Whether a kind of device multiplies matrices faster in ``dtype`` than in float32.

    Measured at the first question, in some milliseconds, and remembered while the process lives; an answer of no is told once, by
    :class:`flipout.PrecisionWarning`. Where it cannot be measured (no values, a CUDA graph that is being captured) the answer is
    yes.
    """
    if kind == "meta" or (kind == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return True
    return _measured(kind, dtype)


multiplies_faster._dynamo_marked_constant = True  # type: ignore[attr-defined]  # answered while tracing, not traced


@cache
def _measured(kind: str, dtype: torch.dtype) -> bool:
    from torch.utils._python_dispatch import _disable_current_modes

    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode():
            gain = _time_ratio(kind, dtype)
    except RuntimeError as error:  # no such product on this device
        gain, why = float("inf"), f"it has none ({str(error).splitlines()[0]})"
    else:
        why = f"a product takes {gain:.2f} times as long as in float32"
    if gain < _GAIN:
        return True
    warnings.warn(
        f"noise_dtype={dtype} was asked for, and this {kind} device multiplies no faster in it: {why}. The noise keeps the "
        "precision of the mean; pass noise_dtype=None to say so yourself",
        PrecisionWarning,
        stacklevel=2,
    )
    return False


def _time_ratio(kind: str, dtype: torch.dtype) -> float:
    """How long a product of matrices takes in ``dtype``, in units of one in float32: the better of some rounds of each."""
    best: dict[torch.dtype, float] = {torch.float32: float("inf"), dtype: float("inf")}
    rows = {each: torch.ones(_ROWS, _WIDTH, dtype=each, device=kind) for each in best}
    matrices = {each: torch.ones(_WIDTH, _WIDTH, dtype=each, device=kind) for each in best}
    for i in range(1 + _ROUNDS):
        for each in best:
            _synchronize(kind)
            start = time.perf_counter()
            torch.mm(rows[each], matrices[each])
            _synchronize(kind)
            if i:  # the first sets up what the others use
                best[each] = min(best[each], time.perf_counter() - start)
        if i and best[dtype] > 4 * best[torch.float32]:
            break
    return best[dtype] / best[torch.float32]


def _synchronize(kind: str) -> None:
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def lowered(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A tensor in a lower precision, and the number that it was divided by.

    bfloat16 has the range of float32, so it divides by nothing (None). float16 has a small range, in which a gradient would vanish
    and a small ΔW lose its digits: there the largest entry is brought to between 1 and 2, by a power of two.
    """
    if dtype != torch.float16 or not x.numel():
        return x.to(dtype), None
    largest = x.detach().abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    scale = largest.log2().floor().exp2()
    return (x / scale).to(dtype), scale


def raised(z: Tensor, dtype: torch.dtype, *scales: Tensor | None) -> Tensor:
    """A product of lowered tensors in ``dtype`` again, times what its operands were divided by."""
    z = z.to(dtype)
    for scale in scales:
        z = z if scale is None else z * scale
    return z
