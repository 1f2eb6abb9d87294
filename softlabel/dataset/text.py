"""Texts as the rows of a table in a file: `.csv`, `.tsv` or `.jsonl`.

Legend: N samples.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import (
    checked_classes,
    checked_labels,
    choose_label,
    class_number,
    number_classes,
    read_classes,
)
from softlabel.dataset.source import ListedSource, span
from softlabel.dataset.suffixes import suffix_of
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE, Raw, Sample
from softlabel.inputs.text import TEXTS

NO_TEXT = BadImageError("the row has no text")
_LONGEST_FIELD = 1 << 30  # bytes: the csv module stops at 128 KiB otherwise


class TextFileSource(ListedSource):
    """Rows of a file with a heading (or JSON objects), held in memory. Keys are a column's, or the row numbers.

    ``?text=COLUMN`` names the texts, ``text_pair=COLUMN`` the second of each pair, ``label=COLUMN|none`` their classes,
    as numbers, or by the names that ``classes=FILE`` lists, and ``key=COLUMN|index`` their keys.
    """

    kind = "text"
    inputs = TEXTS
    against_equal_keys = "name another column with '?key=COLUMN', or number the samples with '?key=index'"

    def __init__(self, path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name = name
        asked = {word: options.pop(word, None) for word in ("text", "text_pair", "label", "key", "classes")}
        chosen = [asked["text"] or "text", *([asked["text_pair"]] if asked["text_pair"] is not None else [])]
        heading, rows = _read_table(path, name)
        ignored = ignore_labels or asked["label"] == "none"
        label, others = None if ignored else asked["label"], tuple[str, ...]()
        if label is None and not ignored:
            names = (column for column in heading if column not in chosen)
            label, others = choose_label(names, subject=name, remedy="choose with '?label=COLUMN' or '?label=none'")
        key = None if asked["key"] == "index" else asked["key"]
        for column in (*chosen, label, key):
            if column is not None and column not in heading:
                raise DataError(f"{name}: there is no column {column!r}; the file has {', '.join(heading)}")
        if asked["classes"] is not None and not ignored:
            self.class_names = read_classes(asked["classes"], subject=name)
        numbers, labels = number_classes(self.class_names), []
        texts: list[list[str | None]] = [[] for _ in chosen]
        keys: list[str] = []
        for line, row in rows:
            where = f"{name}: line {line}"
            for column, values in zip(chosen, texts, strict=True):
                value = row.get(column)
                if value is not None and not isinstance(value, str):
                    raise DataError(f"{where}: column {column!r}: expected a text, found {str(value)[:40]!r}")
                values.append(value)
            if key is not None:
                keys.append(_key_of(row.get(key), f"{where}: column {key!r}"))
            try:
                labels.append(IGNORE if label is None else class_number(row.get(label), numbers))
            except ValueError as error:
                raise DataError(f"{where}: column {label!r}: {error}; or go without: '?label=none'") from None
        try:
            self._texts = [pa.array(values, type=pa.large_string()) for values in texts]
            self._keys = None if key is None else pa.array(keys, type=pa.large_string())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name}: expected valid Unicode, found {str(error.object)[:40]!r}; correct the file"
            ) from error
        self._labels_N = checked_labels(np.array(labels, dtype=np.int64), name)
        checked_classes(self._labels_N, self.class_names, subject=name)
        self.has_labels = bool((self._labels_N != IGNORE).any())
        self.doubtful_keys = key is not None
        why = f"column {label!r} holds none" if label is not None else "no column sounds like labels"
        self.findings = Findings(
            labels_from=None if label is None else f"column {label!r}",
            without_labels="labels are ignored, as asked" if ignored else why,
            left_out=tuple(f"column {one!r} may hold labels too; '?label={one}' takes it" for one in others),
        )

    def __len__(self) -> int:
        return len(self._labels_N)

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        start, stop = span(start, stop, len(self))
        return self._labels_N[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows_B = np.asarray(indices, dtype=np.int64)
        assert not len(rows_B) or (rows_B.min() >= 0 and rows_B.max() < len(self)), (rows_B.min(), rows_B.max())
        raws = text_rows([column.take(pa.array(rows_B)) for column in self._texts])
        return [
            Sample(key=self.key_at(row), raw=raw, label=int(self._labels_N[row]))
            for row, raw in zip(rows_B.tolist(), raws, strict=True)
        ]


def text_rows(columns: Sequence[Any]) -> list[Raw]:
    """The texts, or pairs of them, in one or two Arrow columns; a null makes its row bad."""
    first, *second = (column.to_pylist() for column in columns)
    if not second:
        return [NO_TEXT if text is None else text for text in first]
    pairs = zip(first, second[0], strict=True)
    return [NO_TEXT if one is None or other is None else (one, other) for one, other in pairs]


def _key_of(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: expected a string or a whole number as key, found {value!r}; or give '?key=index'")
    return str(value)


def _read_table(path: str, name: str) -> tuple[list[str], Iterable[tuple[int, dict[str, Any]]]]:
    """The columns, and each row with the number of its line."""
    suffix = suffix_of(path)
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise SpecError(f"{name}: text= names a column of a .parquet, .csv, .tsv or .jsonl file, found {suffix}")
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(_json_rows(file, path) if suffix == ".jsonl" else _rows(file, suffix, path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a table in UTF-8 with a heading, found: {error}") from error
    finally:
        csv.field_size_limit(before)
    return list(dict.fromkeys(column for _, row in rows for column in row)), rows


def _rows(file: Iterable[str], suffix: str, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, strict=True, delimiter="\t" if suffix == ".tsv" else ",")
    heading = next(reader, [])
    for cells in reader:
        if len(cells) != len(heading) and cells:
            raise DataError(
                f"{path}: line {reader.line_num}: expected {len(heading)} columns like the heading, found {len(cells)}"
                "; put a text with a separator, a quote or a line break in it into double quotes"
            )
        if cells:
            yield reader.line_num, dict(zip(heading, cells, strict=True))


def _json_rows(file: Iterable[str], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: expected JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f'{path}: line {number}: expected an object such as {{"text": ...}}, found {value!r}')
        yield number, value
