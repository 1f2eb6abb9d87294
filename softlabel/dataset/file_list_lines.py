"""Parse lists of images: separator, heading, columns, and the path and label of each line.

a.jpg,3         comma, tab, semicolon or space; quoted as in CSV
path,label      a heading; further columns are allowed, in any order
# comment       unless a file has that name
{"file_name": "a.jpg", "label": 3}      a line of `.jsonl`
"""

import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import choose_label, usual_labels
from softlabel.dataset.json_lines import iter_objects
from softlabel.dataset.line_errors import reading_lines
from softlabel.dataset.multi_hot_columns import ask_columns, parse_flags, parse_label
from softlabel.dataset.suffixes import IMAGE_SUFFIXES, suffix_of
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE

# In order of preference, case-insensitive. Hugging Face's imagefolder uses `file_name`.
PATH_NAMES = (
    *("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image_file", "image_name"),
    *("image", "img_path", "img_name", "img", "image_id", "images", "name"),
)
_FORMS = "expected PATH or PATH,LABEL"
_QUOTES = "put a path that contains a comma in double quotes, and a path before its label"
_HEADING = (
    "a heading names columns 'path' and 'label', or '?image=COLUMN&label=COLUMN' names them; '?inputs=COLUMN,COLUMN' "
    "names those of numbers, '?text=COLUMN' that of texts"
)
_TAIL = re.compile(r"(.*[^\s,;])\s*[\s,;]\s*([^\s,;]+)", re.DOTALL)
_QUOTED = re.compile(r'"[^"]*" +[^\s,;]+')
_DOTS = re.compile(r"(\./+)+")
_PEEK = 64 << 10  # bytes read to detect the form of a file

