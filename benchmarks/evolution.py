"""What does one member of a population cost, against explicit evolution, vmap over dense members, EvoTorch, and low rank?"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import MIN_ROUNDS, PATIENCE, THREADS, Timing, race
from benchmarks.memory import MIB, _resident_peak
from benchmarks.report import Row, Section, Target
from flipout import Flipout, LowRank
from flipout.evolution import EvolutionStrategy, Members

STD = 0.02
POPULATION, DENSE, EXPLICIT = 8192, 32, 8
EXPLICIT_BOUND, VMAP_BOUND, EVOTORCH_BOUND, BATCH_BOUND, LOW_RANK_BOUND, MEMORY_BOUND = 40, 100, 150, 4, 1.7, 1024.0
Step = Callable[[], object]

TEXT = f"""A whole generation on 784-512-512-10 (669,706 weights), float32: noise, forward passes, centered ranks, the update's
sum; antithetic pairs everywhere. Times are per *member*. *FlipES* has {POPULATION:,} members with an example each; *explicit*
perturbs the net member by member with torch.randn, and draws the same noise again for the sum; *noise table* takes its noise from
a shared table in memory, as the paper's cpuES does; *vmap* has {DENSE} dense members at once under `torch.func.vmap`; *EvoTorch*
is its PGPE with its vectorised evaluation, *evosax* its Open_ES with Adam, one compiled function of JAX a generation, both with
{DENSE} members at once. With 32 examples, all members see one batch."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def flipes(examples: int, population: int, estimator: Any = Flipout(), chunk: int | None = None) -> Step:  # noqa: B008
    """A generation of the library's strategy."""
    es = EvolutionStrategy(net(), STD, population, estimator=estimator, chunk=chunk)
    x = torch.randn(population if examples == 1 else examples, 784)

    def evaluate(module: nn.Module, members: Members) -> Tensor:
        if examples == 1:
            return module(x[members.start : members.start + members.count])[:, 0]
        return members.mean(module(members.expand(x))[..., 0])

    return lambda: es.step(evaluate)


def explicit(examples: int, table: bool) -> Step:
    """One member after the other: antithetic pairs that share a draw, drawn (or looked up) again for the sum."""
    module = net()
    means = [p.detach().clone() for p in module.parameters()]
    sizes = [p.numel() for p in means]
    parameters = list(module.parameters())
    noise, numbers = torch.Generator(), torch.randn(10**7) if table else None
    x, flat, pairs = torch.randn(examples, 784), torch.empty(sum(sizes)), EXPLICIT // 2

    def draw(pair: int) -> tuple[Tensor, ...]:
        if numbers is not None:
            return numbers.narrow(0, 7919 * pair, sum(sizes)).split(sizes)
        return flat.normal_(generator=noise.manual_seed(pair)).split(sizes)

    @torch.no_grad()
    def step() -> None:
        fitness = torch.empty(2 * pairs)
        for pair in range(pairs):
            drawn = draw(pair)
            for k, sign in enumerate((STD, -STD)):
                for p, mean, d in zip(parameters, means, drawn, strict=True):
                    torch.add(mean, d.view_as(mean), alpha=sign, out=p)
                fitness[2 * pair + k] = module(x)[:, 0].mean()
        ranks = fitness.argsort().argsort() / (2 * pairs - 1) - 0.5
        total = torch.zeros(sum(sizes))
        for pair in range(pairs):
            for into, d in zip(total.split(sizes), draw(pair), strict=True):
                into.add_(d, alpha=float(ranks[2 * pair] - ranks[2 * pair + 1]))

    return step


