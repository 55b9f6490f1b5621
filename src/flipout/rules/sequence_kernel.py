"""A recurrent layer under flipout's signs, with a forward and a backward written for the whole sequence.

With x_t the input and h_{t-1} the hidden state of one sequence, its gates get

    W̄_x x_t + r_x ∘ (ΔW_x (s_x ∘ x_t))  +  W̄_h h_{t-1} + r_h ∘ (ΔW_h (s_h ∘ h_{t-1}))  +  bias         Wen et al. 2018, Eq. 4

with the same ΔW, r and s at every step. The input terms of all steps are one pair of products; only the hidden pair is left
inside the loop. Backward walks the loop once for the gradients of the gates, all of whose factors that do not depend on what
comes from later steps are computed for the whole sequence first, and then forms each weight gradient by one product over all
steps. Kept between forward and backward: the gates and the cell states, as a plain layer keeps them, and the signs as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flipout.modes import composed, transformed
from flipout.rules.sequence import Cell, Steps, unroll
from flipout.signs import unpack

__all__ = ["SignedMatrix", "signed_sequence"]

_sigmoid_slope = torch.ops.aten.sigmoid_backward.grad_input
_tanh_slope = torch.ops.aten.tanh_backward.grad_input
_relu_slope = torch.ops.aten.threshold_backward.grad_input

#: oneDNN's product with a weight in its own layout, where torch is built with it.
_lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_LARGE = 2**19


class SignedMatrix(NamedTuple):
    """A matrix of the layer, ``mean + r sᵀ ∘ base`` for each sequence.

    Attributes:
        mean: W̄ ``[out, in]``.
        base: ΔW ``[out, in]``, or None where the matrix is not perturbed.
        s: signs of the inputs, packed bits or numbers, one row a sequence.
        r: signs of the outputs, likewise.
    """

    mean: Tensor
    base: Tensor | None = None
    s: Tensor | None = None
    r: Tensor | None = None


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

    Returns:
        Hidden states ``[total, hidden]``, the last ones ``[B, hidden]`` and an LSTM's last cell states.
    """
    tensors = (x, h0, c0, bias_x, bias_h, *input, *hidden)
    if transformed():
        return _compose(cell, steps, *tensors)
    if composed(x, h0, c0, bias_x, bias_h, *input[:2], *hidden[:2]):
        return _forward(cell, steps, *tensors)[:3]
    result: tuple[Tensor, Tensor, Tensor | None] = _SignedSequence.apply(cell, steps, *tensors)  # type: ignore[no-untyped-call]
    return result


