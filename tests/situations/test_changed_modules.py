"""Modules that change after they were wrapped, or while a draw is held: as the module stands, or told by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import flipout
from flipout.weight import PerturbedWeight

N = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
every_estimator = pytest.mark.parametrize("estimator", LISTED)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def x() -> Tensor:
    return torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class LowRankUpdate(nn.Module):
    """LoRA, as a parametrisation whose own parameters are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 7).double()), nn.Parameter(torch.randn(7, 2).double())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def tie(net: nn.Sequential) -> None:
    net.append(nn.Linear(3, 7).double())
    net.append(nn.Linear(7, 7).double())
    net[6].weight = net[2].weight


def cut(net: nn.Sequential) -> None:
    tie(net)
    net[6].weight = nn.Parameter(net[2].weight.detach() * 2)


def removed(net: nn.Sequential) -> None:
    prune.remove(prune.l1_unstructured(net[2], "weight", 0.5), "weight")


def pruned_twice(net: nn.Sequential) -> None:
    prune.random_unstructured(prune.l1_unstructured(net[2], "weight", 0.3), "weight", 0.3)


#: What is done to the module, and the names that are lost.
CHANGES: dict[str, tuple[Callable[[nn.Sequential], Any], set[str]]] = {
    "same_head": (lambda net: net.__setitem__(4, nn.Linear(7, 3).double()), set()),
    "other_shape": (lambda net: net.__setitem__(4, nn.Linear(7, 2).double()), set()),
    "other_names": (lambda net: net.__setitem__(4, nn.Sequential(nn.Linear(7, 2).double())), {"4.weight", "4.bias"}),
    "shorter": (lambda net: net.__delitem__(4), {"4.weight", "4.bias"}),
    "tied": (tie, set()),
    "cut": (cut, set()),
    "lora": (lambda net: parametrize.register_parametrization(net[2], "weight", LowRankUpdate()), {"2.weight"}),
    "weight_norm": (lambda net: weight_norm(net[2]), {"2.weight"}),
    "weight_norm_parametrization": (lambda net: parametrizations.weight_norm(net[2]), {"2.weight"}),
    "spectral_norm": (lambda net: spectral_norm(net[2]), {"2.weight"}),
    "spectral_norm_parametrization": (lambda net: parametrizations.spectral_norm(net[2]), {"2.weight"}),
    "pruned": (lambda net: prune.l1_unstructured(net[2], "weight", 0.5), {"2.weight"}),
    "pruned_twice": (pruned_twice, {"2.weight"}),
    "pruned_for_good": (removed, set()),
}
EXCLUDED = ("*.up", "*.down")


def wrapped(module: nn.Module, estimator: str, **options: Any) -> flipout.Perturbed:
    noise = {name: flipout.Gaussian(0.3) for name in ("*.weight*", "*.bias", "*")}
    return flipout.Perturbed(module, noise["*"], LISTED[estimator], generator=torch.Generator().manual_seed(2), **options)


def carriers(module: nn.Module) -> list[str]:
    def inside(value: Any) -> bool:
        if isinstance(value, dict):
            return any(inside(each) for each in value.values())
        return isinstance(value, PerturbedWeight) or (isinstance(value, (list, tuple)) and any(inside(each) for each in value))

    return [f"{path}.{name}" for path, part in module.named_modules() for name, value in part.__dict__.items() if inside(value)]


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called_before"])
@every_estimator
@pytest.mark.parametrize("change", CHANGES)
def test_a_row_is_the_module_as_it_stands(change: str, estimator: str, called: bool) -> None:
    module = build()
    net = wrapped(module, estimator, unmet="ignore")
    if called:
        net(x())
    CHANGES[change][0](module)
    if change == "lora":  # its own product of two weights has no factored form
        net = wrapped(module, estimator, unmet="ignore", exclude=EXCLUDED)
    assert set(net.noises) == {name for name, _ in module.named_parameters() if not name.endswith(("up", "down", ".a", ".b"))}
    net(x())
    net.eval()
    with net.hold(N) as draw, torch.no_grad():
        y = net(x())
        for n in range(N):
            own, row = draw.module(n), x()[n : n + 1]
            assert distance(own(row), y[n : n + 1]) <= EXACT
            assert distance(functional_call(module, draw.weights(n), (row,)), y[n : n + 1]) <= EXACT
        net(x())
        if estimator != "shared":
            assert distance(net(x()[:1].expand(N, 5))[:1].expand(N, -1), net(x()[:1].expand(N, 5))) > 1e-3
    _require_clean(module)


