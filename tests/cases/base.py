"""How a case is written: a module, its input, and which estimators it cannot have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], tuple[Tensor, ...]]

#: Laws that a case may be exempt from; all others hold for every case.
LAWS = {
    "second derivatives": "are those of the oracle",
    "finite differences": "are the gradient",
    "theory": "the variance of an affine output is σ² times the squared norm of its gradient; else Independent is the judge",
    "low rank": "LowRank serves it, and its output has the noise's variance",
}


@dataclass(frozen=True)
class Case:
    """A module and its input.

    Attributes:
        name: unique, shown in test ids.
        module: builds the module; its parameters and buffers are drawn anew by :meth:`build`.
        inputs: from a number of rows and a generator, the arguments with that many rows on ``batch_dim``.
        batch_dim: where the rows are.
        exclude: parameters left alone.
        affine: whether the output is jointly affine in the perturbed parameters.
        local: whether LocalReparameterization serves it; where it does not it must refuse.
        exempt: laws that the case cannot be held to, by their names in :data:`LAWS`, each with the reason.
    """

    name: str
    module: Callable[[], nn.Module]
    inputs: Inputs
    batch_dim: int = 0
    exclude: tuple[str, ...] = ()
    affine: bool = True
    local: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [law for law, why in self.exempt.items() if law not in LAWS or not why]
        assert not unknown, f"{self.name} is exempt from {unknown}: there are {', '.join(LAWS)}, and each wants a reason"

    def held_to(self, law: str) -> bool:
        """Whether a law of :data:`LAWS` is put to the case."""
        assert law in LAWS, law
        return law not in self.exempt

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module in evaluation mode, with no parameter at a special value."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.module().to(dtype).eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.normal_(0.3, 0.5)
                for name, buffer in module.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_()
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 2.0)
        return module

    def draw_inputs(self, rows: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, ...]:
        """Arguments with ``rows`` rows; floating ones in ``dtype``."""
        drawn = self.inputs(rows, torch.Generator().manual_seed(seed))
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in drawn)

    def __str__(self) -> str:
        return self.name


class Given(nn.Module):
    """Parameters of the given shapes and a function of them and the arguments: one torch operation as a module."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def given(function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Given(function, **shapes)


def floats(*shape: int, count: int = 1) -> Inputs:
    """``count`` arguments ``[rows, *shape]``."""
    return lambda rows, g: tuple(torch.randn(rows, *shape, generator=g, dtype=torch.float64) for _ in range(count))


def second(length: int, *shape: int) -> Inputs:
    """One argument ``[length, rows, *shape]``, for ``batch_dim=1``."""
    return lambda rows, g: (torch.randn(length, rows, *shape, generator=g, dtype=torch.float64),)


def indices(high: int, *shape: int) -> Inputs:
    """One argument ``[rows, *shape]`` of indices below ``high``."""
    return lambda rows, g: (torch.randint(high, (rows, *shape), generator=g),)