def _numbers(signs: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return unpack(signs, size, dtype) if signs.dtype == torch.uint8 else signs.to(dtype)


def _compose(cell: Cell, steps: Steps, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in plain operations."""
    x, h0, c0, bias_x, bias_h = tensors[:5]
    input, hidden = SignedMatrix(*tensors[5:9]), SignedMatrix(*tensors[9:])

    def product(x: Tensor, matrix: SignedMatrix, of_rows: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
        y = x @ matrix.mean.t()
        if matrix.base is not None and matrix.s is not None and matrix.r is not None:
            out, width = matrix.mean.shape
            s, r = _numbers(matrix.s, width, x.dtype), _numbers(matrix.r, out, x.dtype)
            y = y + of_rows(r) * ((of_rows(s) * x) @ matrix.base.t())
        return y if bias is None else y + (bias if bias.dim() == 1 else of_rows(bias))

    index = steps.index(x.device)
    gates = product(x, input, lambda rows: rows.index_select(0, index), bias_x)
    return unroll(cell, steps, gates, h0, c0, lambda h: product(h, hidden, lambda rows: rows[: len(h)], bias_h))


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

    def scaled(self, buffer: Tensor, values: Tensor) -> Tensor:
        view, spread = self.pair(buffer, values)
        return (view * spread).view(buffer.shape)

    def add_(self, buffer: Tensor, values: Tensor) -> Tensor:
        if values.dim() == 1:
            return buffer.add_(values)
        view, spread = self.pair(buffer, values)
        view.add_(spread)
        return buffer

    def sum(self, buffer: Tensor, like: Tensor) -> Tensor:
        """The adjoint of :meth:`add_`: sums of ``[n]`` or of ``[B, n]``."""
        if like.dim() == 1:
            return buffer.sum(0)
        if self.index is None:
            return buffer.view(len(self.steps.sizes), self.steps.rows, buffer.shape[1]).sum(0)
        return torch.zeros_like(like).index_add_(0, self.index, buffer)


def _laid_out(weight: Tensor, steps: Steps) -> Callable[[Tensor], Tensor] | None:
    """h ↦ h Wᵀ with W brought once into the layout that the product computes in; None where that is not to be had, or no faster.

    A product of a few rows with a large matrix spends much of its time on that layout. A plain layer on a CPU avoids it likewise.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _LARGE or len(steps.sizes) < 8:
        return None
    if _lay_out is None or _product is None or not steps.rows or not torch.backends.mkldnn.enabled:
        return None
    packed = _lay_out(weight.detach(), steps.rows)
    product: Callable[..., Tensor] = _product
    return lambda h: product(h, packed, None, "none", [], "")


class _Hidden:
    """The recurrent pair of products at one step, in buffers that all steps share."""

    def __init__(self, matrix: SignedMatrix, steps: Steps, forward: bool) -> None:
        mean, self.base, s, r = matrix
        out, width = mean.shape
        rows = steps.rows
        self.mean, self.mean_t = mean, mean.t()
        self.of_mean = _laid_out(mean, steps) if forward else None
        self.of_base = _laid_out(self.base, steps) if forward and self.base is not None else None
        if self.base is not None and s is not None and r is not None:
            self.base_t = self.base.t()
            self.s, self.r = _numbers(s, width, mean.dtype), _numbers(r, out, mean.dtype)
            self._buffers = mean.new_empty(rows, width), mean.new_empty(rows, out)
        self._size = -1

    def _signs(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Signs and buffers of the first ``size`` sequences: s and r, then room for an input and for an output."""
        if size != self._size:
            self._size = size
            self._cut = tuple(t[:size] for t in (self.s, self.r, *self._buffers))
        return self._cut  # type: ignore[return-value]

    def add_(self, gates: Tensor, h: Tensor) -> None:
        """gates += W̄ h + r ∘ (ΔW (s ∘ h))."""
        if self.of_mean is None:
            gates.addmm_(h, self.mean_t)
        else:
            gates.add_(self.of_mean(h))
        if self.base is not None:
            s, r, signed, z = self._signs(len(h))
            torch.mul(h, s, out=signed)
            z = torch.mm(signed, self.base_t, out=z) if self.of_base is None else self.of_base(signed)
            gates.addcmul_(z, r)

    def back_(self, dh: Tensor, gates: Tensor, keep: bool = False) -> None:
        """dh = W̄ᵀ gates + s ∘ (ΔWᵀ (r ∘ gates)), added to dh if it is to keep its own."""
        dh.addmm_(gates, self.mean, beta=int(keep))
        if self.base is not None:
            s, r, y, signed = self._signs(len(dh))
            torch.mul(gates, r, out=signed)
            torch.mm(signed, self.base, out=y)
            dh.addcmul_(y, s)


def _forward(cell: Cell, steps: Steps, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Output, last hidden and cell state; then what backward needs: the activated gates, and a second buffer of the cell."""
    x, h0, c0, bias_x, bias_h = tensors[:5]
    rows, hidden = _Rows(steps, x.device), _Hidden(SignedMatrix(*tensors[9:]), steps, forward=True)
    gates = _input_products(rows, x, bias_x, SignedMatrix(*tensors[5:9]))
    if cell is Cell.LSTM:
        output, cells = _lstm(steps, gates, h0, c0, hidden)
        return output, _own(steps.final(output)), _own(steps.final(cells)), gates, cells
    if cell is Cell.GRU:
        output, second = _gru(steps, gates, h0, bias_h, hidden)
        return output, _own(steps.final(output)), None, gates, second
    h = h0
    for _, piece in _walk(steps, gates):
        hidden.add_(piece, steps.active(h, h0, len(piece)))
        h = piece.tanh_() if cell is Cell.TANH else piece.relu_()
    return gates, _own(steps.final(gates)), None, gates, None


def _own(view: Tensor) -> Tensor:
    return view.clone()


def _walk(steps: Steps, buffer: Tensor) -> list[tuple[int, Tensor]]:
    pieces = buffer.split(steps.sizes)
    return [(t, pieces[t]) for t in steps.order]


def _input_products(rows: _Rows, x: Tensor, bias: Tensor | None, matrix: SignedMatrix) -> Tensor:
    mean, base, s, r = matrix
    if base is None or s is None or r is None:
        gates = torch.mm(x, mean.t())
        return gates if bias is None else rows.add_(gates, bias)
    gates = torch.mm(rows.scaled(x, _numbers(s, x.shape[1], x.dtype)), base.t())
    rows.scale_(gates, _numbers(r, len(mean), x.dtype))
    if bias is not None:
        rows.add_(gates, bias)
    return gates.addmm_(x, mean.t())


def _lstm(steps: Steps, gates: Tensor, h0: Tensor, c0: Tensor, hidden: _Hidden) -> tuple[Tensor, Tensor]:
    n, sizes = h0.shape[1], steps.sizes
    output, cells = gates.new_empty(len(gates), n), gates.new_empty(len(gates), n)
    outputs, states, both = output.split(sizes), cells.split(sizes), gates[:, : 2 * n].split(sizes)
    i, f, g, o = (gate.split(sizes) for gate in gates.chunk(4, 1))
    h, c = h0, c0
    for t, piece in _walk(steps, gates):
        h, c = steps.active(h, h0, len(piece)), steps.active(c, c0, len(piece))
        hidden.add_(piece, h)
        both[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.mul(f[t], c, out=states[t]).addcmul_(i[t], g[t])
        h = torch.tanh(c, out=outputs[t]).mul_(o[t])
    return output, cells


def _gru(steps: Steps, gates: Tensor, h0: Tensor, bias: Tensor | None, hidden: _Hidden) -> tuple[Tensor, Tensor]:
    """The gates in place, and what the hidden state contributes to the candidate."""
    n, sizes = h0.shape[1], steps.sizes
    output, candidate = gates.new_empty(len(gates), n), gates.new_empty(len(gates), n)
    outputs, h_n, both = output.split(sizes), candidate.split(sizes), gates[:, : 2 * n].split(sizes)
    r, z, n_t = (gate.split(sizes) for gate in gates.chunk(3, 1))
    h, room = h0, gates.new_empty(steps.rows, 3 * n)
    for t, piece in _walk(steps, gates):
        size = len(piece)
        h, y = steps.active(h, h0, size), room[:size]
        if bias is None:
            y.zero_()
        else:
            y.copy_(bias if bias.dim() == 1 else bias[:size])
        hidden.add_(y, h)
        both[t].add_(y[:, : 2 * n]).sigmoid_()
        h_n[t].copy_(y[:, 2 * n :])
        n_t[t].addcmul_(r[t], h_n[t]).tanh_()
        h = torch.lerp(n_t[t], h, z[t], out=outputs[t])
    return output, candidate


class _SignedSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, steps: Steps, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        output, h, c, gates, second = _forward(cell, steps, *tensors)
        ctx.cell, ctx.steps = cell, steps
        # a plain RNN's gates are its output, which is saved as that
        ctx.save_for_backward(*tensors, output, None if gates is output else gates, second)
        ctx.set_materialize_grads(False)
        return output, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, output, gates, second = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            found = _differentiable(ctx.cell, ctx.steps, tensors, needs, grads)
        else:
            found = _backward(ctx.cell, ctx.steps, tensors, needs, grads, output, gates, second)
        return None, None, *found


def _differentiable(cell: Cell, steps: Steps, tensors: Any, needs: Any, grads: Any) -> list[Tensor | None]:
    """Gradients that can be differentiated again: the sequence once more, in operations that torch differentiates twice."""
    # of aliases, so that a gradient does not also take the way through another operand that was computed from this one
    tensors = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    outputs = [(y, g) for y, g in zip(_compose(cell, steps, *tensors), grads, strict=True) if y is not None and g is not None]
    if not outputs:
        return [None] * len(needs)
    ys, gs = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _backward(
    cell: Cell, steps: Steps, tensors: Any, needs: Any, grads: Any, output: Tensor, gates: Tensor, second: Tensor
) -> list[Tensor | None]:
    x, h0, c0, bias_x, bias_h = tensors[:5]
    input, recurrent = SignedMatrix(*tensors[5:9]), SignedMatrix(*tensors[9:])
    gy, gh, gc = grads
    pieces = None if gy is None else gy.split(steps.sizes)
    dh = torch.zeros_like(h0) if gh is None else gh.clone(memory_format=torch.contiguous_format)
    dc = None if c0 is None else torch.zeros_like(c0) if gc is None else gc.clone(memory_format=torch.contiguous_format)
    hidden, rows = _Hidden(recurrent, steps, forward=False), _Rows(steps, x.device)
    found: list[Tensor | None] = [None] * len(needs)
    if cell is Cell.GRU:
        d_hidden, d_candidate = _gru_backward(steps, pieces, dh, h0, output, gates, second, hidden)
    elif dc is not None:
        d_hidden, d_candidate = _lstm_backward(steps, pieces, dh, dc, c0, gates, second, hidden), None
    else:
        d_hidden, d_candidate = _rnn_backward(cell, steps, pieces, dh, output, hidden), None
    found[1], found[2] = dh, dc
    if needs[4]:
        found[4] = rows.sum(d_hidden, bias_h)
    found[9:11] = _weight_gradients(rows, d_hidden, steps.previous(output, h0), recurrent, needs[9:11])
    if d_candidate is not None:  # the input part of a GRU's candidate is not behind its reset gate
        d_hidden[:, 2 * h0.shape[1] :] = d_candidate
    if needs[3]:
        found[3] = rows.sum(d_hidden, bias_x)
    if needs[0]:
        found[0] = _input_gradient(rows, d_hidden, input)
    found[5:7] = _weight_gradients(rows, d_hidden, x, input, needs[5:7])
    return found


def _weight_gradients(rows: _Rows, d: Tensor, x: Tensor, matrix: SignedMatrix, needs: Any) -> list[Tensor | None]:
    """Dᵀ X for the mean and (R ∘ D)ᵀ (S ∘ X) for ΔW: products over all steps at once."""
    found: list[Tensor | None] = [torch.mm(d.t(), x) if needs[0] else None, None]
    if needs[1] and matrix.s is not None and matrix.r is not None:
        out, width = matrix.mean.shape
        s, r = _numbers(matrix.s, width, d.dtype), _numbers(matrix.r, out, d.dtype)
        found[1] = torch.mm(rows.scale_(d, r).t(), rows.scaled(x, s))
        rows.scale_(d, r)  # signs undo themselves
    return found


def _input_gradient(rows: _Rows, d: Tensor, matrix: SignedMatrix) -> Tensor:
    mean, base, s, r = matrix
    if base is None or s is None or r is None:
        return torch.mm(d, mean)
    signs = _numbers(r, len(mean), d.dtype)
    gx = torch.mm(rows.scale_(d, signs), base)
    rows.scale_(d, signs)
    return rows.scale_(gx, _numbers(s, mean.shape[1], d.dtype)).addmm_(d, mean)


def _rnn_backward(cell: Cell, steps: Steps, gy: Any, dh: Tensor, output: Tensor, hidden: _Hidden) -> Tensor:
    slope = torch.ones_like(output)
    if cell is Cell.TANH:
        _tanh_slope(slope, output, grad_input=slope)
    else:
        _relu_slope(slope, output, 0, grad_input=slope)
    for t, d in reversed(_walk(steps, slope)):
        now = dh[: len(d)]
        if gy is not None:
            now.add_(gy[t])
        d.mul_(now)
        hidden.back_(now, d)
    return slope


def _lstm_backward(
    steps: Steps, gy: Any, dh: Tensor, dc: Tensor, c0: Tensor, gates: Tensor, cells: Tensor, hidden: _Hidden
) -> Tensor:
    sizes, n = steps.sizes, c0.shape[1]
    i, f, g, o = gates.chunk(4, 1)
    d = torch.empty_like(gates)
    d_i, d_f, d_g, d_o = d.chunk(4, 1)
    tanh_c = torch.tanh(cells)
    _sigmoid_slope(g, i, grad_input=d_i)
    _sigmoid_slope(steps.previous(cells, c0), f, grad_input=d_f)
    _tanh_slope(i, g, grad_input=d_g)
    _sigmoid_slope(tanh_c, o, grad_input=d_o)
    through = torch.ops.aten.tanh_backward(o, tanh_c).split(sizes)  # how the output moves with the cell state
    forget, of_cell, of_output = f.split(sizes), d[:, : 3 * n].unflatten(1, (3, n)).split(sizes), d_o.split(sizes)
    for t, d_t in reversed(_walk(steps, d)):
        now, cell = dh[: len(d_t)], dc[: len(d_t)]
        if gy is not None:
            now.add_(gy[t])
        cell.addcmul_(now, through[t])
        of_cell[t].mul_(cell.unsqueeze(1))
        of_output[t].mul_(now)
        cell.mul_(forget[t])
        hidden.back_(now, d_t)
    return d


def _gru_backward(
    steps: Steps, gy: Any, dh: Tensor, h0: Tensor, output: Tensor, gates: Tensor, candidate: Tensor, hidden: _Hidden
) -> tuple[Tensor, Tensor]:
    """Gradients of what the hidden state contributes to the gates, and of what the input contributes to the candidate."""
    sizes, width = steps.sizes, h0.shape[1]
    r, z, n = gates.chunk(3, 1)
    d = torch.empty_like(gates)
    d_r, d_z, d_n = d.chunk(3, 1)
    inner = torch.ops.aten.tanh_backward(1 - z, n)
    _sigmoid_slope(candidate, r, grad_input=d_r)
    d_r.mul_(inner)
    _sigmoid_slope(steps.previous(output, h0).sub_(n), z, grad_input=d_z)
    torch.mul(inner, r, out=d_n)
    kept, of_all, of_input = z.split(sizes), d.unflatten(1, (3, width)).split(sizes), inner.split(sizes)
    for t, d_t in reversed(_walk(steps, d)):
        now = dh[: len(d_t)]
        if gy is not None:
            now.add_(gy[t])
        of_all[t].mul_(now.unsqueeze(1))
        of_input[t].mul_(now)
        now.mul_(kept[t])
        hidden.back_(now, d_t, keep=True)
    return d, inner