def _require_clean(module: nn.Module) -> None:
    assert carriers(module) == []
    plain = {name: value.clone() for name, value in module.state_dict().items()}
    stored = [part.__dict__["weight"] for part in module.modules() if isinstance(part.__dict__.get("weight"), Tensor)]
    stored = [weight.detach().clone() for weight in stored]
    with torch.no_grad():
        expected = module.eval()(x())
    again = [part.__dict__["weight"].detach() for part in module.modules() if isinstance(part.__dict__.get("weight"), Tensor)]
    assert all(distance(a, b) <= EXACT for a, b in zip(stored, again, strict=True))  # the plain value stood there
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x()), expected)
    assert all(torch.equal(value, plain[name]) for name, value in copied.state_dict().items())
    if not any(parametrize.is_parametrized(part) for part in module.modules()):
        assert torch.equal(pickle.loads(pickle.dumps(module))(x()), expected)


@pytest.mark.parametrize("change", [name for name, (_, lost) in CHANGES.items() if lost and name != "lora"])
def test_what_was_lost_is_told_once_by_name(change: str) -> None:
    module = build()
    net = wrapped(module, "flipout")
    make, lost = CHANGES[change]
    make(module)
    with pytest.warns(flipout.errors.UnmetWarning, match=next(iter(lost))):
        net(x())
    net(x())  # warnings are errors
    strict = build()
    net = wrapped(strict, "flipout", unmet="raise")
    make(strict)
    with pytest.raises(flipout.errors.DrawError, match="met no operation"):
        net(x())


@pytest.mark.parametrize("change", ["other_names", "weight_norm", "pruned", "cut"])
def test_a_new_parameter_has_no_learnable_scale(change: str) -> None:
    module = build()
    if change == "cut":
        tie(module)
    net = flipout.Perturbed(module, flipout.Gaussian(0.3, learnable=True))
    if change == "cut":
        module[6].weight = nn.Parameter(module[6].weight.detach().clone())
    else:
        CHANGES[change][0](module)
    with pytest.raises(flipout.ArgumentError, match="after it was wrapped"):
        net(x())
    with pytest.raises(flipout.ArgumentError, match="after it was wrapped"), net.hold(N):
        pass


def test_a_learnable_scale_does_not_fit_a_head_of_another_shape() -> None:
    module = build()
    net = flipout.Perturbed(module, flipout.Gaussian(0.3, learnable=True))
    module[4] = nn.Linear(7, 2).double()
    with pytest.raises(flipout.FlipoutError, match=r"4\.weight"):
        net(x())


@pytest.mark.filterwarnings("ignore")
@every_estimator
def test_quantised_parts_are_told(estimator: str) -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("no engine")
    module = build()
    net = wrapped(module, estimator)
    net(x())
    torch.ao.quantization.quantize_dynamic(module.float(), {nn.Linear}, inplace=True)
    with pytest.raises(flipout.ArgumentError, match="nothing to perturb"):
        net(x().float())


@every_estimator
def test_converted_batch_norms(estimator: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    net = wrapped(module, estimator)
    net.module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module[1], nn.SyncBatchNorm)
    batch = torch.randn(N, 2, 5, dtype=torch.float64)
    net.eval()
    with net.hold(N) as draw, torch.no_grad():
        y = net(batch)
        for n in range(N):
            assert distance(draw.module(n)(batch[n : n + 1]), y[n : n + 1]) <= EXACT


# --- while a draw is held ---------------------------------------------------------------------------------------------

HELD: dict[str, Callable[[nn.Sequential], Any]] = {name: make for name, (make, _) in CHANGES.items() if name != "pruned_for_good"}
KEPT: dict[str, Callable[[nn.Sequential], Any]] = {
    "assigned": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True),
    "loaded": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
    "data": lambda net: net[2].weight.data.mul_(2),
    "frozen": lambda net: net.requires_grad_(False),
    "new_parameter": lambda net: setattr(net[2], "weight", nn.Parameter(net[2].weight.detach() * 3)),
    "pruned_for_good": removed,
}
PLACES = ("hold", "perturbed")


def _held(module: nn.Module, estimator: str, place: str) -> Any:
    if place == "perturbed":
        return module, flipout.perturbed(module, flipout.Gaussian(0.3), LISTED[estimator], members=N, unmet="ignore")
    net = wrapped(module, estimator, unmet="ignore")
    return net, net.hold(N)


@pytest.mark.parametrize("place", PLACES)
@every_estimator
@pytest.mark.parametrize("change", HELD)
def test_a_draw_is_not_carried_over_to_another_module(change: str, estimator: str, place: str) -> None:
    module = build()
    call, context = _held(module, estimator, place)
    with context as draw, torch.no_grad():
        call(x())
        try:
            HELD[change](module)
        except flipout.FlipoutError:  # it computes with weights, which are perturbed here
            assert place == "perturbed"
            return
        for use in (lambda: call(x()), lambda: draw.module(1), lambda: draw.weights(1), lambda: draw.weighted_sum(torch.ones(N))):
            with pytest.raises(flipout.errors.DrawError, match="was made for"):
                use()


