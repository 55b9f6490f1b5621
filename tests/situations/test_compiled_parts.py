"""Modules that are compiled inside, and wrappers that are compiled whole: the members' plain modules, or an error of flipout's."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn

import flipout

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts

N = 4
ESTIMATORS: dict[str, flipout.Estimator] = {
    **LISTED,
    "local": flipout.LocalReparameterization(),
    "per_step": flipout.Flipout(per_step=True),
    "token": flipout.Flipout(granularity="token"),
}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(rows: int = N, seed: int = 3) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Function(nn.Module):
    """Its forward calls a compiled function with its weights."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 2).double()

        @torch.compile(backend=backend)
        def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return nn.functional.linear(x, w, b).tanh()

        self.__dict__["affine"] = affine

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, self.layer.weight, self.layer.bias)  # type: ignore[no-any-return]


def _whole(backend: str) -> nn.Module:
    return torch.compile(build(), backend=backend)  # type: ignore[return-value]


def _fullgraph(backend: str) -> nn.Module:
    return torch.compile(build(), backend=backend, fullgraph=True)  # type: ignore[return-value]


def _compiled_in_place(backend: str) -> nn.Module:
    module = build()
    module.compile(backend=backend)
    return module


def _parts(backend: str) -> nn.Module:
    module = build()
    module[0] = torch.compile(module[0], backend=backend)  # type: ignore[operator]
    module[3].compile(backend=backend)  # type: ignore[operator, union-attr]
    return module


FORMS: dict[str, Callable[[str], nn.Module]] = {
    "whole": _whole,
    "fullgraph": _fullgraph,
    "in_place": _compiled_in_place,
    "parts": _parts,
    "function": Function,
}
ALL = [(form, "eager", name) for form in FORMS for name in ESTIMATORS]
SOME = [("whole", "inductor", "flipout"), ("function", "inductor", "shared"), ("parts", "aot_eager", "low_rank")]


def plain_of(draw: flipout.Draw, n: int, x: Tensor) -> Tensor:
    """Member n's output: dense weights in a module that nobody compiled."""
    weights = {name.replace("_orig_mod.", ""): w for name, w in draw.weights(n).items()}
    if any(name.startswith("layer.") for name in weights):
        return nn.functional.linear(x, weights["layer.weight"], weights["layer.bias"]).tanh()
    return torch.func.functional_call(build(), weights, (x,))


def require_members(y: Tensor, draw: flipout.Draw, x: Tensor) -> None:
    for n in range(N):
        assert distance(y[n : n + 1], plain_of(draw, n, x[n : n + 1])) <= EXACT


@pytest.mark.parametrize(("form", "backend", "estimator"), [*ALL, *SOME])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_wrapper_around_compiled_code(form: str, backend: str, estimator: str, warm: bool) -> None:
    module, x = FORMS[form](backend), data()
    kind = ESTIMATORS[estimator]
    clean = module(x).detach() if warm else None
    net = flipout.Perturbed(module, flipout.Gaussian(0.3, learnable=True), kind, generator=seeded())
    with net.hold(N) as draw:
        y = net(x)
        if kind.has_members:
            require_members(y, draw, x)
            require_members(net(x), draw, x)
            grads = torch.autograd.grad(y.square().sum(), list(net.parameters()), materialize_grads=True)
            own = sum(plain_of(draw, n, x[n : n + 1]).square().sum() for n in range(N))
            expected = torch.autograd.grad(own, list(net.parameters()), materialize_grads=True)  # type: ignore[arg-type]
            assert all(distance(a, b) <= EXACT * max(1.0, b.abs().max().item()) for a, b in zip(grads, expected, strict=True))
    drawn = net.train()(x)
    assert distance(drawn, net(x)) > 1e-6
    net.eval()
    mean = net(x)
    assert torch.equal(mean, net.module(x))
    assert clean is None or torch.equal(mean, clean)
    if kind.has_members:
        with net.hold(N) as draw:
            require_members(net(x), draw, x)


@pytest.mark.parametrize(("form", "backend", "estimator"), [*ALL, *SOME])
def test_in_place_around_compiled_code(form: str, backend: str, estimator: str) -> None:
    module, x = FORMS[form](backend), data()
    kind = ESTIMATORS[estimator]
    clean = module(x).detach()
    for _ in range(2):
        with flipout.perturbed(module, flipout.Gaussian(0.3), kind, generator=seeded()) as draw:
            y = module(x)
            assert distance(y, clean) > 1e-6
            if kind.has_members:
                require_members(y, draw, x)
            y.sum().backward()
        assert torch.equal(module(x), clean)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_module_compiled_in_place_after_it_was_wrapped() -> None:
    module, x = build(), data()
    net = flipout.Perturbed(module, flipout.Gaussian(0.3)).eval()
    module.compile(backend="eager")
    with net.hold(N) as draw:
        require_members(net(x), draw, x)
    assert distance(net(x), build()(x)) <= EXACT
    net.compile(backend="eager")
    with net.hold(N) as draw:
        require_members(net(x), draw, x)
    assert distance(net(x), build()(x)) <= EXACT


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_threads_go_on_with_their_compiled_calls(backend: str) -> None:
    """One thread perturbs, another calls the compiled module: it has the mean, and it is not left to Python."""
    runs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(threading.get_ident())
            return graph(*args)

        return run

    module, x = torch.compile(build(), backend=counting if backend == "eager" else backend, fullgraph=True), data()
    clean = module(x).detach()
    stop = threading.Event()

    def means() -> int:
        count = 0
        while not stop.is_set() or count < 20:
            assert torch.equal(module(x), clean)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(means)
        for seed in range(30):
            with flipout.perturbed(module, flipout.Gaussian(0.3), generator=seeded(seed)) as draw:
                require_members(module(x), draw, x)
        stop.set()
        count = other.result()
    assert torch.equal(module(x), clean)
    if backend == "eager":
        assert len([each for each in runs if each != threading.get_ident()]) == count


