"""What a proof found."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What :func:`verify` has found of a model that passed.

    Attributes:
        module: the class of the module.
        estimator: how the members shared the draw.
        members: N, the number of different weights.
        rows: of the input.
        difference: the largest difference between a row and the plain module, relative to the scale of the output.
        tolerance: the largest one that was allowed.
        operations: the torch operations that the module ran.
        met: the perturbed parameters that met an operation.
        unmet: the perturbed parameters that did not, whose noise has no effect in such a call.
        unchecked: the outputs that have no rows and are neither shared, nor the sum or the mean of the members' outputs.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1))
        >>> report = flipout.verify(net, torch.ones(2, 4))
        >>> report.members, report.met, report.difference <= report.tolerance
        (2, ('weight', 'bias'), True)
    """

    module: str
    estimator: str
    members: int
    rows: int
    difference: float
    tolerance: float
    operations: int
    met: tuple[str, ...]
    unmet: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.module} under {self.estimator}: each of {self.rows} rows is that of the plain module with its member's weights "
            f"({self.members} members)",
            f"largest difference: {self.difference:.2g} of the output's scale (tolerance {self.tolerance:.2g})",
            f"torch operations: {self.operations}; perturbed parameters that met one: {len(self.met)} of "
            f"{len(self.met) + len(self.unmet)}",
        ]
        if self.unmet:
            lines.append(f"without effect in this call: {', '.join(self.unmet)}")
        if self.unchecked:
            lines.append(f"not compared, since they have no rows: {', '.join(self.unchecked)}")
        return "\n".join(lines)
