"""Random access to rows that lie in several arrays: the shards of a store, end to end.

N rows in all, B rows asked for, W elements in one row.
"""

import contextlib
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

    Why this is safe. The span begins at the lowest address of a part and ends behind the highest byte of one. It also
    covers memory between the parts that is not theirs. Row r of part p lies at offsets[p] + (r - starts[p]) * row_bytes
    and ends row_bytes later: inside p, because `take` refuses rows outside 0 to N - 1, `searchsorted` gives the p with
    starts[p] <= r < starts[p + 1], and a part is contiguous. So only bytes of parts are read, `take` copies them, and
    the parts are kept alive as long as the span. Nothing is ever written through it.

    Args:
        parts: at least one; rows are numbered through all of them.
        spanning: False gathers from each part by itself, as is done where no array can span them.
    """

    def __init__(self, parts: Sequence[Array], *, spanning: bool = True) -> None:
        # Kept alive here: what is addressed below lies in them.
        self._parts = [np.ascontiguousarray(part) for part in parts if len(part)] or [np.ascontiguousarray(parts[0])]
        self._starts = np.array(list(itertools.accumulate((len(part) for part in self._parts), initial=0)), np.int64)
        first = self._parts[0]
        self._row_bytes = first.dtype.itemsize * int(np.prod(first.shape[1:]))
        self._span: npt.NDArray[Any] | None = None
        if spanning and len(self._parts) > 1:
            with contextlib.suppress(OverflowError, ValueError):  # parts further apart than an array can be long
                self._span = self._span_parts()

    def _span_parts(self) -> npt.NDArray[Any]:
        addresses = np.array([part.__array_interface__["data"][0] for part in self._parts], np.int64)
        base = int(addresses.min())
        end = max(int(address) + part.nbytes for address, part in zip(addresses, self._parts, strict=True))
        memory: Any = (ctypes.c_char * (end - base)).from_address(base)
        row = np.dtype((np.void, self._row_bytes))
        self._offsets = addresses - base
        return np.ndarray((end - base - self._row_bytes + 1,), row, memory, strides=(1,))

    def take(self, rows_B: npt.NDArray[np.int64]) -> Array:
        """(B, W), a copy. `rows_B` int64 must lie in 0 to N - 1."""
        first = self._parts[0]
        if len(self._parts) == 1:
            return first[rows_B]
        if len(rows_B) and not 0 <= rows_B.min() <= rows_B.max() < self._starts[-1]:  # never outside the arrays
            raise IndexError(f"rows {rows_B.min()} to {rows_B.max()} of {self._starts[-1]}")
        part_B = np.searchsorted(self._starts, rows_B, side="right") - 1
        if self._span is None:
            order_B = np.argsort(part_B, kind="stable")
            cuts = np.searchsorted(part_B[order_B], np.arange(1, len(self._parts)))
            places = np.split((rows_B - self._starts[part_B])[order_B], cuts)
            found = np.empty((len(rows_B), *first.shape[1:]), first.dtype)
            found[order_B] = np.concatenate([part[one] for part, one in zip(self._parts, places, strict=True)])
            return found
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
