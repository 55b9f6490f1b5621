"""How much a stochastic gradient varies, under any estimator, on any module.

The gradient of one step is random twice over: in its batch and in its noise. ``gradient_variance`` draws both afresh again and
again and reports the variance of every weight's gradient, summed over the weights. Theory: Wen et al. 2018, Sec. 3.2.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, Independent, LocalReparameterization, LowRank, Shared
from flipout.moments import Estimate, Moments, estimate_mean, ratio
from flipout.perturb import Perturbed

__all__ = [
    "ESTIMATORS",
    "EstimatorVariance",
    "GradientVariance",
    "block_sizes",
    "gradient",
    "gradient_variance",
    "named_estimators",
    "stream",
]

#: The estimators by the names that results, tables and the command line use.
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "shared": Shared,
    "flipout": Flipout,
    "independent": Independent,
    "local_reparameterization": LocalReparameterization,
    "low_rank": LowRank,
}

LossFunction = Callable[[Perturbed, Any], Tensor]
SampleBatch = Callable[[int, torch.Generator], Any]

#: Entries of dense per-member weights that Independent holds at once where no micro_batch is given. A CPU is fastest with what
#: its cache takes; an accelerator is kept busy with 128 MiB in float32.
_DENSE_ENTRIES, _DENSE_ENTRIES_CPU = 2**25, 2**20


@dataclass(frozen=True)
class EstimatorVariance:
    """The variance of the gradient under one estimator.

    Attributes:
        estimator: its name.
        batch_size: N.
        draws: how many gradients were drawn.
        blocks: for each parameter, the unbiased variance within each block of draws, summed over the parameter's entries;
            intervals come from the spread between blocks.
        sizes: the number of entries of each parameter.
        confidence: of the intervals.
    """

    estimator: str
    batch_size: int
    draws: int
    blocks: dict[str, tuple[float, ...]]
    sizes: dict[str, int]
    confidence: float = 0.9

    @property
    def total(self) -> Estimate:
        """The variance summed over all weights."""
        return self.of(self.blocks)

    @property
    def parameters(self) -> dict[str, Estimate]:
        """The variance summed over the entries of each parameter."""
        return {name: self.of([name]) for name in self.blocks}

    def of(self, names: Iterable[str]) -> Estimate:
        """The variance summed over the entries of the named parameters, for example those of a layer."""
        sums = [math.fsum(values) for values in zip(*(self.blocks[name] for name in names), strict=True)]
        found = estimate_mean(sums, self.confidence)
        return Estimate(found.value, max(found.low, 0.0), found.high, found.standard_error, found.degrees)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "estimator": self.estimator,
            "batch_size": self.batch_size,
            "draws": self.draws,
            "confidence": self.confidence,
            "total": self.total.as_dict(),
            "parameters": {name: {**found.as_dict(), "entries": self.sizes[name]} for name, found in self.parameters.items()},
        }


class GradientVariance(Mapping[str, EstimatorVariance]):
    """What :func:`gradient_variance` found, by estimator."""

    def __init__(self, found: Mapping[str, EstimatorVariance]) -> None:
        self._found = dict(found)

    def __getitem__(self, estimator: str) -> EstimatorVariance:
        return self._found[estimator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def ratio(self, numerator: str, denominator: str) -> Estimate:
        """The total variance under one estimator relative to another's."""
        top, bottom = self[numerator], self[denominator]
        return ratio(top.total, bottom.total, top.confidence)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: found.as_dict() for name, found in self.items()}

    def __repr__(self) -> str:
        return f"GradientVariance({', '.join(f'{name}={found.total}' for name, found in self.items())})"


