"""Parquet files in the layout that Hugging Face `datasets` writes: a struct of bytes and path, and a label; or tables
whose columns are the numbers or texts of a sample.

Columns are read by row group: a file that fits into the cache is read once in any order, a larger one once if read in
order.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel.dataset.source import FileStamp, stamp_files
from softlabel.dataset.storage import Files, LocalFiles
from softlabel.dataset.table_source import TableSource
from softlabel.errors import DataError, one_line

_AHEAD = 64  # row groups whose keys or labels are read at once


class ParquetSource(TableSource):
    """One or several files of one schema, in turn. The key is the image's `path` if there is one.

    Raises:
        SpecError: an option is wrong.
        DataError: a file, column, key or label cannot be used.
    """

    kind = "parquet"
    _rows: Sequence[int] = ()

    def __init__(self, files: Files, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name, self._files = name, files
        self._reset()
        if not files.is_local:
            with ThreadPoolExecutor(16) as pool:  # hides the latency of reading footers
                self._open.update(enumerate(pool.map(self._open_file, range(len(files)))))
        schemas = [self._get_file(number).schema_arrow for number in range(len(files))]
        self._choose_columns(schemas[0], options, ignore_labels)
        for file, schema in zip(files.names, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise DataError(
                    f"{name}: expected the columns of {files.names[0]} in all files, found others in {file}"
                )
        footers = [self._get_file(number).metadata for number in range(len(files))]
        self._rows = tuple(footer.num_rows for footer in footers)
        groups = [(n, g, f.row_group(g).num_rows) for n, f in enumerate(footers) for g in range(f.num_row_groups)]
        self._groups = tuple((number, group) for number, group, _ in groups)
        self._check_rows([rows for *_, rows in groups])

    def stamp(self) -> tuple[FileStamp, ...] | None:
        if not self._files.is_local:
            return None
        return stamp_files([os.path.abspath(self._files.where(number)) for number in range(len(self._files))])

    def _load_column(self, path: str, group: int) -> pa.ChunkedArray:
        """Return a decompressed column of a row group.

        Keys and labels of consecutive groups are read several groups at once: a call of pyarrow takes longer than the
        few bytes that a small group has of them.
        """
        found, follows = self._ahead.pop((path, group), None), self._last.get(path) == group - 1
        self._last[path] = group
        if found is None:
            stop = group + 1
            if follows and path not in self._columns.inputs:
                number = self._groups[group][0]
                while stop < min(group + _AHEAD, len(self._groups)) and self._groups[stop][0] == number:
                    stop += 1
            found, *others = self._load_columns(path, group, stop)
            for entry in [entry for entry in self._ahead if entry[0] == path]:
                del self._ahead[entry]
            self._ahead.update({(path, place): column for place, column in enumerate(others, group + 1)})
        return found

    def _load_columns(self, path: str, start: int, stop: int) -> list[pa.ChunkedArray]:
        """Return a decompressed column of some row groups of one file."""
        number = self._groups[start][0]
        groups = [group for _, group in self._groups[start:stop]]
        file = self._get_file(number)
        try:
            table = file.read_row_groups(groups, columns=[path], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if len(groups) > 1:  # which one it is, reading them one by one says
                return self._load_columns(path, start, start + 1)
            raise DataError(
                f"{self._files.where(number)}: row group {groups[0]} cannot be read: {one_line(error)}; "
                "fetch the file again"
            ) from error
        column = table.column(0)
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, [0])
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if len(groups) == 1:
            return [column]
        edges = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in groups)]).tolist()
        return [column.slice(begin, end - begin) for begin, end in itertools.pairwise(edges)]

    def _count_nulls(self, path: str, group: int) -> int:
        """From the footer if it has statistics."""
        found = self._find_statistics(path, group)
        return super()._count_nulls(path, group) if found is None or not found.has_null_count else int(found.null_count)

    def _find_largest(self, path: str, group: int) -> int:
        """From the footer if it has statistics."""
        found = self._find_statistics(path, group)
        if found is None or not found.has_min_max:
            return super()._find_largest(path, group)
        return max(abs(int(found.min)), abs(int(found.max)))

    def _find_statistics(self, path: str, group: int) -> pq.Statistics | None:
        number, group_in_file = self._groups[group]
        footer = self._get_file(number).metadata.row_group(group_in_file)
        chunks = (footer.column(position) for position in range(footer.num_columns))
        return next((chunk.statistics for chunk in chunks if chunk.path_in_schema == path and chunk.is_stats_set), None)

    def _reset(self) -> None:
        super()._reset()
        self._open: dict[int, pq.ParquetFile] = {}
        self._ahead: dict[tuple[str, int], pa.ChunkedArray] = {}
        self._last: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in super().__getstate__().items() if name not in ("_open", "_ahead", "_last")
        }

    def _get_file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            opened = self._open_file(number)
            if self._rows and opened.metadata.num_rows != self._rows[number]:
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
