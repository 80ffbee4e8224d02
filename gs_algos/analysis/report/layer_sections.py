"""Builds the sections of a report that speak of layers: bits, drift, weights, activations, channels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gs_algos.analysis.report import depth_charts, svg
from gs_algos.analysis.report.block_grid import GRID, MANY, block_grid
from gs_algos.analysis.report.formats import NONE, decibels, percent, relative_error, significant, size
from gs_algos.analysis.report.layer_groups import blocks
from gs_algos.analysis.report.markup import Html, layer_name, tag
from gs_algos.analysis.report.tables import Column, figure, layer_table, paragraph, section

if TYPE_CHECKING:
    from gs_algos.analysis.comparison import Histogram, LayerComparison
    from gs_algos.analysis.report.page import Report

PICTURES = 12  # layers whose values are drawn
CUT = ", and a peak over twice as high as all others is cut"
LINES = (
    ("a", "●", "cumulative: each network on its own inputs"),
    ("b", "■", "local: the compressed layer on the float network's inputs"),
)


def bits(report: Report, most: int) -> Html:
    """Shows how many bits each layer's weight takes: columns along the depth, or a grid of blocks."""
    layers = _layers(report)
    if not layers:
        return Html("")
    sites = [one.site for one in layers]
    columns = [
        Column[Any]("kind", lambda one: one.kind),
        Column[Any]("weight", lambda one: one.weight),
        Column[Any]("activations", lambda one: one.act or "float"),
        Column[Any]("bits a weight", lambda one: significant(one.bits), lambda one: one.bits),
        Column[Any]("bytes", lambda one: size(one.nbytes), lambda one: one.nbytes),
        Column[Any]("bytes before", lambda one: size(one.float_nbytes), lambda one: one.float_nbytes),
    ]
    found = blocks(sites) if len(layers) > MANY else None
    if found is not None:
        picture = block_grid(
            "Bits a weight, by layer and block", sites, found, lambda at: _bits_cell([layers[i] for i in at])
        )
        caption = f"Bits a weight takes, scales included. {GRID} a stronger colour means more bits."
    else:
        drawn = [(one.site, one.bits, act_bits(one.act), _is_float(one), _bits_title(one)) for one in layers]
        picture = depth_charts.depth_bits("Bits of each layer's weight and activations", drawn)
        caption = (
            "Bits a weight takes, scales included, on a logarithmic axis: blue where it is quantized, grey where it "
            "stayed float. A line is the bits of the layer's input, where that is quantized."
        )
    return section("Bits of the layers", figure(picture, caption, layer_table("Bits", sites, layers, columns, most)))


def drift(report: Report, most: int) -> Html:
    """Shows the error of each layer, its own and what has piled up in front of it, along the depth."""
    layers = _layers(report)
    if not any(one.sqnr is not None or one.local_sqnr is not None for one in layers):
        return Html("")
    sites = [one.site for one in layers]
    series = [
        depth_charts.Line("local", [one.local_sqnr for one in layers], "b"),
        depth_charts.Line("cumulative", [one.sqnr for one in layers], "a"),
    ]
    titles = [
        f"{i + 1}. {layer_name(one.site)}: cumulative {decibels(one.sqnr)}, local {decibels(one.local_sqnr)}"
        for i, one in enumerate(layers)
    ]
    columns = [
        Column[Any]("local SQNR", lambda one: decibels(one.local_sqnr), lambda one: one.local_sqnr),
        Column[Any]("cumulative SQNR", lambda one: decibels(one.sqnr), lambda one: one.sqnr),
        Column[Any]("cumulative error", lambda one: _error(one.sqnr), lambda one: one.sqnr),
        Column[Any]("cosine", lambda one: significant(one.cosine, 4), lambda one: one.cosine),
    ]
    sqnr = math.nan if report.comparison is None else report.comparison.output_sqnr
    joins = () if report.comparison is None else report.comparison.joins
    join_columns = [
        Column[Any]("operands", lambda one: one.act),
        Column[Any]("SQNR of their rounding", lambda one: decibels(one.sqnr), lambda one: one.sqnr),
    ]
    names = [one.site for one in joins]
    return section(
        "Drift along the depth",
        paragraph(
            f"The outputs have a signal-to-quantization-noise ratio (SQNR) of {decibels(sqnr)}{_in_error(sqnr)}. "
            "20 dB are an error of 10 %, 40 dB of 1 %: higher is better. Where the cumulative line falls below the "
            "local one, the errors of earlier layers outweigh the layer's own."
        ),
        figure(
            [
                _legend(LINES),
                depth_charts.lines("Signal-to-noise ratio of each layer's output", sites, series, titles),
            ],
            "A triangle at the top is a layer without error, a cross at the bottom one that is not a number.",
            layer_table("Drift", sites, layers, columns, most),
        ),
        layer_table("One scale for operands", names, joins, join_columns, most, "adds and concats") if joins else None,
    )


