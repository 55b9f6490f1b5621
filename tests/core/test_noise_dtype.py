"""Products of the noise in bfloat16 and float16: the law is that of a rounded ΔW, and everything else stays what it is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import BY_NAME
from laws import Z_LIMIT, distance, worst, wrap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flipout
from flipout import precision

BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
#: Half the distance of two neighbours, relative to them: the largest error of one rounding.
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
NAMES = ["linear", "linear_3d", "conv2d", "conv_transpose2d", "lstm", "gru", "rnn", "gru_deep", "attention_self", "attention_cross"]

NOISES = {
    "learnable": flipout.Gaussian(0.3, learnable=True),
    "relative": flipout.MultiplicativeGaussian(0.3),
    "fixed": flipout.Rademacher(0.3),
}


@pytest.fixture(autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that multiplies faster in low precision."""
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(precision, "multiplies_faster", lambda kind, dtype: True)


@BOTH
@pytest.mark.parametrize("members", [6, 40])
def test_a_linear_layer_has_the_law_of_the_rounded_perturbation(dtype: torch.dtype, members: int, monkeypatch: Any) -> None:
    """Against W̄ + round(ΔW) ∘ (r sᵀ) at the rounded input: only sums of exact products are rounded once more."""
    monkeypatch.setattr("flipout.estimators._FEW_SIGNS", 0 if members == 40 else 2**20)
    net = flipout.Perturbed(nn.Linear(50, 30), flipout.Gaussian(0.1), flipout.Flipout(noise_dtype=dtype))
    x = torch.randn(members, 50)
    with net.hold(members) as draw, torch.no_grad():
        noise = net(x) - net.module(x)
        own = torch.stack([draw.weights(n)["weight"] for n in range(members)]) - net.module.weight
        bias = torch.stack([draw.weights(n)["bias"] for n in range(members)]) - net.module.bias
    scale = own.abs().max() if dtype == torch.float16 else 1.0  # which float16 has its range around
    low = (own / scale).to(dtype).double() * scale
    size = (low.abs() @ x.abs().double().unsqueeze(-1)).squeeze(-1) + bias.abs()
    rounded = (low @ x.to(dtype).double().unsqueeze(-1)).squeeze(-1) + bias
    assert ((noise - rounded).abs() <= 4 * UNIT[dtype] * size + 1e-5).all()
    exact = (own.double() @ x.double().unsqueeze(-1)).squeeze(-1) + bias
    relative = ((noise - exact).norm() / exact.norm()).item()
    assert 0.05 * UNIT[dtype] < relative < 3 * UNIT[dtype]


@pytest.mark.parametrize("noise", NOISES, ids=list(NOISES))
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_stays_near_full_precision(name: str, noise: str) -> None:
    """Outputs and gradients, under one base and under two, differ from those in float32 by rounding alone, and do differ."""
    case = BY_NAME[name]
    for bases in (1, 2):
        found = []
        for dtype in (None, torch.bfloat16):
            net = wrap(case, NOISES[noise], flipout.Flipout(bases=bases, noise_dtype=dtype), torch.float32)
            x = [v.requires_grad_(v.is_floating_point()) for v in case.draw_inputs(4, torch.float32)]
            with net.hold(4, torch.Generator().manual_seed(1)):
                y = net(*x)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
            wanted = [*net.parameters(), *x]
            found.append([y, *torch.autograd.grad((weights * y).sum(), wanted, materialize_grads=True)])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert (a - b).norm() <= 0.05 * a.norm() + 1e-5
        assert not torch.equal(found[0][0], found[1][0])


@BOTH
def test_the_gradient_is_that_of_the_law_without_a_bias(dtype: torch.dtype) -> None:
    """Over draws, the rounding of a gradient has mean zero, and the variance of the gradient is what it was.

    Of inputs that need no rounding: those of others are rounded once, alike in every draw.
    """
    draws, found = 200, {}
    for asked in (None, dtype):
        torch.manual_seed(6)
        net = flipout.Perturbed(nn.Linear(20, 10), flipout.Gaussian(0.3, relative=True), flipout.Flipout(noise_dtype=asked))
        generator, x = (
            torch.Generator().manual_seed(4),
            torch.randn(8, 20, generator=torch.Generator().manual_seed(5)).to(dtype).float(),
        )
        rows = []
        for _ in range(draws):
            with net.hold(8, generator):
                loss = net(x).square().mean()
            rows.append(torch.autograd.grad(loss, net.module.weight)[0].flatten())
        found[asked] = torch.stack(rows).double()
    change = found[dtype] - found[None]
    assert worst(change.mean(0) / (change.std(0) / draws**0.5)) < Z_LIMIT
    assert 0.1 * UNIT[dtype] < (change.norm() / found[None].norm()).item() < 3 * UNIT[dtype]
    ratio = (found[dtype].var(0).sum() / found[None].var(0).sum()).item()
    assert abs(ratio - 1) < 4 * UNIT[dtype]


