"""Shards as HDF5 with contiguous datasets, which can be mapped in place. B rows, W elements of a column.

The HDF5 library writes only the structure; we write the numbers at the offsets that it allocated. This is as fast as
the disk, and a full disk is an ordinary OSError.
"""

import io
import itertools
import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from softlabel.common.keys import Keys
from softlabel.errors import StoreCorruptError
from softlabel.store.columns import Array
from softlabel.store.formats.base import (
    IDENTITY_LIMIT,
    IDENTITY_NAME,
    CheckedRows,
    ShardIdentity,
    ShardRows,
    count_payload,
    cut_into_groups,
    in_one_go,
    reading_shard,
)
from softlabel.store.token_rows import RowSpans, list_counts

_SCALARS = {"view": "<i4", "label": "<i8", "content": "<u8"}
_PAGE = 4096
_ALIGN = 64  # bytes; arrays mapped in place are then aligned for any dtype


def _list_row_datasets(identity: ShardIdentity, key_bytes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> shape and dtype of the datasets whose shape does not follow from others."""
    rows = identity.rows
    return {
        "key": ((key_bytes,), "|u1"),
        "key_offsets": ((rows + 1,), "<i8"),
        **{name: ((rows,), dtype) for name, dtype in _SCALARS.items()},
        **{one.name: ((rows, one.width), one.dtype) for one in identity.columns if one.per == "row"},
    }


def _list_datasets(identity: ShardIdentity, key_bytes: int, spans: RowSpans) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> shape and dtype of every dataset."""
    columns = {one.name: ((spans.total(one.per), one.width), one.dtype) for one in identity.columns}
    return {
        **{name: kind for name, kind in _list_row_datasets(identity, key_bytes).items() if name not in columns},
        **columns,
    }


def write(path: Path, identity: ShardIdentity, rows: CheckedRows) -> None:
    """Write a shard; the caller syncs and publishes it.

    Raises:
        OSError: the disk cannot be written.
    """
    arrays: dict[str, Array] = {
        "key": rows.keys.data,
        "key_offsets": rows.keys.offsets_N1,
        "view": rows.views,
        "label": rows.labels,
        "content": rows.content,
        **rows.columns,
    }
    structure, offsets = _build_structure(identity, _list_datasets(identity, len(rows.keys.data), rows.spans))
    with open(path, "xb", buffering=0) as file:
        file.truncate(structure.size)
        pieces: list[tuple[int, Any]] = [
            (offset, page[: structure.size - offset]) for offset, page in structure.pages.items()
        ]
        pieces += [(offset, np.ascontiguousarray(arrays[name]).data) for name, offset in offsets.items()]
        for offset, data in pieces:
            file.seek(offset)
            view = memoryview(data).cast("B")
            while view:
                view = view[file.write(view) :]


class _Sparse(io.RawIOBase):
    """A sparse file in memory: holds the pages that were written, the structure without the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[int, bytearray] = {}
        self.size = self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def _iter_pages(self, count: int) -> Iterator[tuple[bytearray, int, int]]:
        """Yield the next `count` bytes as (page, first, last) and advance the position."""
        end = self._position + count
        while self._position < end:
            number, first = divmod(self._position, _PAGE)
            last = min(_PAGE, first + end - self._position)
            yield self.pages.setdefault(number * _PAGE, bytearray(_PAGE)), first, last
            self._position += last - first

    def write(self, data: Any) -> int:
        raw, done = bytes(data), 0
        for page, first, last in self._iter_pages(len(raw)):
            page[first:last] = raw[done : done + last - first]
            done += last - first
        self.size = max(self.size, self._position)
        return len(raw)

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        for page, first, last in self._iter_pages(len(view)):
            view[done : done + last - first] = page[first:last]
            done += last - first
        return len(view)


def _build_structure(
    identity: ShardIdentity, layout: dict[str, tuple[tuple[int, ...], str]]
) -> tuple[_Sparse, dict[str, int]]:
    """Return the file without its numbers, and name -> their byte offset. Without times: equal rows, equal bytes."""
    import h5py

    sparse, offsets = _Sparse(), {}
    with h5py.File(sparse, "w", libver=("v110", "v110"), alignment_threshold=_ALIGN, alignment_interval=_ALIGN) as file:
        file.attrs.create(IDENTITY_NAME, np.bytes_(identity.encode()))
        for name, (shape, dtype) in layout.items():
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.CONTIGUOUS)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            plist.set_obj_track_times(False)
            space = h5py.h5s.create_simple(shape)
            kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
            dataset = h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=plist)
            if (offset := dataset.get_offset()) is not None:
                offsets[name] = offset
    return sparse, offsets


class Hdf5Shard:
    """A shard open for reading. Not picklable, not shared over a fork.

    The HDF5 library only locates the numbers; they are read from the mapped file.

    Raises:
        StoreCorruptError: the file is damaged or not a shard.
        FileNotFoundError: there is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(path)
        with reading_shard(path, "HDF5", RuntimeError, TypeError):
            import h5py

            with open(path, "rb") as mapped:
                self._map = mmap.mmap(mapped.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                self._map.madvise(mmap.MADV_SEQUENTIAL)
            # No locking: shards never change once published, and read-only mounts refuse locks.
            with h5py.File(path, "r", locking=False) as file:
                self._check(h5py, file)

    def _check(self, h5py: Any, file: Any) -> None:
        root = file.id
        if not h5py.h5a.exists(root, IDENTITY_NAME.encode()):
            raise StoreCorruptError(f"{self.path}: HDF5, but not a softlabel shard (no identity in its attributes)")
        attribute = h5py.h5a.open(root, IDENTITY_NAME.encode())
        if (
            attribute.shape != ()
            or attribute.dtype.kind != "S"
            or attribute.dtype.itemsize > min(len(self._map), IDENTITY_LIMIT)
        ):
            raise StoreCorruptError(f"{self.path}: its identity is not a text of at most {IDENTITY_LIMIT} bytes")
        self.identity = identity = ShardIdentity.decode(bytes(file.attrs[IDENTITY_NAME]), self.path)
        names = {*_list_row_datasets(identity, 0), *(column.name for column in identity.columns)}
        if root.get_num_objs() != len(names) or not all(name.encode() in root for name in names):
            raise StoreCorruptError(f"{self.path}: expected the datasets {sorted(names)}, found {sorted(file)[:20]}")
        data: dict[str, Any] = {}
        for name in names:  # links and external storage could read other files
            link = root.links.get_info(name.encode())
            dataset = h5py.h5o.open(root, name.encode()) if link.type == h5py.h5l.TYPE_HARD else None
            if not isinstance(dataset, h5py.h5d.DatasetID):
                raise StoreCorruptError(f"{self.path}: {name!r} is not a dataset of this file")
            data[name] = dataset
        key_bytes = data["key"].shape[0] if data["key"].rank == 1 else 0
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        for name, (shape, text) in _list_row_datasets(identity, key_bytes).items():
            self._places[name] = self._locate(h5py, name, data[name], shape, np.dtype(text))
        counts = list_counts(identity.columns)
        self.spans = RowSpans.of(identity.rows, {name: self._copy_rows(name, 0, identity.rows) for name in counts})
        for name, (shape, text) in _list_datasets(identity, key_bytes, self.spans).items():
            if name not in self._places:
                self._places[name] = self._locate(h5py, name, data[name], shape, np.dtype(text))

    def _locate(
        self, h5py: Any, name: str, dataset: Any, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """Return where a dataset lies in the file, its shape and its type, which are the expected ones."""
        plist, size = dataset.get_create_plist(), len(self._map)
        if dataset.shape != shape or dataset.dtype != dtype:
            raise StoreCorruptError(
                f"{self.path}: {name!r}: expected {dtype.str} {shape}, found {dataset.dtype} {dataset.shape}"
            )
        if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_external_count():
            raise StoreCorruptError(f"{self.path}: {name!r} is not stored contiguously in the file")
        offset, count = dataset.get_offset(), int(np.prod(shape, dtype=object)) * dtype.itemsize
        if count and (offset is None or offset < 0 or offset + count > size or dataset.get_storage_size() != count):
            raise StoreCorruptError(f"{self.path}: {name!r} does not lie inside the file")
        return offset or 0, shape, dtype

    def blocks(self, names: Collection[str]) -> list[tuple[int, int]]:
        columns = self.identity.columns
        if in_one_go(columns, len(self._map) - count_payload(columns, self.spans), names):
            return [(0, self.identity.rows)] if self.identity.rows else []
        return list(itertools.pairwise(cut_into_groups(self.identity.columns, self.spans)))

    def _map_rows(self, name: str, start: int, stop: int) -> Array:
        """Return elements or rows, numbered in the dataset, as a view on the mapped file."""
        offset, shape, dtype = self._places[name]
        width = int(np.prod(shape[1:]))
        count = (stop - start) * width
        if not count:
            return np.empty((stop - start, *shape[1:]), dtype)
        flat = np.frombuffer(self._map, dtype, count, offset + start * width * dtype.itemsize)
        return flat.reshape(stop - start, *shape[1:])

    def _copy_rows(self, name: str, start: int, stop: int) -> Array:
        """Return an aligned copy of elements or rows."""
        return self._map_rows(name, start, stop).copy()

    def read(self, names: Collection[str], start: int, stop: int) -> ShardRows:
        # Release pages that were read before, to bound resident memory.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        with reading_shard(self.path, "HDF5", RuntimeError, TypeError):
            return ShardRows(
                keys=self._read_keys(start, stop) if "key" in names else None,
                views=self._copy_rows("view", start, stop) if "view" in names else None,
                labels=self._copy_rows("label", start, stop) if "label" in names else None,
                content=self._copy_rows("content", start, stop) if "content" in names else None,
                columns={
                    column.name: self._map_rows(column.name, *self.spans.cut(column.per, start, stop))
                    for column in self.identity.columns
                    if column.name in names
                },
            )

    def _read_keys(self, start: int, stop: int) -> Keys:
        offsets = self._copy_rows("key_offsets", start, stop + 1)
        first, last = int(offsets[0]), int(offsets[-1])
        if not 0 <= first <= last <= self._places["key"][1][0] or (start == 0 and first):
            raise ValueError("key offsets do not lie inside the key bytes")
        if (np.diff(offsets) < 0).any():
            raise ValueError("key offsets fall")
        return Keys(offsets - first, self._copy_rows("key", first, last))

    def extents(self, name: str) -> list[tuple[int, int]] | None:
        offset, shape, _ = self._places[name]
        return [(offset, shape[0])] if shape[0] else []

    def mapped(self, name: str) -> Array | None:
        offset, shape, dtype = self._places[name]
        return np.memmap(self.path, dtype, "r", offset, shape) if shape[0] else np.empty(shape, dtype)

    def close(self) -> None:
        """Drop the mapping; arrays that were read keep it alive."""
        del self._map


open_shard = Hdf5Shard
