"""Where the files of a store lie: what a local folder and an object store both promise.

Everything a store writes goes through here, so that the order "file, its folder, then what names it" is in one
place. Names are relative to the store's root, with forward slashes, and come from the manifest's checked patterns.
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
    """Turn what the operating system (or a library on top) says about a failed write into one clear StoreError."""
    try:
        yield
    except OSError as error:
        code = error.errno
        if code is None:  # pyarrow and h5py put the number into the text only
            code = next((number for number in _FULL if f"rrno {number}" in str(error)), None)
            code = code or (errno.ENOSPC if "No space left" in str(error) else None)
        reason = _FULL.get(code or 0) or error.strerror or str(error)
        if code in _FULL:
            cure = "what was finished is kept: make room and run the same command again"
        elif isinstance(error, FileNotFoundError):
            cure = "make the folder or bucket first, or choose another"
        elif isinstance(error, PermissionError) or code == errno.EROFS:
            cure = "what was finished is kept: get the right to write there, or choose another folder"
        else:
            cure = "what was finished is kept: run the same command again once it can"
        raise StoreError(f"{where}: cannot write: {reason}; {cure}") from error


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Tell what cannot be reached (a StoreError) from what is damaged or not there, which passes."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno in (None, errno.EIO):  # of a library that read a broken file, or of a broken disk
            raise
        raise StoreError(f"{where}: cannot be read: {error.strerror}; nothing says that it is damaged") from error


def file_xxh3(path: Path) -> str:
    """xxh3-128 of a file's bytes as 32 hexadecimal digits."""
    with open(path, "rb", buffering=0) as file:
        if not (size := os.fstat(file.fileno()).st_size):
            return xxhash.xxh3_128_hexdigest(b"")
        digest = xxhash.xxh3_128()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for start in range(0, size, _BLOCK):
                with view[start : start + _BLOCK] as block:
                    digest.update(block)
                if hasattr(mmap, "MADV_DONTNEED"):  # so that a large file does not count as our memory
                    mapped.madvise(mmap.MADV_DONTNEED, start, min(_BLOCK, size - start))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders of some network file systems
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
        root: the folder; of a remote store a name only.
        is_local: its files can be opened and mapped in place.
    """

    root: Path
    is_local: bool

    @abstractmethod
    def where(self, name: str) -> str:
        """The name as a message shows it."""

    @abstractmethod
    def check_root(self) -> None:
        """Raises StoreError where no store can be."""

    @abstractmethod
    def lease(self) -> Lease:
        """Take the lease for writing. Raises StoreLockedError."""

    @abstractmethod
    def create(self) -> None:
        """Make the folders of a new store."""

    @abstractmethod
    def make(self, subfolder: str) -> None:
        """Make a subfolder that not every store has."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """A whole small file. FileNotFoundError when absent, StoreCorruptError when it is a link, odd or too large."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a plain file. FileNotFoundError when absent, StoreCorruptError for a link or device."""

    @abstractmethod
    def sizes(self, subfolder: str) -> dict[str, int]:
        """Name -> bytes of everything in a subfolder, in one sweep; -1 for what is not a plain file."""

    @abstractmethod
    def local(self, name: str) -> AbstractContextManager[Path]:
        """The file on a local disk while the block lasts; what was opened meanwhile stays readable."""

    @abstractmethod
    def temporary(self, subfolder: str) -> Path:
        """A fresh name on a local disk; `publish` it, or the committer collects it."""

    @abstractmethod
    def publish(self, temporary: Path, name: str, xxh3: str) -> None:
        """Make a synced temporary file durable under `name`, which contains its hash, without clobbering.

        A file that is there already with these bytes stays; one with other bytes is damaged (its name says what it
        should be) and is replaced.
        """

    @abstractmethod
    def publish_bytes(self, name: str, data: bytes, xxh3: str) -> None:
        """The same for bytes in memory."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Atomically put `data` where `name` was: readers see the old file or the new one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
