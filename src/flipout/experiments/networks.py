"""The paper's networks as plain modules (Wen et al. 2018, Appendix B). None knows of noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FullyConnected"]


class FullyConnected(nn.Module):
    """FC: three layers, 784-512-512-10, with ReLU between them; 669,706 parameters.

    Takes images ``[N, 1, 28, 28]`` or rows ``[N, 784]`` and returns logits ``[N, 10]``.

    Args:
        generator: source of the initial weights, drawn from torch's default law for linear layers; None for torch's own.

    Example:
        >>> FullyConnected()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.fc1 = _linear(784, 512, generator)
        self.fc2 = _linear(512, 512, generator)
        self.fc3 = _linear(512, 10, generator)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(images.flatten(1)))
        hidden = torch.relu(self.fc2(hidden))
        logits: Tensor = self.fc3(hidden)
        return logits


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """torch's own initial law, U(±1/√inputs), from an explicit generator."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer  # type: ignore[no-any-return]
