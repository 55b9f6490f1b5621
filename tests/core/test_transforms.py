"""torch.compile, torch.func, checkpointing, autocast and empty graphs: the same law under every way of running."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from cases import BY_NAME
from laws import EXACT, LISTED, MEMBERS, Z_LIMIT, distance, oracle, worst, wrap, z_difference
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import flipout


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)).double()


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled code is bound to the module objects of one test; one process compiles, for the machine is small."""
    if "compile" not in request.node.originalname:
        yield
        return
    threads = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    if threads is None:
        del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    else:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = threads


#: inductor takes half a minute to compile a module, so that one of them goes all the way to machine code.
COMPILED = {
    "mlp-inductor": (small_mlp, (5,), "inductor"),
    "mlp": (small_mlp, (5,), "aot_eager"),
    "cnn": (small_cnn, (2, 3, 3), "aot_eager"),
}


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole_it_has_the_same_law(name: str) -> None:
    """One graph, forward and backward: equal under a held draw, of one law without; and for another batch size."""
    build, shape, backend = COMPILED[name]
    net = flipout.Perturbed(build(), flipout.Gaussian(0.3, learnable=True))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    x = torch.randn(6, *shape, dtype=torch.float64)
    wanted = list(net.parameters())

    def sample(run: nn.Module) -> Tensor:
        drawn = []
        for _ in range(150):
            y = run(x)
            grads = torch.autograd.grad(torch.tanh(y).square().mean(), wanted)
            drawn.append(torch.cat([y.detach().flatten(), *(g.flatten() for g in grads)]))
        return torch.stack(drawn)

    ours, plain = sample(compiled), sample(net)
    assert worst(z_difference(ours, plain)) < Z_LIMIT
    assert worst(z_difference((ours - plain.mean(0)).square(), (plain - plain.mean(0)).square())) < Z_LIMIT
    rows = ours[:, :12].unflatten(1, (6, 2))[..., 0] - plain[:, :12].mean(0).view(6, 2)[:, 0]
    assert worst((rows[:, 0] * rows[:, 1]).mean() / (rows[:, 0] * rows[:, 1]).std() * 150**0.5) < Z_LIMIT
    if backend == "inductor":
        return
    with net.hold(6):
        pairs = [torch.autograd.grad(run(x).square().sum(), wanted) for run in (compiled, net)]
        assert distance(compiled(x), net(x)) <= EXACT
        assert all(distance(a, b) <= EXACT for a, b in zip(*pairs, strict=True))
    more = torch.randn(9, *shape, dtype=torch.float64)
    assert compiled(more).shape == (9, 2)
    net.eval()
    assert distance(compiled(x), net.module(x)) <= EXACT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ["shared", "independent", "low_rank"])
def test_other_estimators_compile_whole(estimator: str) -> None:
    net = flipout.Perturbed(small_mlp(), flipout.Gaussian(0.3), LISTED[estimator])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 5, dtype=torch.float64)
    compiled(x).sum().backward()
    with net.hold(6):
        assert distance(compiled(x), net(x)) <= EXACT


# --- torch.func -------------------------------------------------------------------------------------------------------

FUNCTIONAL = ["mlp", "cnn", "linear_no_bias", "linear_3d", "embedding", "tied", "layer_norm_3d", "stack_right", "cat_rows"]


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_gradients_are_the_ordinary_ones(name: str, estimator: str) -> None:
    case = BY_NAME[name]
    net = wrap(case, flipout.Gaussian(0.3, relative=True, learnable=True), LISTED[estimator])
    x = case.draw_inputs(2 * MEMBERS)
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, x).square().sum()

    with net.hold(MEMBERS):
        ours = torch.func.grad(loss)({k: v.detach() for k, v in parameters.items()})
        expected = dict(zip(parameters, torch.autograd.grad(net(*x).square().sum(), list(parameters.values())), strict=True))
    for key, gradient in expected.items():
        assert distance(ours[key], gradient) <= EXACT * max(1.0, gradient.abs().max().item())
    assert all(type(p) is nn.Parameter for p in net.parameters())


