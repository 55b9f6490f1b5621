"""Recurrent layers and cells, each as a module that returns one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cases.base import Case, floats, second

IN, HIDDEN, LENGTH = 3, 4, 5


class Layer(nn.Module):
    """A recurrent layer with its final states appended as further features, so that a law sees all of its results."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(IN, HIDDEN, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, states = self.layer(x)
        states = torch.cat(states, -1) if isinstance(states, tuple) else states
        states = states.transpose(0, 1).flatten(1)  # [B, layers·directions·features]
        time = 1 if self.layer.batch_first else 0
        return torch.cat([y, states.unsqueeze(time).expand(*y.shape[:2], -1)], -1)


class Stepped(nn.Module):
    """A cell stepped by hand."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(IN, HIDDEN, **options)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


batch_first, time_first = floats(LENGTH, IN), second(LENGTH, IN)

CASES = [
    Case("lstm", lambda: Layer(nn.LSTM), time_first, batch_dim=1, affine=False),
    Case("lstm_deep", lambda: Layer(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True), batch_first, affine=False),
    Case("lstm_projected", lambda: Layer(nn.LSTM, proj_size=2, batch_first=True), batch_first, affine=False),
    Case("gru", lambda: Layer(nn.GRU, batch_first=True), batch_first, affine=False),
    Case("gru_deep", lambda: Layer(nn.GRU, num_layers=2, bidirectional=True), time_first, batch_dim=1, affine=False),
    Case("rnn", lambda: Layer(nn.RNN, batch_first=True, bias=False), batch_first, affine=False),
    Case("rnn_relu", lambda: Layer(nn.RNN, nonlinearity="relu", batch_first=True), batch_first, affine=False),
    Case("lstm_cell", lambda: Stepped(nn.LSTMCell), batch_first, affine=False),
    Case("gru_cell", lambda: Stepped(nn.GRUCell), batch_first, affine=False),
    Case("rnn_cell", lambda: Stepped(nn.RNNCell, nonlinearity="relu"), batch_first, affine=False),
]
