"""The interface of a store's storage, local or remote.

Names are relative to the store's root, with forward slashes, and match the manifest's patterns. Files are made durable
before their folder, and both before the file that lists them.
"""

import contextlib
import errno
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import xxhash

from softlabel.errors import StoreError

TEMPORARY = ".tmp-"
SUBFOLDERS = ("shards", "segments", "extra")
_BLOCK = 32 << 20
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}


@contextlib.contextmanager
def writing(where: object) -> Iterator[None]:
    """Turn an OSError of a failed write into a StoreError with a remedy."""
    try:
        yield
    except OSError as error:
        code = error.errno
        if code is None:  # pyarrow and h5py have the number only in the text
            code = next((number for number in _FULL if f"rrno {number}" in str(error)), None)
            code = code or (errno.ENOSPC if "No space left" in str(error) else None)
        reason = _FULL.get(code or 0) or error.strerror or str(error)
        if code in _FULL:
            remedy = "finished shards are kept: free some space and rerun the command"
        elif isinstance(error, FileNotFoundError):
            remedy = "create the folder or bucket first, or choose another"
        elif isinstance(error, PermissionError) or code == errno.EROFS:
            remedy = "finished shards are kept: get write permission, or choose another folder"
        else:
            remedy = "finished shards are kept: fix this and rerun the command"
        raise StoreError(f"{where}: cannot write: {reason}; {remedy}") from error


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn an OSError of an unreachable file into a StoreError; errors of absent or damaged files pass."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno in (None, errno.EIO):  # from a library that reads a damaged file, or from a damaged disk
            raise
        raise StoreError(f"{where}: cannot be read: {error.strerror}; it need not be damaged") from error


def file_xxh3(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes as 32 hexadecimal digits."""
    with open(path, "rb", buffering=0) as file:
        if not (size := os.fstat(file.fileno()).st_size):
            return xxhash.xxh3_128_hexdigest(b"")
        digest = xxhash.xxh3_128()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for start in range(0, size, _BLOCK):
                with view[start : start + _BLOCK] as block:
                    digest.update(block)
                if hasattr(mmap, "MADV_DONTNEED"):  # bounds resident memory
                    mapped.madvise(mmap.MADV_DONTNEED, start, min(_BLOCK, size - start))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Sync a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # raised for folders of some network file systems
            raise
    finally:
        os.close(handle)


class Lease(Protocol):
    """The right to write to a store, held by one process at a time."""

    def release(self) -> None:
        """Idempotent."""


class Folder(ABC):
    """A store's files, local or remote.

    Attributes:
        root: the folder; for a remote store only a name.
        is_local: whether files can be opened and mapped in place.
    """

    root: Path
    is_local: bool

    @abstractmethod
    def where(self, name: str) -> str:
        """Return a name as shown in messages."""

    @abstractmethod
    def check_root(self) -> None:
        """Check that a store can be here.

        Raises:
            StoreError: it cannot.
        """

    @abstractmethod
    def lease(self) -> Lease:
        """Take the lease for writing.

        Raises:
            StoreLockedError: another process has it.
        """

    @abstractmethod
    def create(self) -> None:
        """Create the folders of a new store."""

    @abstractmethod
    def make(self, subfolder: str) -> None:
        """Create an optional subfolder."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Read a small file.

        Raises:
            FileNotFoundError: it does not exist.
            StoreCorruptError: it is not a plain file, or larger than `limit` bytes.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a plain file; raises as `read`."""

    @abstractmethod
    def sizes(self, subfolder: str) -> dict[str, int]:
        """Return name -> bytes of everything in a subfolder, -1 for what is not a plain file."""

    @abstractmethod
    def local(self, name: str) -> AbstractContextManager[Path]:
        """Provide the file on a local disk during the block; files opened in it stay readable."""

    @abstractmethod
    def temporary(self, subfolder: str) -> Path:
        """Return a new name on a local disk; the committer removes files that are not published."""

    @abstractmethod
    def publish(self, temporary: Path, name: str, xxh3: str) -> None:
        """Make a synced temporary file durable under `name`, which contains its hash.

        An existing file with the same bytes stays; one with other bytes is damaged and is replaced.
        """

    @abstractmethod
    def publish_bytes(self, name: str, data: bytes, xxh3: str) -> None:
        """Like `publish`, for bytes in memory."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Replace a file atomically: readers see the old or the new one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
