"""Check every byte of a store against its manifest and shard identities."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softlabel.common.hashing import U64, Hasher
from softlabel.common.multi_hot import MULTI_HOT, UNKNOWN
from softlabel.errors import StoreCorruptError, StoreIncompleteError
from softlabel.store.columns import ROW_NAMES, Array
from softlabel.store.formats.base import IGNORE, OpenShard, ShardRows
from softlabel.store.formats.registry import open_shard
from softlabel.store.hash_scan import hash_and_scan
from softlabel.store.manifest import Manifest, Run, ShardRecord
from softlabel.store.manifest_read import load_manifest, read_extra, read_tokenizer
from softlabel.store.origins import describe_remedy
from softlabel.store.reader import Store
from softlabel.store.storage.base import Folder, file_xxh3, reading
from softlabel.store.storage.open import open_folder
from softlabel.store.token_rows import TokenRun, find_content_problem, find_token_problem
from softlabel.store.view_columns import view_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Result of a verification.

    Attributes:
        rows, shards, bytes: checked.
        problems: one text per problem, naming its file; empty if the store is intact.
        damaged: numbers of the shards to relabel.
        extra: whether a file that all shards share is damaged.
    """

    rows: int
    shards: int
    bytes: int
    problems: tuple[str, ...] = ()
    damaged: tuple[int, ...] = ()
    extra: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_store(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    allow_incomplete: bool = False,
) -> VerifyReport:
    """Check the whole store: hashes, footers, row counts, keys, ranges, finite values, manifest.

    Args:
        path: the store's folder or URL.
        threads: of this process; by default the number of cores.
        progress: called with (bytes done, total bytes).
        allow_incomplete: also check an unfinished store.

    Returns:
        The report; damage is reported, not raised.

    Raises:
        StoreNotFoundError, StoreIncompleteError: there is no store, or it is not finished.
        StoreError: the store cannot be read, or has another format version.
    """
    folder = open_folder(path)
    try:
        manifest, records = load_manifest(folder)
    except StoreCorruptError as error:
        return VerifyReport(rows=0, shards=0, bytes=0, problems=(str(error),))
    if not manifest.complete and not allow_incomplete:
        raise StoreIncompleteError(
            f"{folder}: incomplete, {len(records)} of {manifest.run.shard_count} shards are finished; finish it first"
        )
    hasher, hashes = Hasher(), {}

    @functools.cache
    def remedy() -> str:
        return describe_remedy(folder, manifest)

    def check(record: ShardRecord) -> list[str]:
        found, hashes[record.number] = _check_shard(folder, manifest.run, record, hasher, remedy)
        return found

    total = sum(record.bytes for record in records)
    problems = _check_extra(folder, manifest, remedy)
    extra = bool(problems)
    damaged = []
    done = 0
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for record, found in zip(records, pool.map(check, records), strict=True):
            problems += found
            if found:
                damaged.append(record.number)
            done += record.bytes
            if progress is not None:
                progress(done, total)
    if not problems and _has_duplicates(list(hashes.values())):
        problems += _check_keys(folder, manifest, records)
    return VerifyReport(
        rows=manifest.totals.rows,
        shards=len(records),
        bytes=total,
        problems=tuple(problems),
        damaged=tuple(damaged),
        extra=extra,
    )


def _check_extra(folder: Folder, manifest: Manifest, remedy: Callable[[], str]) -> list[str]:
    try:
        if manifest.run.encoding.extra:
            read_extra(folder, manifest)
        read_tokenizer(folder, manifest)
    except StoreCorruptError as error:
        return [f"{error}; {remedy()}"]
    return []


def _check_shard(
    folder: Folder, run: Run, record: ShardRecord, hasher: Hasher, remedy: Callable[[], str]
) -> tuple[list[str], U64]:
    """Return the problems of one shard, and the hashes of its (key, view)."""
    path = folder.where(record.file)
    hashes: list[U64] = [np.zeros(0, np.uint64)]
    try:
        if (size := folder.size(record.file)) != record.bytes:
            text = f"expected {record.bytes} bytes, found {size}"
        else:
            with reading(path), folder.local(record.file) as local:
                text = _check_file(local, run, record, hasher, hashes)
    except FileNotFoundError:
        text = "missing"
    except OSError as error:  # a file that exists and cannot be read is damaged
        text = f"cannot be read: {error}"
    except StoreCorruptError as error:
        return [f"{error}; {remedy()}"], hashes[0]
    return [f"{path}: {text}; {remedy()}"] if text else [], np.concatenate(hashes)


