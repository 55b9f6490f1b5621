"""The equations of recurrent cells, for rules and for regularisation."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Cell", "cell_step"]

Updated = Callable[[Tensor], Tensor]


class Cell(Enum):
    """A recurrent cell, with the number of its gates."""

    LSTM = "lstm"
    GRU = "gru"
    TANH = "rnn_tanh"
    RELU = "rnn_relu"

    @property
    def gates(self) -> int:
        return {Cell.LSTM: 4, Cell.GRU: 3}.get(self, 1)


def cell_step(
    cell: Cell, x: Tensor, h: Tensor, state: Tensor, c: Tensor | None, updated: Updated | None = None
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell, as the equations of :class:`torch.nn.LSTM`, ``GRU`` and ``RNN`` have it.

    Args:
        cell: which.
        x: what the inputs contribute to the gates, with their bias, ``[b, gates·hidden]``.
        h: what the hidden state contributes, with its bias.
        state: the hidden state, ``[b, hidden]``, which a GRU mixes into the next.
        c: an LSTM's cell state.
        updated: made of what is added to an LSTM's cell state, or to a GRU's hidden state; None leaves it.

    Returns:
        The next hidden state (before any projection) and cell state.
    """
    if cell is Cell.GRU:
        x_r, x_z, x_n = x.chunk(3, -1)
        h_r, h_z, h_n = h.chunk(3, -1)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        z = torch.sigmoid(x_z + h_z)
        return n + z * (state - n) if updated is None else z * state + updated((1 - z) * n), None
    gates = x + h
    if cell is Cell.TANH:
        return torch.tanh(gates), None
    if cell is Cell.RELU:
        return F.relu(gates), None
    assert c is not None
    i, f, g, o = gates.chunk(4, -1)
    new = torch.sigmoid(i) * torch.tanh(g)
    c = torch.sigmoid(f) * c + (new if updated is None else updated(new))
    return torch.sigmoid(o) * torch.tanh(c), c
