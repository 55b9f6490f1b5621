"""Normalisation layers: gains and biases."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.base import Case, floats, given, second

CASES = [
    Case("layer_norm", lambda: nn.LayerNorm(5), floats(5), local=True),
    Case("layer_norm_3d", lambda: nn.LayerNorm(5), floats(4, 5), local=True),
    Case("layer_norm_two_axes", lambda: nn.LayerNorm((4, 5)), floats(4, 5)),
    Case("layer_norm_batch_second", lambda: nn.LayerNorm(5), second(4, 5), batch_dim=1, local=True),
    Case("layer_norm_gain_only", lambda: nn.LayerNorm(5, bias=False), floats(4, 5), local=True),
    Case("layer_norm_bias_alone", lambda: nn.LayerNorm(5), floats(4, 5), exclude=("weight",), local=True),
    Case("layer_norm_gain_alone", lambda: nn.LayerNorm(5), floats(4, 5), exclude=("bias",), local=True),
    Case(
        "layer_norm_folded",
        given(lambda m, x: F.layer_norm(x.flatten(0, 1), (5,), m.w).view(x.shape), w=(5,)),
        floats(4, 5),
        local=True,
    ),
    Case("rms_norm", lambda: nn.RMSNorm(5), floats(4, 5), local=True),
    Case("group_norm", lambda: nn.GroupNorm(2, 4), floats(4, 3, 3), local=True),
    Case("group_norm_2d", lambda: nn.GroupNorm(2, 4), floats(4), local=True),
    Case("instance_norm1d", lambda: nn.InstanceNorm1d(3, affine=True), floats(3, 5), local=True),
    Case("instance_norm2d", lambda: nn.InstanceNorm2d(3, affine=True), floats(3, 4, 4), local=True),
    Case("instance_norm_tracked", lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), floats(3, 5), local=True),
    Case("batch_norm1d", lambda: nn.BatchNorm1d(4), floats(4), local=True),
    Case("batch_norm1d_3d", lambda: nn.BatchNorm1d(4), floats(4, 3), local=True),
    Case("batch_norm2d", lambda: nn.BatchNorm2d(4), floats(4, 3, 3), local=True),
    Case("batch_norm_bias_alone", lambda: nn.BatchNorm2d(4), floats(4, 3, 3), exclude=("weight",), local=True),
    Case("prelu", lambda: nn.PReLU(), floats(5), local=True),
    Case("prelu_channels", lambda: nn.PReLU(3), floats(3, 4, 4), local=True),
    Case("prelu_channels_2d", lambda: nn.PReLU(5), floats(5), local=True),
    Case("prelu_function", given(lambda m, x: torch.prelu(x, m.w), w=(3,)), floats(3, 4), local=True),
]
