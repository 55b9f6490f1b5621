"""Recurrent layers and cells: ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``, padded and packed, and their cells.

Every sequence of the batch has weights of its own, the same ones at every time step: ΔW and the signs are drawn once and held.
``Flipout(per_step=True)`` and ``granularity="token"`` draw new signs at each step. Recurrent operations take their rows from their
own ``batch_first``; those of a packed batch are put back into the order in which the caller gave the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.cells import Cell, cell_step
from flipout.errors import BatchError
from flipout.estimators import Estimator
from flipout.modes import autocast, autocasts, transformed
from flipout.noise import Source
from flipout.precision import product_dtype
from flipout.registry import rule
from flipout.rules.linear import sign_factors
from flipout.rules.sequence import Steps, unroll
from flipout.rules.sequence_kernel import SignedMatrix, signed_sequence
from flipout.rules.sequence_rows import (
    Batch,
    Weights,
    batch_of,
    first_rows,
    is_fresh,
    on_rows,
    per_step,
    place_of,
    refuse_local,
    require_states,
)
from flipout.weight import PerturbedWeight, carriers_in

__all__ = ["recurrent"]


def _linear(x: Tensor, weight: Any, bias: Any) -> Tensor:
    y: Tensor = F.linear(x, weight, bias)
    return y


# --- sequences --------------------------------------------------------------------------------------------------------


def recurrent(
    cell: Cell,
    x: Tensor,
    sizes: Tensor | None,
    hx: Sequence[Tensor],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """The rule of every recurrent operation; arguments as torch has them.

    Args:
        cell: which.
        x: ``[T, B, in]``, ``[B, T, in]`` if ``batch_first``, or packed ``[total, in]``.
        sizes: sequences at each step of a packed batch, else None.
        hx: first hidden states ``[layers·directions, B, hidden]``, and an LSTM's cell states.
        params: the flat weights, some of them perturbed.

    Returns:
        Output, last hidden states and, for an LSTM, last cell states.

    Raises:
        BatchError: if the rows of the input or of ``hx`` are not those of the draw.
        UnsupportedNoiseError: under LocalReparameterization.
    """
    what = cell.value
    carriers = list(carriers_in(list(params)))
    refuse_local(carriers, what)
    directions, whose = 2 if bidirectional else 1, x
    if sizes is None:
        x = x.transpose(0, 1) if batch_first else x
        length, rows = x.shape[:2]
        steps = (rows,) * length
        packed = x.reshape(length * rows, x.shape[2])
    else:
        steps, packed = tuple(sizes.tolist()), x
    if not steps:
        raise BatchError(f"{what} got an input of shape {tuple(x.shape)}, a sequence without steps; give it at least one")
    batch = batch_of(carriers, steps[0], whose, sizes is not None, batch_first, what)
    for state in hx:
        require_states(state, steps[0], carriers[0], what)
    count = len(params) // (num_layers * directions)
    y = packed
    if _low_precision(cell, x, count % 2 == 1):
        y, *hx = autocast(packed, *hx)
    finals: list[tuple[Tensor, Tensor | None]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            weights = _weights(params[k * count : (k + 1) * count], has_biases)
            c0 = hx[1][k] if cell is Cell.LSTM else None
            output, h, c = _direction(cell, Steps(steps, direction == 1), batch, y, hx[0][k], c0, weights)
            outputs.append(output)
            finals.append((h, c))
        y = outputs[0] if directions == 1 else torch.cat(outputs, 1)
        if dropout and layer < num_layers - 1:
            y = F.dropout(y, dropout, train)
    if sizes is None:
        y = y.view(len(steps), steps[0], y.shape[1])
        y = y.transpose(0, 1) if batch_first else y
    states = [torch.stack([h for h, _ in finals])]
    if cell is Cell.LSTM:
        states.append(torch.stack([c for _, c in finals if c is not None]))
    return y, *states


def _weights(params: Sequence[Any], has_biases: bool) -> Weights:
    bias_ih, bias_hh = params[2:4] if has_biases else (None, None)
    projection = params[-1] if len(params) % 2 else None
    return Weights(params[0], params[1], bias_ih, bias_hh, projection).map(per_step)


def _direction(
    cell: Cell, steps: Steps, batch: Batch, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction of one layer over packed inputs ``[total, in]``."""
    mixed = autocasts(x.device.type) and not _low_precision(cell, x, weights.hr is not None)
    signed = _signed(batch, steps, weights) if weights.hr is None and not mixed else None
    if signed is None:
        return _composed(cell, steps, batch, x, h0, c0, weights)
    bias_x, bias_h = (_bias_rows(batch, bias) for bias in (weights.bias_ih, weights.bias_hh))
    if cell is not Cell.GRU and bias_x is not None and bias_h is not None:
        bias_x, bias_h = bias_x + bias_h, None
    x, h0, c0, bias_x, bias_h = autocast(x, h0, c0, bias_x, bias_h)
    input, hidden = (_lowered(matrix) for matrix in signed)
    h0, c0 = h0.contiguous(), c0 if c0 is None else c0.contiguous()
    return signed_sequence(cell, steps, x, h0, c0, bias_x, bias_h, input, hidden, _noise_dtype(x, weights))


