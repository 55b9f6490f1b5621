"""The diagonal of the Hessian of a trained net, by weight noise: no Jacobians, two backward passes a draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipout.arguments import require_count
from flipout.buffers import evaluating, kept_buffers
from flipout.draw import Draw
from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, LocalReparameterization
from flipout.intervals import t_quantile
from flipout.noise import Rademacher
from flipout.perturb import Perturbed

__all__ = ["DiagonalHessian", "diagonal_hessian"]


class DiagonalHessian(Mapping[str, Tensor]):
    """The diagonal of a Hessian by parameter name, each entry with its error.

    A mapping from the parameter's name to the estimates, of the parameter's shape, in units of loss per
    squared weight. They are negative where the loss curves down, or where noise exceeds the truth.

    Attributes:
        errors: the standard error of each entry, over draws.
        draws: how many.
        confidence: of the intervals.

    Example:
        >>> found = DiagonalHessian({"w": torch.tensor([2.0, -0.1])}, {"w": torch.tensor([0.1, 0.1])}, 9)
        >>> low, high = found.interval("w")
        >>> low > 0
        tensor([ True, False])
        >>> found.positive()["w"]
        tensor([2., 0.])
    """

    def __init__(self, values: Mapping[str, Tensor], errors: Mapping[str, Tensor], draws: int, confidence: float = 0.9) -> None:
        self._values = dict(values)
        self.errors = dict(errors)
        self.draws, self.confidence = draws, confidence

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def interval(self, name: str) -> tuple[Tensor, Tensor]:
        """Student's t-interval of each entry: lower and upper ends, of the parameter's shape."""
        half = t_quantile(self.confidence, self.draws - 1) * self.errors[name]
        return self[name] - half, self[name] + half

    def positive(self, floor: float = 0.0) -> dict[str, Tensor]:
        """The estimates, with those below ``floor`` raised to it."""
        return {name: value.clamp_min(floor) for name, value in self.items()}

    def saliency(self, module: nn.Module) -> dict[str, Tensor]:
        """½ max(h, 0) w²: about how much the loss rises without a weight (LeCun et al. 1990, Eq. 5)."""
        weights = dict(module.named_parameters(remove_duplicate=False))
        return {name: 0.5 * value.clamp_min(0.0) * weights[name].detach().square() for name, value in self.items()}

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.values())
        below = sum(int((value < 0).sum()) for value in self.values())
        return f"DiagonalHessian({len(self)} parameters, {count} entries, {below} negative, draws={self.draws})"


def diagonal_hessian(
    net: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    draws: int = 8,
    *,
    std: float = 1e-2,
    estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_dim: int = 0,
    confidence: float = 0.9,
    generator: torch.Generator | None = None,
) -> DiagonalHessian:
    """The diagonal of the Hessian of the mean loss over a data set, with an interval for each entry.

    With signs ε_n of its own for each example n, ΔW_n = σ ε_n and the gradients g_n at W̄ ± ΔW_n,

        ĥ = E_n[ε_n ∘ (g_n(W̄ + ΔW_n) - g_n(W̄ - ΔW_n))] / 2σ

    is Hutchinson's estimate of diag(H) by finite differences (Bekas et al. 2007), of which the terms with
    H_ij, j ≠ i, average out over the examples, since each has signs of its own; under ``Shared()`` they do
    not. Unbiased up to terms in σ²: what is estimated is the curvature of the loss at a distance σ.

    It is the Hessian, not the generalised Gauss-Newton matrix, so entries can be negative: at a point that
    is no minimum, and by the noise of the estimate. They are returned as they are.
    :func:`flipout.bayes.from_pretrained` counts them as zero. Costs two forward and backward passes over
    the data a draw, and the memory of three copies of the weights.

    Args:
        net: a trained module, or a :class:`flipout.Perturbed`, of which the module is taken. It runs in
            evaluation mode; its weights, gradients, buffers and mode are left as they are.
        loss_fn: ``loss_fn(net, batch)``, the mean loss of the batch's examples.
        data: batches, such as a list or a DataLoader; read once a draw.
        draws: of the signs, at least 2: the intervals come from their spread.
        std: σ, in the units of the weights. In single precision 1e-3 is about the least.
        estimator: how the examples share a draw; one whose members have weights.
        include, exclude: which parameters, as in :class:`flipout.Perturbed`.
        batch_dim: the dimension of the batch's first tensor that counts the examples.
        confidence: of the intervals.
        generator: of the signs; None for torch's own.

    Raises:
        ArgumentError: for a number out of range, data that is empty, has no rows or can be read once only,
            or a loss that is no finite scalar.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> loss_fn = lambda net, batch: 0.5 * net(batch).square().mean()
        >>> diagonal_hessian(layer, loss_fn, [x])["weight"]  # the mean of x²
        tensor([[0.5000, 2.0000]])
    """
    require_count("draws", draws, 2)
    for label, number, most in (("std", std, math.inf), ("confidence", confidence, 1.0)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < most:
            wanted = "a positive number" if label == "std" else "a probability inside (0, 1)"
            raise ArgumentError(f"diagonal_hessian({label}={number!r}): expected {wanted}")
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"diagonal_hessian: data is a {type(data).__name__}, which can be read once, and every draw reads it; pass a list "
            "of batches or a DataLoader"
        )
    if not getattr(estimator, "has_members", True) or isinstance(estimator, LocalReparameterization):
        raise ArgumentError(f"diagonal_hessian(estimator={estimator!r}): expected one whose members have weights")
    module = net.module if isinstance(net, Perturbed) else net
    noise = Rademacher(std, learnable=True)
    random = Perturbed(module, noise, estimator, include, exclude, batch_dim, generator, unmet="ignore")
    scales = dict(random.scales)
    mean = {name: torch.zeros_like(scale, requires_grad=False) for name, scale in scales.items()}
    squares = {name: torch.zeros_like(scale, requires_grad=False) for name, scale in scales.items()}
    with evaluating(random), kept_buffers(module):
        for k in range(1, draws + 1):
            for name, value in _one_draw(random, loss_fn, data, scales, std).items():
                delta = value - mean[name]
                mean[name] += delta / k
                squares[name] += delta * (value - mean[name])
    errors = {name: (each / (draws - 1) / draws).sqrt() for name, each in squares.items()}
    return DiagonalHessian(mean, errors, draws, confidence)


def _one_draw(
    random: Perturbed, loss_fn: Callable[[Any, Any], Tensor], data: Iterable[Any], scales: Mapping[str, Tensor], std: float
) -> dict[str, Tensor]:
    """ĥ of all data under fresh signs."""
    total: dict[str, Tensor] = {}
    examples = 0
    for batch in data:
        rows = _rows(batch, random.batch_dim)
        examples += rows
        draw = random.draw(rows)
        for each in (draw, _mirrored(draw)):
            with random.under(each), torch.enable_grad():
                loss = loss_fn(random, batch)
            _require_finite(loss)
            for name, part in _gradients(loss, scales).items():
                if part is not None:  # ΔW ∘ g = σ ε ∘ g
                    term = part * (rows / (2 * std**2))
                    total[name] = total[name].add_(term) if name in total else term
    if not examples:
        raise ArgumentError("diagonal_hessian: data has no batches, so there is no loss to differentiate")
    return {name: total[name] / examples if name in total else torch.zeros_like(s.detach()) for name, s in scales.items()}


def _mirrored(draw: Draw) -> Draw:
    """The draw with every perturbation negated."""
    return draw.as_it_was([replace(sample, unit=-sample.unit) for sample in draw.samples], draw.generator)


def _gradients(loss: Tensor, scales: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    return dict(zip(scales, torch.autograd.grad(loss, list(scales.values()), allow_unused=True), strict=True))


def _rows(batch: Any, dim: int) -> int:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > dim:
            return leaf.shape[dim]
    raise ArgumentError(
        f"diagonal_hessian: a batch ({type(batch).__name__}) has no tensor with examples on dimension {dim}; give batch_dim="
    )


def _require_finite(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(
            f"diagonal_hessian: loss_fn returned {found}; expected the mean loss of the batch, a scalar that depends on the weights"
        )
    if not bool(loss.detach().isfinite()):
        raise ArgumentError(
            f"diagonal_hessian: the loss of a batch is {float(loss.detach())}; is the net trained? Look for NaN, or lower std"
        )
