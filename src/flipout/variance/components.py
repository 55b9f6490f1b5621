"""α, β and γ of Theorem 2, which say what every batch size gains under every estimator (Wen et al. 2018, Sec. 3.2).

With G_x an entry of the gradient of one example x, the base perturbation ΔŴ and the perturbation ΔW that signs make of it:

    α = Var_x(E[G_x | x]) + E_x[Var_ΔW(G_x | x)]                          variance of one example's gradient           (Eq. 7)
    β = E_{x,x',ΔŴ}[Cov_ΔW(G_x, G_x' | x, x', ΔŴ)]                        what two examples share by their signs        (Eq. 8)
    γ = E_{x,x'}[Cov_ΔŴ(E[G_x | x, ΔŴ], E[G_x' | x', ΔŴ] | x, x')]        what they share by the base perturbation      (Eq. 9)

    independent: α/N        shared: α/N + (1 - 1/N)(β + γ)        flipout: α/N + (1 - 1/N) γ                     (Eq. 10-12)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.buffers import batch_statistics
from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, Shared
from flipout.gradients import LossFunction, SampleBatch, gradient_pair, rows_at_once
from flipout.intervals import Estimate, estimate_mean
from flipout.perturb import Perturbed
from flipout.storage.blocks import BlockFile
from flipout.variance.identity import describe_net
from flipout.variance.measure import Parts, add_parts, block_sizes, check_net, check_parts, require_finite_block
from flipout.variance.sampling import check_loss
from flipout.variance.variance_table import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["VarianceComponents", "variance_components"]


@dataclass(frozen=True)
class VarianceComponents:
    """α, β and γ, each summed over the entries of the gradient, in the units of a squared gradient.

    Attributes:
        blocks: for each parameter or part, the unbiased (α, β, γ) of each block of draws.
        sizes: the number of entries of each.
        batch_size: of the gradients that they were estimated from.
        draws: base perturbations, under each of the two estimators.
        confidence: of the intervals.
        parts: names in ``blocks`` that the sum over all weights leaves out.

    Example:
        >>> found = VarianceComponents({"w": ((100.0, 4.0, 0.1), (102.0, 5.0, 0.1))}, {"w": 3}, batch_size=64, draws=40)
        >>> found.alpha.value, found.beta.value
        (101.0, 4.5)
    """

    blocks: dict[str, tuple[tuple[float, float, float], ...]]
    sizes: dict[str, int]
    batch_size: int
    draws: int
    confidence: float = 0.9
    parts: tuple[str, ...] = ()

    @property
    def alpha(self) -> Estimate:
        """Of all weights."""
        return self.of()["alpha"]

    @property
    def beta(self) -> Estimate:
        """Of all weights."""
        return self.of()["beta"]

    @property
    def gamma(self) -> Estimate:
        """Of all weights."""
        return self.of()["gamma"]

    def of(self, names: Iterable[str] | None = None) -> dict[str, Estimate]:
        """``alpha``, ``beta`` and ``gamma`` summed over the named parameters or parts (None: all parameters).

        Raises:
            ArgumentError: for a name that was not measured.
        """
        columns = zip(*self._sums(names), strict=True)
        return {
            name: estimate_mean(column, self.confidence) for name, column in zip(("alpha", "beta", "gamma"), columns, strict=True)
        }

    def predict(self, estimator: str, batch_size: int, names: Iterable[str] | None = None, *, bases: int = 1) -> Estimate:
        """The variance that Eq. 10-12 give for ``"independent"``, ``"shared"`` or ``"flipout"`` at a batch size.

        With K bases two examples of flipout share one with probability (N/K - 1)/(N - 1), and (1 - 1/N) γ becomes (1/K - 1/N) γ.
        Linear in the components, hence unbiased; the interval comes from the blocks, so it knows how their errors go together.

        Raises:
            ArgumentError: for another estimator, a wrong batch size, or bases that do not divide it.
        """
        shared_part = {"independent": (0, 0), "shared": (1, 1), "flipout": (0, 1)}
        if estimator not in shared_part:
            raise ArgumentError(f"Theorem 2 says nothing of {estimator!r}: choose {', '.join(shared_part)}")
        n = require_count("batch_size", batch_size, 1)
        k = require_count("bases", bases, 1)
        if n % k:
            raise ArgumentError(f"bases={k} does not divide batch_size={n}")
        b, c = shared_part[estimator]
        pairs = 1 / k - 1 / n if estimator == "flipout" else 1 - 1 / n
        values = [alpha / n + (1 - 1 / n) * b * beta + pairs * c * gamma for alpha, beta, gamma in self._sums(names)]
        return estimate_mean(values, self.confidence)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` gives the same back."""
        return {**asdict(self), **{name: found.as_dict() for name, found in self.of().items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> VarianceComponents:
        """What :meth:`as_dict` wrote."""
        blocks = {name: tuple((a, b, c) for a, b, c in block) for name, block in found["blocks"].items()}
        plain = {key: found[key] for key in ("sizes", "batch_size", "draws", "confidence")}
        return cls(blocks, **plain, parts=tuple(found["parts"]))

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each parameter or part and component.

        Raises:
            ArgumentError: if pandas is not installed.
        """
        return table(
            {
                "parameter": name,
                "component": component,
                "value": float(e),
                "low": e.low,
                "high": e.high,
                "entries": self.sizes[name],
            }
            for name in self.blocks
            for component, e in self.of([name]).items()
        )

    def plot(self, batch_sizes: Sequence[int], names: Iterable[str] | None = None, axes: Axes | None = None) -> Axes:
        """Draws what is predicted at these batch sizes on log-log axes; makes a figure of its own if given none.

        Raises:
            ArgumentError: if matplotlib is not installed.
        """
        from flipout.variance.curve_plot import plot_predictions

        chosen = None if names is None else list(names)
        names = ("shared", "flipout", "independent")
        predicted = {name: [self.predict(name, n, chosen) for n in batch_sizes] for name in names}
        return plot_predictions(predicted, batch_sizes, axes)

    def _sums(self, names: Iterable[str] | None) -> list[tuple[float, ...]]:
        """(α, β, γ) of each block, summed over the names."""
        names = [name for name in self.blocks if name not in self.parts] if names is None else list(names)
        unknown = [name for name in names if name not in self.blocks]
        if unknown or not names:
            raise ArgumentError(f"no parameter {', '.join(map(repr, unknown))}: there are {', '.join(self.blocks)}")
        by_block = zip(*(self.blocks[name] for name in names), strict=True)
        return [tuple(math.fsum(column) for column in zip(*block, strict=True)) for block in by_block]

    def __str__(self) -> str:
        return ", ".join(f"{name} {found}" for name, found in self.of().items())


def variance_components(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    draws: int = 200,
    *,
    batch_size: int = 256,
    repeats: int | None = None,
    parts: Parts | None = None,
    confidence: float = 0.9,
    micro_batch: int | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    on_draw: Callable[[], None] | None = None,
) -> VarianceComponents:
    """Unbiased α, β and γ with intervals, by nested sampling: base perturbations, signs within them, examples within those.

    For each of ``draws`` base perturbations two batches of N fresh examples give the gradients f, f' under flipout (each example
    with signs of its own), and for as many others g, g' under shared noise (all examples of both with one perturbation). Given what
    a pair shares its two gradients are independent, so with the mean gradient μ

        E⟨f, f'⟩ = ‖μ‖² + γ        E⟨g, g'⟩ = ‖μ‖² + β + γ        N/2 · E‖f - f'‖² = α - γ        E⟨f̄_k, f̄_l⟩ = ‖μ‖²,  k ≠ l

    with f̄ = (f + f')/2. Each block of K bases estimates these by their averages, ‖μ‖² by the average over its pairs k ≠ l, so

        γ̂ = avg⟨f, f'⟩ - avg⟨f̄_k, f̄_l⟩,     β̂ = avg⟨g, g'⟩ - avg⟨ḡ_k, ḡ_l⟩ - γ̂,     α̂ = N/2 · avg‖f - f'‖² + γ̂

    are unbiased for any N and K ≥ 2; they are the components of a nested analysis of variance, and may come out negative where the
    truth is near zero. A shift of all gradients changes nothing, so the first of a block is taken off before the products.

    Its own variance, for gradients near normal, with D bases in all and the covariance matrices A and Γ of which α - γ and γ are
    the traces:

        Var(γ̂) ≈ (2 ‖Γ‖² + 2 tr(ΓA)/N + ‖A‖²/N²) / D                     (Frobenius norms)

    and likewise for β + γ under shared noise. So N should be large enough that ‖A‖/N is not far above ‖Γ‖; beyond that only more
    bases help. Intervals are Student's, over blocks.

    Costs ``4 * draws`` gradients of batches of N.

    Args:
        net, loss_fn, sample_batch, parts, confidence, micro_batch, seed: as in :func:`flipout.variance.gradient_variance`. The
            net's own estimator does not matter.
        draws: D, base perturbations under each of the two estimators, at least 2.
        batch_size: N.
        repeats: into how many blocks the bases are cut, each of at least 2; None chooses.
        checkpoint: as in :func:`flipout.variance.variance_curve`.
        on_draw: called after each pair of gradients, ``2 * draws`` times.

    Raises:
        ArgumentError, SaveError, UnsupportedNoiseError: as :func:`flipout.variance.variance_curve`.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(8, 1, bias=False), flipout.MultiplicativeGaussian(1.0))
        >>> def sample_batch(n, generator):
        ...     return torch.randn(n, 8, generator=generator)
        >>> def loss_fn(net, x):
        ...     return net(x).square().mean()
        >>> found = variance_components(net, loss_fn, sample_batch, draws=80, batch_size=32)
        >>> found.alpha > found.beta > found.gamma
        True
    """
    check_net(net, seed, confidence)
    require_count("batch_size", batch_size, 1)
    norms = batch_statistics(net.module)
    if norms:
        raise ArgumentError(
            f"{norms[0]!r} normalises by the statistics of its batch, so the loss of an example depends on the other examples, and "
            "the components are defined for examples that do not: call eval() on the layer, which then has its running statistics, "
            "or measure variance_curve"
        )
    parts = check_parts(net, parts)
    sizes = block_sizes(draws, repeats)
    check_loss(net, loss_fn, sample_batch, seed)
    question = {
        "what": "variance_components",
        "batch_size": batch_size,
        "draws": draws,
        "repeats": repeats,
        "parts": {name: [parameter, str(rows)] for name, (parameter, rows) in parts.items()},
        "micro_batch": micro_batch,
        "seed": seed,
        **describe_net(net),
    }
    saved = BlockFile(None if checkpoint is None else Path(checkpoint), question)
    estimators: dict[str, Estimator] = {"flipout": Flipout(), "shared": Shared()}
    for name, estimator in estimators.items():
        with net.using(estimator):
            rows = rows_at_once(net, batch_size, micro_batch)
            for i, size in enumerate(sizes):
                if i < len(saved.of(name)):
                    _report(on_draw, size)
                    continue
                sums = _PairSums()
                for index in range(sum(sizes[:i]), sum(sizes[: i + 1])):
                    pair = gradient_pair(net, loss_fn, sample_batch, batch_size, rows, seed, (batch_size, index, 1))
                    sums.add(add_parts(pair[0], parts), add_parts(pair[1], parts))
                    _report(on_draw, 1)
                saved.add(name, sums.estimates())
    return _components(net, saved.of("flipout"), saved.of("shared"), batch_size, draws, confidence, parts)


def _report(on_draw: Callable[[], None] | None, times: int) -> None:
    for _ in range(times if on_draw is not None else 0):
        on_draw()  # type: ignore[misc]


class _PairSums:
    """For pairs (f, f') of gradients: what their average products and differences need, without keeping any but a sum."""

    def __init__(self) -> None:
        self.count = 0
        self._first: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._differences: dict[str, Tensor] = {}

    def add(self, f: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name in f:
            if self.count == 1:
                self._first[name] = (f[name] + other[name]) / 2
                self._sum[name] = torch.zeros_like(f[name])
                zero = torch.zeros((), dtype=torch.float64, device=f[name].device)
                self._products[name], self._squares[name], self._differences[name] = zero, zero.clone(), zero.clone()
            one, two = f[name] - self._first[name], other[name] - self._first[name]
            mean = (one + two) / 2
            self._sum[name] += mean
            self._products[name] += (one * two).sum().double()
            self._squares[name] += mean.square().sum().double()
            self._differences[name] += (one - two).square().sum().double()

    def estimates(self) -> dict[str, tuple[float, float]]:
        """For each name: the covariance of a pair's gradients, and half the average squared norm of their difference."""
        k = self.count
        found = {}
        for name in self._sum:
            across = (self._sum[name].double().square().sum() - self._squares[name]) / (k * (k - 1))
            found[name] = ((self._products[name] / k - across).item(), self._differences[name].item() / (2 * k))
            require_finite_block(dict.fromkeys([name], sum(found[name])))
        return found


def _components(
    net: Perturbed,
    flipout: Sequence[Mapping[str, Sequence[float]]],
    shared: Sequence[Mapping[str, Sequence[float]]],
    batch_size: int,
    draws: int,
    confidence: float,
    parts: Parts,
) -> VarianceComponents:
    blocks: dict[str, tuple[tuple[float, float, float], ...]] = {}
    for name in flipout[0]:
        triples = []
        for f, g in zip(flipout, shared, strict=True):
            gamma, within = f[name]
            triples.append((batch_size * within + gamma, g[name][0] - gamma, gamma))
        blocks[name] = tuple(triples)
    if all(alpha == 0 for block in blocks.values() for alpha, _, _ in block):
        raise ArgumentError("the gradient does not vary: neither noise nor batches reach it, so there are no components")
    parameters = dict(net.module.named_parameters())
    sizes = {name: (parameters[parts[name][0]][parts[name][1]] if name in parts else parameters[name]).numel() for name in blocks}
    return VarianceComponents(blocks, sizes, batch_size, draws, confidence, tuple(parts))
