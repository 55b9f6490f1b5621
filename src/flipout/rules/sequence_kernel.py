"""A recurrent layer under flipout's signs, with a forward and a backward written for the whole sequence.

With x_t the input and h_{t-1} the hidden state of one sequence, its gates get

    W̄_x x_t + r_x ∘ (ΔW_x (s_x ∘ x_t))  +  W̄_h h_{t-1} + r_h ∘ (ΔW_h (s_h ∘ h_{t-1}))  +  bias         Wen et al. 2018, Eq. 4

with the same ΔW, r and s at every step. The input terms of all steps are one pair of products; only the hidden pair is left
inside the loop. Backward walks the loop once for the gradients of the gates, all of whose factors that do not depend on what
comes from later steps are computed for the whole sequence first, and then forms each weight gradient by one product over all
steps. Kept between forward and backward: the gates and the cell states, as a plain layer keeps them, the hidden states of a GRU or
a plain RNN in a copy of their own, the signs as they came, and ΔW, or the ε it was made of where that is needed and ΔW follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flipout.cells import Cell
from flipout.modes import composed, transformed
from flipout.rules import sequence_loops as loops
from flipout.rules.onednn import favours_rows, product
from flipout.rules.products import base_product
from flipout.rules.sequence import Steps, unroll
from flipout.rules.sequence_loops import Hidden, SignedMatrix, numbers
from flipout.signs import flip_by_

__all__ = ["SignedMatrix", "signed_sequence"]


def signed_sequence(
    cell: Cell,
    steps: Steps,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    bias_x: Tensor | None,
    bias_h: Tensor | None,
    input: SignedMatrix,
    hidden: SignedMatrix,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one direction of one recurrent layer.

    Args:
        cell, steps: which cell, over which steps.
        x: inputs of all steps, ``[total, in]``.
        h0: first hidden state, ``[B, hidden]``.
        c0: first cell state of an LSTM.
        bias_x: bias of the input part, ``[gates·hidden]``, or ``[B, gates·hidden]`` with one for each sequence, or None.
        bias_h: bias of the hidden part; only a GRU tells it from ``bias_x``, others take None.
        input: the input matrix.
        hidden: the recurrent matrix.
        dtype: of the products with ΔW, or None for that of ``x``.

    Returns:
        Hidden states ``[total, hidden]``, the last ones ``[B, hidden]`` and an LSTM's last cell states.
    """
    tensors = (x, h0, c0, bias_x, bias_h, *input, *hidden)
    if transformed():
        return _compose(cell, steps, dtype, *tensors)
    if composed(*tensors):
        return _forward(cell, steps, dtype, *tensors)[:3]
    result: tuple[Tensor, Tensor, Tensor | None] = _SignedSequence.apply(  # type: ignore[no-untyped-call]
        cell, steps, dtype, *tensors
    )
    return result


