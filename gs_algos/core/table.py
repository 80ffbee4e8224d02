"""Makes tables for people: plain text in a terminal, and a table of HTML in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from typing_extensions import Self

LEFT = ' style="text-align:left"'  # notebooks set cells to the right


class Table(str):
    """Holds the text of a table, which a notebook shows as HTML. `Table.of` makes one."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: tuple[str, ...]

    @classmethod
    def of(
        cls, header: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", below: Sequence[str] = ()
    ) -> Self:
        """Aligns the columns; those that are empty everywhere are left out.

        Args:
            header: titles of the columns; the first column names the row.
            rows: cells, each shown by `str`.
            title: a line above the table, or nothing.
            below: lines below it.
        """
        cells = [[str(value) for value in row] for row in rows]
        columns = [i for i in range(len(header)) if not cells or any(row[i] for row in cells)]
        shown = [[header[i] for i in columns], *([row[i] for i in columns] for row in cells)]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = [shown[0], ["-" * width for width in widths], *shown[1:]]
        text = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        table = cls("\n".join([*([title] if title else []), *text, *below]))
        table.caption, table.below = title, tuple(below)
        table.header, table.rows = tuple(shown[0]), tuple(map(tuple, shown[1:]))
        return table

    def _repr_html_(self) -> str:
        """Returns the table as HTML: a caption, a header for each column and row, and the lines below in its foot."""
        if "header" not in self.__dict__:
            return f"<pre>{escape(self)}</pre>"
        head = "".join(f'<th scope="col"{LEFT}>{escape(title)}</th>' for title in self.header)
        body = "".join(f"<tr>{_row(row)}</tr>\n" for row in self.rows)
        span = f' colspan="{len(self.header)}"{LEFT}'
        foot = "".join(f"<tr><td{span}>{escape(line)}</td></tr>\n" for line in self.below)
        return (
            "<table>\n"
            + (f"<caption{LEFT}>{escape(self.caption)}</caption>\n" if self.caption else "")
            + f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}</tbody>\n"
            + (f"<tfoot>\n{foot}</tfoot>\n" if foot else "")
            + "</table>"
        )


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    named = f'<th scope="row"{LEFT}>{escape(first)}</th>'
    return named + "".join(f"<td{LEFT}>{escape(cell)}</td>" for cell in rest)
