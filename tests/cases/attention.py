"""Multi-head attention and the layers that torch builds of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cases.base import Case, floats

WIDTH, LENGTH = 8, 3
FUSED = {"second derivatives": "torch has none of the fused encoder layer"}


class Attended(nn.Module):
    """Attention of the first argument to the last (itself, if there is one only)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **{"batch_first": True, **options})

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.attention(inputs[0], inputs[-1], inputs[-1])[0]


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True)


CASES = [
    Case("attention_self", Attended, floats(LENGTH, WIDTH), affine=False),
    Case("attention_cross", Attended, floats(LENGTH, WIDTH, count=2), affine=False),
    Case("attention_biases", lambda: Attended(add_bias_kv=True, add_zero_attn=True), floats(LENGTH, WIDTH), affine=False),
    Case("encoder_layer", _encoder, floats(LENGTH, WIDTH), affine=False, exempt=FUSED),
]
