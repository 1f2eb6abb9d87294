"""Parquet files in the layout that Hugging Face `datasets` writes: a struct of bytes and path, and a label; or tables
whose columns are the numbers of a sample.

Legend: N samples.

Columns are read by row group on demand and cached decompressed, up to `CACHE_BYTES` per process, least recently used
first out: a file that fits is read once in any order, a larger one once if read in order.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, is_labelled, stack_labels
from softlabel.dataset.columns import Columns, find_columns
from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import checked_labels, checked_width, class_number, number_classes, read_classes
from softlabel.dataset.multi_hot_columns import read_multi_hot
from softlabel.dataset.source import Source, span
from softlabel.dataset.storage import Files, LocalFiles
from softlabel.dataset.table import read_rows
from softlabel.dataset.text import text_rows
from softlabel.errors import BadImageError, DataError, SpecError, one_line
from softlabel.inputs.base import IGNORE, Raw, Sample
from softlabel.inputs.tensor import TENSORS
from softlabel.inputs.text import TEXTS

CACHE_BYTES = 1 << 30
_NO_BYTES = BadImageError("the row has no image bytes")


class ParquetSource(Source):
    """One or several files of one schema, in turn. The key is the image's `path` if there is one.

    Raises:
        SpecError: an option is wrong.
        DataError: a file, column, key or label cannot be used.
    """

    kind = "parquet"
    _labelled = 0
    repeated_keys_remedy = "name another column with '?key=COLUMN', or number the samples with '?key=index'"

    def __init__(self, files: Files, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name, self._files = name, files
        self._reset()
        if not files.is_local:
            with ThreadPoolExecutor(16) as pool:  # hides the latency of reading footers
                self._open.update(enumerate(pool.map(self._open_file, range(len(files)))))
        schemas = [self._get_file(number).schema_arrow for number in range(len(files))]
        asked: dict[str, str] = {
            k: options.pop(k)
            for k in ("image", "inputs", "text", "text_pair", "key", "label", "labels")
            if k in options
        }
        classes = options.pop("classes", None)
        ignored = ignore_labels or asked.get("label") == "none"
        if ignored:
            asked = {**asked, "label": "none"}
            asked.pop("labels", None)
        self._columns = find_columns(schemas[0], asked, name)
        self.inputs = self._columns.kind
        if classes is not None and not ignored:
            self._columns = self._set_class_names(read_classes(classes, subject=name))
        self._numbers = number_classes(self._columns.class_names)
        for file, schema in zip(files.names, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise DataError(
                    f"{name}: expected the columns of {files.names[0]} in all files, found others in {file}"
                )
        footers = [self._get_file(number).metadata for number in range(len(files))]
        self._rows = tuple(footer.num_rows for footer in footers)
        groups = [(n, g, f.row_group(g).num_rows) for n, f in enumerate(footers) for g in range(f.num_row_groups)]
        self._groups = tuple((number, group) for number, group, _ in groups)
        # starts_G[g] is the first row of group g; the last entry is the length.
        self._starts_G = np.concatenate([[0], np.cumsum([rows for *_, rows in groups])]).astype(np.int64)
        if self._columns.key is not None:
            self._columns = self._without_null_keys("key" in asked)
        self._check_labels(ignored)
        if self._columns.key is not None:
            self.maybe_repeated_keys = True

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
            return Keys.of(pa.array(np.arange(start, stop)))
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
            labels: Any = self._read_labels(group)[local] if self._columns.label else [IGNORE] * len(places)
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
        taken = [self._read_column(name, group).take(pa.array(rows_R)) for name in self._columns.inputs]
        if self.inputs is TENSORS:
            return read_rows(self._columns.inputs, taken)
        if self.inputs is TEXTS:
            return text_rows(taken)
        return [_NO_BYTES if image is None else image for image in taken[0].to_pylist()]

    def _read_keys(self, group: int, rows: "slice | NDArray[np.int64]") -> list[str]:
        assert self._columns.key is not None
        column = self._read_column(self._columns.key, group)
        if isinstance(rows, slice):
            column = column.slice(rows.start, rows.stop - rows.start)
        else:
            column = column.take(pa.array(rows))
        # A key column of integers counts as their decimal digits.
        return [value if isinstance(value, str) else str(value) for value in column.to_pylist()]

    def _read_labels(self, group: int) -> Labels:
        assert self._columns.label is not None
        if names := self._columns.multi_hot:
            columns = [self._read_column(name, group).combine_chunks() for name in names]
            return read_multi_hot(columns, names, self.label_width, self.name)
        column = self._read_column(self._columns.label, group)
        # fill_null imports pandas if it is installed, which is slow.
        labels: NDArray[np.int64] = (pc.fill_null(column, IGNORE) if column.null_count else column).to_numpy()
        return checked_labels(labels, self.name)

    def _read_column(self, path: str, group: int) -> pa.ChunkedArray:
        """Return a decompressed column of a row group; `path` may be struct.field."""
        with self._lock:
            entry = (path, group)
            if entry in self._cache:
                self._cache.move_to_end(entry)
                return self._cache[entry]
            number, group_in_file = self._groups[group]
            try:
                table = self._get_file(number).read_row_group(group_in_file, columns=[path], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{self._files.where(number)}: row group {group_in_file} cannot be read: {one_line(error)}; "
                    "fetch the file again"
                ) from error
            column = table.column(0)
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, [0])
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
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
        self._open: dict[int, pq.ParquetFile] = {}
        self._cache: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._cached = 0

    def _get_file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            opened = self._open_file(number)
            if hasattr(self, "_rows") and opened.metadata.num_rows != self._rows[number]:
                raise DataError(
                    f"{self._files.where(number)}: expected {self._rows[number]} rows, found "
                    f"{opened.metadata.num_rows}; the file was replaced while in use, rerun the command"
                )
            self._open[number] = opened
        return self._open[number]

    def _open_file(self, number: int) -> pq.ParquetFile:
        files = self._files
        try:
            if isinstance(files, LocalFiles):
                return pq.ParquetFile(files.path(number))
            # Reads whole column chunks in few requests instead of one per page.
            return pq.ParquetFile(files.open(number), pre_buffer=True)
        except (pa.ArrowException, OSError) as error:
            found = files.describe(number) or f"an unreadable one: {one_line(error)}"
            raise DataError(f"{files.where(number)}: expected a Parquet file, found {found}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_open", "_cache", "_cached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _without_null_keys(self, asked: bool) -> Columns:
        """Use row numbers if the key column is entirely null; raise DataError if it is partly null."""
        columns = self._columns
        assert columns.key is not None
        nulls = [self._count_nulls(columns.key, group) for group in range(len(self._groups))]
        if not sum(nulls):
            return columns
        if sum(nulls) == len(self) and not asked:
            return replace(columns, key=None)
        raise DataError(
            f"{self.name}: expected a key in every row, found {sum(nulls)} of {len(self)} rows "
            f"without '{columns.key}'; name another column with '?key=COLUMN', or number the rows with '?key=index'"
        )

    def _count_nulls(self, path: str, group: int) -> int:
        """Count the nulls of a column in a group, from the footer if it has statistics."""
        number, group_in_file = self._groups[group]
        footer = self._get_file(number).metadata.row_group(group_in_file)
        for position in range(footer.num_columns):
            chunk = footer.column(position)
            if chunk.path_in_schema == path and chunk.is_stats_set and chunk.statistics.has_null_count:
                return int(chunk.statistics.null_count)
        return int(self._read_column(path, group).null_count)

    def _set_class_names(self, names: tuple[str, ...]) -> Columns:
        columns = self._columns
        if columns.label is None:
            raise SpecError(f"{self.name}: classes= names labels, but no column has labels; add '?label=COLUMN'")
        if columns.class_names not in (None, names):
            raise SpecError(
                f"{self.name}: classes= differs from the file's class names for column {columns.label!r}; leave it out"
            )
        return replace(columns, class_names=names)

    def _check_labels(self, ignored: bool) -> None:
        columns = self._columns
        self.class_names = columns.class_names
        others = tuple(
            f"column {name!r} may hold labels too; '?label={name}' takes it" for name in columns.other_labels
        )
        if columns.label is None:
            listed = "" if not columns.candidates else f", '?label=COLUMN' takes one of {', '.join(columns.candidates)}"
            unfit = ", ".join(f"column {name!r} holds more than one class per row" for name in columns.no_labels)
            why = "labels are ignored, as requested" if ignored else f"{unfit or 'no column is called label'}{listed}"
            self.findings = Findings(without_labels=why, left_out=others)
            return
        if columns.multi_hot:
            self._check_multi_hot(columns)
            return
        largest = IGNORE
        for group in range(len(self._groups)):
            labels_N = self._read_labels(group)
            largest = max(largest, int(labels_N.max(initial=IGNORE)))
            self._labelled += int(np.count_nonzero(labels_N != IGNORE))
        self.has_labels = largest >= 0
        self.findings = Findings(
            labels_from=f"column {columns.label!r}",
            without_labels=f"column {columns.label!r} holds none",
            left_out=others,
        )
        if self.class_names is not None and largest >= len(self.class_names):
            raise DataError(
                f"{self.name}: expected labels below {len(self.class_names)}, the number of class names in the file, "
                f"found {largest}; fix the file, or name another column with '?label=COLUMN'"
            )

    def _check_multi_hot(self, columns: Columns) -> None:
        for group in range(len(self._groups)):
            labels = self._read_labels(group)
            labelled = int(np.count_nonzero(is_labelled(labels)))
            if labelled and self.label_width is None:  # null lists say nothing of the number of classes
                self.label_width = labels.shape[1]
            self._labelled += labelled
        listed = ", ".join(columns.multi_hot)
        self.has_labels = self._labelled > 0
        self.findings = Findings(labels_from=f"columns {listed}", without_labels=f"columns {listed} hold none")
        if self.label_width is None:
            self._columns = replace(columns, label=None, multi_hot=())
        else:
            checked_width(self.label_width, self.class_names, subject=self.name)