def _check_file(path: Path, run: Run, record: ShardRecord, hasher: Hasher, hashes: list[U64]) -> str:
    """Return the first problem of a shard file, or ""; appends the hashes of its keys."""
    shard, broken = None, None
    try:
        shard = open_shard(path, run.format)
    except StoreCorruptError as error:
        broken = error  # reported only if the hash matches, because a wrong hash explains it
    try:
        found, seen = _hash_file(path, run, shard)
        if found != record.xxh3:
            return f"xxh3 expected {record.xxh3}, found {found}"
        if broken is not None:
            raise broken
        assert shard is not None
        return _check_content(shard, run, record, hasher, hashes, seen)
    finally:
        if shard is not None:
            shard.close()


def _hash_file(path: Path, run: Run, shard: OpenShard | None) -> tuple[str, bool]:
    """Return the hash of a shard's bytes, and whether its logits were found valid in the same pass.

    If False, the logits are checked in the ordinary way, which finds the problem if there is one.
    """
    column = run.encoding.scanned if run.activation == "softmax" else None
    if shard is not None and column is not None and shard.identity.columns == run.columns:
        extents = shard.extents(column)
        if extents and sum(rows for _, rows in extents) == shard.spans.total(run.columns[0].per):
            return hash_and_scan(path, extents, run.columns[0], run.members_stored, run.encoding.is_clean)
    return file_xxh3(path), False


def _check_content(
    shard: OpenShard, run: Run, record: ShardRecord, hasher: Hasher, hashes: list[U64], seen: bool
) -> str:
    """Return the first problem of a shard whose hash matches, or ""; appends the hashes of its keys.

    With `seen`, the encoding's columns are known to be valid.
    """
    plan, identity = run.shard(record.number), shard.identity
    if not identity.belongs(run, plan):
        return "a shard of another run or range"
    identified = (identity.rows, identity.bad, identity.first_key, identity.last_key, identity.fidelity)
    if identified != (record.rows, record.bad, record.first_key, record.last_key, record.fidelity):
        return "its identity differs from the manifest's record"
    if any(not plan.start <= row.index < plan.stop for row in record.bad):
        return "a bad row lies outside its range"
    edges: list[str] = []
    labels = [column.name for column in run.label_columns if not seen]
    features = [column.name for column in run.feature_columns]
    names = [*ROW_NAMES, *labels, *(column.name for column in run.sample_columns), *features]
    for start, stop in shard.blocks(names):
        part = shard.read(names, start, stop)
        assert part.keys is not None
        assert part.views is not None
        assert part.labels is not None
        try:
            keys = part.keys.check()
        except ValueError as error:
            return str(error)
        hashes.append(hasher(keys, plan.view))
        edges += [keys[0], keys[len(keys) - 1]]
        if not (part.views == plan.view).all():
            return f"expected rows of view {plan.view}, found another"
        if ((part.labels < 0) & (part.labels != IGNORE)).any():
            return "a label is negative"
        found = view_problem({column.name: part.columns[column.name] for column in run.sample_columns})
        if run.tokens is not None:
            found = _find_document_problem(run.tokens, run.num_classes, part)
        if not found and MULTI_HOT in part.columns:
            found = _find_multi_hot_problem(part.columns[MULTI_HOT])
        if not found and run.features is not None:
            found = run.features.find_problem({name: part.columns[name] for name in features})
        if not (seen or found):
            kept = {name: part.columns[name] for name in labels}
            found = run.encoding.problem(
                kept,
                num_classes=run.num_classes,
                members=run.members_stored,
                activation=run.activation,
                noun="row" if run.tokens is None else "position",
            )
        if found:
            return f"{found} (blocks of {stop - start} rows, this one from row {start})"
    if edges and (edges[0], edges[-1]) != (record.first_key, record.last_key):
        return "its first or last key differs from the manifest's record"
    return ""


def _find_document_problem(tokens: TokenRun, num_classes: int, rows: ShardRows) -> str | None:
    assert rows.labels is not None
    assert rows.content is not None
    if (rows.labels != IGNORE).any():
        return "a document has a hard label"
    return find_token_problem(tokens, num_classes, rows.columns) or find_content_problem(rows.content, rows.columns)


def _find_multi_hot_problem(labels_BC: Array) -> str | None:
    wrong_B = ((labels_BC < UNKNOWN) | (labels_BC > 1)).any(axis=1)
    return f"row {int(wrong_B.argmax())} of a block: `{MULTI_HOT}` is not -1, 0 or 1" if wrong_B.any() else None


def _has_duplicates(hashes: list[U64]) -> bool:
    """Whether two hashes of (key, view) are equal."""
    rising = np.sort(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    return bool((rising[1:] == rising[:-1]).any())


def _check_keys(folder: Folder, manifest: Manifest, records: list[ShardRecord]) -> list[str]:
    """Return a problem if a (key, view) occurs twice."""
    store = Store(folder, manifest, records)
    try:
        if len(store):
            store.lookup([store.keys[0]], view=int(store.views[0]))
    except StoreCorruptError as error:
        return [str(error)]
    return []
