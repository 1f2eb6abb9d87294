"""Shards as Parquet: one plain fixed_size_binary column per tensor; binary where rows differ in size.

B rows, W elements of a column.

Keys, hard labels and what describes a view may be compressed. Labels of teachers are not: they compress too little, and
are read as they lie in the file.
"""

import bisect
import itertools
import mmap
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.common.arrow_numbers import read_numbers
from softlabel.common.keys import Keys
from softlabel.errors import StoreCorruptError
from softlabel.store.columns import ROW_NAMES, Array, Column
from softlabel.store.formats.base import (
    GROUP_ROWS,
    IDENTITY_LIMIT,
    IDENTITY_NAME,
    IGNORE,
    CheckedRows,
    ShardIdentity,
    ShardRows,
    count_payload,
    cut_into_groups,
    in_one_go,
    reading_shard,
)
from softlabel.store.formats.parquet_pages import PLAIN, ZSTD, Chunk, find_plain_pages, read_row_groups, sum_page_bytes
from softlabel.store.manifest import COMPRESSED_VERSION
from softlabel.store.token_rows import RowSpans, list_counts
from softlabel.store.view_columns import BOX, FLIP, PARTNER_BOX, PARTNER_FLIP, PASTE, WEIGHT

_MAPPED = 64 << 20
_DAMAGE = (pa.ArrowException, IndexError, TypeError)  # a flipped bit can turn a number of a header into text
_LARGEST_VALUE = 2**31 - 1  # bytes of a row in a column of type binary
_ROW_FIELDS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("view", pa.int32(), nullable=False),
    pa.field("label", pa.int64()),
    pa.field("content", pa.uint64()),
)
_ENCODINGS = {0, 2, 3, 4, 8}  # plain, a dictionary in either form, run lengths and bits, which are those of nulls
_VIEW = {BOX, FLIP, PARTNER_BOX, PARTNER_FLIP, WEIGHT, PASTE}  # partners and digests are hashes, which do not compress
_COMPRESSIBLE = {"key", "view", "label", *_VIEW}
_FREE_ENCODINGS = {*_ENCODINGS, 7, 9}  # common beginnings; bytes apart by their place in a number
_WORTH = 32  # times smaller than labels: decompressing would cost `verify` more than it saves
_LARGEST_CHUNK = 64 << 20  # decompressed bytes of a column in a row group: a file cannot ask for all memory


def _make_schema(columns: tuple[Column, ...]) -> Any:
    sizes = [(column.name, column.row_bytes if column.per == "row" else -1) for column in columns]
    return pa.schema([*_ROW_FIELDS, *(pa.field(name, pa.binary(size), nullable=False) for name, size in sizes)])


def write(path: Path, identity: ShardIdentity, rows: CheckedRows) -> None:
    """Write a shard; the caller syncs and publishes it.

    Raises:
        OSError: the disk cannot be written.
        ValueError: a row has more than 2 GiB in one column.
    """
    schema = _make_schema(identity.columns)
    groups = cut_into_groups(identity.columns, rows.spans)
    repeated, split, compressed = ["view", "label"], [], []
    small = len(rows.keys.data) + sum(array.nbytes for name, array in rows.columns.items() if name in _COMPRESSIBLE)
    large = sum(array.nbytes for name, array in rows.columns.items() if name not in _COMPRESSIBLE)
    if identity.format_version >= COMPRESSED_VERSION and _WORTH * small >= large:
        columns = [column for column in identity.columns if column.name in _VIEW]
        repeated += [column.name for column in columns if _is_repetitive(rows.columns[column.name])]
        split = [column.name for column in columns if column.name not in repeated]
        compressed = [*repeated, *split]
        if max(np.diff(rows.keys.offsets_N1[groups]), default=0) + 4 * GROUP_ROWS <= _LARGEST_CHUNK:
            compressed.append("key")
    with pa.OSFile(str(path), "wb") as sink:
        writer = pq.ParquetWriter(
            sink,
            schema,
            compression=dict.fromkeys(compressed, "zstd"),
            use_dictionary=repeated,
            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
            write_statistics=False,
            store_schema=False,
            data_page_size=1 << 18,  # fits the processor's cache
        )
        for start, stop in itertools.pairwise(groups):
            writer.write_batch(_make_batch(identity.columns, schema, rows, start, stop), row_group_size=stop - start)
        writer.add_key_value_metadata({IDENTITY_NAME: identity.encode().decode()})
        writer.close()