def _compose(cell: Cell, steps: Steps, dtype: torch.dtype | None, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in plain operations."""
    x, h0, c0, bias_x, bias_h = tensors[:5]
    input, hidden = (matrix.differentiable() for matrix in _matrices(tensors))

    def signed(x: Tensor, matrix: SignedMatrix, of_rows: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
        y = x @ matrix.mean.t()
        if matrix.base is not None and matrix.s is not None and matrix.r is not None:
            out, width = matrix.mean.shape
            s, r = numbers(matrix.s, width, x.dtype), numbers(matrix.r, out, x.dtype)
            z = _based(steps, of_rows(s) * x, matrix.base, dtype, differentiable=True)
            y = y + of_rows(r) * z.to(y.dtype)
        return y if bias is None else y + (bias if bias.dim() == 1 else of_rows(bias))

    index = steps.index(x.device)
    gates = signed(x, input, lambda rows: rows.index_select(0, index), bias_x)
    return unroll(cell, steps, gates, h0, c0, lambda h: signed(h, hidden, lambda rows: rows[: len(h)], bias_h))


def _based(steps: Steps, x: Tensor, base: Tensor, dtype: torch.dtype | None, differentiable: bool = False) -> Tensor:
    """X ΔWᵀ in ``dtype``, for the rows of one step or of all."""
    if dtype is not None:
        x, base = x.to(dtype), base.to(dtype)
    if base.dim() == 2:
        return x @ base.t() if differentiable else product(x, base)
    return base_product(x.view(len(x) // steps.rows, steps.rows, 1, x.shape[1]), base).flatten(0, 2)


def _matrices(tensors: Any) -> tuple[SignedMatrix, SignedMatrix]:
    """The input and the recurrent matrix, of which the operands from the sixth on consist."""
    count = len(SignedMatrix._fields)
    return SignedMatrix(*tensors[5 : 5 + count]), SignedMatrix(*tensors[5 + count :])


class _Rows:
    """Broadcasts ``[B, n]`` values of the sequences to the packed rows of a buffer ``[total, n]``, writing in place."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        self.steps = steps
        self.index = None if steps.uniform else steps.index(device)

    def pair(self, buffer: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Views of both that broadcast to each other."""
        if self.index is None:
            return buffer.view(len(self.steps.sizes), self.steps.rows, buffer.shape[1]), values
        return buffer, values.index_select(0, self.index)

    def scale_(self, buffer: Tensor, values: Tensor) -> Tensor:
        view, spread = self.pair(buffer, values)
        view.mul_(spread)
        return buffer

    def scale_columns_(self, buffer: Tensor, values: Tensor) -> None:
        """:meth:`scale_` of a transposed buffer ``[n, total]``."""
        if self.index is None:
            buffer.view(len(buffer), len(self.steps.sizes), self.steps.rows).mul_(values.t().contiguous().unsqueeze(1))
        else:
            buffer.mul_(values.index_select(0, self.index).t())

    def scaled(self, buffer: Tensor, values: Tensor) -> Tensor:
        view, spread = self.pair(buffer, values)
        return (view * spread).view(buffer.shape)

    def add_scaled_(self, buffer: Tensor, other: Tensor, values: Tensor) -> None:
        view, spread = self.pair(other, values)
        buffer.view(view.shape).addcmul_(view, spread)

    def add_(self, buffer: Tensor, values: Tensor) -> Tensor:
        if values.dim() == 1:
            return buffer.add_(values)
        view, spread = self.pair(buffer, values)
        view.add_(spread)
        return buffer

    def signed(self, buffer: Tensor, values: Tensor, dtype: torch.dtype | None) -> Tensor:
        """:meth:`scaled` by signs, in ``dtype`` if that is not None."""
        if dtype is None:
            return self.scaled(buffer, values)
        low = buffer.to(dtype)
        flip_by_(*self.pair(low, values))
        return low

    def sum(self, buffer: Tensor, like: Tensor) -> Tensor:
        """The adjoint of :meth:`add_`: sums of ``[n]`` or of ``[B, n]``."""
        if like.dim() == 1:
            return buffer.sum(0)
        if self.index is None:
            return buffer.view(len(self.steps.sizes), self.steps.rows, buffer.shape[1]).sum(0)
        return torch.zeros_like(like).index_add_(0, self.index, buffer)


def _forward(
    cell: Cell, steps: Steps, dtype: torch.dtype | None, *tensors: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Output, last hidden and cell state; then what backward needs: the activated gates, and two more buffers of the cell."""
    x, h0, c0, bias_x, bias_h = tensors[:5]
    input, recurrent = _matrices(tensors)
    rows, hidden = _Rows(steps, x.device), Hidden(recurrent, steps, dtype=dtype)
    gates = _input_products(rows, x, bias_x, input, dtype)
    if cell is Cell.LSTM:
        output, cells, bent = loops.lstm(steps, gates, h0, c0, hidden)
        return output, steps.final(output).clone(), steps.final(cells).clone(), gates, cells, bent
    if cell is Cell.GRU:
        output, second = loops.gru(steps, gates, h0, bias_h, hidden)
        return output, steps.final(output).clone(), None, gates, second, None
    output = loops.rnn(cell, steps, gates, h0, hidden)
    return output, steps.final(output).clone(), None, output, None, None


def _input_products(rows: _Rows, x: Tensor, bias: Tensor | None, matrix: SignedMatrix, dtype: torch.dtype | None) -> Tensor:
    mean, base, s, r, *_ = matrix
    if base is None or s is None or r is None:
        gates = product(x, mean)
        return gates if bias is None else rows.add_(gates, bias)
    gates = _based(rows.steps, rows.signed(x, numbers(s, x.shape[1], x.dtype), dtype), base, dtype).to(x.dtype)
    rows.scale_(gates, numbers(r, len(mean), x.dtype))
    if bias is not None:
        rows.add_(gates, bias)
    return product(x, mean, gates)


class _SignedSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, steps: Steps, dtype: torch.dtype | None, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, h, c, gates, *more = _forward(cell, steps, dtype, *tensors)
        ctx.cell, ctx.steps, ctx.dtype = cell, steps, dtype
        kept = [*tensors[:5], *(part for matrix in _matrices(tensors) for part in matrix.kept())]
        # the caller may write into its output: an LSTM's follows from its gates, others keep one of their own
        own = None if cell is Cell.LSTM else output
        ctx.save_for_backward(*kept, own, None if gates is output else gates, *more)
        ctx.set_materialize_grads(False)
        return output if own is None else output.clone(), h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, output, gates, second, third = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            found = _differentiable(ctx.cell, ctx.steps, ctx.dtype, tensors, needs, grads)
        else:
            found = _backward(ctx.cell, ctx.steps, ctx.dtype, tensors, needs, grads, output, gates, second, third)
        return None, None, None, *found


def _differentiable(
    cell: Cell, steps: Steps, dtype: torch.dtype | None, tensors: Any, needs: Any, grads: Any
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: the sequence once more, in operations that torch differentiates twice."""
    # of aliases, so that a gradient does not also take the way through another operand that was computed from this one
    tensors = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    outputs = [
        (y, g) for y, g in zip(_compose(cell, steps, dtype, *tensors), grads, strict=True) if y is not None and g is not None
    ]
    if not outputs:
        return [None] * len(needs)
    ys, gs = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


class _Slopes:
    """The gradients D ``[total, out]`` of what a matrix contributes to the gates, and the products with them.

    A copy laid out by gates is kept where weight gradients Dᵀ X come faster from it.
    """

    def __init__(self, rows: _Rows, buffer: Tensor, dtype: torch.dtype | None, *operands: Tensor) -> None:
        self.rows, self.buffer, self.dtype = rows, buffer, dtype
        self.turned = buffer.t().contiguous() if all(favours_rows(buffer, x) for x in operands) else None
        self._signs: Tensor | None = None  # of the copy

    def replace_(self, start: int, values: Tensor) -> None:
        """Puts other gradients in the place of the gates from ``start`` on."""
        self.buffer[:, start:] = values
        if self.turned is not None:
            self._turn(None)
            self.turned[start:] = values.t()

    def _turn(self, signs: Tensor | None) -> Tensor:
        """The copy under other signs: signs undo themselves."""
        assert self.turned is not None
        change = [values for values in (self._signs, signs) if values is not None]
        if change and self._signs is not signs:
            self.rows.scale_columns_(self.turned, change[0] if len(change) == 1 else change[0] * change[1])
        self._signs = signs
        return self.turned

    def weight(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        """(R ∘ D)ᵀ X."""
        if self.turned is not None:
            return product(self._turn(signs), x.t())
        if signs is None:
            return torch.mm(self.buffer.t(), x)
        found = torch.mm(self.rows.scale_(self.buffer, signs).t(), x)
        self.rows.scale_(self.buffer, signs)
        return found

    def matrix(self, x: Tensor, matrix: SignedMatrix, needs: Any) -> list[Tensor | None]:
        """The gradients of a matrix's parts: of the mean Dᵀ X, of ΔW (R ∘ D)ᵀ (S ∘ X), or what that makes of the mean or log σ."""
        mean, base, s, r, unit, log_std = matrix
        of_mean, of_base, *_, of_log_std = needs
        found: list[Tensor | None] = [None] * len(needs)
        if of_mean:
            found[0] = self.weight(x)
        if s is None or r is None or not (of_base or of_log_std or (of_mean and unit is not None)):
            return found
        s, r = numbers(s, mean.shape[1], x.dtype), numbers(r, len(mean), x.dtype)
        assert base is not None
        slope = self._of_base(x, s, r, base)
        if unit is not None and found[0] is not None:
            if unit.dim() == 2:
                found[0].addcmul_(slope, unit)
            else:
                found[0].add_(slope.mul_(unit).sum(0))
        elif log_std is not None:
            found[5] = slope.mul_(base) if base.dim() == 2 else slope.mul_(base).sum(0)
        else:
            found[1] = slope
        return found

    def _of_base(self, x: Tensor, s: Tensor, r: Tensor, base: Tensor) -> Tensor:
        """(R ∘ D)ᵀ (S ∘ X), for each group of sequences where they have bases of their own."""
        signed = self.rows.signed(x, s, self.dtype)
        if self.dtype is None and base.dim() == 2:
            return self.weight(signed, r)
        slopes = self.rows.signed(self.buffer, r, self.dtype)
        if base.dim() == 2:
            return torch.mm(slopes.t(), signed).to(x.dtype)
        steps, groups = self.rows.steps, len(base)
        of_gates, of_inputs = (
            t.view(len(t) // steps.rows, groups, -1, t.shape[1]).transpose(0, 1).reshape(groups, -1, t.shape[1])
            for t in (slopes, signed)
        )
        return torch.bmm(of_gates.mT, of_inputs).to(x.dtype)

    def input(self, matrix: SignedMatrix) -> Tensor:
        """The gradient of the inputs, D W̄ + S ∘ ((R ∘ D) ΔW). D is used up."""
        mean, base, s, r, *_ = matrix
        gx = product(self.buffer, mean.t())
        if base is not None and s is not None and r is not None:
            self.rows.scale_(self.buffer, numbers(r, len(mean), gx.dtype))
            z = _based(self.rows.steps, self.buffer, base.mT, self.dtype)
            self.rows.add_scaled_(gx, z, numbers(s, mean.shape[1], gx.dtype))
        return gx


def _backward(
    cell: Cell,
    steps: Steps,
    dtype: torch.dtype | None,
    tensors: Any,
    needs: Any,
    grads: Any,
    output: Any,
    gates: Tensor,
    second: Tensor,
    third: Tensor,
) -> list[Tensor | None]:
    x, h0, c0, bias_x, bias_h = tensors[:5]
    input, recurrent = (matrix.restored() for matrix in _matrices(tensors))
    gy, gh, gc = grads
    pieces = None if gy is None else gy.split(steps.sizes)
    dh = torch.zeros_like(h0) if gh is None else gh.clone(memory_format=torch.contiguous_format)
    dc = None if c0 is None else torch.zeros_like(c0) if gc is None else gc.clone(memory_format=torch.contiguous_format)
    hidden, rows = Hidden(recurrent, steps, adjoint=True, dtype=dtype), _Rows(steps, x.device)
    found: list[Tensor | None] = [None] * len(needs)
    if cell is Cell.GRU:
        d, d_candidate = loops.gru_backward(steps, pieces, dh, h0, output, gates, second, hidden)
    elif c0 is not None and dc is not None:
        output = third * gates[:, 3 * h0.shape[1] :]
        d, d_candidate = loops.lstm_backward(steps, pieces, dh, dc, c0, gates, second, third, hidden), None
    else:
        d, d_candidate = loops.rnn_backward(cell, steps, pieces, dh, output, hidden), None
    found[1], found[2] = dh, dc
    if needs[4]:
        found[4] = rows.sum(d, bias_h)
    middle, previous = 5 + len(SignedMatrix._fields), steps.previous(output, h0)
    slopes = _Slopes(rows, d, dtype, x, previous)
    found[middle:] = slopes.matrix(previous, recurrent, needs[middle:])
    if d_candidate is not None:  # the input part of a GRU's candidate is not behind its reset gate
        slopes.replace_(2 * h0.shape[1], d_candidate)
    if needs[3]:
        found[3] = rows.sum(d, bias_x)
    found[5:middle] = slopes.matrix(x, input, needs[5:middle])
    found[0] = slopes.input(input) if needs[0] else None
    return found
