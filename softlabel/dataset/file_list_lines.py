"""The lines of a list of images: which separator, heading and columns they have, and what a line names.

a.jpg,3         comma, tab, semicolon or space; quoted as in CSV
path,label      a heading, in which case there may be more columns, in any order
# comment       unless there is a file of that name
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
from softlabel.dataset.hard_labels import choose_label, class_number, usual_labels
from softlabel.dataset.suffixes import IMAGE_SUFFIXES, suffix_of
from softlabel.errors import DataError
from softlabel.inputs.base import IGNORE

# The most usual one first; capitals do not count. Hugging Face's imagefolder has `file_name`.
PATH_NAMES = (
    *("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image_file", "image_name"),
    *("image", "img_path", "img_name", "img", "image_id", "images", "name"),
)
_FORMS = "expected PATH or PATH,LABEL"
_QUOTES = "put a path that has a comma into double quotes, and a path before its label"
_HEADING = "a heading names columns 'path' and 'label', or '?image=COLUMN&label=COLUMN' names them"
_TAIL = re.compile(r"(.*[^\s,;])\s*[\s,;]\s*([^\s,;]+)", re.DOTALL)
_QUOTED = re.compile(r'"[^"]*" +[^\s,;]+')
_DOTS = re.compile(r"(\./+)+")
_PEEK = 64 << 10  # bytes, to see what a file is

Row = tuple[int, list[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedImages:
    """What a list says: paths as keys, without `./` before them; a label for each, -100 for none."""

    paths: list[str]
    labels: list[int]
    findings: Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user says about a list.

    Attributes:
        image: the column of the paths, `label` that of the labels; given, the first line is a heading.
        unlabelled: labels are not wanted.
        numbers: the label of each class name, where `classes=` gave names.
    """

    image: str | None = None
    label: str | None = None
    unlabelled: bool = False
    numbers: Mapping[str, int] | None = None

    @property
    def has_heading(self) -> bool:
        return self.image is not None or self.label is not None


