"""Rows of a table as samples: encoded images, numbers or texts in its columns, with their keys and labels.

Legend: N samples.

Columns are read by group of rows on demand and cached, up to `CACHE_BYTES` per process, least recently used first out.
"""

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.common.arrow_numbers import make_indices, read_numbers
from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, is_labelled, stack_labels
from softlabel.common.spec import replace_option
from softlabel.dataset.columns import ALL, Columns, find_columns
from softlabel.dataset.documents import NO_LABELS, WORDS, chosen_columns, document_rows
from softlabel.dataset.findings import Findings, some
from softlabel.dataset.hard_labels import checked_labels, checked_width, class_number, number_classes, read_classes
from softlabel.dataset.multi_hot_columns import read_multi_hot
from softlabel.dataset.source import COLUMN_REMEDY, Source, span
from softlabel.dataset.table import check_integers, is_wide, read_rows
from softlabel.dataset.text import FORMS, text_rows
from softlabel.errors import BadImageError, DataError, SpecError, one_line
from softlabel.inputs.base import IGNORE, Raw, Sample
from softlabel.inputs.chat import CHATS
from softlabel.inputs.tensor import TENSORS
from softlabel.inputs.text import TEXTS
from softlabel.inputs.tokens import TOKENS

CACHE_BYTES = 1 << 30
_NO_BYTES = BadImageError("the row has no image bytes")
_ASKED = ("image", "inputs", *FORMS, "key", "label", "labels")