@pytest.mark.parametrize("estimator", LISTED)
def test_compiled_whole_it_is_one_graph_and_follows_its_settings(estimator: str) -> None:
    """sampling(), hold() and train() may change between calls."""
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    net = flipout.Perturbed(build(), flipout.Gaussian(0.3), LISTED[estimator]).eval()
    compiled, x = torch.compile(net, fullgraph=True, backend=counting), data()
    mean = build()(x)
    for _ in range(3):
        assert distance(compiled(x), mean) <= EXACT
        with net.sampling():
            y = compiled(x)
            assert distance(y, mean) > 1e-6
            assert distance(compiled(x), y) > 1e-6
        with net.hold(N) as draw:
            y = compiled(x)
            require_members(y, draw, x)
            assert distance(compiled(x), y) <= EXACT
            if estimator != "shared":
                draw.resample([1])
                require_members(compiled(x), draw, x)
        if estimator != "independent":
            with net.using(flipout.Independent()), net.hold(N) as draw:
                require_members(compiled(x), draw, x)
        net.train()
        assert distance(compiled(x), compiled(x)) > 1e-6
        net.eval()
    assert distance(compiled(x), mean) <= EXACT


class Broken(nn.Module):
    """The compiler leaves a part of it to Python."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6).double(), nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.second(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_that_breaks_inside(estimator: str, backend: str) -> None:
    module, x = Broken(), data()
    kind = ESTIMATORS[estimator]
    net = flipout.Perturbed(module, flipout.Gaussian(0.3), kind, generator=seeded()).eval()
    compiled = torch.compile(net, backend=backend)
    mean = module(x).detach()
    for _ in range(2):
        assert distance(compiled(x), mean) <= EXACT
        with net.hold(N) as draw:
            y = compiled(x)
            if kind.has_members:
                for n in range(N):
                    own = torch.func.functional_call(Broken(), draw.weights(n), (x[n : n + 1],))
                    assert distance(y[n : n + 1], own) <= EXACT
            assert distance(y, mean) > 1e-6
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(net(x), mean)


@pytest.mark.parametrize("estimator", ["flipout", "shared"])
def test_a_wrapper_inside_code_that_is_compiled(estimator: str) -> None:
    """A step that calls the wrapper, with what the compiler leaves to Python around it."""
    net, x = flipout.Perturbed(build(), flipout.Gaussian(0.3), LISTED[estimator]), data()

    @torch.compile(backend="eager")
    def step(v: Tensor) -> Tensor:
        y = net(v.sin())
        torch._dynamo.graph_break()
        return y * net(v)  # type: ignore[no-any-return]

    with net.hold(N):
        assert distance(step(x), net(x.sin()) * net(x)) <= EXACT
    assert distance(step(x), step(x)) > 1e-6


@pytest.mark.parametrize("estimator", ["flipout", "shared"])
def test_contexts_entered_inside_code_that_is_compiled(estimator: str) -> None:
    module, x = build(), data()
    kind = LISTED[estimator]
    net = flipout.Perturbed(module, flipout.Gaussian(0.3), kind).eval()
    clean = module(x).detach()

    @torch.compile(backend="eager")
    def held(v: Tensor) -> tuple[Tensor, flipout.Draw]:
        with net.hold(N) as draw:
            return net(v) + 1, draw

    @torch.compile(backend="eager")
    def in_place(v: Tensor, generator: torch.Generator) -> Tensor:
        with flipout.perturbed(module, flipout.Gaussian(0.3), kind, generator=generator):
            return module(v) + 1  # type: ignore[no-any-return]

    @torch.compile(backend="eager")
    def sampled(v: Tensor) -> Tensor:
        with net.sampling():
            return net(v)  # type: ignore[no-any-return]

    with flipout.perturbed(module, flipout.Gaussian(0.3), kind, generator=seeded()):
        other = module(x)
    for _ in range(3):
        y, draw = held(x)
        require_members(y - 1, draw, x)
        assert distance(in_place(x, seeded()) - 1, other) <= EXACT
        assert distance(sampled(x), clean) > 1e-6
        assert torch.equal(net(x), clean)
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_module_exports_as_if_it_were_not_wrapped() -> None:
    net, x = flipout.Perturbed(build(), flipout.Gaussian(0.3)), data()
    net(x).sum().backward()
    with net.hold(N), torch.no_grad():
        net(x)
        program = torch.export.export(net.module, (x,))
        assert distance(program.module()(x), build()(x)) <= EXACT
    assert not any("flipout" in str(node.target) for node in program.graph.nodes)
    pytest.importorskip("onnxscript", reason="the ONNX exporter needs it")
    with net.sampling():
        exported = torch.onnx.export(net.module, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO(exported.model_proto.SerializeToString())
    assert b"flipout" not in buffer.getvalue()
