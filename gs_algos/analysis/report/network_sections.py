"""Builds the sections of a report that speak of the whole network: verdict, before and after, bytes and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from gs_algos.analysis.report import svg
from gs_algos.analysis.report.formats import (
    MINUS,
    NONE,
    SPACE,
    TIMES,
    change,
    count,
    decibels,
    milliseconds,
    nats,
    percent,
    relative_error,
    significant,
    size,
)
from gs_algos.analysis.report.layer_groups import blocks
from gs_algos.analysis.report.markup import Html, layer_name, tag
from gs_algos.analysis.report.tables import figure, folded, paragraph, section, table

if TYPE_CHECKING:
    from gs_algos.analysis.effect import Effect
    from gs_algos.analysis.latency import LayerTimes
    from gs_algos.analysis.quality import Quality
    from gs_algos.analysis.report.page import Report
    from gs_algos.core.timing import Timing

Write: TypeAlias = Callable[["float | None"], str]
Row: TypeAlias = "tuple[str, float, float]"  # a name, a value before and one after

ROWS = 12  # layers with bars of their own
SERIES = ("before", "after")
SCORES = {
    "kl": f"a divergence of {{}}{SPACE}nats",
    "gradient": f"a predicted divergence of {{}}{SPACE}nats",
    "nsr": "{} times as much noise as signal",
}


def verdict(report: Report) -> str:
    """Says in one sentence, with its numbers, what was gained and lost."""
    if report.effect is not None:
        before, after = report.effect.before, report.effect.after
        where, sizes = _sizes(report.effect)
        parts = [_factor(where, size, *sizes, "smaller", "larger", "as large")]
        batch = next(iter(_batches(report.effect)), None)
        if batch is not None:
            ms = before.ms[batch].p50, after.ms[batch].p50
            parts.append(_factor(f"at batch {batch}", milliseconds, *ms, "faster", "slower", "as fast"))
        return f"{', '.join(parts)}; {_quality_change(report.effect)}."
    if report.comparison is not None:
        layers = report.comparison.layers
        before, after = (sum(getattr(one, name) for one in layers) for name in ("float_nbytes", "nbytes"))
        sqnr = report.comparison.output_sqnr
        what = _factor("in the layers", size, before, after, "smaller", "larger", "as large")
        return f"{what}; the outputs' signal-to-noise ratio is {decibels(sqnr)}{_as_error(sqnr)}."
    given = {} if report.sensitivity is None else report.sensitivity.scores
    scores = _finite_scores(given)
    if scores:
        worst, site, scheme = max(scores)
        cost = SCORES[report.sensitivity.by].format(significant(worst)) if report.sensitivity is not None else ""
        among = f"{len(given):,} layer{'s' if len(given) > 1 else ''}"
        return f"{layer_name(site)} is the most sensitive of {among}: {cost} at {scheme}."
    return "Nothing was measured." if report.trade_off is None else report.trade_off.verdict()


def before_after(report: Report, most: int) -> Html:
    """Returns the most important numbers as bars, and all of them in a table."""
    if report.effect is None:
        return Html("")
    rows = effect_rows(report.effect)
    return section(
        "Before and after",
        tag("div", _tiles(report.effect), class_="tiles"),
        table("The network before and after", ("", "before", "after", "change"), rows),
        paragraph(_compared(report.effect), class_="note"),
    )


def effect_rows(effect: Effect) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the table of a network before and after."""
    before, after = effect.before, effect.after

    def row(
        name: str, write: Write, a: float | None, b: float | None, less: str, more: str
    ) -> tuple[str, str, str, str]:
        return name, write(a), write(b), change(a, b, less, more, "same")

    rows = [
        row("bytes on disk", size, before.disk_bytes, after.disk_bytes, "smaller", "larger"),
        row("bytes loaded", size, before.nbytes, after.nbytes, "smaller", "larger"),
        row("parameters", count, before.numbers, after.numbers, "fewer", "more"),
        row("multiply-adds a sample", count, before.macs, after.macs, "fewer", "more"),
        row("bit operations a sample", count, before.bops, after.bops, "fewer", "more"),
    ]
    for batch in _batches(effect):
        a, b = before.ms[batch], after.ms[batch]
        rows.append(
            (f"time at batch {batch}", _timing(a), _timing(b), change(a.p50, b.p50, "faster", "slower", "same"))
        )
    for batch in (batch for batch in before.peak_bytes if batch in after.peak_bytes):
        peaks = before.peak_bytes[batch], after.peak_bytes[batch]
        rows.append(row(f"peak memory of a forward at batch {batch}", size, *peaks, "less", "more"))
    if before.quality is not None and after.quality is not None:
        rows.append(
            (
                before.quality.name,
                _quality(before.quality),
                _quality(after.quality),
                _difference(before.quality, after.quality),
            )
        )
    return rows


