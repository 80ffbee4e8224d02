"""Draws charts along the depth of a network, or along the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeGuard

from gs_algos.analysis.report.formats import MINUS, significant
from gs_algos.analysis.report.markup import Html, Node, layer_name, number
from gs_algos.analysis.report.svg import NAME_LONGEST, WIDTH, fraction, label, mark, rule, svg, ticks

LEFT, RIGHT = 64, 64  # of the charts, so that they lie above each other
MARKED = 80  # layers up to which each has a mark on a line


@dataclass(frozen=True)
class Line:
    """Holds a line of `lines`: a value for each layer, None where there is none. style: `a` or `b`."""

    name: str
    values: Sequence[float | None]
    style: str


def depth_bits(title: str, layers: Sequence[tuple[str, float, float | None, bool, str]]) -> Html:
    """Draws the bits of each layer as columns on a logarithmic axis from 1 to 32, and a line for its activations.

    layers: name, bits of a weight, bits of the activations or None, whether the weight stayed float, and the title.
    """
    top, room = 10.0, 130.0
    step = (WIDTH - LEFT - RIGHT) / max(1, len(layers))
    inner = step if step < 3 else step * 0.78

    def y(bits: float) -> float:
        return top + room * (1 - (1 + math.log2(min(64.0, max(0.5, bits)))) / 6)

    marks: list[Node] = []
    for power in range(6):
        at = y(2.0**power)
        marks += [rule(LEFT, at, WIDTH - RIGHT, at), label(str(2**power), LEFT - 8, at + 4, "n", "end")]
    for i, (_, bits, act, is_float, said) in enumerate(layers):
        x = LEFT + i * step + (step - inner) / 2
        if math.isfinite(bits) and bits > 0:
            height = top + room - y(bits)
            style = "f0" if is_float else "f1"
            marks.append(mark("rect", said, x=x, y=y(bits), width=inner, height=height, class_=style))
        if act is not None:
            marks.append(rule(x, y(act), x + inner, y(act), "act"))
    return svg(title, WIDTH, top + room + 40, marks, _depth_axis(len(layers), top + room), class_="columns")


def lines(title: str, names: Sequence[str], series: Sequence[Line], titles: Sequence[str]) -> Html:
    """Draws values of layers in dB along the depth of a network, with the relative error on the right-hand axis.

    A triangle at the top stands for an exact layer, a cross at the bottom for one that is not a number. A column over
    each layer (over some of them where there are many) shows its title.
    """
    top, room, bottom = 12, 240, 252
    known = [v for line in series for v in line.values if _is_number(v)]
    low, high = _rounded(min(known, default=0), max(known, default=40))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(names))

    def x(i: float) -> float:
        return LEFT + (i + 0.5) * step

    def y(value: float) -> float:
        return top + room * (high - min(high, max(low, value))) / (high - low)

    marks: list[Node] = []
    for value in ticks(low, high):
        marks.append(rule(LEFT, y(value), WIDTH - RIGHT, y(value)))
        marks.append(label(_tick(value), LEFT - 8, y(value) + 4, "n", "end"))
        marks.append(label(_error(value), WIDTH - RIGHT + 8, y(value) + 4, "n"))
    marks.append(label("dB", LEFT - 8, bottom + 17, "t", "end"))
    marks.append(label("error", WIDTH - RIGHT + 8, bottom + 17))
    for line in series:
        marks.append(_line(line, x, y, top, bottom))
    marks.append(_lowest(names, series, x, y, bottom))
    every = max(1, math.ceil(len(names) / 500))
    for i in range(0, len(names), every):
        marks.append(mark("rect", titles[i], x=LEFT + i * step, y=top, width=step * every, height=room, class_="hover"))
    return svg(title, WIDTH, bottom + 40, marks, _depth_axis(len(names), bottom))


def curves(title: str, steps: Sequence[float], lines_of: Sequence[tuple[str, Sequence[float]]]) -> Html:
    """Draws lines over steps, the mean of them stronger; what is not finite leaves a gap.

    lines_of: name and values of each line.
    """
    room, bottom = 150, 160
    known = [v for _, values in lines_of for v in values if math.isfinite(v)]
    known_steps = [step for step in steps if math.isfinite(step)]
    first, last = min(known_steps, default=0.0), max(known_steps, default=1.0)
    low, high = min([0.0, *known]), max(known, default=1.0)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * fraction(step, first, last)

    def y(value: float) -> float:
        return bottom - room * fraction(value, low, high)

    def line(name: str, values: Sequence[float], style: str) -> Node:
        pairs = list(zip(steps, values, strict=False))
        runs = [list(run) for ok, run in groupby(pairs, lambda pair: all(map(math.isfinite, pair))) if ok]
        path = "".join("M" + "L".join(f"{number(x(at))} {number(y(v))}" for at, v in run) for run in runs)
        return mark("path", name, d=path, class_=style) if path else None

    parts: list[Node] = []
    for value in ticks(low, high, 4):
        at_y = y(value)
        parts += [rule(LEFT, at_y, WIDTH - RIGHT, at_y), label(_tick(value), LEFT - 8, at_y + 4, "n", "end")]
    for value in ticks(first, last, 10):
        parts.append(label(_tick(value), x(value), bottom + 17, "n", "middle"))
    if len(lines_of) > 1:
        parts += [line(layer_name(name), values, "line c") for name, values in lines_of]
        parts.append(line("mean", means([values for _, values in lines_of]), "line a"))
    else:
        parts += [line(layer_name(name), values, "line a") for name, values in lines_of]
    parts.append(label("steps", WIDTH / 2, bottom + 34, "t", "middle"))
    return svg(title, WIDTH, bottom + 40, parts, rule(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))


def means(lines_of: Sequence[Sequence[float]]) -> list[float]:
    """Returns the mean of lines at each step, of those that are finite there; NaN where none is."""
    columns = [[v for v in column if math.isfinite(v)] for column in zip(*lines_of, strict=False)]
    return [sum(column) / len(column) if column else math.nan for column in columns]


def _tick(value: float) -> str:
    return f"{value:,g}".replace("-", MINUS) if value == 0 or 1e-4 <= abs(value) < 1e5 else significant(value)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Returns the range of an axis in dB around two values, multiples of 5 and 10 apart at least."""
    low, high = (min(200.0, max(-100.0, value)) for value in (low, high))
    first, last = 5 * math.floor(low / 5 - 0.2), 5 * math.ceil(high / 5 + 0.2)
    return float(first), float(max(last, first + 10))


