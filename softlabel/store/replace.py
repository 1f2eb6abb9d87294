"""Replace a store by another one atomically."""

import os
import shutil
from pathlib import Path

from softlabel.errors import StoreError, StoreIncompleteError
from softlabel.store.file_refs import EXTRA_FILE, SEGMENT_FILE
from softlabel.store.manifest import ROOT_LIMIT, ROOT_NAME, SHARD_FILE
from softlabel.store.manifest_read import load_manifest
from softlabel.store.storage.base import sync, writing
from softlabel.store.storage.local import LocalFolder


def replace_store(root: str | os.PathLike[str], by: str | os.PathLike[str]) -> None:
    """Replace the store at `root` by the finished store at `by`, on the same file system; `by` is removed.

    The files of `by` are linked beside those of `root`, then the root manifest is replaced, then unlisted files are
    removed. A kill at any point leaves the old or the new store, and the same call finishes.

    Raises:
        StoreIncompleteError: `by` is not finished.
        StoreError: a file is missing, or the disk cannot be written.
        StoreLockedError: another process writes to `root`.
    """
    old, new = LocalFolder(root), LocalFolder(by)
    manifest, records = load_manifest(new)
    if not manifest.complete:
        raise StoreIncompleteError(f"{new}: incomplete, cannot replace {old}")
    names = [record.file for record in records]
    names += [ref.file for ref in manifest.segments] + [ref.file for ref in manifest.extra]
    with writing(old):
        old.create()
        lease = old.lease()
        try:
            for name in names:
                final = old.path(name)
                final.parent.mkdir(exist_ok=True)
                try:
                    os.link(new.path(name), final)
                except FileExistsError:
                    os.replace(new.path(name), final)
                except FileNotFoundError as error:
                    # A killed call may have moved it; names contain the hash of the content.
                    if not final.is_file():
                        raise StoreError(f"{new.path(name)}: missing") from error
            for folder in ("shards", "segments", "extra"):
                if old.path(folder).is_dir():
                    sync(old.path(folder))
            old.replace(ROOT_NAME, new.read(ROOT_NAME, ROOT_LIMIT))
            listed = set(names)
            for folder, pattern in (("shards", SHARD_FILE), ("segments", SEGMENT_FILE), ("extra", EXTRA_FILE)):
                for name in old.sizes(folder):
                    if pattern.fullmatch(name) and name not in listed:
                        old.remove(name)
            shutil.rmtree(Path(by))
        finally:
            lease.release()
