"""Builds the last sections of a report: the search of SLB, advice, notes, and how the page was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gs_algos.analysis.report import depth_charts, svg
from gs_algos.analysis.report.formats import percent, significant
from gs_algos.analysis.report.markup import Html, layer_name, tag
from gs_algos.analysis.report.tables import figure, folded, paragraph, section, table

if TYPE_CHECKING:
    from gs_algos.analysis.report.page import Report

LONGEST = 4000  # characters of a config or a note that are shown
CURVE = 200  # points of a curve of the search
MOST = 24  # layers whose shares of levels are drawn


def search(report: Report, most: int) -> Html:
    """Shows how SLB's search went: entropy and temperature by step, and the shares of the levels it chose."""
    found = report.search
    steps = list(found.get("step", ()))
    curves = [(name, list(found[name])) for name in ("entropy", "temperature") if found.get(name)]
    shares: Mapping[str, Mapping[Any, float]] = found.get("levels") or {}
    figures = []
    for name, values in curves:
        every = max(1, math.ceil(len(values) / CURVE))
        at = steps if len(steps) == len(values) else list(range(len(values)))
        points = [(at[i], values[i]) for i in range(0, len(values), every)]
        rows = [(significant(float(x), 6), significant(float(v))) for x, v in points]
        caption = f"{name.capitalize()} of the search by step"
        picture = depth_charts.curve(caption, points)
        figures.append(
            figure(picture, f"{caption}.", folded(f"{caption}: table", table(caption, ("step", name), rows), len(rows)))
        )
    if shares:
        figures.append(_level_shares(shares))
    return section("The search for levels", figures) if figures else Html("")


def advice(report: Report, most: int) -> Html:
    """Shows what to do next, with rules to copy."""
    if not report.advice:
        return Html("")
    items = [
        tag(
            "li",
            paragraph(tag("strong", one.text)),
            paragraph(one.why) if one.why else None,
            tag("pre", tag("code", one.rules), tabindex="0") if one.rules else None,
            paragraph(tag("strong", "Tried: "), one.verified, class_="tried") if one.verified else None,
        )
        for one in report.advice
    ]
    return section("What to do next", tag("ol", items, class_="advice"))


def notes(report: Report, most: int) -> Html:
    """Shows what else a reader must know."""
    found = [*(() if report.comparison is None else report.comparison.notes), *report.notes]
    if not found:
        return Html("")
    return section("Notes", tag("ul", [tag("li", _cut(note)) for note in dict.fromkeys(found)]))


def made(report: Report, most: int) -> Html:
    """Shows with what the page was made, and what had been done to the network."""
    if not report.made and not report.history:
        return Html("")
    facts = [(tag("dt", key), tag("dd", _cut(str(value)))) for key, value in report.made.items()]
    done = [
        folded(
            f"{i + 1}. {entry.get('algorithm', 'an algorithm')}, {entry.get('stage', 'applied')}: its config",
            tag("pre", tag("code", _cut(json.dumps(entry.get("config", {}), indent=2, default=str))), tabindex="0"),
            0,
        )
        for i, entry in enumerate(report.history)
    ]
    return section("How this was made", tag("dl", facts) if facts else None, done)


def _level_shares(shares: Mapping[str, Mapping[Any, float]]) -> Html:
    """Draws which share of each layer's weights took which level."""
    sites = list(shares)[:MOST]
    levels = list(dict.fromkeys(level for site in sites for level in shares[site]))

    def cell(i: int, j: int) -> svg.Cell | None:
        share = shares[sites[i]].get(levels[j])
        if share is None:
            return None
        step = min(5, int(6 * share)) if math.isfinite(share) else 0
        return svg.Cell(
            percent(share).split(".")[0], f"b{step}", f"{layer_name(sites[i])}, level {levels[j]}: {percent(share)}"
        )

    names = [str(level) if isinstance(level, str) else significant(float(level), 2) for level in levels]
    rows = [[layer_name(site), *(percent(shares[site].get(level)) for level in levels)] for site in sites]
    caption = "Share of a layer's weights at each level, in percent"
    if len(shares) > len(sites):
        caption += f"; the first {len(sites)} of {len(shares):,} layers"
    whole = folded(f"{caption}: table", table(caption, ("layer", *names), rows), len(rows))
    return figure(svg.grid(caption, sites, names, cell), f"{caption}.", whole)


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … ({len(text):,} characters)"
