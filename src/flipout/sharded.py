"""Parameters of which every process keeps a part (FSDP2, tensor parallelism): ``DTensor``, in torch's words."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

__all__ = ["in_flat_pieces", "is_sharded", "sharded_as", "whole"]


def _tensors() -> Any:
    """torch's module of distributed tensors, if anybody has imported it."""
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    module = _tensors()
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered from all processes, which must all ask for it; any other as it is.

    Its gradient is the mean of the processes' gradients, as FSDP has it.
    """
    if not is_sharded(tensor):
        return tensor
    gathered: Any = tensor
    full: Tensor = gathered.full_tensor(grad_placements=[_tensors().Partial("avg")] * gathered.device_mesh.ndim)
    return full


def in_flat_pieces(module: nn.Module) -> str | None:
    """The name of the first part that FSDP1 (``FullyShardedDataParallel``) keeps in flat pieces, which are no parameters of
    its own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    kind = fsdp.FullyShardedDataParallel
    return next((name or type(part).__name__ for name, part in module.named_modules() if isinstance(part, kind)), None)


def sharded_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that is the same in all processes, cut as another one is."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    like: Any = other
    cut: Tensor = _tensors().distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return cut
