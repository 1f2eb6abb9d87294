"""The page of a report: self-contained, sound for every report, and the same bytes for the same figures."""

import dataclasses
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from softlabel.report.figures import About, Noise
from softlabel.report.page import render
from softlabel.report.pictures import Picture
from softlabel.report.report import Report, report_json
from softlabel.report.student_figures import Students
from tests.support import reports

VOID = {"meta", "link", "img", "input", "br"}
# Elements of the template and of the plots.
ELEMENTS = {
    *("html", "head", "meta", "title", "link", "style", "script", "body", "header", "nav", "main", "footer", "section"),
    *("h1", "h2", "h3", "h4", "p", "a", "ul", "ol", "li", "dl", "dt", "dd", "span", "strong", "bdi", "code", "figure"),
    *("figcaption", "img", "details", "summary", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "form"),
    *("label", "input", "select", "option", "button", "svg", "desc", "path", "rect", "circle", "text"),
}
MAKERS = {
    "realistic": reports.make_report,
    "hostile": reports.make_hostile_report,
    "absent": reports.make_absent_report,
    "bare": reports.make_bare_report,
    "many classes": lambda: reports.make_report(classes=10_000, names=[f"n{one:08d}" for one in range(10_000)]),
    "fifty classes": lambda: reports.make_report(classes=50, names=None),
}


class Page(HTMLParser):
    """The elements of a page with their attributes and text; fails where elements are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self.open.append((tag, text))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        opened, _ = self.open.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        for _, text in self.open:
            text.append(data)

    def find(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest) -> tuple[Report, str]:
    report = MAKERS[request.param]()
    return report, render(report, reports.make_pictures_for(report))


def test_a_page_refers_to_nothing_outside(made: tuple[Report, str]) -> None:
    _, text = made
    for tag, attributes, _ in Page(text).elements:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action", "srcset", "poster", "data"}:
                assert re.match(r"#|data:(image/(jpeg|png);base64,|,$)", value or ""), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            assert "url(" not in (value or ""), (tag, name, value)
    assert not re.search(r"url\(|@import|@font-face", Page(text).find("style")[0][1])


def test_what_the_data_says_is_never_markup(made: tuple[Report, str]) -> None:
    report, text = made
    page = Page(text)
    assert {tag for tag, _, _ in page.elements} <= ELEMENTS
    assert len(page.find("script")) == 2
    assert page.find("title")[0][1] == report.title
    assert all(attributes["src"].startswith("data:") for attributes, _ in page.find("img"))  # type: ignore[union-attr]


def test_the_embedded_figures_are_those_of_the_json(made: tuple[Report, str]) -> None:
    report, text = made
    ((_, embedded),) = Page(text).find("script", id="figures")
    assert json.loads(embedded) == json.loads(report_json(report))
    assert json.loads(embedded)["title"] == report.title
    if isinstance(report.noise, Noise):
        assert json.loads(embedded)["noise"]["share"] == report.noise.share


def test_headings_landmarks_names_and_links(made: tuple[Report, str]) -> None:
    report, text = made
    page = Page(text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for attributes, _ in page.find("a"):
        assert (attributes["href"] or "").removeprefix("#") in ids
    assert [len(page.find(tag)) for tag in ("main", "nav", "header", "footer", "h1")] == [1] * 5
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    sections = [attributes.get("id") for attributes, _ in page.find("section")]
    assert [one for one in sections if one in reports.SECTIONS] == list(reports.SECTIONS)
    for attributes, inner in page.find("svg", role="img"):
        assert attributes["class"] in {"plot", "plot wide"}
        assert inner
    assert all(attributes.get("alt") for attributes, _ in page.find("img"))
    assert all("aria-label" in attributes for attributes, _ in page.find("form"))
    for sentence in report.summary:
        assert sentence.text in "".join(one for _, one in page.find("p", **{"class": "sentence"}))


def test_pages_are_small_and_equal_for_equal_figures(made: tuple[Report, str]) -> None:
    report, text = made
    assert text == render(report, reports.make_pictures_for(report))
    assert len(text.encode()) < 3_000_000


def test_a_page_with_the_largest_thumbnails_is_under_3_megabytes() -> None:
    report = reports.make_report()
    data = "data:image/jpeg;base64," + "A" * 3600  # what make_pictures leaves to each of 400
    picture = Picture(kind="image", data=data, width=96, height=96)
    assert len(render(report, dict.fromkeys(reports.make_pictures_for(report), picture))) < 3_000_000


def test_tables_of_many_classes_say_what_they_leave_out() -> None:
    text = render(MAKERS["many classes"](), {})
    assert "9,900 more classes are left out here" in text
    assert len(Page(text).find("tr")) < 3000


def test_a_section_that_was_not_measured_says_why() -> None:
    page = Page(render(reports.make_absent_report(), {}))
    reasons = [text for _, text in page.find("p", **{"class": "reason"})]
    assert reasons == [f"Not measured: no {name} here; measure some" for name in reports.SECTIONS]


def test_samples_are_shown_as_texts_heat_maps_or_placeholders() -> None:
    report = reports.make_report(candidates=4)
    assert isinstance(report.noise, Noise)
    keys = [one.key for one in report.noise.examples]
    pictures = {
        keys[0]: Picture(kind="text", data="a <b>bold</b> claim"),
        keys[1]: Picture(kind="heat", data="data:image/png;base64,AAAA", width=5, height=3, note="5x3"),
        keys[2]: Picture(kind="none", data="not in train.parquet"),
    }
    page = Page(render(report, pictures))
    cards = [text for attributes, text in page.find("li") if "data-m" in attributes]
    assert "a <b>bold</b> claim" in cards[0]
    assert "5x3" in cards[1]
    images = [image for image, _ in page.find("img")]
    assert images
    for image in images:
        assert (image["width"], image["height"], image["class"]) == ("95", "57", "pixels")
    assert "not in train.parquet" in cards[2]
    assert "no picture" in cards[3]


def test_numbers_that_are_not_finite_are_null() -> None:
    report = reports.make_bare_report()
    assert isinstance(report.students, Students)
    (one,) = report.students.comparisons
    assert one.divergence == float("inf")
    assert json.loads(report_json(report))["students"]["comparisons"][0]["divergence"] is None
    assert "KL(teacher || student) is – nats" in render(report, {})


def test_independent_sigmoids_are_described_as_such() -> None:
    report = reports.make_report(candidates=0)
    assert isinstance(report.about, About)
    text = render(dataclasses.replace(report, about=dataclasses.replace(report.about, activation="sigmoid")), {})
    assert "on the side of the known hard label for 91.3% of the answers" in text
    assert "as good as certain" in text
    assert "most probable class is the hard label" not in text
