"""A file of tokenised documents in the cache folder: written once, mapped by every process.

    ids       T values, uint16 or int32
    mask      T bytes, absent where all are 1
    lengths   N values, int32: how many ids each document has
    footer    JSON: dtype, sizes, XXH3-128 of all before it, what was tokenised, what was left out
    16 bytes  length of the footer as uint64, and the magic

Legend: N documents, T tokens of all of them.
"""

import contextlib
import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from softlabel.common.cache_folder import VARIABLE, cache_folder
from softlabel.errors import DataError

_MAGIC = b"softlab1"
_BLOCK = 1 << 24  # bytes hashed at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What of the documents was left out.

    Attributes:
        truncated: documents that were longer than they may be.
        dropped: their tokens that were left out.
        bad: number of a document -> why it has no tokens.
    """

    truncated: int = 0
    dropped: int = 0
    bad: Mapping[int, str]


class TokenFile:
    """Documents in a file that was checked when it was opened. It can be pickled; a copy maps the file again."""

    def __init__(self, path: Path, footer: Mapping[str, Any]) -> None:
        self.path, self._footer = path, footer
        self._open()

    def _open(self) -> None:
        footer, total, documents = self._footer, self._footer["tokens"], self._footer["documents"]
        dtype, at = np.dtype(footer["dtype"]), 0
        try:
            mapped = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.empty(0, np.uint8)
        except OSError as error:
            raise DataError(f"{self.path}: tokenised documents cannot be read ({error.strerror}); run again") from error
        if len(mapped) != footer["bytes"]:
            raise DataError(f"{self.path}: tokenised documents were replaced while they were read; run again")
        self.ids: NDArray[Any] = mapped[: total * dtype.itemsize].view(dtype)
        at = total * dtype.itemsize
        self.mask: NDArray[np.uint8] | None = mapped[at : at + total] if footer["masked"] else None
        at += total if footer["masked"] else 0
        # A copy, which is aligned.
        self.lengths: NDArray[np.int32] = np.frombuffer(mapped[at : at + 4 * documents].tobytes(), "<i4")
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_footer": self._footer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def checksum(self) -> str:
        """XXH3-128 of ids, mask and lengths."""
        return str(self._footer["xxh3"])

    @property
    def left(self) -> Left:
        found = self._footer["left"]
        bad = {int(number): reason for number, reason in found["bad"].items()}
        return Left(truncated=found["truncated"], dropped=found["dropped"], bad=bad)

    def document(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """The ids and the mask of a document, as copies."""
        start, stop = self.starts[number], self.starts[number + 1]
        ids_L = self.ids[start:stop].astype(np.int32)
        return ids_L, np.ones(len(ids_L), np.uint8) if self.mask is None else np.array(self.mask[start:stop])

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any]) -> Self | None:
        """The file, if it is there, whole, and made of the same data in the same way."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 16))
                tail = file.read(16)
                length = int.from_bytes(tail[:8], "little")
                if tail[8:] != _MAGIC or length > size - 16:
                    return None
                file.seek(size - 16 - length)
                footer = json.loads(file.read(length))
                if footer["identity"] != json.loads(json.dumps(identity)) or footer["bytes"] != size:
                    return None
                digest, left = xxhash.xxh3_128(), size - 16 - length
                file.seek(0)
                while left and (block := file.read(min(_BLOCK, left))):
                    digest.update(block)
                    left -= len(block)
            return cls(path, footer) if digest.hexdigest() == footer["xxh3"] else None
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return None


class TokenWriter:
    """Writes the documents of a file one after the other; the file appears whole, or not at all.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._parts = [path.with_name(f"{path.name}.{os.getpid()}.{word}.tmp") for word in ("ids", "mask")]
        self._lengths = array("i")
        self._all_count = True

    def __enter__(self) -> Self:
        self._files = [part.open("w+b") for part in self._parts]
        return self

    def add(self, ids_L: NDArray[Any], mask_L: NDArray[np.uint8]) -> None:
        """Append a document; one without tokens is bad."""
        self._files[0].write(ids_L.astype(self._dtype).data)
        self._files[1].write(mask_L.astype(np.uint8).data)
        self._all_count &= bool(mask_L.all())
        self._lengths.append(len(ids_L))

    def finish(self, identity: Mapping[str, Any], left: Left) -> None:
        """Publish the file."""
        whole, mask = self._files
        if not self._all_count:
            mask.seek(0)
            while block := mask.read(_BLOCK):
                whole.write(block)
        whole.write(np.frombuffer(self._lengths, np.intc).astype("<i4").data)
        digest, size = xxhash.xxh3_128(), whole.tell()
        whole.seek(0)
        while block := whole.read(_BLOCK):
            digest.update(block)
        footer = {
            "identity": identity,
            "documents": len(self._lengths),
            "tokens": sum(self._lengths),
            "dtype": self._dtype.str,
            "masked": not self._all_count,
            "xxh3": digest.hexdigest(),
            "left": {"truncated": left.truncated, "dropped": left.dropped, "bad": dict(left.bad)},
        }
        # The size that the file has with its own size in it.
        footer["bytes"] = size + 16
        for _ in range(3):
            footer["bytes"] = size + 16 + len(json.dumps(footer).encode())
        encoded = json.dumps(footer).encode()
        whole.write(encoded + len(encoded).to_bytes(8, "little") + _MAGIC)
        whole.flush()
        os.fsync(whole.fileno())
        os.replace(self._parts[0], self._path)

    def __exit__(self, *error: object) -> None:
        for file, part in zip(self._files, self._parts, strict=True):
            file.close()
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_path(name: str) -> Iterator[Path]:
    """The path of a file of this name in the cache folder, which one process at a time may write.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = cache_folder() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in folder.glob(f"{name}.bin.*.tmp"):  # of a process that was killed
                stale.unlink(missing_ok=True)
            yield folder / f"{name}.bin"
    except OSError as error:
        raise DataError(
            f"{folder}: tokenised documents cannot be written: {error.strerror}; free some space, or name another "
            f"folder in ${VARIABLE}"
        ) from error
