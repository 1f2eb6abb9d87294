"""One pass over a shard file that hashes every byte and looks at its logits while they are in the processor's cache:
checking a store then costs little more than reading it.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from softlabel.store.columns import Array, Column

_BLOCK = 1 << 20  # bytes; still in the cache when they are looked at, and few enough calls for several threads
_MAPPED = 32 << 20  # pages are let go of after so many bytes, so that a large file does not count as our memory


def hash_and_scan(
    path: Path,
    extents: Iterable[tuple[int, int]],
    column: Column,
    members: int,
    is_clean: Callable[[Array], bool],
) -> tuple[str, bool]:
    """(xxh3-128 of the file, whether all rows in the extents are as they must be).

    extents: (offset, rows) in rising order, where the file holds whole rows of the column back to back; a row holds
    those of `members` teachers, of which `is_clean` takes one each. What lies outside of the file or out of order is
    not as it must be.
    """
    row_bytes, width = column.row_bytes, column.width // members
    digest, clean, position, forgotten = xxhash.xxh3_128(), True, 0, 0
    scratch = np.empty(max(_BLOCK, row_bytes), np.uint8)
    with open(path, "rb", buffering=0) as file:
        if not (size := os.fstat(file.fileno()).st_size):
            return digest.hexdigest(), not any(rows for _, rows in extents)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data: Any = np.frombuffer(mapped, np.uint8)
    for start, stop in _iter_pieces(extents, row_bytes, size):
        if start < position or stop > size:
            clean = False
            continue
        digest.update(data[position:stop])
        if clean and start < stop:
            rows: Any = data[start:stop]
            if start % column.numpy.itemsize:  # numpy is many times slower on numbers that straddle
                rows = scratch[: stop - start]
                np.copyto(rows, data[start:stop])
            clean = is_clean(rows.view(column.numpy).reshape(-1, width))
        position = stop
        if position - forgotten > _MAPPED and hasattr(mmap, "MADV_DONTNEED"):
            whole = position // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, forgotten, whole - forgotten)
            forgotten = whole
    return digest.hexdigest(), clean


def _iter_pieces(extents: Iterable[tuple[int, int]], row_bytes: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that fit the cache; what lies between them, and at the end, ends in an empty piece."""
    step, done = max(1, _BLOCK // row_bytes), 0
    for offset, rows in [*extents, (size, 0)]:
        yield from ((end, end) for end in range(done + _MAPPED, offset, _MAPPED))
        for first in range(0, rows, step):
            yield offset + first * row_bytes, offset + min(first + step, rows) * row_bytes
        done = offset + rows * row_bytes
    yield size, size