def weights(report: Report, most: int) -> Html:
    """Shows the weights of the worst layers with the levels that they are rounded to."""
    layers = [one for one in _layers(report) if one.weight_values is not None and one.levels]
    if not layers:
        return Html("")
    worst = sorted(layers, key=lambda one: (_rank(one.local_sqnr), _rank(one.sqnr)))[:PICTURES]
    pictures = [_weights_picture(one, one.weight_values) for one in worst if one.weight_values is not None]
    columns = [
        Column[Any]("weight", lambda one: one.weight),
        Column[Any]("smallest", lambda one: significant(one.weight_values.low), lambda one: one.weight_values.low),
        Column[Any](
            "median", lambda one: significant(_median(one.weight_values)), lambda one: _median(one.weight_values)
        ),
        Column[Any]("largest", lambda one: significant(one.weight_values.high), lambda one: one.weight_values.high),
        Column[Any]("lowest level", lambda one: significant(_end(one, 0)), lambda one: _end(one, 0)),
        Column[Any]("highest level", lambda one: significant(_end(one, -1)), lambda one: _end(one, -1)),
        Column[Any]("levels used", lambda one: f"{one.levels_used} of {one.levels}", lambda one: one.levels_used),
        Column[Any]("zeros", lambda one: percent(one.share_zero), lambda one: one.share_zero),
    ]
    sites = [one.site for one in layers]
    return section(
        "Weights under their grid",
        paragraph(
            f"{_which(len(worst), len(layers), 'with the largest error of their own')} The float weights, in steps of "
            "the scale that each is divided by; ticks are the levels that they are rounded to. Heights are square "
            f"roots of counts, so that tails can be seen{CUT}."
        ),
        tag("div", pictures, class_="smalls"),
        layer_table("Weights", sites, layers, columns, most),
    )


def activations(report: Report, most: int) -> Html:
    """Shows the inputs of the layers that clip the most, with the range that they are clipped to."""
    layers = [one for one in _layers(report) if one.input_values is not None and one.act]
    if not layers:
        return Html("")
    worst = sorted(layers, key=lambda one: (-(one.clipped or 0.0), _rank(one.local_sqnr)))[:PICTURES]
    pictures = [_inputs_picture(one, one.input_values) for one in worst if one.input_values is not None]
    columns = [
        Column[Any]("activations", lambda one: one.act),
        Column[Any]("smallest", lambda one: significant(one.input_values.low), lambda one: one.input_values.low),
        Column[Any](
            "median", lambda one: significant(_median(one.input_values)), lambda one: _median(one.input_values)
        ),
        Column[Any]("largest", lambda one: significant(one.input_values.high), lambda one: one.input_values.high),
        Column[Any]("range from", lambda one: significant(_bound(one, 0)), lambda one: _bound(one, 0)),
        Column[Any]("to", lambda one: significant(_bound(one, 1)), lambda one: _bound(one, 1)),
        Column[Any]("clipped", lambda one: percent(one.clipped), lambda one: one.clipped),
    ]
    sites = [one.site for one in layers]
    return section(
        "Activations in their range",
        paragraph(
            f"{_which(len(worst), len(layers), 'that clip the most')} Inputs of the float network; what lies in the "
            f"shaded parts, outside of the dashed lines, is clipped. Heights are square roots of counts{CUT}."
        ),
        tag("div", pictures, class_="smalls"),
        layer_table("Activations", sites, layers, columns, most),
    )


def channels(report: Report, most: int) -> Html:
    """Shows how many channels pruning left in each layer."""
    if not report.channels:
        return Html("")
    rows = [(site, int(before), int(after)) for site, (before, after) in report.channels.items()]
    shown = sorted(rows, key=lambda row: row[2] / max(1, row[1]))[: 2 * PICTURES] if len(rows) > MANY else rows
    made = [svg.Bar(site, (a, b), (f"{a:,}", f"{b:,} ({_left(a, b)})")) for site, a, b in shown]
    columns = [
        Column[Any]("before", lambda row: f"{row[1]:,}", lambda row: row[1]),
        Column[Any]("after", lambda row: f"{row[2]:,}", lambda row: row[2]),
        Column[Any]("left", lambda row: _left(row[1], row[2]), lambda row: row[2] / max(1, row[1])),
    ]
    caption = "Output channels of each layer: before in grey above, after in blue below."
    if len(shown) < len(rows):
        caption += f" The {len(shown)} of {len(rows):,} layers that lost the largest share."
    sites = [row[0] for row in rows]
    picture = svg.bars("Output channels of layers, before and after", made, ("before", "after"))
    return section("Channels", figure(picture, caption, layer_table("Channels", sites, rows, columns, most)))


