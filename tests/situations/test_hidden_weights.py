"""Weights that reach operations by ways of their own, and uses that cannot have noise: exact, or told by name, never silent."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import flipout
from flipout.errors import BatchError, DrawError, MissingRuleError, UnmetWarning
from flipout.weight import PerturbedWeight

N = 4
every_estimator = pytest.mark.parametrize("estimator", LISTED)
VARIED = [name for name in LISTED if name != "shared"]


def x() -> Tensor:
    return torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """W x + b, by a function of the module and its input; ``kept`` is what was made of the weight before any call."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], keep: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.function = forward
        self.__dict__["kept"] = None if keep is None else keep(self)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def wrapped(module: nn.Module, estimator: str, **options: Any) -> flipout.Perturbed:
    return flipout.Perturbed(
        module, flipout.Gaussian(0.3), LISTED[estimator], generator=torch.Generator().manual_seed(2), **options
    )


def linear(draw: flipout.Draw, n: int) -> Tensor:
    weights = draw.weights(n)
    return F.linear(x()[n : n + 1], weights["weight"], weights["bias"])


# --- found wherever they come from ------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "list": (lambda m, x: F.linear(x, m.kept[0], m.kept[1]), lambda m: [m.weight, m.bias]),
    "tuple_in_dict": (lambda m, x: F.linear(x, *m.kept["both"]), lambda m: {"both": (m.weight, m.bias)}),
    "closure": (lambda m, x: m.kept(x), lambda m: (lambda w, b: lambda x: F.linear(x, w, b))(m.weight, m.bias)),
    "default": (lambda m, x: m.kept(x), lambda m: lambda x, w=m.weight, b=m.bias: x @ w.t() + b),
    "named_parameters": (lambda m, x: F.linear(x, **m.kept), lambda m: dict(m.named_parameters())),
    "functional_call": (
        lambda m, x: torch.func.functional_call(m.kept[0], {"weight": m.weight, "bias": m.bias}, (x,)),
        lambda m: [nn.Linear(5, 3).double()],
    ),
}


@every_estimator
@pytest.mark.parametrize("way", FOUND)
def test_found_wherever_they_come_from(way: str, estimator: str) -> None:
    net = wrapped(Layer(*FOUND[way]), estimator, unmet="raise")
    with net.hold(N) as draw:
        y = net(x())
        for n in range(N):
            assert distance(y[n : n + 1], linear(draw, n)) <= EXACT
    y.sum().backward()
    assert net.module.weight.grad is not None


# --- made before the call ---------------------------------------------------------------------------------------------


def _no_grad(function: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return function()


BEFORE: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda m: m.weight.t(),
    "view": lambda m: m.weight.view(3, 5).t(),
    "transpose_without_grad": lambda m: _no_grad(m.weight.t),
    "slice_of_detached": lambda m: m.weight.detach()[:, :].t(),
    "detached": lambda m: m.weight.detach().t(),
    "data": lambda m: m.weight.data.t(),
    "numpy": lambda m: torch.from_numpy(m.weight.detach().numpy()).t(),
    "dlpack": lambda m: torch.from_dlpack(m.weight.detach()).t(),
    "storage": lambda m: torch.tensor([], dtype=torch.float64).set_(m.weight.untyped_storage()).view(3, 5).t(),
    "another_parameter": lambda m: nn.Parameter(m.weight),
}


@every_estimator
@pytest.mark.parametrize("way", BEFORE)
def test_a_copy_that_was_made_before_the_call_is_refused_by_name(way: str, estimator: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.weight) + x @ (m.kept if m.kept.shape[0] == 5 else m.kept.t()) + m.bias

    net = wrapped(Layer(forward, BEFORE[way]), estimator)
    with pytest.raises(DrawError, match="view or a copy of the perturbed parameter 'weight'"):
        net(x())


# --- where no noise can follow ----------------------------------------------------------------------------------------


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.saved_tensors[0], None


