"""Checkpointed regions: their gradients are those of the same call without checkpoints, or the forward call says what to pass."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import flipout
from flipout.calls import Call

#: Beside the listed ones, those that draw inside operations: their members have no weights to list.
DRAWING: dict[str, flipout.Estimator] = {
    "local": flipout.LocalReparameterization(),
    "per_step": flipout.Flipout(per_step=True),
    "token": flipout.Flipout(granularity="token"),
}
ESTIMATORS = {**LISTED, **DRAWING}
NOISES: dict[str, flipout.Noise] = {
    "fixed": flipout.Gaussian(0.3),
    "relative": flipout.Gaussian(0.3, relative=True),
    "learnable": flipout.Gaussian(0.3, learnable=True),
    "relative_learnable": flipout.Gaussian(0.3, relative=True, learnable=True),
}
N = 4
Run = Callable[..., Any]


def direct(function: Run, *args: Any) -> Any:
    return function(*args)


def checked(function: Run, *args: Any, **options: Any) -> Any:
    return checkpoint(function, *args, **{"use_reentrant": False, **options})


class Net(nn.Module):
    """Three blocks, each of which may be a region."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(dropout), nn.Tanh())
        self.third = nn.Linear(6, 2)
        self.run: Run = direct

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.run(self.second, self.run(self.first, x)))
        return y


