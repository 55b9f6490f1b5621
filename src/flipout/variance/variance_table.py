"""Tables of results, for those who have pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flipout.errors import ArgumentError

__all__ = ["table"]


def table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A ``pandas.DataFrame`` of the rows.

    Raises:
        ArgumentError: if pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ArgumentError("to_pandas() needs pandas, which is not installed: pip install pandas, or use as_dict()") from error
    return pandas.DataFrame([dict(row) for row in rows])
