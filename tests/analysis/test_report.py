"""One page shows a compression: it is well formed, safe and small, whatever the layers are called and hold."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import fields, replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

from gs_algos import SLB
from gs_algos.analysis.quality import Quality
from gs_algos.analysis.report.markup import layer_name
from gs_algos.analysis.report.page import Report
from gs_algos.analysis.report.search import search_of
from gs_algos.analysis.report.style import DARK, LIGHT, style
from gs_algos.analysis.sensitivity import Sensitivity
from tests.analysis import report_parts as parts

LIMIT = 1_500_000
EVIL = "<script>alert(\"x\")</script>\n\x00\u202e\ud800' onload='&amp;"


class Page(HTMLParser):
    """Reads a page and holds what tests look at; an element that is closed in the wrong place is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), tag
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for place, text in self.texts if place == tag]


@cache
def full() -> str:
    return parts.full().html()


def pictures(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_a_page_is_well_formed_and_says_its_language_and_title():
    page = Page(full())
    assert page.tags[0] == ("html", {"lang": "en"})
    assert "".join(page.of("title")[:1]) == "ResNet20: compression report"


def test_a_page_asks_for_nothing():
    html = full()
    assert not re.search(r"https?:|//|\bsrc\b|\bhref\b|url\(|@import|<script|<link|<img|<iframe|\son\w+=", html)


def test_headings_are_in_order():
    levels = [int(tag[1]) for tag, _ in Page(full()).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and set(levels[1:]) == {2}


def test_sections_are_in_the_order_in_which_one_reads():
    assert Page(full()).of("h2") == [
        "Before and after",
        "Where the bytes go",
        "Where the milliseconds go",
        "Bits of the layers",
        "Which layers hurt",
        "Drift along the depth",
        "Weights under their grid",
        "Activations in their range",
        "The search for levels",
        "Cost and quality",
        "Channels",
        "What to do next",
        "Notes",
        "How this was made",
    ]


def test_every_picture_has_a_role_and_a_title():
    found = pictures(full())
    assert len(found) > 30
    for picture in found:
        assert picture.get("role") == "img"
        assert picture[0].tag == "title" and picture[0].text


def test_every_mark_has_a_title():
    for picture in pictures(full()):
        for mark in picture.iter():
            if mark.tag in ("rect", "circle") or mark.get("class") in ("area", "edge", "rug", "cross"):
                assert mark[0].tag == "title" and mark[0].text, ElementTree.tostring(mark)


def test_each_section_with_a_picture_has_a_table():
    for section in re.findall(r"<section>.*?</section>", full(), re.DOTALL):
        assert "<svg" not in section or "<table" in section


def test_tables_have_headers_of_columns_and_rows():
    html = full()
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        assert "<caption>" in table and 'scope="col"' in table
        assert table.count('scope="row"') == table.count("<tr>") - 1


def test_a_table_holds_the_numbers_of_its_picture():
    one = parts.layer("a.b", local_sqnr=12.34, sqnr=11.13, bits=4.12, clipped=0.0314)
    html = Report("Net", comparison=parts.comparison([one, parts.layer("c")])).html()
    row = re.findall(r'<tr><th scope="row">a\.b</th>(.*?)</tr>', html)
    cells = [cell for cells in row for cell in re.findall(r"<td.*?>(.*?)</td>", cells)]
    assert {"12.3\xa0dB", "11.1\xa0dB", "4.12", "3.1\xa0%", "15 of 16", "−8.00", "7.00"} <= set(cells)  # noqa: RUF001


def test_the_verdict_has_the_numbers():
    assert Page(full()).of("p")[1] == (
        "4.05× smaller on disk (1.14\xa0MB\xa0→\xa0282\xa0kB), "  # noqa: RUF001
        "1.32× faster at batch 1 (42.1\xa0ms\xa0→\xa032.0\xa0ms); "  # noqa: RUF001
        "accuracy 91.2\xa0%\xa0→\xa090.5\xa0%, within the 95 % intervals."
    )


def perplexity(value: float) -> Quality:
    return Quality("perplexity", value, 0.7 * value, 1.5 * value, 512)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (Report("Net"), "Nothing was measured."),
        (Report("Net", effect=parts.effect(after=parts.facts(2.0, 1.5, 0.7))), "2.00× larger on disk"),  # noqa: RUF001
        (Report("Net", effect=parts.effect(after=parts.facts(0.5, 1.5, 0.7))), "1.50× slower at batch 1"),  # noqa: RUF001
        (Report("Net", effect=parts.effect(after=parts.facts(0.5, 1.5, 0.7))), "more than the 95 % intervals"),
        (
            Report(
                "Net", effect=parts.effect(parts.facts(quality=perplexity(6.0)), parts.facts(quality=perplexity(9.99)))
            ),
            "; perplexity 6.00\xa0→\xa09.99 (+66.5\xa0%).",
        ),
        (
            Report("Net", effect=parts.effect(parts.facts(quality=None), parts.facts(quality=None))),
            "the outputs differ by 8.1\xa0%, and 61 of 2,000 predictions differ",
        ),
        (
            Report("Net", effect=parts.effect(parts.facts(disk_bytes=None), parts.facts(0.5, disk_bytes=None))),
            "2.00× smaller loaded (1.11\xa0MB\xa0→\xa0556\xa0kB)",  # noqa: RUF001
        ),
        (Report("Net", comparison=parts.comparison([parts.layer()])), "7.68× smaller in the layers"),  # noqa: RUF001
        (
            replace(parts.full(), effect=None, comparison=None),
            "layer1.1.conv2 is the most sensitive of 20 layers: a divergence of 0.977\xa0nats at int2@channel.",
        ),
    ],
)
def test_the_verdict_says_what_is_known(report, said):
    assert said in report.html() and said in str(report)


