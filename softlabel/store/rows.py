"""Random access to rows that lie in several arrays: the shards of a store, end to end.

N rows in all, B rows asked for, W elements in one row.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from softlabel.store.columns import Array

_FEW = 12  # arrays hit by one batch, up to which a gather from each beats copying row by row


class Parts:
    """Arrays (n, W) of one dtype that together hold N rows; `take` gathers (B, W)."""

    def __init__(self, parts: Sequence[Array]) -> None:
        # Plain arrays: indexing a memmap costs a few microseconds more.
        kept = [np.asarray(part) for part in parts if len(part)] or list(parts[:1])
        self._parts = kept
        self._starts = np.array(list(itertools.accumulate((len(part) for part in kept), initial=0)), np.int64)
        self._bytes: list[memoryview] | None = None

    def take(self, rows_B: npt.NDArray[np.int64]) -> Array:
        first = self._parts[0]
        if len(self._parts) == 1:
            return first[rows_B]
        part_B = np.searchsorted(self._starts, rows_B, side="right") - 1
        hit = np.unique(part_B)
        out = np.empty((len(rows_B), *first.shape[1:]), first.dtype)
        if len(hit) <= max(_FEW, len(rows_B) // 64):
            for part in hit.tolist():
                mine = np.flatnonzero(part_B == part)
                out[mine] = self._parts[part][rows_B[mine] - self._starts[part]]
        elif out.size:
            self._copy(out, part_B, rows_B - self._starts[part_B])
        return out

    def _copy(self, out: Array, part_B: npt.NDArray[np.int64], within_B: npt.NDArray[np.int64]) -> None:
        if self._bytes is None:
            self._bytes = [memoryview(part.data).cast("B") for part in self._parts]
        sources, target = self._bytes, memoryview(out.data).cast("B")
        size, position = out.nbytes // len(out), 0
        for part, within in zip(part_B.tolist(), (within_B * size).tolist(), strict=True):
            target[position : position + size] = sources[part][within : within + size]
            position += size
