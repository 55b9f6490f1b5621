"""The wrapper and the context manager: modes, contexts, state, copies, randomness."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from laws import EXACT, LISTED, distance, oracle
from torch import Tensor, nn

import flipout


def net_of(*, noise: flipout.Noise | None = None, seed: int = 0, **options: object) -> flipout.Perturbed:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    generator = torch.Generator().manual_seed(seed)
    return flipout.Perturbed(module, noise or flipout.Gaussian(0.2), generator=generator, **options)  # type: ignore[arg-type]


def data(rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


def parameters_of(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(p), p.detach().clone()) for name, p in module.named_parameters(remove_duplicate=False)}


def assert_untouched(module: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = parameters_of(module)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name][0] == before[name][0]
        assert torch.equal(after[name][1], before[name][1])
    assert all(type(p) is nn.Parameter for p in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# --- modes and contexts -----------------------------------------------------------------------------------------------


def test_training_samples_and_evaluation_does_not() -> None:
    net, x = net_of(), data()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net.module(x))
    with net.sampling():
        assert not torch.equal(net(x), net(x))
    assert torch.equal(net(x), net.module(x))
    net.train()
    assert not torch.equal(net(x), net.module(x))


def test_contexts_nest_and_are_restored() -> None:
    net, x = net_of(), data()
    net.eval()
    with net.sampling():
        with net.using(flipout.Shared()):
            with net.using(flipout.Independent()):
                assert net.estimator == flipout.Independent()
            assert net.estimator == flipout.Shared()
            with net.hold(6) as draw, net.sampling():
                assert draw.estimator == flipout.Shared()
                assert torch.equal(net(x), net(x))
            with net.sampling():
                pass
            assert not torch.equal(net(x), net.module(x))
        assert net.estimator == flipout.Flipout()
    assert torch.equal(net(x), net.module(x))


@pytest.mark.parametrize("context", ["sampling", "using", "hold"])
def test_contexts_are_restored_after_an_exception(context: str) -> None:
    net, x = net_of(), data()
    net.eval()
    enter = {"sampling": net.sampling, "using": lambda: net.using(flipout.Shared()), "hold": lambda: net.hold(6)}[context]
    with pytest.raises(KeyError, match="inside"), enter():  # type: ignore[operator]
        raise KeyError("inside")
    assert net.estimator == flipout.Flipout()
    assert torch.equal(net(x), net.module(x))
    with net.hold(3):  # nothing is held any more
        pass


def test_a_held_draw_is_one_draw() -> None:
    net, x = net_of(), data()
    with net.hold(6):
        first = net(x)
        assert torch.equal(net(x), first)
        net.eval()
        assert torch.equal(net(x), first)
    net.train()
    with net.hold(6):
        assert not torch.equal(net(x), first)


def test_a_held_draw_in_inference_mode_can_be_trained_later() -> None:
    net, x = net_of(), data()
    with net.hold(6):
        with torch.inference_mode():
            first = net(x)
        second = net(x)
        second.sum().backward()
        assert torch.equal(first, second)
    assert all(p.grad is not None for p in net.parameters())


def test_held_draws_do_not_nest() -> None:
    net = net_of()
    with net.hold(3):
        with pytest.raises(flipout.DrawError, match="already held; leave the outer"), net.hold(3):
            pytest.fail("entered")
        with pytest.raises(flipout.DrawError, match="switch the estimator outside"), net.using(flipout.Shared()):
            pytest.fail("entered")
        assert net(data()).shape == (6, 2)


# --- the context manager `perturbed` ----------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("training", [True, False])
def test_perturbed_holds_one_draw_over_a_module_in_place(estimator: str, training: bool) -> None:
    module, x = plain().train(training), data()
    before = parameters_of(module)
    with flipout.perturbed(module, flipout.Gaussian(0.2), LISTED[estimator], members=3) as draw:
        y = module(x)
        assert torch.equal(module(x), y)
        assert_untouched_but_hooks(module, before)
        assert draw.members == 3
        assert distance(y, torch.cat([draw.module(n)(x[2 * n : 2 * n + 2]) for n in range(3)])) <= EXACT
    assert_untouched(module, before)
    assert distance(module(x), y) > 1e-3


def assert_untouched_but_hooks(module: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    assert {name: identity for name, (identity, _) in parameters_of(module).items()} == {n: i for n, (i, _) in before.items()}


def test_perturbed_finds_its_members_at_the_first_call() -> None:
    module = plain()
    with flipout.perturbed(module, flipout.Gaussian(0.2)) as draw:
        with pytest.raises(flipout.DrawError, match="no members yet: call the module first"):
            draw.weights(0)
        assert "not drawn yet" in repr(draw)
        module(data(6))
        assert draw.members == 6
        assert module(data(12)).shape == (12, 2)
        with pytest.raises(flipout.BatchError, match="7 rows"):
            module(data(7))


def test_perturbed_serves_the_parts_of_a_module() -> None:
    module, x = plain(), data()
    with flipout.perturbed(module, flipout.Gaussian(0.2), members=6) as draw:
        parts = module[2](torch.tanh(module[0](x)))
        assert torch.equal(parts, module(x))
        assert draw.members == 6


@pytest.mark.parametrize("where", ["outside", "forward", "pre-hook"])
def test_perturbed_is_undone_after_an_exception(where: str) -> None:
    module = plain()
    before = parameters_of(module)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises((RuntimeError, KeyError, flipout.BatchError)))
        stack.enter_context(flipout.perturbed(module, flipout.Gaussian(0.2), members=3))
        if where == "outside":
            raise KeyError("outside")
        module(torch.zeros(6, 9).double() if where == "forward" else data(7))
    assert_untouched(module, before)


def test_perturbed_goes_on_after_an_exception_in_forward() -> None:
    module, x = plain(), data()
    with flipout.perturbed(module, flipout.Gaussian(0.2), members=6):
        y = module(x)
        with pytest.raises(RuntimeError):
            module(torch.zeros(6, 9).double())
        assert torch.equal(module(x), y)


def test_perturbed_contexts_nest_over_disjoint_parameters() -> None:
    module, x = plain(), data()
    before = parameters_of(module)
    with flipout.perturbed(module, flipout.Gaussian(0.2), include="0.*", members=6) as first:
        only_first = module(x)
        with flipout.perturbed(module, flipout.Gaussian(0.2), include="2.*", members=6) as second:
            y = module(x)
            members = []
            for n in range(6):
                weights = {**first.weights(n), **second.weights(n)}
                members.append(torch.func.functional_call(module_copy(module), weights, x[n : n + 1]))
            assert distance(y, torch.cat(members)) <= EXACT
        assert torch.equal(module(x), only_first)
    assert_untouched(module, before)


def module_copy(module: nn.Module) -> nn.Module:
    clean = plain()
    clean.load_state_dict(module.state_dict())
    return clean


def test_perturbed_refuses_learnable_noise() -> None:
    with (
        pytest.raises(flipout.ArgumentError, match=r"needs flipout\.Perturbed: perturbed\(\) has no place"),
        flipout.perturbed(plain(), flipout.Gaussian(0.1, learnable=True)),
    ):
        pytest.fail("entered")


# --- state ------------------------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Runs one layer and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.hooked = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        raise KeyError("in the middle")


@pytest.mark.parametrize("held", [False, True])
def test_the_module_is_restored_after_an_exception_in_forward(held: bool) -> None:
    module = Breaks()
    before = parameters_of(module)
    net = flipout.Perturbed(module, flipout.Gaussian(0.1))
    with ExitStack() as stack:
        if held:
            stack.enter_context(net.hold(6))
        with pytest.raises(KeyError, match="in the middle"):
            net(data())
        assert_untouched(module, before)


def test_the_module_is_itself_during_and_after_a_call() -> None:
    net = net_of()
    before = parameters_of(net.module)
    net(data()).sum().backward()
    assert_untouched(net.module, before)
    assert all(p.grad is not None and type(p.grad) is Tensor for p in net.parameters())


def test_state_dicts() -> None:
    net = net_of(noise=flipout.Gaussian(0.2, learnable=True))
    keys = list(net.module.state_dict())
    assert keys == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert set(net.state_dict()) == {f"module.{k}" for k in keys} | {f"log_std.{k.replace('.', '/')}" for k in keys}
    assert set(net_of().state_dict()) == {f"module.{k}" for k in keys}
    other = net_of(noise=flipout.Gaussian(0.7, learnable=True), seed=1)
    other.load_state_dict(net.state_dict())
    net.generator.manual_seed(3)  # type: ignore[union-attr]
    other.generator.manual_seed(3)  # type: ignore[union-attr]
    x = data()
    assert torch.equal(net(x), other(x))
    plain().load_state_dict(net.module.state_dict())


def _by_pickle(net: flipout.Perturbed) -> flipout.Perturbed:
    copied = pickle.loads(pickle.dumps(net))
    assert isinstance(copied, flipout.Perturbed)
    return copied


def _by_save(net: flipout.Perturbed) -> flipout.Perturbed:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    assert isinstance(copied, flipout.Perturbed)
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _by_pickle, _by_save], ids=["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("learnable", [False, True])
def test_copies_are_independent_and_equal(duplicate: Callable[[flipout.Perturbed], flipout.Perturbed], learnable: bool) -> None:
    net, x = net_of(noise=flipout.Gaussian(0.2, learnable=learnable)), data()
    net(x)
    other = duplicate(net)
    assert torch.equal(other(x), net(x))  # the generator was copied in its state
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    before = net.eval()(x)
    assert not torch.equal(other.eval()(x), before)
    other.train()(x).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_a_copy_made_while_a_draw_is_held_holds_nothing() -> None:
    net = net_of()
    with net.hold(3):
        other = copy.deepcopy(net)
        with other.hold(2):
            assert other(data()).shape == (6, 2)
        assert net(data()).shape == (6, 2)


def test_tied_parameters_are_one_draw_and_one_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False).double()
            self.b = nn.Linear(4, 4, bias=False).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    net, x = flipout.Perturbed(Tied(), flipout.Gaussian(0.2, learnable=True)), data()
    assert list(net.noises) == ["a.weight"]
    assert len(list(net.parameters())) == 2
    with net.hold(6) as draw:
        y, expected = net(x), oracle(net, draw, [x])
        wanted = list(net.parameters())
        grads = [torch.autograd.grad(v.square().sum(), wanted) for v in (y, expected)]
        assert distance(y, expected) <= EXACT
        assert all(distance(a, b) <= EXACT for a, b in zip(*grads, strict=True))
    assert net.module.a.weight is net.module.b.weight


def test_frozen_parameters_are_perturbed_and_get_no_gradient() -> None:
    net, x = net_of(), data()
    net.module[0].requires_grad_(False)
    net(x).sum().backward()
    assert net.module[0].weight.grad is None
    assert net.module[2].weight.grad is not None
    net.module.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    with net.hold(6) as draw:
        ours, theirs = (torch.autograd.grad(y.square().sum(), inputs)[0] for y in (net(inputs), oracle(net, draw, [inputs])))
    assert distance(ours, theirs) <= EXACT
    assert not net(x).requires_grad


def test_one_module_in_two_wrappers_and_a_wrapper_in_a_wrapper() -> None:
    module, x = plain(), data()
    before = parameters_of(module)
    quiet, loud = flipout.Perturbed(module, flipout.Gaussian(1e-3)), flipout.Perturbed(module, flipout.Gaussian(1.0))
    assert (quiet(x) - module(x)).norm() < (loud(x) - module(x)).norm()
    inner = flipout.Perturbed(module[0], flipout.Gaussian(0.1))
    outer = flipout.Perturbed(nn.Sequential(inner, nn.Tanh(), module[2]), flipout.Gaussian(0.1), include="2.*")
    outer.eval()
    with outer.sampling():
        inner.train()
        assert not torch.equal(outer(x), outer(x))
    inner.eval()
    assert torch.equal(outer(x), module(x))
    assert_untouched(module, before)


def test_batch_norm_in_training_keeps_the_statistics_of_the_whole_batch() -> None:
    x = torch.randn(8, 3, 4, dtype=torch.float64)
    norm, twin = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    net = flipout.Perturbed(norm, flipout.Gaussian(1e-300))
    assert distance(net(x), twin(x)) <= EXACT
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert torch.equal(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked == 1


def test_buffers_and_other_arguments_pass_through() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, *, scale: float, names: list[str]) -> dict[str, Tensor]:
            self.calls += 1
            return {name: self.layer(x) * scale for name in names}

    net = flipout.Perturbed(Scaled(), flipout.Gaussian(0.1))
    out = net(x=torch.randn(3, 4), scale=2.0, names=["a", "b"])
    assert sorted(out) == ["a", "b"]
    assert net.module.calls == 1
    assert not torch.equal(out["a"][0] - out["a"][1], torch.zeros(2))


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Linear(5, 3)], ids=str)
def test_an_unbatched_input_is_one_example(layer: nn.Module) -> None:
    layer = layer.double()
    shape = (5,) if isinstance(layer, nn.Linear) else (2, *[5] * len(layer.kernel_size))  # type: ignore[arg-type]
    x = torch.randn(*shape, dtype=torch.float64)
    net = flipout.Perturbed(layer, flipout.Gaussian(0.2))
    with net.hold(1) as draw:
        y = net(x)
        assert y.shape == layer(x).shape
        assert distance(y, draw.module(0)(x)) <= EXACT
    assert not torch.equal(net(x), net(x))


def test_the_first_tensor_of_a_call_counts_the_examples() -> None:
    """A flat list of words and offsets: by keyword, the offsets can stand first."""
    words, offsets = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5]), torch.tensor([0, 3, 5])
    net = flipout.Perturbed(nn.EmbeddingBag(7, 4).double(), flipout.Gaussian(0.2))
    with net.hold(3) as draw, torch.no_grad():
        y = net(offsets=offsets, input=words)
        for n, bag in enumerate((words[:3], words[3:5], words[5:])):
            assert distance(y[n : n + 1], draw.module(n)(bag[None])) <= EXACT
    with pytest.raises(flipout.BatchError, match=r"3 bags for 8 members.*offsets first, by keyword"):
        net(words, offsets)


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [*LISTED.values(), flipout.LocalReparameterization(), flipout.Flipout("token")], ids=str)
def test_one_seed_one_draw(estimator: flipout.Estimator) -> None:
    x = data()
    net = net_of(estimator=estimator)
    before = torch.random.get_rng_state()

    def run(seed: int) -> list[Tensor]:
        net.generator.manual_seed(seed)  # type: ignore[union-attr]
        outputs = [net(x), net(x)]
        with net.hold(6, torch.Generator().manual_seed(seed)):
            outputs.append(net(x))
        return outputs

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_generator_the_global_one_draws() -> None:
    net, x = flipout.Perturbed(plain(), flipout.Gaussian(0.1)), data()
    torch.manual_seed(5)
    first = net(x)
    torch.manual_seed(5)
    assert torch.equal(net(x), first)


def test_evaluation_draws_nothing() -> None:
    net, x = net_of().eval(), data()
    state = net.generator.get_state()  # type: ignore[union-attr]
    before = torch.random.get_rng_state()
    net(x)
    assert torch.equal(net.generator.get_state(), state)  # type: ignore[union-attr]
    assert torch.equal(torch.random.get_rng_state(), before)