def test_float16_keeps_small_perturbations_and_small_gradients() -> None:
    """Numbers below its range are no zeros: operands are brought into it by a power of two."""
    x = torch.randn(16, 40)
    found = []
    for dtype in (None, torch.float16):
        torch.manual_seed(0)
        net = flipout.Perturbed(nn.Linear(40, 30), flipout.Gaussian(1e-9, learnable=True), flipout.Flipout(noise_dtype=dtype))
        with net.hold(16, torch.Generator().manual_seed(1)):
            loss = 1e-12 * net(1e5 * x).sum()
        found.append(torch.autograd.grad(loss, net.noise_parameters())[0])
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


class _Products(TorchDispatchMode):
    """The dtypes of the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"mm", "addmm", "bmm", "baddbmm", "convolution"}:
            self.dtypes.append(args[-1].dtype if func.overloadpacket.__name__ != "convolution" else args[1].dtype)
        return func(*args, **(kwargs or {}))


def test_the_mean_keeps_its_precision() -> None:
    net = flipout.Perturbed(nn.Linear(6, 5), flipout.Gaussian(0.1, learnable=True), flipout.Flipout(noise_dtype=torch.bfloat16))
    x = torch.randn(8, 6, requires_grad=True)
    with _Products() as forward:
        y = net(x)
    with _Products() as backward:
        y.sum().backward()
    assert sorted(map(str, forward.dtypes)) == ["torch.bfloat16", "torch.float32"]
    assert sorted(map(str, backward.dtypes)) == ["torch.bfloat16"] * 2 + ["torch.float32"] * 2


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_autocast_has_the_last_word(name: str) -> None:
    """Where products run in bfloat16 anyway, nothing changes."""
    found = []
    for dtype in (None, torch.bfloat16):
        net = wrap(BY_NAME[name], flipout.Gaussian(0.3), flipout.Flipout(noise_dtype=dtype), torch.float32)
        with net.hold(4, torch.Generator().manual_seed(1)), torch.autocast("cpu", torch.bfloat16):
            found.append(net(*BY_NAME[name].draw_inputs(4, torch.float32)))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["conv2d"])
def test_compiled_whole(name: str) -> None:
    net = wrap(BY_NAME[name], flipout.Gaussian(0.3, learnable=True), flipout.Flipout(noise_dtype=torch.bfloat16), torch.float32)
    x = BY_NAME[name].draw_inputs(4, torch.float32)
    with net.hold(4):
        torch._dynamo.reset()
        y = torch.compile(net, fullgraph=True, backend="eager")(*x)
        assert distance(y, net(*x)) < 0.02
        y.sum().backward()


def test_populations_take_it() -> None:
    """Fitness of members under bfloat16 products is near that under float32, member by member."""
    found = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        es = flipout.evolution.EvolutionStrategy(module, std=0.1, population=32, estimator=flipout.Flipout(noise_dtype=dtype))
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        found.append(es.evaluate(lambda module, members, x=x: members.mean(module(members.expand(x)))))
    assert 0 < distance(*found) < 0.01


def test_other_dtypes_are_refused_by_name() -> None:
    for wrong in (torch.int8, torch.float64, "bfloat16", 16):
        with pytest.raises(flipout.ArgumentError, match="noise_dtype="):
            flipout.Flipout(noise_dtype=wrong)  # type: ignore[arg-type]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a test say how long products take in low precision, in units of those in float32."""
    precision._measured.cache_clear()
    yield lambda ratio: monkeypatch.setattr(precision, "_time_ratio", lambda kind, dtype: ratio)
    precision._measured.cache_clear()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_device_that_gains_nothing_says_so_once(measured: Any, compiled: bool) -> None:
    measured(1.3)
    x = torch.randn(8, 6)
    nets = [
        flipout.Perturbed(nn.Linear(6, 5), flipout.Gaussian(0.1), flipout.Flipout(noise_dtype=dtype)).eval()
        for dtype in (None, torch.bfloat16)
    ]
    nets[1].module.load_state_dict(nets[0].module.state_dict())
    torch._dynamo.reset()
    calls = [torch.compile(net, fullgraph=True, backend="eager") if compiled else net for net in nets]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            outputs = []
            for net, call in zip(nets, calls, strict=True):
                with net.hold(8, torch.Generator().manual_seed(0)):
                    outputs.append(call(x))
            assert torch.equal(*outputs)
    told = [w for w in caught if issubclass(w.category, flipout.errors.PrecisionWarning)]
    assert len(told) == 1
    assert "1.30 times as long" in str(told[0].message)


def test_a_device_that_gains_is_taken_at_its_word(measured: Any) -> None:
    measured(0.5)
    net = flipout.Perturbed(nn.Linear(6, 5), flipout.Gaussian(0.1), flipout.Flipout(noise_dtype=torch.bfloat16))
    with _Products() as products:
        net(torch.randn(8, 6))
    assert torch.bfloat16 in products.dtypes


def test_the_measurement_measures(measured: Any) -> None:
    assert precision._time_ratio("cpu", torch.bfloat16) > 0
