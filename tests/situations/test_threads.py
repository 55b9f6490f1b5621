"""One module, many threads and async tasks: each sees its own draws and settings, and the module stays what it is."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flipout

N = 4
ESTIMATORS: dict[str, flipout.Estimator] = {
    **LISTED,
    "local": flipout.LocalReparameterization(),
    "per_step": flipout.Flipout(per_step=True),
    "token": flipout.Flipout(granularity="token"),
}
NOISE = flipout.Gaussian(0.3, learnable=True)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()


def wrapped(estimator: flipout.Estimator | None = None) -> flipout.Perturbed:
    return flipout.Perturbed(build(), NOISE, estimator or flipout.Flipout()).eval()


def data(seed: int, rows: int = N) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def elsewhere(function: Callable[[], Any]) -> Any:
    """The result of a function in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# --- what a thread may do: each gives numbers that depend on its seed alone ---------------------------------------------


def mean(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    return [net(data(seed))]


def hold(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.hold(N, generator=seeded(seed)) as draw:
        y = net(data(seed))
        if net.estimator.has_members:
            own = draw.module(1)(data(seed)[1:2])
            assert distance(own, y[1:2]) <= EXACT
        return [y, net(data(seed + 1)).square()]


def several_rows(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.hold(2, generator=seeded(seed)):
        return [net(data(seed, 2 * N))]


def under(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.under(net.draw(N, seeded(seed))):
        return [net(data(seed))]


def resampled(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.hold(N, generator=seeded(seed)) as draw:
        if net.estimator.has_members and not isinstance(net.estimator, flipout.Shared):
            draw.resample([seed % N])
        return [net(data(seed))]


def using(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.using(flipout.Independent()):
        return hold(net, seed)


def gradients(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.hold(N, generator=seeded(seed)):
        return list(torch.autograd.grad(net(data(seed)).square().sum(), list(net.parameters()), materialize_grads=True))


def gradients_later(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with net.hold(N, generator=seeded(seed)):
        y = checkpoint(net.module, data(seed), use_reentrant=False) + checkpoint(net, data(seed), use_reentrant=False)
    return list(torch.autograd.grad(y.square().sum(), list(net.parameters()), materialize_grads=True))


def sampling(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    """Of the global generator: what it gives is random, and not the mean."""
    with net.sampling():
        assert distance(net(data(seed)), net.module(data(seed))) > 1e-6
    return [net(data(seed))]


def predict(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    result = flipout.bayes.predict(net, data(seed), samples=3)
    assert result.mean.shape[0] == N
    return [net(data(seed))]


def in_place(net: flipout.Perturbed, seed: int) -> list[Tensor]:
    with flipout.perturbed(net.module, flipout.Gaussian(0.3), net.estimator, generator=seeded(seed)):
        y = net.module(data(seed))
    return [y, net(data(seed))]


DEEDS = [mean, hold, several_rows, under, resampled, using, gradients, gradients_later, sampling, predict, in_place]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_many_threads_in_one_module(estimator: str) -> None:
    """8 threads, 200 calls each (50 where it is not flipout): no wrong number, no error, and the parameters as before."""
    net = wrapped(ESTIMATORS[estimator])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    calls = 200 if estimator == "flipout" else 50
    seeds = 12
    refused = {several_rows} if estimator == "local" else set()
    deeds = [deed for deed in DEEDS if deed not in refused]
    expected = {(deed, seed): [y.detach() for y in deed(net, seed)] for deed in deeds for seed in range(seeds)}
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        random = torch.Generator().manual_seed(100 + thread)
        start.wait()
        for _ in range(calls):
            deed = deeds[int(torch.randint(len(deeds), (), generator=random))]
            seed = int(torch.randint(seeds, (), generator=random))
            found = deed(net, seed)
            for a, b in zip(found, expected[deed, seed], strict=True):
                if distance(a, b) > EXACT:
                    wrong.append((deed.__name__, seed, distance(a, b)))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, thread) for thread in range(8)]:
            done.result()
    assert not wrong
    assert all(type(p) is nn.Parameter for p in net.parameters())
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.module.modules())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_async_tasks_that_wait_inside_their_contexts(estimator: str) -> None:
    net = wrapped(ESTIMATORS[estimator])
    plain = {seed: net(data(seed)) for seed in range(12)}
    expected = {seed: hold(net, seed)[0] for seed in range(12)}

    async def holds(seed: int) -> None:
        with net.hold(N, generator=seeded(seed)):
            for _ in range(4 if net.estimator.has_members else 1):
                await asyncio.sleep(0)
                assert distance(net(data(seed)), expected[seed]) <= EXACT
        assert torch.equal(net(data(seed)), plain[seed])

    async def samples(seed: int) -> None:
        with net.sampling(), net.using(flipout.Independent()):
            for _ in range(4):
                await asyncio.sleep(0)
                assert net.estimator == flipout.Independent()
                assert distance(net(data(seed)), plain[seed]) > 1e-6

    async def means(seed: int) -> None:
        for _ in range(6):
            await asyncio.sleep(0)
            assert net.estimator == ESTIMATORS[estimator]
            assert torch.equal(net(data(seed)), plain[seed])

    async def everything() -> None:
        await asyncio.gather(*[task(seed) for seed in range(12) for task in (holds, samples, means)])

    asyncio.run(everything())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_async_tasks_perturb_in_place(estimator: str) -> None:
    """Each task sees its own weights, and those that perturb nothing see the plain module, in whatever order they end."""
    module = build()
    plain = {seed: module(data(seed)) for seed in range(8)}
    noise, kind = flipout.Gaussian(0.3), ESTIMATORS[estimator]

    def drawn(seed: int) -> Tensor:
        with flipout.perturbed(module, noise, kind, generator=seeded(seed)):
            return module(data(seed))

    expected = {seed: drawn(seed) for seed in range(8)}

    async def perturbs(seed: int) -> None:
        with flipout.perturbed(module, noise, kind, generator=seeded(seed)) as draw:
            await asyncio.sleep(0)
            assert distance(module(data(seed)), expected[seed]) <= EXACT
            for _ in range(seed % 3):
                await asyncio.sleep(0)
            if kind.has_members:
                assert distance(module(data(seed)), expected[seed]) <= EXACT
                assert distance(draw.module(1)(data(seed)[1:2]), expected[seed][1:2]) <= EXACT
        assert torch.equal(module(data(seed)), plain[seed])

    async def means(seed: int) -> None:
        for _ in range(6):
            await asyncio.sleep(0)
            assert torch.equal(module(data(seed)), plain[seed])

    async def everything() -> None:
        await asyncio.gather(*[task(seed) for seed in range(8) for task in (perturbs, means)])

    asyncio.run(everything())
    assert not torch.overrides._get_current_function_mode_stack()


def test_copies_made_while_another_thread_perturbs() -> None:
    module = build()
    with flipout.perturbed(module, flipout.Gaussian(0.3)) as draw:
        module(data(0))
        for twin in (copy.deepcopy(module), elsewhere(lambda: copy.deepcopy(module)), pickle.loads(pickle.dumps(module))):
            assert torch.equal(elsewhere(lambda twin=twin: twin(data(0))), elsewhere(lambda: module(data(0))))
        buffer = io.BytesIO()
        torch.save([module.state_dict(), list(module.parameters())], buffer)
        buffer.seek(0)
        saved = torch.load(buffer)
        assert all(torch.equal(a, b) for a, b in zip(saved[0].values(), saved[1], strict=True))
        own = draw.module(0)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in own.modules())


def test_a_task_that_outlives_the_hold_it_began_in() -> None:
    net = wrapped()
    plain = net(data(0))

    async def child() -> Tensor:
        await asyncio.sleep(0.01)
        return net(data(0))

    async def parent() -> Tensor:
        with net.hold(N):
            task = asyncio.ensure_future(child())
            await asyncio.sleep(0)
        return await task

    assert torch.equal(asyncio.run(parent()), plain)


def test_a_hold_is_seen_in_its_own_thread_only() -> None:
    net = wrapped()
    plain = net(data(0))
    with net.hold(N), net.sampling():
        assert torch.equal(elsewhere(lambda: net(data(0))), plain)
        assert elsewhere(lambda: net(data(0, 3))).shape == (3, 2)

        def own() -> Tensor:
            with net.hold(3) as other:
                assert other.members == 3
                return net(data(0, 3))

        assert elsewhere(own).shape == (3, 2)
    with net.using(flipout.Shared()):
        assert elsewhere(lambda: net.estimator) == flipout.Flipout()


USES: dict[str, Callable[[flipout.Draw], Any]] = {
    "weights": lambda draw: draw.weights(0),
    "module": lambda draw: draw.module(0),
    "resample": lambda draw: draw.resample([0]),
    "weighted_sum": lambda draw: draw.weighted_sum(torch.ones(N, dtype=torch.float64)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", ["hold", "perturbed"])
def test_a_held_draw_belongs_to_its_thread(use: str, way: str) -> None:
    net = wrapped()
    context = net.hold(N) if way == "hold" else flipout.perturbed(net.module, flipout.Gaussian(0.3), members=N, unmet="ignore")
    with context as draw:
        USES[use](draw)
        with pytest.raises(flipout.errors.DrawError, match="another thread"):
            elsewhere(lambda: USES[use](draw))


def _in_child(draw: flipout.Draw, use: str, answers: Any) -> None:
    try:
        USES[use](draw)
    except flipout.errors.DrawError as error:
        answers.put(str(error))
    except BaseException as error:
        answers.put(repr(error))
    else:
        answers.put("no error")


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_held_draw_belongs_to_its_process(use: str) -> None:
    net = wrapped()
    context = multiprocessing.get_context("fork")
    with net.hold(N) as draw:
        with pytest.raises(flipout.errors.DrawError, match="pickled"):
            pickle.dumps(draw)
        answers = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(draw, use, answers))
        child.start()
        assert "another process" in answers.get()
        child.join()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_draw_that_is_not_held_goes_to_any_thread(estimator: str) -> None:
    net = wrapped(ESTIMATORS[estimator])
    draw = net.draw(N, seeded(1))

    def run() -> Tensor:
        with net.under(draw):
            return net(data(0))

    if not net.estimator.has_members:
        assert elsewhere(run).shape == (N, 2)
        return
    expected = run()
    with ThreadPoolExecutor(4) as pool:
        for y in [pool.submit(run) for _ in range(20)]:
            assert distance(y.result(), expected) <= EXACT
    assert distance(elsewhere(lambda: draw.module(2))(data(0)[2:3]), expected[2:3]) <= EXACT


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_in_place_is_for_one_thread(estimator: str) -> None:
    module = build()
    plain = module(data(0))
    with flipout.perturbed(module, flipout.Gaussian(0.3), ESTIMATORS[estimator]):
        ours = module(data(0))
        assert distance(ours, plain) > 1e-6

        def other() -> None:
            assert torch.equal(module(data(0)), plain)
            assert torch.equal(module(data(0, 7))[:2], module(data(0, 7))[:2])
            grads = torch.autograd.grad(module(data(0)).sum(), list(module.parameters()))
            assert all(type(g) is Tensor for g in grads)
            with flipout.perturbed(module, flipout.Gaussian(0.3), ESTIMATORS[estimator]):
                assert distance(module(data(0, 3)), module(data(0, 3)).flip(0)) > 1e-9
            assert torch.equal(module(data(0)), plain)

        elsewhere(other)
        if ESTIMATORS[estimator].has_members:
            assert distance(module(data(0)), ours) <= EXACT
    assert torch.equal(module(data(0)), plain)


def test_a_backward_pass_in_another_thread() -> None:
    """Regions are run again where the backward pass runs."""
    net = wrapped()
    wanted = list(net.parameters())
    with net.hold(N, generator=seeded(1)):
        expected = torch.autograd.grad(net(data(0)).square().sum(), wanted)
        y = checkpoint(net, data(0), use_reentrant=False) * 1
        z = checkpoint(lambda v: net(v) * 1, data(0), use_reentrant=False)
    with flipout.perturbed(net.module, flipout.Gaussian(0.3), generator=seeded(2)):
        direct = torch.autograd.grad(net.module(data(0)).square().sum(), wanted, materialize_grads=True)
        w = checkpoint(net.module, data(0), use_reentrant=False)
        found = elsewhere(lambda: torch.autograd.grad(w.square().sum(), wanted, materialize_grads=True))
    for ours, theirs in (
        (elsewhere(lambda: torch.autograd.grad(y.square().sum(), wanted)), expected),
        (elsewhere(lambda: torch.autograd.grad(z.square().sum(), wanted)), expected),
        (found, direct),
    ):
        assert all(distance(a, b) <= EXACT for a, b in zip(ours, theirs, strict=True))


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Examples that a perturbed net makes."""

    def __init__(self, net: flipout.Perturbed) -> None:
        self.net = net

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            mean = self.net(data(index))
            with self.net.hold(N, generator=seeded(index)):
                return torch.stack([mean, self.net(data(index))])


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader(context: str) -> None:
    net = wrapped()
    expected = [Noisy(net)[i] for i in range(8)]
    loader = torch.utils.data.DataLoader(
        Noisy(net), batch_size=None, num_workers=1 + (context == "fork"), multiprocessing_context=context
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert distance(found, wanted) <= EXACT


def test_contexts_closed_elsewhere_are_closed() -> None:
    net = wrapped()
    plain = net(data(0))
    stack = contextlib.ExitStack()
    stack.enter_context(net.hold(N))
    stack.enter_context(net.sampling())
    assert distance(net(data(0)), plain) > 1e-6
    elsewhere(stack.close)
    assert torch.equal(net(data(0)), plain)
    with net.hold(3):
        assert net(data(0, 3)).shape == (3, 2)
    with net.using(flipout.Shared()):
        assert net.estimator == flipout.Shared()
    assert net.estimator == flipout.Flipout()


def test_contexts_closed_out_of_order() -> None:
    net = wrapped()
    first, second = net.using(flipout.Shared()), net.using(flipout.Independent())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert net.estimator == flipout.Independent()
    second.__exit__(None, None, None)
    assert net.estimator == flipout.Flipout()


def test_a_generator_that_is_dropped_closes_its_context() -> None:
    net = wrapped()
    plain = net(data(0))

    def steps() -> Any:
        with net.hold(N):
            yield net(data(0))
            yield net(data(0))

    running = steps()
    next(running)
    del running
    assert torch.equal(net(data(0)), plain)


def test_in_place_closed_in_another_thread_ends() -> None:
    module = build()
    plain = module(data(0))
    context = flipout.perturbed(module, flipout.Gaussian(0.3))
    context.__enter__()
    module(data(0))
    elsewhere(lambda: context.__exit__(None, None, None))
    assert torch.equal(elsewhere(lambda: module(data(0))), plain)
    assert torch.equal(module(data(0)), plain)
    with flipout.perturbed(module, flipout.Gaussian(0.3)):
        assert distance(module(data(0)), plain) > 1e-6
    assert torch.equal(module(data(0)), plain)
    assert not torch.overrides._get_current_function_mode_stack()