def _noise_dtype(x: Tensor, weights: Weights) -> torch.dtype | None:
    """The dtype of the noise's products: bfloat16 or none, as float16 has no room for the gradients of a whole sequence."""
    asked = product_dtype(next(carriers_in(tuple(weights))).origin.estimator, x)
    return asked if asked == torch.bfloat16 else None


def _low_precision(cell: Cell, x: Tensor, projected: bool) -> bool:
    """Whether autocast runs the whole operation in its dtype, as torch does; else it lowers the products only."""
    return x.device.type != "cpu" or (cell is Cell.LSTM and not projected)


def _signed(batch: Batch, steps: Steps, weights: Weights) -> tuple[SignedMatrix, SignedMatrix] | None:
    """The two matrices for the sequence kernel; None where one of them is more than a mean and flipout's one signed term.

    Bases of groups of sequences need sequences of one length, as those of a group must stay together.
    """
    found = []
    for weight in weights[:2]:
        if not isinstance(weight, PerturbedWeight):
            found.append(SignedMatrix(weight))
            continue
        if is_fresh(weight) or len(weight.terms) != 1:
            return None
        mean, term = weight.mean_weight, batch.gathered(weight).terms[0]
        signs = sign_factors(term) if steps.uniform or term.groups is None else None
        if signs is None or term.base.shape[-2:] != mean.shape or not all(factor.packed or factor.signs for factor in signs):
            return None
        s, r = (factor.compact(mean.dtype) for factor in signs)
        found.append(_from_source(SignedMatrix(mean, term.base, s, r), term.source))
    return found[0], found[1]


def _from_source(matrix: SignedMatrix, source: Source | None) -> SignedMatrix:
    """The matrix with a base without gradient, where the kernel can take that on to what the base was made of."""
    if source is None or matrix.base is None or not matrix.base.requires_grad or transformed():
        return matrix
    if autocasts(matrix.mean.device.type):
        return matrix
    if source.unit is None:
        return matrix._replace(base=matrix.base.detach(), log_std=source.leaf)
    return matrix._replace(base=matrix.base.detach(), unit=source.unit) if source.leaf is matrix.mean else matrix


def _lowered(matrix: SignedMatrix) -> SignedMatrix:
    """The matrix in autocast's dtype where autocast is on."""
    mean, base = autocast(matrix.mean, matrix.base)
    return matrix._replace(mean=mean, base=base)


def _bias_rows(batch: Batch, bias: Any) -> Tensor | None:
    """A plain bias, or the biases of the sequences ``[B, out]``."""
    values: Tensor | None = batch.gathered(bias).dense() if isinstance(bias, PerturbedWeight) else bias
    return values


