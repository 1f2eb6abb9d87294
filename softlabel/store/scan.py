"""One pass over a shard file that hashes every byte and looks at its float16 logits while they are in the processor's
cache: checking a store then costs little more than reading it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from softlabel.store.decode import float16_clean

_BLOCK = 512 << 10  # bytes; stays in the second level cache between hashing and looking


def scan(path: Path, extents: Iterable[tuple[int, int]], row_bytes: int, members: int) -> tuple[str, bool]:
    """(xxh3-128 of the file, whether all logits in the extents are as they must be).

    extents: (offset, rows) in rising order, where the file holds whole rows of float16 logits back to back; a row holds
    those of `members` teachers.
    """
    digest, clean, position = xxhash.xxh3_128(), True, 0
    step = max(1, _BLOCK // row_bytes)
    buffer = np.empty(max(_BLOCK, row_bytes), np.uint8)  # aligned, wherever the rows lie in the file
    with open(path, "rb", buffering=0) as file:

        def pull(count: int) -> bool:
            """The next bytes into the buffer and the hash; whether there were that many."""
            view = buffer.data[:count]
            while view:
                if not (got := file.readinto(view)):
                    return False
                digest.update(view[:got])
                view = view[got:]
            return True

        for offset, rows in extents:
            if offset < position or rows < 0:
                clean = False
                break
            for count in _steps(offset - position, len(buffer)):
                clean = pull(count) and clean
            for count in _steps(rows, step):
                clean = pull(count * row_bytes) and clean
                logits: Any = buffer[: count * row_bytes].view("<f2").reshape(count * members, -1)
                clean = clean and float16_clean(logits)
            position = offset + rows * row_bytes
        while pull(len(buffer)):
            pass
    return digest.hexdigest(), clean


def _steps(total: int, step: int) -> Iterator[int]:
    """`total` in pieces of at most `step`."""
    for start in range(0, total, step):
        yield min(step, total - start)
