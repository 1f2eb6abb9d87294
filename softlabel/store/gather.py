"""Random access to rows that lie in several arrays: the shards of a store, end to end.

N rows in all, B rows asked for, W elements in one row.
"""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel.errors import UsageError
from softlabel.store.columns import Array


class Parts:
    """Arrays (n, W) of one dtype that together hold N rows; `take` gathers (B, W) in one sweep over all of them.

    numpy can gather from one array only, and a gather from each of many small ones is several times slower. So the rows
    are addressed by their distance in memory from the first array, as items of an array that spans all of them.
    """

    def __init__(self, parts: Sequence[Array]) -> None:
        # Kept alive here: what is addressed below lies in them.
        self._parts = [np.ascontiguousarray(part) for part in parts if len(part)] or [np.ascontiguousarray(parts[0])]
        self._starts = np.array(list(itertools.accumulate((len(part) for part in self._parts), initial=0)), np.int64)
        first = self._parts[0]
        self._row_bytes = first.dtype.itemsize * int(np.prod(first.shape[1:]))
        self._span: npt.NDArray[Any] | None = None
        if len(self._parts) > 1:
            addresses = np.array([part.__array_interface__["data"][0] for part in self._parts], np.int64)
            base = int(addresses.min())
            end = max(int(address) + part.nbytes for address, part in zip(addresses, self._parts, strict=True))
            memory: Any = (ctypes.c_char * (end - base)).from_address(base)
            row = np.dtype((np.void, self._row_bytes))
            self._span = np.ndarray((end - base - self._row_bytes + 1,), row, memory, strides=(1,))
            self._offsets = addresses - base

    def take(self, rows_B: npt.NDArray[np.int64]) -> Array:
        """(B, W), a copy. `rows_B` int64 must lie in 0 to N - 1."""
        first = self._parts[0]
        if self._span is None:
            return first[rows_B]
        if len(rows_B) and not 0 <= rows_B.min() <= rows_B.max() < self._starts[-1]:  # never outside the arrays
            raise IndexError(f"rows {rows_B.min()} to {rows_B.max()} of {self._starts[-1]}")
        part_B = np.searchsorted(self._starts, rows_B, side="right") - 1
        places_B = self._offsets[part_B] + (rows_B - self._starts[part_B]) * self._row_bytes
        return self._span[places_B].view(first.dtype).reshape(len(rows_B), *first.shape[1:])


def row_numbers(rows: Any, count: int, *, where: str) -> npt.NDArray[np.int64]:
    """Rows as somebody gave them, int64 (B,).

    Raises:
        UsageError: they are not integers in one dimension, or one is not among 0 to count - 1.
    """
    try:
        found = np.asarray(rows)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{where}: rows: expected integers (B,), found {type(rows).__name__}: {error}") from None
    if found.ndim > 1 or (found.size and found.dtype.kind not in "iu"):
        remedy = "; numpy.flatnonzero makes row numbers of a mask" if found.dtype.kind == "b" else ""
        raise UsageError(
            f"{where}: rows: expected integers (B,), found {found.dtype} of shape {found.shape}; give what lookup "
            f"returns{remedy}"
        )
    if found.size and (found.min() < 0 or found.max() >= count):
        wrong = found.min() if found.min() < 0 else found.max()
        raise UsageError(f"{where}: row {wrong} is not one of its {count} rows")
    return found.reshape(-1).astype(np.int64, copy=False)
