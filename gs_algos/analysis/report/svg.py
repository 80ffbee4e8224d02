"""Draws the pictures of a report: bars, stacked bars, histograms and heat grids, as inline SVG without a script.

Each picture has a title, and so has each mark of it. Colours are classes, which the style of the page sets for light
and dark. What is not finite is left out of a path; its title says it in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from gs_algos.analysis.report.formats import significant
from gs_algos.analysis.report.markup import Html, Node, layer_name, number, tag

WIDTH = 880
NAME_LONGEST = 40  # characters of a name in a picture
STEPS = 6  # colours of a heat grid
REST = 5  # style of the segment that holds the rest


@dataclass(frozen=True)
class Bar:
    """Holds a row of `bars`: a name, and for each series a value with its text."""

    name: str
    values: tuple[float, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """Holds a part of a stacked bar. style: number of its colour."""

    name: str
    value: float
    text: str
    style: int


@dataclass(frozen=True)
class Cell:
    """Holds a cell of `grid`: a short text, its colour (`h0` to `h5` for heat, `b0` to `b5` for bits) and its title."""

    text: str
    style: str
    title: str


def svg(title: str, width: float, height: float, *children: Node, class_: str | None = None) -> Html:
    """Returns a picture, whose title says what it shows."""
    box = f"0 0 {number(width)} {number(height)}"
    return tag("svg", tag("title", title), *children, viewBox=box, role="img", class_=class_)


def mark(name: str, title: str, **attributes: str | float | None) -> Html:
    """Returns an SVG element with a title, which a pointer shows."""
    return tag(name, tag("title", title), **attributes)


def label(text: str, x: float, y: float, class_: str = "t", anchor: str | None = None) -> Html:
    return tag("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def rule(x1: float, y1: float, x2: float, y2: float, class_: str = "rule") -> Html:
    return tag("path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", class_=class_)


def fraction(value: float, low: float, high: float) -> float:
    """Returns where a value lies between two others, 0 to 1; 0.5 where floats cannot tell."""
    span = high - low
    return min(1.0, max(0.0, (value - low) / span)) if 0 < span < math.inf else 0.5


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns round numbers between low and high: multiples of 1, 2 or 5 times a power of ten."""
    if not 1e-300 < high - low < math.inf:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next((m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= most), 20 * power)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def bars(title: str, rows: Sequence[Bar], series: Sequence[str]) -> Html:
    """Draws horizontal bars from 0, one below the other in each row: grey for the first series, blue for the second."""
    most = max((v for row in rows for v in row.values if math.isfinite(v)), default=0) or 1
    left = _room_for_names([row.name for row in rows])
    room, thick, height = WIDTH - left - 170, 9, 30
    marks: list[Node] = []
    for i, row in enumerate(rows):
        y, longest = i * height + 6, 0.0
        marks.append(_named(row.name, left, y + thick + 4))
        for j, (name, value, text) in enumerate(zip(series, row.values, row.texts, strict=True)):
            width = max(1.0, room * value / most) if math.isfinite(value) and value > 0 else 0.0
            said = f"{layer_name(row.name)}, {name}: {text}"
            top = y + j * thick
            marks.append(mark("rect", said, x=left, y=top, width=width, height=thick - 1, class_=f"f{j}"))
            longest = max(longest, width)
        marks.append(label(" → ".join(row.texts), left + longest + 8, y + thick + 4, "n"))
    return svg(title, WIDTH, len(rows) * height, rule(left, 0, left, len(rows) * height, "axis"), marks)


def pair(title: str, values: Sequence[float], texts: Sequence[str]) -> Html:
    """Draws the bars of a value before and after, small, with their texts beside them."""
    width, room, height = 240, 130, 20
    most = max((v for v in values if math.isfinite(v)), default=0) or 1
    parts: list[Node] = []
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        wide = max(1.0, room * value / most) if math.isfinite(value) and value > 0 else 0.0
        said = f"{('before', 'after')[i]}: {text}"
        parts.append(mark("rect", said, x=0, y=i * height + 2, width=wide, height=height - 6, class_=f"f{i}"))
        parts.append(label(text, wide + 6, i * height + 14, "n"))
    return svg(title, width, 2 * height, parts, class_="pair")


def stacked(title: str, rows: Sequence[tuple[str, str, Sequence[Segment]]]) -> Html:
    """Draws stacked bars of one scale below each other; each has a name, a text for its sum, and segments."""
    left, right, thick, height = 64, 110, 30, 42
    most = max((sum(s.value for s in _drawable(segments)) for _, _, segments in rows), default=0) or 1
    room = WIDTH - left - right
    marks: list[Node] = []
    for i, (name, text, segments) in enumerate(rows):
        x, y = float(left), i * height + 4.0
        marks.append(label(name, left - 10, y + thick / 2 + 4, "t", "end"))
        for segment in _drawable(segments):
            width = room * segment.value / most
            inside = max(0.5, width - 1)
            said = f"{name}, {segment.name}: {segment.text}"
            marks.append(mark("rect", said, x=x, y=y, width=inside, height=thick, class_=f"s{segment.style}"))
            shown = next(
                (s for s in (f"{segment.name} {segment.text}", segment.text) if 7.2 * len(s) < inside - 12), ""
            )
            if shown:
                marks.append(label(shown, x + 8, y + thick / 2 + 4, f"k{segment.style}"))
            x += width
        marks.append(label(text, x + 8, y + thick / 2 + 4, "n"))
    return svg(title, WIDTH, len(rows) * height, marks)


