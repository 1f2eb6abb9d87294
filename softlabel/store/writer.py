"""Write a store: shards from any process, the manifest from one committer that holds the lease.

Order on disk: shard (temporary, synced, linked to its content-hashed name, folder synced), then the segment that
records it, then the root. A process killed at any point leaves a store that the next run resumes: it adopts intact
shards that no segment records, so the committer may write records in groups.
"""

import contextlib
import dataclasses
import os
import re
import time
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

import xxhash

from softlabel.errors import MismatchError, StoreError
from softlabel.store.fidelity import Fidelity
from softlabel.store.file_refs import EXTRA_FILE, SEGMENT_FILE, SEGMENT_LIMIT, ExtraRef, SegmentRef
from softlabel.store.formats.base import Rows, ShardIdentity, check_rows
from softlabel.store.formats.registry import format_module
from softlabel.store.manifest import (
    ROOT_LIMIT,
    ROOT_NAME,
    SHARD_FILE,
    BadRow,
    Json,
    Manifest,
    Run,
    Segment,
    ShardPlan,
    ShardRecord,
    Totals,
    shard_file,
)
from softlabel.store.manifest_file import decode_root, encode_root, encode_segment
from softlabel.store.manifest_read import SEGMENT_BYTES, SEGMENT_SHARDS, check_sizes, find_extra, load_for_writing
from softlabel.store.orphans import find_orphans, has_content
from softlabel.store.storage.base import SUBFOLDERS, TEMPORARY, Folder, Lease, file_xxh3, sync, writing
from softlabel.store.storage.lease import NoLease
from softlabel.store.storage.open import open_folder, take_lease

REASON_LENGTH = 200
COMMIT_SECONDS = 1.0  # records that arrive faster are written together
_EXTRA_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


def write_shard(
    root: str | os.PathLike[str],
    run: Run,
    plan: ShardPlan,
    rows: Rows,
    bad: Sequence[BadRow] = (),
    *,
    fidelity: Fidelity | None = None,
) -> ShardRecord:
    """Write and publish one shard, from any process; idempotent.

    Args:
        root: the store's folder or URL.
        run, plan: the store's run and the shard's plan.
        rows: the good rows of the plan's range, in dataset order.
        bad: the other rows of the range.
        fidelity: of these rows, if measured.

    Returns:
        The record, for `Committer.commit`.

    Raises:
        ValueError: rows and plan disagree.
        DataError: a key is not Unicode text.
        StoreError: the disk cannot be written; no file is left.
    """
    checked = check_rows(rows, run, plan, bad)
    bad = tuple(dataclasses.replace(row, reason=row.reason[:REASON_LENGTH]) for row in bad)
    identity = ShardIdentity.of(run, plan, checked, bad, fidelity)
    folder = open_folder(root)
    temporary = folder.temporary("shards")
    with writing(folder.where(f"shards/{plan.number:05d}")):
        try:
            format_module(run.format).write(temporary, identity, checked)
            with ThreadPoolExecutor(1) as pool:  # the processor hashes while the disk syncs
                synced = pool.submit(sync, temporary)
                xxh3 = file_xxh3(temporary)
                synced.result()
            size, file = temporary.stat().st_size, shard_file(plan.number, xxh3, run.format)
            folder.publish(temporary, file, xxh3)
        finally:
            temporary.unlink(missing_ok=True)
    return identity.record(file, size, xxh3)


