"""The variance of a gradient at one batch size: fresh batches and fresh noise, again and again, in blocks of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from flipout.arguments import require_count
from flipout.errors import ArgumentError
from flipout.estimators import Estimator
from flipout.gradients import LossFunction, SampleBatch, differentiated, gradient, rows_at_once
from flipout.moments import Moments
from flipout.perturb import Perturbed
from flipout.variance.named import named_estimators
from flipout.variance.results import EstimatorVariance, GradientVariance, require_grouping
from flipout.variance.sampling import check_loss

__all__ = ["Block", "Parts", "add_parts", "block_sizes", "check_net", "check_parts", "gradient_variance", "require_finite_block"]

#: Rows of a parameter that are reported beside it: a name of one's own, the parameter's name, and its rows.
Parts = Mapping[str, tuple[str, slice]]
#: The variance within a block of draws, by parameter or part.
Block = dict[str, float]


def gradient_variance(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int = 256,
    estimators: Iterable[str | Estimator] = ("shared", "flipout"),
    draws: int = 200,
    *,
    repeats: int | None = None,
    by: str = "parameter",
    parts: Parts | None = None,
    confidence: float = 0.9,
    micro_batch: int | None = None,
    seed: int = 0,
    on_draw: Callable[[], None] | None = None,
    of: str = "mean",
) -> GradientVariance:
    """The variance of the gradient over fresh batches and fresh noise, for each estimator.

        Σ_i Var(G_i),      G = (1/N) Σ_n ∇_W̄ L(x_n, W_n)

    The draws are cut into blocks; each block gives an unbiased variance by streaming moments, and their mean is reported with
    Student's t-interval. Costs ``draws`` forward and backward passes an estimator and the memory of two gradients beside the
    pass itself. The module's parameters, their ``.grad``, its buffers and its mode are left alone; it runs in the mode it is in.

    Args:
        net: the module with its noise. Frozen parameters are left out; scales of learnable noise are held fixed.
        loss_fn: ``loss_fn(net, batch)``, the *mean* loss of the batch's examples, a scalar.
        sample_batch: ``sample_batch(n, generator)``, a batch of ``n`` fresh examples; the generator is torch's on the CPU.
        batch_size: N. For several, see :func:`flipout.variance.variance_curve`.
        estimators: names among :data:`ESTIMATORS`, or estimators.
        draws: gradients an estimator, at least 2.
        repeats: into how many blocks the draws are cut, each of at least 2; None chooses. One block has no interval.
        by: what ``.groups`` and ``.to_pandas()`` report: ``"parameter"``, ``"module"`` or ``"total"``.
        parts: rows of parameters to report beside them, such as an LSTM's forget gate:
            ``{"W_f": ("lstm.weight_hh_l0", slice(650, 1300))}``.
        confidence: of the intervals.
        micro_batch: most examples to run at once. A larger batch is run as equal micro-batches (of the largest divisor of N)
            that share one base perturbation, with independent signs: the same law as in one piece (the paper's appendix C).
            None runs the batch whole, except under Independent, whose dense weights it bounds.
        seed: of all batches and draws. Every draw has its own stream, and estimators meet the same batches.
        on_draw: called after each draw, for a progress bar.
        of: of what the gradient is: ``"mean"``, the mean weights; ``"log_std"``, the learnable scales, (1/N) Σ_n ΔW_n ∘ g_n; or
            ``"curvature"``, that over σ², which estimates the diagonal of the Hessian (:class:`flipout.bayes.IVON`).

    Returns:
        A mapping from the estimator's name to its :class:`EstimatorVariance`.

    Raises:
        ArgumentError: for a wrong argument, a loss that is no finite scalar or no mean over examples, a gradient that is not
            finite, or one that does not vary.
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
    check_net(net, seed, confidence)
    require_count("batch_size", batch_size, 1)
    require_grouping(by)
    parts = check_parts(net, parts, of)
    sizes = block_sizes(draws, repeats)
    named = named_estimators(estimators)
    check_loss(net, loss_fn, sample_batch, seed)
    found = {}
    for name, estimator in named.items():
        with net.using(estimator):
            rows = rows_at_once(net, batch_size, micro_batch)
            blocks = list(measured(net, loss_fn, sample_batch, batch_size, rows, sizes, seed, parts, on_draw, of=of))
        found[name] = point(net, name, batch_size, draws, blocks, parts, confidence, by)
    return GradientVariance(found)


def measured(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int,
    rows: int,
    sizes: Sequence[int],
    seed: int,
    parts: Parts,
    on_draw: Callable[[], None] | None,
    done: int = 0,
    of: str = "mean",
) -> Iterator[Block]:
    """The blocks one by one, but for the first ``done``, under the net's own estimator. Every draw has a stream of its own."""
    for i in range(done, len(sizes)):
        first = sum(sizes[:i])
        moments = Moments()
        for index in range(first, first + sizes[i]):
            drawn = gradient(net, loss_fn, sample_batch, batch_size, rows, seed, (batch_size, index), of)
            moments.add(add_parts(drawn, parts))
            if on_draw is not None:
                on_draw()
        yield require_finite_block(moments.variance())


def point(
    net: Perturbed, name: str, batch_size: int, draws: int, blocks: Sequence[Block], parts: Parts, confidence: float, by: str
) -> EstimatorVariance:
    """The blocks of one estimator and batch size as a result.

    Raises:
        ArgumentError: if no gradient varied at all.
    """
    values = {each: tuple(block[each] for block in blocks) for each in blocks[0]}
    if not any(value > 0 for each in values.values() for value in each):
        raise ArgumentError(
            f"under {name!r} all {draws} gradients at N = {batch_size} are the same: neither noise nor batches vary. Check that "
            "sample_batch uses its generator and that the noise reaches the parameters that the loss depends on"
        )
    parameters = dict(net.module.named_parameters())
    sizes = {each: (parameters[parts[each][0]][parts[each][1]] if each in parts else parameters[each]).numel() for each in values}
    return EstimatorVariance(name, batch_size, draws, values, sizes, confidence, tuple(parts), by)


def add_parts(gradient: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """The gradient with the rows that are reported beside their parameters."""
    return {**gradient, **{name: gradient[parameter][rows] for name, (parameter, rows) in parts.items()}}


def block_sizes(draws: int, repeats: int | None) -> list[int]:
    """Blocks of nearly equal size. The default keeps the interval within a tenth of the narrowest that any choice gives."""
    require_count("draws", draws, 2)
    if repeats is None:
        repeats = max(1, min(20, max(draws // 4, min(draws // 2, 4))))
    if require_count("repeats", repeats, 1) > draws // 2:
        raise ArgumentError(f"draws={draws} do not give {repeats} blocks of at least 2 draws each; lower repeats")
    return [draws // repeats + (i < draws % repeats) for i in range(repeats)]


def check_net(net: Perturbed, seed: int, confidence: float) -> None:
    """Raises ArgumentError for a net that was not wrapped, a wrong seed, and a confidence of which no interval can be made."""
    if not isinstance(net, Perturbed):
        raise ArgumentError(f"expected a flipout.Perturbed, got {type(net).__name__}; wrap the module with its noise first")
    require_count("seed", seed, 0)
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence!r}: expected a probability, 0 < confidence < 1")


def check_parts(net: Perturbed, parts: Parts | None, of: str = "mean") -> Parts:
    """The parts, if each is rows of a parameter that has a gradient; else raises ArgumentError."""
    parameters = differentiated(net, of)
    for name, (parameter, rows) in (parts or {}).items():
        if parameter not in parameters or name in parameters:
            raise ArgumentError(f"part {name!r} of {parameter!r}: expected a new name and one of {', '.join(parameters)}")
        if not parameters[parameter][rows].numel():
            raise ArgumentError(f"part {name!r}: {parameter!r} of shape {tuple(parameters[parameter].shape)} has no rows {rows}")
    return parts or {}


def require_finite_block(variances: Block) -> Block:
    """The block, if every number in it is finite; else raises ArgumentError with the first parameter that is not."""
    for name, value in variances.items():
        if not math.isfinite(value):
            raise ArgumentError(
                f"the gradient of {name!r} is not finite, so its variance does not exist; lower the noise, or check the loss "
                "and the batches for NaN"
            )
    return variances