def test_functional_hessian_vector_products() -> None:
    case = BY_NAME["mlp"]
    net = wrap(case, flipout.Gaussian(0.3), flipout.Flipout())
    x = case.draw_inputs(MEMBERS)
    values = {k: v.detach() for k, v in net.named_parameters()}
    direction = {k: torch.randn_like(v) for k, v in values.items()}

    def product(v: dict[str, Tensor]) -> Tensor:
        gradient = torch.func.grad(lambda p: functional_call(net, p, x).square().sum())(v)
        return sum((gradient[k] * direction[k]).sum() for k in v)  # type: ignore[return-value]

    with net.hold(MEMBERS) as draw:
        ours = torch.func.grad(product)(values)
        wanted = list(net.parameters())
        first = torch.autograd.grad(oracle(net, draw, x).square().sum(), wanted, create_graph=True)
        expected = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, direction.values(), strict=True)), wanted)
    assert all(distance(a, b) <= 1e-9 for a, b in zip(ours.values(), expected, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward mode
def test_forward_mode_and_jacobians() -> None:
    net = flipout.Perturbed(nn.Linear(3, 2).double(), flipout.Gaussian(0.3))
    x = torch.randn(4, 3, dtype=torch.float64)
    with net.hold(4) as draw:
        jacobian = torch.func.jacrev(lambda v: net(v))(x)
        for n in range(4):
            assert distance(jacobian[n, :, n], draw.weights(n)["weight"]) <= EXACT
        assert distance(torch.func.jacfwd(lambda v: net(v))(x), jacobian) <= EXACT


def test_functional_call_on_the_users_own_subclass() -> None:
    class Mine(flipout.Perturbed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    net = Mine(small_mlp(), flipout.Gaussian(0.3))
    x = torch.randn(4, 5, dtype=torch.float64)
    zeros = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    before = {name: p.clone() for name, p in net.named_parameters()}
    net.eval()
    assert torch.equal(functional_call(net, zeros, (x,)), torch.zeros(4, 2, dtype=torch.float64))
    net.train()
    assert not torch.equal(functional_call(net, zeros, (x,)), torch.zeros(4, 2, dtype=torch.float64))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


# --- checkpointing, autocast, no_grad ---------------------------------------------------------------------------------


def test_checkpointing_the_wrapper_runs_the_same_draw_twice() -> None:
    """Recomputing a forward of the wrapper inside hold() meets the same weights."""
    net = flipout.Perturbed(small_mlp(), flipout.Gaussian(0.3))
    x = torch.randn(4, 5, dtype=torch.float64)
    with net.hold(4):
        direct = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        again = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).square().sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


def test_without_gradients_nothing_is_kept_and_the_value_is_the_same() -> None:
    net = flipout.Perturbed(small_mlp(), flipout.Gaussian(0.3, learnable=True))
    x = torch.randn(4, 5, dtype=torch.float64)
    with net.hold(4):
        y = net(x)
        with torch.no_grad():
            z = net(x)
        with torch.inference_mode():
            w = net(x)
    assert not z.requires_grad
    assert distance(y, z) <= EXACT
    assert distance(y, w.clone()) <= EXACT


@pytest.mark.parametrize("name", ["mlp", "cnn", "linear_3d", "conv2d_groups", "embedding", "layer_norm_3d"])
def test_autocast_computes_the_oracles_values_to_its_precision(name: str) -> None:
    case = BY_NAME[name]
    net = wrap(case, flipout.Gaussian(0.3, learnable=True), flipout.Flipout(), torch.float32)
    x = case.draw_inputs(MEMBERS, torch.float32)
    with net.hold(MEMBERS) as draw:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(*x).float()
        expected = oracle(net, draw, x)
        assert distance(y, expected) <= 0.05 * expected.abs().max().item()
        ours, theirs = (torch.autograd.grad(v.square().mean(), list(net.parameters())) for v in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert distance(a, b) <= 0.1 * max(b.abs().max().item(), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_modules_of_any_precision(dtype: torch.dtype) -> None:
    for name in ("mlp", "cnn", "embedding", "layer_norm_3d", "bag_mean"):
        case = BY_NAME[name]
        net = wrap(case, flipout.Gaussian(0.1), flipout.Flipout(), dtype)
        x = case.draw_inputs(MEMBERS, dtype)
        with net.hold(MEMBERS):
            y = net(*x)
        assert y.dtype == dtype
        y.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in net.parameters())