def gradient_variance(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int = 256,
    estimators: Iterable[str | Estimator] = ("shared", "flipout"),
    draws: int = 200,
    *,
    repeats: int | None = None,
    confidence: float = 0.9,
    micro_batch: int | None = None,
    seed: int = 0,
    on_draw: Callable[[], None] | None = None,
) -> GradientVariance:
    """The variance of the gradient of the mean weights over fresh batches and fresh noise, for each estimator.

        Σ_i Var(G_i),      G = (1/N) Σ_n ∇_W̄ L(x_n, W_n)

    The draws are cut into blocks; each block gives an unbiased variance by streaming moments, and their mean is reported with
    Student's t-interval. Costs ``draws`` forward and backward passes an estimator and the memory of two gradients beside the
    pass itself. The module's parameters, their ``.grad`` and its mode are left alone; it runs in the mode it is in.

    Args:
        net: the module with its noise. Frozen parameters are left out; scales of learnable noise are held fixed.
        loss_fn: ``loss_fn(net, batch)``, the *mean* loss of the batch's examples, a scalar.
        sample_batch: ``sample_batch(n, generator)``, a batch of ``n`` fresh examples; the generator is torch's on the CPU.
        batch_size: N.
        estimators: names among :data:`ESTIMATORS`, or estimators.
        draws: gradients an estimator, at least 2.
        repeats: into how many blocks the draws are cut, each of at least 2; None chooses. One block has no interval.
        confidence: of the intervals.
        micro_batch: most examples to run at once. A larger batch is run as equal micro-batches (of the largest divisor of N)
            that share one base perturbation, with independent signs: the same law as in one piece (the paper's appendix C).
            None runs the batch whole, except under Independent, whose dense weights it bounds.
        seed: of all batches and draws. Every draw has its own stream, and estimators meet the same batches.
        on_draw: called after each draw, for a progress bar.

    Returns:
        A mapping from the estimator's name to its :class:`EstimatorVariance`.

    Raises:
        ArgumentError: for a wrong argument, a loss that is no finite scalar, or a gradient that is not finite.
        UnsupportedNoiseError: for an estimator that cannot serve the noise.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 1), flipout.MultiplicativeGaussian(1.0))
        >>> def sample_batch(n, generator):
        ...     return torch.randn(n, 3, generator=generator)
        >>> def loss_fn(net, x):
        ...     return net(x).square().mean()
        >>> found = gradient_variance(net, loss_fn, sample_batch, batch_size=64, draws=40)
        >>> found["flipout"].total.value < found["shared"].total.value
        True
    """
    if not isinstance(net, Perturbed):
        raise ArgumentError(f"expected a flipout.Perturbed, got {type(net).__name__}; wrap the module with its noise first")
    _require_count("batch_size", batch_size, 1)
    _require_count("seed", seed, 0)
    sizes = block_sizes(draws, repeats)
    found = {}
    for name, estimator in named_estimators(estimators).items():
        blocks: list[dict[str, float]] = []
        index = iter(range(draws))
        with net.using(estimator):
            rows = rows_at_once(net, batch_size, micro_batch)
            for size in sizes:
                moments = Moments()
                for _ in range(size):
                    key = (batch_size, next(index))
                    moments.add(gradient(net, loss_fn, sample_batch, batch_size, rows, seed, key))
                    if on_draw is not None:
                        on_draw()
                blocks.append(_require_finite(moments.variance()))
        values = {parameter: tuple(block[parameter] for block in blocks) for parameter in blocks[0]}
        counts = {parameter: moments.mean[parameter].numel() for parameter in values}
        found[name] = EstimatorVariance(name, batch_size, draws, values, counts, confidence)
    return GradientVariance(found)