Row = tuple[int, list[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedImages:
    """The content of a list: paths, which are the keys, without a leading `./`; labels as of `parse_label`."""

    paths: list[str]
    labels: list[int | list[int]]
    findings: Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A user's options for a list.

    Attributes:
        image, label: columns of paths and labels; if given, the first line is a heading.
        labels: columns of several classes at once, likewise.
        unlabelled: ignore labels.
        numbers: label of each class name of `classes=`.
    """

    image: str | None = None
    label: str | None = None
    labels: str | None = None
    unlabelled: bool = False
    numbers: Mapping[str, int] | None = None

    @property
    def has_heading(self) -> bool:
        return any(column is not None for column in (self.image, self.label, self.labels))


def read_list(path: str, root: str, asked: Asked, *, name: str) -> ListedImages:
    """Read a list of paths relative to `root`; `name` is the source, for errors.

    Raises:
        DataError: a line cannot be parsed, or a path has two labels.
    """
    with reading_lines(path, "a list of paths in UTF-8"), open(path, encoding="utf-8-sig", newline="") as file:
        return _read_lines(file, path, root, asked, name)


def peek_list(path: str) -> list[str] | None:
    """Return the columns of a list that has more than paths, [] if it has no heading; None for other files."""
    try:
        with open(path, "rb") as file:
            lines = file.read(_PEEK).decode("utf-8-sig", "ignore").splitlines()
        if suffix_of(path) == ".jsonl":
            columns = [str(column) for column in json.loads(lines[0])]
            return columns if usual_paths(columns) and len(columns) > 1 else None
        first = next(line for line in lines if line.strip() and not line.startswith("#"))
        row = next(csv.reader([first], delimiter=_find_delimiter(first, Asked())))
    except (OSError, ValueError, TypeError, IndexError, StopIteration, csv.Error):
        return None
    if is_heading(row) and usual_paths(row):
        return [cell.strip() for cell in row] if len(row) > 1 else None
    if len(row) == 1 and suffix_of(row[0].strip()) not in IMAGE_SUFFIXES and (found := _TAIL.fullmatch(row[0].strip())):
        row = [found[1], found[2]]
    return [] if len(row) == 2 and suffix_of(row[0].strip()) in IMAGE_SUFFIXES else None


def usual_paths(names: Iterable[str]) -> list[str]:
    """Return the column names that suggest paths, in order of preference."""
    found = [name for name in names if name.strip().lower() in PATH_NAMES]
    return sorted(found, key=lambda name: PATH_NAMES.index(name.strip().lower()))


def is_heading(cells: Sequence[str]) -> bool:
    """Whether the cells of a first line are column names: one suggests paths or labels, none is an image or number."""
    plain = [cell.strip() for cell in cells]
    if any(suffix_of(cell) in IMAGE_SUFFIXES or cell.isdigit() for cell in plain):
        return False
    return bool(usual_paths(plain) or (len(plain) > 1 and usual_labels(plain)))


def _read_lines(file: Iterable[str], path: str, root: str, asked: Asked, name: str) -> ListedImages:
    comments: list[int] = []
    heading, rows = (
        _read_json_rows(file, path) if suffix_of(path) == ".jsonl" else _split_rows(file, path, root, asked, comments)
    )
    chosen = None if heading is None else _choose_columns(heading, asked, name)
    paths: list[str] = []
    labels: list[int | list[int]] = []
    for line, cells in rows:
        where = f"{path}: line {line}"
        if len(cells) == 1 and isinstance(cells[0], str) and (heading is None or len(heading) > 1):
            cells = [*_split_tail(cells[0], root, where)]
        if len(cells) > (2 if heading is None else max(len(heading), 2)):
            wanted = _FORMS if heading is None else f"expected {len(heading)} columns like the heading"
            raise DataError(f"{where}: {wanted}, found {_quote_cells(cells)}; {_QUOTES}; {_HEADING}")
        at, label_at = (0, 1) if chosen is None else (chosen.path, chosen.label)
        found = cells[at] if at < len(cells) else None
        if not isinstance(found, str) or not found.strip():
            raise DataError(f"{where}: {_FORMS}, found {_quote_cells(cells)}: no path; {_HEADING}")
        paths.append(_normalise_path(found, root))
        if heading is not None and chosen is not None and chosen.several:
            labels.append(_parse_several(cells, heading, chosen, where))
            continue
        label = cells[label_at] if label_at is not None and label_at < len(cells) else None
        first = heading is None and len(paths) == 1
        labels.append(IGNORE if asked.unlabelled else _parse_label(label, cells, asked, where, first=first))
    _refuse_two_labels(paths, labels, path)
    return ListedImages(
        paths=paths, labels=labels, findings=_make_findings(heading, chosen, labels, asked, len(comments))
    )


def _split_rows(
    file: Iterable[str], path: str, root: str, asked: Asked, comments: list[int]
) -> tuple[list[str] | None, Iterator[Row]]:
    """Return the heading, if any, and the other lines with their numbers."""
    lines = _blank_comments(file, root, comments)
    before: list[str] = []
    for line in lines:
        before.append(line)
        if line.strip():
            break
    first = before[-1].strip() if before else ""
    reader = csv.reader(itertools.chain(before, lines), strict=True, delimiter=_find_delimiter(first, asked))
    found: Iterator[Row] = ((reader.line_num, list(cells)) for cells in reader if any(cell.strip() for cell in cells))
    start = next(found, None)
    if start is None:
        return None, iter(())
    heading = [str(cell).strip() for cell in start[1]]
    words = heading[0].split() if len(heading) == 1 else []
    if len(words) > 1 and is_heading(words) and all(usual_paths([word]) or usual_labels([word]) for word in words):
        if len(words) != 2 or not usual_paths(words[:1]):
            raise DataError(
                f"{path}: line {start[0]}: expected a heading with commas or tabs between columns, or 'path label', "
                f"found {heading[0]!r}; write commas"
            )
        return words, found
    if asked.has_heading or (is_heading(heading) and not os.path.isfile(os.path.join(root, heading[0]))):
        return heading, found
    return None, itertools.chain([start], found)


def _blank_comments(file: Iterable[str], root: str, comments: list[int]) -> Iterator[str]:
    """Yield the lines, with comments blanked to keep line numbers."""
    for number, line in enumerate(file, 1):
        named = re.split(r"[,;\t]", line.strip(), maxsplit=1)[0]
        if line.startswith("#") and not os.path.exists(os.path.join(root, named)):
            comments.append(number)
            line = "\n"
        yield line


def _read_json_rows(file: Iterable[str], path: str) -> tuple[list[str], Iterator[Row]]:
    found = list(iter_objects(file, path, "file_name"))
    heading = list(dict.fromkeys(column for _, value in found for column in value))
    return heading or ["path"], ((number, [value.get(column) for column in heading]) for number, value in found)


def _find_delimiter(first: str, asked: Asked) -> str:
    """Return the separator of columns in the first line; `_split_tail` splits lines of one column."""
    if _QUOTED.fullmatch(first):
        return " "
    there = [sign for sign in "\t,;" if sign in first]
    if asked.has_heading:
        return there[0] if there else ","
    headed = (sign for sign in there if is_heading(next(csv.reader([first], delimiter=sign))))
    return next(headed, "\t" if "\t" in first else ",")


def _split_tail(text: str, root: str, where: str) -> list[str]:
    """Split a path from its label at a space or semicolon; the label is optional."""
    plain = text.strip()
    if suffix_of(plain) in IMAGE_SUFFIXES:
        # Lists such as CUB's have a number before each path, but a path may also begin with a number and a space.
        before, *rest = plain.split(maxsplit=1)
        if rest and not os.path.exists(os.path.join(root, plain)) and os.path.exists(os.path.join(root, rest[0])):
            raise DataError(
                f"{where}: {_FORMS}, found {text[:80]!r}, of which {rest[0][:80]!r} is a file; remove {before[:40]!r}, "
                "or put it after the path if it is the label"
            )
        return [text]
    found = _TAIL.fullmatch(plain)
    if found is None:
        return [text]
    if suffix_of(found[1]) in IMAGE_SUFFIXES:
        return [found[1], found[2]]
    if os.path.exists(os.path.join(root, text)):
        return [text]
    if os.path.exists(os.path.join(root, found[1])):
        return [found[1], found[2]]
    raise DataError(
        f"{where}: {_FORMS}, found {text[:80]!r}, and neither {text[:80]!r} nor {found[1][:80]!r} is a file; put a "
        "comma between path and label, or fix '?root='; '?text=COLUMN' names a column of texts"
    )


def _normalise_path(path: str, root: str) -> str:
    """Remove a leading `./`, and surrounding spaces unless the file's name has them."""
    if path != path.strip() and not os.path.exists(os.path.join(root, path)):
        path = path.strip()
    return _DOTS.sub("", path, count=1) if path.startswith("./") else path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """Indices of the chosen columns; `several` are those of several classes at once."""

    path: int
    label: int | None
    several: tuple[int, ...]
    other_labels: tuple[str, ...]


def _choose_columns(heading: list[str], asked: Asked, name: str) -> _Chosen:
    listed = ", ".join(heading)
    for column in (asked.image, asked.label):
        if column is not None and column not in heading:
            raise SpecError(f"{name}: no column {column!r}; the first line has {listed}")
    remedy = "choose with '?label=COLUMN' or '?label=none'"
    label: str | None = asked.label
    others: tuple[str, ...] = ()
    several = () if asked.labels is None else ask_columns(asked.labels, asked.label, heading, name)
    image = asked.image or next(iter(usual_paths(column for column in heading if column not in several)), None)
    if both := next((column for column in (label, *several) if column is not None and column == image), None):
        raise SpecError(f"{name}: column {both!r} is the path and a label; choose others")
    if label is None and not several and not asked.unlabelled:
        label, others = choose_label((column for column in heading if column != image), subject=name, remedy=remedy)
    if image is None:
        rest = [column for column in heading if column != label and column not in several]
        if len(rest) != 1:
            raise DataError(
                f"{name}: expected a column of paths, found {listed}; name it with '?image=COLUMN', columns of numbers "
                "with '?inputs=COLUMN,COLUMN', or texts with '?text=COLUMN'"
            )
        image = rest[0]
    return _Chosen(
        path=heading.index(image),
        label=None if label is None else heading.index(label),
        several=tuple(heading.index(column) for column in several),
        other_labels=tuple(others),
    )


def _parse_several(cells: list[object], heading: list[str], chosen: _Chosen, where: str) -> list[int]:
    if len(cells) != len(heading):
        raise DataError(
            f"{where}: expected {len(heading)} columns like the heading, found {_quote_cells(cells)}; {_QUOTES}"
        )
    try:
        return parse_flags([cells[at] for at in chosen.several], [heading[at] for at in chosen.several])
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _parse_label(value: object, cells: list[object], asked: Asked, where: str, *, first: bool) -> int | list[int]:
    if isinstance(value, str) and suffix_of(value.strip()) in IMAGE_SUFFIXES:
        raise DataError(f"{where}: expected a class number after the path, found {_quote_cells(cells)}; {_QUOTES}")
    try:
        return parse_label(value, asked.numbers)
    except ValueError as error:
        raise DataError(f"{where}: {error}{f'; if this line is a heading: {_HEADING}' if first else ''}") from None


def _quote_cells(cells: Sequence[object]) -> str:
    return repr(",".join("" if cell is None else str(cell) for cell in cells)[:80])


def _refuse_two_labels(paths: list[str], labels: list[int | list[int]], path: str) -> None:
    """Raise DataError if a path has two labels; `check_keys` finds other repeated paths."""
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int | list[int]] = {}
    for one, label in zip(paths, labels, strict=True):
        if first.setdefault(one, label) != label:
            raise DataError(
                f"{path}: expected one label for each file, found {first[one]} and {label} for {one!r}; keep one line"
            )


def _make_findings(
    heading: list[str] | None, chosen: _Chosen | None, labels: list[int | list[int]], asked: Asked, comments: int
) -> Findings:
    count = f"{comments:,} line{'s' if comments > 1 else ''}"
    notes = (f"{count} of the list left out as comments, after '#'",) if comments else ()
    if asked.unlabelled:
        return Findings(without_labels="labels are ignored, as requested", notes=notes)
    if heading is None or chosen is None:
        if any(label != IGNORE for label in labels):
            return Findings(labels_from="the list, after each path", notes=notes)
        return Findings(without_labels="the list has only paths; write 'PATH,LABEL' to add labels", notes=notes)
    if chosen.several:
        listed = ", ".join(heading[at] for at in chosen.several)
        return Findings(labels_from=f"columns {listed}", without_labels=f"columns {listed} hold none", notes=notes)
    if chosen.label is not None:
        others = tuple(
            f"column {other!r} may hold labels too; '?label={other}' takes it" for other in chosen.other_labels
        )
        return Findings(labels_from=f"column {heading[chosen.label]!r}", left_out=others, notes=notes)
    rest = [column for place, column in enumerate(heading) if place != chosen.path]
    several = ", '?labels=COLUMN,COLUMN' several classes at once" if len(rest) > 1 else ""
    offer = (f"labels may have been left out: '?label=COLUMN' takes one of {', '.join(rest)}{several}",) if rest else ()
    return Findings(without_labels="no column name suggests labels", left_out=offer, notes=notes)
