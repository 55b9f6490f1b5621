"""Tensors in the arguments and the results of modules: found, mapped, compared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["SMALLEST_SCALE", "children", "cloned", "gap_of", "leaves_of", "mapped", "packed_in", "paths_of", "scale_of"]


#: Outputs smaller than this are compared as if they were of this size.
SMALLEST_SCALE = 1e-3


def scale_of(tensor: Tensor) -> float:
    """The largest finite number of a tensor by size."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return 1.0
    return max(float(torch.nan_to_num(tensor.detach().abs(), nan=0.0, posinf=0.0).max()), SMALLEST_SCALE)


def gap_of(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """The largest difference of two results, relative to their scale; whole numbers agree or do not."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    wide = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.nan_to_num(torch.where(same, 0.0, (a - b).abs()), nan=float("inf")).max()
    return float(difference) / (scale_of(b) if scale is None else scale)


def children(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, with the way to it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{each.name}", getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", each) for key, each in value.items()]
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        names = getattr(value, "_fields", None)
        return [(f".{names[i]}" if names else f"[{i}]", each) for i, each in enumerate(value)]
    return []


def leaves_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result; a packed batch of sequences as a padded one."""
    if isinstance(value, PackedSequence):
        yield path, pad_packed_sequence(value, batch_first=True)[0]
    elif isinstance(value, Tensor):
        yield path, value if value.layout == torch.strided else value.to_dense()
    for name, child in children(value):
        yield from leaves_of(child, path + name)


def packed_in(value: Any) -> list[PackedSequence]:
    found = [value] if isinstance(value, PackedSequence) else []
    return found + [each for _, child in children(value) for each in packed_in(child)]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same kind with other tensors in it."""
    if isinstance(value, (Tensor, PackedSequence)):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other: Any = copy.copy(value)
        for each in dataclasses.fields(value):
            new = mapped(getattr(value, each.name, None), function)
            if isinstance(value, Mapping):
                setattr(other, each.name, new)
            else:
                object.__setattr__(other, each.name, new)
        return other
    if isinstance(value, MutableMapping):
        other = copy.copy(value)
        for key in value:
            other[key] = mapped(value[key], function)
        return other
    if isinstance(value, (list, tuple)):
        items = [mapped(each, function) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def paths_of(leaves: list[tuple[str, Tensor]]) -> str:
    return ", ".join(f"{path} {tuple(tensor.shape)}".strip() for path, tensor in leaves) or "no tensors"
