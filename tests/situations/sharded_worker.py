"""One rank of the tests of sharded and replicated modules: run by torchrun, writes what it saw to the folder given as its
argument.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from laws import LISTED
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import flipout

ROWS = 4
NOISES = {
    "fixed": flipout.Gaussian(0.3),
    "relative": flipout.Gaussian(0.3, relative=True),
    "learnable": flipout.Gaussian(0.3, learnable=True),
    "learnable_relative": flipout.Gaussian(0.3, relative=True, learnable=True),
}


class Net(nn.Module):
    """Two layers, a vector of its own and a tied matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(5, 7), nn.Linear(7, 5), nn.Parameter(torch.randn(5))
        self.last = nn.Linear(5, 7)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()) * self.gain)


def build() -> Net:
    torch.manual_seed(0)
    return Net().double()


def own(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(5 + rank)


def gathered(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def averaged(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def shard(module: nn.Module, mesh: Any, *outer: nn.Module, **options: Any) -> None:
    fully_shard(module.second, mesh=mesh, **options)
    for each in outer or (module,):
        fully_shard(each, mesh=mesh, **options)


def gap(a: Any, b: Tensor) -> float:
    return float((gathered(a) - b.detach()).abs().max())


def plain_names(net: flipout.Perturbed) -> dict[str, Tensor]:
    return dict(net.named_parameters())


class Worker:
    def __init__(self, mesh: Any, rank: int) -> None:
        self.mesh, self.rank = mesh, rank
        self.seen: dict[str, Any] = {}
        self.x = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 + rank))

    def record(self, name: str, scenario: Callable[..., Any], *args: Any) -> None:
        try:
            self.seen[name] = scenario(*args)
        except flipout.FlipoutError as error:
            self.seen[name] = f"{type(error).__name__}: {error}"
        except Exception as error:
            self.seen[name] = f"raw {type(error).__name__}: {error}"
        dist.barrier()

    def wrapped(self, noise: flipout.Noise, estimator: flipout.Estimator, where: str, **options: Any) -> flipout.Perturbed:
        module = build()
        if where == "before":
            shard(module, self.mesh, **options)
        net = self.scaled(flipout.Perturbed(module, noise, estimator, generator=own(self.rank)))
        if where == "after":
            shard(module, self.mesh, **options)
        if where == "wrapper":
            shard(module, self.mesh, net, **options)
        return net

    def whole(self, noise: flipout.Noise, estimator: flipout.Estimator, module: nn.Module | None = None) -> flipout.Perturbed:
        return self.scaled(flipout.Perturbed(module or build(), noise, estimator, generator=own(self.rank)))

    def scaled(self, net: flipout.Perturbed) -> flipout.Perturbed:
        """Its learnable scales, no longer what they started as."""
        with torch.no_grad():
            for i, parameter in enumerate(net.noise_parameters()):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype), alpha=0.3
                )
        return net

    def evolves(self) -> Any:
        def fitness(module: nn.Module, members: Any) -> Tensor:
            x = torch.ones(5, dtype=torch.float64)
            return -module(members.repeat(x[None])).square().sum(-1)

        module, plain = build(), build()
        shard(module, self.mesh)
        found: dict[str, float] = {"spread": 1.0}
        ours, theirs = (flipout.evolution.EvolutionStrategy(m, std=0.1, population=16, seed=3) for m in (module, plain))
        found["fitness"] = gap(ours.step(fitness), theirs.step(fitness))
        for name, parameter in module.named_parameters():
            found[name] = gap(parameter.grad, dict(plain.named_parameters())[name].grad)
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        return [found]

    def gaps(self, net: flipout.Perturbed, ref: flipout.Perturbed, y: Tensor, expected: Tensor) -> dict[str, float]:
        """Distances of outputs and gradients from those of a net that is whole, whose gradients are averaged over the ranks."""
        y.square().mean().backward()
        expected.square().mean().backward()
        found = {"output": gap(y, expected), "spread": float(expected.std(0).max())}
        theirs = plain_names(ref)
        for name, parameter in plain_names(net).items():
            other = theirs[name].grad
            assert other is not None
            replicated = name.startswith("log_std") and not hasattr(parameter, "full_tensor")
            assert parameter.grad is not None, name
            found[name] = gap(parameter.grad, other if replicated else averaged(other))
        return found

    def trains(self, noise: flipout.Noise, estimator: flipout.Estimator, where: str) -> Any:
        net, ref = self.wrapped(noise, estimator, where), self.whole(noise, estimator)
        found = []
        for _ in range(2):  # the second step has other weights
            y, expected = net(self.x), ref(self.x)
            found.append(self.gaps(net, ref, y, expected))
            for each in (net, ref):
                torch.optim.SGD(each.parameters(), lr=0.0).step()
                each.zero_grad()
        return found

    def holds(self, noise: flipout.Noise, estimator: flipout.Estimator, where: str) -> Any:
        net, ref = self.wrapped(noise, estimator, where), self.whole(noise, estimator)
        net.eval(), ref.eval()
        with net.hold(ROWS) as draw, ref.hold(ROWS) as other:
            listed = [draw.weights(n) for n in range(2)]
            f = torch.arange(1.0, ROWS + 1)
            ours, sums = draw.weighted_sum(f), other.weighted_sum(f)
            y, expected = net(self.x), ref(self.x)
            again = net(self.x)
            found = self.gaps(net, ref, y, expected)
            found["again"] = gap(again, y)
            found["weights"] = max(gap(listed[n][name], other.weights(n)[name]) for n in range(2) for name in listed[n])
            found["sum"] = max(gap(ours[name], sums[name]) for name in sums)
            net.zero_grad(), ref.zero_grad()
            sum(w.square().sum() for w in draw.weights(1).values()).backward()
            sum(w.square().sum() for w in other.weights(1).values()).backward()
            for name, parameter in plain_names(net).items():
                if parameter.grad is not None and (not name.startswith("log_std") or hasattr(parameter, "full_tensor")):
                    found[f"weights {name}"] = gap(parameter.grad, averaged(plain_names(ref)[name].grad))
        return [found]

    def perturbs(self, noise: flipout.Noise, estimator: flipout.Estimator) -> Any:
        module, plain = build(), build()
        shard(module, self.mesh)
        with flipout.perturbed(module, noise, estimator, generator=own(self.rank)) as draw:
            y = module(self.x)
            y.square().mean().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)
            torch.optim.AdamW(module.parameters(), lr=0.0).step()
            listed = draw.weights(1)
        with flipout.perturbed(plain, noise, estimator, generator=own(self.rank)) as other:
            expected = plain(self.x)
            expected.square().mean().backward()
            found = {"output": gap(y, expected), "spread": float(expected.std(0).max())}
            found["weights"] = max(gap(listed[name], other.weights(1)[name]) for name in listed)
        for name, parameter in module.named_parameters():
            found[name] = gap(parameter.grad, averaged(dict(plain.named_parameters())[name].grad))
        return [found]

    def mixes(self, noise: flipout.Noise, estimator: flipout.Estimator, where: str) -> Any:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        net = self.wrapped(noise, estimator, where, mp_policy=policy)
        plain = build()
        with net.hold(ROWS) as draw:
            y = net(self.x)
            y.square().mean().backward()
            one = torch.cat([functional_call(plain, draw.weights(n), (self.x[n : n + 1],)) for n in range(ROWS)])
        finite = all(bool(gathered(p.grad).isfinite().all()) for p in net.parameters())
        return {"relative": float((y - one).norm() / one.norm()), "finite": finite}

    def module_of_a_member(self) -> Any:
        net = self.wrapped(NOISES["fixed"], flipout.Flipout(), "after")
        with net.hold(ROWS) as draw:
            net(self.x)
            return draw.module(1)

    def outside(self) -> Any:
        """An operation on a parameter in pieces."""
        module = build()
        shard(module, self.mesh)
        with flipout.perturbed(module, NOISES["fixed"], members=ROWS):
            return module.second.weight * 2

    def bayes(self, where: str) -> Any:
        noise = NOISES["learnable"]
        net, ref = self.wrapped(noise, flipout.Flipout(), where), self.whole(noise, flipout.Flipout())
        prior = torch.distributions.Normal(0.0, 1.0)
        found, expected = flipout.bayes.kl_divergence(net, prior), flipout.bayes.kl_divergence(ref, prior)
        found.backward()
        expected.backward()
        gaps = {name: gap(p.grad, plain_names(ref)[name].grad) for name, p in plain_names(net).items() if p.grad is not None}
        return {"kl": gap(found, expected), "count": len(gaps) - len(plain_names(ref)), **gaps}

    def first_fsdp(self, noise: flipout.Noise, estimator: flipout.Estimator, original: bool, how: str) -> Any:
        inside, nested, held = how == "inside", how == "nested", how == "held"
        ref = self.whole(noise, estimator)
        if inside:
            module = FullyShardedDataParallel(build(), use_orig_params=original, device_id=torch.device("cpu"))
            return flipout.Perturbed(module, noise, estimator, generator=own(self.rank))(self.x)
        net = self.whole(noise, estimator)
        policy = functools.partial(size_based_auto_wrap_policy, min_num_params=30) if nested else None
        outer = FullyShardedDataParallel(net, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu"))
        y, expected = outer(self.x), ref(self.x)
        y.square().mean().backward()
        expected.square().mean().backward()
        norm = sum((p.grad.square().sum() for p in outer.parameters() if p.grad is not None), torch.zeros((), dtype=torch.float64))
        dist.all_reduce(norm)
        wanted = torch.cat([averaged(p.grad).flatten() for p in ref.parameters()])
        if held:
            net.eval()
            with net.hold(ROWS, generator=own(self.rank)), ref.hold(ROWS, generator=own(self.rank)):
                again = gap(outer(self.x), ref(self.x))
            return [{"output": again, "spread": 1.0}]
        return [
            {"output": gap(y, expected), "spread": float(expected.std(0).max()), "norm": abs(float(norm.sqrt() - wanted.norm()))}
        ]

    def ddp(self, noise: flipout.Noise, estimator: flipout.Estimator, how: str) -> Any:
        ref = self.whole(noise, estimator)
        net: Any = self.whole(noise, estimator)
        outer: Any = net
        if how == "around":
            outer = DistributedDataParallel(net)
        elif how == "inside":
            outer = net = self.whole(noise, estimator, DistributedDataParallel(build()))
        found = []
        for _ in range(2):
            if how == "perturbed":
                outer = DistributedDataParallel(build())
                with flipout.perturbed(outer, noise, estimator, generator=net.generator):
                    y = outer(self.x)
            else:
                y = outer(self.x)
            expected = ref(self.x)
            y.square().mean().backward()
            expected.square().mean().backward()
            gaps = {"output": gap(y, expected), "spread": float(expected.std(0).max())}
            theirs = plain_names(ref)
            for name, parameter in outer.named_parameters():
                name = name.replace("module/", "").replace("module.", "")
                other = theirs.get(f"module.{name}", theirs.get(name))
                local = name.startswith("log_std") and how != "around"
                gaps[name] = gap(parameter.grad, other.grad if local else averaged(other.grad))
            found.append(gaps)
            outer.zero_grad(), ref.zero_grad()
        return found


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    worker = Worker(init_device_mesh("cpu", (2,)), rank)
    for estimator, how in LISTED.items():
        for name, noise in NOISES.items():
            low = isinstance(how, flipout.LowRank) and noise.relative
            if low:
                continue
            for where in ("before", "after", "wrapper"):
                worker.record(f"train {where} {estimator} {name}", worker.trains, noise, how, where)
                worker.record(f"hold {where} {estimator} {name}", worker.holds, noise, how, where)
            if not noise.learnable:
                worker.record(f"perturbed {estimator} {name}", worker.perturbs, noise, how)
            for where in ("around", "inside", *(() if noise.learnable else ("perturbed",))):
                worker.record(f"ddp {where} {estimator} {name}", worker.ddp, noise, how, where)
        for where in ("before", "wrapper"):
            worker.record(f"mixed {where} {estimator}", worker.mixes, NOISES["learnable"], how, where)
        for original in (True, False):
            for place in ("around", "inside", "nested", "held"):
                worker.record(f"fsdp1 {place} {original} {estimator}", worker.first_fsdp, NOISES["learnable"], how, original, place)
    worker.record("module", worker.module_of_a_member)
    worker.record("outside", worker.outside)
    worker.record("evolution", worker.evolves)
    for where in ("before", "after", "wrapper"):
        worker.record(f"bayes {where}", worker.bayes, where)
    torch.save(worker.seen, Path(sys.argv[1]) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # all is saved; at an ordinary exit threads of torch's own, still running, abort about one process in thirty
