"""From keys to rows, a million at a time and never to a wrong one.

N rows of the store, Q keys asked for. The index is the sorted 64-bit hashes of (key, view) and the row of each:
12 bytes a row (16 from 2**31 rows on). A hash only proposes and the key's bytes decide, so that a collision cannot
return the row of another key.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel.errors import StoreCorruptError
from softlabel.store.keys import Keys

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_K1 = np.uint64(0x9E3779B97F4A7C15)
_K2 = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)
_CHUNK = 1 << 12  # rows hashed at once: the working set stays in the processor's cache
_MASKS = np.array([(1 << (8 * size)) - 1 for size in range(1, 9)], np.uint64)  # of a word with 1 to 8 bytes left


def word_view(padded: npt.NDArray[np.uint8]) -> U64:
    """words[i] is the little-endian word at byte i, of data with 8 bytes of padding."""
    return np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))


def _words(keys: Keys) -> U64:
    return word_view(np.concatenate([keys.data, np.zeros(8, np.uint8)])) if keys.words is None else keys.words


def with_words(keys: Keys) -> Keys:
    """The same keys, padded once for many lookups."""
    if keys.words is not None:
        return keys
    words = _words(keys)
    padded = np.asarray(words.base)
    return Keys(keys.offsets_N1, padded[: len(keys.data)], words)


def _mix(state: U64, spare: U64) -> None:
    """In place: memory that is taken anew costs more than the arithmetic."""
    np.multiply(state, _K2, out=state)
    np.right_shift(state, _SHIFT, out=spare)
    np.bitwise_xor(state, spare, out=state)


class Hasher:
    """Hashes of (key, view); seeded, so that nobody can prepare keys that collide."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = np.uint64(secrets.randbits(64) if seed is None else seed)

    def __call__(self, keys: Keys, views: npt.NDArray[Any] | int) -> U64:
        """uint64 (N,)."""
        words = _words(keys)
        out = np.empty(len(keys), np.uint64)
        views_N = np.broadcast_to(np.asarray(views, np.int64).astype(np.uint64), (len(keys),))
        for start in range(0, len(keys), _CHUNK):
            stop = min(start + _CHUNK, len(keys))
            out[start:stop] = self._chunk(keys.offsets_N1[start : stop + 1], words, views_N[start:stop])
        return out

    def _chunk(self, offsets_N1: I64, words: U64, views_N: U64) -> U64:
        position_N, length_N = offsets_N1[:-1], np.diff(offsets_N1)
        state_N = (views_N + self.seed) * _K1 ^ length_N.astype(np.uint64)
        spare_N = np.empty_like(state_N)
        _mix(state_N, spare_N)
        longest = int(length_N.max(initial=0))
        whole = int(length_N.min(initial=longest)) // 8  # words that every key has
        if longest == length_N.min(initial=longest):  # then the words of all keys lie at equal distances
            for step in range(-(-longest // 8)):
                word_N = words[position_N[0] + 8 * step :: longest][: len(state_N)]
                if step == whole:
                    word_N = word_N & _MASKS[longest - 8 * whole - 1]
                np.bitwise_xor(state_N, word_N, out=state_N)
                _mix(state_N, spare_N)
        else:
            for step in range(whole):
                np.bitwise_xor(state_N, words[position_N + 8 * step], out=state_N)
                _mix(state_N, spare_N)
            active = np.flatnonzero(length_N > 8 * whole)
            for step in range(whole, -(-longest // 8)):
                left = length_N[active] - 8 * step
                state = state_N[active] ^ words[position_N[active] + 8 * step] & _MASKS[np.minimum(left, 8) - 1]
                _mix(state, np.empty_like(state))
                state_N[active] = state
                active = active[left > 8]
        state_N ^= state_N >> np.uint64(29)
        _mix(state_N, spare_N)
        return state_N


def equal_keys(one: Keys, rows: I64, other: Keys, picks: I64) -> npt.NDArray[np.bool_]:
    """Whether one[rows[i]] and other[picks[i]] are the same bytes, for every i."""
    starts, other_starts = one.offsets_N1[rows], other.offsets_N1[picks]
    lengths = one.offsets_N1[rows + 1] - starts
    same = np.asarray(lengths == other.offsets_N1[picks + 1] - other_starts)
    words, other_words = _words(one), _words(other)
    active = np.flatnonzero(same & (lengths > 0))
    step = 0
    while len(active):
        left = lengths[active] - 8 * step
        mask = _MASKS[np.minimum(left, 8) - 1]
        a, b = words[starts[active] + 8 * step], other_words[other_starts[active] + 8 * step]
        equal = (a ^ b) & mask == 0
        same[active[~equal]] = False
        active = active[equal & (left > 8)]
        step += 1
    return same


def equal_runs(one: Keys, rows: I64, other: Keys, picks: I64) -> npt.NDArray[np.bool_]:
    """The same for rising rows and picks, of which most are neighbours: those are compared as blocks of memory."""
    same = np.empty(len(rows), np.bool_)
    for start in range(0, len(rows), _CHUNK):
        stop = min(start + _CHUNK, len(rows))
        a, b = (int(rows[start]), int(rows[stop - 1]) + 1), (int(picks[start]), int(picks[stop - 1]) + 1)
        side_by_side = a[1] - a[0] == b[1] - b[0] == stop - start
        if side_by_side and _equal_tables(one.slice(*a), other.slice(*b)):
            same[start:stop] = True
        else:
            other = with_words(other)
            same[start:stop] = equal_keys(one, rows[start:stop], other, picks[start:stop])
    return same


def rows_in_order(asked: Keys, keys: Keys, rows_N: I64, bad: Sequence[int]) -> I64:
    """int64 (Q,) rows of the keys that stand where they stood when they were labelled, -1 for the others.

    rows_N: one view's rows of the key table, in the order of the dataset. bad: its samples that have none.
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
    """Rows by (key, view). Raises StoreCorruptError when the store holds one (key, view) twice."""

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
        """int64 (Q,) rows, -1 where the store has no such row."""
        asked = with_words(asked)
        found_Q = np.full(len(asked), -1, np.int64)
        if not len(self._keys) or not len(asked):
            return found_Q
        hashes_Q = self._hasher(asked, view)
        open_Q = np.argsort(hashes_Q)  # rising order: the search walks the index once
        place_Q = np.searchsorted(self._hashes_N, hashes_Q[open_Q])
        while True:  # once, but for collisions: then the next row with the same hash is tried
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
