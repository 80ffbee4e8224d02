"""Builds the last sections of a report: the search of SLB, advice, notes, and how the page was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gs_algos.analysis.report import depth_charts, svg
from gs_algos.analysis.report.formats import percent, significant
from gs_algos.analysis.report.markup import Html, layer_name, tag
from gs_algos.analysis.report.tables import figure, folded, paragraph, section, table

if TYPE_CHECKING:
    from gs_algos.analysis.report.page import Report

LONGEST = 4000  # characters of a config or a note that are shown
LINES = 60  # layers of a curve
MEANINGS = {
    "gap": "quantization gap, the distance of the mixtures from the levels that they choose",
    "confidence": "mean of each weight's largest probability",
}
CURVE = 200  # points of a curve of the search
NOTES = 100
LEVELS = 32  # of a layer
MOST = 24  # layers whose shares of levels are drawn


def search(report: Report, most: int) -> Html:
    """Shows how SLB's search went: curves over its steps, and the shares of the levels that it chose."""
    steps = [float(step) for step in report.search.get("step", ())]
    curves = [(name, values) for name, values in report.search.items() if name not in ("step", "levels") and values]
    figures = [_curves(name, steps, values) for name, values in curves]
    shares: Mapping[str, Mapping[Any, float]] = report.search.get("levels") or {}
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
    found = all_notes(report)
    if not found:
        return Html("")
    shown = found if len(found) <= NOTES else [*found[:NOTES], f"{len(found) - NOTES:,} more notes"]
    return section("Notes", tag("ul", [tag("li", _cut(note)) for note in shown]))


def all_notes(report: Report) -> list[str]:
    """Returns the notes of a report and of its parts, each once."""
    parts = (report.effect, report.comparison, report.sensitivity, report)
    return list(dict.fromkeys(note for part in parts if part is not None for note in part.notes))


def made(report: Report, most: int) -> Html:
    """Shows with what the page was made, and what had been done to the network."""
    if not report.made and not report.history:
        return Html("")
    facts = [(tag("dt", key.replace("_", " ")), tag("dd", _cut(str(value)))) for key, value in report.made.items()]
    done = [
        folded(
            f"{i + 1}. {entry.get('algorithm', 'an algorithm')}, {entry.get('stage', 'applied')}: its config",
            tag("pre", tag("code", _cut(json.dumps(entry.get("config", {}), indent=2, default=str))), tabindex="0"),
            0,
        )
        for i, entry in enumerate(report.history)
    ]
    return section("How this was made", tag("dl", facts) if facts else None, done)


def _curves(name: str, steps: Sequence[float], values: Any) -> Html:
    """Draws one value by step, of the network or of each of its layers."""
    lines_of = list(values.items()) if isinstance(values, Mapping) else [(name, values)]
    at = steps if steps else [float(i) for i in range(len(lines_of[0][1]))]
    every = max(1, math.ceil(len(at) / CURVE))
    shown = lines_of[:: math.ceil(len(lines_of) / LINES)]
    thinned = [(site, [float(v) for v in of[::every]]) for site, of in shown]
    what = MEANINGS.get(name, name)
    caption = f"{what[:1].upper()}{what[1:]}, by step"
    layers = f": each of {len(shown):,} layers, and their mean" if len(shown) > 1 else ""
    if len(shown) < len(lines_of):
        layers = f": {len(shown):,} of {len(lines_of):,} layers, and their mean"
    means = depth_charts.means([of for _, of in thinned])
    worst = [max((of[i] for _, of in thinned if i < len(of)), default=math.nan) for i in range(len(means))]
    best = [min((of[i] for _, of in thinned if i < len(of)), default=math.nan) for i in range(len(means))]
    columns = zip(at[::every], best, means, worst, strict=False)
    rows = [[significant(step, 6), *map(significant, numbers)] for step, *numbers in columns]
    if len(shown) == 1:
        rows = [[row[0], row[2]] for row in rows]
    header = ("step", "least", "mean", "most") if len(shown) > 1 else ("step", name)
    whole = folded(f"{caption}: table", table(caption, header, rows), len(rows))
    return figure(depth_charts.curves(caption, at[::every], thinned), f"{caption}{layers}.", whole)


def _level_shares(shares: Mapping[str, Mapping[Any, float]]) -> Html:
    """Draws which share of each layer's weights took which level."""
    sites = list(shares)[:MOST]
    levels = list(dict.fromkeys(level for site in sites for level in shares[site]))[:LEVELS]

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