def _error(sqnr: float) -> str:
    share = 100 * 10 ** (-sqnr / 20)
    return f"{share:.0f} %" if 1 <= share < 1e4 else f"{significant(share, 1)} %"


def _depth_axis(layers: int, y: float) -> list[Node]:
    """Draws the axis below a chart along the depth: numbers of layers, counted from 1."""
    step = (WIDTH - LEFT - RIGHT) / max(1, layers)
    at = sorted({1, *(int(t) for t in ticks(1, layers, 12) if t >= 1 and t == int(t))} if layers > 1 else {1})
    parts: list[Node] = [rule(LEFT, y, WIDTH - RIGHT, y, "axis")]
    for n in at:
        if n != 1 and (n - 1) * step < 24:
            continue
        parts.append(label(str(n), LEFT + (n - 0.5) * step, y + 17, "n", "middle"))
    parts.append(label("layers in the order in which they run", WIDTH / 2, y + 34, "t", "middle"))
    return parts


def _line(
    line: Line, x: Callable[[float], float], y: Callable[[float], float], top: float, bottom: float
) -> list[Node]:
    """Draws one line with gaps where there is no number, and its marks."""
    numbered = list(enumerate(line.values))
    runs = [list(run) for ok, run in groupby(numbered, lambda p: _is_number(p[1])) if ok]
    path = "".join(
        "".join(f"{'L' if k else 'M'}{number(x(i))} {number(y(v))}" for k, (i, v) in enumerate(run) if v is not None)
        for run in runs
    )
    dense = len(line.values) > MARKED
    dotted = {i for run in runs if len(run) == 1 or not dense for i, _ in run}
    if dense and line.style == "b":  # what each layer does by itself: points, since lines would cover the page
        path = "".join(f"M{number(x(i) - 1.5)} {number(y(v) - 1.5)}h3v3h-3z" for i, v in numbered if _is_number(v))
        dotted = set()
    style = f"dot {line.style}" if dense and line.style == "b" else f"line {line.style}"
    parts: list[Node] = [mark("path", line.name, d=path, class_=style)] if path else []
    for i, value in numbered:
        if value is None:
            continue
        if math.isfinite(value):
            if i in dotted:
                parts.append(_dot(line, x(i), y(value)))
        elif value > 0:
            d = f"M{number(x(i) - 4)} {number(top + 8)}h8l-4 -7z"
            parts.append(mark("path", f"{line.name}: exact", d=d, class_=f"dot {line.style}"))
        else:
            d = f"M{number(x(i) - 4)} {number(bottom - 9)}l8 8m-8 0l8 -8"
            parts.append(mark("path", f"{line.name}: not a number", d=d, class_="cross"))
    return parts


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _dot(line: Line, x: float, y: float) -> Html:
    """Draws a point of a line: round for `a`, square for `b`, so that the shape tells them apart too."""
    said = line.name
    if line.style == "a":
        return mark("circle", said, cx=x, cy=y, r=2.6, class_="dot a")
    return mark("rect", said, x=x - 2.3, y=y - 2.3, width=4.6, height=4.6, class_="dot b")


def _lowest(
    names: Sequence[str],
    series: Sequence[Line],
    x: Callable[[float], float],
    y: Callable[[float], float],
    bottom: float,
) -> Node:
    """Writes the name of the layer that is the lowest of the last line that has values."""
    for line in reversed(series):
        known = [(v, i) for i, v in enumerate(line.values) if _is_number(v)]
        if known:
            value, i = min(known)
            anchor = "start" if x(i) < WIDTH / 2 else "end"
            offset = 9 if anchor == "start" else -9
            return label(layer_name(names[i], NAME_LONGEST), x(i) + offset, min(bottom - 4, y(value) + 14), "m", anchor)
    return None
