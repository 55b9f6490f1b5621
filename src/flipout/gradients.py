"""Draws of a stochastic gradient: a fresh batch and fresh noise each, in as many micro-batches as memory asks for."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flipout.arguments import require_count
from flipout.buffers import batch_statistics, kept_buffers
from flipout.errors import ArgumentError
from flipout.estimators import Flipout, Independent, Shared
from flipout.perturb import Perturbed
from flipout.streams import stream

__all__ = [
    "GRADIENTS",
    "LossFunction",
    "SampleBatch",
    "differentiated",
    "gradient",
    "gradient_pair",
    "micro_batches",
    "rows_at_once",
]

LossFunction = Callable[[Perturbed, Any], Tensor]
SampleBatch = Callable[[int, torch.Generator], Any]

#: What a gradient may be of: the mean weights, the logarithms of learnable scales, or these over σ², which estimate the curvature.
GRADIENTS = ("mean", "log_std", "curvature")

#: Entries of dense per-member weights that Independent holds at once where no micro_batch is given. A CPU is fastest with what
#: its cache takes; an accelerator is kept busy with 128 MiB in float32.
_DENSE_ENTRIES, _DENSE_ENTRIES_CPU = 2**25, 2**20


def gradient(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int,
    rows: int,
    seed: int,
    key: tuple[int, ...],
    of: str = "mean",
) -> dict[str, Tensor]:
    """One draw of the gradient, by parameter name, under the estimator that ``net`` has.

    Args:
        net, loss_fn, sample_batch, batch_size: as in :func:`flipout.variance.gradient_variance`.
        rows: a divisor of ``batch_size``: how many examples run at once.
        seed, key: name the draw; the same names give the same batch, and the same noise under the same estimator.
        of: one of :data:`GRADIENTS`.
    """
    return _gradients(net, loss_fn, sample_batch, batch_size, rows, seed, key, 1, of)[0]


def gradient_pair(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int,
    rows: int,
    seed: int,
    key: tuple[int, ...],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two gradients of two independent batches under one draw: they share what the examples of one batch share.

    Under flipout that is the base perturbation, with signs of their own; under Shared the whole perturbation.
    """
    first, second = _gradients(net, loss_fn, sample_batch, batch_size, rows, seed, key, 2)
    return first, second


def _gradients(
    net: Perturbed,
    loss_fn: LossFunction,
    sample_batch: SampleBatch,
    batch_size: int,
    rows: int,
    seed: int,
    key: tuple[int, ...],
    batches: int,
    of: str = "mean",
) -> list[dict[str, Tensor]]:
    data = stream(seed, *key)
    noise = stream(seed, *key, zlib.crc32(repr(net.estimator).encode()), device=_device(net))
    each = batch_size // rows
    found: list[dict[str, Tensor]] = [{} for _ in range(batches)]
    norms = batch_statistics(net.module) if each > 1 else []
    if norms:
        raise ArgumentError(
            f"{norms[0]!r} normalises by the statistics of its batch, and those of micro-batches of {rows} examples are not those "
            f"of a batch of {batch_size}: pass micro_batch={batch_size}, or call eval() on the layer, for its running ones"
        )
    with kept_buffers(net.module):
        for i, _ in enumerate(micro_batches(net, each * batches, rows, noise)):
            total = found[i // each]
            loss = _require_scalar(loss_fn(net, sample_batch(rows, data)))
            for name, part in _differentiate(differentiated(net, of), loss * (rows / batch_size)).items():
                total[name] = total[name] + part if name in total else part
    if of == "curvature":
        widths = differentiated(net, of)
        found = [{name: part * widths[name].detach().mul(-2).exp() for name, part in total.items()} for total in found]
    return found


def differentiated(net: Perturbed, of: str) -> dict[str, Tensor]:
    """What the gradient is of, by parameter name: means, or learnable scales; frozen ones left out.

    Raises:
        ArgumentError: for another word than those of :data:`GRADIENTS`, or a net without any.
    """
    if of not in GRADIENTS:
        raise ArgumentError(f"of={of!r}: choose {', '.join(map(repr, GRADIENTS))}")
    named = net.module.named_parameters() if of == "mean" else net.scales.items()
    parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
    if not parameters and of == "mean":
        raise ArgumentError("no parameter of the module requires a gradient, so there is no gradient to vary")
    if not parameters:
        raise ArgumentError(f"of={of!r}: the net has no scales to learn; give it noise such as Gaussian(0.1, learnable=True)")
    return parameters


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
            f"{estimator} draws signs at every time step and has no members to draw afresh, so a batch cannot be run as "
            "micro-batches of one base perturbation; leave micro_batch out, or use Flipout()"
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
    """The largest divisor of the batch size that ``micro_batch``, or the memory of dense members, allows.

    Each micro-batch has members of every base.

    Raises:
        BatchError: if the bases of the net's estimator do not divide the batch size.
        ArgumentError: if ``micro_batch`` is below their number.
    """
    bases = net.estimator.bases if isinstance(net.estimator, Flipout) else 1
    if bases > 1:
        net.estimator.groups(batch_size)  # type: ignore[attr-defined]
    if micro_batch is not None:
        limit = require_count("micro_batch", micro_batch, 1)
    elif isinstance(net.estimator, Independent):
        most = _DENSE_ENTRIES_CPU if _device(net).type == "cpu" else _DENSE_ENTRIES
        limit = max(1, most // sum(parameter.numel() for parameter in net.module.parameters()))
    else:
        limit = batch_size
    found = [rows for rows in range(min(limit, batch_size), 0, -1) if batch_size % rows == 0 and rows % bases == 0]
    if not found:
        raise ArgumentError(f"micro_batch={limit}: {net.estimator} needs at least {bases} rows at once, some of each base")
    return found[0]


def _differentiate(parameters: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if part is None else part
        for (name, parameter), part in zip(parameters.items(), parts, strict=True)
    }


def _device(net: Perturbed) -> torch.device:
    return next(net.module.parameters()).device


def _require_scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"loss_fn returned {found}; expected the mean loss of the batch, a scalar tensor")
    if not loss.requires_grad:
        raise ArgumentError("the loss does not depend on a parameter through autograd; drop no_grad() and detach() from loss_fn")
    return loss
