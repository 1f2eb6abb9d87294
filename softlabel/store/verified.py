"""Verify a store once per machine: an intact store is recorded by its files' sizes and change times.

Later runs skip the check. A file that was written, replaced or copied has another change time, which programs cannot
set, and is checked again.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from softlabel.common.cache_folder import cache_folder
from softlabel.errors import StoreCorruptError
from softlabel.store.manifest import ROOT_NAME, Manifest, ShardRecord
from softlabel.store.storage.base import TEMPORARY, Folder
from softlabel.store.verify import verify_store

Stamps = dict[str, list[int]]


def ensure_whole(
    folder: Folder, manifest: Manifest, records: Sequence[ShardRecord], *, once: bool, allow_incomplete: bool
) -> None:
    """Check every byte of a store; with `once`, only if a file changed since the last check.

    Raises:
        StoreCorruptError: names the first damaged files.
    """
    # Before the files are read, so that a change meanwhile is detected next time.
    stamps = _collect_stamps(folder, manifest, records) if once else {}
    note = _note_path(folder)
    if stamps and _read_note(note) == stamps:
        return
    if problems := verify_store(str(folder), allow_incomplete=allow_incomplete).problems:
        more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
        raise StoreCorruptError("; ".join([*problems[:3], *more]))
    if stamps:
        _write_note(note, stamps)


def _note_path(folder: Folder) -> Path:
    place = xxhash.xxh3_128_hexdigest(os.path.realpath(folder.root).encode(errors="surrogateescape"))
    return cache_folder() / "verified" / f"{place}.json"


def _collect_stamps(folder: Folder, manifest: Manifest, records: Sequence[ShardRecord]) -> Stamps:
    """Return name -> device, inode, bytes and times; empty for a store behind a URL, whose files have no such times."""
    if not folder.is_local:
        return {}
    listed = [ROOT_NAME, *(ref.file for ref in manifest.segments), *(ref.file for ref in manifest.extra)]
    listed += [record.file for record in records]
    found = {}
    for name in listed:
        try:
            status = os.lstat(folder.root / name)
        except OSError:
            return {}
        found[name] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def _read_note(note: Path) -> object:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None


def _write_note(note: Path, stamps: Stamps) -> None:
    """Write the note; if the cache is not writable, the next run verifies again."""
    temporary = note.with_name(f"{TEMPORARY}{note.stem}-{os.getpid()}")
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(stamps))
        os.replace(temporary, note)
