"""Files behind a URL, through fsspec: `s3://bucket/train`, `gs://...`, `https://...`, `memory://...`.

Legend: B ranges, each a file number, an offset and a size in bytes.

Close ranges become one request. Sequential reads read ahead, up to `AHEAD` bytes. A process holds at most `_WINDOWS`
pieces.
"""

import io
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np

from softlabel.dataset.storage import Files, Int64s, PerProcess, complete, join_url
from softlabel.errors import DataError, SpecError, one_line

# Reading a gap of this size costs less than another request.
GAP = 64 << 10
AHEAD = 8 << 20
_SCAN_AHEAD = 1 << 20
_WINDOWS = 4


class RemoteFiles(Files):
    """Files below one URL, with their sizes from the listing."""

    is_local = False

    def __init__(self, root: str, names: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__(root, names)
        self._sizes = tuple(sizes)
        self._connection: PerProcess[_Connection] = PerProcess(partial(_Connection, root))

    def where(self, number: int) -> str:
        return join_url(self.root, self.names[number])

    def size(self, number: int) -> int:
        return self._sizes[number]

    def open(self, number: int) -> BinaryIO:
        return cast(BinaryIO, RangeFile(self, number))

    def fetch(self, number: int, start: int, stop: int) -> bytes:
        """Read bytes `start` to `stop` of a file in one request.

        Raises:
            DataError: the request fails or returns another number of bytes.
        """
        where = self.where(number)
        try:
            data: bytes = self._connection.get().fs.cat_file(self._object_path(number), start=start, end=stop)
        except Exception as error:
            raise DataError(
                f"{where}: cannot be read: {one_line(error, with_type=True)}; rerun the command to continue"
            ) from error
        if len(data) > stop - start:
            raise DataError(
                f"{where}: expected {stop - start} bytes, found {len(data)}: the server does not serve ranges; "
                "download it first"
            )
        return complete(data, stop - start, start, where)

    def _object_path(self, number: int) -> str:
        base = self._connection.get().base
        return f"{base}/{self.names[number]}" if base else self.names[number]

    def read(self, numbers_B: Int64s, offsets_B: Int64s, sizes_B: Int64s) -> list[bytes]:
        found: list[bytes] = [b""] * len(numbers_B)
        order = np.lexsort((offsets_B, numbers_B))
        for places in _group_neighbours(order, numbers_B, offsets_B, offsets_B + sizes_B):
            number, start = int(numbers_B[places[0]]), int(offsets_B[places[0]])
            stop = int((offsets_B + sizes_B)[places].max())
            data = self._connection.get().window.read(self, number, start, stop, ahead=AHEAD, near=GAP)
            for place in places.tolist():
                at = int(offsets_B[place]) - start
                found[place] = data[at : at + int(sizes_B[place])]
        return found


def _group_neighbours(order: Int64s, numbers_B: Int64s, starts_B: Int64s, stops_B: Int64s) -> list[Int64s]:
    """Group ranges that are close enough for one request."""
    if not len(order):
        return []
    before, after = order[:-1], order[1:]
    apart = (numbers_B[before] != numbers_B[after]) | (starts_B[after] - stops_B[before] > GAP)
    return np.split(order, np.flatnonzero(apart) + 1)


class _Connection:
    """A file system and the pieces that were read from it last."""

    def __init__(self, url: str) -> None:
        self.fs, base = connect(url)
        self.base = base.rstrip("/")
        self.window = _Window()


class _Window:
    """The last pieces that were read, by file, at most `_WINDOWS`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: dict[int, tuple[int, bytes]] = {}

    def read(self, files: RemoteFiles, number: int, start: int, stop: int, *, ahead: int, near: int) -> bytes:
        """Read bytes `start` to `stop`; a range at most `near` bytes after the last piece reads ahead."""
        with self._lock:
            first, piece = self._pieces.get(number, (0, b""))
            last = first + len(piece)
            if piece and first <= start and stop <= last:
                return piece[start - first : stop - first]
            goes_on = bool(piece) and first <= start <= last + near
            # Read-ahead grows step by step: two adjacent ranges may be coincidence.
            until = min(start + min(ahead, max(4 * len(piece), GAP)), files.size(number)) if goes_on else stop
            known = piece[start - first :] if piece and first <= start <= last else b""
            piece = known + files.fetch(number, start + len(known), max(until, stop))
            self._pieces.pop(number, None)
            self._pieces[number] = (start, piece)
            while len(self._pieces) > _WINDOWS:
                self._pieces.pop(next(iter(self._pieces)))
            return piece[: stop - start]


class RangeFile(io.RawIOBase):
    """A remote file as a seekable file object, for pyarrow and tarfile."""

    def __init__(self, files: RemoteFiles, number: int) -> None:
        self._files, self._number, self._at = files, number, 0
        self._window = _Window()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._files.size(self._number))[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._files.size(self._number)
        stop = end if size is None or size < 0 else min(self._at + size, end)
        if stop <= self._at:
            return b""
        # A scan of headers skips the data between them: a piece then holds several headers.
        data = self._window.read(self._files, self._number, self._at, stop, ahead=_SCAN_AHEAD, near=_SCAN_AHEAD)
        self._at = stop
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        SpecError: the protocol is unknown, or its package is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}.get(protocol)
        remedy = f"pip install 'softlabel[{extra}]'" if extra else "install that package"
        raise SpecError(f"{url}: {protocol}:// needs a package that is not installed: {error}; {remedy}") from error
    except Exception as error:
        raise SpecError(f"{url}: cannot be opened: {one_line(error, with_type=True)}; write PROTOCOL://PATH") from error
    return fs, str(path)


def look(url: str) -> tuple[bool, int]:
    """Return whether a URL is a file, and its size.

    Raises:
        SpecError: it does not exist or cannot be read.
    """
    fs, path = connect(url)
    try:
        fs.invalidate_cache()
        info = fs.info(path)
    except Exception as error:
        raise _make_error(url, error) from error
    if info["type"] != "file":
        return False, 0
    if not isinstance(info.get("size"), int):
        raise SpecError(f"{url}: the server reports no file size, so ranges cannot be read; download it")
    return True, int(info["size"])


def found_below(url: str) -> dict[str, int]:
    """Return relative path -> size of all files below a URL, except hidden ones.

    Raises:
        SpecError: it cannot be listed, or its protocol has no reliable listing.
    """
    fs, path = connect(url)
    if url.startswith(("http://", "https://")):
        raise SpecError(
            f"{url}: expected a file, found a page: a web server has no complete, ordered list of files; name them, "
            "for example 'https://HOST/data-{000..127}.tar'"
        )
    base = path.rstrip("/")
    try:
        fs.invalidate_cache()
        listed = fs.find(base, detail=True)
    except Exception as error:
        raise _make_error(url, error) from error
    names = {full.removeprefix(base).lstrip("/"): info for full, info in listed.items() if info["type"] == "file"}
    return {
        name: int(info["size"])
        for name, info in sorted(names.items())
        if name and not any(part.startswith(".") for part in name.split("/"))
    }


def _make_error(url: str, error: Exception) -> SpecError:
    cause = error.__cause__
    if isinstance(cause, OSError) and "Connect" in type(cause).__name__:  # fsspec reports it as "not found"
        error = cause
    if isinstance(error, FileNotFoundError):
        return SpecError(f"{url}: expected a file or folder, found nothing; check the URL")
    if isinstance(error, PermissionError) or "credential" in f"{type(error).__name__} {error}".lower():
        return SpecError(
            f"{url}: access denied: {one_line(error, with_type=True)}; give the credentials that the protocol's "
            "package expects (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
        )
    return SpecError(f"{url}: cannot be reached: {one_line(error, with_type=True)}; check the URL and the connection")
