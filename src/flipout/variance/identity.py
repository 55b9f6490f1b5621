"""What a saved measurement says of the net that it measured."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from flipout.perturb import Perturbed

__all__ = ["describe_net"]


def describe_net(net: Perturbed) -> dict[str, Any]:
    """The net's noises, and a check sum of its weights."""
    total = 0
    for name, parameter in net.named_parameters():
        values = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        total = zlib.crc32(values.tobytes(), zlib.crc32(name.encode(), total))
    return {"noises": {name: repr(noise) for name, noise in net.noises.items()}, "weights": total}
