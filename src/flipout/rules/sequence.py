"""Sequences of differing lengths, and the recurrent cells unrolled over them in plain torch operations.

Data of a sequence operation is laid out as torch packs it: the rows of step 0, then those of step 1, and so on, each step with
the first ``sizes[t]`` sequences of the batch, sorted from long to short. A padded batch ``[T, B, features]`` is the case in which
all sizes are B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from flipout.cells import Cell, cell_step

__all__ = ["Steps", "unroll"]


@dataclass(frozen=True)
class Steps:
    """How many sequences each time step has, and the direction of time.

    Attributes:
        sizes: sequences at each step, never growing.
        reverse: whether time runs backwards.
    """

    sizes: tuple[int, ...]
    reverse: bool = False

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self.sizes[0]

    @property
    def uniform(self) -> bool:
        """Whether all sequences are of one length."""
        return self.sizes[-1] == self.sizes[0]

    @property
    def order(self) -> Sequence[int]:
        """The steps in the order in which they are taken."""
        steps = range(len(self.sizes))
        return steps[::-1] if self.reverse else steps

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.sizes)]

    def index(self, device: torch.device) -> Tensor:
        """Which sequence each packed row belongs to, ``[total]``."""
        return torch.cat([torch.arange(size, device=device) for size in self.sizes])

    def active(self, state: Tensor, first: Tensor, size: int) -> Tensor:
        """The state at a step with ``size`` sequences: some have ended, or some begin with their ``first`` state."""
        held = state.shape[0]
        if held == size:
            return state
        return state[:size] if held > size else torch.cat([state, first[held:size]])

    def previous(self, values: Tensor, first: Tensor) -> Tensor:
        """For each packed row its sequence's row one step earlier in this direction, or its ``first``."""
        if self.uniform:
            B = self.rows
            return torch.cat([values[B:], first]) if self.reverse else torch.cat([first, values[:-B]])
        index = []
        total = len(values)
        for t, size in enumerate(self.sizes):
            before = t + 1 if self.reverse else t - 1
            held = min(size, self.sizes[before]) if 0 <= before < len(self.sizes) else 0
            index += [self._starts[before] + i for i in range(held)]
            index += [total + i for i in range(held, size)]
        return torch.cat([values, first]).index_select(0, torch.tensor(index, device=values.device))

    def final(self, values: Tensor) -> Tensor:
        """Each sequence's row at its last step in this direction, ``[B, features]``."""
        B = self.rows
        if self.reverse:
            return values[:B]
        if self.uniform:
            return values[-B:]
        lengths = [sum(size > i for size in self.sizes) for i in range(B)]
        index = [self._starts[length - 1] + i for i, length in enumerate(lengths)]
        return values.index_select(0, torch.tensor(index, device=values.device))


def unroll(
    cell: Cell,
    steps: Steps,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    hidden: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a cell over a sequence in operations that torch differentiates, transforms and compiles.

    Args:
        cell, steps: which cell, over which steps.
        x: what the inputs contribute to the gates at all steps, ``[total, gates·hidden]``.
        h0: the first hidden state ``[B, hidden]``.
        c0: the first cell state of an LSTM.
        hidden: what a hidden state of the first b sequences contributes to their gates.
        project: an LSTM's projection of its hidden state.

    Returns:
        The hidden states ``[total, hidden]``, the last one of each sequence and, for an LSTM, the last cell state.
    """
    pieces = x.split(steps.sizes)
    outputs: list[Tensor] = [x] * len(pieces)
    cells: list[Tensor] = [x] * len(pieces)
    h, c = h0, c0
    for t in steps.order:
        size = steps.sizes[t]
        h = steps.active(h, h0, size)
        c = None if c is None or c0 is None else steps.active(c, c0, size)
        h, c = cell_step(cell, pieces[t], hidden(h), h, c)
        outputs[t] = h = h if project is None else project(h)
        if c is not None:
            cells[t] = c
    output = torch.cat(outputs)
    return output, steps.final(output), None if c is None else steps.final(torch.cat(cells))
