"""Random generators by name: a seed and a key give the same numbers wherever and whenever they are asked for."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["stream"]


def stream(seed: int, *key: int, device: torch.device | None = None) -> torch.Generator:
    """A generator of its own for every (seed, key), independent of all others and of their order."""
    words = np.random.SeedSequence(entropy=seed, spawn_key=key).generate_state(2, np.uint32)
    generator = torch.Generator(device=device or torch.device("cpu"))
    return generator.manual_seed(int(words[0]) << 31 ^ int(words[1]))