@torch.library.custom_op("flipout_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


NOWHERE: dict[str, Callable[[Any, Tensor], Any]] = {
    "custom_function": lambda m, x: Hidden.apply(x, m.weight) + m.bias,
    "in_place": lambda m, x: F.linear(x, m.weight.clamp_(-1, 1), m.bias),
    "data_in_place": lambda m, x: (m.weight.data.clamp_(-1, 1), F.linear(x, m.weight, m.bias))[1],
    "data_item": lambda m, x: (m.weight.data.__setitem__(0, 0.0), F.linear(x, m.weight, m.bias))[1],
    "data_set": lambda m, x: (setattr(m.weight, "data", m.weight.data * 0.5), F.linear(x, m.weight, m.bias))[1],
    "detached_in_place": lambda m, x: (m.weight.detach().mul_(0.5), F.linear(x, m.weight, m.bias))[1],
    "initialised": lambda m, x: (nn.init.normal_(m.weight), F.linear(x, m.weight, m.bias))[1],
    "copied_into": lambda m, x: (m.weight.detach().copy_(torch.ones(3, 5)), F.linear(x, m.weight, m.bias))[1],
    "vmap_over_it": lambda m, x: torch.vmap(lambda w: x @ w)(m.weight).t() + m.bias,
    "grad_of_it": lambda m, x: x @ torch.func.grad(lambda w: (w**2).sum())(m.weight).t() + m.bias,
    "vjp_of_it": lambda m, x: torch.func.vjp(lambda w: x @ w.t(), m.weight)[0] + m.bias,
}
NOWHERE_VARIED: dict[str, Callable[[Any, Tensor], Any]] = {  # under Shared the weight is a tensor as any other, and these are exact
    "custom_op": lambda m, x: torch.ops.flipout_tests.product(x, m.weight) + m.bias,
    "numpy": lambda m, x: torch.from_numpy(x.numpy() @ m.weight.detach().numpy().T) + m.bias,
    "list": lambda m, x: x @ torch.tensor(m.weight.tolist(), dtype=x.dtype).t() + m.bias,
    "tensor": lambda m, x: x @ torch.tensor(m.weight.detach()).t() + m.bias,
}


@every_estimator
@pytest.mark.parametrize("way", [*NOWHERE, *NOWHERE_VARIED])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_where_no_noise_can_follow_the_weight_is_named(way: str, estimator: str) -> None:
    module = Layer((NOWHERE | NOWHERE_VARIED)[way])
    before = module.weight.detach().clone()
    net = wrapped(module, estimator)
    if way in NOWHERE_VARIED and (estimator == "shared" or (estimator, way) == ("independent", "tensor")):
        with net.hold(N) as draw:
            assert distance(net(x())[:1], linear(draw, 0)) <= EXACT
        return
    with pytest.raises((MissingRuleError, DrawError, BatchError), match="'weight'"):
        net(x())
    assert torch.equal(module.weight, before)
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())


@every_estimator
def test_what_runs_below_python_is_told(estimator: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(_scripted)
    net = wrapped(Layer(lambda m, x: script(x, m.weight) + m.bias), estimator)
    with pytest.warns(UnmetWarning, match="'weight' of Layer met no operation"):
        net(x())
    net(x())  # told once
    net = wrapped(Layer(lambda m, x: script(x, m.weight) + script(x, m.weight)), estimator)
    with pytest.raises(DrawError, match=r"none of the perturbed parameters of Layer \('weight', 'bias'\)"):
        net(x())
    net = wrapped(Layer(lambda m, x: x[:, :3] * float(m.weight.data_ptr() > 0) + m.bias), estimator)
    with pytest.warns(UnmetWarning, match="'weight'"):
        net(x())


def _scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


@dataclass
class Output:
    y: Tensor
    weight: Tensor


torch.utils._pytree.register_dataclass(Output) if hasattr(torch.utils._pytree, "register_dataclass") else None

RETURNED: dict[str, Callable[[Any, Tensor], Any]] = {
    "alone": lambda m, x: m.weight,
    "tuple": lambda m, x: (F.linear(x, m.weight, m.bias), m.weight),
    "dict_of_lists": lambda m, x: {"y": F.linear(x, m.weight, m.bias), "w": [m.weight]},
    "dataclass": lambda m, x: Output(F.linear(x, m.weight, m.bias), m.weight),
}
VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "view": lambda m, x: (F.linear(x, m.weight, m.bias), m.weight.t()),
    "cast": lambda m, x: [F.linear(x, m.weight, m.bias), m.weight.float()],
    "pieces": lambda m, x: {"y": F.linear(x, m.weight, m.bias), "w": m.weight.split(1)},
    "dataclass_of_view": lambda m, x: Output(F.linear(x, m.weight, m.bias), m.weight.t()),
}


@every_estimator
@pytest.mark.parametrize("way", [*RETURNED, *VIEWS])
def test_a_weight_that_is_returned_has_no_rows(way: str, estimator: str) -> None:
    if estimator == "shared" and way in VIEWS:
        pytest.skip("one weight for all: what is made of it is a tensor as any other")
    net = wrapped(Layer((RETURNED | VIEWS)[way]), estimator, unmet="ignore")
    with pytest.raises(BatchError, match="returned the perturbed weight 'weight'"):
        net(x())


# --- what is unmet ----------------------------------------------------------------------------------------------------

