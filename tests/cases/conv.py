"""Convolutions of every rank, plain and transposed."""

from functools import partial
from typing import Any

import torch
from torch import nn

from cases.base import Case, floats


def _conv(name: str, kind: Any, channels: tuple[int, int, Any], positions: tuple[int, ...], **options: Any) -> Case:
    return Case(name, partial(kind, *channels, **options), floats(channels[0], *positions))


class Pooled(nn.Module):
    """A small convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2))
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((-2, -1)))


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d

CASES = [
    _conv("conv1d", C1, (3, 4, 3), (7,)),
    _conv("conv1d_stride", C1, (3, 4, 3), (8,), stride=2, padding=1),
    _conv("conv1d_same_odd", C1, (3, 2, 4), (7,), padding="same"),
    _conv("conv1d_causal_circular", C1, (3, 2, 3), (7,), padding=2, padding_mode="circular"),
    _conv("conv2d", C2, (3, 4, 3), (5, 5)),
    _conv("conv2d_no_bias", C2, (3, 4, 3), (5, 5), bias=False),
    _conv("conv2d_pointwise", C2, (3, 4, 1), (3, 3)),
    _conv("conv2d_stride_padding_dilation", C2, (2, 3, (3, 2)), (7, 8), stride=(2, 1), padding=(2, 1), dilation=(2, 3)),
    _conv("conv2d_same", C2, (2, 3, (3, 2)), (5, 4), padding="same", dilation=(1, 3)),
    _conv("conv2d_valid", C2, (2, 3, 2), (4, 4), padding="valid"),
    _conv("conv2d_reflect", C2, (2, 3, 3), (5, 5), padding=2, padding_mode="reflect"),
    _conv("conv2d_replicate", C2, (2, 3, 3), (5, 5), padding=(1, 2), padding_mode="replicate"),
    _conv("conv2d_same_circular", C2, (2, 3, 3), (5, 5), padding="same", padding_mode="circular"),
    _conv("conv2d_groups", C2, (4, 6, 3), (5, 5), groups=2),
    _conv("conv2d_depthwise", C2, (4, 8, 3), (5, 5), groups=4, padding=1),
    Case("conv2d_weight_only", lambda: nn.Conv2d(2, 3, 3), floats(2, 4, 4), exclude=("bias",)),
    Case("conv2d_bias_only", lambda: nn.Conv2d(2, 3, 3), floats(2, 4, 4), exclude=("weight",), local=True),
    _conv("conv3d", C3, (2, 3, 2), (3, 4, 3)),
    _conv("conv3d_groups_same", C3, (2, 4, (1, 2, 3)), (2, 3, 4), groups=2, padding="same"),
    _conv("conv_transpose1d", T1, (3, 4, 3), (5,)),
    _conv("conv_transpose1d_output_padding", T1, (3, 4, 3), (5,), stride=2, padding=1, output_padding=1),
    _conv("conv_transpose2d", T2, (3, 4, 3), (4, 4)),
    _conv(
        "conv_transpose2d_all",
        T2,
        (4, 6, (3, 2)),
        (4, 3),
        stride=(2, 3),
        padding=1,
        output_padding=(1, 0),
        groups=2,
        dilation=(2, 1),
    ),
    _conv("conv_transpose2d_depthwise", T2, (4, 4, 3), (3, 3), groups=4, bias=False),
    _conv("conv_transpose3d", T3, (2, 3, 2), (2, 3, 2), stride=(1, 2, 1)),
    Case("cnn", Pooled, floats(2, 6, 6), affine=False),
]
