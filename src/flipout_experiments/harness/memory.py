"""Too little memory, told as an error that says what is kept and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flipout.errors import OutOfMemoryError

__all__ = ["shortage_told"]

#: What torch's allocators of the CPU say, in a plain RuntimeError.
_CPU = ("can't allocate memory", "not enough memory")


@contextmanager
def shortage_told(folder: Path) -> Iterator[None]:
    """Turns what torch (on the CPU or an accelerator), numpy and Python raise for lack of memory into one error.

    Raises:
        OutOfMemoryError: instead of those; other errors pass.

    Example:
        >>> with shortage_told(Path("runs/a")):
        ...     torch.empty(2**60, dtype=torch.uint8)
        Traceback (most recent call last):
            ...
        flipout.errors.OutOfMemoryError: memory does not suffice ...
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(words in told for words in _CPU):
            raise
        reason = re.sub(r"^\[enforce fail[^]]*\][^.]*\. ", "", told).splitlines() or [type(error).__name__]
        raise OutOfMemoryError(
            f"memory does not suffice ({reason[0]}); what {folder} has up to its last checkpoint is kept. Go on with it by "
            "--resume where there is more memory, or begin in another folder with a smaller preset, batch, net or population"
        ) from error
