"""Files of a store on a local disk: written durably, published without clobbering, read without following links.

Everything a store writes goes through here, so that the order "file, its folder, then whoever names it" is in one
place. Names are relative to the store's root, with forward slashes, and come from the manifest's checked patterns.
"""

import contextlib
import errno
import mmap
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.lease import Lease

if TYPE_CHECKING:
    from softlabel.store.remote import RemoteLease

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


class Folder:
    """The local folder of a store."""

    is_local = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / name

    def where(self, name: str) -> str:
        """The name as a message shows it."""
        return str(self.path(name))

    def check_root(self) -> None:
        """Raises StoreError where no store can be."""
        with reading(self):
            taken = self.root.exists() and not self.root.is_dir()
        if taken:
            raise StoreError(f"{self}: is a file; a store is a folder, choose another path")

    def lease(self) -> "Lease | RemoteLease":
        """Take the lease for writing. Raises StoreLockedError."""
        return Lease(self.root)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """The file on a local disk while the block lasts."""
        yield self.path(name)

    def make(self, subfolder: str) -> None:
        self.path(subfolder).mkdir(exist_ok=True)

    def create(self) -> None:
        for name in ("", *SUBFOLDERS[:2]):
            folder = self.root / name if name else self.root
            folder.mkdir(parents=not name, exist_ok=True)
            if name and folder.is_symlink():
                raise StoreError(f"{folder}: is a link; the folders of a store must lie inside it")
        sync(self.root)

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file. FileNotFoundError when absent, StoreCorruptError when it is a link, odd or too large."""
        path = self.path(name)
        with reading(path):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
            with open(handle, "rb") as file:
                size = self._regular(path, os.fstat(handle))
                if size > limit:
                    raise StoreCorruptError(
                        f"{path}: expected at most {limit} bytes, found {size}; not a softlabel store"
                    )
                return file.read(limit + 1)

    def size(self, name: str) -> int:
        """Bytes of a regular file. FileNotFoundError when absent, StoreCorruptError for a link or device."""
        with reading(self.path(name)):
            return self._regular(self.path(name), os.lstat(self.path(name)))

    def _regular(self, path: Path, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode) or path.is_symlink() or self._linked(path):
            raise StoreCorruptError(f"{path}: expected a plain file inside the store, found a link, folder or device")
        return status.st_size

    def _linked(self, path: Path) -> bool:
        return path.parent != self.root and path.parent.is_symlink()

    def sizes(self, subfolder: str) -> dict[str, int]:
        """Name -> bytes of everything in a subfolder, in one sweep; -1 for what is not a plain file."""
        folder = self.path(subfolder)
        if folder.is_symlink():
            raise StoreCorruptError(f"{folder}: is a link; the folders of a store must lie inside it")
        try:
            with reading(folder), os.scandir(folder) as entries:
                return {
                    f"{subfolder}/{entry.name}": entry.stat(follow_symlinks=False).st_size
                    if entry.is_file(follow_symlinks=False)
                    else -1
                    for entry in entries
                }
        except FileNotFoundError:
            return {}

    def temporary(self, subfolder: str) -> Path:
        """A fresh name beside the files it will join; `publish` or `replace` it, or the committer collects it."""
        return self.path(subfolder) / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}"

    def publish(self, temporary: Path, name: str, xxh3: str) -> None:
        """Make a synced temporary file durable under `name`, which contains its hash, without clobbering.

        A file that is there already with these bytes stays; one with other bytes is damaged (its name says what it
        should be) and gives way.
        """
        final = self.path(name)
        try:
            os.link(temporary, final)
        except FileExistsError:
            if not final.is_symlink() and final.is_file() and file_xxh3(final) == xxh3:
                sync(final)
            else:
                os.replace(temporary, final)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.replace(temporary, final)  # no hard links here; equal names mean equal bytes
        temporary.unlink(missing_ok=True)
        sync(final.parent)

    def publish_bytes(self, name: str, data: bytes, xxh3: str) -> None:
        temporary = self._write(name, data)
        self.publish(temporary, name, xxh3)

    def replace(self, name: str, data: bytes) -> None:
        """Atomically put `data` where `name` was: readers see the old file or the new one."""
        temporary = self._write(name, data)
        os.replace(temporary, self.path(name))
        sync(self.path(name).parent)

    def _write(self, name: str, data: bytes) -> Path:
        temporary = self.temporary(os.path.dirname(name))
        try:
            with open(temporary, "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)


def open_folder(root: str | os.PathLike[str]) -> Folder:
    """The folder at a path, or behind a URL such as s3://bucket/labels."""
    text = os.path.expanduser(root)
    if "://" not in text:
        return Folder(text)
    if text.startswith("file://"):
        return Folder(text.removeprefix("file://"))
    from softlabel.store.remote import RemoteFolder

    return RemoteFolder(text)
