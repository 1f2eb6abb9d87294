"""What a section of the page is made of: a statement, plots, tables, galleries of samples, and what to do."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from softlabel.report.figures import About, Agreement, Example, Histogram, Reliability
from softlabel.report.number_text import count_of, format_count, format_number, format_share, name_class, shorten
from softlabel.report.pictures import Picture
from softlabel.report.report import DocumentReport, Report

MOST_ROWS = 100  # of a table
MOST_BARS = 20  # of a plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of a table: `value` is what it is sorted by, None for its text; a name is isolated from the text around
    it, whichever direction it is written in."""

    text: str
    value: float | None = None
    kind: Literal["name", "key", "number", "text"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: str = ""  # a sentence that says how many rows are not in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot, what it shows and what good looks like; the table holds the same values. Small ones share a line."""

    title: str
    plot: Markup
    caption: str
    table: Table | None = None
    small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A sample of a gallery: its picture, and facts by name in the order in which they are shown."""

    example: Example
    picture: Picture | None
    label: str
    suggestion: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Samples as a grid; with controls, the reader filters and sorts them."""

    title: str
    text: str
    cards: tuple[Card, ...]
    score: str
    controls: bool = False
    labels: tuple[tuple[int, str, int], ...] = ()  # class, name, how many cards
    suggestions: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMark:
    """A token of a text: `level` 0 to 8 is how strong its colour is at first, None for no value; `values` are what it
    may be coloured by, with a comma between them, and `hint` the same in words."""

    text: str
    level: int | None
    values: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A document, or a stretch of it, as coloured tokens; `where` says which, and what its score is."""

    key: str
    where: str
    tokens: tuple[TokenMark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What tokens are coloured by: `strongest` is the value of the strongest colour, and `label` says so."""

    name: str
    label: str
    strongest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTextGroup:
    title: str
    texts: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTexts:
    """Texts with a switch for what their tokens are coloured by."""

    scales: tuple[Scale, ...]
    groups: tuple[TokenTextGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    text: str
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A measured section; `groups` are small galleries side by side, `parts` have headings of their own."""

    statement: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    groups: tuple[Gallery, ...] = ()
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple["Part", ...] = ()
    token_texts: TokenTexts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A section inside a section, such as one run's comparison with its teacher."""

    title: str
    statement: str
    figures: tuple[Figure, ...] = ()
    galleries: tuple[Gallery, ...] = ()


class Context:
    """What all sections share: names and words for the samples as the data has them, pictures, and what to type."""

    def __init__(
        self, report: Report | DocumentReport, pictures: Mapping[str, Picture], eval_pictures: Mapping[str, Picture]
    ) -> None:
        about = report.about if isinstance(report.about, About) else None
        self.pictures, self.eval_pictures = pictures, eval_pictures
        self.class_names = (about.class_names if about else None) or ()
        self.store = about.store if about else "STORE"
        self.data = about.data if about and about.data != "?" else "DATA"  # "?": made by another program
        self.derived = about.derived if about else ""
        self.seen = about.seen if about else "unknown"
        self.accuracy = report.agreement.accuracy if isinstance(report.agreement, Agreement) else None
        self.kept = about is not None and about.combine == "keep" and len(about.teachers) > 1
        self.members, self.views = (len(about.teachers), about.views) if about else (0, 1)
        self.sigmoid = about is not None and about.activation == "sigmoid"
        self.noun, self.unit = (about.noun, about.unit) if about else ("samples", "sample")
        # What has one label, and what a label is about.
        self.row, self.answers = ("position", "tokens") if isinstance(report, DocumentReport) else ("row", "classes")

    def name(self, number: int | None) -> str:
        """Of a class."""
        if number is None:
            return "no label"
        return name_class(self.class_names, number)

    def pair(self, one: int, other: int, length: int = 0) -> str:
        """Of two classes; cut to a length, if one is given, so that something of both is left."""
        names = [self.name(one), self.name(other)]
        if length and sum(map(len, names)) > length - 3:
            half = (length - 3) // 2
            spare = max(0, half - min(map(len, names)))
            names = [shorten(name, half + spare) for name in names]
        return " → ".join(names)

    def samples(self, count: int) -> str:
        """So many of them."""
        return count_of(count, self.unit, self.noun)


def count_cell(value: float | None) -> Cell:
    return Cell(text=format_count(value), value=_or_last(value), kind="number")


def share_cell(value: float | None) -> Cell:
    return Cell(text=format_share(value), value=_or_last(value), kind="number")


def number_cell(value: float | None) -> Cell:
    return Cell(text=format_number(value), value=_or_last(value), kind="number")


def _or_last(value: float | None) -> float:
    """What a missing number is sorted by."""
    return -1e300 if value is None else value


def name_cell(text: str) -> Cell:
    return Cell(text=text, kind="name")


def key_cell(text: str) -> Cell:
    return Cell(text=text, kind="key")


def make_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, noun: str = "rows") -> Table:
    """A table of the first rows; what is left out is said."""
    whole = [tuple(row) for row in rows]
    left = len(whole) - MOST_ROWS
    sentence = f"{left:,} more {noun} are left out here; all are in the JSON of this page." if left > 0 else ""
    return Table(caption=caption, head=tuple(head), rows=tuple(whole[:MOST_ROWS]), left_out=sentence)


def matrix_table(
    caption: str,
    names: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    cell: Callable[[float | None], Cell] = share_cell,
    corner: str = "",
) -> Table:
    rows = [(name_cell(name), *(cell(value) for value in row)) for name, row in zip(names, values, strict=True)]
    return make_table(caption, (corner, *columns), rows)


def histogram_table(caption: str, found: Histogram) -> Table:
    rows = [
        (number_cell(low), number_cell(high), count_cell(count))
        for (low, high), count in zip(pairwise(found.edges), found.counts, strict=True)
    ]
    return make_table(caption, ("from", "to", "rows"), rows)


def reliability_table(caption: str, before: Reliability, after: Reliability | None = None) -> Table:
    """Bins of one set of answers, or of two: before and after a fit."""
    columns, head = [before.confidence, before.accuracy], ["bin", "rows", "confidence", "accuracy"]
    if after is not None:
        columns += [after.confidence, after.accuracy]
        head += ["confidence after", "accuracy after"]
    rows = [
        (number_cell(number + 1), count_cell(count), *(share_cell(column[number]) for column in columns))
        for number, count in enumerate(before.counts)
    ]
    return make_table(caption, head, rows)


def lowest(values: Sequence[float | None], most: int = MOST_BARS) -> list[int]:
    """The numbers of the smallest values, those without a value left out."""
    known = sorted((value, number) for number, value in enumerate(values) if value is not None)
    return [number for _, number in known[:most]]


def unknown(values: Sequence[float | None]) -> list[int]:
    """The numbers of the missing values."""
    return [number for number, value in enumerate(values) if value is None]


def of_all(shown: int, total: int, noun: str, which: str) -> str:
    """Say which ones a plot shows where it does not show all."""
    return f"The {shown} {noun} {which} of {total:,}. " if shown < total else ""


def make_gallery(
    title: str,
    text: str,
    examples: Sequence[Example],
    context: Context,
    *,
    score: str,
    show: Callable[[float], str] = format_number,
    negative: bool = False,
    controls: bool = False,
    of_eval_data: bool = False,
) -> Gallery:
    """Cards of examples.

    Args:
        title, text: heading and introduction.
        score: name of `Example.score`; '' to leave it out, and who agrees.
        show: how the score is written.
        negative: the score is the negative of what it is named after.
        controls: whether the reader filters and sorts.
        of_eval_data: they are samples of the evaluation data, whose keys may be those of other samples.
    """
    cards, pictures = [], context.eval_pictures if of_eval_data else context.pictures
    for one in examples:
        facts = [("p(label)", format_share(one.p_label))] if one.p_label is not None else []
        if one.suggestion != one.label:
            facts.append(("p(suggestion)", format_share(one.p_suggestion)))
        if one.p_student is not None:
            facts.append(("student p(label)", format_share(one.p_student)))
        if one.student is not None:
            facts.append(("student", context.name(one.student)))
        if score:
            facts.append((score, show(-one.score if negative else one.score)))
        if score and one.members_agreeing is not None and context.members:
            facts.append(("members", f"{one.members_agreeing} of {context.members}"))
        if score and one.views_agreeing is not None and context.views > 1:
            facts.append(("views", f"{one.views_agreeing} of {context.views}"))
        if context.views > 1:
            facts.append(("view", str(one.view)))
        cards.append(
            Card(
                example=one,
                picture=pictures.get(one.key),
                label=context.name(one.label),
                suggestion=context.name(one.suggestion),
                facts=tuple(facts),
            )
        )
    return Gallery(
        title=title,
        text=text,
        cards=tuple(cards),
        score=score,
        controls=controls,
        labels=_count_classes((one.label for one in examples), context),
        suggestions=_count_classes((one.suggestion for one in examples), context),
    )


def _count_classes(found: Iterable[int | None], context: Context) -> tuple[tuple[int, str, int], ...]:
    counts: dict[int, int] = {}
    for one in found:
        if one is not None:
            counts[one] = counts.get(one, 0) + 1
    return tuple((number, context.name(number), counts[number]) for number in sorted(counts))
