"""The look of all figures."""

from __future__ import annotations

from typing import Any

__all__ = ["RC"]

#: Settings of matplotlib, for ``rc_context``.
RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "flipout",
}
