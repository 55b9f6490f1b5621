"""An operation in place after a perturbed layer gives what it gives out of place, as after a plain layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from laws import LISTED, MEMBERS, pair_id, pairs, wrap
from torch import Tensor, nn
from torch.nn import functional as F

import flipout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
every_pair = pytest.mark.parametrize(("case", "estimator"), pairs(), ids=pair_id)

#: What follows the layer: in place, and out of place.
AFTER: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu_, F.relu),
    "add": (lambda y: y.add_(0.5), lambda y: y + 0.5),
    "mul": (lambda y: y.mul_(-2.0), lambda y: y * -2.0),
}


def _result(call: Callable[[], Tensor], after: Callable[[Tensor], Any], wanted: list[Any], curved: bool = True) -> list[Tensor]:
    """The output, and the derivatives of a curved function of it."""
    y = call()
    y = after(y)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    loss = (weights * y + 0.1 * y**2).sum() if curved else (weights * y).sum()
    return [y.detach(), *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def _require_equal(call: Callable[[], Tensor], plain: Callable[[], Tensor], wanted: list[Any]) -> None:
    for name, (in_place, out_of_place) in AFTER.items():
        try:
            after = in_place(plain())
            after.sum().backward()
        except RuntimeError:  # torch itself needs the result of the plain module unchanged
            continue
        ours, theirs = (_result(call, after, wanted) for after in (in_place, out_of_place))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b), name


@every_pair
def test_after_every_case(case: Case, estimator: str) -> None:
    net = wrap(case, flipout.Gaussian(0.3, relative=True, learnable=True), LISTED[estimator])
    x = [v.requires_grad_(v.is_floating_point()) for v in case.draw_inputs(2 * MEMBERS)]
    wanted: list[Any] = [*net.parameters(), *(v for v in x if v.requires_grad)]
    with net.hold(MEMBERS):
        _require_equal(lambda: net(*x), lambda: net.module(*x), wanted)


def _slice(y: Tensor) -> Tensor:
    y[:, 0] += 1
    y[..., 0].mul_(3.0)
    return y


def _sliced(y: Tensor) -> Tensor:
    first = torch.zeros_like(y)
    first[:, 0] = 1
    scale = torch.ones_like(y)
    scale[..., 0] = 3
    return (y + first) * scale


class Part(nn.Module):
    """One of the results of a layer, as the layer gives it."""

    def __init__(self, layer: nn.Module, *places: int) -> None:
        super().__init__()
        self.layer, self.places = layer, places

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for place in self.places:
            y = y[place]
        return y


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "bilinear": (lambda: Pair(nn.Bilinear(3, 3, 4)), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), (3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), (3, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 2), (3, 5)),
    "lstm": (lambda: Part(nn.LSTM(3, 4, batch_first=True), 0), (5, 3)),
    "lstm_hidden": (lambda: Part(nn.LSTM(3, 4, batch_first=True), 1, 0, 0), (5, 3)),
    "lstm_cell_state": (lambda: Part(nn.LSTM(3, 4, batch_first=True), 1, 1, 0), (5, 3)),
    "lstm_projected": (lambda: Part(nn.LSTM(3, 4, proj_size=2, batch_first=True), 0), (5, 3)),
    "gru": (lambda: Part(nn.GRU(3, 4, batch_first=True), 0), (5, 3)),
    "gru_hidden": (lambda: Part(nn.GRU(3, 4, batch_first=True), 1, 0), (5, 3)),
    "rnn": (lambda: Part(nn.RNN(3, 4, batch_first=True), 0), (5, 3)),
    "rnn_relu": (lambda: Part(nn.RNN(3, 4, nonlinearity="relu", batch_first=True), 0), (5, 3)),
    "lstm_cell": (lambda: Part(nn.LSTMCell(3, 4), 0), (3,)),
    "gru_cell": (lambda: nn.GRUCell(3, 4), (3,)),
}


class Pair(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("layer", LAYERS)
def test_after_a_layer_and_in_a_slice_of_its_result(layer: str, estimator: str, learnable: bool) -> None:
    build, shape = LAYERS[layer]
    net = flipout.Perturbed(build().double(), flipout.Gaussian(0.3, learnable=learnable), LISTED[estimator])
    x = torch.randn(MEMBERS, *shape, dtype=torch.float64, requires_grad=True)
    wanted = [*net.parameters(), x]
    with net.hold(MEMBERS):
        for in_place, out_of_place in [*AFTER.values(), (_slice, _sliced)]:
            ours, theirs = (_result(lambda: net(x), after, wanted) for after in (in_place, out_of_place))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_and_relu_in_place_between_layers() -> None:
    net = flipout.Perturbed(
        nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Dropout(0.5, inplace=True), nn.GRU(4, 2, batch_first=True)
        ),
        flipout.Gaussian(0.1),
    )
    net(torch.randn(6, 5, 3))[0].relu_().sum().backward()
    assert all(p.grad is not None for p in net.module.parameters())


def test_what_backward_needs_is_not_overwritten_in_silence() -> None:
    """An input that was written into after the layer is told by torch, as after a plain layer."""
    net = flipout.Perturbed(nn.Linear(3, 4), flipout.Gaussian(0.1))
    x = torch.randn(6, 5, 3).requires_grad_() * 1
    y = net(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