def gradient(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int,
    rows: int,
    seed: int,
    key: tuple[int, ...],
) -> dict[str, Tensor]:
    """One draw of the gradient of the mean weights, by parameter name, under the estimator that ``net`` has.

    Args:
        net, loss_fn, sample_batch, batch_size: as in :func:`gradient_variance`.
        rows: a divisor of ``batch_size``: how many examples run at once.
        seed, key: name the draw; the same names give the same batch, and the same noise under the same estimator.
    """
    data = stream(seed, *key)
    noise = stream(seed, *key, zlib.crc32(repr(net.estimator).encode()), device=_device(net))
    total: dict[str, Tensor] = {}
    for _ in micro_batches(net, batch_size // rows, rows, noise):
        loss = _require_scalar(loss_fn(net, sample_batch(rows, data)))
        for name, part in _differentiate(net, loss * (rows / batch_size)).items():
            total[name] = total[name] + part if name in total else part
    return total


def micro_batches(net: Perturbed, count: int, rows: int, generator: torch.Generator) -> Iterator[None]:
    """Holds, for each of ``count`` micro-batches in turn, a draw for its ``rows`` members.

    Members of all micro-batches share what members of one batch share under the estimator (a base perturbation, for flipout)
    and are otherwise drawn afresh, so that together they are one batch of ``count * rows`` members.

    Raises:
        ArgumentError: for several micro-batches under ``Flipout(per_step=True)``.
    """
    estimator = net.estimator
    if isinstance(estimator, Flipout) and estimator.per_step and count > 1:
        raise ArgumentError(
            f"{estimator} draws signs at every time step and has no members to draw afresh, so a batch cannot be run as micro-batches "
            "of one base perturbation; leave micro_batch out, or use Flipout()"
        )
    if not estimator.has_members and not estimator.per_token:  # nothing is shared between members
        for _ in range(count):
            with net.hold(rows, generator):
                yield
        return
    with net.hold(rows, generator) as draw:
        for i in range(count):
            if i and estimator.has_members and not isinstance(estimator, Shared):
                draw.resample(range(rows))
            yield


def rows_at_once(net: Perturbed, batch_size: int, micro_batch: int | None) -> int:
    """The largest divisor of the batch size that ``micro_batch``, or the memory of dense members, allows."""
    if micro_batch is not None:
        limit = _require_count("micro_batch", micro_batch, 1)
    elif isinstance(net.estimator, Independent):
        most = _DENSE_ENTRIES_CPU if _device(net).type == "cpu" else _DENSE_ENTRIES
        limit = max(1, most // sum(parameter.numel() for parameter in net.module.parameters()))
    else:
        limit = batch_size
    return next(rows for rows in range(min(limit, batch_size), 0, -1) if batch_size % rows == 0)


def named_estimators(estimators: Iterable[str | Estimator]) -> dict[str, Estimator]:
    """Estimators by name: a name stands for the estimator with its defaults, an estimator for itself.

    Raises:
        ArgumentError: for an unknown name, something that is no estimator, or one that appears twice.

    Example:
        >>> named_estimators(["shared", LowRank(4)])
        {'shared': Shared(), 'LowRank(rank=4)': LowRank(rank=4)}
    """
    if isinstance(estimators, (str, Estimator)):
        estimators = [estimators]
    found: dict[str, Estimator] = {}
    for each in estimators:
        if isinstance(each, str) and each in ESTIMATORS:
            name, estimator = each, ESTIMATORS[each]()
        elif isinstance(each, Estimator):
            name = next((name for name, default in ESTIMATORS.items() if default() == each), repr(each))
            estimator = each
        else:
            raise ArgumentError(f"unknown estimator {each!r}: choose among {', '.join(ESTIMATORS)}, or pass an estimator")
        if name in found:
            raise ArgumentError(f"estimator {name!r} is given twice")
        found[name] = estimator
    if not found:
        raise ArgumentError(f"no estimator given: choose among {', '.join(ESTIMATORS)}")
    return found


def stream(seed: int, *key: int, device: torch.device | None = None) -> torch.Generator:
    """A generator of its own for every (seed, key), independent of all others and of their order."""
    words = np.random.SeedSequence(entropy=seed, spawn_key=key).generate_state(2, np.uint32)
    generator = torch.Generator(device=device or torch.device("cpu"))
    return generator.manual_seed(int(words[0]) << 31 ^ int(words[1]))


def _differentiate(net: Perturbed, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ArgumentError("no parameter of the module requires a gradient, so there is no gradient to vary")
    parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if part is None else part
        for (name, parameter), part in zip(parameters.items(), parts, strict=True)
    }


def block_sizes(draws: int, repeats: int | None) -> list[int]:
    """Blocks of nearly equal size. The default keeps the interval within a tenth of the narrowest that any choice gives."""
    _require_count("draws", draws, 2)
    if repeats is None:
        repeats = max(1, min(20, max(draws // 4, min(draws // 2, 4))))
    if _require_count("repeats", repeats, 1) > draws // 2:
        raise ArgumentError(f"draws={draws} do not give {repeats} blocks of at least 2 draws each; lower repeats")
    return [draws // repeats + (i < draws % repeats) for i in range(repeats)]


def _device(net: Perturbed) -> torch.device:
    return next(net.module.parameters()).device


def _require_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r}: expected an integer of at least {least}")
    return value


def _require_scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"loss_fn returned {found}; expected the mean loss of the batch, a scalar tensor")
    if not loss.requires_grad:
        raise ArgumentError("the loss does not depend on a parameter through autograd; drop no_grad() and detach() from loss_fn")
    return loss


def _require_finite(variances: dict[str, float]) -> dict[str, float]:
    for name, value in variances.items():
        if not math.isfinite(value):
            raise ArgumentError(
                f"the gradient of {name!r} is not finite, so its variance does not exist; lower the noise, or check the loss "
                "and the batches for NaN"
            )
    return variances