MET: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "all": lambda m, x: F.linear(x, m.weight, m.bias),
    "some": lambda m, x: x[:, :3] + m.bias,
    "none": lambda m, x: x[:, :3] * 2,
}


@every_estimator
@pytest.mark.parametrize("place", ["call", "hold", "perturbed"])
@pytest.mark.parametrize("unmet", ["ignore", "warn", "raise"])
@pytest.mark.parametrize("met", MET)
def test_unmet(met: str, unmet: str, place: str, estimator: str) -> None:
    module = Layer(MET[met])

    def run() -> None:
        if place == "perturbed":
            with flipout.perturbed(module, flipout.Gaussian(0.1), LISTED[estimator], unmet=unmet):
                module(x())
        elif place == "hold":
            with net.hold(N):
                net(x())
        else:
            net(x())

    net = wrapped(module, estimator, unmet=unmet)
    if met == "all" or unmet == "ignore":
        run()
    elif met == "none":
        with pytest.raises(DrawError, match=r"none of the perturbed parameters of Layer \('weight', 'bias'\)"):
            run()
    elif unmet == "raise":
        with pytest.raises(DrawError, match="'weight' of Layer met no operation"):
            run()
    else:
        with pytest.warns(UnmetWarning, match="'weight' of Layer met no operation") as caught:  # noqa: PT031
            run()
            if place != "perturbed":
                run()
        assert len([each for each in caught if each.category is UnmetWarning]) == 1


def test_a_context_in_which_nothing_happens() -> None:
    """perturbed() asks for a use; members of a population may be evaluated elsewhere, but a call that hides its weights is told."""
    module = Layer(MET["all"])
    with (
        pytest.raises(DrawError, match="none of the perturbed parameters"),
        flipout.perturbed(module, flipout.Gaussian(0.1), members=N),
    ):
        pass
    with flipout.perturbed(module, flipout.Gaussian(0.1), members=N) as draw:
        draw.weights(0)
    with flipout.perturbed(module, flipout.Gaussian(0.1), members=N, unmet="ignore"):
        pass
    es = flipout.evolution.EvolutionStrategy(module, population=8)
    with es.ask():
        pass
    es.tell(torch.arange(8.0))
    hidden = flipout.evolution.EvolutionStrategy(Layer(MET["none"]), population=8)
    with pytest.raises(DrawError, match="none of the perturbed parameters"):
        hidden.step(lambda module, members: module(members.repeat(x()[:1])).sum(1))


