"""Normalisation layers: the plain operation without gain and bias, then each row's own gain and bias.

The statistics never see a weight, so this is exact under every estimator whose vectors can be listed. The result has the dtype of
the plain operation, which is that of the operation without gain and bias: torch computes both in one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flipout.estimators import Estimator
from flipout.registry import rule
from flipout.rules.constants import listed
from flipout.rules.per_row import per_row
from flipout.rules.pointwise import add, mul
from flipout.weight import PerturbedWeight, require_data

__all__: list[str] = []


def _followed(x: Tensor, y: Tensor, weight: Any, bias: Any) -> Tensor:
    """``y``, whose rows stand as those of ``x``."""
    carrier: PerturbedWeight = weight if isinstance(weight, PerturbedWeight) else bias
    return carrier.moved(x, y)


def _affine_last(y: Tensor, weight: Any, bias: Any) -> Tensor:
    """Gain and bias over the last axes of y, in its dtype."""
    z = y
    if weight is not None:
        z = mul(y, weight) if isinstance(weight, PerturbedWeight) else y * weight
    if isinstance(bias, PerturbedWeight):
        z = add(bias.moved(y, z), bias)
    elif bias is not None:
        z = z + bias
    return z.to(y.dtype)


def _of_weight(y: Tensor, input: PerturbedWeight, weight: Any, bias: Any) -> PerturbedWeight:
    """The norm of a table, as a weight: ``y`` holds each member's, ``[N, *shape]``."""

    def of(parameter: Any) -> Any:
        if not isinstance(parameter, PerturbedWeight):
            return parameter
        values = parameter.dense()
        return values.reshape(values.shape[0], *[1] * (y.dim() - values.dim()), *values.shape[1:])

    y = y if weight is None else y * of(weight)
    return listed(input, y if bias is None else y + of(bias))


@rule((F.dropout, torch.dropout, torch.dropout_), Estimator)
def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool | None = None) -> PerturbedWeight:
    """Entries of a weight are dropped for each member by itself."""
    if not (training if train is None else train) or not p:
        return input  # type: ignore[no-any-return]
    return listed(input, F.dropout(input.dense(), p))


def _affine_channels(y: Tensor, weight: Any, bias: Any) -> Tensor:
    """Gain and bias per channel, axis 1 of y [rows, channels, *positions], in its dtype."""
    dtype = y.dtype

    def rows_of(parameter: Any) -> Tensor:
        if isinstance(parameter, PerturbedWeight):
            _, place = parameter.rows_in(y, y.dim() - 1, "normalisation")
            parameter = parameter.at(place)
        values = per_row(parameter, y.shape[0])
        return values.view(*values.shape, *[1] * (y.dim() - 2))

    gain, shift = (None if parameter is None else rows_of(parameter) for parameter in (weight, bias))
    y = y if gain is None else y * gain
    return (y if shift is None else y + shift).to(dtype)


@rule((F.layer_norm, torch.layer_norm), Estimator)
def layer_norm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    if isinstance(input, PerturbedWeight):
        return _of_weight(F.layer_norm(input.dense(), normalized_shape, None, None, eps), input, weight, bias)
    return _affine_last(_followed(input, F.layer_norm(input, normalized_shape, None, None, eps), weight, bias), weight, bias)


@rule((F.rms_norm, torch.rms_norm), Estimator)
def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    if isinstance(input, PerturbedWeight):
        return _of_weight(F.rms_norm(input.dense(), normalized_shape, None, eps), input, weight, None)
    return _affine_last(_followed(input, F.rms_norm(input, normalized_shape, None, eps), weight, None), weight, None)


@rule((F.group_norm, torch.group_norm), Estimator)
def group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    require_data(F.group_norm, input)
    return _affine_channels(_followed(input, F.group_norm(input, num_groups, None, None, eps), weight, bias), weight, bias)


@rule(F.instance_norm, Estimator)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    require_data(F.instance_norm, input, running_mean, running_var)
    y = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine_channels(_followed(input, y, weight, bias), weight, bias)


@rule(F.batch_norm, Estimator)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    require_data(F.batch_norm, input, running_mean, running_var)
    y = F.batch_norm(input, running_mean, running_var, None, None, training, momentum, eps)
    return _affine_channels(_followed(input, y, weight, bias), weight, bias)
