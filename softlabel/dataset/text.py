"""Texts, chats or token ids as the rows of a table in a file: `.csv`, `.tsv` or `.jsonl`.

Legend: N samples.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.common.multi_hot import Labels, is_labelled, one_label
from softlabel.dataset.documents import NO_LABELS, WORDS, chosen_columns, document_rows, parse_cell, store_cells
from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import check_labels_named, choose_label, name_several, number_classes, read_classes
from softlabel.dataset.json_lines import iter_objects
from softlabel.dataset.line_errors import TABLE, reading_lines
from softlabel.dataset.multi_hot_columns import ask_columns, parse_flags, parse_label, stack_parsed
from softlabel.dataset.source import COLUMN_REMEDY, FileStamp, ListedSource, span, stamp_files
from softlabel.dataset.suffixes import suffix_of
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE, InputKind, Raw, Sample
from softlabel.inputs.chat import CHATS
from softlabel.inputs.text import TEXTS
from softlabel.inputs.tokens import TOKENS

# The options that name what a sample is.
FORMS = ("text", "text_pair", *WORDS)
_NO_TEXT = BadImageError("the row has no text, or one that is not valid Unicode")
_LONGEST_FIELD = 1 << 30  # bytes: the csv module stops at 128 KiB otherwise


class TextFileSource(ListedSource):
    """Rows of a file with a heading (or JSON objects), held in memory. Keys are a column's, or the row numbers.

    ``?text=COLUMN`` names the texts, ``text_pair=COLUMN`` the second of each pair, ``label=COLUMN|none`` their classes,
    as numbers, or by the names that ``classes=FILE`` lists, ``labels=COLUMN,COLUMN`` columns of several classes at
    once, and ``key=COLUMN|index`` their keys. ``messages=COLUMN`` names chats instead, ``tokens=COLUMN`` token ids and
    ``mask=COLUMN`` which of them count.
    """

    kind = "text"
    repeated_keys_remedy = COLUMN_REMEDY

    def __init__(self, path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name = name
        self._path = os.path.abspath(path)
        asked = {word: options.pop(word, None) for word in (*FORMS, "label", "labels", "key", "classes")}
        chosen, self.inputs = chosen_columns(asked, name) or (_text_columns(asked, name), TEXTS)
        heading, rows = _read_table(path, name, self.inputs)
        ignored = ignore_labels or asked["label"] == "none" or self.inputs != TEXTS
        label, others = None if ignored else asked["label"], tuple[str, ...]()
        several = () if asked["labels"] is None else ask_columns(asked["labels"], asked["label"], heading, name)
        if ignored:
            several = ()
        elif label is None and not several:
            names = (column for column in heading if column not in chosen)
            label, others = choose_label(names, subject=name, remedy="choose with '?label=COLUMN' or '?label=none'")
        if both := next((column for column in (label, *several) if column in chosen), None):
            raise SpecError(
                f"{name}: column {both!r} is a text and the label; choose another with '?label=COLUMN' or '?label=none'"
            )
        key = None if asked["key"] == "index" else asked["key"]
        for column in (*chosen, label, key):
            if column is not None and column not in heading:
                there = f"the file has {', '.join(heading)}" if heading else "the file has no rows"
                raise SpecError(f"{name}: there is no column {column!r}; {there}")
        if asked["classes"] is not None and not ignored:
            self.class_names = read_classes(asked["classes"], subject=name)
        numbers = number_classes(self.class_names)
        labels: list[int | list[int]] = []
        cells: list[list[Any]] = [[] for _ in chosen]
        keys: list[str] = []
        for line, row in rows:
            where = f"{name}: line {line}"
            for place, (column, values) in enumerate(zip(chosen, cells, strict=True)):
                values.append(_cell_of(row.get(column), self.inputs, place, f"{where}: column {column!r}"))
            if key is not None:
                keys.append(_key_of(row.get(key), f"{where}: column {key!r}"))
            labels.append(_label_of(row, label, several, numbers, where))
        self._cells = [store_cells(values, self.inputs, name) for values in cells]
        try:
            self._keys = None if key is None else pa.array(keys, type=pa.large_string())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name}: column {key!r}: expected valid Unicode, found {str(error.object)[:40]!r}; correct the file"
            ) from error
        self._labels = stack_parsed(labels, name)
        self.label_width = self._labels.shape[1] if self._labels.ndim == 2 else None
        self.class_names = name_several(asked["labels"] if several else None, self.class_names, subject=name)
        check_labels_named(self._labels, self.class_names, subject=name)
        self.has_labels = bool(is_labelled(self._labels).any())
        self.maybe_repeated_keys = self.keys_are_named = key is not None
        columns = f"columns {', '.join(several)}" if several else None if label is None else f"column {label!r}"
        why = "no column name suggests labels" if columns is None else f"{columns} hold{'' if several else 's'} none"
        why = why if self.inputs == TEXTS else NO_LABELS
        self.findings = Findings(
            labels_from=columns,
            without_labels="labels are ignored, as requested" if ignored and self.inputs == TEXTS else why,
            left_out=tuple(f"column {one!r} may hold labels too; '?label={one}' takes it" for one in others),
        )

    def __len__(self) -> int:
        return len(self._labels)

    def stamp(self) -> tuple[FileStamp, ...] | None:
        return stamp_files([self._path])

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        return self._labels[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows_B = np.asarray(indices, dtype=np.int64)
        assert not len(rows_B) or (rows_B.min() >= 0 and rows_B.max() < len(self)), (rows_B.min(), rows_B.max())
        taken = [column.take(pa.array(rows_B)) for column in self._cells]
        raws = text_rows(taken) if self.inputs == TEXTS else document_rows(taken, self.inputs)
        return [
            Sample(key=self.key_at(row), raw=raw, label=one_label(self._labels, row))
            for row, raw in zip(rows_B.tolist(), raws, strict=True)
        ]


def _text_columns(asked: Mapping[str, str | None], name: str) -> tuple[str, ...]:
    text, pair = asked["text"] or "text", asked["text_pair"]
    if text == pair:
        raise SpecError(f"{name}: column {text!r} is text= and text_pair=; name another, or leave text_pair= out")
    return (text,) if pair is None else (text, pair)


def _cell_of(value: Any, kind: InputKind, place: int, where: str) -> Any:
    """A cell as it is kept in memory."""
    found = parse_cell(value, kind, place, where) if kind != TEXTS else value
    if kind == TOKENS:
        return found
    if found is not None and not isinstance(found, str):
        raise DataError(f"{where}: expected a text, found {str(found)[:40]!r}")
    return _valid_unicode(found)


def text_rows(columns: Sequence[Any]) -> list[Raw]:
    """The texts, or pairs of them, in one or two Arrow columns; a null makes its row bad."""
    first, *second = (column.to_pylist() for column in columns)
    if not second:
        return [_NO_TEXT if text is None else text for text in first]
    pairs = zip(first, second[0], strict=True)
    return [_NO_TEXT if one is None or other is None else (one, other) for one, other in pairs]


def _label_of(
    row: Mapping[str, Any],
    label: str | None,
    several: tuple[str, ...],
    numbers: Mapping[str, int] | None,
    where: str,
) -> int | list[int]:
    try:
        if several:
            return parse_flags([row.get(column) for column in several], several)
        return IGNORE if label is None else parse_label(row.get(label), numbers)
    except ValueError as error:
        at = "" if several else f"column {label!r}: "
        raise DataError(f"{where}: {at}{error}; or go without: '?label=none'") from None


def _valid_unicode(text: str | None) -> str | None:
    """Return the text; None for half a surrogate pair, which JSON can hold: its row is a bad sample."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return None
    return text


