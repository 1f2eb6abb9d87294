"""Writing a store: shards from any process, the manifest from one committer that holds the lease.

Order on disk: shard (temporary, synced, linked to its content-hashed name, folder synced), then the segment that
records it, then the root. Killing the process between any two steps leaves a store that the next run resumes: a shard
that no segment records yet is adopted. So records may wait a moment and reach the disk together.
"""

import contextlib
import dataclasses
import os
import re
import time
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import xxhash

from softlabel.errors import MismatchError, StoreCorruptError, StoreError
from softlabel.store.formats.base import Rows, ShardIdentity, check_rows
from softlabel.store.formats.registry import format_module
from softlabel.store.manifest import (
    EXTRA_FILE,
    REASON_LENGTH,
    ROOT_LIMIT,
    ROOT_NAME,
    SEGMENT_BYTES,
    SEGMENT_FILE,
    SEGMENT_LIMIT,
    SEGMENT_SHARDS,
    SHARD_FILE,
    BadRow,
    ExtraRef,
    Fidelity,
    Json,
    Manifest,
    Run,
    Segment,
    SegmentRef,
    ShardPlan,
    ShardRecord,
    Totals,
    shard_file,
)
from softlabel.store.manifest_file import decode_root, encode_root, encode_segment
from softlabel.store.manifest_read import load_for_writing
from softlabel.store.orphans import find_orphans, holds
from softlabel.store.storage.base import SUBFOLDERS, TEMPORARY, Folder, Lease, file_xxh3, sync, writing
from softlabel.store.storage.lease import NoLease
from softlabel.store.storage.open import open_folder, take_lease

COMMIT_SECONDS = 1.0  # records that come faster than this reach the disk together
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
    """Write and publish one shard; the record is for the committer. Usable from any process, idempotent.

    rows: the good rows of the plan's range in dataset order, `bad` the others. Raises ValueError when rows and plan
    disagree, DataError for keys that are no text, StoreError when the disk does not take it (nothing is left then).
    """
    checked = check_rows(rows, run, plan, bad)
    bad = tuple(dataclasses.replace(row, reason=row.reason[:REASON_LENGTH]) for row in bad)
    keys = checked.keys
    identity = ShardIdentity(
        format_version=run.format_version,
        run=run.fingerprint(plan.part),
        number=plan.number,
        view=plan.view,
        start=plan.start,
        stop=plan.stop,
        rows=len(keys),
        columns=run.columns,
        first_key=keys[0] if len(keys) else None,
        last_key=keys[len(keys) - 1] if len(keys) else None,
        bad=bad,
        fidelity=fidelity,
    )
    folder = open_folder(root)
    temporary = folder.temporary("shards")
    with writing(folder.where(f"shards/{plan.number:05d}")):
        try:
            format_module(run.format).write(temporary, identity, checked)
            with ThreadPoolExecutor(1) as pool:  # the processor hashes while the disk syncs
                synced = pool.submit(sync, temporary)
                xxh3 = file_xxh3(temporary)
                synced.result()
            size = temporary.stat().st_size
            file = shard_file(plan.number, xxh3, run.format)
            folder.publish(temporary, file, xxh3)
        finally:
            temporary.unlink(missing_ok=True)
    return identity.record(file, size, xxh3)