def _is_repetitive(array_BW: Array) -> bool:
    """Whether few rows of a column are different, so that a dictionary of them is small."""
    if not len(array_BW):
        return True
    values = pa.Array.from_buffers(pa.binary(array_BW[0].nbytes), len(array_BW), [None, pa.py_buffer(array_BW)])
    return 4 * len(values.unique()) <= len(array_BW)


def _make_batch(columns: tuple[Column, ...], schema: Any, rows: CheckedRows, start: int, stop: int) -> Any:
    count = stop - start
    labels, content = rows.labels[start:stop], rows.content[start:stop]
    arrays = [
        rows.keys.slice(start, stop).arrow().cast(pa.string()),
        pa.array(rows.views[start:stop]),
        pa.array(labels, mask=labels == IGNORE),
        pa.array(content, mask=content == 0),
    ]
    for column in columns:
        first, last = rows.spans.cut(column.per, start, stop)
        buffers = [None, pa.py_buffer(rows.columns[column.name][first:last])]  # shares the memory: rows are contiguous
        if column.per != "row":
            offsets = (rows.spans.offsets[column.per][start : stop + 1] - first) * column.row_bytes
            if offsets[-1] > _LARGEST_VALUE:
                raise ValueError(
                    f"column {column.name!r}: row {start}: expected at most {_LARGEST_VALUE} bytes in a Parquet value, "
                    f"found {offsets[-1]}; use format hdf5, or shorter documents"
                )
            buffers.insert(1, pa.py_buffer(offsets.astype(np.int32)))
        arrays.append(pa.Array.from_buffers(schema.field(column.name).type, count, buffers))
    return pa.record_batch(arrays, schema=schema)