class Committer:
    """The only writer of a store's manifest; create it with `Committer.open`, use it as a context manager.

    Leaving the `with` block keeps what was committed and releases the lease; only `finish` completes the store.
    """

    def __init__(self, folder: Folder, lease: Lease, manifest: Manifest, records: dict[int, ShardRecord]) -> None:
        self._folder, self._lease, self._manifest = folder, lease, manifest
        self._records = records
        self.run = manifest.run
        self.resumed = len(records)  # shards that existed before
        self._tail: list[ShardRecord] = []
        self._pending: dict[int, ShardRecord] = {}
        self._published = float("-inf")  # monotonic time when records were last written
        self._created = self._torn = False  # torn: a write failed midway, memory may be behind the disk
        self._process = os.getpid()

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        run: Run,
        recorded: Json | None = None,
        *,
        grow: bool = False,
        relabel: Collection[int] | None = None,
    ) -> Self:
        """Create or resume a store, and take its lease. A finished store may be on a read-only disk.

        Args:
            root, run: the store's folder or URL, and its identity.
            recorded: settings to record that do not change labels.
            grow: if the run grew from a complete store, by samples or views, continue that store.
            relabel: numbers of shards to drop; records of damaged segments are rebuilt from the shards. None: repair
                nothing.

        Raises:
            MismatchError: the store has another run; lists the differences.
            StoreLockedError: another committer has the lease.
            StoreCorruptError: recorded shards are missing or truncated.
            StoreError: the disk cannot be written.
        """
        folder = open_folder(root)
        folder.check_root()
        with writing(folder):
            folder.create()
            lease = take_lease(folder)
        try:
            with writing(folder):
                return cls._open(folder, lease, run, recorded or {}, grow, relabel)
        except BaseException:
            lease.release()
            raise

    @classmethod
    def _open(
        cls, folder: Folder, lease: Lease, run: Run, recorded: Json, grow: bool, relabel: Collection[int] | None
    ) -> Self:
        where = folder.where(ROOT_NAME)
        try:
            raw = folder.read(ROOT_NAME, ROOT_LIMIT)
        except FileNotFoundError:
            version, store_id = run.format_version, uuid.uuid4().hex
            manifest = Manifest(format_version=version, store_id=store_id, run=run, recorded=recorded)
            self = cls(folder, lease, manifest, {})
            self._collect_temporaries()
            self._publish_root(self._manifest)
            self._adopt()
            self._created = not self._records
            return self
        manifest = decode_root(raw, where)
        if grow and manifest.complete and run.grew_from(manifest.run):
            manifest = dataclasses.replace(manifest, run=run, complete=False)
        if differences := manifest.run.differences(run):
            raise MismatchError(
                f"{folder}: holds a store of another run; {'; '.join(differences)}; "
                "use the same settings to resume it, or another folder"
            )
        records, tail, whole = load_for_writing(folder, manifest, repair=relabel is not None)
        self = cls(folder, lease, manifest, records)
        self._tail = tail
        if relabel or not whole:
            self._forget(relabel or frozenset())
        check_sizes(folder, self._records.values())
        self._collect_temporaries()
        if not self._manifest.complete:
            self._refuse_without_lease()
            if recorded:
                self._manifest = dataclasses.replace(manifest, recorded={**manifest.recorded, **recorded})
            self._adopt()
        return self

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def url(self) -> str:
        """The store's folder or URL."""
        return str(self._folder)

    @property
    def complete(self) -> bool:
        return self._manifest.complete

    def withdraw(self) -> None:
        """Remove the manifest of a store that this committer created, if it has no rows: another run may come here."""
        if self._created and not (self._records or self._pending):
            with writing(self._folder):
                self._folder.remove(ROOT_NAME)

    def missing(self) -> list[ShardPlan]:
        """Return the planned shards that are not committed."""
        there = self._records.keys() | self._pending.keys()
        return [self.run.shard(n) for n in range(self.run.shard_count) if n not in there]

    def commit(self, *records: ShardRecord) -> int:
        """Record published shards; the first record of a shard wins.

        Records are written at once, or, within a second of the last write, with a later `commit`, `finish` or `close`.
        If the process is killed before, the next run adopts the shards.

        Returns:
            How many records were new.

        Raises:
            ValueError: a record does not have the planned number of rows.
            StoreError: the disk cannot be written.
        """
        new: dict[int, ShardRecord] = {}
        for record in records:
            plan = self.run.shard(record.number)
            if record.rows + len(record.bad) != plan.stop - plan.start:
                raise ValueError(f"shard {record.number}: {record.rows} rows, planned {plan.stop - plan.start}")
            if record.number not in self._records and record.number not in self._pending:
                new.setdefault(record.number, record)
        if new:
            assert not self._manifest.complete
            waiting = {**self._pending, **new}
            if len(waiting) >= SEGMENT_SHARDS or time.monotonic() - self._published > COMMIT_SECONDS:
                with writing(self._folder):
                    self._append(list(waiting.values()))
            else:
                self._pending = waiting
        return len(new)

    def publish(self) -> None:
        """Write the root before the first commit, for workers that read it."""
        with writing(self._folder):
            self._publish_root(self._manifest)

    def add_extra(self, name: str, data: bytes, suffix: Literal["safetensors", "json"] = "safetensors") -> None:
        """Publish a file that all shards share (`name` in lower case), in place of another of this name; idempotent."""
        assert _EXTRA_NAME.fullmatch(name)
        xxh3 = xxhash.xxh3_128_hexdigest(data)
        ref = ExtraRef(file=f"extra/{name}-{xxh3}.{suffix}", bytes=len(data), xxh3=xxh3)
        others = tuple(one for one in self._manifest.extra if not one.file.startswith(f"extra/{name}-"))
        listed = (*others, ref) == self._manifest.extra
        if listed and has_content(self._folder, ref.file, data):
            return
        with writing(self._folder):
            self._folder.make("extra")
            self._folder.publish_bytes(ref.file, data, xxh3)
            if not listed:
                self._publish_root(dataclasses.replace(self._manifest, extra=(*others, ref)))

    def finish(self, recorded: Json | None = None) -> Manifest:
        """Mark the store complete and remove unlisted files.

        Raises:
            StoreError: shards or shared files are missing.
        """
        if missing := self.missing():
            raise StoreError(f"{self._folder}: {len(missing)} of {self.run.shard_count} shards are missing")
        if (extra := self.run.encoding.extra) is not None and find_extra(self._manifest, extra) is None:
            raise StoreError(f"{self._folder}: encoding {self.run.encoding.name}: extra/{extra} is missing")
        with writing(self._folder):
            if not self._manifest.complete:
                both = {**self._manifest.recorded, **(recorded or {})}
                self._append(list(self._pending.values()), complete=True, recorded=both)
            if not isinstance(self._lease, NoLease):
                self._collect_orphans()
        return self._manifest

    def close(self) -> None:
        """Write pending records if possible (else the next run adopts their shards), and release the lease."""
        try:
            if self._pending and not self._torn and self._process == os.getpid():
                with contextlib.suppress(StoreError), writing(self._folder):
                    self._append(list(self._pending.values()))
        finally:
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, records: list[ShardRecord], **changes: Any) -> None:
        """Publish segments and root with these records and `changes`; update memory once the disk has them.

        Sealed segments stay; the open one is rewritten under a new name.
        """
        self._refuse_without_lease()
        self._torn = True
        segments = list(self._manifest.segments)
        tail, open_tail = [*self._tail, *records], bool(self._tail)
        while tail and records:
            batch, rest = tail[:SEGMENT_SHARDS], tail[SEGMENT_SHARDS:]
            raw = encode_segment(Segment(shards=tuple(batch)))
            if len(raw) > SEGMENT_LIMIT:
                raise StoreError(
                    f"{self._folder}: {sum(len(one.bad) for one in batch)} bad rows are too many to list; "
                    "look at the data, or use smaller shards"
                )
            if open_tail:
                segments.pop()
            xxh3 = xxhash.xxh3_128_hexdigest(raw)
            name = f"segments/{len(segments):05d}-{xxh3}.json"
            self._folder.publish_bytes(name, raw, xxh3)
            segments.append(SegmentRef(file=name, shards=len(batch), bytes=len(raw), xxh3=xxh3))
            open_tail = len(batch) < SEGMENT_SHARDS and len(raw) < SEGMENT_BYTES
            if open_tail:
                break
            tail = rest
        totals = self._manifest.totals
        for record in records:
            totals += record
        self._publish_root(dataclasses.replace(self._manifest, segments=tuple(segments), totals=totals, **changes))
        self._tail = tail
        self._records.update((record.number, record) for record in records)
        self._pending = {}
        self._published, self._torn = time.monotonic(), False
        if records:
            self._drop_old_tails()

    def _refuse_without_lease(self) -> None:
        if isinstance(self._lease, NoLease):
            raise self._lease.refused

    def _publish_root(self, manifest: Manifest) -> None:
        self._refuse_without_lease()
        raw = encode_root(manifest)
        if len(raw) > ROOT_LIMIT:
            raise StoreError(f"{self._folder}: manifest: expected at most {ROOT_LIMIT} bytes, found {len(raw)}")
        self._folder.replace(ROOT_NAME, raw)
        self._manifest = manifest

    def _drop_old_tails(self) -> None:
        names = set(self._folder.sizes("segments")) - {ref.file for ref in self._manifest.segments}
        for name in filter(SEGMENT_FILE.fullmatch, names):
            self._folder.remove(name)

    def _forget(self, numbers: Collection[int]) -> None:
        """Drop shards from the manifest; remove their damaged files after the new root is published."""
        forgotten = [self._records.pop(number) for number in sorted(numbers) if number in self._records]
        kept = [self._records[number] for number in sorted(self._records)]
        self._records, self._tail = {}, []
        self._manifest = dataclasses.replace(self._manifest, complete=False, segments=(), totals=Totals())
        if kept:
            self._append(kept)
        else:
            self._publish_root(self._manifest)
        for record in forgotten:
            self._folder.remove(record.file)

    def _collect_temporaries(self) -> None:
        if isinstance(self._lease, NoLease):
            return
        for name in [*self._folder.sizes("."), *(name for sub in SUBFOLDERS for name in self._folder.sizes(sub))]:
            if name.rsplit("/", 1)[1].startswith(TEMPORARY):
                self._folder.remove(name)

    def _adopt(self) -> None:
        """Record intact shards that a killed run published but did not commit."""
        if adopted := find_orphans(self._folder, self.run, self._records):
            self._append(adopted)

    def _collect_orphans(self) -> None:
        """Remove unlisted files whose names match the store's patterns; other files are not touched."""
        listed = {record.file for record in self._records.values()}
        listed |= {ref.file for ref in self._manifest.segments} | {ref.file for ref in self._manifest.extra}
        patterns = {"shards": SHARD_FILE, "segments": SEGMENT_FILE, "extra": EXTRA_FILE}
        for subfolder, pattern in patterns.items():
            for name in self._folder.sizes(subfolder):
                if name not in listed and (pattern.fullmatch(name) or name.split("/")[1].startswith(TEMPORARY)):
                    self._folder.remove(name)