def where_bytes(report: Report, most: int) -> Html:
    """Shows which layers take the bytes, before and after."""
    comparison = report.comparison
    if comparison is None or not comparison.layers:
        return Html("")
    layers = comparison.layers
    sums = sum(one.float_nbytes for one in layers), sum(one.nbytes for one in layers)
    totals = sums if report.effect is None else (report.effect.before.nbytes, report.effect.after.nbytes)
    rest = totals[0] - sums[0], totals[1] - sums[1]
    schemes = _sums([(one.weight or "float", one.float_nbytes, one.nbytes) for one in layers], 5)
    name = "other tensors" if min(rest) >= 0 else "other tensors, less what layers share"
    caption = "Bytes by what the weights became. Both bars have one scale."
    if min(rest) < 0:
        caption += " Tensors that layers share are drawn for each of them; the sums count them once."
    placed = _places([one.site for one in layers], [(one.float_nbytes, one.nbytes) for one in layers])
    return section(
        "Where the bytes go",
        paragraph(_bytes_text(totals, rest, report.effect is not None)),
        _stacked_figure("Bytes by scheme", [*schemes, (name, *rest)], size, caption, "weights"),
        _places_figure("Bytes of layers", placed, size),
    )


def where_ms(report: Report, most: int) -> Html:
    """Shows which layers take the milliseconds, before and after."""
    if report.times is None:
        return Html("")
    before, after = report.times
    names = list(dict.fromkeys([*before.layers, *after.layers]))
    pairs = [(before.layers.get(name, 0.0), after.layers.get(name, 0.0)) for name in names]
    inside = sum(before.layers.values()), sum(after.layers.values())
    sums: list[Row] = [("in layers", *inside), ("between layers", before.rest, after.rest)]
    return section(
        "Where the milliseconds go",
        paragraph(_times_agree(before, after)),
        _stacked_figure(
            "Milliseconds in and between layers",
            sums,
            milliseconds,
            f"Median time of a forward at batch {after.batch}. Both bars have one scale.",
            "part",
        ),
        _places_figure("Milliseconds of layers", _places(names, pairs), milliseconds),
    )


def _batches(effect: Effect) -> list[int]:
    return [batch for batch in effect.before.ms if batch in effect.after.ms]


def _factor(where: str, write: Write, before: float, after: float, less: str, more: str, same: str) -> str:
    """Says how one number changed, such as `4.05x smaller on disk (18.6 MB → 4.61 MB)`."""
    return f"{change(before, after, less, more, same)} {where} ({_arrow(write(before), write(after))})".strip()


def _arrow(before: str, after: str) -> str:
    return f"{before}{SPACE}→{SPACE}{after}"


def _quality_change(effect: Effect) -> str:
    """Says what became of the accuracy or the perplexity; of the outputs, where nothing has labels."""
    a, b = effect.before.quality, effect.after.quality
    if a is not None and b is not None:
        text = f"{a.name} {_arrow(_quality_format(a)(a.value), _quality_format(b)(b.value))}"
        if a.name != "accuracy" or a.low == a.high or b.low == b.high:  # texts differ more than networks do
            return f"{text} ({_difference(a, b)})"
        apart = a.low > b.high or b.low > a.high
        return f"{text}, {'more than' if apart else 'within'} the 95 % intervals"
    differ = ""
    if effect.differing is not None:
        differ = f", and {effect.differing:,} of {effect.samples:,} predictions differ"
    return f"the outputs differ by {percent(effect.error)}{differ}"


def _quality_format(quality: Quality) -> Write:
    return percent if quality.name == "accuracy" else significant


def _quality(quality: Quality) -> str:
    write = _quality_format(quality)
    if quality.low == quality.high:
        return write(quality.value)
    return f"{write(quality.value)} ({write(quality.low)} to {write(quality.high)})"


