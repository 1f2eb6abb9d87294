"""Ranges of the files of a source, in a local folder; `storage_fsspec` reads from URLs.

Legend: B ranges, each a file number, an offset and a size in bytes.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from softlabel.common.file_type import describe_beginning
from softlabel.errors import DataError

# Far below the usual limit of 1024 per process.
_OPEN_FILES = 128

Int64s = NDArray[np.int64]
T = TypeVar("T")


class Files(ABC):
    """Files of one root, named relative to it with forward slashes.

    Attributes:
        root: a folder, or a URL.
        names: of the files, in the order of their samples.
        is_local: whether they are on this machine.
    """

    is_local: bool

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root, self.names = root, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, number: int) -> str:
        """Return a file's name for messages."""
        return f"{self.root.rstrip('/')}/{self.names[number]}" if self.root else self.names[number]

    @abstractmethod
    def size(self, number: int) -> int:
        """Return the bytes of a file.

        Raises:
            DataError: it does not exist.
        """

    @abstractmethod
    def open(self, number: int) -> BinaryIO:
        """Open a file, seekable.

        Raises:
            DataError: it cannot be opened.
        """

    def describe(self, number: int) -> str | None:
        """Return the type of a file that cannot be parsed, by its first bytes; None if unknown."""
        try:
            with self.open(number) as file:
                start = file.read(512)
        except (OSError, DataError):
            return None
        return "a zip archive; unpack it first" if start.startswith(b"PK\x03\x04") else describe_beginning(start)

    @abstractmethod
    def read(self, numbers_B: Int64s, offsets_B: Int64s, sizes_B: Int64s) -> list[bytes]:
        """Read ranges, in their order.

        Raises:
            DataError: a file is shorter or cannot be read.
        """


class LocalFiles(Files):
    """Files in a local folder, read with pread."""

    is_local = True

    def __init__(self, root: str, names: Sequence[str]) -> None:
        super().__init__(root, names)
        self._open: PerProcess[_Handles] = PerProcess(_Handles)

    def path(self, number: int) -> str:
        return os.path.join(self.root, self.names[number])

    def size(self, number: int) -> int:
        try:
            return os.stat(self.path(number)).st_size
        except OSError as error:
            raise DataError(f"{self.where(number)}: cannot be read: {error.strerror}") from error

    def open(self, number: int) -> BinaryIO:
        try:
            return open(self.path(number), "rb")
        except OSError as error:
            raise DataError(f"{self.where(number)}: cannot be read: {error.strerror}") from error

    def read(self, numbers_B: Int64s, offsets_B: Int64s, sizes_B: Int64s) -> list[bytes]:
        found = []
        handles = self._open.get()
        for number, offset, size in zip(numbers_B.tolist(), offsets_B.tolist(), sizes_B.tolist(), strict=True):
            try:
                data = handles.pread(self.path(number), size, offset)
            except OSError as error:
                raise DataError(f"{self.where(number)}: cannot be read: {error.strerror}") from error
            found.append(complete(data, size, offset, self.where(number)))
        return found


def complete(data: bytes, size: int, offset: int, where: str) -> bytes:
    """Return `data` after checking its length.

    Raises:
        DataError: it is shorter than requested.
    """
    if len(data) != size:
        raise DataError(
            f"{where}: expected {size} bytes at offset {offset}, found {len(data)}; the file is truncated, or was "
            "replaced while in use: fetch it again and rerun the command"
        )
    return data


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into its folder's URL and a name; a chain (``zip://a/x.tar::s3://b/y.zip``) at its first path."""
    before, path, after = _split_chain(url)
    folder, _, name = path.rpartition("/")
    return before + (f"{folder}/" if folder.endswith(":/") else folder) + after, name


def join_url(folder: str, name: str) -> str:
    """Join what `split_url` splits."""
    before, path, after = _split_chain(folder)
    return f"{before}{path if path.endswith('://') else path.rstrip('/') + '/'}{name}{after}"


def _split_chain(url: str) -> tuple[str, str, str]:
    """Split a chain of fsspec into what precedes its first path (``simplecache::``), that path, and the rest."""
    parts = url.split("::")
    place = next((number for number, part in enumerate(parts) if "://" in part), 0)
    before, after = parts[:place], parts[place + 1 :]
    return "".join(f"{part}::" for part in before), parts[place], "".join(f"::{part}" for part in after)


class PerProcess(Generic[T]):
    """A resource that each process creates for itself, also after a fork or unpickling."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._of: tuple[int, T] | None = None

    def get(self) -> T:
        if self._of is None or self._of[0] != os.getpid():
            self._of = (os.getpid(), self._make())
        return self._of[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_of": None}


class _Handles:
    """Open descriptors by path, least recently used first out. The lock protects descriptors in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()

    def pread(self, path: str, size: int, offset: int) -> bytes:
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if len(self._open) > _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            else:
                self._open.move_to_end(path)
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size:  # one call returns at most 2 GiB
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
