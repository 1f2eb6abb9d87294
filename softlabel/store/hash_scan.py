"""Hash a shard file and check its logits in one pass, while they are in the processor's cache."""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from softlabel.store.columns import Array, Column

_BLOCK = 1 << 20  # bytes: fits the cache, and keeps the number of calls low for several threads
_MAPPED = 32 << 20  # bytes after which pages are released, to bound resident memory


def hash_and_scan(
    path: Path, extents: Iterable[tuple[int, int]], column: Column, members: int, is_clean: Callable[[Array], bool]
) -> tuple[str, bool]:
    """Hash a file and check one of its columns.

    Args:
        path: the file.
        extents: (offset, rows) in rising order, where the file holds contiguous rows of the column.
        column: the column.
        members: teachers per row.
        is_clean: whether rows of one teacher each are valid.

    Returns:
        (xxh3-128 of the file, whether all rows are valid and all extents lie in the file in order).
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
    """Yield (start, stop) of rows that fit the cache, and empty pieces at the ends of the gaps between them."""
    step, done = max(1, _BLOCK // row_bytes), 0
    for offset, rows in [*extents, (size, 0)]:
        yield from ((end, end) for end in range(done + _MAPPED, offset, _MAPPED))
        for first in range(0, rows, step):
            yield offset + first * row_bytes, offset + min(first + step, rows) * row_bytes
        done = offset + rows * row_bytes
    yield size, size