def test_what_is_not_given_has_no_section():
    page = Page(Report("Net").html())
    assert page.of("h2") == [] and page.of("h1") == ["Net"]


@pytest.mark.parametrize("name", [field.name for field in fields(Report) if field.name != "title"])
def test_each_part_makes_a_page_alone(name):
    page = Page(Report("Net", **{name: getattr(parts.full(), name)}).html())
    assert page.of("h2")


def test_names_are_escaped_everywhere():
    names = [EVIL, "", "a" * 10_000, 'quo"te', "tab\tnew\nline"]
    given = parts.full(names, EVIL)
    given = replace(
        given, advice=(parts.advice(EVIL, why=EVIL, rules=EVIL, verified=EVIL),), notes=(EVIL,), made={EVIL: EVIL}
    )
    html = given.html()
    html.encode()
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "\x00" not in html and "\u202e" not in html
    assert "a" * 100 not in html
    assert pictures(html)
    str(given)


def test_a_long_name_keeps_both_ends():
    assert layer_name("begin." + "x" * 10_000 + ".end").startswith("begin.xx")
    assert layer_name("begin." + "x" * 10_000 + ".end").endswith("xx.end")
    assert len(layer_name("\n" * 10_000)) == 64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300, 5e-324, 0.0])
def test_numbers_that_are_none_are_words_and_break_no_path(value):
    odd = parts.histogram(value, value)
    numbers = ("bits", "nbytes", "float_nbytes", "sqnr", "local_sqnr", "cosine", "clipped", "share_zero")
    layers = [
        parts.layer("ok"),
        parts.layer("odd", **dict.fromkeys(numbers, value), weight_values=odd, input_values=odd),
    ]
    layers.append(parts.layer("range", weight_grid=(value, 1.0), input_range=(value, value)))
    facts = parts.facts(disk_bytes=value, nbytes=value, macs=value, quality=value)
    facts = replace(facts, ms={1: parts.timing(value)})
    given = replace(
        parts.full(),
        comparison=parts.comparison(layers, output_sqnr=value),
        effect=parts.effect(after=facts, error=value, divergence=value),
        times=(replace(parts.times(3.0, {"ok": value, "b": -value}), rest=value), parts.times(3.0, {"ok": 2.0})),
        search={"step": [0, value, 2], "entropy": [1.0, value, 0.5], "levels": {"ok": {-1: value, 1: 0.5}}},
    )
    html = given.html()
    Page(html)
    for picture in pictures(html):
        for mark in picture.iter():
            for key, text in mark.items():
                assert key == "class" or not re.search(r"nan|inf|e\+", text), (key, text)
    if math.isnan(value):
        assert "not a number" in str(given) and "not a number" in html
    assert not re.search(r"[>\s(](nan|inf)\b", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))


def test_a_layer_without_values_leaves_gaps():
    bare = {"sqnr": None, "local_sqnr": None, "cosine": None, "clipped": None, "weight_values": None}
    layers = [parts.layer("a", **bare, input_values=None), parts.layer("b"), parts.layer("c", input_range=None)]
    html = Report("Net", comparison=parts.comparison(layers)).html()
    assert len(pictures(html)) == 8