def _timing(timing: Timing) -> str:
    return f"{milliseconds(timing.p50)} ({significant(timing.p20)} to {significant(timing.p80)})"


def _difference(before: Quality, after: Quality) -> str:
    """Says by how much a quality changed: points of accuracy, or percent of a perplexity."""
    difference = after.value - before.value
    if not math.isfinite(difference):
        return NONE
    if difference == 0:
        return "unchanged"
    sign = "+" if difference > 0 else ""
    if before.name == "accuracy":
        return f"{sign}{100 * difference:.2f} points".replace("-", MINUS)
    return f"{sign}{percent(difference / before.value)}" if before.value else NONE


def _compared(effect: Effect) -> str:
    """Says how far the outputs of both networks are from each other."""
    text = f"Outputs of {effect.samples:,} samples were compared: their relative RMS error is {percent(effect.error)}"
    if effect.differing is not None:
        share = effect.differing / effect.samples if effect.samples else 0.0
        text += f", {effect.differing:,} predictions differ ({percent(share)})"
    if effect.divergence is not None:
        text += f", the mean KL divergence is {nats(effect.divergence)}"
    quality = "; intervals of qualities hold 95 %" if effect.before.quality is not None else ""
    return f"{text}. Times are medians with their 20th and 80th percentile{quality}."


def _tiles(effect: Effect) -> list[Html]:
    """Returns the most important numbers, each with two bars: size, time, quality."""
    before, after = effect.before, effect.after
    where, sizes = _sizes(effect)
    found = [_tile(f"Size {where}", change(*sizes, "smaller", "larger", "same size"), sizes, size)]
    for batch in _batches(effect)[:1]:
        ms = before.ms[batch].p50, after.ms[batch].p50
        found.append(_tile(f"Time at batch {batch}", change(*ms, "faster", "slower", "same time"), ms, milliseconds))
    if before.quality is not None and after.quality is not None:
        values = before.quality.value, after.quality.value
        name, write = before.quality.name.capitalize(), _quality_format(before.quality)
        found.append(_tile(name, _difference(before.quality, after.quality), values, write))
    else:
        differing = effect.differing
        text = "" if differing is None else f"{differing:,} of {effect.samples:,} predictions differ"
        name, error = paragraph("Error of the outputs", class_="over"), paragraph(percent(effect.error), class_="big")
        found.append(tag("div", name, error, paragraph(text, class_="note"), class_="tile"))
    return found


def _tile(name: str, said: str, values: Sequence[float], write: Write) -> Html:
    texts = write(values[0]), write(values[1])
    return tag(
        "div",
        paragraph(name, class_="over"),
        paragraph(said or NONE, class_="big"),
        svg.pair(f"{name}: {texts[0]} before, {texts[1]} after", values, texts),
        class_="tile",
    )


def _sizes(effect: Effect) -> tuple[str, tuple[int, int]]:
    """Returns where bytes were counted, and both counts: on disk, or loaded if a network could not be saved."""
    a, b = effect.before, effect.after
    if a.disk_bytes is None or b.disk_bytes is None:
        return "loaded", (a.nbytes, b.nbytes)
    return "on disk", (a.disk_bytes, b.disk_bytes)


def _sums(rows: Sequence[Row], most: int) -> list[Row]:
    """Adds rows of one name, largest first; those beyond `most` become one."""
    sums: dict[str, tuple[float, float]] = {}
    for name, a, b in rows:
        before, after = sums.get(name, (0.0, 0.0))
        sums[name] = before + a, after + b
    ranked = sorted(((name, *pair) for name, pair in sums.items()), key=lambda row: -max(row[1], row[2]))
    return _with_others(ranked, most)


def _with_others(ranked: list[Row], most: int) -> list[Row]:
    if len(ranked) <= most:
        return ranked
    behind = ranked[most - 1 :]
    others = f"{len(behind):,} others", sum(row[1] for row in behind), sum(row[2] for row in behind)
    return [*ranked[: most - 1], others]


