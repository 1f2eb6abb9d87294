"""Vectorised, exact lookup of rows by key. N rows of the store, Q requested keys.

The index is the sorted 64-bit hashes of (key, view) with their rows: 12 bytes per row (16 from 2**31 rows on). The
bytes of the key are compared after the hash, so a collision cannot return the row of another key.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from softlabel.common.hashing import CHUNK, I64, MASKS, Hasher, with_words, words_of
from softlabel.common.keys import Keys
from softlabel.errors import StoreCorruptError


def equal_keys(one: Keys, rows: I64, other: Keys, picks: I64) -> npt.NDArray[np.bool_]:
    """Return bool (Q,), whether one[rows[i]] and other[picks[i]] have the same bytes."""
    starts, other_starts = one.offsets_N1[rows], other.offsets_N1[picks]
    lengths = one.offsets_N1[rows + 1] - starts
    same = np.asarray(lengths == other.offsets_N1[picks + 1] - other_starts)
    words, other_words = words_of(one), words_of(other)
    active = np.flatnonzero(same & (lengths > 0))
    step = 0
    while len(active):
        left = lengths[active] - 8 * step
        mask = MASKS[np.minimum(left, 8) - 1]
        a, b = words[starts[active] + 8 * step], other_words[other_starts[active] + 8 * step]
        equal = (a ^ b) & mask == 0
        same[active[~equal]] = False
        active = active[equal & (left > 8)]
        step += 1
    return same


def equal_runs(one: Keys, rows: I64, other: Keys, picks: I64) -> npt.NDArray[np.bool_]:
    """Like `equal_keys` for rising rows and picks, mostly consecutive: these are compared as blocks of memory."""
    same = np.empty(len(rows), np.bool_)
    for start in range(0, len(rows), CHUNK):
        stop = min(start + CHUNK, len(rows))
        a, b = (int(rows[start]), int(rows[stop - 1]) + 1), (int(picks[start]), int(picks[stop - 1]) + 1)
        side_by_side = a[1] - a[0] == b[1] - b[0] == stop - start
        if side_by_side and _equal_tables(one.slice(*a), other.slice(*b)):
            same[start:stop] = True
        else:
            other = with_words(other)
            same[start:stop] = equal_keys(one, rows[start:stop], other, picks[start:stop])
    return same


def rows_in_order(asked: Keys, keys: Keys, rows_N: I64, bad: Sequence[int]) -> I64:
    """Look up keys by their position in the dataset.

    Args:
        asked: Q keys.
        keys: the store's key table.
        rows_N: int64, one view's rows of the key table, in the order of the dataset.
        bad: positions of samples without a row.

    Returns:
        int64 (Q,): the row of each key that has the same position as when it was labelled, else -1.
    """
    found_Q = np.full(len(asked), -1, np.int64)
    is_bad = np.isin(np.arange(len(rows_N) + len(bad)), bad)
    labelled = np.flatnonzero(~is_bad)[: len(rows_N)]
    places = labelled[labelled < len(asked)]
    rows_N = rows_N[: len(places)]
    same = equal_runs(keys, rows_N, asked, places)
    found_Q[places[same]] = rows_N[same]
    return found_Q


def _equal_tables(one: Keys, other: Keys) -> bool:
    return np.array_equal(one.offsets_N1, other.offsets_N1) and np.array_equal(one.data, other.data)


class KeyIndex:
    """Rows by (key, view).

    Raises:
        StoreCorruptError: the store holds a (key, view) twice.
    """

    def __init__(self, keys: Keys, views_N: npt.NDArray[np.int32], *, where: str, hasher: Hasher | None = None) -> None:
        self._keys = keys = with_words(keys)
        self._hasher = hasher or Hasher()
        hashes_N = self._hasher(keys, views_N)
        order_N = np.argsort(hashes_N)
        self._hashes_N = hashes_N[order_N]
        self._rows_N = order_N.astype(np.int32) if len(keys) < 2**31 else order_N
        self._check_unique(views_N, where)

    def _check_unique(self, views_N: npt.NDArray[np.int32], where: str) -> None:
        twins = np.flatnonzero(self._hashes_N[1:] == self._hashes_N[:-1])
        first, second = self._rows_N[twins].astype(np.int64), self._rows_N[twins + 1].astype(np.int64)
        same = equal_keys(self._keys, first, self._keys, second) & (views_N[first] == views_N[second])
        if same.any():
            key = self._keys[int(first[same.argmax()])]
            raise StoreCorruptError(f"{where}: key {key[:80]!r} occurs twice in view {views_N[first[same.argmax()]]}")

    @property
    def nbytes(self) -> int:
        return self._hashes_N.nbytes + self._rows_N.nbytes

    def __call__(self, asked: Keys, view: int, views_N: npt.NDArray[np.int32]) -> I64:
        """Return the rows of Q keys in a view, int64 (Q,), -1 for a key without a row."""
        asked = with_words(asked)
        found_Q = np.full(len(asked), -1, np.int64)
        if not len(self._keys) or not len(asked):
            return found_Q
        hashes_Q = self._hasher(asked, view)
        open_Q = np.argsort(hashes_Q)  # rising order: the search walks the index once
        place_Q = np.searchsorted(self._hashes_N, hashes_Q[open_Q])
        while True:  # a further round only after a collision, with the next row of the same hash
            inside = place_Q < len(self._hashes_N)
            open_Q, place_Q = open_Q[inside], place_Q[inside]
            match = self._hashes_N[place_Q] == hashes_Q[open_Q]
            open_Q, place_Q = open_Q[match], place_Q[match]
            if not len(open_Q):
                return found_Q
            rows = self._rows_N[place_Q].astype(np.int64)
            same = equal_keys(self._keys, rows, asked, open_Q) & (views_N[rows] == view)
            found_Q[open_Q[same]] = rows[same]
            open_Q, place_Q = open_Q[~same], place_Q[~same] + 1
