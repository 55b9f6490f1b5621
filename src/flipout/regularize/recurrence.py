"""Recurrent layers of torch run with masks: layer by layer, and step by step where a mask is inside the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from flipout.cells import Cell, cell_step
from flipout.errors import ArgumentError
from flipout.regularize.masks import Dropout, bernoulli
from flipout.regularize.methods import Method

__all__ = ["Ends", "check_layer", "run_layer"]

_OPERATIONS: dict[str, Any] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}

State = tuple[Tensor, ...]


class Ends(NamedTuple):
    """Whether a layer is the first and the last of its model: what it reads and gives is then ``inputs`` and ``outputs``."""

    first: bool
    last: bool


def check_layer(name: str, layer: nn.RNNBase, method: Method) -> None:
    """Raises ArgumentError for a method that is not defined on the layer."""
    if method.update is not None and layer.mode not in ("LSTM", "GRU"):
        raise ArgumentError(
            f"{name!r} is an nn.{type(layer).__name__}, which has no gated update to drop: name hidden= in its place"
        )
    if method.zoneout is not None and method.zoneout.cell and layer.mode != "LSTM":
        raise ArgumentError(f"{name!r} is an nn.{type(layer).__name__}, which has no cells: set Zoneout(cell=0, hidden=...)")


def run_layer(
    layer: nn.RNNBase, ends: Ends, method: Method, active: bool, generator: torch.Generator | None, x: Any, hx: Any = None
) -> tuple[Tensor, Any]:
    """What ``layer(x, hx)`` returns, under a method.

    Masks are drawn in the order of use: the inputs'; for each layer and direction the hidden state's, the update's, and those of
    the zones of cells and of hidden units; between layers and at the outputs the mask there.

    Args:
        layer: any ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
        place: of the layer in its model.
        method: what is dropped.
        active: whether masks are drawn; otherwise zones are their expectations and nothing else is dropped.
        generator: source of the masks.
        x, hx: as the layer takes them: a batch of sequences of one length, or a single sequence.

    Raises:
        ArgumentError: for a packed batch.
    """
    if isinstance(x, PackedSequence):
        raise ArgumentError(
            f"nn.{type(layer).__name__} got a packed batch, for which masks over time are not defined here; pass a padded batch"
        )
    single = x.dim() == 2
    if single:
        x = x.unsqueeze(0 if layer.batch_first else 1)
        hx = None if hx is None else tuple(s.unsqueeze(1) for s in hx) if isinstance(hx, tuple) else hx.unsqueeze(1)
    rows = x.shape[0 if layer.batch_first else 1]
    states = _states(layer, x, rows, hx)

    def drop(value: Tensor, dropout: Dropout | None) -> Tensor:
        if dropout is None or not active:
            return value
        steps = value.shape[1 if layer.batch_first else 0]
        mask = dropout.mask(steps, rows, value.shape[2], like=value, generator=generator)
        return value * (mask.transpose(0, 1) if layer.batch_first else mask)

    directions = 2 if layer.bidirectional else 1
    run = _steps if method.recurrent else _native
    finals: list[State] = []
    y = drop(x, method.inputs if ends.first else None)
    for k in range(layer.num_layers):
        if k:
            y = drop(y, method.between)
            y = F.dropout(y, layer.dropout, layer.training) if layer.dropout else y
        outputs = []
        for direction in range(directions):
            first = tuple(state[k * directions + direction] for state in states)
            output, *final = run(layer, k, direction == 1, y, first, method, active, generator)
            outputs.append(output)
            finals.append(tuple(final))
        y = outputs[0] if directions == 1 else torch.cat(outputs, 2)
    y = drop(y, method.outputs if ends.last else method.between)
    last = tuple(torch.stack(each) for each in zip(*finals, strict=True))
    if single:
        y, last = y.squeeze(0 if layer.batch_first else 1), tuple(state.squeeze(1) for state in last)
    return y, last if layer.mode == "LSTM" else last[0]


def _states(layer: nn.RNNBase, x: Tensor, rows: int, hx: Any) -> State:
    """The first states, ``[layers·directions, rows, features]`` each: zeros unless they are given."""
    if hx is not None:
        return hx if isinstance(hx, tuple) else (hx,)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, *([layer.hidden_size] if layer.mode == "LSTM" else [])]
    return tuple(x.new_zeros(count, rows, size) for size in sizes)


def _weights(layer: nn.RNNBase, k: int, reverse: bool) -> list[Any]:
    """W_ih, W_hh, b_ih, b_hh, W_hr of a layer and direction, as they stand: perturbed, while a wrapper has put them there."""
    suffix = f"l{k}{'_reverse' if reverse else ''}"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [getattr(layer, f"{name}_{suffix}", None) for name in names]


def _native(
    layer: nn.RNNBase, k: int, reverse: bool, x: Tensor, first: State, method: Method, active: bool, generator: Any
) -> tuple[Tensor, ...]:
    """One direction of one layer by torch's own operation."""
    time = 1 if layer.batch_first else 0
    weights = [weight for weight in _weights(layer, k, reverse) if weight is not None]
    states = [state.unsqueeze(0).contiguous() for state in first]
    hx = states if layer.mode == "LSTM" else states[0]
    x = x.flip(time) if reverse else x
    y, *last = _OPERATIONS[layer.mode](x, hx, weights, layer.bias, 1, 0.0, layer.training, False, layer.batch_first)
    return y.flip(time) if reverse else y, *(state.squeeze(0) for state in last)


