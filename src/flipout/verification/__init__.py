"""Proving a model: every row of a perturbed net against the plain module with that row's weights."""

from __future__ import annotations

from typing import Any

from flipout.compiled import run_eagerly
from flipout.errors import ArgumentError, BatchError, DrawError
from flipout.perturb import Perturbed
from flipout.rows import count_rows
from flipout.verification.keeping import put_back
from flipout.verification.proof import Proof
from flipout.verification.report import Report

__all__ = ["Report", "verify"]


def verify(net: Perturbed, *inputs: Any, members: int | None = None, tolerance: float | None = None, **kwargs: Any) -> Report:
    """Checks every row against the plain module with its weights.

    Runs the net in evaluation mode under a held draw, and the plain module of each member (``draw.module(n)``) on the rows of that
    member. Buffers, modes, attributes of the module, the global random state and the generator of the net are put back, also after
    an exception. Costs about ``members + 2`` forward passes; where a check fails, some more to find the operation.

    Args:
        net: the wrapper.
        inputs, kwargs: arguments of the module. Tensors and packed sequences in them, also in dicts, lists and dataclasses, that
            have as many entries on ``batch_dim`` as the batch has rows are split; anything else is passed whole.
        members: N, a divisor of the number of rows; None for one member a row.
        tolerance: the largest difference to allow, relative to the scale of each output; None for 1e-9 in float64, 1e-4 in
            float32, 1e-2 in float16, .05 in bfloat16, by the coarsest of these that the model computes in.

    Returns:
        What was found.

    Raises:
        VerificationError: where a row is not that of the plain module, with the first operation whose rows went astray; where the
            plain module itself mixes rows, draws random numbers in evaluation mode, or keeps a state that changes its result.
        DrawError: under an estimator whose members have no weights; while a draw is held.
        ArgumentError: for an argument that cannot mean anything.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.GRU(3, 4, batch_first=True).double(), flipout.Gaussian(0.1))
        >>> print(flipout.verify(net, torch.randn(2, 5, 3, dtype=torch.float64)))  # doctest: +ELLIPSIS
        GRU under Flipout(...): each of 2 rows is that of the plain module with its member's weights (2 members)
        largest difference: ... of the output's scale (tolerance 1e-09)
        torch operations: ...; perturbed parameters that met one: 4 of 4
    """
    if not isinstance(net, Perturbed):
        raise ArgumentError(f"verify takes a flipout.Perturbed, got {type(net).__name__}; wrap the module first")
    if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance > 0):
        raise ArgumentError(f"tolerance={tolerance!r}: expected a positive number, relative to the scale of the output")
    if not net.estimator.has_members:
        other = "Flipout" if all(noise.symmetric for noise in net.noises.values()) else "Independent"
        raise DrawError(
            f"under {net.estimator} members have no weights that can be listed, so rows cannot be compared with plain modules; "
            f"verify the same weights under another estimator: with net.using(flipout.{other}()): flipout.verify(net, ...)"
        )
    rows = count_rows(net.module, net.batch_dim, inputs, kwargs, net.rows)
    if not rows:
        raise BatchError("the input has no rows, so there is nothing to verify")
    with put_back(net), run_eagerly():
        net.eval()
        with net.hold(rows if members is None else members) as draw:
            return Proof(net, draw, rows, inputs, kwargs, tolerance).report()