def read_list(path: str, root: str, asked: Asked, *, name: str) -> ListedImages:
    """All lines of a list, whose paths begin in the folder `root`; `name` is what an error is about.

    Raises:
        DataError: a line that cannot be understood, or a path with two labels.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _read(file, path, root, asked, name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a list of paths in UTF-8, found: {error}") from error


def peek_list(path: str) -> list[str] | None:
    """The columns of a list if the file is one with more in it than paths: of its heading, or [] without; else None."""
    try:
        with open(path, "rb") as file:
            lines = file.read(_PEEK).decode("utf-8-sig", "ignore").splitlines()
        if suffix_of(path) == ".jsonl":
            columns = [str(column) for column in json.loads(lines[0])]
            return columns if usual_paths(columns) and len(columns) > 1 else None
        first = next(line for line in lines if line.strip() and not line.startswith("#"))
        row = next(csv.reader([first], delimiter=_delimiter(first, Asked())))
    except (OSError, ValueError, TypeError, IndexError, StopIteration, csv.Error):
        return None
    if is_heading(row) and usual_paths(row):
        return [cell.strip() for cell in row] if len(row) > 1 else None
    if len(row) == 1 and suffix_of(row[0].strip()) not in IMAGE_SUFFIXES and (found := _TAIL.fullmatch(row[0].strip())):
        row = [found[1], found[2]]
    return [] if len(row) == 2 and suffix_of(row[0].strip()) in IMAGE_SUFFIXES else None


def usual_paths(names: Iterable[str]) -> list[str]:
    """Those of these names of columns that sound like paths, the most usual first."""
    found = [name for name in names if name.strip().lower() in PATH_NAMES]
    return sorted(found, key=lambda name: PATH_NAMES.index(name.strip().lower()))


def is_heading(cells: Sequence[str]) -> bool:
    """Whether cells of a first line name columns: one sounds like paths or labels, and none is an image or a number."""
    plain = [cell.strip() for cell in cells]
    if any(suffix_of(cell) in IMAGE_SUFFIXES or cell.isdigit() for cell in plain):
        return False
    return bool(usual_paths(plain) or (len(plain) > 1 and usual_labels(plain)))


def _read(file: Iterable[str], path: str, root: str, asked: Asked, name: str) -> ListedImages:
    comments: list[int] = []
    heading, rows = _json_rows(file, path) if suffix_of(path) == ".jsonl" else _rows(file, path, root, asked, comments)
    chosen = None if heading is None else _choose(heading, asked, name)
    paths, labels = [], []
    for line, cells in rows:
        where = f"{path}: line {line}"
        if len(cells) == 1 and isinstance(cells[0], str) and (heading is None or len(heading) > 1):
            cells = [*_split_tail(cells[0], root, where)]
        if len(cells) > (2 if heading is None else max(len(heading), 2)):
            wanted = _FORMS if heading is None else f"expected {len(heading)} columns like the heading"
            raise DataError(f"{where}: {wanted}, found {_shown(cells)}; {_QUOTES}; {_HEADING}")
        at, label_at = (0, 1) if chosen is None else (chosen.path, chosen.label)
        found = cells[at] if at < len(cells) else None
        if not isinstance(found, str) or not found.strip():
            raise DataError(f"{where}: {_FORMS}, found {_shown(cells)}: no path")
        label = cells[label_at] if label_at is not None and label_at < len(cells) else None
        paths.append(_plain(found, root))
        first = heading is None and len(paths) == 1
        labels.append(IGNORE if asked.unlabelled else _label(label, cells, asked, where, first=first))
    _refuse_two_labels(paths, labels, path)
    return ListedImages(paths=paths, labels=labels, findings=_find(heading, chosen, labels, asked, len(comments)))


def _rows(
    file: Iterable[str], path: str, root: str, asked: Asked, comments: list[int]
) -> tuple[list[str] | None, Iterator[Row]]:
    """The heading, if there is one, and the other lines, with their numbers."""
    lines = _without_comments(file, root, comments)
    before: list[str] = []
    for line in lines:
        before.append(line)
        if line.strip():
            break
    first = before[-1].strip() if before else ""
    reader = csv.reader(itertools.chain(before, lines), strict=True, delimiter=_delimiter(first, asked))
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


def _without_comments(file: Iterable[str], root: str, comments: list[int]) -> Iterator[str]:
    """The lines, those that are comments empty, so that their numbers stay."""
    for number, line in enumerate(file, 1):
        named = re.split(r"[,;\t]", line.strip(), maxsplit=1)[0]
        if line.startswith("#") and not os.path.exists(os.path.join(root, named)):
            comments.append(number)
            line = "\n"
        yield line


def _json_rows(file: Iterable[str], path: str) -> tuple[list[str], Iterator[Row]]:
    found: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: expected JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f'{path}: line {number}: expected an object such as {{"file_name": ...}}, found {value!r}')
        found.append((number, value))
    heading = list(dict.fromkeys(column for _, value in found for column in value))
    return heading or ["path"], ((number, [value.get(column) for column in heading]) for number, value in found)


def _delimiter(first: str, asked: Asked) -> str:
    """The separator of the columns, out of the first line; a line of one column is split by `_split_tail`."""
    if _QUOTED.fullmatch(first):
        return " "
    there = [sign for sign in "\t,;" if sign in first]
    if asked.has_heading:
        return there[0] if there else ","
    headed = (sign for sign in there if is_heading(next(csv.reader([first], delimiter=sign))))
    return next(headed, "\t" if "\t" in first else ",")


def _split_tail(text: str, root: str, where: str) -> list[str]:
    """A path and its label, with a space or semicolon between them, or a path alone."""
    plain = text.strip()
    if suffix_of(plain) in IMAGE_SUFFIXES:
        # Lists such as CUB's have a number before each path; a path may begin with one and a space too.
        before, *rest = plain.split(maxsplit=1)
        if rest and not os.path.exists(os.path.join(root, plain)) and os.path.exists(os.path.join(root, rest[0])):
            raise DataError(
                f"{where}: {_FORMS}, found {text[:80]!r}, of which {rest[0][:80]!r} is a file; take {before[:40]!r} "
                "away, or put it behind the path if it is the label"
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
        "comma between path and label, or correct '?root='"
    )


def _plain(path: str, root: str) -> str:
    """A path as a folder's keys have it: no `./` before it, no spaces around it unless the file has them."""
    if path != path.strip() and not os.path.exists(os.path.join(root, path)):
        path = path.strip()
    return _DOTS.sub("", path, count=1) if path.startswith("./") else path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """Places of columns."""

    path: int
    label: int | None
    other_labels: tuple[str, ...]


