"""The oracle: what a perturbed module means, computed the slow way.

Each member's rows run through the untouched module with that member's dense weights. Tests judge every rule by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flipout.draw import Draw

__all__ = ["loop_forward"]


def loop_forward(module: nn.Module, draw: Draw, *args: Any, batch_dim: int = 0, out_dim: int | None = None) -> Tensor:
    """Runs ``module`` once per member of ``draw`` on that member's rows, and joins the results.

    Args:
        module: the plain module.
        draw: a held draw of it.
        *args: the module's arguments; every tensor among them is split into member-major blocks on ``batch_dim``.
        batch_dim: where the rows are.
        out_dim: where to join the results; ``batch_dim`` by default.

    Returns:
        What the perturbed module must return, to rounding. Differentiable in means and scales.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(4, 3).double(), flipout.Gaussian(0.1))
        >>> x = torch.randn(6, 4, dtype=torch.float64)
        >>> with net.hold(members=6) as draw:
        ...     torch.allclose(net(x), loop_forward(net.module, draw, x), atol=1e-12)
        True
    """
    members = draw.members or 0
    outputs = []
    for n in range(members):

        def rows(value: Any, n: int = n) -> Any:
            if not isinstance(value, Tensor):
                return value
            step = value.shape[batch_dim] // members
            return value.narrow(batch_dim, n * step, step)

        outputs.append(torch.func.functional_call(module, draw.weights(n), tree_map(rows, args)))
    return torch.cat(outputs, batch_dim if out_dim is None else out_dim)
