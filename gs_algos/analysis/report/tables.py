"""Builds the tables and figures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gs_algos.analysis.report.formats import TIMES
from gs_algos.analysis.report.layer_groups import grouped
from gs_algos.analysis.report.markup import Html, Node, breakable, layer_name, tag

PRINTED = 60  # rows of a folded table that is opened on paper
T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """Says what a column of a table of layers shows.

    Args:
        title: of the column.
        text: the text of a cell.
        key: a number by which cells are ordered, for columns of numbers: a row of several layers shows the lowest and
            the highest. None for columns of words.
    """

    title: str
    text: Callable[[T], str]
    key: Callable[[T], float | None] | None = None


def section(title: str, *children: Node) -> Html:
    return tag("section", tag("h2", title), *children)


def paragraph(*children: Node, class_: str | None = None) -> Html:
    return tag("p", *children, class_=class_)


def figure(picture: Node, caption: Node, table: Node = None) -> Html:
    """Returns a picture in a frame that scrolls where it is too narrow, with a caption, and its table folded below."""
    return tag(
        "div", tag("figure", tag("div", picture, class_="scroll"), tag("figcaption", caption)), table, class_="shown"
    )


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Node]], words: Sequence[int] = ()) -> Html:
    """Returns a table with a header for each column and each row; columns in `words` hold no numbers."""
    left = {0, *words}
    head = [
        tag("th", breakable(title), scope="col", class_=None if i in left else "n") for i, title in enumerate(header)
    ]
    body = [tag("tr", [_body_cell(cell, i, i in left) for i, cell in enumerate(row)]) for row in rows]
    return tag(
        "div",
        tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body)),
        class_="scroll",
    )


def _body_cell(content: Node, column: int, words: bool) -> Html:
    if column == 0:
        return tag("th", content, scope="row")
    return tag("td", breakable(content), class_="w") if words else tag("td", content)


def folded(summary: str, content: Node, rows: int) -> Html:
    """Returns content that a click opens, and paper does if it is not long."""
    return tag("details", tag("summary", summary), content, class_="long" if rows > PRINTED else None)


def layer_table(
    caption: str,
    sites: Sequence[str],
    layers: Sequence[T],
    columns: Sequence[Column[T]],
    most: int,
    things: str = "layers",
) -> Html:
    """Returns a folded table with a row for each layer, or for layers that differ in numbers of their names.

    most: layers above which they are put together; if that leaves more rows, the first `most` are shown. things: what
    the rows are.
    """
    rows = grouped(sites, most)
    shown = rows[:most]
    cells = []
    for name, indices in shown:
        title = layer_name(name) + (f" ({TIMES}{len(indices)})" if len(indices) > 1 else "")
        cells.append([title, *(_cell([layers[i] for i in indices], column) for column in columns)])
    summary = f"{caption}: table of {len(sites):,} {things}"
    if len(rows) < len(sites):
        summary += f" in {len(rows):,} rows, those that differ in a number of their name together"
    if len(shown) < len(rows):
        summary += f", of which the first {len(shown):,} are shown"
    words = [i + 1 for i, column in enumerate(columns) if column.key is None]
    return folded(summary, table(caption, ["layer", *(c.title for c in columns)], cells, words), len(shown))


def _cell(layers: Sequence[Any], column: Column[Any]) -> str:
    texts = list(dict.fromkeys(column.text(layer) for layer in layers))
    if len(texts) == 1:
        return texts[0]
    if column.key is None:
        return ", ".join(texts) if len(texts) <= 3 else f"{len(texts)} different ones"
    keys = [(key, layer) for layer in layers if (key := column.key(layer)) is not None and key == key]
    if not keys:
        return f"{len(texts)} different ones"
    low, high = min(keys, key=lambda pair: pair[0])[1], max(keys, key=lambda pair: pair[0])[1]
    return f"{column.text(low)} to {column.text(high)}"