def act_bits(act: str) -> float | None:
    """Returns the bits of a scheme of activations, such as 8 of `int8@tensor`; None of floats."""
    found = re.search(r"\d+", act)
    return float(found.group()) if found and len(found.group()) < 4 else None


def _layers(report: Report) -> Sequence[LayerComparison]:
    return () if report.comparison is None else report.comparison.layers


def _is_float(one: LayerComparison) -> bool:
    return not one.levels


def _bits_title(one: LayerComparison) -> str:
    return f"{layer_name(one.site)}: {significant(one.bits)} bits a weight ({one.weight}), inputs {one.act or 'float'}"


def _bits_cell(layers: Sequence[LayerComparison]) -> svg.Cell:
    known = [one.bits for one in layers if math.isfinite(one.bits) and one.bits > 0]
    if not known:
        return svg.Cell("?", "b0", _bits_title(layers[0]))
    mean = sum(known) / len(known)
    title = _bits_title(layers[0])
    if len(layers) > 1:
        title = (
            f"{layer_name(layers[0].site)} and {len(layers) - 1:,} more: {significant(mean)} bits a weight on average"
        )
    return svg.Cell(f"{mean:.0f}", f"b{min(svg.STEPS - 1, max(0, round(math.log2(mean))))}", title)


def _rank(value: float | None) -> float:
    """Returns a key that puts what is not a number first and what is not known last."""
    if value is None:
        return math.inf
    return -math.inf if math.isnan(value) else value


def _error(sqnr: float | None) -> str:
    if sqnr is None or math.isnan(sqnr):
        return significant(sqnr)
    return percent(relative_error(sqnr))


def _in_error(sqnr: float) -> str:
    return f", an error of {_error(sqnr)}" if math.isfinite(sqnr) else ""


def _legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    found = [tag("span", tag("span", sign, class_=f"sign {style}"), f" {text}") for style, sign, text in entries]
    return tag("p", found, class_="legend")


def _small(one: LayerComparison, picture: Html, text: str) -> Html:
    name = layer_name(one.site)
    return tag("figure", tag("figcaption", tag("code", layer_name(one.site, 36), title=name)), picture, paragraph(text))


def _weights_picture(one: LayerComparison, values: Histogram) -> Html:
    title = f"Weights of {layer_name(one.site)}: {_span(values)}, {_levels(one)}"
    picture = svg.histogram(title, _bins(values), one.weight_grid)
    return _small(one, picture, f"{one.weight}, {_levels(one)}, {decibels(one.local_sqnr)}")


def _inputs_picture(one: LayerComparison, values: Histogram) -> Html:
    title = f"Inputs of {layer_name(one.site)}: {_span(values)}, {percent(one.clipped)} clipped"
    picture = svg.histogram(title, _bins(values), span=one.input_range)
    return _small(one, picture, f"{one.act}, {_clip_range(one)}{percent(one.clipped)} clipped")


def _which(shown: int, of: int, why: str) -> str:
    if shown == of:
        return "" if of == 1 else f"All {of} layers, those {why} first."
    return f"The {shown} of {of:,} layers {why}; the table has all."


def _bins(values: Histogram) -> tuple[float, float, Sequence[int]]:
    return values.low, values.high, values.counts


def _span(values: Histogram) -> str:
    return f"{significant(values.low)} to {significant(values.high)}"


def _median(values: Histogram) -> float:
    """Returns the middle of the bin in which half of the values are reached."""
    half, seen = sum(values.counts) / 2, 0
    width = (values.high - values.low) / max(1, len(values.counts))
    for i, n in enumerate(values.counts):
        seen += n
        if seen >= half:
            return values.low + (i + 0.5) * width
    return values.low


def _levels(one: LayerComparison) -> str:
    return f"{one.levels_used} of {one.levels} levels"


def _end(one: LayerComparison, i: int) -> float | None:
    return one.weight_grid[i] if one.weight_grid else None


def _clip_range(one: LayerComparison) -> str:
    return "" if one.input_range is None else f"{significant(_bound(one, 0))} to {significant(_bound(one, 1))}, "


def _bound(one: LayerComparison, i: int) -> float | None:
    return None if one.input_range is None else one.input_range[i]


def _left(before: int, after: int) -> str:
    return percent(after / before) if before else NONE
