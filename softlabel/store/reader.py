"""Read a store: look up rows by key, take them in any order, or stream them in batches.

N rows of the store in the order of its shards (views in turn, each in dataset order), B rows of a batch. A row of a
store of tokens is a document; what it has per token or position lies at the running sums of the documents' counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import xxhash

from softlabel.common.hashing import word_view
from softlabel.common.keys import Keys, PickedKeys
from softlabel.errors import MismatchError, MissingKeyError, StoreCorruptError, StoreError, UsageError
from softlabel.store.cache import Append, Cache
from softlabel.store.columns import ROW_NAMES, Array
from softlabel.store.formats.base import OpenShard, count_payload
from softlabel.store.gather import Parts, row_numbers
from softlabel.store.key_index import KeyIndex, rows_in_order
from softlabel.store.manifest import Manifest, Run, ShardRecord
from softlabel.store.manifest_read import load_manifest, read_extra, read_extra_file, read_tokenizer
from softlabel.store.shard_files import ShardFiles
from softlabel.store.storage.base import Folder
from softlabel.store.storage.open import open_folder
from softlabel.store.stored_rows import StoredRows, parse_keys, require_read
from softlabel.store.token_rows import RowSpans, add_counts, list_counts

I64 = npt.NDArray[np.int64]
MEMORY = 512 << 20


class Store:
    """An open store; create it with `open_store`. Picklable: a copy in another process opens its own files lazily."""

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        records: list[ShardRecord],
        *,
        memory: int = MEMORY,
        check_cache: bool = True,
    ) -> None:
        self._folder, self.manifest, self._records = folder, manifest, records
        self._memory, self._check_cache = memory, check_cache
        self._files = ShardFiles(folder, manifest.run, records)
        self._index: KeyIndex | None = None
        self._small: _SmallColumns | None = None
        self._views: npt.NDArray[np.int32] | None = None
        self._parts: dict[str, Parts] = {}
        self._extra: Mapping[str, Array] | None = None
        self._spans: RowSpans | None = None

    @property
    def path(self) -> Path:
        """The store's folder (for a remote store only a name, see `url`)."""
        return self._folder.root

    @property
    def url(self) -> str:
        """Folder or URL, as `open_store` takes it."""
        return str(self._folder)

    @property
    def run(self) -> Run:
        return self.manifest.run

    @property
    def shards(self) -> Sequence[ShardRecord]:
        """The records in row order."""
        return tuple(self._records)

    @property
    def bad(self) -> dict[str, str]:
        """Key -> reason of every sample that could not be labelled, in dataset order."""
        by_index = {row.index: row for record in self._records for row in record.bad}
        return {by_index[index].key: by_index[index].reason for index in sorted(by_index)}

    def __len__(self) -> int:
        return int(self._files.starts[-1])

    def __repr__(self) -> str:
        return f"Store({self.url!r}, {len(self)} rows, {len(self._records)} shards)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.url, self.manifest.store_id, self.manifest.complete, self._memory)

    def close(self) -> None:
        """Release memory and mapped files; a later call reads them again."""
        self._index = self._small = self._views = self._spans = None
        self._parts.clear()

    @property
    def keys(self) -> Keys:
        """The keys of all rows."""
        return self._load_small().keys

    @property
    def views(self) -> npt.NDArray[np.int32]:
        """The view of all rows, int32 (N,)."""
        if self._views is None:
            per_shard = [self.run.shard(record.number).view for record in self._records]
            self._views = np.repeat(np.array(per_shard, np.int32), np.diff(self._files.starts))
        return self._views

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The hard labels of all rows, int64 (N,), -100 for none. May be read-only."""
        return self._load_small().labels

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        """The content hashes of all rows (see FORMAT.md), uint64 (N,), 0 for none. May be read-only."""
        return self._load_small().content

    def require_labels(self, subject: str) -> None:
        """Raises MismatchError where rows have no labels, which the subject needs."""
        if not self.run.encoding.labels:
            raise MismatchError(
                f"{subject}: expected labels in {self.url}, found embeddings or attention alone (--only); use a store "
                "that was generated without --only"
            )

    @property
    def extra(self) -> Mapping[str, Array] | None:
        """The arrays that all rows share (encoding `head`: weight (C, D) and bias (C,)), or None.

        Raises:
            StoreCorruptError: the file does not match the manifest.
        """
        if self._extra is None and self.run.encoding.extra:
            self._extra = read_extra(self._folder, self.manifest)
        return self._extra

    @property
    def extra_file(self) -> bytes | None:
        """The safetensors file of `extra` as it is, read at each access; None if the store has none.

        Raises:
            StoreCorruptError: the file does not match the manifest.
        """
        return read_extra_file(self._folder, self.manifest) if self.run.encoding.extra else None

    @property
    def tokenizer(self) -> bytes | None:
        """The `tokenizer.json` of the teacher of a store of tokens, read at each access; None if the store has none.

        Raises:
            StoreCorruptError: the file does not match the manifest.
        """
        return read_tokenizer(self._folder, self.manifest)

    @property
    def spans(self) -> RowSpans:
        """Where the tokens and labelled positions of each row begin among those of all rows."""
        if self._spans is None:
            counts = {name: np.empty((len(self), 1), np.int32) for name in list_counts(self.run.columns)}
            if counts:
                for rows, _, part in self._files.read(list(counts), 0, len(self)):
                    for name, array in part.columns.items():
                        counts[name][rows.start : rows.stop] = array
            self._spans = RowSpans.of(len(self), counts)
        return self._spans

    @property
    def _payload_bytes(self) -> int:
        return count_payload(self.run.columns, self.spans)

    @property
    def _cache(self) -> Cache:
        content = "".join([self.manifest.store_id, *(record.xxh3 for record in self._records)])
        return Cache(xxhash.xxh3_128_hexdigest(content.encode()))

    def _load_small(self) -> "_SmallColumns":
        if self._small is None:
            # A file may have its keys compressed; two keys of each shard give how long they are.
            ends = [len(key.encode()) for one in self._records for key in (one.first_key, one.last_key) if key]
            size = len(self) * (24 + sum(ends) // max(len(ends), 1))
            parts: dict[str, list[Any]] = {"key": [], "key_offsets": [], "label": [], "content": []}
            if size <= self._memory:
                self._append_small(lambda name, data: parts[name].append(data))
                empty = {"key": np.uint8, "key_offsets": np.int64, "label": np.int64, "content": np.uint64}
                found = {name: np.concatenate([np.zeros(0, empty[name]), *parts[name]]) for name in parts}
            else:
                sizes = {"key": None, **dict.fromkeys(("label", "content"), 8 * len(self))}
                found = self._cache.get(
                    {**sizes, "key_offsets": 8 * (len(self) + 1)}, self._append_small, check=self._check_cache
                )
            key_data = found["key"]
            keys = Keys(found["key_offsets"].view("<i8"), key_data[: len(key_data) - 8], word_view(key_data))
            self._small = _SmallColumns(keys, found["label"].view("<i8"), found["content"].view("<u8"))
        return self._small

    def _append_small(self, append: Append) -> None:
        """Append keys (with 8 bytes of padding), their offsets, labels and content of all shards."""
        base = 0
        append("key_offsets", np.zeros(1, np.int64))
        for _, _, part in self._files.read(["key", "label", "content"], 0, len(self)):
            keys = require_read(part.keys, "key")
            try:
                keys.check()
            except ValueError as error:
                raise StoreCorruptError(f"{self.url}: {error}; run 'softlabel verify {self.url}'") from None
            append("key", keys.data)
            append("key_offsets", keys.offsets_N1[1:] + base)
            append("label", part.labels)
            append("content", part.content)
            base += int(keys.offsets_N1[-1])
        append("key", np.zeros(8, np.uint8))

    def _get_columns(self, names: Sequence[str]) -> dict[str, Parts]:
        if missing := [name for name in names if name not in self._parts]:
            for name, parts in self._load_columns(missing).items():
                self._parts[name] = Parts(parts)
        return {name: self._parts[name] for name in names}

    def _load_columns(self, names: Sequence[str]) -> dict[str, list[Array]]:
        """Return columns of the encoding as arrays: in memory, mapped in place, or mapped from the cache."""
        widths = {column.name: column for column in self.run.columns if column.name in names}
        if self.run.format == "hdf5" and self._folder.is_local and self._records:
            mapped = {name: [np.empty((0, column.width), column.numpy)] for name, column in widths.items()}
            for _, shard in self.open_shards():
                for name in names:
                    if (array := shard.mapped(name)) is not None:
                        mapped[name].append(array)
            return mapped
        totals = {name: self.spans.total(column.per) for name, column in widths.items()}
        if self._payload_bytes <= self._memory:
            whole = {name: np.empty((totals[name], column.width), column.numpy) for name, column in widths.items()}
            for rows, _, part in self._files.read(names, 0, len(self)):
                for name, array in part.columns.items():
                    start, stop = self.spans.cut(widths[name].per, rows.start, rows.stop)
                    whole[name][start:stop] = array
            return {name: [array] for name, array in whole.items()}

        def build(append: Append) -> None:
            for _, _, part in self._files.read(names, 0, len(self)):
                for name, array in part.columns.items():
                    append(name, array)

        sizes = {f"{name}": column.row_bytes * totals[name] for name, column in widths.items()}
        found = self._cache.get(sizes, build, check=self._check_cache)
        return {name: [found[name].view(column.numpy).reshape(-1, column.width)] for name, column in widths.items()}

    def open_shards(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, OpenShard]]:
        """Yield (first row, open shard) of the shards that hold rows `start` to `stop`.

        Raises:
            StoreCorruptError: a shard is missing or not the planned one.
        """
        return self._files.open(start, len(self) if stop is None else stop)

    def lookup(
        self,
        keys: Sequence[str | int] | npt.NDArray[Any] | Keys,
        view: int = 0,
        *,
        missing: Literal["error", "mask"] = "error",
    ) -> I64:
        """Look up the row of each key in a view.

        Args:
            keys: Q keys; an integer stands for its decimal digits.
            view: the view's number.
            missing: ``error`` raises for a key without a row, ``mask`` returns -1 for it.

        Returns:
            int64 (Q,).

        Raises:
            MissingKeyError: keys without a row; names the first ones.
            UsageError: `view` or `missing` is out of range.
        """
        if missing not in ("error", "mask"):
            raise UsageError(f"missing: expected 'error' or 'mask', found {missing!r}")
        if isinstance(view, bool) or not isinstance(view, int | np.integer) or not 0 <= view < self.run.views.count:
            raise UsageError(f"view: expected 0 to {self.run.views.count - 1} of {self.url}, found {view!r}")
        wanted = parse_keys(keys, str(self.url))
        rows_Q = np.full(len(wanted), -1, np.int64)
        if self._index is None and 2 * len(wanted) >= self.run.dataset.rows:
            # Most often the whole labelled dataset is looked up, in its order: no index is needed.
            bad = [row.index for record in self._records for row in record.bad]
            rows_Q = rows_in_order(wanted, self.keys, np.flatnonzero(self.views == view), bad)
        if (left := np.flatnonzero(rows_Q < 0)).size:
            if self._index is None:
                self._index = KeyIndex(self.keys, self.views, where=str(self.path))
            rows_Q[left] = self._index(wanted if len(left) == len(wanted) else wanted.take(left), view, self.views)
        if missing == "error" and (absent := np.flatnonzero(rows_Q < 0)).size:
            names = ", ".join(repr(wanted[int(position)][:80]) for position in absent[:3])
            reason = self.bad.get(wanted[int(absent[0])])
            why = f" ({reason})" if reason else ""
            raise MissingKeyError(
                f"{self.url}: {absent.size} of {len(wanted)} keys have no row, the first: {names}{why}; "
                "label these samples too, or skip them"
            )
        return rows_Q

    def take(self, rows: Sequence[int] | I64, columns: Sequence[str] | None = None) -> StoredRows:
        """Read rows in the given order; repeats are allowed.

        Args:
            rows: integers (B,), 0 to len() - 1.
            columns: names from "key", "label", "content" and the run's columns; by default all. With a column per token
                or labelled position come their counts, `length` or `positions`.

        Raises:
            UsageError: a row is not such a number (a mask, floats), or a column does not exist.
        """
        rows_B = row_numbers(rows, len(self), where=self.url)
        names = self._check_columns(columns)
        payload = self._get_columns([column.name for column in self.run.columns if column.name in names])
        return StoredRows(
            run=self.run,
            views=self.views[rows_B],
            key_data=PickedKeys(self.keys, rows_B) if "key" in names else None,
            label_data=self.labels[rows_B] if "label" in names else None,
            content_data=self.content[rows_B] if "content" in names else None,
            columns=self._gather(payload, rows_B),
            extra=self.extra,
        )

    def _gather(self, payload: Mapping[str, Parts], rows_B: I64) -> dict[str, Array]:
        """Gather the elements of some rows from whole columns."""
        found = {}
        for column in self.run.columns:
            if (parts := payload.get(column.name)) is not None:
                if column.per == "row":
                    found[column.name] = parts.take(rows_B)
                else:
                    offsets = self.spans.offsets[column.per]
                    found[column.name] = parts.take_ranges(offsets[rows_B], offsets[rows_B + 1])
        return found

    def _check_columns(self, columns: Sequence[str] | None) -> list[str]:
        known = [*ROW_NAMES, *(column.name for column in self.run.columns)]
        if columns is not None and (odd := set(columns) - set(known)):
            raise UsageError(f"{self.url}: no column {sorted(odd)[0]!r}; it has {', '.join(known)}")
        return known if columns is None else add_counts(list(columns), self.run.columns)

    def stream(
        self, columns: Sequence[str] | None = None, *, start: int = 0, stop: int | None = None
    ) -> Iterator[StoredRows]:
        """Yield batches of consecutive rows, a few MiB each: sequential I/O, memory bounded by one batch.

        Args:
            columns: as in `take`; other columns are not read.
            start, stop: first row and row after the last; by default all rows.

        Raises:
            UsageError: the range or a column does not exist.
        """
        names = self._check_columns(columns)
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise UsageError(f"{self.url}: rows {start} to {stop} are not within its {len(self)} rows")
        return self._iter_batches([name for name in names if name != "view"], start, stop)

    def _iter_batches(self, names: Sequence[str], start: int, stop: int) -> Iterator[StoredRows]:
        for rows, view, part in self._files.read(names, start, stop):
            yield StoredRows(
                run=self.run,
                views=np.full(len(rows), view, np.int32),
                key_data=None if part.keys is None else PickedKeys(part.keys),
                label_data=part.labels,
                content_data=part.content,
                columns=part.columns,
                extra=self.extra,
            )
            del part  # frees its memory for the next batch


@dataclass(frozen=True, slots=True)
class _SmallColumns:
    keys: Keys
    labels: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint64]


def _reopen(url: str, store_id: str, complete: bool, memory: int) -> Store:
    folder = open_folder(url)
    manifest, records = load_manifest(folder)
    if manifest.store_id != store_id or (complete and not manifest.complete):
        raise StoreError(f"{url}: replaced by another store meanwhile; open it again")
    return Store(folder, manifest, records, memory=memory, check_cache=False)
