"""Verifying a store once for each machine: what was found whole is remembered by its files' sizes and times of change.

A student that starts for the tenth time on labels of 200 GB does not read them all again first. A file that was written
to, replaced or copied since has another time of change, which no program can set, and is looked at again.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from softlabel.errors import StoreCorruptError
from softlabel.store.cache import cache_folder
from softlabel.store.manifest import ROOT_NAME, Manifest, ShardRecord
from softlabel.store.storage.base import TEMPORARY, Folder
from softlabel.store.verify import verify_store

Stamps = dict[str, list[int]]


def ensure_whole(
    folder: Folder, manifest: Manifest, records: Sequence[ShardRecord], *, once: bool, allow_incomplete: bool
) -> None:
    """Check every byte, or, with `once`, see that it was done and that no file has changed since.

    Raises StoreCorruptError, naming the first damaged files.
    """
    # Taken before the files are read: what changes meanwhile is not vouched for.
    stamps = _collect_stamps(folder, manifest, records) if once else {}
    note = _note_path(folder)
    if stamps and _read_note(note) == stamps:
        return
    if problems := verify_store(str(folder), allow_incomplete=allow_incomplete).problems:
        raise StoreCorruptError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" * (len(problems) > 3)))
    if stamps:
        _write_note(note, stamps)


def _note_path(folder: Folder) -> Path:
    place = xxhash.xxh3_128_hexdigest(os.path.realpath(folder.root).encode(errors="surrogateescape"))
    return cache_folder() / "verified" / f"{place}.json"


def _collect_stamps(folder: Folder, manifest: Manifest, records: Sequence[ShardRecord]) -> Stamps:
    """Name -> device, inode, bytes, times of change; nothing where files have no such times (a store behind a URL)."""
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
    """Where the cache cannot be written, the next one verifies again: no harm."""
    temporary = note.with_name(f"{TEMPORARY}{note.stem}-{os.getpid()}")
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(stamps))
        os.replace(temporary, note)
