"""A real browser shows a report: nothing is asked for, nothing fails, nothing is cut, in light, dark and print."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gs_algos.analysis.report.style import DARK, LIGHT
from gs_algos.analysis.sensitivity import Sensitivity
from tests.analysis import report_parts as parts
from tests.analysis.chromium import Chromium, chromium, find

PATH = find()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium is installed: apt-get install chromium")
EXAMPLES = sorted((Path(__file__).parents[2] / "docs/reports").glob("*.html"))
PAGES = {"small": parts.full(), "deep": parts.full(parts.decoder(30), '<script>"decoder"</script>')}
CUT = """[...document.querySelectorAll("svg")].flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
  const box = text.getBBox(), view = svg.viewBox.baseVal;
  return box.x < -1 || box.y < -1 || box.x + box.width > view.width + 1 || box.y + box.height > view.height + 1;
}).map(text => text.textContent))"""
OVERLAPPING = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBBox()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
    p.x + p.width > q.x + 1 && q.x + q.width > p.x + 1 && p.y + p.height > q.y + 3 && q.y + q.height > p.y + 3
  ).map(([b]) => a + " / " + b));
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PATH is not None
    with chromium(PATH, tmp_path_factory.mktemp("chromium") / "profile") as running:
        yield running


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page") / "report.html"
    PAGES[request.param].save(target)
    browser.open(target)
    return target


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def loads_alone(browser: Chromium, page: Path) -> None:
    """Opens a page, which must ask for nothing and report nothing."""
    browser.open(page)
    methods = {event["method"] for event in browser.events}
    asked = [event["params"]["request"]["url"] for event in browser.events if "request" in event.get("params", {})]
    assert asked == [page.as_uri()]
    assert not methods & {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}


def test_nothing_is_asked_for_and_nothing_fails(browser, page):
    loads_alone(browser, page)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_pages_of_the_docs_load_alone_and_fit_their_window(browser, example):
    loads_alone(browser, example)
    browser.width(1000)
    assert browser.run("document.querySelectorAll('section').length") > 5
    assert browser.run("document.documentElement.scrollWidth") == 1000
    assert browser.run(CUT) == []


def test_tables_with_long_schemes_need_no_scrolling(browser, tmp_path):
    report, long = parts.full(), "uint4@group:1024:percentile=99.9999:lsq:asym:narrow"
    assert report.comparison is not None
    layers = tuple(replace(one, weight=long, act=long) for one in report.comparison.layers)
    scores = {site: {f"int{bits}{long[5:]}": 1.0 for bits in (2, 3, 4, 8)} for site in parts.sites()}
    found = replace(report, comparison=parts.comparison(list(layers)), sensitivity=Sensitivity(scores, "kl", 512))
    found.save(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.width(1000)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert (
        browser.run("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length") == 0
    )


def test_the_title_is_that_of_the_network(browser, page):
    assert browser.run("document.title").endswith(": compression report")
    assert browser.run("document.querySelectorAll('script').length") == 0


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_as_wide_as_its_window(browser, page, width):
    browser.width(width)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme, colours", [("light", LIGHT), ("dark", DARK)])
def test_the_scheme_is_that_of_the_reader(browser, page, scheme, colours):
    browser.media("screen", scheme)
    shown = browser.run("getComputedStyle(document.body).backgroundColor")
    text = browser.run("getComputedStyle(document.querySelector('h1')).color")
    bar = browser.run("getComputedStyle(document.querySelector('rect.f1')).fill")
    assert (shown, text, bar) == tuple(rgb(colours[name]) for name in ("paper", "ink", "after"))


def test_no_text_of_a_picture_is_cut_or_covered(browser, page):
    browser.width(1000)
    assert browser.run(CUT) == []
    assert browser.run(OVERLAPPING) == []


def test_a_notebook_does_not_colour_rows(browser, tmp_path):
    rules = ".host th,.host td{text-align:right;line-height:1} .host tbody tr:nth-child(odd){background:#fff}"
    page = tmp_path / "notebook.html"
    shown = PAGES["small"]._repr_html_()
    page.write_text(f'<style>{rules}</style><div class="host"><h1>mine</h1>{shown}</div>', encoding="utf-8")
    browser.open(page)
    browser.media("screen", "dark")
    assert browser.run("getComputedStyle(document.querySelector('.gs-report tbody tr')).backgroundColor").endswith(
        ", 0)"
    )
    assert browser.run("getComputedStyle(document.querySelector('.gs-report tbody th')).textAlign") == "left"
    assert browser.run("getComputedStyle(document.querySelector('.host > h1')).color") == "rgb(0, 0, 0)"
    browser.media()


def test_paper_is_light_and_short_tables_are_open(browser, page):
    browser.open(page)
    browser.media("print", "dark")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == rgb(LIGHT["paper"])
    closed = "[...document.querySelectorAll('details:not(.long):not([open]) table')]"
    assert browser.run(f"{closed}.length") > 0
    assert browser.run(f"{closed}.filter(table => table.checkVisibility()).length === {closed}.length")
    pdf = browser.call("Page.printToPDF", printBackground=True)["data"]
    assert pdf.startswith("JVBERi0")  # %PDF-
    browser.media()
