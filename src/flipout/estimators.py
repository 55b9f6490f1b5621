"""Estimators: how the members of a batch share a draw of the noise.

An estimator turns the shape of a parameter and its noise into a :class:`Sample`: a unit draw ε and the factors that make it
differ per member. Everything of a sample is free of gradients, so one sample can be held and applied again and again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, fields, replace

import torch
from torch import Tensor

from flipout.arguments import is_count, require_count
from flipout.errors import ArgumentError, BatchError, UnsupportedNoiseError
from flipout.noise import Gaussian, Noise
from flipout.samples import Sample, Target
from flipout.signs import draw_bits, draw_signs
from flipout.terms import Factor, Groups

__all__ = ["Estimator", "Flipout", "Independent", "LocalReparameterization", "LowRank", "Shared"]

#: Up to so many signs are drawn as numbers, at most 4 MB of them: unpacking small factors one by one would cost more time.
_FEW_SIGNS = 2**20


@dataclass(frozen=True)
class Estimator(ABC):
    """How the members of a batch share a draw. Frozen and stateless.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1), estimator=Shared())
        >>> net(torch.ones(4, 3)).std(0).max() < 1e-6
        tensor(True)
        >>> with net.using(Independent()):
        ...     net(torch.ones(4, 3)).std(0).max() > 1e-6
        tensor(True)
    """

    #: Whether members have weights of their own, which can be listed, held and resampled.
    has_members = True
    #: Whether signs are drawn afresh for each token, at each use of a weight.
    per_token = False

    def check(self, noise: Noise, name: str) -> None:  # noqa: B027  (most serve every noise)
        """Raises UnsupportedNoiseError if the estimator would be biased or undefined under ``noise``."""

    @abstractmethod
    def sample(self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None) -> list[Sample]:
        """Draws one sample for each target, for ``members`` members (None: signs come later, per token)."""

    def resample(
        self, targets: Sequence[Target], samples: Sequence[Sample], members: Sequence[int], generator: torch.Generator | None
    ) -> list[Sample]:
        """Fresh draws for some members of existing samples; what members share stays."""
        fresh = self.sample(targets, len(members), generator)
        return [old.with_members(members, new) for old, new in zip(samples, fresh, strict=True)]


@dataclass(frozen=True, repr=False)
class Flipout(Estimator):
    """One base perturbation for all members, times a random rank-one sign matrix each.

        W_n = W̄ + ΔW ∘ (r_n s_nᵀ),      r_n ∈ {±1}^out,  s_n ∈ {±1}^in

    Wen et al. 2018, Eq. 4. Unbiased for noise that is symmetric about zero and independent across weights; each member's
    weights have exactly the noise's law, and members are uncorrelated given nothing. Costs two matrix products instead of one.

    With ``bases=K`` the N members stand in K groups of N/K, one after the other, each group with a ΔW of its own. In the terms of
    Theorem 2 the variance of the gradient becomes

        α/N + (1/K - 1/N) γ

    instead of α/N + (1 - 1/N) γ; at K = N the members are independent. The products are as many and as large, in one batch; K
    times as much noise is drawn and kept. :func:`flipout.variance.suggest_bases` says which K to take.

    With ``noise_dtype`` the second product runs in another precision: ΔW and the operand that it meets are rounded to it, the signs
    are exact, and the sum with the mean's product is in the mean's precision. See the page on estimators for what that does to the
    law. Where a device multiplies no faster in it, which is measured once, the noise keeps the mean's precision, and a
    :class:`flipout.errors.PrecisionWarning` says so.

    Args:
        granularity: ``"example"`` (default) gives each example of the batch one set of weights, whatever the rank of an
            operation's input. ``"token"`` draws new signs for every row of every operation: what mixtures of experts need, and no
            longer one function per example.
        per_step: whether recurrent layers and cells draw new signs at every time step, instead of one set a sequence. ΔW stays
            one draw. Members then have no weights to list, and other layers are as before.
        bases: K, a positive integer that divides the number of members.
        noise_dtype: ``torch.bfloat16``, ``torch.float16``, or None for the precision of the mean.

    Raises:
        ArgumentError: if ``granularity`` is neither, ``bases`` is no positive integer, ``noise_dtype`` is not one of these, or
            several bases are asked for where there are no members to group (``"token"``, ``per_step``).

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1), Flipout())
        >>> with net.hold(members=4) as draw:
        ...     own = torch.stack([draw.weights(n)["weight"] - net.module.weight for n in range(4)])
        >>> torch.allclose(own.abs()[0], own.abs()[1], atol=1e-6)  # one base perturbation, in other signs
        True
    """

    granularity: str = "example"
    per_step: bool = False
    bases: int = 1
    noise_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("example", "token"):
            raise ArgumentError(f'Flipout(granularity={self.granularity!r}): choose "example" or "token"')
        require_count("bases", self.bases, 1)
        if self.bases > 1 and (self.granularity == "token" or self.per_step):
            raise ArgumentError(
                f"{self!r}: bases are for groups of members, and signs that are drawn per token or per step belong to no member; "
                "take bases=1"
            )
        if self.noise_dtype not in (None, torch.bfloat16, torch.float16):
            raise ArgumentError(
                f"Flipout(noise_dtype={self.noise_dtype!r}): choose torch.bfloat16, torch.float16, or None for the mean's own"
            )

    def __repr__(self) -> str:
        always = ("granularity", "per_step")
        said = [f for f in fields(self) if f.name in always or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in said)})"

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        return self.granularity == "token"

    @property
    def has_members(self) -> bool:  # type: ignore[override]
        return not (self.per_token or self.per_step)

    def check(self, noise: Noise, name: str) -> None:
        if not noise.symmetric:
            raise UnsupportedNoiseError(
                f"Flipout multiplies the perturbation by random signs, so its law must be symmetric about zero, and {noise} on "
                f"{name!r} is not; use Independent() or Shared(), or a symmetric noise such as DropConnect(0.5)"
            )

    def sample(self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None) -> list[Sample]:
        groups = self.groups(members)
        units = _units(targets, generator, 1 if groups is None else self.bases)
        factors = self._factors(targets, members, generator)
        return [
            Sample(unit, (signs,), groups is not None, target.noise.fixed_scale is not None, groups)
            for unit, signs, target in zip(units, factors, targets, strict=True)
        ]

    def groups(self, members: int | None) -> Groups | None:
        """How ``members`` members share the bases; None where there is one.

        Raises:
            BatchError: if the bases do not divide the members.
        """
        if self.bases == 1 or members is None:
            return None
        if members % self.bases:
            raise BatchError(
                f"{self} divides the members of a draw into {self.bases} groups of one size, and the draw has {members} members: "
                f"take a batch of a multiple of {self.bases} rows, or fewer bases"
            )
        return Groups(members // self.bases)

    def resample(
        self, targets: Sequence[Target], samples: Sequence[Sample], members: Sequence[int], generator: torch.Generator | None
    ) -> list[Sample]:
        index = torch.as_tensor(list(members), device=samples[0].unit.device)
        put: dict[int, Tensor] = {}  # a bias goes on sharing the very signs of its matrix

        def renewed(old: Factor, new: Factor) -> Factor:
            if id(old.values) not in put:
                put[id(old.values)] = old.put(index, new)
            return replace(old, values=put[id(old.values)], repeat=1)

        fresh = self._factors(targets, len(members), generator)
        return [
            replace(old, factors=(tuple(renewed(o, n) for o, n in zip(old.factors[0], new, strict=True)),))
            for old, new in zip(samples, fresh, strict=True)
        ]

    def _factors(
        self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None
    ) -> list[tuple[Factor, ...]]:
        """The sign factors of each target, from one stream of random words."""
        own = [target.signs() if target.matrix is None else [] for target in targets]
        counts = [math.prod(sizes) for places in own for _, sizes in places]
        if members is None:
            return [tuple([Factor.per_token(axes, sizes) for axes, sizes in target.signs()]) for target in targets]
        mean, packed = targets[0].mean, members * sum(counts) > _FEW_SIGNS
        if packed:
            values = iter(draw_bits(members, counts, generator=generator, device=mean.device))
        else:
            values = iter(draw_signs(members, counts, generator=generator, device=mean.device, dtype=mean.dtype))
        drawn = [tuple([Factor(next(values), axes, sizes, packed, signs=True) for axes, sizes in places]) for places in own]
        rows = {target.name: factors[0] for target, factors in zip(targets, drawn, strict=True) if factors}
        return [
            factors if target.matrix is None else (rows[target.matrix],) for target, factors in zip(targets, drawn, strict=True)
        ]


@dataclass(frozen=True)
class Shared(Estimator):
    """One perturbation for the whole batch: the usual cheap scheme, whose gradient variance stops falling with N.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1), Shared())
        >>> y = net(torch.ones(4, 3))
        >>> torch.allclose(y[0], y[1])
        True
    """

    def sample(self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None) -> list[Sample]:
        units = _units(targets, generator)
        return [Sample(u, scaled=t.noise.fixed_scale is not None) for u, t in zip(units, targets, strict=True)]

    def resample(
        self, targets: Sequence[Target], samples: Sequence[Sample], members: Sequence[int], generator: torch.Generator | None
    ) -> list[Sample]:
        raise UnsupportedNoiseError(
            "under Shared() all members have one perturbation, so none of them can be resampled alone; hold a new draw"
        )


@dataclass(frozen=True)
class Independent(Estimator):
    """An independent, dense perturbation for every member: exact, the oracle, and N times the weights' memory.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1), Independent())
        >>> with net.hold(members=4) as draw:
        ...     torch.equal(draw.weights(0)["weight"], draw.weights(1)["weight"])
        False
    """

    def sample(self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None) -> list[Sample]:
        return [_independent(target, members or 0, generator) for target in targets]


@dataclass(frozen=True)
class LocalReparameterization(Estimator):
    """Samples the pre-activations of linear layers from their exact Gaussian law, independently per example.

        y_n ~ N(W̄ x_n, (σ ∘ σ)(x_n ∘ x_n))

    Kingma et al. 2015; the paper's Eq. 2. Exact and lower in variance than any weight sample, for Gaussian noise and weights
    that each example uses once. It refuses what shares a weight within an example (convolutions, sequences, a layer called
    twice), where independent pre-activations would be biased. Vectors (biases, gains) and positions [1, L, d] get an independent
    draw per example.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1), LocalReparameterization())
        >>> net(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    bases: InitVar[int] = 1

    has_members = False

    def __post_init__(self, bases: int) -> None:
        if bases != 1:
            raise UnsupportedNoiseError(
                f"LocalReparameterization(bases={bases!r}): it draws the noise of each result by itself, so there is no base "
                "perturbation to have several of; use Flipout(bases=…)"
            )

    def check(self, noise: Noise, name: str) -> None:
        if not isinstance(noise, Gaussian):
            raise UnsupportedNoiseError(
                f"LocalReparameterization() knows the law of a pre-activation for Gaussian noise only, and {name!r} has {noise}; "
                "use Flipout(), or Gaussian noise"
            )

    def sample(self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None) -> list[Sample]:
        return [
            _independent(target, members or 0, generator)
            if target.mean.dim() < 2 or (target.mean.dim() > 2 and target.mean.shape[0] == 1)  # vectors, positions [1, L, d]
            else Sample(torch.ones((), dtype=target.mean.dtype, device=target.mean.device), ((Factor.of_result(),),))
            for target in targets
        ]


@dataclass(frozen=True)
class LowRank(Estimator):
    """A random matrix of low rank per member, for evolution strategies.

        ΔW_n = σ ∘ (a_n b_nᵀ) / √rank,      a_n [out, rank], b_n [in, rank] unit draws of the noise

    Entries have the noise's mean and variance, not its law (a product of Gaussians has heavier tails). No base is shared, so
    members are independent. With one fixed scale for all entries the perturbation costs a product of width ``rank``. Vectors get an
    independent draw per member. Where the axes are not those of a matrix, rows are the first axis and columns all others.

    Args:
        rank: a positive integer.

    Raises:
        ArgumentError: if ``rank`` is not a positive integer.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(5, 6), flipout.Gaussian(0.1), LowRank(2))
        >>> with net.hold(members=4) as draw:
        ...     own = draw.weights(0)["weight"] - net.module.weight
        >>> torch.linalg.matrix_rank(own.detach(), atol=1e-4)
        tensor(2)
    """

    rank: int = 1

    def __post_init__(self) -> None:
        if not is_count(self.rank):
            raise ArgumentError(f"LowRank(rank={self.rank!r}): rank is a positive integer")

    def check(self, noise: Noise, name: str) -> None:
        if not noise.standardized:
            raise UnsupportedNoiseError(
                f"LowRank multiplies two unit draws of variance one, so it takes Gaussian or Rademacher noise, and {name!r} has "
                f"{noise}"
            )

    def sample(self, targets: Sequence[Target], members: int | None, generator: torch.Generator | None) -> list[Sample]:
        return [self._sample_one(target, members or 0, generator) for target in targets]

    def _sample_one(self, target: Target, members: int, generator: torch.Generator | None) -> Sample:
        mean = target.mean
        if mean.dim() < 2:
            return _independent(target, members, generator)
        rows, columns = mean.shape[0], mean.shape[1:]
        sizes = (rows, columns.numel())
        a, b = (
            target.noise.unit(torch.Size([self.rank, members, size]), generator=generator, dtype=mean.dtype, device=mean.device)
            for size in sizes
        )
        factors = tuple(
            (
                Factor(a[k], (0,), (rows,), packed=False),
                Factor(b[k], tuple(range(1, mean.dim())), tuple(columns), packed=False),
            )
            for k in range(self.rank)
        )
        return Sample(torch.full((), 1 / math.sqrt(self.rank), dtype=mean.dtype, device=mean.device), factors)


def _units(targets: Sequence[Target], generator: torch.Generator | None, bases: int = 1) -> list[Tensor]:
    """One unit draw a target (``bases`` of them on a new first axis, if several), times the fixed scale if its noise has one.

    Targets with one law, dtype and device are drawn and scaled as one stream.
    """
    units: dict[int, Tensor] = {}
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i, target in enumerate(targets):
        groups.setdefault((id(target.noise), target.mean.dtype, target.mean.device), []).append(i)
    for (_, dtype, device), group in groups.items():
        means = [targets[i].mean for i in group]
        noise = targets[group[0]].noise
        shapes = [mean.shape if bases == 1 else torch.Size([bases, *mean.shape]) for mean in means]
        if noise.standardized:
            counts = [bases * mean.numel() for mean in means]
            stream = noise.unit(torch.Size([sum(counts)]), generator=generator, dtype=dtype, device=device)
            if noise.fixed_scale is not None:
                stream.mul_(noise.fixed_scale)
            drawn = [u.view(shape) for u, shape in zip(torch.split_with_sizes(stream, counts), shapes, strict=True)]
        else:
            drawn = [noise.unit(shape, generator=generator, dtype=dtype, device=device) for shape in shapes]
        units.update(zip(group, drawn, strict=True))
    return [units[i] for i in range(len(targets))]


def _independent(target: Target, members: int, generator: torch.Generator | None) -> Sample:
    mean = target.mean
    shape = torch.Size([members, *mean.shape])
    unit = target.noise.unit(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return Sample(unit, per_member=True)
