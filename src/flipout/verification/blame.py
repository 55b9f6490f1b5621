"""Where the rows of two runs part."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from flipout.verification.recording import Operation, Place

__all__ = ["Blame"]


@dataclass
class Blame:
    """Where the rows of two runs part."""

    first: Operation | None = None
    gap: float = 0.0
    reader: Operation | None = None
    split: tuple[Operation | None, Operation] | None = None
    places: list[list[Place | None]] = field(default_factory=list)
    seen: int = 0

    def matching(self, operation: Operation, results: list[Tensor], kept: list[Operation]) -> Operation | None:
        """The operation of the other run that stands where this one does; None once something was found."""
        if self.first is not None or self.split is not None:
            return None
        other = kept[self.seen] if self.seen < len(kept) else None
        self.seen += 1
        if other is None or other.func is not operation.func or len(other.results) != len(results):
            self.split = (other, operation)
            return None
        return other

    def astray(self) -> str:
        if self.first is not None:
            return (
                f"The first operation whose rows went astray is {self.first}: by {self.gap:.2g} of their scale. Its rule may be "
                "wrong; rows may have been given to the wrong members (name the batch dimension or the argument that counts the "
                "rows, batch_dim=, rows=); or it takes a weight from where copies of the module share it, such as a closure. "
                "exclude= leaves its parameters unperturbed"
            )
        return self._otherwise() + (
            "No operation departs by more than the tolerance before the output does: rounding may have added up; try float64, "
            "or tolerance="
            if self.split is None
            else ""
        )

    def mixing(self) -> str:
        if self.first is None and self.reader is None:
            return self._otherwise() or "No operation that torch shows does it."
        parts = []
        if self.reader is not None:
            parts.append(f"The first operation whose result depends on the whole batch is {self.reader}.")
        if self.first is not None:
            parts.append(f"The first operation with other rows is {self.first}.")
        return " ".join(parts)

    def _otherwise(self) -> str:
        if self.split is None:
            return ""
        ours, theirs = self.split
        return (
            f"The batch and the row alone take different paths through the code: {ours or 'the end'} within the batch, {theirs} "
            "alone; no operation before that departs. "
        )