class TableSource(Source):
    """Rows in groups, whose columns are read as Arrow arrays. Keys are a column's, or the row numbers.

    A subclass opens its files and calls `_choose_columns` and `_check_rows`.

    Raises:
        SpecError: an option is wrong.
        DataError: a column, key or label cannot be used.
    """

    _labelled = 0
    _columns: Columns
    repeated_keys_remedy = COLUMN_REMEDY

    @abstractmethod
    def _load_column(self, path: str, group: int) -> pa.ChunkedArray:
        """A column of a group of rows; `path` may be struct.field."""

    def _count_nulls(self, path: str, group: int) -> int:
        """Count the nulls of a column in a group."""
        return int(self._read_column(path, group).null_count)

    def _find_largest(self, path: str, group: int) -> int:
        """Return the largest number of a column of integers in a group, without its sign."""
        ends = pc.min_max(self._read_column(path, group)).as_py().values()
        return max(abs(int(end or 0)) for end in ends)

    def _choose_columns(self, schema: pa.Schema, options: dict[str, str], ignore_labels: bool) -> None:
        """Find the columns in a schema; the options used are removed."""
        asked = {word: options.pop(word) for word in _ASKED if word in options}
        if (classes := options.pop("classes", None)) is not None and asked.keys() & set(WORDS):
            chosen_columns({**asked, "classes": classes}, self.name)  # refuses it
        self._ignored = ignore_labels or asked.get("label") == "none"
        self._asks_key = "key" in asked
        self._columns = find_columns(schema, asked, self.name, ignore_labels=self._ignored)
        self.inputs = self._columns.kind
        if asked.get("inputs") == ALL:
            columns = self._columns.inputs
            self.resolved_name = replace_option(self.name, "inputs", ",".join(columns))
            count = f"{len(columns):,} column{'s' if len(columns) > 1 else ''}"
            self.findings = Findings(notes=(f"inputs={ALL} takes {count}: {some(columns, 10)}",))
        if classes is not None and not self._ignored:
            self._columns = self._set_class_names(read_classes(classes, subject=self.name))
        self._numbers = number_classes(self._columns.class_names)
        self._wide_inputs = [name for name in self._columns.inputs if self.inputs == TENSORS and is_wide(schema, name)]

    def _check_rows(self, rows: Sequence[int]) -> None:
        """Check keys and labels, once the groups, which have these numbers of rows, can be read."""
        # starts_G[g] is the first row of group g; the last entry is the length.
        self._starts_G = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        if self._columns.key is not None:
            self._columns = self._without_null_keys()
        self._check_labels()
        self._check_integers()
        self.maybe_repeated_keys = self._columns.key is not None
        self.keys_are_named = self._asks_key

    def __len__(self) -> int:
        return int(self._starts_G[-1])

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        if self._columns.key is None:
            return [str(row) for row in range(start, stop)]
        keys: list[str] = []
        for group, first, last in self._split_rows(start, stop):
            keys += self._read_keys(group, slice(first, last))
        return keys

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        start, stop = span(start, stop, len(self))
        if self._columns.key is None:
            return Keys.of(make_indices(np.arange(start, stop)))
        columns = [
            self._read_column(self._columns.key, group).slice(first, last - first)
            for group, first, last in self._split_rows(start, stop)
        ]
        # A key column of integers counts as their decimal digits.
        return Keys.join([Keys.of(chunk) for column in columns for chunk in column.chunks] or [Keys.of([])])

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        labels_N = stack_labels([IGNORE] * (stop - start), self.label_width)
        if self._columns.label is not None:
            at = 0
            for group, first, last in self._split_rows(start, stop):
                labels_N[at : at + last - first] = self._read_labels(group)[first:last]
                at += last - first
        return labels_N

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows_B = np.asarray(indices, dtype=np.int64)
        assert not len(rows_B) or (rows_B.min() >= 0 and rows_B.max() < len(self)), (rows_B.min(), rows_B.max())
        groups_B = np.searchsorted(self._starts_G, rows_B, side="right") - 1
        samples: list[Sample | None] = [None] * len(rows_B)
        for group in np.unique(groups_B).tolist():
            places = np.flatnonzero(groups_B == group)
            local = rows_B[places] - self._starts_G[group]
            raws = self._raws(group, local)
            keys = self._read_keys(group, local) if self._columns.key else [str(row) for row in rows_B[places].tolist()]
            labels: Any = self._read_labels(group, local) if self._columns.label else [IGNORE] * len(places)
            if self.label_width is None:
                labels = [int(label) for label in labels]
            for place, raw, key, label in zip(places.tolist(), raws, keys, labels, strict=True):
                samples[place] = Sample(key=key, raw=raw, label=label)
        return [sample for sample in samples if sample is not None]

    def count_labelled(self) -> int | None:
        return self._labelled

    def blocks(self) -> list[tuple[int, int]]:
        """Return the row groups (see `Source`)."""
        starts = self._starts_G.tolist()
        return [(first, last) for first, last in pairwise(starts) if first < last]

    def _split_rows(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (group, first, last) for rows `start` to `stop`."""
        # "right" skips empty groups.
        first_group = int(np.searchsorted(self._starts_G, start, side="right")) - 1
        last_group = int(np.searchsorted(self._starts_G, stop, side="left"))
        pieces = []
        for group in range(first_group, last_group):
            begin, end = int(self._starts_G[group]), int(self._starts_G[group + 1])
            if begin < stop and end > start:
                pieces.append((group, max(start, begin) - begin, min(stop, end) - begin))
        return pieces

    def _raws(self, group: int, rows_R: NDArray[np.int64]) -> list[Raw]:
        """What the columns of some rows of a group hold as samples."""
        taken = [self._read_column(name, group).take(make_indices(rows_R)) for name in self._columns.inputs]
        if self.inputs == TENSORS:
            return read_rows(self._columns.inputs, taken)
        if self.inputs == TEXTS:
            return text_rows(taken)
        if self.inputs in (CHATS, TOKENS):
            return document_rows(taken, self.inputs)
        return [_NO_BYTES if image is None else image for image in taken[0].to_pylist()]

    def _read_keys(self, group: int, rows: "slice | NDArray[np.int64]") -> list[str]:
        assert self._columns.key is not None
        column = self._read_column(self._columns.key, group)
        if isinstance(rows, slice):
            column = column.slice(rows.start, rows.stop - rows.start)
        else:
            column = column.take(make_indices(rows))
        # A key column of integers counts as their decimal digits.
        return [value if isinstance(value, str) else str(value) for value in column.to_pylist()]

    def _read_labels(self, group: int, rows_R: NDArray[np.int64] | None = None) -> Labels:
        """Read the labels of some rows of a group; None: all."""
        assert self._columns.label is not None
        names = self._columns.multi_hot or (self._columns.label,)
        columns = [self._read_column(name, group) for name in names]
        if rows_R is not None:
            columns = [column.take(make_indices(rows_R)) for column in columns]
        if self._columns.multi_hot:
            return read_multi_hot([column.combine_chunks() for column in columns], names, self.label_width, self.name)
        (column,) = columns
        chunks = [read_numbers(chunk, IGNORE) for chunk in column.chunks]
        labels: NDArray[np.int64] = chunks[0] if len(chunks) == 1 else np.concatenate([np.zeros(0, np.int64), *chunks])
        return checked_labels(labels, self.name)

    def _read_column(self, path: str, group: int) -> pa.ChunkedArray:
        """Return a column of a group of rows, with labels as int64."""
        with self._lock:
            entry = (path, group)
            if entry in self._cache:
                self._cache.move_to_end(entry)
                return self._cache[entry]
            column = self._load_column(path, group)
            if path == self._columns.label and not self._columns.multi_hot:
                column = self._convert_labels(column)
            self._cache[entry] = column
            self._cached += column.nbytes
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
            return column

    def _convert_labels(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Convert a label column of any type to int64, null for none."""
        if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
            try:
                return column.cast(pa.int64())
            except pa.ArrowInvalid as error:  # more than 63 bits
                raise DataError(f"{self.name}: column {self._columns.label!r}: {one_line(error)}") from None
        # Parse each distinct value once.
        encoded = column.combine_chunks().dictionary_encode()
        try:
            numbers = [class_number(value, self._numbers) for value in encoded.dictionary.to_pylist()]
        except ValueError as error:
            raise DataError(
                f"{self.name}: column {self._columns.label!r}: {error}; or name another column with '?label=COLUMN', "
                "or go without: '?label=none'"
            ) from None
        taken = pa.array(numbers, type=pa.int64()).take(encoded.indices)
        return pa.chunked_array([taken])

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._cached = 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_cached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _without_null_keys(self) -> Columns:
        """Use row numbers if the key column is entirely null; raise DataError if it is partly null."""
        columns = self._columns
        assert columns.key is not None
        nulls = [self._count_nulls(columns.key, group) for group in range(len(self._starts_G) - 1)]
        if not sum(nulls):
            return columns
        if sum(nulls) == len(self) and not self._asks_key:
            return replace(columns, key=None)
        raise DataError(
            f"{self.name}: expected a key in every row, found {sum(nulls)} of {len(self)} rows "
            f"without '{columns.key}'; name another column with '?key=COLUMN', or number the rows with '?key=index'"
        )

    def _set_class_names(self, names: tuple[str, ...]) -> Columns:
        columns = self._columns
        if columns.label is None:
            raise SpecError(f"{self.name}: classes= names labels, but no column has labels; add '?label=COLUMN'")
        if columns.class_names not in (None, names):
            raise SpecError(
                f"{self.name}: classes= differs from the file's class names for column {columns.label!r}; leave it out"
            )
        return replace(columns, class_names=names)

    def _check_integers(self) -> None:
        """Check that float64 holds the integers among the inputs, and warn where float32 does not."""
        groups = range(len(self._starts_G) - 1)
        found = [
            check_integers(name, max((self._find_largest(name, group) for group in groups), default=0), self.name)
            for name in self._wide_inputs
        ]
        self.findings = replace(self.findings, left_out=(*self.findings.left_out, *filter(None, found)))

    def _check_labels(self) -> None:
        columns = self._columns
        self.class_names = columns.class_names
        others = tuple(
            f"column {name!r} may hold labels too; '?label={name}' takes it" for name in columns.other_labels
        )
        if columns.label is None:
            listed = "" if not columns.candidates else f", '?label=COLUMN' takes one of {', '.join(columns.candidates)}"
            unfit = ", ".join(f"column {name!r} holds more than one class per row" for name in columns.no_labels)
            why = (
                "labels are ignored, as requested"
                if self._ignored
                else f"{unfit or 'no column is called label'}{listed}"
            )
            why = NO_LABELS if self.inputs in (CHATS, TOKENS) else why
            self.findings = Findings(without_labels=why, left_out=others, notes=self.findings.notes)
            return
        if columns.multi_hot:
            self._check_multi_hot(columns)
            return
        largest = IGNORE
        for group in range(len(self._starts_G) - 1):
            labels_N = self._read_labels(group)
            largest = max(largest, int(labels_N.max(initial=IGNORE)))
            self._labelled += int(np.count_nonzero(labels_N != IGNORE))
        self.has_labels = largest >= 0
        self.findings = Findings(
            labels_from=f"column {columns.label!r}",
            without_labels=f"column {columns.label!r} holds none",
            left_out=others,
            notes=self.findings.notes,
        )
        if self.class_names is not None and largest >= len(self.class_names):
            raise DataError(
                f"{self.name}: expected labels below {len(self.class_names)}, the number of class names in the file, "
                f"found {largest}; fix the file, or name another column with '?label=COLUMN'"
            )

    def _check_multi_hot(self, columns: Columns) -> None:
        for group in range(len(self._starts_G) - 1):
            labels = self._read_labels(group)
            labelled = int(np.count_nonzero(is_labelled(labels)))
            if labelled and self.label_width is None:  # null lists say nothing of the number of classes
                self.label_width = labels.shape[1]
            self._labelled += labelled
        listed = ", ".join(columns.multi_hot)
        self.has_labels = self._labelled > 0
        self.findings = replace(
            self.findings, labels_from=f"columns {listed}", without_labels=f"columns {listed} hold none"
        )
        if self.label_width is None:
            self._columns = replace(columns, label=None, multi_hot=())
        else:
            checked_width(self.label_width, self.class_names, subject=self.name)
