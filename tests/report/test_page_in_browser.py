"""The page in a real browser: no error, no request, nothing wider than the window; filter, sort and keyboard work."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabel.report.figures import Noise
from softlabel.report.page import render
from softlabel.report.write import write_report
from tests.report.test_documents import write_hostile
from tests.support import reports
from tests.support.browser import CHROMIUM, NO_CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

MAKERS = {
    "realistic": reports.make_report,
    "hostile": reports.make_hostile_report,
    "absent": reports.make_absent_report,
    "bare": reports.make_bare_report,
}
# Elements that reach out of the window, but for those inside a box that scrolls by itself or hides what is too much.
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter((one) => {
  const box = one.getBoundingClientRect();
  if (!box.width || box.right <= document.documentElement.clientWidth + 0.5 && box.left >= -0.5) return false;
  for (let outer = one; outer !== document.body; outer = outer.parentElement)
    if (outer !== one && getComputedStyle(outer).overflowX !== 'visible'
        || outer.matches('.skip, .hidden, .tip')) return false;
  return true;
}).map((one) => one.outerHTML.slice(0, 120))
"""
CARDS = "[...document.querySelectorAll('#noise .cards li')].filter((one) => !one.hidden)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("pages"), {}
    for name, make in MAKERS.items():
        report = make()
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(render(report, reports.make_pictures_for(report)), encoding="utf-8")
    write_hostile(folder / "labels")
    paths["documents"] = folder / "documents.html"
    write_report(folder / "labels", out=paths["documents"], progress=False)
    return paths


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", [*MAKERS, "documents"])
def test_it_fits_the_window_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(TOO_WIDE) == []
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    shade = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)")
    assert (shade < 3 * 128) == dark


def contrast_of(one: list[float], other: list[float]) -> float:
    """The ratio of WCAG 2 of two sRGB colours."""

    def luminance(colour: list[float]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["realistic", "documents"])
def test_texts_stand_out_from_what_is_behind_them(
    browser: Browser, pages: dict[str, Path], name: str, dark: bool
) -> None:
    browser.open(pages[name], dark=dark)
    # Every colour of text with the nearest opaque colour behind it; texts in cells with the cell before them.
    pairs = browser.run(
        """(() => {
          const parts = (text) => text.match(/[\\d.]+/g).map(Number);
          const behind = (one) => {
            for (; one; one = one.parentElement) {
              const colour = parts(getComputedStyle(one).backgroundColor);
              if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
            }
          };
          const found = {};
          for (const one of document.querySelectorAll('body *')) {
            const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
            if (!own || one.closest('script, .tip, desc') || !one.getClientRects().length) continue;
            const style = getComputedStyle(one);
            let ground = behind(one.closest('svg') ? one.closest('svg').parentElement : one);
            if (one.matches('.tokens span, .swatches span')) {  // a colour over that of the page, as srgb from 0 to 1
              const [red, green, blue, shade = 1] = parts(style.backgroundColor.replace('srgb', ''));
              ground = ground.map((value, index) => shade * [red, green, blue][index] * 255 + (1 - shade) * value);
            }
            if (one.matches('text.in')) {
              const cell = one.previousElementSibling, shade = Number(cell.getAttribute('fill-opacity'));
              const fill = parts(getComputedStyle(cell).fill);
              ground = ground.map((value, index) => shade * fill[index] + (1 - shade) * value);
            }
            const ink = parts(one.closest('svg') ? style.fill : style.color).slice(0, 3);
            found[[ink, ground]] = [ink, ground, one.outerHTML.slice(0, 100)];
          }
          return Object.values(found);
        })()"""
    )
    assert len(pairs) > 8
    assert [pair for pair in pairs if contrast_of(pair[0], pair[1]) < 4.5] == []


def test_samples_are_filtered_and_sorted(browser: Browser, pages: dict[str, Path]) -> None:
    report = reports.make_report()
    assert isinstance(report.noise, Noise)
    examples = report.noise.examples
    browser.open(pages["realistic"])
    status = "document.querySelector('#noise .matches').textContent"
    assert browser.run("document.querySelector('#noise .matches').getAttribute('aria-live')") == "polite"
    assert browser.run(status) == "400 of 400 match"
    keys = browser.run(f"{CARDS}.map((one) => one.querySelector('.key').textContent)")
    assert keys == [one.key for one in examples][:48]  # the report's own ranking, until a reader chooses another
    browser.run("document.querySelector('#noise .more button').click()")
    assert browser.run(f"{CARDS}.length") == 96
    set_value = (
        "((name, value) => { const one = document.querySelector(`#noise form [name=${name}]`); one.value = value;"
        " one.dispatchEvent(new Event('input', {bubbles: true})); })"
    )
    browser.run(f"{set_value}('label', '3')")
    wanted = [one for one in examples if one.label == 3]
    assert browser.run(status) == f"{len(wanted)} of 400 match"
    browser.run(f"{set_value}('sort', 'p-down')")
    keys = browser.run(f"{CARDS}.map((one) => one.querySelector('.key').textContent)")
    assert keys == [one.key for one in sorted(wanted, key=lambda one: -(one.p_label or 0))][:48]
    browser.run(f"{set_value}('suggestion', '5')")
    wanted = [one for one in wanted if one.suggestion == 5]
    browser.run(f"{set_value}('sort', 'score')")
    keys = browser.run(f"{CARDS}.map((one) => one.querySelector('.key').textContent)")
    assert keys == [one.key for one in sorted(wanted, key=lambda one: one.score)]
    browser.run("document.querySelector('#noise form button').click()")
    browser.run("new Promise((done) => setTimeout(done, 50))")
    assert browser.run(status) == "400 of 400 match"
    browser.run(f"{set_value}('text', 'no such key')")
    assert browser.run(status) == "0 of 400 match"
    assert browser.complaints() == []


