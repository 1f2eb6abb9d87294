"""The report as one self-contained HTML file: no network, no library, the same bytes for the same figures."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from softlabel.common.plain_text import show_plainly
from softlabel.report.figures import About, Absent
from softlabel.report.number_text import count_of, format_number, shorten
from softlabel.report.page_classes import describe_agreement, describe_confusion
from softlabel.report.page_documents import (
    describe_document_coverage,
    describe_documents,
    describe_next_tokens,
    describe_position_cost,
    describe_vocabulary,
)
from softlabel.report.page_labels import describe_calibration, describe_noise, describe_sharpness
from softlabel.report.page_parts import Context, Section
from softlabel.report.page_store import (
    describe_coverage,
    describe_encoding,
    describe_ensemble,
    describe_views,
)
from softlabel.report.page_students import describe_students
from softlabel.report.page_token_students import describe_token_students
from softlabel.report.pictures import Picture
from softlabel.report.report import DocumentReport, Report, report_json

# In the order of the page: the name of the figures, a title, and what draws them.
_SECTIONS: dict[str, tuple[str, Callable[[Any, Context], Section]]] = {
    "agreement": ("Agreement with hard labels", describe_agreement),
    "noise": ("Likely label errors", describe_noise),
    "calibration": ("Calibration", describe_calibration),
    "sharpness": ("Sharpness", describe_sharpness),
    "confusion": ("Confusion of classes", describe_confusion),
    "ensemble": ("Ensemble", describe_ensemble),
    "views": ("Views", describe_views),
    "encoding": ("Encoding", describe_encoding),
    "coverage": ("Coverage and duplicates", describe_coverage),
    "students": ("Students", describe_students),
}
_DOCUMENT_SECTIONS: dict[str, tuple[str, Callable[[Any, Context], Section]]] = {
    "agreement": ("Agreement with the next token", describe_next_tokens),
    "sharpness": ("Sharpness", describe_sharpness),
    "documents": ("Documents", describe_documents),
    "ensemble": ("Ensemble", describe_ensemble),
    "encoding": ("Encoding", describe_position_cost),
    "coverage": ("Coverage and duplicates", describe_document_coverage),
    "vocabulary": ("Vocabulary", describe_vocabulary),
    "students": ("Students", describe_token_students),
}
_LEVELS = {"good": "Good", "look": "Look", "act": "Act"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbered:
    """A section as the page has it; `absent` is the reason where it was not measured."""

    number: int
    name: str
    title: str
    content: Section | None
    absent: str


def render(
    report: Report | DocumentReport,
    pictures: Mapping[str, Picture],
    eval_pictures: Mapping[str, Picture] | None = None,
) -> str:
    """Draw a report.

    Args:
        report: the figures.
        pictures: of samples by key, as `make_pictures` makes them; a sample without one is shown by its key alone.
        eval_pictures: those of the evaluation data.

    Returns:
        The HTML, which refers to nothing outside of it. The figures are in it as JSON, in the script element with the
        id ``figures``. Equal arguments give equal text.
    """
    environment, context = _environment(), Context(report, pictures, eval_pictures or {})
    style, script = (_read(environment, name) for name in ("page.css", "page.js"))
    sections = _make_sections(report, context)
    page = environment.get_template("page.html").render(
        report=report,
        about=report.about if isinstance(report.about, About) else None,
        documents=isinstance(report, DocumentReport),
        subject=_describe_subject(report, context),
        sections=sections,
        links={one.name: f"{one.number}: {one.title}" for one in sections},
        levels=_LEVELS,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        figures=_embed_json(report_json(report)),
    )
    # A lone surrogate of a file name cannot be written as UTF-8. Beside it, what strangers named must not turn or
    # hide the text around it.
    return show_plainly(page, lines=True).encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("softlabel.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"], environment.filters["shorten"] = format_number, shorten
    return environment


def _read(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _hash(text: str) -> str:
    """A Content-Security-Policy source: what has another hash is not applied or run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embed_json(text: str) -> Markup:
    """JSON that cannot end the element that holds it: outside of strings it has none of these letters."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _make_sections(report: Report | DocumentReport, context: Context) -> list[_Numbered]:
    made = []
    sections = _DOCUMENT_SECTIONS if isinstance(report, DocumentReport) else _SECTIONS
    for number, (name, (title, describe)) in enumerate(sections.items(), 1):
        found = getattr(report, name)
        absent = found.reason if isinstance(found, Absent) else ""
        content = None if isinstance(found, Absent) else describe(found, context)
        made.append(_Numbered(number=number, name=name, title=title, content=content, absent=absent))
    return made


def _describe_subject(report: Report | DocumentReport, context: Context) -> str:
    about = report.about
    if isinstance(about, Absent):
        return about.reason
    teachers = f"from {count_of(len(about.teachers), 'teacher')} at temperature {about.temperature:g}"
    if isinstance(report, DocumentReport):
        return (
            f"Soft labels of {context.samples(about.samples)}, one a token, over a vocabulary of "
            f"{count_of(about.classes, 'token')}, {teachers}"
        )
    views = f", {about.views} views each" if about.views > 1 else ""
    return (
        f"Soft labels of {context.samples(about.samples)}{views}, in {count_of(about.classes, 'class', 'classes')}, "
        f"{teachers}"
    )
