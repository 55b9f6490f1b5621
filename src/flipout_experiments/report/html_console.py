"""What an experiment prints, as HTML: tables become tables, lines paragraphs."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["HtmlConsole", "html_table"]


class HtmlConsole(Console):
    """A console that keeps what it is told to print as HTML, in :attr:`parts`.

    Example:
        >>> console = HtmlConsole()
        >>> console.print("loss [bold]0.1[/bold] < 0.2")
        >>> console.parts
        ['<p>loss 0.1 &lt; 0.2</p>']
    """

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.parts: list[str] = []

    def print(self, *objects: Any, markup: bool | None = None, **options: Any) -> None:
        for each in objects:
            if isinstance(each, Table):
                self.parts.append(_from_rich(each))
            elif text := _plain(each, markup is not False).strip():
                self.parts += [f"<p>{escape(line)}</p>" for line in text.splitlines() if line.strip()]


def html_table(caption: str, header: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """A table in a region that scrolls by itself on a narrow screen. All cells are text and are escaped.

    Args:
        caption: its title, also the region's name.
        header: of the columns.
        rows: of cells; the first of each names the row.
        numbers_from: the first column that is set to the right.
    """
    sides = ["" if i < numbers_from else ' class="number"' for i in range(len(header))]
    head = "".join(f'<th scope="col"{side}>{escape(cell)}</th>' for cell, side in zip(header, sides, strict=True))
    body = []
    for row in rows:
        first, *others = (escape(cell) for cell in row)
        cells = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(others, sides[1:], strict=True))
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    label = f' aria-label="{escape(caption, quote=True)}"' if caption else ' aria-label="table"'
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" role="region"{label} tabindex="0"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _from_rich(table: Table) -> str:
    header = [_plain(column.header) for column in table.columns]
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return html_table(_plain(table.title or ""), header, rows)


def _plain(value: Any, markup: bool = True) -> str:
    if isinstance(value, Text):
        return value.plain
    return Text.from_markup(str(value)).plain if markup else str(value)