def _choose(heading: list[str], asked: Asked, name: str) -> _Chosen:
    listed = ", ".join(heading)
    for column in (asked.image, asked.label):
        if column is not None and column not in heading:
            raise DataError(f"{name}: there is no column {column!r}; the first line names {listed}")
    remedy = "choose with '?label=COLUMN' or '?label=none'"
    label: str | None = asked.label
    others: tuple[str, ...] = ()
    image = asked.image or next(iter(usual_paths(heading)), None)
    if label is None and not asked.unlabelled:
        label, others = choose_label((column for column in heading if column != image), subject=name, remedy=remedy)
    if image is None:
        rest = [column for column in heading if column != label]
        if len(rest) != 1:
            raise DataError(f"{name}: expected a column of paths, found {listed}; name it with '?image=COLUMN'")
        image = rest[0]
    return _Chosen(
        path=heading.index(image), label=None if label is None else heading.index(label), other_labels=tuple(others)
    )


def _label(value: object, cells: list[object], asked: Asked, where: str, *, first: bool) -> int:
    if isinstance(value, str) and suffix_of(value.strip()) in IMAGE_SUFFIXES:
        raise DataError(f"{where}: expected a class number behind the path, found {_shown(cells)}; {_QUOTES}")
    try:
        return class_number(value, asked.numbers)
    except ValueError as error:
        raise DataError(f"{where}: {error}{f'; if this line is a heading: {_HEADING}' if first else ''}") from None


def _shown(cells: Sequence[object]) -> str:
    return repr(",".join("" if cell is None else str(cell) for cell in cells)[:80])


def _refuse_two_labels(paths: list[str], labels: list[int], path: str) -> None:
    """Raises DataError where a path is there twice with different labels; one that is there twice is seen later."""
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int] = {}
    for one, label in zip(paths, labels, strict=True):
        if first.setdefault(one, label) != label:
            raise DataError(
                f"{path}: expected one label for each file, found {first[one]} and {label} for {one!r}; keep one line"
            )


def _find(
    heading: list[str] | None, chosen: _Chosen | None, labels: list[int], asked: Asked, comments: int
) -> Findings:
    count = f"{comments:,} line{'s' if comments > 1 else ''}"
    notes = (f"{count} of the list left out as comments, after '#'",) if comments else ()
    if asked.unlabelled:
        return Findings(without_labels="labels are ignored, as asked", notes=notes)
    if heading is None or chosen is None:
        if any(label != IGNORE for label in labels):
            return Findings(labels_from="the list, behind each path", notes=notes)
        return Findings(without_labels="the list has paths alone; 'PATH,LABEL' gives one", notes=notes)
    if chosen.label is not None:
        others = tuple(
            f"column {other!r} may hold labels too; '?label={other}' takes it" for other in chosen.other_labels
        )
        return Findings(labels_from=f"column {heading[chosen.label]!r}", left_out=others, notes=notes)
    rest = [column for place, column in enumerate(heading) if place != chosen.path]
    offer = (f"labels may have been left out: '?label=COLUMN' takes one of {', '.join(rest)}",) if rest else ()
    return Findings(without_labels="no column sounds like labels", left_out=offer, notes=notes)
