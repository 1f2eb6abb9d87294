"""Storage on a local disk: durable writes, atomic publication, links are not followed."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.storage.base import SUBFOLDERS, TEMPORARY, Folder, file_xxh3, reading, sync
from softlabel.store.storage.lease import FileLease


class LocalFolder(Folder):
    """The local folder of a store."""

    is_local = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / name

    def where(self, name: str) -> str:
        return str(self.path(name))

    def check_root(self) -> None:
        with reading(self):
            taken = self.root.exists() and not self.root.is_dir()
        if taken:
            raise StoreError(f"{self}: expected a folder, found a file; choose another path")

    def lease(self) -> FileLease:
        return FileLease(self.root)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self.path(name)

    def make(self, subfolder: str) -> None:
        self.path(subfolder).mkdir(exist_ok=True)

    def create(self) -> None:
        for name in ("", *SUBFOLDERS[:2]):
            folder = self.root / name if name else self.root
            folder.mkdir(parents=not name, exist_ok=True)
            if name and folder.is_symlink():
                raise StoreError(f"{folder}: expected a folder inside the store, found a link")
        sync(self.root)

    def read(self, name: str, limit: int) -> bytes:
        path = self.path(name)
        with reading(path):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
            with open(handle, "rb") as file:
                size = self._check_regular(path, os.fstat(handle))
                if size > limit:
                    raise StoreCorruptError(
                        f"{path}: expected at most {limit} bytes, found {size}; not a softlabel store"
                    )
                return file.read(limit + 1)

    def size(self, name: str) -> int:
        with reading(self.path(name)):
            return self._check_regular(self.path(name), os.lstat(self.path(name)))

    def _check_regular(self, path: Path, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode) or path.is_symlink() or self._is_linked(path):
            raise StoreCorruptError(f"{path}: expected a plain file inside the store, found a link, folder or device")
        return status.st_size

    def _is_linked(self, path: Path) -> bool:
        return path.parent != self.root and path.parent.is_symlink()

    def sizes(self, subfolder: str) -> dict[str, int]:
        folder = self.path(subfolder)
        if folder.is_symlink():
            raise StoreCorruptError(f"{folder}: expected a folder inside the store, found a link")
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
        return self.path(subfolder) / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}"

    def publish(self, temporary: Path, name: str, xxh3: str) -> None:
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
            os.replace(temporary, final)  # a file system without hard links; equal names mean equal bytes
        temporary.unlink(missing_ok=True)
        sync(final.parent)

    def publish_bytes(self, name: str, data: bytes, xxh3: str) -> None:
        temporary = self._write_temporary(name, data)
        self.publish(temporary, name, xxh3)

    def replace(self, name: str, data: bytes) -> None:
        temporary = self._write_temporary(name, data)
        os.replace(temporary, self.path(name))
        sync(self.path(name).parent)

    def _write_temporary(self, name: str, data: bytes) -> Path:
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
