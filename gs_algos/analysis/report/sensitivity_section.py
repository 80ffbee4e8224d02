"""Builds the section of a report that shows how much the network minds the rounding of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gs_algos.analysis.report import svg
from gs_algos.analysis.report.block_grid import GRID, MANY, block_grid
from gs_algos.analysis.report.formats import significant
from gs_algos.analysis.report.layer_groups import blocks
from gs_algos.analysis.report.markup import Html, Node, layer_name, tag
from gs_algos.analysis.report.tables import Column, figure, layer_table, paragraph, section, table

if TYPE_CHECKING:
    from gs_algos.analysis.report.page import Report

HOT = 24  # layers in the table of the most sensitive ones
UNITS = {
    "kl": "mean KL divergence in nats that rounding this layer alone causes",
    "gradient": "KL divergence in nats that rounding this layer alone is predicted to cause, from gradients",
    "nsr": "noise of the layer's output relative to its signal, from rounding this layer alone",
}


def sensitivity(report: Report, most: int) -> Html:
    """Shows how much the network minds the rounding of each layer, for each scheme."""
    found = report.sensitivity
    if found is None or not found.scores:
        return Html("")
    schemes = list(dict.fromkeys(scheme for scores in found.scores.values() for scheme in scores))
    sites = list(found.scores)
    step = _heat_steps([score for scores in found.scores.values() for score in scores.values()])
    ranked = sorted(sites, key=lambda site: -_worst(found.scores[site]))[:HOT]
    cells = {site: [_heat(found.scores[site].get(scheme), step) for scheme in schemes] for site in ranked}
    by = UNITS[found.by]
    said = f"Each number is the {by}; mean of {found.samples:,} samples, in {significant(found.seconds)} s. "
    shown = (
        f"The {HOT} most sensitive of {len(sites):,} layers" if len(sites) > HOT else "The most sensitive layer first"
    )
    columns = [_score_column(scheme) for scheme in schemes]
    whole = layer_table("Sensitivity", sites, [found.scores[site] for site in sites], columns, most)
    return section(
        "Which layers hurt",
        paragraph(said, "More is worse; the colour follows the logarithm."),
        _sensitivity_grid(found.scores, schemes) if len(sites) > MANY else None,
        tag("div", table(shown, ["layer", *schemes], [[layer_name(s), *cells[s]] for s in ranked]), class_="heat"),
        whole if len(sites) > HOT else None,
    )


def _sensitivity_grid(scores: Mapping[str, Mapping[str, float]], schemes: Sequence[str]) -> Node:
    """Draws the scores of the scheme that hurts the most, in a grid of blocks; nothing if a network has none."""
    sites = list(scores)
    found = blocks(sites)
    if found is None:
        return None
    sums = {s: sum(v for by in scores.values() if math.isfinite(v := by.get(s, 0.0))) for s in schemes}
    scheme = max(schemes, key=lambda s: sums[s])
    known = [_known(scores[site].get(scheme)) for site in sites]
    step = _heat_steps(known)

    def cell(indices: list[int]) -> svg.Cell:
        i = max(indices, key=lambda i: known[i])
        of = f", the most of {len(indices):,}" if len(indices) > 1 else ""
        return svg.Cell("", f"h{step(known[i])}", f"{layer_name(sites[i])}: {significant(known[i])} at {scheme}{of}")

    drawn = block_grid(f"Sensitivity at {scheme}, by layer and block", sites, found, cell)
    return figure(drawn, f"At {scheme}. {GRID} a stronger colour means more sensitive.")


def _heat_steps(scores: Sequence[float]) -> Callable[[float | None], int]:
    """Returns which colour of a heat grid a score has: equal steps of the logarithm."""
    logs = [math.log10(score) for score in scores if math.isfinite(score) and score > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def step(score: float | None) -> int:
        if score is None or math.isnan(score) or score <= 0 or high == low:
            return 0
        share = 1.0 if math.isinf(score) else (math.log10(score) - low) / (high - low)
        return min(svg.STEPS - 1, max(0, int(svg.STEPS * share)))

    return step


def _heat(score: float | None, step: Any) -> Html:
    return tag("span", significant(score), class_=f"h{step(score)}")


def _worst(scores: Mapping[str, float]) -> float:
    return max((math.inf if math.isnan(v) else v for v in scores.values()), default=0.0)


def _score_column(scheme: str) -> Column[Any]:
    return Column(scheme, lambda scores: significant(scores.get(scheme)), lambda scores: scores.get(scheme))


def _known(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score
