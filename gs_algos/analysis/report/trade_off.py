"""Shows what else a search could have found: networks between cost and quality, as a picture and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gs_algos.analysis.report.formats import significant
from gs_algos.analysis.report.markup import Html, Node, number, tag
from gs_algos.analysis.report.svg import WIDTH, fraction, label, mark, rule, svg, ticks
from gs_algos.analysis.report.tables import figure, folded, paragraph, section, table

if TYPE_CHECKING:
    from gs_algos.analysis.report.page import Report

LEFT, RIGHT, TOP, ROOM = 96, 24, 12, 260
AT_EDGE = 16  # from the right end on, a label under the axis ends at its tick


@dataclass(frozen=True)
class TradeOff:
    """Holds the networks that a search knows of.

    Args:
        unit: of the cost.
        before: cost of the float network.
        most: that the network may cost.
        loss: what is lost in quality, in words.
        chosen: (cost, loss) of the network that was chosen.
        front: of networks that were measured, of which none is both dearer and worse than another.
        predicted: of networks as the scores of single choices predict them; () where these have another unit.
        rules: to paste, in text.
    """

    unit: str
    before: float
    most: float
    loss: str
    chosen: tuple[float, float]
    front: Sequence[tuple[float, float]]
    predicted: Sequence[tuple[float, float]] = ()
    rules: Sequence[str] = field(default_factory=tuple)

    def verdict(self) -> str:
        """Says in one sentence what was found."""
        cost, loss = self.chosen
        share = f"{100 * cost / self.before:.1f} % of the float network's {_cost(self.before)} {self.unit}"
        return f"{share}; {self.loss}: {significant(loss)}."


def trade_off(report: Report, most: int) -> Html:
    """Shows the networks of a search as dots, the one that was chosen, and its rules."""
    found = report.trade_off
    if found is None:
        return Html("")
    caption = f"{found.loss[:1].upper()}{found.loss[1:]} by {found.unit}: networks that were measured"
    rows = [[_cost(c), f"{100 * c / found.before:.1f} %", significant(y)] for c, y in found.front]
    header = (found.unit, "of the float network", found.loss)
    whole = folded(f"{caption}: table", table(caption, header, rows), len(rows))
    words = (
        f"{caption}, none both dearer and worse than another; the large dot was chosen, the upright line is the budget"
    )
    words += ", and the broken line is what the scores of single choices predict." if found.predicted else "."
    rules = [tag("pre", tag("code", text), tabindex="0") for text in found.rules]
    paste = paragraph(tag("strong", "The rules that were found:")) if rules else None
    return section("Cost and quality", figure(_dots(caption, found), words, whole), paste, rules)


def _dots(title: str, found: TradeOff) -> Html:
    """Draws losses over costs; on a logarithmic axis where they are all above 0."""
    points = [found.chosen, *found.front, *found.predicted]
    points = [point for point in points if all(map(math.isfinite, point))]
    log = all(loss > 0 for _, loss in points)
    heights = [math.log10(loss) if log else loss for _, loss in points]
    costs = [cost for cost, _ in points]
    low, high = min(heights, default=0.0), max(heights, default=1.0)
    first, last = min([found.most, *costs]), max([found.most, *costs])
    bottom = TOP + ROOM

    def x(cost: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * fraction(cost, first, last)

    def y(loss: float) -> float:
        return bottom - ROOM * fraction(math.log10(loss) if log else loss, low, high)

    parts: list[Node] = []
    for value in ticks(low, high, 5):
        at = bottom - ROOM * fraction(value, low, high)
        shown = significant(10**value if log else value)
        parts += [rule(LEFT, at, WIDTH - RIGHT, at), label(shown, LEFT - 8, at + 4, "n", "end")]
    for value in ticks(first, last, 6):
        anchor = "end" if x(value) > WIDTH - RIGHT - AT_EDGE else "middle"
        parts.append(label(_cost(value), x(value), bottom + 18, "n", anchor))
    parts.append(label(found.unit, WIDTH - RIGHT, bottom + 36, "t", "end"))
    parts.append(mark("path", f"the budget: {_cost(found.most)} {found.unit}", d=_line(x, found.most), class_="edge"))
    parts += [_path(found.predicted, x, y, "predicted", "line b"), _path(found.front, x, y, "measured", "line a")]
    for style, radius, group in (("a", 3.5, found.front), ("a", 7.0, [found.chosen])):
        for cost, loss in group:
            if math.isfinite(loss):
                said = f"{_cost(cost)} {found.unit}, {significant(loss)}"
                parts.append(mark("circle", said, cx=x(cost), cy=y(loss), r=radius, class_=f"dot {style}"))
    return svg(title, WIDTH, bottom + 44, parts)


def _cost(value: float) -> str:
    """Writes a cost: large numbers are counts."""
    return f"{value:,.0f}" if value >= 1000 else significant(value)


def _line(x: object, cost: float) -> str:
    assert callable(x)
    return f"M{number(x(cost))} {TOP}V{TOP + ROOM}"


def _path(points: Sequence[tuple[float, float]], x: object, y: object, title: str, style: str) -> Node:
    assert callable(x) and callable(y)
    known = [point for point in points if all(map(math.isfinite, point))]
    if len(known) < 2:
        return None
    path = "M" + "L".join(f"{number(x(cost))} {number(y(loss))}" for cost, loss in known)
    return mark("path", title, d=path, class_=style)