def histogram(
    title: str,
    bins: tuple[float, float, Sequence[int]],
    levels: Sequence[float] = (),
    span: tuple[float, float] | None = None,
) -> Html:
    """Draws counts of values in equal bins, heights as their square roots, with the levels of a grid as ticks below.

    Args:
        bins: lowest and highest value, and the counts between them.
        levels: of the grid that values are rounded to.
        span: range that values are clipped to; what lies outside is shaded.
    """
    width, top, room, left = 280, 6, 84, 6
    low, high, counts = bins
    ends = [v for v in (low, high, *levels, *(span or ())) if math.isfinite(v)]
    start, end = (min(ends), max(ends)) if ends else (0.0, 1.0)
    if end <= start:
        start, end = start - 0.5, end + 0.5
    most = _tallest(counts)

    def x(value: float) -> float:
        return left + (width - 2 * left) * fraction(value, start, end)

    bottom = top + room
    parts: list[Node] = []
    for value in levels if 0 < len(levels) <= 32 else ():
        if math.isfinite(value):
            parts.append(rule(x(value), top, x(value), bottom))
    if math.isfinite(low) and math.isfinite(high) and counts:
        edges = [x(low + (high - low) * i / len(counts)) for i in range(len(counts) + 1)]
        if high == low:
            edges = [x(low) - 2, x(low) + 2]
        steps = "".join(
            f"H{number(a)}V{number(bottom - room * math.sqrt(min(1.0, c / most)))}H{number(b)}"
            for a, b, c in zip(edges, edges[1:], counts, strict=False)
        )
        parts.append(mark("path", title, d=f"M{number(edges[0])} {bottom}{steps}V{bottom}Z", class_="area"))
    if span is not None and all(map(math.isfinite, span)):
        for a, b in ((left, x(span[0])), (x(span[1]), width - left)):
            if b - a > 0.5:
                parts.append(mark("rect", "clipped", x=a, y=top, width=b - a, height=room, class_="clip"))
        said = f"range {significant(span[0])} to {significant(span[1])}"
        path = "".join(f"M{number(x(v))} {top}V{bottom + 5}" for v in span)
        parts.append(mark("path", said, d=path, class_="edge"))
    rug = "".join(f"M{number(x(v))} {bottom + 2}v7" for v in levels if math.isfinite(v))
    if rug:
        parts.append(mark("path", f"{len(levels)} levels", d=rug, class_="rug"))
    parts.append(rule(left, bottom, width - left, bottom, "axis"))
    parts += [
        label(significant(start), left, bottom + 23, "n"),
        label(significant(end), width - left, bottom + 23, "n", "end"),
    ]
    if start < 0 < end and left + 40 < x(0) < width - left - 40:
        parts.append(label("0", x(0), bottom + 23, "n", "middle"))
    return svg(title, width, bottom + 28, parts, class_="small")


def grid(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cell: Callable[[int, int], Cell | None],
) -> Html:
    """Draws a heat grid: a row of cells with numbers for each name, a column for each block of a network."""
    left = _room_for_names(rows)
    width = min(34.0, (WIDTH - left - 4) / max(1, len(columns)))
    height, top = 22, 22
    marks: list[Node] = []
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if width * n >= 26), 200)
    for j in range(0, len(columns), every):
        marks.append(label(columns[j], left + (j + 0.5) * width, top - 7, "n", "middle"))
    for i, name in enumerate(rows):
        marks.append(_named(name, left, top + i * height + 15))
        for j in range(len(columns)):
            found = cell(i, j)
            if found is None:
                continue
            x, y = left + j * width, top + i * height
            wide = width - (1.5 if width > 6 else 0.3)
            marks.append(mark("rect", found.title, x=x, y=y, width=wide, height=height - 1.5, class_=found.style))
            if 6.6 * len(found.text) <= width - 2:
                marks.append(label(found.text, x + wide / 2, y + 14.5, f"i{found.style}", "middle"))
    return svg(title, WIDTH, top + len(rows) * height, marks)


def _tallest(counts: Sequence[int]) -> float:
    """Returns the count that a picture is as high as: the largest, or a little over the second if one towers above."""
    first, second = [*sorted(counts, reverse=True), 0, 0][:2]
    return float(min(first, 1.2 * second) if first > 4 * second > 0 else first) or 1.0


def _room_for_names(names: Sequence[str]) -> float:
    return 6.7 * max((len(layer_name(name, NAME_LONGEST)) for name in names), default=0) + 14


def _named(name: str, x: float, y: float) -> Html:
    shown = tag("title", layer_name(name)), layer_name(name, NAME_LONGEST)
    return tag("text", *shown, x=x - 10, y=y, class_="m", text_anchor="end")


def _drawable(segments: Iterable[Segment]) -> Iterator[Segment]:
    return (segment for segment in segments if math.isfinite(segment.value) and segment.value > 0)
