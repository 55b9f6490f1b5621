"""Gradients from losses alone: each example of a batch has a direction of its own, and two passes tell the slope along it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flipout.arguments import require_count
from flipout.buffers import evaluating, kept_buffers
from flipout.draw import Draw
from flipout.errors import ArgumentError, BatchError, DrawError, NotFiniteError
from flipout.estimators import Estimator, Flipout
from flipout.evolution.counters import Counters
from flipout.evolution.members import Members
from flipout.evolution.noise import Directions, Law
from flipout.evolution.population import perturbed_net
from flipout.evolution.statistics import BatchGuard
from flipout.in_place import in_place
from flipout.samples import Sample, Target
from flipout.sharded import sharded_as

__all__ = ["Losses", "ZerothOrder"]

#: ``losses(module, batch) -> losses [rows]``, one for each row of the batch; smaller is better.
Losses = Callable[[Any, Any], Tensor]


class ZerothOrder:
    """The gradient of a mean loss from losses alone, with a direction for each example.

        ∇W̄ ≈ 1/N Σ_n (L_n(W̄ + ΔW_n) - L_n(W̄ - ΔW_n)) / (2 σ²) ΔW_n

    the two-point estimator (SPSA, Spall 1992) as MeZO has it (Malladi et al. 2023, Def. 1), with a direction ΔW_n for each example
    instead of one for the batch (as GRZO has, Tan et al. 2026). It is unbiased for the gradient of the loss smoothed by the noise,
    and for that of the loss itself where the loss is quadratic. Two forward passes of the batch, whatever its size; memory is that
    of inference, one gradient, and the signs of each example: the base perturbation lies where the gradient will be.

    Passes run in evaluation mode: with dropout, the two would differ by more than the perturbation. All noise is a function of
    (seed, generation), so a call can be had again; each call of :meth:`backward` is a generation.

    Args:
        module: any module that the library perturbs; its trained parameters are perturbed.
        std: σ, in units of the weights.
        directions: ``"example"``, or k directions that each see the whole batch, in a batch k times as large. MeZO is
            ``directions=1, base="gaussian"``; FZOO (Dang et al. 2025) is ``directions=8, antithetic=False, normalize=True``.
        antithetic: W̄ + ΔW and W̄ - ΔW; else W̄ + ΔW and W̄, whose pass is shared by all directions.
        normalize: divide by the standard deviation of the losses under the k directions, and multiply by σ, as FZOO does: the
            length of ``.grad`` no longer depends on the scale of the loss.
        estimator: :class:`flipout.Flipout`, :class:`flipout.LowRank`, or :class:`flipout.Independent` (dense).
        base: ``"rademacher"`` or ``"gaussian"``, as for :class:`~flipout.evolution.EvolutionStrategy`.
        seed: of all noise.
        chunk: directions at once where there are k of them; None for all.
        include, exclude, batch_dim, fallback: as in :class:`flipout.Perturbed`.

    Raises:
        ArgumentError: for a std that is not positive, other directions, an unknown base, ``normalize`` without two directions.
        UnsupportedNoiseError: for an estimator that has no members.

    Example:
        >>> import torch, flipout
        >>> module = torch.nn.Linear(3, 1)
        >>> zeroth = flipout.evolution.ZerothOrder(module, std=0.01)
        >>> optimiser = torch.optim.SGD(module.parameters(), lr=0.02)
        >>> def losses(module, batch):
        ...     return (module(batch["x"]) - batch["y"]).square().sum(1)
        >>> batch = {"x": torch.randn(64, 3), "y": torch.ones(64, 1)}
        >>> for _ in range(200):
        ...     optimiser.zero_grad()
        ...     loss = zeroth.backward(losses, batch)
        ...     optimiser.step()
        >>> float(loss) < 0.05
        True
    """

    def __init__(
        self,
        module: nn.Module,
        std: float = 1e-3,
        *,
        directions: str | int = "example",
        antithetic: bool = True,
        normalize: bool = False,
        estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
        base: str = "rademacher",
        seed: int = 0,
        chunk: int | None = None,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        batch_dim: int = 0,
        fallback: str | None = None,
    ) -> None:
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not math.isfinite(std) or std <= 0:
            raise ArgumentError(f"std={std!r}: a standard deviation is positive and finite")
        if directions != "example":
            if isinstance(directions, str):
                raise ArgumentError(f'directions={directions!r}: choose "example", or a number of directions for the batch')
            require_count("directions", directions, 1)
        if normalize and (isinstance(directions, str) or directions < 2):
            raise ArgumentError(
                f"normalize=True with directions={directions!r}: the standard deviation is over the losses of the batch under "
                "several directions; pass directions=2 or more, or normalize=False"
            )
        self._net = perturbed_net(module, base, estimator, include, exclude, batch_dim, fallback)
        self._law = Law(estimator, base, float(std))
        self._counters = Counters(require_count("seed", seed, 0))
        self.std, self.seed, self.base = float(std), seed, base
        self.directions, self.antithetic, self.normalize = directions, antithetic, normalize
        self.chunk = None if chunk is None else require_count("chunk", chunk, 1)
        self.generation = 0
        self._open = False

    @property
    def module(self) -> nn.Module:
        """The module, whose parameters are the means."""
        return self._net.module

    @property
    def estimator(self) -> Estimator:
        """How examples share a draw."""
        return self._net.estimator

    def backward(self, losses: Losses, batch: Any, *, scale: float = 1.0, examples: int | None = None) -> Tensor:
        """Adds the estimated gradient of the mean loss to ``.grad``, as ``loss.backward()`` would, and ends the generation.

        Args:
            losses: ``losses(module, batch) -> [rows]``, a loss for each row of the batch it is given, called once a pass. With k
                directions it is given the batch repeated, ``[k, N]`` in direction-major blocks, and may return one loss a direction
                instead of one a row, for objectives that are no mean over examples.
            batch: a tensor, or tensors in dicts, lists and tuples, whose dimension ``batch_dim`` counts the examples.
            scale: of the gradient, such as 1 / steps of accumulation.
            examples: how many the batch has, where its tensors do not tell.

        Returns:
            The mean loss, float64: over both passes with antithetic directions, else that of W̄.

        Raises:
            BatchError: if the batch does not tell how many examples it has, or ``losses`` returns another number.
            NotFiniteError: if a loss is not finite. Gradients and the generation are as before.
            DrawError: inside another ``backward``.
        """
        if self._open:
            raise DrawError("backward() inside backward(): return the losses first")
        self._open = True
        try:
            with torch.no_grad(), kept_buffers(self.module), evaluating(self.module):
                found, weights, samples = self._measure(losses, batch, examples)
                self._add(weights * scale, samples)
        finally:
            self._open = False
        self.generation += 1
        return found

    def direction(self, generation: int, n: int) -> dict[str, Tensor]:
        """ΔW_n of a generation by parameter name: example ``n``'s, or that of the n-th of k directions."""
        directions = self._directions(require_count("n", n, 0), n + 1, require_count("generation", generation, 0))
        one = Members(self._net, directions, directions.samples(self._targets()))
        return one.weighted_sum(torch.ones(1, device=self._net.sites[0].mean.device))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside module and optimiser: numbers and names, for ``torch.load(weights_only=True)``."""
        return {"generation": self.generation, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a saved generation; the noise from there on is what it would have been.

        Raises:
            ArgumentError: if the state is of other settings, whose noise would differ.
        """
        other = {name: (state.get(name), value) for name, value in self._identity().items() if state.get(name) != value}
        if other or "generation" not in state:
            told = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in other.items()) or "it has no generation"
            raise ArgumentError(f"the state is of other directions: {told}. Make ZerothOrder as it was made then")
        self.generation = require_count("generation", state["generation"], 0)

    def __repr__(self) -> str:
        return (
            f"ZerothOrder(std={self.std}, directions={self.directions!r}, antithetic={self.antithetic}, "
            f"normalize={self.normalize}, estimator={self.estimator}, base={self.base!r}, generation={self.generation})"
        )

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _measure(self, losses: Losses, batch: Any, examples: int | None) -> tuple[Tensor, Tensor, list[Sample] | None]:
        """The mean loss, what each direction counts in the gradient, and the samples where all directions ran at once."""
        own = self.directions == "example"
        if own:
            count = _examples(batch, self._net.batch_dim) if examples is None else require_count("examples", examples, 1)
        else:
            count = int(self.directions)
        size = count if own else min(self.chunk or count, count)
        plain = None if self.antithetic else self._checked(losses(self.module, batch), count if own else 1, own)
        sides, samples = [], None
        for start in range(0, count, size):
            stop = min(start + size, count)
            directions = self._directions(start, stop, self.generation)
            samples = directions.samples(self._targets())
            rows = batch if own or stop - start == 1 else _repeated(batch, stop - start, self._net.batch_dim)
            sides.append(self._sides(losses, rows, directions, samples))
        one, other = (torch.cat(side) for side in zip(*sides, strict=True))
        if plain is not None:
            other = plain.expand(count)
        weights = (one - other) / ((2 if self.antithetic else 1) * self.std**2 * count)
        if self.normalize:
            weights = weights * self._normalizer(torch.cat([one, other]) if self.antithetic else one)
        loss = ((one + other) / 2 if self.antithetic else other).mean()
        return loss, weights, samples if size == count else None

    def _sides(self, losses: Losses, rows: Any, directions: Directions, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """The loss of each direction at W̄ + ΔW and at W̄ - ΔW (or the first twice); the samples are afterwards as before."""
        one = self._pass(losses, rows, directions, samples)
        if not self.antithetic:
            return one, one
        _negate(samples)
        other = self._pass(losses, rows, directions, samples)
        _negate(samples)
        return one, other

    def _pass(self, losses: Losses, rows: Any, directions: Directions, samples: list[Sample]) -> Tensor:
        members = Members(self._net, directions, samples)
        with BatchGuard(self.module, members.count).attached(), in_place(self._net, members):
            found = losses(self.module, rows)
        return self._checked(found, members.count, self.directions == "example")

    def _checked(self, losses: Any, count: int, exact: bool) -> Tensor:
        """Losses as float64 ``[count]``: each example's, or the mean of each direction's rows."""
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            told = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise BatchError(f"losses returned {told}; expected a tensor of losses, one for each row of the batch")
        shape = tuple(losses.shape)
        if exact and shape != (count,):
            raise BatchError(
                f"losses returned the shape {shape}; each of the {count} examples has a direction of its own, so it must return "
                f'one loss each, [{count}] (reduction="none", then the mean over whatever else an example has)'
            )
        if losses.numel() % count or not losses.numel() or losses.dim() > 1:
            raise BatchError(f"losses returned the shape {shape}; expected one for each row of {count} copies of the batch, [rows]")
        if not bool(losses.isfinite().all()):
            raise NotFiniteError(
                f"{int((~losses.isfinite()).sum())} of {losses.numel()} losses of generation {self.generation} are not finite; "
                "lower std or the learning rate. The gradient is as before"
            )
        return losses.double().view(count, -1).mean(1)

    def _normalizer(self, losses: Tensor) -> Tensor:
        spread = losses.std()
        if not bool(spread > 0):
            raise NotFiniteError(
                f"all directions of generation {self.generation} have the loss {float(losses[0])}, which cannot be divided by its "
                "standard deviation of 0: raise std, or pass normalize=False"
            )
        return self.std / spread

    def _add(self, weights: Tensor, samples: list[Sample] | None) -> None:
        """Adds Σ_n weights[n] ΔW_n to ``.grad``, a parameter at a time: each base makes room for the gradient that it becomes."""
        count, most = len(weights), self.chunk or len(weights)
        most = count if samples is not None else most
        for start in range(0, count, most):
            stop = min(start + most, count)
            drawn = self._directions(start, stop, self.generation).samples(self._targets()) if samples is None else samples
            for i, site in enumerate(self._net.sites):
                one = [drawn[i]]
                drawn[i] = _GONE
                part = weights[start:stop].to(site.mean.device)
                draw = Draw(self.module, [site], {}, self.estimator, stop - start, None, None, one)
                gradient = sharded_as(draw.weighted_sum(part)[site.name], site.mean)
                if site.mean.grad is None:
                    site.mean.grad = gradient
                else:
                    site.mean.grad += gradient

    def _directions(self, start: int, stop: int, generation: int) -> Directions:
        return Directions(self._law, self._counters, generation, 0, start, stop, paired=False)

    def _targets(self) -> list[Target]:
        return [Target(site.name, site.mean, site.noise, site.axes, site.matrix) for site in self._net.sites]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "std": self.std,
            "directions": self.directions,
            "antithetic": self.antithetic,
            "estimator": repr(self.estimator),
            "base": self.base,
            "parameters": [f"{site.name} {tuple(site.mean.shape)}" for site in self._net.sites],
        }


#: Stands for a sample whose memory has been given up.
_GONE = Sample(torch.zeros(0))


def _negate(samples: list[Sample]) -> None:
    """Turns ΔW into -ΔW where it lies, for all members."""
    for sample in samples:
        sample.unit.neg_()


def _examples(batch: Any, dim: int) -> int:
    """How many examples a batch has."""
    sizes = {leaf.shape[dim] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > dim}
    if len(sizes) != 1:
        raise BatchError(
            f"the tensors of the batch have {sorted(sizes)} entries on dimension {dim}, which counts the examples: pass "
            "backward(..., examples=N)"
        )
    return int(sizes.pop())


def _repeated(batch: Any, times: int, dim: int) -> Any:
    """The batch ``times`` over, in blocks."""
    count = _examples(batch, dim)

    def repeated(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() <= dim or leaf.shape[dim] != count:
            return leaf
        return leaf.repeat([times if axis == dim else 1 for axis in range(leaf.dim())])

    return tree_map(repeated, batch)
