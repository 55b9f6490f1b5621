"""What sections hand back: tables of text, which a result file holds and the report shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["show", "table"]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """A table for the result; numbers become text here, three digits each."""
    return {"title": title, "header": list(header), "rows": [[_text(cell) for cell in row] for row in rows]}


def show(found: dict[str, Any]) -> str:
    """The table as lines of text."""
    rows = [found["header"], *found["rows"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(found["header"]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([found["title"], *(f"  {line}" for line in lines)])


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