class Nested(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(lambda v: self.run(self.third, self.run(self.second, self.run(self.first, v)) * 2), x)


class Recurrent(Net):
    """A recurrent layer: what per_step draws for."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        sequence = torch.stack([x, x.sin(), x.cos()], 1)
        return super().forward(self.run(lambda v: self.rnn(v)[0][:, -1], sequence))


class Foreign(Net):
    """Regions that meet no weight, or the weights themselves."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(torch.tanh, self.first(x))
        weight = self.second[0].weight * 2  # made outside of the region that uses it
        y = self.run(lambda v: nn.functional.linear(v, weight).tanh(), y)
        return self.run(lambda v: self.third(v).exp(), y)


class Rearranged(Net):
    """Several inputs, rows that stand second or folded, sizes that agree by chance (N rows of N steps)."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x * k for k in range(1, N + 1)])  # [T, N, 5] with T = N

        def region(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            folded = self.second(self.first(a).flatten(0, 1)).unflatten(0, a.shape[:2])  # [T, N] -> T * N
            return folded.transpose(0, 1), self.first(torch.cat([b, b * 2]))

        a, b = self.run(region, steps, x)
        top, bottom = b.chunk(2)
        return self.run(lambda u, v: self.third(u).sum(1) + self.third(v), a, top * bottom)


MODULES: dict[str, Callable[[], Net]] = {
    "blocks": Net,
    "nested": Nested,
    "recurrent": Recurrent,
    "foreign": Foreign,
    "rearranged": Rearranged,
}


def serves(module: str, estimator: str) -> bool:
    """Whether the estimator has the operations of the module at all."""
    if estimator == "local":
        return module in ("blocks", "nested")
    if estimator == "token":
        return module != "recurrent"
    return True


def build(module: str = "blocks", dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    made = MODULES[module]() if module != "blocks" else Net(dropout)
    return made.double()


def wrapped(
    module: Net, estimator: flipout.Estimator | None = None, noise: flipout.Noise | None = None, seed: int | None = 1
) -> flipout.Perturbed:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    noise = noise or flipout.Gaussian(0.3)
    return flipout.Perturbed(module, noise, estimator or flipout.Flipout(), generator=generator, unmet="ignore")


def data(rows: int = N) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def grads(y: Tensor, wanted: list[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad((y * y).sum() + y.sin().sum(), wanted, materialize_grads=True, **options))


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


def require_same(run: Callable[[Run], list[Tensor]]) -> None:
    """What it gives with checkpoints is what it gives without."""
    torch.manual_seed(5)
    expected = run(direct)
    torch.manual_seed(5)
    same(run(checked), expected)


CROSSED = [(module, name) for module in MODULES for name in ESTIMATORS if serves(module, name)]


@pytest.mark.parametrize(("module", "estimator"), CROSSED)
@pytest.mark.parametrize("seed", [1, None], ids=["own", "global"])
def test_training_calls(module: str, estimator: str, seed: int | None) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(module), ESTIMATORS[estimator], seed=seed), data()
        net.module.run = how
        y = net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("noise", NOISES)
def test_every_noise(estimator: str, noise: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), ESTIMATORS[estimator], NOISES[noise]), data()
        net.module.run = how
        y = net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize(("module", "estimator"), CROSSED)
@pytest.mark.parametrize("when", ["inside", "after"])
def test_a_held_draw(module: str, estimator: str, when: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(module), ESTIMATORS[estimator], NOISES["learnable"]).eval(), data()
        net.module.run = how
        wanted = [x, *net.parameters()]
        with net.hold(N):
            y = net(x)
            found = grads(y, wanted) if when == "inside" else []
        return [y, *(found or grads(y, wanted))]

    require_same(run)


@pytest.mark.parametrize(("module", "estimator"), CROSSED)
@pytest.mark.parametrize("when", ["inside", "after"])
def test_perturbed_in_place(module: str, estimator: str, when: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = build(module), data()
        net.run = how
        wanted = [x, *net.parameters()]
        generator = torch.Generator().manual_seed(1)
        with flipout.perturbed(net, NOISES["relative"], ESTIMATORS[estimator], generator=generator, unmet="ignore"):
            y = net(x)
            found = grads(y, wanted) if when == "inside" else []
        return [y, *(found or grads(y, wanted))]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("backward", [True, False], ids=["backward", "grad"])
def test_backward_fills_the_gradients_of_a_module_in_place(estimator: str, backward: bool) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = build(), data()
        net.run = how
        with flipout.perturbed(net, NOISES["fixed"], ESTIMATORS[estimator], generator=torch.Generator().manual_seed(1)):
            for _ in range(2):
                y = net(x)
                y.square().sum().backward() if backward else torch.autograd.backward([y.square().sum()])
        return [p.grad for p in net.parameters() if p.grad is not None]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("order", [1, -1])
def test_several_calls_before_one_backward_have_their_own_draws(estimator: str, order: int) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), ESTIMATORS[estimator], NOISES["learnable"]), data()
        net.module.run = how
        wanted = [x, *net.parameters()]
        ys = [net(x) for _ in range(3)]
        assert distance(ys[0], ys[1]) > 1e-3
        each = [grads(y, wanted) for y in [net(x) for _ in range(2)][::order]]
        return [*grads(sum(ys[1:], ys[0]), wanted), *each[0], *each[1]]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_row(estimator: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), ESTIMATORS[estimator]), data(1)
        net.module.run = how
        ys = [net(x), net(x)]
        return grads(ys[0] * ys[1], [x, *net.parameters()])

    require_same(run)


@pytest.mark.parametrize("estimator", LISTED)
def test_what_changes_between_the_passes_does_not_matter(estimator: str) -> None:
    """The mode of the module, settings, resampling, another hold."""

    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), LISTED[estimator]), data()
        net.module.run = how
        wanted = [x, *net.parameters()]
        with net.hold(N) as draw:
            y = net(x)
            if estimator != "shared":
                draw.resample([0, 2])
            z = net(x)
        net.eval()
        with net.hold(2), net.sampling():
            found = grads(y + z, wanted)
        return [y, z, *found]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_generators_go_on_as_without_checkpoints(estimator: str) -> None:
    def run(how: Run, seed: int | None) -> list[Tensor]:
        torch.manual_seed(5)
        net, x = wrapped(build(), ESTIMATORS[estimator], seed=seed), data()
        net.module.run = how
        found = []
        for _ in range(3):
            y = net(x)
            y.square().sum().backward()
            found.append(y.detach())
        return [*found, torch.rand(3)]

    for seed in (1, None):
        same(run(checked, seed), run(direct, seed))


# --- around the wrapper -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [1, None], ids=["own", "global"])
@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("held", [True, False], ids=["hold", "draws"])
@pytest.mark.parametrize("inner", [True, False], ids=["nested", "whole"])
def test_around_the_wrapper(estimator: str, seed: int | None, preserve: bool, held: bool, inner: bool) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), ESTIMATORS[estimator], NOISES["learnable"], seed), data()
        net.module.run = how if inner else direct
        wanted = [x, *net.parameters()]
        options: Any = {} if how is direct else {"preserve_rng_state": preserve}
        with net.hold(N) if held else contextlib.nullcontext():
            ys = [how(net, x, **options) for _ in range(2)]
        states = [torch.get_rng_state(), None if net.generator is None else net.generator.get_state()]
        found = [*grads(ys[0], wanted), *grads(ys[1], wanted)]
        assert torch.equal(torch.get_rng_state(), states[0])  # type: ignore[arg-type]
        assert net.generator is None or torch.equal(net.generator.get_state(), states[1])  # type: ignore[arg-type]
        return [*ys, *found]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [1, None], ids=["own", "global"])
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_dropout_in_the_region(estimator: str, seed: int | None, around: bool) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(dropout=0.5), ESTIMATORS[estimator], seed=seed), data()
        net.module.run = direct if around else how
        y = how(net, x) if around else net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("seed", [1, None], ids=["own", "global"])
def test_a_region_that_calls_several_nets_several_times(seed: int | None) -> None:
    def run(how: Run) -> list[Tensor]:
        first, second = wrapped(build(), seed=seed), wrapped(build("nested"), flipout.LocalReparameterization(), seed=seed)
        mean = wrapped(build()).eval()
        x = data()

        def region(v: Tensor) -> Tensor:
            return first(v) * second(v) + first(v * 2) * mean(v) + second.module(v)

        y = how(region, x)
        for net in (first, second):
            net.eval()
        mean.train()
        return [y, *grads(y, [x, *first.parameters(), *second.parameters(), *mean.parameters()])]

    require_same(run)


def test_a_region_that_holds_and_resamples() -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build()), data()

        def region(v: Tensor) -> Tensor:
            with net.hold(N) as draw:
                y = net(v)
                draw.resample([1])
                return y * net(v)

        y = how(region, x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [1, None], ids=["own", "global"])
@pytest.mark.parametrize("members", [N, None])
def test_perturbed_inside_a_region(estimator: str, seed: int | None, members: int | None) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = build(dropout=0.5), data()
        net.run = how
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def region(v: Tensor) -> Tensor:
            with flipout.perturbed(net, NOISES["fixed"], ESTIMATORS[estimator], generator=generator, members=members):
                return net(v) * net(v * 2)

        y = how(region, x)
        return [y, *grads(y, [x, *net.parameters()])]

    if estimator == "local":
        return  # a layer called twice
    require_same(run)


def test_two_modules_perturbed_around_one_region() -> None:
    def run(how: Run) -> list[Tensor]:
        torch.manual_seed(0)
        a, b = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
        x, generator = data(), torch.Generator().manual_seed(1)
        with (
            flipout.perturbed(a, NOISES["fixed"], flipout.LowRank(1), generator=generator),
            flipout.perturbed(b, NOISES["relative"], generator=generator),
        ):
            y = how(lambda v: b(a(b(a(v)).tanh())), x)
        return [y, *grads(y, [x, *a.parameters(), *b.parameters()])]

    require_same(run)


def test_functions_of_weights_outside_of_calls() -> None:
    """A region in ``perturbed`` that uses parameters without calling a part."""

    def run(how: Run) -> list[Tensor]:
        torch.manual_seed(0)
        layer, x = nn.Linear(5, 3).double(), data()

        def region(v: Tensor) -> Tensor:
            return nn.functional.linear(v, layer.weight, layer.bias).tanh()

        with flipout.perturbed(layer, NOISES["fixed"], generator=torch.Generator().manual_seed(1), members=N):
            y = how(region, x)
        return [y, *grads(y, [x, *layer.parameters()])]

    require_same(run)


# --- options of torch's ----------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {
    "late_stop": lambda: set_checkpoint_early_stop(False),
    "on_cpu": torch.autograd.graph.save_on_cpu,
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("module", ["blocks", "nested"])
def test_options(estimator: str, option: str, module: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(module), ESTIMATORS[estimator], NOISES["relative_learnable"]), data()
        net.module.run = how
        with OPTIONS[option]():
            y = net(x)
            found = grads(y, [x, *net.parameters()])
        return [y, *found]

    require_same(run)


#: What selective checkpoints keep.
KEPT: dict[str, Any] = {
    "products": [torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.addmm.default, torch.ops.aten.mm.default],
    "all": lambda context, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE,
    "alternately": lambda context, op, *args, **kwargs: CheckpointPolicy(2 * (len(op.name()) % 2)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
@pytest.mark.parametrize("kept", KEPT)
def test_selective_checkpoints(estimator: str, around: bool, kept: str) -> None:
    """What is kept is counted off by operation: weights that are made in between must not be."""

    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), ESTIMATORS[estimator], NOISES["relative"]), data()

        def selective(function: Run, *args: Any) -> Any:
            context = lambda: create_selective_checkpoint_contexts(KEPT[kept])  # noqa: E731
            return checkpoint(function, *args, use_reentrant=False, context_fn=context)

        how = direct if how is direct else selective
        net.module.run = direct if around else how
        y = how(net, x) if around else net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast(estimator: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build().float(), ESTIMATORS[estimator], NOISES["learnable"]), data().float().detach().requires_grad_()
        net.module.run = how
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        return [y.float(), *grads(y.float(), [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("module", ["blocks", "nested"])
def test_a_graph_that_is_retained(estimator: str, module: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(module), ESTIMATORS[estimator], NOISES["learnable"]), data()
        net.module.run = how
        y = net(x)
        wanted = [x, *net.parameters()]
        first = grads(y, wanted, retain_graph=True)
        return [*first, *grads(2 * y, wanted, retain_graph=True), *grads(y[:2], wanted)]

    require_same(run)


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("module", ["blocks", "nested"])
def test_second_derivatives(estimator: str, module: str) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(module), LISTED[estimator], NOISES["relative_learnable"]), data()
        net.module.run = how
        y = net(x)
        wanted = [x, *net.parameters()]
        first = grads(y, wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g * g).sum() for g in first), wanted, materialize_grads=True)]  # type: ignore[arg-type, union-attr]

    require_same(run)


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("stop", [True, False])
def test_a_backward_pass_inside_the_region(estimator: str, stop: bool) -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build(), LISTED[estimator]), data()
        inner = net.module

        def region(v: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(inner.first(v).square().sum(), v)
            return inner.second(inner.first(v)) + slope.sum(1, keepdim=True)

        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, v: Tensor) -> Tensor:
                return inner.third(how(region, v))

        net = wrapped(Around(), LISTED[estimator])  # type: ignore[arg-type]
        with set_checkpoint_early_stop(stop):
            y = net(x)
            return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sequential(estimator: str) -> None:
    def run(how: Run) -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)]).double()

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = layers

            def forward(self, v: Tensor) -> Tensor:
                if how is direct:
                    return self.layers(v)  # type: ignore[no-any-return]
                return checkpoint_sequential(self.layers, 2, v, use_reentrant=False)  # type: ignore[no-any-return]

        net, x = wrapped(Outer(), ESTIMATORS[estimator]), data()  # type: ignore[arg-type]
        y = net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.filterwarnings("ignore")  # torch.distributed's own
def test_the_wrapper_of_torch_distributed(estimator: str, first: bool) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as distributed

    def run(how: Run) -> list[Tensor]:
        module, x = build(), data()

        def wrap_parts() -> None:
            distributed.apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, nn.Sequential))

        if first and how is not direct:
            wrap_parts()
        net = wrapped(module, ESTIMATORS[estimator])
        if not first and how is not direct:
            wrap_parts()
        y = net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_a_graph_keeps_no_activations_and_goes_with_its_last_tensor(estimator: str, around: bool) -> None:
    net, x = wrapped(build(), ESTIMATORS[estimator], NOISES["learnable"]), data()
    net.module.run = direct if around else checked
    alive: list[weakref.ref[Any]] = []
    inner = net.module.second[0]
    inner.register_forward_hook(lambda _, __, y: alive.append(weakref.ref(y)))
    gc.collect()
    gc.disable()
    try:
        y = checked(net, x) if around else net(x)
        frames = [f for f in gc.get_objects() if type(f).__name__ == "_CheckpointFrame"]
        calls = [c for c in gc.get_objects() if issubclass(type(c), Call)]
        assert len(frames) == (1 if around else 2)
        assert not calls
        assert [ref() for ref in alive] == [None]
        kept = [weakref.ref(frame) for frame in frames]
        del frames
        grads(y, [x, *net.parameters()], retain_graph=True)
        assert all(ref() is None for ref in alive)
        del y
        assert all(ref() is None for ref in kept)
        z = checked(net, x) if around else net(x)  # never differentiated
        frames = [f for f in gc.get_objects() if type(f).__name__ == "_CheckpointFrame"]
        kept = [weakref.ref(frame) for frame in frames]
        del z, frames
        assert all(ref() is None for ref in kept)
        assert not [c for c in gc.get_objects() if issubclass(type(c), Call)]
    finally:
        gc.enable()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_exception_in_a_region_leaves_nothing_behind(estimator: str) -> None:
    net, x = wrapped(build(), ESTIMATORS[estimator]), data()
    net.module.run = checked
    handle = net.module.second.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            net(x)
        with pytest.raises(ZeroDivisionError):
            checked(net, x)
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None

    def run(how: Run) -> list[Tensor]:
        again = wrapped(build(), ESTIMATORS[estimator]) if how is direct else net
        again.generator = torch.Generator().manual_seed(1)
        again.module.run = how
        y = again(x)
        return [y, *grads(y, [x, *again.parameters()])]

    require_same(run)


def test_an_exception_in_the_second_run_leaves_nothing_behind() -> None:
    net, x = wrapped(build()), data()
    net.module.run = checked
    y = net(x)
    handle = net.module.second.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    handle.remove()
    assert not torch.overrides._get_current_function_mode_stack()
    net.eval()
    assert torch.equal(net(x), net.module(x))


def test_weights_that_hooks_compute_are_put_back() -> None:
    """weight_norm, of old, keeps what it computed as an attribute."""
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(5, 5))

    def run(how: Run) -> list[Tensor]:
        net, x = (
            flipout.Perturbed(layer.double(), NOISES["fixed"], flipout.Independent(), generator=torch.Generator().manual_seed(1)),
            data(),
        )
        y = how(net, x)
        found = [y, *grads(y, [x, *net.parameters()])]
        assert type(layer.weight) is Tensor
        return found

    require_same(run)


def test_a_region_that_strays_is_told() -> None:
    net, x = wrapped(build()), data()
    turns = []

    def region(v: Tensor) -> Tensor:
        turns.append(1)
        return net(v) if len(turns) == 1 else net(net.module.first(v)[:, :5])

    y = checked(region, x)
    net.train()
    other = wrapped(build())

    def another(v: Tensor) -> Tensor:
        turns.append(1)
        return other(v) if len(turns) == 2 else net(v)

    z = checked(another, x)
    with pytest.raises(flipout.errors.DrawError, match="checkpointed region"):
        z.sum().backward()
    del y


# --- reentrant ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("mode", ["train", "hold", "sampling", "perturbed"])
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_raise_at_the_forward_call(estimator: str, rows: int, mode: str, around: bool, needs: bool) -> None:
    module, x = build(), data(rows).detach().requires_grad_(needs)

    def reentrant(function: Run, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=True)

    module.run = direct if around else reentrant
    if mode == "perturbed":
        context: Any = flipout.perturbed(module, NOISES["fixed"], ESTIMATORS[estimator], unmet="ignore")
        net: nn.Module = module
    else:
        net = wrapped(module, ESTIMATORS[estimator]).train(mode == "train")
        context = {"hold": lambda: net.hold(rows), "sampling": net.sampling, "train": contextlib.nullcontext}[mode]()  # type: ignore[operator]
    with context, pytest.raises(flipout.errors.FlipoutError, match=r"use_reentrant=False.*gradient_checkpointing_kwargs"):
        reentrant(net, x) if around else net(x)
    assert not torch.overrides._get_current_function_mode_stack()


def test_reentrant_regions_without_weights_are_exact() -> None:
    def run(how: Run) -> list[Tensor]:
        net, x = wrapped(build("blocks")), data()
        inner = net.module

        class Around(Net):
            def forward(self, v: Tensor) -> Tensor:
                y = self.first(v)
                y = y.tanh() if how is direct else checkpoint(torch.tanh, y, use_reentrant=True)
                return self.third(y)  # type: ignore[no-any-return]

        around = Around().double()
        around.load_state_dict(inner.state_dict())
        net = wrapped(around)
        y = net(x)
        (y * y).sum().backward()
        return [y, *(p.grad for p in net.parameters() if p.grad is not None)]

    require_same(run)


def test_the_mean_goes_through_reentrant_checkpoints() -> None:
    net, x = wrapped(build()).eval(), data()
    y = checkpoint(net, x, use_reentrant=True)
    assert torch.equal(y, net.module(x))
    y.sum().backward()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_weight_given_as_an_argument_of_a_region(estimator: str) -> None:
    class Handing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.run(nn.functional.linear, self.first(x), self.third.weight, self.third.bias)  # type: ignore[no-any-return]

    def run(how: Run) -> list[Tensor]:
        torch.manual_seed(0)
        net, x = wrapped(Handing().double(), ESTIMATORS[estimator]), data()
        net.module.run = how
        y = net(x)
        return [y, *grads(y, [x, *net.parameters()])]

    require_same(run)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    from zoo import ZOO

    entry = next(entry for entry in ZOO if entry.name == name)
    inputs = entry.inputs(N)
    return entry.make().train(), {**inputs, "labels": inputs["input_ids"]}


def _still(model: nn.Module) -> nn.Module:
    """Without dropout, whose masks follow the global generator."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


@pytest.mark.parametrize("estimator", [*LISTED, "token"])
@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Llama"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # its new name is not in every version
@pytest.mark.parametrize("way", ["wrapped", "hold", "in_place"])
def test_gradient_checkpointing_of_transformers(estimator: str, name: str, way: str) -> None:
    pytest.importorskip("transformers", reason="checks the models of transformers")

    def run(how: Run) -> list[Tensor]:
        model, inputs = _tiny(name)
        if how is checked:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        generator = torch.Generator().manual_seed(1)
        options: Any = {"estimator": ESTIMATORS[estimator], "generator": generator, "unmet": "ignore"}
        if way == "in_place":
            with flipout.perturbed(model, NOISES["relative"], **options):
                loss = model(**inputs).loss
        else:
            net = flipout.Perturbed(model, NOISES["relative"], **options)
            with net.hold(N) if way == "hold" else contextlib.nullcontext():
                loss = net(**inputs).loss + net(**inputs).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    require_same(run)


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("way", ["wrapped", "in_place"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_reentrant_checkpointing_of_transformers_raises(estimator: str, way: str) -> None:
    pytest.importorskip("transformers", reason="checks the models of transformers")
    model, inputs = _tiny("GPT-2")
    model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    with pytest.raises(flipout.errors.FlipoutError, match=r"use_reentrant=False.*gradient_checkpointing_kwargs"):  # noqa: PT012
        if way == "wrapped":
            flipout.Perturbed(model, NOISES["fixed"], ESTIMATORS[estimator])(**inputs)
        else:
            with flipout.perturbed(model, NOISES["fixed"], ESTIMATORS[estimator]):
                model(**inputs)


@pytest.mark.parametrize("way", ["wrapped", "in_place"])
@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_switch_of_the_trainer(way: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="checks its Trainer")
    pytest.importorskip("accelerate", reason="the Trainer needs it")

    def run(how: Run) -> list[Tensor]:
        model, inputs = _tiny("GPT-2")
        model = _still(model)
        rows = [{key: value[n] for key, value in inputs.items()} for n in range(N)]
        generator = torch.Generator().manual_seed(1)

        class Ours(transformers.Trainer):  # type: ignore[misc, name-defined]
            def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
                if way == "wrapped":
                    return net(**inputs).loss
                with flipout.perturbed(model, NOISES["fixed"], generator=generator):
                    return model(**inputs).loss

        net = flipout.Perturbed(model, NOISES["fixed"], generator=generator)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=how is checked,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-2,
        )
        Ours(model=model, args=arguments, train_dataset=rows).train()
        return [p.detach().clone() for p in model.parameters()]

    require_same(run)