@pytest.mark.parametrize(
    "names",
    [
        [f"b{i}" for i in range(1000)],
        [str(i) for i in range(1000)],
        parts.decoder(143),
        [
            f"model.layers.{b}.experts.{e}.{role}"
            for b in range(12)
            for e in range(28)
            for role in ("up", "gate", "down")
        ],
        [f"{'<' * 60}{i}" for i in range(1000)],
    ],
    ids=["chain", "sequential", "decoder", "experts", "escapes"],
)
def test_a_thousand_layers_stay_small(names):
    html = parts.full(names).html()
    assert len(html.encode()) < LIMIT
    Page(html)
    assert "of 1,0" in html or "of 999 layers" in html or "1,000 layers" in html


def test_layers_that_differ_in_a_number_share_rows_where_there_are_too_many():
    html = parts.full(parts.decoder(600)).html()
    assert len(html.encode()) < LIMIT
    assert "in 8 rows, those that differ in a number of their name together" in html
    assert "model.layers.*.mlp.up_proj (×600)" in html  # noqa: RUF001


def test_all_layers_are_in_the_table_and_the_worst_in_pictures():
    html = parts.full(parts.decoder(20)).html()
    assert "The 12 of 140 layers with the largest error of their own; the table has all." in html
    assert len(re.findall(r'<tr><th scope="row">model\.layers\.\d+\.mlp\.up_proj</th>', html)) >= 20 * 4


def test_both_schemes_and_print_have_a_style():
    assert "@media screen and (prefers-color-scheme:dark)" in style() and "@media print" in style()
    assert "color-scheme:light dark" in style()


def test_a_notebook_keeps_its_own_style():
    rules = re.sub(r"@media[^{]*\{", "", style())
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", rules) for part in re.split(r",(?!\d)", rule)]
    assert len(selectors) > 80
    assert [one for one in selectors if not one.startswith(".gs-report")] == []


def test_a_notebook_shows_the_same():
    shown, page = parts.full()._repr_html_(), full()
    assert shown.startswith('<div class="gs-report" lang="en"><style>')
    inside = re.search(r'<div class="page">.*</div>', page, re.DOTALL)
    assert inside is not None and inside.group() in shown + "</div>"


def luminance(colour: str) -> float:
    parts_of = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts_of]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


TEXTS = [
    ("ink", "paper"),
    ("muted", "paper"),
    ("ink", "panel"),
    ("muted", "panel"),
    ("after", "paper"),
    ("ink", "code"),
    ("local", "paper"),
]
TEXTS += [(f"i{kind}{i}", f"{kind}{i}") for kind in "hb" for i in range(6)] + [(f"k{i}", f"s{i}") for i in range(6)]
MARKS = [("before", "paper"), ("after", "paper"), ("local", "paper"), ("before", "panel"), ("after", "panel")]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough_for_texts_and_marks(colours):
    assert LIGHT.keys() == DARK.keys()
    texts = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in TEXTS}
    marks = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in MARKS}
    assert {pair: ratio for pair, ratio in texts.items() if ratio < 4.5} == {}
    assert {pair: ratio for pair, ratio in marks.items() if ratio < 3} == {}


def test_captions_are_the_last_or_first_of_their_figures():
    for figure in re.findall(r"<figure>.*?</figure>", full(), re.DOTALL):
        assert figure.startswith("<figure><figcaption>") or figure.endswith("</figcaption></figure>")


def test_notes_of_all_parts_are_there_once():
    comparison, effect = parts.comparison([parts.layer()], notes=("one", "two")), parts.effect(notes=("three",))
    given = Report("Net", effect, comparison, notes=("two", "four"))
    assert Page(given.html()).of("li") == ["three", "one", "two", "four"]
    assert [line for line in str(given).split("\n") if line.startswith("note: ")] == [
        "note: three",
        "note: one",
        "note: two",
        "note: four",
    ]


def test_many_notes_and_levels_stay_small():
    levels = {f"l{i}": {float(q): 0.001 for q in range(1000)} for i in range(200)}
    html = Report("Net", notes=tuple(f"{i} {'x' * 9000}" for i in range(2000)), search={"levels": levels}).html()
    assert len(html.encode()) < LIMIT and "1,900 more notes" in html


def test_sums_that_do_not_agree_are_said():
    apart = parts.times(9.0, {"a": 4.0}, agrees=False), parts.times(5.0, {"a": 4.0})
    html = Report("Net", times=apart).html()
    assert "are 4.00\xa0ms in layers and 5.00\xa0ms between them (with hooks it took 12.0\xa0ms, so" in html
    assert html.count("trust the total") == 1


