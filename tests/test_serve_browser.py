"""The report in a real browser: charts are there and visible, nothing complains, nothing is fetched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser
from report_results import bench_result, everything

from vocabext.serve.report.page import render_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (or name one in $CHROMIUM)")

CHARTS = """[...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('circle, rect, path')].filter(mark => {
    const style = getComputedStyle(mark), own = mark.getBoundingClientRect();
    return style.display !== 'none' && own.width + own.height > 0 &&
      (style.fill !== 'none' || style.stroke !== 'none');
  });
  const outside = [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  });
  return {label: svg.getAttribute('aria-label'), width: box.width, height: box.height, marks: marks.length,
          texts: svg.querySelectorAll('text').length, outside: outside.map(text => text.textContent)};
})"""
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([_, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
    .map(([other]) => name + ' / ' + other));
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "model-x"
    folder.mkdir()
    path = folder.parent / "report.html"
    results: dict[str, Any] = {**everything(), "bench": [bench_result(), bench_result(pairs=2, state="partial")]}
    path.write_text(render_report(folder, results, price_per_hour=2.5).html)
    return path


def test_every_chart_is_seen(browser: Browser, page: Path) -> None:
    browser.open(page)
    charts = browser.evaluate(CHARTS)
    assert len(charts) == 2 + 2 * (1 + 3 + 4) + 1
    for chart in charts:
        assert chart["width"] > 400, chart
        assert chart["height"] > 40, chart
        assert chart["marks"] >= 2, chart
        assert chart["texts"] >= 3, chart
        assert chart["outside"] == [], chart
        assert chart["label"], chart


def test_no_text_of_a_chart_lies_on_another(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate(OVERLAPS) == []


def test_the_console_is_silent_and_nothing_is_fetched(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]


def test_a_page_that_complains_or_fetches_is_noticed(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('planted'); nothing.here</script><img src='gone.png'>")
    browser.open(path)
    complaints = " ".join(browser.complaints())
    assert "planted" in complaints
    assert "Uncaught" in complaints
    assert len(browser.requests()) == 2


@pytest.mark.parametrize("width", [1000, 390])
def test_the_page_fits_the_window_of_a_desk_and_of_a_phone(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark_are_both_readable(browser: Browser, page: Path) -> None:
    colours = {}
    for dark in (False, True):
        browser.open(page, dark=dark)
        colours[dark] = browser.evaluate(
            "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])")
    for dark, (background, ink) in colours.items():
        assert (_brightness(background) < _brightness(ink)) == dark
        assert abs(_brightness(background) - _brightness(ink)) > 150


def test_no_table_is_cut_off_on_paper(browser: Browser, page: Path) -> None:
    browser.open(page, width=700, media="print")
    assert browser.evaluate("""[...document.querySelectorAll('.scroll')]
        .filter(box => box.scrollWidth > box.clientWidth).map(box => box.textContent.slice(0, 40))""") == []


def test_it_prints_black_on_white_on_several_pages(browser: Browser, page: Path) -> None:
    browser.open(page, dark=True, media="print")
    background, ink = browser.evaluate(
        "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])")
    assert (_brightness(background), _brightness(ink)) == (255, 0)
    browser.open(page)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert 3 <= printed.count(b"/Type /Page\n") <= 20


def _brightness(colour: str) -> float:
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3
