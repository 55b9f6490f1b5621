"""The law of the fuzz: a clear error or the right result, never a wrong number."""

import re
from collections.abc import Callable
from typing import Any

import torch

from flipout.errors import FlipoutError

#: A word of what to do, or of what was expected.
ADVICE = re.compile(
    r"\b(add|allow|ask|call|check|choose|divide|draw|drop|each member once|exclude|expected|finite and not negative|from 0|give|"
    r"hold|include|is positive|leave|look|lower|makes?|members 0|must be|nearest|needs?|pass|positive integer|run|takes?|"
    r"the draw has|use|wrap|write)\b|0 < p < 1"
)


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns; None if it raises an error of the library's own that says what was found and what to do."""
    try:
        return call()
    except FlipoutError as error:
        told = str(error)
        assert len(told) > 20, told
        assert ADVICE.search(told), told
        return None


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors of one shape and dtype are equal, to a tolerance relative to the largest number expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    if not found.numel():
        return True
    size = 1 + float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) <= tolerance * size
