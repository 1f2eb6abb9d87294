"""Arrays decoded once per machine, in files that every process maps.

An entry is two files: NAME.bin, the array's bytes, and NAME.json, their length and XXH3-128, written last. NAME.whole
records the file status at which NAME.bin last had that hash. A lock keeps two processes from decoding a store twice.
"""

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from softlabel.common.cache_folder import VARIABLE, cache_folder
from softlabel.store.columns import Array
from softlabel.store.storage.base import TEMPORARY, file_xxh3, writing


class Append(Protocol):
    def __call__(self, name: str, data: Any) -> None: ...


class Cache:
    """The entries of one store, addressed by its content: a store that grew has other entries."""

    def __init__(self, content: str) -> None:
        self.folder = cache_folder() / content
        self._trusted: set[str] = set()

    def get(
        self, sizes: Mapping[str, int | None], build: Callable[[Append], None], *, check: bool = True
    ) -> dict[str, Array]:
        """Map entries; build all of them if one is absent or damaged.

        Args:
            sizes: name -> bytes, or None if known only after the build.
            build: called with `append(name, data)`; appends the bytes of every entry in order.
            check: hash the files first.

        Returns:
            Name -> read-only uint8 array.

        Raises:
            StoreError: the cache cannot be written.
        """
        found = self._open(sizes, check)
        if found is None:
            with writing(f"cache {self.folder} (set {VARIABLE} to another folder, or allow more memory)"):
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._lock():
                    found = self._open(sizes, check)  # another process may have built it meanwhile
                    if found is None:
                        self._build(list(sizes), build)
                        found = self._open(sizes, False)
        assert found is not None, f"{self.folder}: what was just built has another size"
        return found

    def _open(self, sizes: Mapping[str, int | None], check: bool) -> dict[str, Array] | None:
        arrays = {}
        for name, size in sizes.items():
            path = self.folder / f"{name}.bin"
            try:
                entry = json.loads((self.folder / f"{name}.json").read_bytes())
                length = path.stat().st_size
                if not isinstance(entry, dict) or entry.get("bytes") != length or (size is not None and size != length):
                    return None
                if check and name not in self._trusted and not self._is_intact(name, path, entry.get("xxh3")):
                    return None
                arrays[name] = _map_file(path, length)
            except (OSError, ValueError):
                return None
            self._trusted.add(name)
        return arrays

    def _is_intact(self, name: str, path: Path, xxh3: object) -> bool:
        """Whether the file has its recorded hash; it is hashed only if it changed since the last check."""
        status = os.stat(path)  # before reading, so that a change meanwhile is detected next time
        stamp = [xxh3, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        note = self.folder / f"{name}.whole"
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_bytes()) == stamp:
                return True
        if file_xxh3(path) != xxh3:
            return False
        with contextlib.suppress(OSError):  # without the note the file is hashed again
            temporary = self.folder / f"{TEMPORARY}{name}-whole-{os.getpid()}"
            temporary.write_text(json.dumps(stamp))
            os.replace(temporary, note)
        return True

    def _build(self, names: list[str], build: Callable[[Append], None]) -> None:
        with contextlib.ExitStack() as stack:
            parts = {name: self.folder / f"{TEMPORARY}{name}-{os.getpid()}" for name in names}
            for part in parts.values():
                stack.callback(part.unlink, missing_ok=True)
            files = {name: stack.enter_context(open(part, "wb", buffering=0)) for name, part in parts.items()}
            hashes = {name: xxhash.xxh3_128() for name in names}
            lengths = dict.fromkeys(names, 0)

            def append(name: str, data: Any) -> None:
                view = memoryview(np.ascontiguousarray(data).data).cast("B") if np.size(data) else memoryview(b"")
                hashes[name].update(view)
                lengths[name] += len(view)
                while view:
                    view = view[files[name].write(view) :]

            build(append)
            for name, part in parts.items():
                os.fsync(files[name].fileno())
                (self.folder / f"{name}.json").unlink(missing_ok=True)
                os.replace(part, self.folder / f"{name}.bin")
                entry = {"bytes": lengths[name], "xxh3": hashes[name].hexdigest()}
                part.write_text(json.dumps(entry))
                os.replace(part, self.folder / f"{name}.json")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with contextlib.suppress(OSError):  # without locks two processes may build the same entry
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _map_file(path: Path, length: int) -> Array:
    if not length:
        return np.zeros(0, np.uint8)
    array = np.memmap(path, np.uint8, "r")
    if hasattr(mmap, "MADV_RANDOM") and (source := getattr(array, "_mmap", None)) is not None:
        source.madvise(mmap.MADV_RANDOM)
    return array