class ParquetShard:
    """A shard open for reading, memory-mapped. Not picklable, not shared over a fork.

    Raises:
        StoreCorruptError: the file is damaged or not a shard.
        FileNotFoundError: there is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._since = 0  # bytes read since pages were last released
        self._kept: dict[str, Any] = {}
        self._pages: dict[str, tuple[list[tuple[int, int]], list[int]] | None] = {}
        with reading_shard(path, "Parquet", *_DAMAGE):
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)
            self._file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(self._map)), pre_buffer=False)
            self._check()

    def _check(self) -> None:
        metadata = self._file.metadata
        raw = (metadata.metadata or {}).get(IDENTITY_NAME.encode())
        if raw is None or len(raw) > IDENTITY_LIMIT:
            raise StoreCorruptError(f"{self.path}: Parquet, but not a softlabel shard (no identity in its metadata)")
        self.identity = identity = ShardIdentity.decode(raw, self.path)
        self._columns = {column.name: column for column in identity.columns}
        self._names = [*ROW_NAMES, *self._columns]
        size = len(self._map)
        if metadata.num_rows != identity.rows:
            raise StoreCorruptError(
                f"{self.path}: its identity says {identity.rows} rows, its footer {metadata.num_rows}"
            )
        plain = [one for one in identity.columns if one.name not in _COMPRESSIBLE]
        if identity.rows * sum(column.row_bytes for column in plain if column.per == "row") > size:
            raise StoreCorruptError(f"{self.path}: {identity.rows} rows do not fit into its {size} bytes")
        schema, expected = self._file.schema_arrow, _make_schema(identity.columns)
        if not schema.equals(expected):
            raise StoreCorruptError(
                f"{self.path}: expected the columns {_format_schema(expected)}, found {_format_schema(schema)}"
            )
        counts = list_counts(identity.columns)
        payload = self._columns.keys() - counts
        self._small_bytes = 0
        self._starts = [0]
        self._groups = read_row_groups(self._map)
        for group in self._groups:
            self._starts.append(self._starts[-1] + group.rows)
            for name, chunk in zip(self._names, group.chunks, strict=True):
                self._check_chunk(name, chunk)
                if name not in payload:
                    self._small_bytes += chunk.size
            if group.rows < 0:
                raise StoreCorruptError(f"{self.path}: a row group has {group.rows} rows")
        if self._starts[-1] != identity.rows:
            raise StoreCorruptError(f"{self.path}: its row groups hold {self._starts[-1]} rows, not {identity.rows}")
        self.spans = RowSpans.of(identity.rows, {name: self._read_column(name, 0, identity.rows) for name in counts})
        if (claimed := count_payload(plain, self.spans)) > size:
            raise StoreCorruptError(f"{self.path}: {claimed} bytes of rows do not fit into its {size} bytes")

    def _check_chunk(self, name: str, chunk: Chunk) -> None:
        free = name in _COMPRESSIBLE and self.identity.format_version >= COMPRESSED_VERSION
        codecs, encodings = ({PLAIN, ZSTD}, _FREE_ENCODINGS) if free else ({PLAIN}, _ENCODINGS)
        if chunk.codec not in codecs or not chunk.encodings <= encodings:
            raise StoreCorruptError(
                f"{self.path}: column {name!r} has codec {chunk.codec} and encodings {sorted(chunk.encodings)} of "
                f"Parquet, which format version {self.identity.format_version} does not allow"
            )
        if chunk.name != name or not 0 <= chunk.size <= (len(self._map) if chunk.codec == PLAIN else _LARGEST_CHUNK):
            raise StoreCorruptError(f"{self.path}: column {name!r} claims more bytes than it can have")

    def blocks(self, names: Collection[str]) -> list[tuple[int, int]]:
        if in_one_go(self.identity.columns, self._small_bytes, names):
            return [(0, self.identity.rows)] if self.identity.rows else []
        return list(itertools.pairwise(self._starts))

    def read(self, names: Collection[str], start: int, stop: int) -> ShardRows:
        with reading_shard(self.path, "Parquet", *_DAMAGE):
            row = self._read_row([name for name in ROW_NAMES if name in names], start, stop)
            wanted = [column for column in self._columns.values() if column.name in names]
            columns = {one.name: self._read_column(one.name, start, stop) for one in wanted if one.per == "row"}
            columns |= self._read_ragged([one for one in wanted if one.per != "row"], start, stop)
        self._since += sum(array.nbytes for array in columns.values())
        if self._since > _MAPPED:  # release pages, to bound resident memory
            self._since = 0
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return ShardRows(
            keys=row.get("key"),
            views=row.get("view"),
            labels=row.get("label"),
            content=row.get("content"),
            columns=columns,
        )

    def _read_row(self, names: list[str], start: int, stop: int) -> dict[str, Any]:
        """Read a row's small columns; they are cached, because decoding a few rows takes as long as all."""
        if not in_one_go(self.identity.columns, self._small_bytes, names):
            return self._decode_row(names, start, stop)
        if missing := [name for name in names if name not in self._kept]:
            self._kept.update(self._decode_row(missing, 0, self.identity.rows))
        return {
            name: self._kept[name].slice(start, stop) if name == "key" else self._kept[name][start:stop]
            for name in names
        }

    def _decode_row(self, names: list[str], start: int, stop: int) -> dict[str, Any]:
        chunks = self._read_chunks(names, start, stop) if names else {}
        found: dict[str, Any] = {}
        for name, kind, absent in (("view", "<i4", 0), ("label", "<i8", IGNORE), ("content", "<u8", 0)):
            if name in chunks:
                found[name] = np.concatenate(
                    [np.zeros(0, kind), *(read_numbers(chunk, absent) for chunk in chunks[name])]
                )
                found[name].flags.writeable = False  # it may be cached
        if "key" in chunks:
            found["key"] = Keys.join(Keys.read(chunk) for chunk in chunks["key"])
        return found

    def _read_chunks(self, names: list[str], start: int, stop: int) -> dict[str, list[Any]]:
        """Read rows as Arrow arrays."""
        first = bisect.bisect_right(self._starts, start) - 1
        last = bisect.bisect_left(self._starts, stop)
        base, end = self._starts[first], self._starts[last]
        for group, name in itertools.product(self._groups[first:last], names):
            chunk = group.chunks[self._names.index(name)]
            if chunk.codec != PLAIN and sum_page_bytes(self._map, chunk) > _LARGEST_CHUNK:
                raise StoreCorruptError(f"{self.path}: column {name!r} has pages of more than {_LARGEST_CHUNK} bytes")
        table = self._file.read_row_groups(range(first, last), columns=names, use_threads=False)
        if table.num_rows != end - base:
            raise StoreCorruptError(f"{self.path}: row groups {first} to {last - 1} are shorter than the footer says")
        table = table.slice(start - base, stop - start)
        return {name: table.column(name).chunks for name in names}

    def _read_column(self, name: str, start: int, stop: int) -> Array:
        """Read rows of a column of the encoding, directly from pages in the layout of `write`."""
        column = self._columns[name]
        if name not in self._pages:
            extents = self.extents(name)
            firsts = None if extents is None else [0, *itertools.accumulate(rows for _, rows in extents)]
            self._pages[name] = None if extents is None or firsts is None else (extents, firsts)
        if (pages := self._pages[name]) is None:
            parts = [_view_chunk(chunk, column) for chunk in self._read_chunks([name], start, stop)[name]]
            return np.concatenate([np.zeros((0, column.width), column.numpy), *parts])
        extents, firsts = pages
        size = column.row_bytes
        if start == stop:
            return np.empty((0, column.width), column.numpy)
        # Arrow's memory pool reuses the memory of the previous batch.
        raw = np.frombuffer(pa.allocate_buffer((stop - start) * size), np.uint8)
        page = bisect.bisect_right(firsts, start) - 1
        while start < stop:
            until = min(stop, firsts[page + 1])
            offset, count = extents[page][0] + (start - firsts[page]) * size, (until - start) * size
            to = len(raw) - (stop - start) * size
            raw[to : to + count] = self._bytes[offset : offset + count]
            start, page = until, page + 1
        return raw.view(column.numpy).reshape(-1, column.width)

    def _read_ragged(self, columns: list[Column], start: int, stop: int) -> dict[str, Array]:
        """Read rows of columns whose rows differ in size; the counts say how large each value is."""
        if not columns or start == stop:
            return {one.name: np.empty((0, one.width), one.numpy) for one in columns}
        chunks = self._read_chunks([one.name for one in columns], start, stop)
        found = {}
        for one in columns:
            sizes = np.diff(self.spans.offsets[one.per][start : stop + 1]) * one.row_bytes
            parts, at = [], 0
            for chunk in chunks[one.name]:
                parts.append(_view_values(chunk, one, sizes[at : at + len(chunk)]))
                at += len(chunk)
            found[one.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found

    def extents(self, name: str) -> list[tuple[int, int]] | None:
        """Return (offset, rows) of each page; None unless every page has the layout of `write`."""
        position, column = self._names.index(name), self._columns[name]
        if column.per != "row":
            return None  # there is a length before each value
        found: list[tuple[int, int]] = []
        for group in self._groups:
            pages = find_plain_pages(self._map, group.chunks[position], group.rows, column.row_bytes)
            if pages is None:
                return None
            found += pages
        return found

    def mapped(self, name: str) -> Array | None:
        return None  # pages have headers between them

    def close(self) -> None:
        self._file.close()


def _view_chunk(chunk: Any, column: Column) -> Array:
    """Return a chunk's memory as a read-only array (B, W)."""
    if chunk.null_count:
        raise StoreCorruptError(f"column {column.name!r} holds nulls")
    count = len(chunk) * column.width
    flat = np.frombuffer(chunk.buffers()[1], column.numpy, count, offset=chunk.offset * column.row_bytes)
    return flat.reshape(len(chunk), column.width)


def _view_values(chunk: Any, column: Column, sizes_B: Array) -> Array:
    """Return a chunk's memory as a read-only array (P, W) of values with these bytes."""
    if chunk.null_count:
        raise StoreCorruptError(f"column {column.name!r} holds nulls")
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int32, len(chunk) + 1, 4 * chunk.offset)
    if (wrong_B := np.diff(ends) != sizes_B).any():
        row = int(wrong_B.argmax())
        found = ends[row + 1] - ends[row]
        raise StoreCorruptError(
            f"column {column.name!r}: row {row} of a block: {sizes_B[row]} bytes expected, {found} found"
        )
    count = int(ends[-1] - ends[0]) // column.numpy.itemsize
    flat = np.frombuffer(data, column.numpy, count, int(ends[0])) if count else np.empty(0, column.numpy)
    return flat.reshape(-1, column.width)


def _format_schema(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)[:300]


open_shard = ParquetShard