def vmapped(examples: int) -> Step:
    """Dense members at once."""
    module = net()
    means = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(examples, 784)

    @torch.no_grad()
    def step() -> None:
        noise = {name: torch.randn(DENSE // 2, *mean.shape) for name, mean in means.items()}
        members = {name: torch.cat([means[name] + STD * d, means[name] - STD * d]) for name, d in noise.items()}
        fitness = torch.func.vmap(lambda w: torch.func.functional_call(module, w, (x,))[:, 0].mean())(members)
        ranks = fitness.argsort().argsort() / (DENSE - 1) - 0.5
        weights = ranks[: DENSE // 2] - ranks[DENSE // 2 :]
        for d in noise.values():
            torch.tensordot(weights, d, 1)

    return step


def evotorch(examples: int) -> Step:
    """EvoTorch's PGPE over flat parameter vectors, evaluated by its own vectorised module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evotorch import Problem
        from evotorch.algorithms import PGPE
        from evotorch.neuroevolution.net import ModuleExpectingFlatParameters

    module = ModuleExpectingFlatParameters(net())
    x = torch.randn(examples, 784)

    def evaluate(solutions: Tensor) -> Tensor:
        return torch.func.vmap(lambda w: module(w, x)[:, 0].mean())(solutions)

    problem = Problem("max", evaluate, solution_length=module.parameter_length, initial_bounds=(-0.01, 0.01), vectorized=True)
    search = PGPE(problem, popsize=DENSE, center_learning_rate=0.01, stdev_learning_rate=0.0, stdev_init=STD, optimizer="adam")
    return search.step


def evosax(examples: int) -> Step:
    """evosax's Open_ES over dense members: a whole generation as one compiled function of JAX, on as many threads as it takes."""
    import jax
    import optax
    from evosax.algorithms import Open_ES

    center = [jax.numpy.asarray(p.detach().numpy()) for p in net().parameters()]
    x = jax.numpy.asarray(torch.randn(examples, 784).numpy())
    adam, std = optax.adam(0.01), optax.constant_schedule(STD)
    es = Open_ES(population_size=DENSE, solution=center, optimizer=adam, std_schedule=std)
    params = es.default_params

    def fitness(weights: Any) -> Any:
        w1, b1, w2, b2, w3, b3 = weights
        hidden = jax.nn.relu(jax.nn.relu(x @ w1.T + b1) @ w2.T + b2)
        return -(hidden @ w3.T + b3)[:, 0].mean()  # it minimises

    @jax.jit
    def generation(key: Any, state: Any) -> Any:
        ask, tell, following = jax.random.split(key, 3)
        population, state = es.ask(ask, state, params)
        state, _ = es.tell(tell, population, jax.vmap(fitness)(population), state, params)
        return following, state

    now = [(jax.random.key(0), es.init(jax.random.key(1), center, params))]

    def step() -> None:
        now[0] = jax.block_until_ready(generation(*now[0]))

    return step


def per_member(timings: Mapping[str, Timing], counts: Mapping[str, int]) -> dict[str, Timing]:
    """The timings divided by the members of each contestant's generation; ratios to the first contestant."""
    seconds = {name: tuple(s / counts[name] for s in t.seconds) for name, t in timings.items()}
    first = next(iter(seconds.values()))
    found = {}
    for name, t in timings.items():
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(seconds[name], first, strict=True)], n=4, method="inclusive"
        )
        milliseconds = 1e3 * statistics.median(seconds[name])
        found[name] = replace(t, milliseconds=milliseconds, ratio=middle, low=low, high=high, seconds=seconds[name])
    return found


def add_race(section: Section, name: str, timings: Mapping[str, Timing]) -> None:
    section.seconds[name] = {contestant: t.seconds for contestant, t in timings.items()}
    for contestant, t in timings.items():
        cells = {"contestant": contestant, "µs a member": 1e3 * t.milliseconds, "/ FlipES": t.ratio}
        others = "?" if t.others is None else f"{100 * t.others:.0f} %"
        section.rows.append(Row(name, {**cells, "quartiles": f"{t.low:.2f} – {t.high:.2f}", "rounds": t.rounds, "others": others}))


def peak(population: int) -> tuple[float, float]:
    """Peak resident MiB of a process that runs one generation, torch and all, and the seconds of the generation."""
    command = [sys.executable, "-m", "benchmarks.evolution", "--population", str(population)]
    mib, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(mib), float(seconds)


def _peak_here(population: int) -> tuple[float, float]:
    torch.set_num_threads(THREADS)
    es = EvolutionStrategy(net(), STD, population)
    x = torch.randn(4096, 784)
    start = time.perf_counter()
    es.step(lambda module, members: module(x[: members.count])[:, 0])
    return _resident_peak() / MIB, time.perf_counter() - start


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races all contestants with one and with 32 examples a member; then memory."""
    section = Section("evolution", "Evolution strategies: time and memory per member", TEXT)
    contestants: dict[str, Step] = {
        "FlipES": flipes(1, POPULATION),
        "LowRank(1)": flipes(1, POPULATION, LowRank(1)),
        "explicit": explicit(1, table=False),
        "explicit, noise table": explicit(1, table=True),
        "vmap": vmapped(1),
    }
    counts = {
        "FlipES": POPULATION,
        "LowRank(1)": POPULATION,
        "explicit": EXPLICIT,
        "explicit, noise table": EXPLICIT,
        "vmap": DENSE,
    }
    for name, make in (("EvoTorch PGPE", evotorch), ("evosax Open_ES", evosax)):
        try:
            contestants[name], counts[name] = make(1), DENSE
        except ImportError as error:
            section.notes.append(f"{name} skipped, it is not installed: {error}")
    one = per_member(race(contestants, rounds=rounds, patience=patience, warmup=1), counts)
    add_race(section, "1 example a member", one)
    section.add_lead("explicit / FlipES, 1 example", one["explicit"], one["FlipES"], EXPLICIT_BOUND)
    section.add_lead("vmap / FlipES, 1 example", one["vmap"], one["FlipES"], VMAP_BOUND)
    if "EvoTorch PGPE" in one:
        section.add_lead("EvoTorch PGPE / FlipES, 1 example", one["EvoTorch PGPE"], one["FlipES"], EVOTORCH_BOUND)
    low, middle, high = one["FlipES"].over(one["LowRank(1)"])
    section.targets.append(Target("FlipES / LowRank(1), 1 example", middle, LOW_RANK_BOUND, spread=(low, high)))
    many = {"FlipES": flipes(32, 256), "explicit": explicit(32, table=False), "vmap": vmapped(32)}
    batch = per_member(race(many, rounds=rounds, patience=patience, warmup=1), {"FlipES": 256, "explicit": EXPLICIT, "vmap": DENSE})
    add_race(section, "32 examples a member", batch)
    section.add_lead("explicit / FlipES, 32 examples", batch["explicit"], batch["FlipES"], BATCH_BOUND)
    mib, _ = peak(16_384)
    section.targets.append(Target("peak of the process, population 16,384, MiB", mib, MEMORY_BOUND))
    mib, seconds = peak(1_000_000)
    section.notes.append(f"A generation of 1,000,000 members in chunks of 4,096: {seconds:.0f} s, peak {mib:.0f} MiB.")
    return section


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--population", type=int)
    chosen = parser.parse_args()
    print(*_peak_here(chosen.population)) if chosen.population else print(run().markdown())