def _key_of(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: expected a string or a whole number as key, found {value!r}; or give '?key=index'")
    return str(value)


def _read_table(path: str, name: str, kind: InputKind) -> tuple[list[str], Iterable[tuple[int, dict[str, Any]]]]:
    """The columns, and each row with the number of its line."""
    suffix = suffix_of(path)
    if kind != TEXTS and suffix != ".jsonl":
        word = "messages" if kind == CHATS else "tokens"
        raise SpecError(
            f"{name}: {word}= names a column of a .parquet or .jsonl file, which can hold lists, found {suffix}"
        )
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise SpecError(f"{name}: text= names a column of a .parquet, .csv, .tsv or .jsonl file, found {suffix}")
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with reading_lines(path, TABLE), open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(iter_objects(file, path, "text") if suffix == ".jsonl" else _rows(file, suffix, path))
    finally:
        csv.field_size_limit(before)
    return list(dict.fromkeys(column for _, row in rows for column in row)), rows


def _iter_cells(reader: Any, path: str) -> Iterator[list[str]]:
    """Yield the rows of a CSV reader."""
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}: the row that begins in line {first} cannot be read: {error}; put a text with a quote into "
                'double quotes, and write each quote in it twice, as ""'
            ) from error
        if cells is None:
            return
        yield cells


def _rows(file: Iterable[str], suffix: str, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, strict=True, delimiter="\t" if suffix == ".tsv" else ",")
    rows = filter(None, _iter_cells(reader, path))  # without empty lines
    heading = [name.strip() for name in next(rows, [])]
    if twice := next((column for column in heading if column and heading.count(column) > 1), None):
        raise DataError(f"{path}: expected columns of different names, found {twice!r} twice; rename one")
    for cells in rows:
        if len(cells) != len(heading):
            raise DataError(
                f"{path}: line {reader.line_num}: expected {len(heading)} columns like the heading, found {len(cells)}"
                "; put a text with a separator, a quote or a line break in it into double quotes"
            )
        yield reader.line_num, dict(zip(heading, cells, strict=True))