class Committer:
    """The one writer of a store's manifest. Make it with `Committer.open`, use it as a context manager.

    Leaving the `with` block releases the lease: what was committed stays, `finish` completes.
    """

    def __init__(self, folder: Folder, lease: Lease, manifest: Manifest, records: dict[int, ShardRecord]) -> None:
        self._folder, self._lease = folder, lease
        self._manifest = manifest
        self._records = records
        self.run = manifest.run
        self.resumed = len(records)  # shards that were there before this run
        self._tail: list[ShardRecord] = []
        self._pending: dict[int, ShardRecord] = {}
        self._published = float("-inf")  # when records last reached the disk, monotonic seconds
        self._torn = False  # a publication did not end: memory may be behind the disk
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
        """Create the store or resume it, and take its lease.

        grow: a complete store that the run has grown from, by samples or views, becomes an unfinished store of the run;
        its shards stay. relabel: shards to forget, which are then missing; what damaged segments recorded is found
        again in the shards. None: nothing is repaired.

        Raises MismatchError (its message lists what differs), StoreLockedError, StoreCorruptError when recorded
        shards are gone or cut (repair relabels them), StoreError when the disk does not take it. A finished store of
        the run on a disk that is read-only is taken as it is.
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
        cls,
        folder: Folder,
        lease: Lease,
        run: Run,
        recorded: Json,
        grow: bool,
        relabel: Collection[int] | None,
    ) -> Self:
        where = folder.where(ROOT_NAME)
        try:
            raw = folder.read(ROOT_NAME, ROOT_LIMIT)
        except FileNotFoundError:
            self = cls(
                folder,
                lease,
                Manifest(format_version=run.format_version, store_id=uuid.uuid4().hex, run=run, recorded=recorded),
                {},
            )
            self._collect_temporaries()
            self._publish_root(self._manifest)
            self._adopt()
            return self
        manifest = decode_root(raw, where)
        if grow and manifest.complete and run.grew_from(manifest.run):
            manifest = dataclasses.replace(manifest, run=run, complete=False)
        if differences := manifest.run.differences(run):
            raise MismatchError(
                f"{folder}: holds a store of another run; {'; '.join(differences)}; "
                "give the same settings to resume it, or another folder"
            )
        records, tail, whole = load_for_writing(folder, manifest, repair=relabel is not None)
        self = cls(folder, lease, manifest, records)
        self._tail = tail
        if relabel or not whole:
            self._forget(relabel or frozenset())
        self._check_sizes()
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

    def missing(self) -> list[ShardPlan]:
        """The plan minus what is committed."""
        there = self._records.keys() | self._pending.keys()
        return [self.run.shard(number) for number in range(self.run.shard_count) if number not in there]

    def commit(self, *records: ShardRecord) -> int:
        """Record published shards. The first record of a shard wins; returns how many were new.

        Shards are durable already. Their records are when this returns, or, where the last ones reached the disk less
        than a second ago, with a later `commit`, `finish` or `close`; a run that is killed before, adopts the shards.
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
        """Let the root on disk say what this run is and records, before the first commit: for workers who read it."""
        with writing(self._folder):
            self._publish_root(self._manifest)

    def add_extra(self, name: str, data: bytes) -> None:
        """Publish a safetensors file that the whole store shares (`name` in lower case); idempotent."""
        assert _EXTRA_NAME.fullmatch(name)
        xxh3 = xxhash.xxh3_128_hexdigest(data)
        ref = ExtraRef(file=f"extra/{name}-{xxh3}.safetensors", bytes=len(data), xxh3=xxh3)
        others = tuple(one for one in self._manifest.extra if not one.file.startswith(f"extra/{name}-"))
        listed = (*others, ref) == self._manifest.extra
        if listed and holds(self._folder, ref.file, data):
            return
        with writing(self._folder):
            self._folder.make("extra")
            self._folder.publish_bytes(ref.file, data, xxh3)
            if not listed:
                self._publish_root(dataclasses.replace(self._manifest, extra=(*others, ref)))

    def _has_extra(self, name: str) -> bool:
        return any(ref.file.startswith(f"extra/{name}-") for ref in self._manifest.extra)

    def finish(self, recorded: Json | None = None) -> Manifest:
        """Declare the store complete and collect what no manifest lists. StoreError while shards are missing."""
        if missing := self.missing():
            raise StoreError(f"{self._folder}: {len(missing)} of {self.run.shard_count} shards are missing")
        if (extra := self.run.encoding.extra) is not None and not self._has_extra(extra):
            raise StoreError(f"{self._folder}: extra/{extra} is missing, encoding {self.run.encoding.name} needs it")
        with writing(self._folder):
            if not self._manifest.complete:
                both = {**self._manifest.recorded, **(recorded or {})}
                self._append(list(self._pending.values()), complete=True, recorded=both)
            if not isinstance(self._lease, NoLease):
                self._collect_orphans()
        return self._manifest

    def close(self) -> None:
        """Publish the records that wait, if the disk takes them (else the next run adopts their shards), and release
        the lease."""
        try:
            if self._pending and not self._torn and self._process == os.getpid():
                with contextlib.suppress(StoreError), writing(self._folder):
                    self._append(list(self._pending.values()))
        finally:
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How the manifest grows: sealed segments stay, the open tail is written anew under a new name.

    def _append(self, records: list[ShardRecord], **changes: Any) -> None:
        """Publish segments and root with these records and `changes`; memory follows only once the disk has them."""
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
            raise StoreError(f"{self._folder}: its manifest would have {len(raw)} bytes, at most {ROOT_LIMIT} are read")
        self._folder.replace(ROOT_NAME, raw)
        self._manifest = manifest

    def _drop_old_tails(self) -> None:
        listed = {ref.file for ref in self._manifest.segments}
        for name in self._folder.sizes("segments"):
            if SEGMENT_FILE.fullmatch(name) and name not in listed:
                self._folder.remove(name)

    def _forget(self, numbers: Collection[int]) -> None:
        """Take shards out of the manifest; their files, damaged as they are, go once the new root is published."""
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

    # What a killed run left.

    def _check_sizes(self) -> None:
        sizes = self._folder.sizes("shards")
        for record in self._records.values():
            if sizes.get(record.file) != record.bytes:
                found = sizes.get(record.file)
                raise StoreCorruptError(
                    f"{self._folder.where(record.file)}: expected {record.bytes} bytes, found "
                    f"{'no file' if found is None else found}; run 'softlabel repair {self._folder}' to relabel it"
                )

    def _collect_temporaries(self) -> None:
        if isinstance(self._lease, NoLease):
            return
        for name in [*self._folder.sizes("."), *(name for sub in SUBFOLDERS for name in self._folder.sizes(sub))]:
            if name.rsplit("/", 1)[1].startswith(TEMPORARY):
                self._folder.remove(name)

    def _adopt(self) -> None:
        """Record shards that a killed run published but did not commit, if they are wholly what this run plans."""
        if adopted := find_orphans(self._folder, self.run, self._records):
            self._append(adopted)

    def _collect_orphans(self) -> None:
        """Remove files of ours that no manifest lists; what is not named like ours is not touched."""
        listed = {record.file for record in self._records.values()}
        listed |= {ref.file for ref in self._manifest.segments} | {ref.file for ref in self._manifest.extra}
        patterns = {"shards": SHARD_FILE, "segments": SEGMENT_FILE, "extra": EXTRA_FILE}
        for subfolder, pattern in patterns.items():
            for name in self._folder.sizes(subfolder):
                if name not in listed and (pattern.fullmatch(name) or name.split("/")[1].startswith(TEMPORARY)):
                    self._folder.remove(name)
