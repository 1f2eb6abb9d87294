"""One finished store takes the place of another, in one step: the old root or the new one, never a mixture."""

import os
import shutil
from pathlib import Path

from softlabel.errors import StoreError, StoreIncompleteError
from softlabel.store.manifest import EXTRA_FILE, ROOT_LIMIT, ROOT_NAME, SEGMENT_FILE, SHARD_FILE
from softlabel.store.manifest_read import load_manifest
from softlabel.store.storage.base import sync, writing
from softlabel.store.storage.local import LocalFolder


def replace_store(root: str | os.PathLike[str], by: str | os.PathLike[str]) -> None:
    """Make the store at `root` what the finished store at `by` is, on the same file system; `by` is gone then.

    Its files are linked under their content-hashed names beside those that `root` has, then the root manifest is
    replaced, then what the new one does not list is removed. A kill in between leaves the old store or the new one, and
    the same call finishes.
    """
    old, new = LocalFolder(root), LocalFolder(by)
    manifest, records = load_manifest(new)
    if not manifest.complete:
        raise StoreIncompleteError(f"{new}: is not complete and cannot take the place of {old}")
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
                    # A call that was killed may have moved it; names are hashes of their content.
                    if not final.is_file():
                        raise StoreError(f"{new.path(name)}: is missing") from error
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
