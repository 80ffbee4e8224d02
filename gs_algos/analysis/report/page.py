"""Puts the parts of an analysis on one page that a browser, a notebook and a terminal show.

The page is one HTML file. It needs no network and no script, follows the light or dark scheme of its reader, can be
printed, and stays below 1.5 MB: in deep networks, layers that differ in numbers of their names share a row of a table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gs_algos.analysis.report import closing_sections, layer_sections, network_sections, sensitivity_section, trade_off
from gs_algos.analysis.report.formats import decibels
from gs_algos.analysis.report.markup import Html, layer_name, tag
from gs_algos.analysis.report.style import style
from gs_algos.core.files import write_atomically
from gs_algos.core.table import Table

if TYPE_CHECKING:
    from gs_algos.analysis.advice import Advice
    from gs_algos.analysis.comparison import Comparison
    from gs_algos.analysis.effect import Effect
    from gs_algos.analysis.latency import LayerTimes
    from gs_algos.analysis.report.trade_off import TradeOff
    from gs_algos.analysis.sensitivity import Sensitivity

WHO = "report"
LARGEST = 1_450_000  # bytes of a page
ROWS = (1000, 300, 100, 30)  # of a table of layers, from which the first is taken with which a page is not too large
SECTIONS = (
    network_sections.before_after,
    network_sections.where_bytes,
    network_sections.where_ms,
    layer_sections.bits,
    sensitivity_section.sensitivity,
    layer_sections.drift,
    layer_sections.weights,
    layer_sections.activations,
    closing_sections.search,
    trade_off.trade_off,
    layer_sections.channels,
    closing_sections.advice,
    closing_sections.notes,
    closing_sections.made,
)
WORST = 5  # layers that the text for a terminal names


@dataclass(frozen=True)
class Report:
    """Holds what a page shows; what is None or empty has no section.

    `str(report)` is a text for a terminal, and a notebook shows the page.

    Args:
        title: the class of the network, or its path.
        effect: what the whole network took before and takes after.
        comparison: both networks layer by layer.
        sensitivity: what rounding each layer costs, for each scheme.
        times: milliseconds of the layers, before and after.
        advice: what to do next.
        history: `gs_algos.history` of the network.
        search: of SLB, see `search_of`: "step" are numbers of steps; "levels" is layer -> level -> share of its
            weights; any other name is a curve over the steps, or layer -> curve.
        channels: of pruning; layer -> (output channels before, after).
        trade_off: of a search; networks between cost and quality.
        notes: what else a reader must know.
        made: with what the page was made: versions, device, date, command.
    """

    title: str
    effect: Effect | None = None
    comparison: Comparison | None = None
    sensitivity: Sensitivity | None = None
    times: tuple[LayerTimes, LayerTimes] | None = None
    advice: tuple[Advice, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    search: Mapping[str, Any] = field(default_factory=dict)
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    trade_off: TradeOff | None = None
    notes: tuple[str, ...] = ()
    made: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, whole or not at all.

        Raises:
            ValueError: if the path is a folder, or its folder is not there.
            OSError: if it cannot be written. What was there before stays.
        """
        target = Path(path)
        if target.is_dir():
            raise ValueError(f"{WHO}: path must be a file, got the folder {target}; try {target / 'report.html'}")
        if not target.parent.is_dir():
            raise ValueError(f"{WHO}: the folder of path must be there, got {target}; make {target.parent} first")
        write_atomically(target, self.html().encode())

    def html(self) -> str:
        """Returns the page: a whole HTML document."""
        head = (
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"{layer_name(self.title)}: {self._kind().lower()} report"),
            tag("style", Html(f"body{{margin:0}}\n{style()}")),
        )
        body = tag("body", self._content(), class_="gs-report")
        return f"<!DOCTYPE html>\n{tag('html', tag('head', head), body, lang='en')}\n"

    def _repr_html_(self) -> str:
        return tag("div", tag("style", Html(style())), self._content(), class_="gs-report", lang="en")

    def __str__(self) -> str:
        lines = [f"{layer_name(self.title)}: {network_sections.verdict(self)}"]
        if self.effect is not None:
            lines += ["", Table.of(("", "before", "after", "change"), network_sections.effect_rows(self.effect))]
        elif self.sensitivity is not None:
            lines += ["", str(replace(self.sensitivity, notes=()))]
        layers = () if self.comparison is None else self.comparison.layers
        known = [one for one in layers if one.sqnr is not None]
        if known:
            worst = sorted(known, key=lambda one: (one.sqnr == one.sqnr, one.sqnr))[:WORST]
            rows = [(layer_name(one.site), one.weight, decibels(one.sqnr), decibels(one.local_sqnr)) for one in worst]
            lines += ["", Table.of(("layers with the largest error", "weight", "cumulative", "local"), rows)]
        for one in self.advice:
            lines += ["", str(one)]
        return "\n".join([*lines, *(f"note: {note}" for note in closing_sections.all_notes(self))])

    def _kind(self) -> str:
        if self.trade_off is not None and self.effect is None:
            return "Search"
        return "Sensitivity" if self.effect is None and self.comparison is None and self.sensitivity else "Compression"

    def _content(self) -> Html:
        """Returns the page's content, with fewer rows in its tables where it would be too large."""
        for most in ROWS:
            content = tag(
                "div",
                tag("p", f"{self._kind()} report", class_="over"),
                tag("h1", layer_name(self.title)),
                tag("p", network_sections.verdict(self), class_="verdict"),
                [section(self, most) for section in SECTIONS],
                class_="page",
            )
            if len(content.encode()) < LARGEST:
                break
        return content