def test_everything_is_reached_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["realistic"])
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    browser.press("Enter")
    assert browser.run("location.hash") == "#summary"
    browser.press("Tab")
    outline = (
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert browser.run(outline) == "solid3px"
    # The filter is typed into, and a column of a table is sorted, without the mouse.
    browser.run("document.querySelector('#noise form [name=suggestion]').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.name") == "text"
    browser.type_text("00017_")
    assert browser.run("document.querySelector('#noise .matches').textContent") == "1 of 400 match"
    browser.run("document.querySelector('#agreement details').open = true")
    browser.run("document.querySelector('#agreement .scroll').focus()")
    for _ in range(3):
        browser.press("Tab")
    browser.press("Enter")
    rows = "[...document.querySelector('#agreement table tbody').rows]"
    column = f"{rows}.map((row) => parseFloat(row.cells[2].textContent))"
    values = browser.run(column)
    assert values == sorted(values)
    browser.press("Enter")
    assert browser.run(column) == values[::-1]
    assert browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"


def test_values_show_under_the_mouse_and_commands_are_copied(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["realistic"])
    for _ in range(20):  # a busy browser may not have drawn yet what the mouse is to meet
        browser.point_at("#agreement svg [data-tip]")
        browser.run("new Promise((done) => setTimeout(done, 50))")
        if not browser.run("document.querySelector('.tip').hidden"):
            break
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    assert browser.run("document.querySelector('.tip').hidden") is False
    assert "%" in browser.run("document.querySelector('.tip').textContent")
    browser.run("document.querySelector('#summary .copy').click()")
    browser.run("new Promise((done) => setTimeout(done, 200))")
    assert browser.run("document.querySelector('#summary .copy').textContent") in {"Copied", "Selected"}
    assert browser.complaints() == []


def test_without_scripts_all_samples_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages["realistic"])
        assert browser.run(f"{CARDS}.length") == 400
        assert browser.run("getComputedStyle(document.querySelector('#noise form')).display") == "none"
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_tokens_are_coloured_by_what_is_chosen_and_read_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["documents"])
    figures = browser.run("JSON.parse(document.getElementById('figures').textContent).documents")
    names = [one["name"] for one in figures["measures"]]
    assert names == ["entropy", "surprise"]
    shown = "[...document.querySelector('#documents .tokens').children]"
    first = figures["lists"][0]["documents"][0]
    assert browser.run(f"{shown}.length") == len(first["tokens"])
    for number, measure in enumerate(figures["measures"]):
        browser.run(f"document.querySelector('#documents input[value=\"{number}\"]').click()")
        assert measure["meaning"] in browser.run("document.querySelector('.scale-label').textContent")
        levels = browser.run(f"{shown}.map((one) => one.className)")
        for value, level in zip(first["values"][number], levels, strict=True):
            # Values on the page are rounded to three digits.
            exact = None if value is None else min(8.0, value / measure["scale"] * 9)
            assert level == "" if exact is None else abs(int(level[1:]) + 0.5 - min(exact, 8.5)) < 0.6
    browser.run("document.querySelector('#documents form :checked').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "tokens"
    readout = "document.querySelector('#documents .readout').textContent"
    assert browser.run("document.querySelector('#documents .readout').getAttribute('aria-live')") == "polite"
    browser.press("ArrowRight")
    assert "no label" in browser.run(readout)
    browser.press("ArrowRight")
    assert browser.run(f"{shown}[1].classList.contains('here')")
    assert all(f"{name} " in browser.run(readout) for name in names)
    browser.point_at("#documents .tokens span:nth-child(2)")
    browser.run("new Promise((done) => setTimeout(done, 50))")
    assert browser.run("document.querySelector('.tip').textContent").startswith("entropy ")
    assert browser.complaints() == []