# --- a module that is perturbed in place ------------------------------------------------------------------------------


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.weight = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 5))

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x).tanh(), self.weight)

    def raw(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


@every_estimator
def test_a_method_other_than_forward(estimator: str) -> None:
    module = Coder().double()
    with torch.no_grad(), flipout.perturbed(module, flipout.Gaussian(0.3), LISTED[estimator], members=N) as draw:
        encoded, raw = module.encode(x()), module.raw(x())
        for n in range(N):
            own = draw.module(n)
            assert distance(own.encode(x()[n : n + 1]), encoded[n : n + 1]) <= EXACT
            assert distance(own.raw(x()[n : n + 1]), raw[n : n + 1]) <= EXACT


@every_estimator
def test_a_method_that_runs_before_any_call_has_no_members(estimator: str) -> None:
    module = Coder().double()
    context = flipout.perturbed(module, flipout.Gaussian(0.3), LISTED[estimator])
    with pytest.raises(DrawError, match=r"met the perturbed parameter 'weight' before any call.*members=N"), context:
        module.raw(x())


class Plain(torch.optim.Optimizer):
    """Somebody's own optimiser."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = self.state[p].get("sum", 0) + p * p
                p.sub_(group["lr"] * (p.grad + 0.01 * p))


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, weight_decay=0.1),
    "own": lambda p: Plain(p, lr=0.1),
}


def _trained(module: nn.Module, make: Callable[[Any], torch.optim.Optimizer], gradients: list[Tensor], scaled: bool) -> Any:
    """Two steps with given gradients, and everything around them: clipping, averages, checkpoints."""
    optimiser = make(module.parameters())
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    mean = {name: p.detach().clone() for name, p in module.named_parameters()}
    norms, saved = [], io.BytesIO()
    for _ in range(2):
        for p, gradient in zip(module.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            scaler.scale(torch.zeros((), requires_grad=True))
            scaler.unscale_(optimiser)
            scaler.step(optimiser)
            scaler.update()
        else:
            optimiser.step()
        optimiser.zero_grad()
        average.update_parameters(module)
        with torch.no_grad():
            for name, p in module.named_parameters():
                mean[name].mul_(0.9).add_(p.detach(), alpha=0.1)
                mean[name].lerp_(p.data, 0.1)
    torch.save({"model": module.state_dict(), "optimiser": optimiser.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved)
    copied = copy.deepcopy(module)
    return {
        "state": module.state_dict(),
        "loaded": loaded,
        "copied": copied.state_dict(),
        "average": average.state_dict(),
        "mean": mean,
        "norms": norms,
        "optimiser": optimiser.state_dict(),
        "vector": nn.utils.parameters_to_vector(copied.parameters()).detach(),
    }


@every_estimator
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_upkeep_in_the_context_has_the_means(optimiser: str, scaled: bool, estimator: str) -> None:
    module, plain = Coder().double(), Coder().double()
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=p.dtype) for p in module.parameters()]
    with flipout.perturbed(module, flipout.Gaussian(0.3), LISTED[estimator], members=N):
        module(x()).sum().backward()
        ours = _trained(module, OPTIMISERS[optimiser], gradients, scaled)
    theirs = _trained(plain, OPTIMISERS[optimiser], gradients, scaled)
    a, b = (torch.utils._pytree.tree_leaves(each) for each in (ours, theirs))
    assert not any(isinstance(leaf, PerturbedWeight) for leaf in a)
    for ours_leaf, theirs_leaf in zip(a, b, strict=True):
        assert torch.equal(ours_leaf, theirs_leaf) if isinstance(ours_leaf, Tensor) else ours_leaf == theirs_leaf
    assert all(type(p) is nn.Parameter for p in module.parameters())


@every_estimator
@pytest.mark.parametrize("copy_of", ["clone", "to", "double"])
def test_a_copy_that_is_made_outside_of_calls_is_no_weight(copy_of: str, estimator: str) -> None:
    module = Coder().float() if copy_of != "clone" else Coder().double()
    make = {"clone": lambda w: w.clone(), "to": lambda w: w.to(torch.float64), "double": lambda w: w.double()}[copy_of]
    with flipout.perturbed(module, flipout.Gaussian(0.3), LISTED[estimator], members=N, unmet="ignore"):
        taken = make(module.weight)
        with pytest.raises(DrawError, match="copy of the perturbed parameter 'weight'"):
            x() @ taken.t()


@every_estimator
def test_a_copy_of_the_module_in_the_context_is_plain(estimator: str) -> None:
    module = Coder().double()
    expected = module(x()).detach()
    with torch.no_grad(), flipout.perturbed(module, flipout.Gaussian(0.3), LISTED[estimator], members=N):
        module(x())
        assert torch.equal(copy.deepcopy(module)(x()), expected)


# --- recurrent layers, wrappers in wrappers ---------------------------------------------------------------------------


@every_estimator
def test_flatten_parameters_in_forward(estimator: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(5, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            self.rnn.flatten_parameters()
            return self.rnn(x)[0]

    net = wrapped(Recurrent().double(), estimator, unmet="raise")
    sequences = torch.randn(N, 4, 5, dtype=torch.float64)
    with net.hold(N) as draw:
        y = net(sequences)
        for n in range(N):
            assert distance(draw.module(n)(sequences[n : n + 1]), y[n : n + 1].detach()) <= EXACT


@every_estimator
def test_a_wrapper_inside_keeps_its_scales_to_itself(estimator: str) -> None:
    inner = flipout.Perturbed(nn.Linear(5, 4).double(), flipout.Gaussian(0.1, learnable=True), LISTED[estimator])
    model = nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 2).double())
    for outer in (
        flipout.Perturbed(model, flipout.Gaussian(0.1), LISTED[estimator], exclude="0.*"),
        flipout.Perturbed(model, flipout.Gaussian(0.1), LISTED[estimator], include=["2.*"], unmet="raise"),
    ):
        assert list(outer.noises) == ["2.weight", "2.bias"]
        outer(x()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(
        flipout.ArgumentError, match=r"'0\.module\.weight' and 1 more are perturbed by the Perturbed at '0'.*exclude"
    ):
        flipout.Perturbed(model, flipout.Gaussian(0.1), LISTED[estimator])
    with pytest.raises(flipout.ArgumentError, match="matches no parameter"):
        flipout.Perturbed(model, flipout.Gaussian(0.1), LISTED[estimator], include="0.log_std.*")
    with pytest.raises(flipout.ArgumentError, match="Perturbed at ''"):
        flipout.Perturbed(inner, flipout.Gaussian(0.1))
    late = nn.Sequential(nn.Linear(5, 4).double())
    outer = flipout.Perturbed(late, flipout.Gaussian(0.1))
    late[0] = inner
    with pytest.raises(flipout.ArgumentError, match="perturbed by the Perturbed at '0'"):
        outer(x())