def test_the_search_of_slb_is_read_from_the_algorithm():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    algorithm = SLB(weight="2bit@channel", total_steps=4, trace=3)
    algorithm.apply(net, torch.zeros(2, 8))
    for _ in range(3):
        algorithm.step()
    search = search_of(algorithm)
    assert search["step"] == [0.0, 2.0] and search["gap"].keys() == search["confidence"].keys() != set()
    assert search == json.loads(json.dumps(search))
    html = Report("Net", search=search).html()
    assert "Quantization gap" in html and "not a number" not in html  # the last point is still to come
    assert all(picture.get("role") == "img" for picture in pictures(html))


def test_the_levels_of_slb_have_the_shares_of_the_largest_logits():
    net = nn.Sequential(nn.Linear(4, 2))
    algorithm = SLB(weight="2bit@channel", total_steps=4, trace=0)
    net = algorithm.apply(net, torch.zeros(2, 4))
    with torch.no_grad():
        net[0].search.logits.zero_()[:, 3, :3] = 1.0  # three of four weights at the highest level, one at the lowest
    assert search_of(algorithm) == {
        "levels": {"0": {"\N{MINUS SIGN}1.0": 0.25, "\N{MINUS SIGN}0.33": 0.0, "0.33": 0.0, "1.0": 0.75}}
    }


def test_bytes_of_layers_and_the_rest_are_those_of_the_network():
    one = parts.layer(nbytes=200, float_nbytes=900)
    effect = parts.effect(parts.facts(nbytes=1000), parts.facts(nbytes=250))
    html = Report("Net", effect=effect, comparison=parts.comparison([one])).html()
    assert (
        "Loaded, the network takes 1.00\xa0kB before and 250\xa0B after: the layers below, and 100\xa0B and 50\xa0B"
        in html
    )


def test_shared_tensors_count_once_in_the_sums():
    tied = [parts.layer("embed", nbytes=800, float_nbytes=800), parts.layer("head", nbytes=800, float_nbytes=800)]
    effect = parts.effect(parts.facts(nbytes=1000), parts.facts(nbytes=900))
    html = Report("Net", effect=effect, comparison=parts.comparison(tied)).html()
    assert "Its layers add up to 1.60\xa0kB and 1.60\xa0kB: some share tensors." in html
    assert re.search(r'<th scope="row">sum</th><td>1.00\xa0kB</td><td>900\xa0B</td>', html)


def test_a_long_scheme_may_break_behind_its_words():
    found = Sensitivity({"fc": {"int4@group:64:mse": 0.25}}, "nsr", 64)
    assert '<th scope="col" class="n">int4@group:<wbr>64:<wbr>mse</th>' in Report("Net", sensitivity=found).html()


def test_rules_can_be_copied():
    html = Report("Net", advice=(parts.advice(rules='rules=[("a|b", {"weight": "int8"})]'),)).html()
    assert (
        '<pre tabindex="0"><code>rules=[(&quot;a|b&quot;, {&quot;weight&quot;: &quot;int8&quot;})]</code></pre>' in html
    )


def test_text_for_a_terminal_has_verdict_worst_layers_and_advice():
    text = str(parts.full())
    assert text.startswith("ResNet20: 4.05×")  # noqa: RUF001
    assert "layers with the largest error" in text and "advice: Raise two layers to 8 bits." in text
    assert "bytes on disk" in text and max(map(len, text.split("\n"))) < 200


def test_an_analysis_alone_is_a_sensitivity_report():
    found = Sensitivity({"fc": {"int4@channel": 0.25}}, "nsr", 64)
    page, text = Page(Report("Net", sensitivity=found).html()), str(Report("Net", sensitivity=found))
    assert page.of("title") == ["Net: sensitivity report"]
    assert (
        page.of("p")[1] == "fc is the most sensitive of 1 layer: 0.250 times as much noise as signal at int4@channel."
    )
    assert str(found) in text


def test_save_writes_the_page(tmp_path):
    given: Any = parts.full()
    given.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == given.html()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_save_refuses_a_folder_and_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match=r"report: path must be a file, got the folder .*; try .*report\.html"):
        Report("Net").save(tmp_path)
    with pytest.raises(ValueError, match=r"report: the folder of path must be there, got .*; make .*no first"):
        Report("Net").save(tmp_path / "no" / "page.html")
    assert list(tmp_path.iterdir()) == []
