"""Reading a store: what the manifest lists, joined by key, taken or streamed in whole batches.

N rows of the store in the order of its shards (view by view, each in dataset order), B rows of a batch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from softlabel.errors import (
    MissingKeyError,
    StoreCorruptError,
    StoreError,
    StoreIncompleteError,
    StoreNotFoundError,
    UsageError,
)
from softlabel.store.columns import Array
from softlabel.store.folder import Folder
from softlabel.store.index import KeyIndex
from softlabel.store.keys import Keys
from softlabel.store.manifest import ROOT_LIMIT, ROOT_NAME, ExtraRef, Manifest, Run, ShardRecord
from softlabel.store.root import decode_root
from softlabel.store.shard import OpenShard, open_shard
from softlabel.store.writer import read_segment

Verify = Literal["none", "sizes", "full"]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """Rows as they were stored: views int32 (B,), labels int64 (B,) with -100 for none, content uint64 (B,) with 0 for
    none, columns of the encoding (B, W). Arrays may be read-only."""

    key_data: Keys
    views: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint64]
    columns: dict[str, Array]
    run: Run

    def __len__(self) -> int:
        return len(self.views)

    @property
    def keys(self) -> list[str]:
        return self.key_data.to_list()

    @property
    def scaled_logits(self) -> Array:
        """float32, logits / temperature up to a constant per row: (B, C), or (B, M, C) when members are kept."""
        run = self.run
        return run.encoding.decode(
            self.columns, num_classes=run.num_classes, members=len(run.members) if run.kept else 1, kept=run.kept
        )


def open_store(path: str | os.PathLike[str], *, verify: Verify = "sizes", allow_incomplete: bool = False) -> "Store":
    """Open a finished store.

    verify: "sizes" checks that every file is there with its length, "full" hashes and checks every byte, "none" trusts.
    allow_incomplete: also open what a run has written so far, for inspection.
    Raises StoreNotFoundError, StoreIncompleteError, StoreCorruptError, or StoreError for another format version.
    """
    if verify not in ("none", "sizes", "full"):
        raise UsageError(f"verify: expected 'none', 'sizes' or 'full', found {verify!r}")
    folder = Folder(path)
    manifest, records = load_manifest(folder)
    if not manifest.complete and not allow_incomplete:
        raise StoreIncompleteError(
            f"{folder}: its run has finished {manifest.totals.shards} of {manifest.run.shard_count} shards; "
            "run the same 'softlabel generate' again to finish it"
        )
    if verify != "none":
        check_sizes(folder, manifest, records)
    if verify == "full":
        from softlabel.store.verify import verify_store

        if problems := verify_store(path, allow_incomplete=allow_incomplete).problems:
            raise StoreCorruptError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" * (len(problems) > 3)))
    return Store(folder, manifest, records)


def load_manifest(folder: Folder) -> tuple[Manifest, list[ShardRecord]]:
    """The root and all records, by number. Reads once more when a committer replaced the open segment meanwhile."""
    for attempt in (1, 2, 3):
        try:
            raw = folder.read(ROOT_NAME, ROOT_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreNotFoundError(
                f"{folder}: no store here (no {ROOT_NAME}); check the path, or write one with 'softlabel generate'"
            ) from None
        except PermissionError as error:
            raise StoreError(f"{folder}: cannot be read: {error.strerror}") from None
        manifest = decode_root(raw, str(folder.path(ROOT_NAME)))
        try:
            records = [record for ref in manifest.segments for record in read_segment(folder, ref)]
            break
        except FileNotFoundError as error:
            if attempt == 3 or manifest.complete:
                raise StoreCorruptError(
                    f"{error.filename}: is listed in {ROOT_NAME} and missing; copy the store again from its source"
                ) from None
    _check_records(folder, manifest, records)
    return manifest, sorted(records, key=lambda record: record.number)


def _check_records(folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> None:
    where, run = folder.path(ROOT_NAME), manifest.run
    if len({record.number for record in records}) != len(records):
        raise StoreCorruptError(f"{where}: a shard is listed twice")
    planned = run.shard_count
    suffix = "parquet" if run.format == "parquet" else "h5"
    for record in records:
        if record.number >= planned or not record.file.endswith(suffix):
            raise StoreCorruptError(f"{where}: {record.file} is not one of its {planned} planned {run.format} shards")
    if manifest.complete and len(records) != planned:
        raise StoreCorruptError(f"{where}: says complete, but lists {len(records)} of {planned} shards")
    if (len(records), sum(record.rows for record in records)) != (manifest.totals.shards, manifest.totals.rows):
        raise StoreCorruptError(f"{where}: its totals are not those of its segments")


def check_sizes(folder: Folder, manifest: Manifest, records: Sequence[ShardRecord]) -> None:
    """Every listed file is a plain file of its length. Raises StoreCorruptError."""
    sizes = {**folder.sizes("shards"), **(folder.sizes("extra") if manifest.extra else {})}
    listed: list[ShardRecord | ExtraRef] = [*records, *manifest.extra]
    for record in listed:
        if (found := sizes.get(record.file)) != record.bytes:
            what = "no file" if found is None else "a link, folder or device" if found < 0 else f"{found} bytes"
            raise StoreCorruptError(
                f"{folder.path(record.file)}: expected {record.bytes} bytes, found {what}; "
                f"run 'softlabel repair {folder}' to relabel it"
            )


class Store:
    """An open store. Picklable: a copy in another process opens its own files, lazily."""

    def __init__(self, folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> None:
        self._folder, self.manifest, self._records = folder, manifest, records
        self._starts = np.concatenate([[0], np.cumsum([record.rows for record in records], dtype=np.int64)])
        self._index: KeyIndex | None = None
        self._rows: dict[str, Any] = {}  # whole-store arrays, once they were needed

    @property
    def path(self) -> Path:
        return self._folder.root

    @property
    def run(self) -> Run:
        return self.manifest.run

    @property
    def shards(self) -> Sequence[ShardRecord]:
        """The records in row order."""
        return tuple(self._records)

    @property
    def bad(self) -> dict[str, str]:
        """Key -> reason of every sample that could not be labelled, in dataset order, whatever the number of views."""
        by_index = {row.index: row for record in self._records for row in record.bad}
        return {by_index[index].key: by_index[index].reason for index in sorted(by_index)}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} rows, {len(self._records)} shards)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.manifest.store_id, not self.manifest.complete)

    def close(self) -> None:
        self._index = None
        self._rows.clear()

    # Whole-store arrays of the small columns.

    @property
    def keys(self) -> Keys:
        """The keys of all rows."""
        found: Keys = self._small()["key"]
        return found

    @property
    def views(self) -> npt.NDArray[np.int32]:
        """int32 (N,)."""
        if "view" not in self._rows:
            per_shard = [self.run.shard(record.number).view for record in self._records]
            self._rows["view"] = np.repeat(np.array(per_shard, np.int32), np.diff(self._starts))
        found: npt.NDArray[np.int32] = self._rows["view"]
        return found

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 (N,), -100 where unlabelled."""
        found: npt.NDArray[np.int64] = self._small()["label"]
        return found

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        """uint64 (N,), xxh3-64 of the encoded images, 0 where the source has none."""
        found: npt.NDArray[np.uint64] = self._small()["content"]
        return found

    def _small(self) -> dict[str, Any]:
        """Keys, labels and content of all rows; each shard is opened once for the three."""
        if "key" not in self._rows:
            keys, labels, content = [], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
            for shard in self._each():
                rows = shard.identity.rows
                keys.append(shard.keys(0, rows))
                labels.append(shard.scalars("label", 0, rows))
                content.append(shard.scalars("content", 0, rows))
            self._rows |= {
                "label": np.concatenate(labels),
                "content": np.concatenate(content),
                "key": Keys.join(keys),
            }
        return self._rows

    def _whole(self, name: str) -> Array:
        if name not in self._rows:
            column = next(column for column in self.run.columns if column.name == name)
            out = np.empty((len(self), column.width), column.numpy)
            for start, shard in zip(self._starts.tolist(), self._each(), strict=False):
                out[start : start + shard.identity.rows] = shard.column(name, 0, shard.identity.rows)
            self._rows[name] = out
        found: Array = self._rows[name]
        return found

    def _each(self) -> Iterator[OpenShard]:
        for record in self._records:
            shard = self._open(record)
            try:
                yield shard
            finally:
                shard.close()

    def _open(self, record: ShardRecord) -> OpenShard:
        path = self._folder.path(record.file)
        try:
            shard = open_shard(path, self.run.format)
        except FileNotFoundError:
            raise StoreCorruptError(f"{path}: is missing; run 'softlabel repair {self.path}' to relabel it") from None
        plan = self.run.shard(record.number)
        if not shard.identity.belongs(self.run, plan) or shard.identity.rows != record.rows:
            shard.close()
            raise StoreCorruptError(
                f"{path}: holds a shard of another run or range; run 'softlabel repair {self.path}' to relabel it"
            )
        return shard

    # What students ask.

    def lookup(
        self,
        keys: Sequence[str] | npt.NDArray[Any] | Keys,
        view: int = 0,
        *,
        missing: Literal["error", "mask"] = "error",
    ) -> I64:
        """The row of each key in `view`, int64. Vectorised.

        A key without a row raises MissingKeyError naming the first ones, or is -1 with missing="mask".
        """
        if missing not in ("error", "mask"):
            raise UsageError(f"missing: expected 'error' or 'mask', found {missing!r}")
        if not 0 <= view < self.run.views.count:
            raise UsageError(f"view {view}: {self.path} has the views 0 to {self.run.views.count - 1}")
        if self._index is None:
            self._index = KeyIndex(self.keys, self.views, where=str(self.path))
        asked = Keys.of(keys)
        rows_Q = self._index(asked, view, self.views)
        if missing == "error" and (absent := np.flatnonzero(rows_Q < 0)).size:
            names = ", ".join(repr(asked[int(position)][:80]) for position in absent[:3])
            reason = self.bad.get(asked[int(absent[0])])
            why = f" ({reason})" if reason else ""
            raise MissingKeyError(
                f"{self.path}: {absent.size} of {len(asked)} keys have no row, the first: {names}{why}; "
                "label these samples too, or ask for them to be skipped"
            )
        return rows_Q

    def take(self, rows: Sequence[int] | I64, columns: Sequence[str] | None = None) -> StoredRows:
        """These rows, in this order (repeats allowed), with all of the encoding's columns or those named.

        Raises UsageError for rows outside 0 to len() - 1.
        """
        rows_B = np.asarray(rows, np.int64).reshape(-1)
        if len(rows_B) and (rows_B.min() < 0 or rows_B.max() >= len(self)):
            wrong = rows_B.min() if rows_B.min() < 0 else rows_B.max()
            raise UsageError(f"{self.path}: row {wrong} is not one of its {len(self)} rows")
        names = self._names(columns)
        return StoredRows(
            key_data=self.keys.take(rows_B),
            views=self.views[rows_B],
            labels=self.labels[rows_B],
            content=self.content[rows_B],
            columns={name: self._whole(name)[rows_B] for name in names},
            run=self.run,
        )

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        known = [column.name for column in self.run.columns]
        if columns is not None and (odd := set(columns) - set(known)):
            raise UsageError(f"{self.path}: no column {sorted(odd)[0]!r}; it has {', '.join(known)}")
        return known if columns is None else list(columns)

    def stream(
        self, columns: Sequence[str] | None = None, *, start: int = 0, stop: int | None = None
    ) -> Iterator[StoredRows]:
        """Batches of consecutive rows in order, as large as a row group; sequential I/O in bounded memory."""
        names = self._names(columns)
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise UsageError(f"{self.path}: rows {start} to {stop} are not within its {len(self)} rows")
        for record, base in zip(self._records, self._starts[:-1].tolist(), strict=True):
            if base + record.rows <= start or stop <= base:
                continue
            shard = self._open(record)
            try:
                for first, last in shard.blocks:
                    first, last = max(first, start - base), min(last, stop - base)
                    if first < last:
                        yield StoredRows(
                            key_data=shard.keys(first, last),
                            views=shard.scalars("view", first, last),
                            labels=shard.scalars("label", first, last),
                            content=shard.scalars("content", first, last),
                            columns={name: shard.column(name, first, last) for name in names},
                            run=self.run,
                        )
            finally:
                shard.close()


def _reopen(path: str, store_id: str, incomplete: bool) -> Store:
    store = open_store(path, verify="none", allow_incomplete=incomplete)
    if store.manifest.store_id != store_id:
        raise StoreError(f"{path}: was replaced by another store meanwhile; open it again")
    return store
