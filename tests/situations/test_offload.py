"""Modules whose weights are elsewhere between calls: equal to the model that is whole, under the same generator, or told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn

import flipout

accelerate = pytest.importorskip("accelerate", reason="needs the accelerate package")
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys", "ignore:Some parameters are on the meta device")
N = 4
CPU = torch.device("cpu")
NOISES = {
    "fixed": flipout.Gaussian(0.3),
    "relative": flipout.Gaussian(0.3, relative=True),
    "learnable": flipout.Gaussian(0.3, learnable=True),
}
PAIRS = [(estimator, noise) for estimator in LISTED for noise in NOISES if (estimator, noise) != ("low_rank", "relative")]
every_pair = pytest.mark.parametrize(("estimator", "noise"), PAIRS)


class Net(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(5, 7), nn.Linear(7, 5), nn.Parameter(torch.randn(5))
        self.last = nn.Linear(5, 7)
        if tied:
            self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()) * self.gain)


def build(tied: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(tied).double()


def own() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def x() -> Tensor:
    return torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


PLACES = {"first": "cpu", "second": "disk", "gain": "cpu", "last": "cpu"}
WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda module, _: accelerate.cpu_offload(module, execution_device=CPU),
    "disk_offload": lambda module, folder: accelerate.disk_offload(module, str(folder), execution_device=CPU),
    "dispatch": lambda module, folder: accelerate.dispatch_model(
        module, PLACES, main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
    "dispatch_here": lambda module, _: accelerate.dispatch_model(module, {"": "cpu"}, main_device="cpu", force_hooks=True),
}
every_way = pytest.mark.parametrize("way", WAYS)
before_or_after = pytest.mark.parametrize("when", ["before", "after"])


@torch.no_grad()
@before_or_after
@every_way
@every_pair
@pytest.mark.parametrize("tied", [False, True])
def test_a_wrapper(tied: bool, estimator: str, noise: str, way: str, when: str, tmp_path: Path) -> None:
    """In training and under hold; a tied weight is one draw, though its places are apart while it is offloaded."""
    if tied and (way, when) == ("disk_offload", "before"):
        pytest.skip("two files do not tell that their weights are tied")
    module, whole = build(tied), build(tied)
    if when == "before":
        WAYS[way](module, tmp_path)
    net, ref = (flipout.Perturbed(m, NOISES[noise], LISTED[estimator], generator=own()) for m in (module, whole))
    if when == "after":
        WAYS[way](module, tmp_path)
    assert list(net.noises) == list(ref.noises)
    for _ in range(2):
        assert distance(net(x()), ref(x())) <= EXACT
    net.eval(), ref.eval()
    assert distance(net(x()), ref(x())) <= EXACT
    with net.hold(N) as draw, ref.hold(N) as other:
        y = net(x())
        assert distance(y, ref(x())) <= EXACT
        assert torch.equal(net(x()), y)
        try:
            listed, plain = draw.weights(1), draw.module(1)
        except flipout.DrawError as error:
            assert "offloaded" in str(error)  # noqa: PT017
            assert way != "dispatch_here"
        else:
            assert all(torch.equal(weight, other.weights(1)[name]) for name, weight in listed.items())
            assert distance(plain(x()), other.module(1)(x())) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("when", ["fresh", "called"])
@every_way
@pytest.mark.parametrize("estimator", LISTED)
def test_perturbed(estimator: str, way: str, when: str, tmp_path: Path) -> None:
    module, whole = build(), build()
    with flipout.perturbed(whole, NOISES["fixed"], LISTED[estimator], generator=own()):
        expected = [whole(x()), whole(x())]
    WAYS[way](module, tmp_path)
    if when == "called":
        module(x())
    with flipout.perturbed(module, NOISES["fixed"], LISTED[estimator], generator=own()):
        assert [distance(module(x()), each) <= EXACT for each in expected] == [True, True]


@every_pair
def test_trains_what_stays_and_what_dispatch_leaves_here(estimator: str, noise: str, tmp_path: Path) -> None:
    module, whole = build(), build()
    WAYS["dispatch_here"](module, tmp_path)
    net, ref = (flipout.Perturbed(m, NOISES[noise], LISTED[estimator], generator=own()) for m in (module, whole))
    for each in (net, ref):
        each(x()).square().mean().backward()
    for a, b in zip(net.parameters(), ref.parameters(), strict=True):
        assert distance(a.grad, b.grad) <= EXACT  # type: ignore[arg-type]


# --- built without values ---------------------------------------------------------------------------------------------


def without_values() -> nn.Module:
    with torch.device("meta"):
        return Net(False).double()


@torch.no_grad()
@pytest.mark.parametrize("way", ["to_empty", "assign"])
@every_pair
def test_a_module_that_gets_its_values_after_it_was_wrapped(estimator: str, noise: str, way: str) -> None:
    whole = build()
    ref = flipout.Perturbed(whole, NOISES[noise], LISTED[estimator], generator=own())
    net = flipout.Perturbed(without_values(), NOISES[noise], LISTED[estimator], generator=own())
    if way == "to_empty":
        net.to_empty(device="cpu")
    net.load_state_dict(copy.deepcopy(ref.state_dict()), assign=way == "assign")
    assert distance(net(x()), ref(x())) <= EXACT
    with net.hold(N) as draw, ref.hold(N) as other:
        assert distance(net(x()), ref(x())) <= EXACT
        assert all(torch.equal(weight, other.weights(1)[name]) for name, weight in draw.weights(1).items())
        assert distance(draw.module(1)(x()), other.module(1)(x())) <= EXACT


@torch.no_grad()
def test_scales_without_values_are_told() -> None:
    """Only the module was given values: the wrapper's scales have none."""
    net = flipout.Perturbed(without_values(), NOISES["learnable"])
    net.module.load_state_dict(build().state_dict(), assign=True)
    with pytest.raises(flipout.DrawError, match=r"scale of .* has no values"):
        net(x())


@torch.no_grad()
@pytest.mark.parametrize("noise", ["fixed", "relative"])
def test_values_that_come_under_a_held_draw(noise: str) -> None:
    whole, module = build(), without_values()
    net, ref = (flipout.Perturbed(m, NOISES[noise], generator=own()) for m in (module, whole))
    with net.hold(N) as draw, ref.hold(N):
        module.load_state_dict(whole.state_dict(), assign=True)
        assert distance(net(x()), ref(x())) <= EXACT
        draw.weights(1)
