"""Open the folder of a store, local or behind a URL, and take its lease."""

import errno
import os

from softlabel.store.storage.base import Folder, Lease
from softlabel.store.storage.fsspec import RemoteFolder
from softlabel.store.storage.lease import NoLease
from softlabel.store.storage.local import LocalFolder


def open_folder(root: str | os.PathLike[str]) -> Folder:
    """Return the folder at a path, or behind a URL such as s3://bucket/labels.

    Raises:
        StoreError: the URL cannot be opened.
    """
    text = os.path.expanduser(root)
    if "://" not in text:
        return LocalFolder(text)
    if text.startswith("file://"):
        return LocalFolder(text.removeprefix("file://"))
    return RemoteFolder(text)


def take_lease(folder: Folder) -> Lease:
    """Take the lease of a store's folder; `NoLease` if the disk is read-only.

    Raises:
        StoreLockedError: another committer has it.
    """
    try:
        return folder.lease()
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
            raise
        return NoLease(error)