def _composed(
    cell: Cell, steps: Steps, batch: Batch, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any estimator: the linear rule at each step."""
    blocks = steps.uniform and batch.owner is None
    if not blocks:
        weights = weights.map(batch.gathered)
    gates = _input_gates(steps, x, weights)
    cut: dict[int, Weights] = {}

    def at(size: int) -> Weights:
        if size not in cut:
            cut[size] = weights.map(lambda weight: first_rows(weight, size) if size != steps.rows else on_rows(weight, size, 0))
        return cut[size]

    def hidden(h: Tensor) -> Tensor:
        now = at(len(h))
        return _linear(h, now.hh, now.bias_hh)

    project = None if weights.hr is None else lambda h: _linear(h, at(len(h)).hr, None)
    return unroll(cell, steps, gates, h0, c0, hidden, project)


def _input_gates(steps: Steps, x: Tensor, weights: Weights) -> Tensor:
    """What the inputs contribute to the gates of all steps; sequences of differing lengths are padded for it."""
    fresh = [w for w in (weights.ih, weights.bias_ih) if isinstance(w, PerturbedWeight) and is_fresh(w)]
    if fresh:
        return _linear(x, weights.ih, weights.bias_ih)
    T, B = len(steps.sizes), steps.rows
    at = None
    if not steps.uniform:
        at = torch.cat([torch.arange(t * B, t * B + size, device=x.device) for t, size in enumerate(steps.sizes)])
        x = x.new_zeros(T * B, x.shape[1]).index_copy(0, at, x)
    ih, bias = (on_rows(weight, B, 1) for weight in (weights.ih, weights.bias_ih))
    gates = _linear(x.view(T, B, x.shape[1]), ih, bias).flatten(0, 1)
    return gates if at is None else gates.index_select(0, at)


# --- cells ------------------------------------------------------------------------------------------------------------


def recurrent_cell(cell: Cell, x: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """One step of a cell for a batch ``x [B, in]``: equal to a sequence of length one.

    Raises:
        BatchError, UnsupportedNoiseError: as :func:`recurrent`.
    """
    what = f"{cell.value}_cell"
    carriers = list(carriers_in(tuple(weights)))
    refuse_local(carriers, what)
    name = carriers[0].origin.name
    for state in (h, c):
        if state is not None and (state.dim() != 2 or x.dim() != 2 or len(state) != len(x)):
            raise BatchError(
                f"{what} met {name!r} with an input of shape {tuple(x.shape)} and a state of shape {tuple(state.shape)}; "
                "expected [B, in] and [B, hidden] with one B"
            )
    weights = weights.map(per_step)
    fresh = all(is_fresh(carrier) for carrier in carriers_in(tuple(weights)))
    if not fresh:
        place = place_of(carriers, x, 0, what)
        weights = weights.map(lambda weight: weight.at(place) if isinstance(weight, PerturbedWeight) else weight)
    if x.device.type != "cpu":
        x, h, c = autocast(x, h, c)
    return cell_step(cell, _linear(x, weights.ih, weights.bias_ih), _linear(h, weights.hh, weights.bias_hh), h, c)


# --- registration -----------------------------------------------------------------------------------------------------

_PADDED = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
_PACKED = ("data", "batch_sizes", *_PADDED[1:-1])


def _register(cell: Cell, operation: Any, cell_operation: Any) -> None:
    @rule(operation, Estimator)
    def sequence(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        at = 1 if cell is Cell.LSTM else 2  # a tensor here is the sizes, or the state after the sizes
        packed = "batch_sizes" in kwargs or "data" in kwargs or (len(args) > at and isinstance(args[at], Tensor))
        given = dict(zip(_PACKED if packed else _PADDED, args, strict=False)) | kwargs
        x, sizes = (given.pop("data"), given.pop("batch_sizes")) if packed else (given.pop("input"), None)
        hx = given.pop("hx")
        return recurrent(cell, x, sizes, hx if cell is Cell.LSTM else (hx,), **given)

    @rule(cell_operation, Estimator)
    def one_step(input: Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        h, c = hx if cell is Cell.LSTM else (hx, None)
        h, c = recurrent_cell(cell, input, h, c, Weights(w_ih, w_hh, b_ih, b_hh))
        return h if c is None else (h, c)


_register(Cell.LSTM, torch.lstm, torch.lstm_cell)
_register(Cell.GRU, torch.gru, torch.gru_cell)
_register(Cell.TANH, torch.rnn_tanh, torch.rnn_tanh_cell)
_register(Cell.RELU, torch.rnn_relu, torch.rnn_relu_cell)
