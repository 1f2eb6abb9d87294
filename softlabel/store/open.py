"""Opening a store: the manifest is checked before anything is read, and as many of the bytes as the caller asks for."""

import os
from typing import Literal, get_args

from softlabel.errors import StoreIncompleteError, UsageError
from softlabel.store.manifest_read import check_sizes, load_manifest
from softlabel.store.origins import origins_of
from softlabel.store.reader import MEMORY, Store
from softlabel.store.storage.open import open_folder
from softlabel.store.verified import ensure_whole

Verify = Literal["none", "sizes", "once", "full"]


def open_store(
    path: str | os.PathLike[str],
    *,
    verify: Verify = "once",
    allow_incomplete: bool = False,
    memory: int = MEMORY,
) -> Store:
    """Open a finished store.

    Args:
        path: its folder.
        verify: ``full`` hashes and checks every byte, ``once`` does so unless this machine has since a file last
            changed, ``sizes`` checks that every file is there with its length, ``none`` nothing.
        allow_incomplete: also open what a run has written so far, for inspection.
        memory: bytes that `take` may hold. A Parquet store that is larger decoded is decoded once into a cache on the
            local disk ($SOFTLABEL_CACHE) and mapped; HDF5 is mapped in place.

    Raises:
        StoreNotFoundError: nothing is there.
        StoreIncompleteError: its run is not finished.
        StoreCorruptError: a file is damaged or missing.
        StoreError: it is of another format version, or cannot be read.
    """
    if verify not in get_args(Verify):
        raise UsageError(f"verify: expected 'none', 'sizes', 'once' or 'full', found {verify!r}")
    folder = open_folder(path)
    manifest, records = load_manifest(folder)
    if not manifest.complete and not allow_incomplete:
        raise StoreIncompleteError(
            f"{folder}: its run has finished {manifest.totals.shards} of {manifest.run.shard_count} shards; "
            f"run the same 'softlabel {made[0] if (made := origins_of(manifest)) else 'generate'}' again to finish it"
        )
    if verify != "none":
        check_sizes(folder, manifest, records)
    if verify in ("once", "full"):
        ensure_whole(folder, manifest, records, once=verify == "once", allow_incomplete=allow_incomplete)
    return Store(folder, manifest, records, memory=memory, check_cache=verify != "none")