def _steps(
    layer: nn.RNNBase, k: int, reverse: bool, x: Tensor, first: State, method: Method, active: bool, generator: Any
) -> tuple[Tensor, ...]:
    """One direction of one layer, step by step: the equations of the paper's Appendix D (19)-(22) with the masks in them."""
    w_ih, w_hh, b_ih, b_hh, w_hr = _weights(layer, k, reverse)
    time = 1 if layer.batch_first else 0
    inputs = F.linear(x, w_ih, b_ih).unbind(time)
    steps, rows, units = len(inputs), x.shape[1 - time], layer.hidden_size
    cell = Cell(layer.mode.lower())
    h, c = first[0], first[1] if cell is Cell.LSTM else None
    kept = _mask(method.hidden if active else None, steps, rows, h.shape[1], x, generator)
    updated = _mask(method.update if active else None, steps, rows, units, x, generator)
    zoneout = method.zoneout
    zone_c = _zones(zoneout.cell if zoneout and c is not None else 0.0, active, steps, rows, units, x, generator)
    zone_h = _zones(zoneout.hidden if zoneout else 0.0, active, steps, rows, h.shape[1], x, generator)
    outputs: list[Tensor] = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        recurrent = F.linear(kept(t, h), w_hh, b_hh)
        new_h, new_c = cell_step(cell, inputs[t], recurrent, h, c, partial(updated, t))
        new_h = new_h if w_hr is None else F.linear(new_h, w_hr)
        h = zone_h(t, h, new_h)
        c = None if c is None or new_c is None else zone_c(t, c, new_c)
        outputs[t] = h
    return torch.stack(outputs, time), h, *([] if c is None else [c])


def _mask(
    dropout: Dropout | None, steps: int, rows: int, features: int, like: Tensor, generator: Any
) -> Callable[[int, Tensor], Tensor]:
    """Multiplies by the mask of step t."""
    if dropout is None:
        return lambda t, value: value
    mask = dropout.mask(steps, rows, features, like=like, generator=generator)
    return lambda t, value: value * mask[t % len(mask)]


def _zones(
    p: float, active: bool, steps: int, rows: int, features: int, like: Tensor, generator: Any
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """Mixes the old value and the new one of step t."""
    if not p:
        return lambda t, old, new: new
    if not active:
        return lambda t, old, new: torch.lerp(new, old, p)
    zones = bernoulli(p, (steps, rows, features), like, generator)
    return lambda t, old, new: torch.lerp(new, old, zones[t])
