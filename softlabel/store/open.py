"""Open a store: check its manifest, and its bytes as far as the caller requests."""

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
    path: str | os.PathLike[str], *, verify: Verify = "once", allow_incomplete: bool = False, memory: int = MEMORY
) -> Store:
    """Open a finished store.

    Args:
        path: its folder or URL.
        verify: ``full`` hashes and checks every byte, ``once`` does so only if a file changed since this machine last
            did, ``sizes`` checks that every file exists with its size, ``none`` checks nothing.
        allow_incomplete: also open an unfinished store, for inspection.
        memory: bytes that `take` may hold. A larger Parquet store is decoded once into a cache on the local disk
            ($SOFTLABEL_CACHE) and mapped; HDF5 is mapped in place.

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
            f"{folder}: incomplete, {manifest.totals.shards} of {manifest.run.shard_count} shards are finished; "
            f"run the same 'softlabel {made[0] if (made := origins_of(manifest)) else 'generate'}' again to finish it"
        )
    if verify != "none":
        check_sizes(folder, records, manifest.extra)
    if verify in ("once", "full"):
        ensure_whole(folder, manifest, records, once=verify == "once", allow_incomplete=allow_incomplete)
    return Store(folder, manifest, records, memory=memory, check_cache=verify != "none")
