"""Rules from outside, and the loop that stands in where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BY_NAME
from laws import EXACT, LISTED, MEMBERS, distance, oracle
from torch import Tensor, nn
from torch.nn import functional as F

import flipout
from flipout import registry


class Distances(nn.Module):
    """Distances of each example to learned points: an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.head = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(x, self.points))


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


def distances(x: Tensor, weight: flipout.PerturbedWeight, p: float = 2.0, **_: Any) -> Tensor:
    """Row n sees the points of its member."""
    points = weight.dense().repeat_interleave(x.shape[0] // weight.dense().shape[0], 0)
    return torch.cdist(x.unsqueeze(1), points, p).squeeze(1)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("estimator", LISTED)
def test_a_rule_from_outside(estimator: str) -> None:
    net, x = flipout.Perturbed(Distances(), flipout.Gaussian(0.2), LISTED[estimator]), torch.randn(8, 4, dtype=torch.float64)
    if estimator != "shared":
        with pytest.raises(flipout.MissingRuleError, match=r"torch\.functional\.cdist.*@flipout\.rule"):
            net(x)
    assert flipout.rule(torch.cdist, flipout.Estimator)(distances) is distances
    with net.hold(4) as draw:
        assert distance(net(x), oracle(net, draw, [x])) <= EXACT


@pytest.mark.usefixtures("clean_registry")
def test_the_nearest_estimator_and_the_last_registration_win() -> None:
    class Mine(flipout.Flipout):
        pass

    def answer(value: str) -> Any:
        return lambda *_, **__: value

    net = flipout.Perturbed(Distances(), flipout.Gaussian(0.2), Mine(), include="points")
    seen: list[object] = []
    net.module.forward = lambda x: seen.append(torch.cdist(x, net.module.points)) or x
    for operation, estimator, expected in (
        (torch.cdist, flipout.Estimator, "any"),
        (torch.cdist, flipout.Flipout, "flipout"),
        (torch.cdist, flipout.Independent, "flipout"),
        (torch.cdist, Mine, "mine"),
        (torch.cdist, Mine, "mine again"),
    ):
        flipout.rule(operation, estimator)(answer(expected if estimator is not flipout.Independent else "independent"))
        net(torch.randn(2, 4, dtype=torch.float64))
        assert seen[-1] == expected


@pytest.mark.usefixtures("clean_registry")
def test_aliases_register_at_once() -> None:
    @flipout.rule((torch.dist, torch.Tensor.dist), flipout.Flipout, flipout.LowRank)
    def rule(*_: object) -> str:
        return "found"

    assert all(registry.find_rule(f, flipout.Flipout) is rule for f in (torch.dist, torch.Tensor.dist))
    assert registry.find_rule(torch.dist, flipout.LowRank) is rule
    assert registry.find_rule(torch.dist, flipout.Independent) is None


@pytest.mark.parametrize("estimators", [(), (flipout.Flipout(),), ("flipout",)])
def test_a_rule_needs_estimator_classes(estimators: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="at least one estimator class"):
        flipout.rule(torch.dist, *estimators)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("rows", [4, 12])
def test_the_loop_is_the_oracle(estimator: str, rows: int) -> None:
    net = flipout.Perturbed(Distances(), flipout.Gaussian(0.2, learnable=True), LISTED[estimator], fallback="loop")
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    wanted = [*net.parameters(), x]
    with net.hold(4) as draw:
        y, expected = net(x), oracle(net, draw, [x])
        assert distance(y, expected) <= EXACT
        ours, theirs = (torch.autograd.grad(v.square().sum(), wanted) for v in (y, expected))
    assert all(distance(a, b) <= EXACT for a, b in zip(ours, theirs, strict=True))


LOOPED = ["linear", "linear_3d", "linear_batch_second", "conv2d_groups", "embedding", "bilinear", "layer_norm_3d", "add", "mul"]


@pytest.mark.parametrize("name", LOOPED)
def test_the_loop_means_what_the_rules_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every rule taken away, the loop gives what the rules gave."""
    case = BY_NAME[name]
    net = flipout.Perturbed(case.build(), flipout.Gaussian(0.3), exclude=case.exclude, batch_dim=case.batch_dim, fallback="loop")
    x = case.draw_inputs(2 * MEMBERS)
    with net.hold(MEMBERS), torch.no_grad():
        by_rule = net(*x)
        monkeypatch.setattr("flipout.weight.find_rule", lambda *_: None)
        assert distance(net(*x), by_rule) <= EXACT


def test_the_loop_refuses_what_it_cannot_split_or_join() -> None:
    class NoRows(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return x + self.function(self.w, x)

    for function, message in (
        (lambda w, x: torch.outer(w[0], x.new_ones(10)), "none of its other arguments has the batch's rows"),
        (lambda w, x: torch.dist(x, w[0]), "no batch dimension to join"),
    ):
        net = flipout.Perturbed(NoRows(function), flipout.Gaussian(0.1), fallback="loop")
        with pytest.raises(flipout.MissingRuleError, match=message):
            net(torch.randn(5, 4))


def test_the_loop_takes_whole_models() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Parameter(torch.randn(1, 3, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, self.memory.expand(x.shape[0], -1, -1), self.memory.expand(x.shape[0], -1, -1))

    net, x = flipout.Perturbed(Attends(), flipout.Gaussian(0.2), fallback="loop"), torch.randn(6, 2, 4, dtype=torch.float64)
    with net.hold(3) as draw:
        assert distance(net(x), oracle(net, draw, [x])) <= EXACT