def _stacked_figure(title: str, rows: Sequence[Row], write: Write, caption: str, first: str) -> Html:
    """Returns two stacked bars, before and after, with a legend; the last row has the colour of a rest."""
    styles = [*range(len(rows) - 1), svg.REST]
    bars = []
    for i, name in enumerate(SERIES):
        values = [row[1:][i] for row in rows]
        parts = [
            svg.Segment(row[0], value, write(value), style)
            for row, value, style in zip(rows, values, styles, strict=True)
        ]
        bars.append((name, write(sum(values)), parts))
    legend = [
        tag("span", tag("span", "■", class_=f"sign g{style}"), f" {layer_name(row[0])}")
        for row, style in zip(rows, styles, strict=True)
    ]
    picture = svg.stacked(f"{title}, before and after", bars), tag("p", legend, class_="legend")
    return figure(picture, caption, _folded_pairs(title, first, rows, write))


def _places(sites: Sequence[str], pairs: Sequence[tuple[float, float]]) -> list[Row]:
    """Adds the layers that do the same in each block of a network, or takes each by itself; the largest are left."""
    found = blocks(sites) if len(sites) > 2 * ROWS else None
    name_of: Mapping[int, str] = {} if found is None else {i: r for (r, _), at in found.at.items() for i in at}
    rows = [(name_of.get(i, site), *pairs[i]) for i, site in enumerate(sites)]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[0]] = counts.get(row[0], 0) + 1
    shown = [(f"{row[0]} ({TIMES}{counts[row[0]]})" if counts[row[0]] > 1 else row[0], row[1], row[2]) for row in rows]
    return _sums(shown, ROWS + 1)


def _places_figure(title: str, rows: Sequence[Row], write: Write) -> Html:
    made = [svg.Bar(name, (a, b), (write(a), write(b))) for name, a, b in rows[:ROWS]]
    caption = "The layers that take the most: before in grey above, after in blue below."
    if any("*" in row[0] for row in rows):
        caption += " * stands for the numbers of blocks."
    for name, a, b in rows[ROWS:]:
        caption += f" The {name} take {_arrow(write(a), write(b))}."
    picture = svg.bars(f"{title}, before and after", made, SERIES)
    return figure(picture, caption, _folded_pairs(title, "layer", rows, write))


def _folded_pairs(title: str, first: str, rows: Sequence[Row], write: Write) -> Html:
    totals = sum(row[1] for row in rows), sum(row[2] for row in rows)
    cells = [
        [layer_name(name), write(a), write(b), _share(b, totals[1]), change(a, b, "less", "more", "same")]
        for name, a, b in [*rows, ("sum", *totals)]
    ]
    header = (first, "before", "after", "share of after", "change")
    return folded(f"{title}: table", table(title, header, cells), len(cells))


def _share(part: float, whole: float) -> str:
    return percent(part / whole) if whole and math.isfinite(whole) and math.isfinite(part) else NONE


def _bytes_text(totals: tuple[float, float], rest: tuple[float, float], measured: bool) -> str:
    if not measured:
        return f"The layers take {size(totals[0])} before and {size(totals[1])} after."
    text = f"Loaded, the network takes {size(totals[0])} before and {size(totals[1])} after"
    if min(rest) < 0:
        layers = size(totals[0] - rest[0]), size(totals[1] - rest[1])
        return f"{text}. Its layers add up to {layers[0]} and {layers[1]}: some share tensors."
    return f"{text}: the layers below, and {size(rest[0])} and {size(rest[1])} of other tensors, such as norms."


def _times_agree(before: LayerTimes, after: LayerTimes) -> str:
    text = []
    for name, times in zip(SERIES, (before, after), strict=True):
        layers = sum(times.layers.values())
        sums = f"{milliseconds(layers)} in layers and {milliseconds(times.rest)} between them"
        whole = f"{milliseconds(times.total)} {name}"
        hooked = f"with hooks it took {milliseconds(times.hooked)}, so trust the total, not the parts"
        differs = "" if times.agrees else f" ({hooked})"
        text.append(f"{whole} are {sums}{differs}")
    return f"Of a forward, {'; '.join(text)}."


def _as_error(sqnr: float) -> str:
    return f", an error of {percent(relative_error(sqnr))}" if math.isfinite(sqnr) else ""


def _finite_scores(scores: Mapping[str, Mapping[str, float]]) -> list[tuple[float, str, str]]:
    return [
        (score, site, scheme)
        for site, by_scheme in scores.items()
        for scheme, score in by_scheme.items()
        if math.isfinite(score)
    ]
