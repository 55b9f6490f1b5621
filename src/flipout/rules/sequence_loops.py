"""The loops over time of a signed recurrent layer, forward and backward, written in place on buffers of the whole sequence.

Each takes what the inputs contribute to the gates of all steps and leaves only the recurrent pair of products inside its loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flipout.cells import Cell
from flipout.rules.onednn import stepwise
from flipout.rules.sequence import Steps
from flipout.signs import unpack

__all__ = [
    "Hidden",
    "SignedMatrix",
    "gru",
    "gru_backward",
    "lstm",
    "lstm_backward",
    "numbers",
    "rnn",
    "rnn_backward",
]

_sigmoid_slope = torch.ops.aten.sigmoid_backward.grad_input
_tanh_slope = torch.ops.aten.tanh_backward.grad_input
_relu_slope = torch.ops.aten.threshold_backward.grad_input


class SignedMatrix(NamedTuple):
    """A matrix of the layer, ``mean + r sᵀ ∘ base`` for each sequence.

    Attributes:
        mean: W̄ ``[out, in]``.
        base: ΔW ``[out, in]``, or ``[K, out, in]`` for K groups of sequences, one after the other; None where the matrix is not
            perturbed.
        s: signs of the inputs, packed bits or numbers, one row a sequence.
        r: signs of the outputs, likewise.
        unit: ε, where ``base`` is ε ∘ W̄ and has no gradient of its own: it goes to the mean.
        log_std: log σ, where ``base`` is ε ∘ σ and has no gradient of its own: it goes there.
    """

    mean: Tensor
    base: Tensor | None = None
    s: Tensor | None = None
    r: Tensor | None = None
    unit: Tensor | None = None
    log_std: Tensor | None = None

    def kept(self) -> SignedMatrix:
        """What backward needs: not both ε and ΔW."""
        return self if self.unit is None else self._replace(base=None)

    def restored(self) -> SignedMatrix:
        """The inverse of :meth:`kept`."""
        return self if self.unit is None else self._replace(base=self.unit * self.mean)

    def differentiable(self) -> SignedMatrix:
        """The same with a base that has its gradient from what it was made of."""
        base = self.base
        if self.unit is not None:
            base = self.unit * self.mean
        elif self.log_std is not None and base is not None:
            base = base * (self.log_std - self.log_std.detach()).exp()
        return self._replace(base=base, unit=None, log_std=None)


def numbers(signs: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return unpack(signs, size, dtype) if signs.dtype == torch.uint8 else signs.to(dtype)


class Hidden:
    """The recurrent pair of products at one step, or its adjoint, in buffers that all steps share.

    Args:
        dtype: of the product with ΔW, or None for that of the mean.
    """

    def __init__(self, matrix: SignedMatrix, steps: Steps, adjoint: bool = False, dtype: torch.dtype | None = None) -> None:
        mean, base, s, r, *_ = matrix
        if adjoint:
            mean, base, s, r = mean.t(), None if base is None else base.mT, r, s
        out, width = mean.shape
        rows, times = steps.rows, len(steps.sizes)
        self._mean, self._of_mean = mean.t(), stepwise(mean, rows, times)
        self._perturbed = base is not None
        if base is not None and s is not None and r is not None:
            base = base if dtype is None else base.to(dtype)
            self._groups = len(base) if base.dim() == 3 else 0
            self._base, self._of_base = base.mT, None if self._groups else stepwise(base, rows, times)
            self._signs = numbers(s, width, mean.dtype), numbers(r, out, mean.dtype)
            self._buffers = base.new_empty(rows, width), base.new_empty(rows, out)
        self._size = -1

    def __call__(self, out: Tensor, x: Tensor, y: Tensor | None = None) -> None:
        """out = W̄ x + r ∘ (ΔW (s ∘ x)), and ``y`` besides, which may be ``out`` itself; adjoint W̄ᵀ x + s ∘ (ΔWᵀ (r ∘ x))."""
        if self._of_mean is not None:
            y = self._of_mean(x, y)
        else:
            y = torch.mm(x, self._mean, out=out) if y is None else torch.addmm(y, x, self._mean, out=out)
        if self._perturbed:
            if len(x) != self._size:  # signs and buffers of the sequences that have this step
                self._size = len(x)
                self._cut = [t[: self._size] for t in (*self._signs, *self._buffers)]
            s, r, signed, z = self._cut
            torch.mul(x, s, out=signed)
            torch.addcmul(y, self._noise(signed, z), r, out=out)
        elif y is not out:
            out.copy_(y)

    def _noise(self, signed: Tensor, z: Tensor) -> Tensor:
        if self._groups:
            torch.bmm(*(signed.unflatten(0, (self._groups, -1)), self._base), out=z.unflatten(0, (self._groups, -1)))
            return z
        return torch.mm(signed, self._base, out=z) if self._of_base is None else self._of_base(signed)


def _walk(steps: Steps, buffer: Tensor) -> list[tuple[int, Tensor]]:
    pieces = buffer.split(steps.sizes)
    return [(t, pieces[t]) for t in steps.order]


def _first(state: Tensor, size: int) -> Tensor:
    """The state of the sequences that have a step."""
    return state if len(state) == size else state[:size]


def rnn(cell: Cell, steps: Steps, gates: Tensor, h0: Tensor, hidden: Hidden) -> Tensor:
    """The hidden states, in the memory of the gates."""
    h = h0
    for _, piece in _walk(steps, gates):
        hidden(piece, steps.active(h, h0, len(piece)), piece)
        h = piece.tanh_() if cell is Cell.TANH else piece.relu_()
    return gates


def rnn_backward(cell: Cell, steps: Steps, gy: Any, dh: Tensor, output: Tensor, hidden: Hidden) -> Tensor:
    slope = torch.ones_like(output)
    if cell is Cell.TANH:
        _tanh_slope(slope, output, grad_input=slope)
    else:
        _relu_slope(slope, output, 0, grad_input=slope)
    for t, d in reversed(_walk(steps, slope)):
        now = _first(dh, len(d))
        if gy is not None:
            now.add_(gy[t])
        d.mul_(now)
        hidden(now, d)
    return slope


def lstm(steps: Steps, gates: Tensor, h0: Tensor, c0: Tensor, hidden: Hidden) -> tuple[Tensor, Tensor, Tensor]:
    """The gates in place; the hidden states, the cell states and the hyperbolic tangents of these."""
    n, sizes = h0.shape[1], steps.sizes
    output, cells, bent = (gates.new_empty(len(gates), n) for _ in range(3))
    tanhs = bent.split(sizes)
    outputs, states, both = output.split(sizes), cells.split(sizes), gates[:, : 2 * n].split(sizes)
    i, f, g, o = (gate.split(sizes) for gate in gates.chunk(4, 1))
    h, c = h0, c0
    for t, piece in _walk(steps, gates):
        h, c = steps.active(h, h0, len(piece)), steps.active(c, c0, len(piece))
        hidden(piece, h, piece)
        both[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = torch.mul(f[t], c, out=states[t]).addcmul_(i[t], g[t])
        h = torch.mul(torch.tanh(c, out=tanhs[t]), o[t], out=outputs[t])
    return output, cells, bent


def lstm_backward(
    steps: Steps, gy: Any, dh: Tensor, dc: Tensor, c0: Tensor, gates: Tensor, cells: Tensor, tanh_c: Tensor, hidden: Hidden
) -> Tensor:
    sizes, n = steps.sizes, c0.shape[1]
    i, f, g, o = gates.chunk(4, 1)
    d = torch.empty_like(gates)
    d_i, d_f, d_g, d_o = d.chunk(4, 1)
    _sigmoid_slope(g, i, grad_input=d_i)
    _sigmoid_slope(steps.previous(cells, c0), f, grad_input=d_f)
    _tanh_slope(i, g, grad_input=d_g)
    _sigmoid_slope(tanh_c, o, grad_input=d_o)
    through = torch.ops.aten.tanh_backward(o, tanh_c).split(sizes)  # how the output moves with the cell state
    forget, of_cell, of_output = f.split(sizes), d[:, : 3 * n].unflatten(1, (3, n)).split(sizes), d_o.split(sizes)
    for t, d_t in reversed(_walk(steps, d)):
        now, cell = _first(dh, len(d_t)), _first(dc, len(d_t))
        if gy is not None:
            now.add_(gy[t])
        cell.addcmul_(now, through[t])
        of_cell[t].mul_(cell.unsqueeze(1))
        of_output[t].mul_(now)
        cell.mul_(forget[t])
        hidden(now, d_t)
    return d


def gru(steps: Steps, gates: Tensor, h0: Tensor, bias: Tensor | None, hidden: Hidden) -> tuple[Tensor, Tensor]:
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
        hidden(y, h, y)
        both[t].add_(y[:, : 2 * n]).sigmoid_()
        h_n[t].copy_(y[:, 2 * n :])
        n_t[t].addcmul_(r[t], h_n[t]).tanh_()
        h = torch.lerp(n_t[t], h, z[t], out=outputs[t])
    return output, candidate


def gru_backward(
    steps: Steps, gy: Any, dh: Tensor, h0: Tensor, output: Tensor, gates: Tensor, candidate: Tensor, hidden: Hidden
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
        now = _first(dh, len(d_t))
        if gy is not None:
            now.add_(gy[t])
        of_all[t].mul_(now.unsqueeze(1))
        of_input[t].mul_(now)
        now.mul_(kept[t])
        hidden(now, d_t, now)
    return d, inner
