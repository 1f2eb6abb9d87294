"""Random access to rows in several arrays, the shards of a store. N rows in all, B rows requested, W elements a row."""

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
    """Arrays (n, W) of one dtype that together hold N rows; `take` gathers (B, W) from all of them at once.

    numpy gathers from one array only, and a gather from each of many small ones is several times slower. So one array
    spans all parts, and rows are addressed by their offset in it.

    Why this is safe: the span starts at the lowest address of a part and ends after the highest byte of one. It covers
    memory between the parts that does not belong to them. Row r of part p lies at offsets[p] + (r - starts[p]) *
    row_bytes and ends row_bytes later: inside p, because `take` refuses rows outside 0 to N - 1, `searchsorted` gives
    the p with starts[p] <= r < starts[p + 1], and a part is contiguous. So only bytes of parts are read, `take` copies
    them, and the parts live as long as the span. Nothing is written through it.

    Args:
        parts: at least one; rows are numbered across all of them.
        spanning: False gathers from each part separately, as if no array could span them.
    """

    def __init__(self, parts: Sequence[Array], *, spanning: bool = True) -> None:
        # Referenced here, because the span does not keep them alive.
        self._parts = [np.ascontiguousarray(part) for part in parts if len(part)] or [np.ascontiguousarray(parts[0])]
        self._starts = np.array(list(itertools.accumulate((len(part) for part in self._parts), initial=0)), np.int64)
        first = self._parts[0]
        self._row_bytes = first.dtype.itemsize * int(np.prod(first.shape[1:]))
        self._span: npt.NDArray[Any] | None = None
        if spanning and len(self._parts) > 1:
            with contextlib.suppress(OverflowError, ValueError):  # the parts are too far apart for one array
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
        """Gather rows int64 (B,), 0 to N - 1, into a new array (B, W)."""
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

    def take_ranges(self, starts_B: npt.NDArray[np.int64], stops_B: npt.NDArray[np.int64]) -> Array:
        """Copy the rows `starts_B[i]` to `stops_B[i]`, each within one part, one range after another, into a new array.

        Ranges that follow each other are copied at once; a slice is copied faster than its rows are gathered.
        """
        first = self._parts[0]
        if not len(starts_B):
            return first[:0].copy()
        part_B = np.minimum(np.searchsorted(self._starts, starts_B, side="right") - 1, len(self._parts) - 1)
        begins_B = np.ones(len(starts_B), np.bool_)
        begins_B[1:] = (starts_B[1:] != stops_B[:-1]) | (part_B[1:] != part_B[:-1])
        begins = np.flatnonzero(begins_B)
        parts = part_B[begins]
        bases = self._starts[parts]
        stops = stops_B[np.append(begins[1:] - 1, len(stops_B) - 1)] - bases
        runs = zip(parts.tolist(), (starts_B[begins] - bases).tolist(), stops.tolist(), strict=True)
        return np.concatenate([self._parts[part][start:stop] for part, start, stop in runs])


def row_numbers(rows: Any, count: int, *, where: str) -> npt.NDArray[np.int64]:
    """Return a caller's row numbers as int64 (B,).

    Raises:
        UsageError: they are not integers in one dimension, or one is not in 0 to count - 1.
    """
    try:
        found = np.asarray(rows)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{where}: rows: expected integers (B,), found {type(rows).__name__}: {error}") from None
    if found.ndim > 1 or (found.size and found.dtype.kind not in "iu"):
        remedy = "; numpy.flatnonzero turns a mask into row numbers" if found.dtype.kind == "b" else ""
        raise UsageError(
            f"{where}: rows: expected integers (B,), found {found.dtype} of shape {found.shape}; pass the result of "
            f"lookup{remedy}"
        )
    if found.size and (found.min() < 0 or found.max() >= count):
        wrong = found.min() if found.min() < 0 else found.max()
        raise UsageError(f"{where}: row {wrong} is not one of its {count} rows")
    return found.reshape(-1).astype(np.int64, copy=False)