@pytest.mark.parametrize("place", PLACES)
@every_estimator
@pytest.mark.parametrize("change", KEPT)
def test_a_draw_follows_values(change: str, estimator: str, place: str) -> None:
    module = build()
    call, context = _held(module, estimator, place)
    with context as draw, torch.no_grad():
        call(x())
        try:
            KEPT[change](module)
        except flipout.FlipoutError:
            assert place == "perturbed"
            return
        y = call(x())
        for n in range(N):
            assert distance(draw.module(n)(x()[n : n + 1]), y[n : n + 1]) <= EXACT


@pytest.mark.parametrize("place", PLACES)
@every_estimator
def test_a_draw_follows_dtypes(estimator: str, place: str) -> None:
    module = build()
    call, context = _held(module, estimator, place)
    with context as draw, torch.no_grad():
        y = call(x())
        module.float()
        narrow = call(x().float())
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draw.module(1)(x()[1:2].float()), narrow[1:2], rtol=1e-4, atol=1e-5)
        module.to(torch.bfloat16)
        assert call(x().bfloat16()).dtype == torch.bfloat16
        module.double()


# --- parameters out of the ordinary -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """No entries, one number, lists and dictionaries of parameters; it keeps its last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.empty, self.number = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.ones(()))
        self.several = nn.ParameterList([nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 5))])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(()))})
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, nn.functional.linear(x, self.empty)], 1) * self.number + self.several[0]
        self.last = nn.functional.linear(x, self.several[1], self.named["a"])
        return self.last * self.named["b"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@every_estimator
@pytest.mark.parametrize("learnable", [False, True])
def test_parameters_out_of_the_ordinary(learnable: bool, estimator: str) -> None:
    torch.manual_seed(0)
    module = Odd().double()
    net = flipout.Perturbed(module, flipout.Gaussian(0.3, learnable=learnable), LISTED[estimator], unmet="raise")
    assert len(net.noises) == 6
    with net.hold(N) as draw:
        y = net(x())
        for n in range(N):
            assert distance(draw.module(n)(x()[n : n + 1]), y[n : n + 1].detach()) <= EXACT
        assert draw.weights(0)["empty"].shape == (0, 5)
        assert draw.weighted_sum(torch.ones(N))["empty"].shape == (0, 5)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert carriers(module) == []


def test_what_takes_no_noise_is_refused_by_name() -> None:
    with pytest.raises(flipout.ArgumentError, match=r"'0\.weight' is not initialised yet"):
        flipout.Perturbed(nn.Sequential(nn.LazyLinear(3)), flipout.Gaussian(0.1))
    module = nn.Linear(3, 2)
    module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))  # type: ignore[assignment]
    with pytest.raises(flipout.ArgumentError, match=r"'phase' has dtype torch\.complex64"):
        flipout.Perturbed(module, flipout.Gaussian(0.1))


class Keeps(nn.Module):
    """Keeps functions of its weight: in an attribute, a list, a dictionary, a tuple, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("cached", None)

    def forward(self, x: Tensor) -> Tensor:
        self.turned = self.weight.t()
        self.pieces = self.weight.split(1)
        self.several, self.named = [self.weight * 2, {"a": (self.weight + 1, 3)}], {"b": [self.weight / 2]}
        self.cached = self.weight * 3
        return x @ self.turned


@pytest.mark.parametrize("estimator", [name for name in LISTED if name != "shared"])
def test_what_a_module_keeps_of_a_weight_is_plain_afterwards(estimator: str) -> None:
    module = Keeps().double()
    net = wrapped(module, estimator)
    with torch.no_grad():
        net(x())
        assert carriers(module) == []
        assert torch.equal(module.several[1]["a"][0], module.weight + 1)
        assert torch.equal(module.state_dict()["cached"], module.weight * 3)
        copy.deepcopy(module)


@pytest.mark.parametrize("estimator", [name for name in LISTED if name != "shared"])
def test_a_weight_that_was_kept_from_another_draw_is_refused(estimator: str) -> None:
    kept: list[Tensor] = []

    class Cache(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not kept:
                kept.append(self.weight.t())
            return x @ kept[0] + self.bias

    net = wrapped(Cache(5, 3).double(), estimator, unmet="ignore")
    with net.hold(N):
        net(x())
        net(x())  # the same draw
    with pytest.raises(flipout.errors.DrawError, match="'weight' as it was perturbed in an earlier call"):
        net(x())
