"""Where an experiment ran: for its record, and to run it somewhere that exists."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

import flipout
from flipout.errors import ArgumentError

__all__ = ["describe_environment", "find_device"]


def find_device(name: str) -> torch.device:
    """The device of that name, tried out.

    Raises:
        ArgumentError: if torch knows no such device or cannot reach it.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device {name!r} cannot be used here ({reason}); choose cpu, or cuda where there is a GPU") from error
    return device


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and time, as plain values for JSON."""
    found: dict[str, Any] = {
        "flipout": flipout.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
