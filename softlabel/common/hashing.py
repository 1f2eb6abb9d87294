"""Vectorised 64-bit hashes of (key, view), and keys as 64-bit words. N keys."""

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

CHUNK = 1 << 12  # rows hashed at once: the working set stays in the processor's cache
_K1 = np.uint64(0x9E3779B97F4A7C15)
_K2 = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)
MASKS = np.array([(1 << (8 * size)) - 1 for size in range(1, 9)], np.uint64)  # of a word with 1 to 8 bytes left


def word_view(padded: npt.NDArray[np.uint8]) -> U64:
    """Return overlapping words uint64: words[i] is the little-endian word at byte i of data with 8 bytes of padding."""
    return np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))


def words_of(keys: Keys) -> U64:
    """Return the `word_view` of the key bytes; it copies them unless the keys have words already."""
    return word_view(np.concatenate([keys.data, np.zeros(8, np.uint8)])) if keys.words is None else keys.words


def with_words(keys: Keys) -> Keys:
    """Return the same keys with their words, padded once for many lookups."""
    if keys.words is not None:
        return keys
    words = words_of(keys)
    padded = np.asarray(words.base)
    return Keys(keys.offsets_N1, padded[: len(keys.data)], words)


def _mix(state: U64, spare: U64) -> None:
    """Mix in place: allocating memory costs more than the arithmetic."""
    np.multiply(state, _K2, out=state)
    np.right_shift(state, _SHIFT, out=spare)
    np.bitwise_xor(state, spare, out=state)


class Hasher:
    """Hashes of (key, view), randomly seeded so that keys cannot be crafted to collide."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = np.uint64(secrets.randbits(64) if seed is None else seed)

    def __call__(self, keys: Keys, views: npt.NDArray[Any] | int) -> U64:
        """Return uint64 (N,), the hash of each key with its view (int (N,) or one for all)."""
        words = words_of(keys)
        out = np.empty(len(keys), np.uint64)
        views_N = np.broadcast_to(np.asarray(views, np.int64).astype(np.uint64), (len(keys),))
        for start in range(0, len(keys), CHUNK):
            stop = min(start + CHUNK, len(keys))
            out[start:stop] = self._chunk(keys.offsets_N1[start : stop + 1], words, views_N[start:stop])
        return out

    def _chunk(self, offsets_N1: I64, words: U64, views_N: U64) -> U64:
        position_N, length_N = offsets_N1[:-1], np.diff(offsets_N1)
        state_N = (views_N + self.seed) * _K1 ^ length_N.astype(np.uint64)
        spare_N = np.empty_like(state_N)
        _mix(state_N, spare_N)
        longest = int(length_N.max(initial=0))
        whole = int(length_N.min(initial=longest)) // 8  # words that every key has
        if longest == length_N.min(initial=longest):  # equal lengths: the words of all keys lie at equal distances
            for step in range(-(-longest // 8)):
                word_N = words[position_N[0] + 8 * step :: longest][: len(state_N)]
                if step == whole:
                    word_N = word_N & MASKS[longest - 8 * whole - 1]
                np.bitwise_xor(state_N, word_N, out=state_N)
                _mix(state_N, spare_N)
        else:
            for step in range(whole):
                np.bitwise_xor(state_N, words[position_N + 8 * step], out=state_N)
                _mix(state_N, spare_N)
            active = np.flatnonzero(length_N > 8 * whole)
            for step in range(whole, -(-longest // 8)):
                left = length_N[active] - 8 * step
                state = state_N[active] ^ words[position_N[active] + 8 * step] & MASKS[np.minimum(left, 8) - 1]
                _mix(state, np.empty_like(state))
                state_N[active] = state
                active = active[left > 8]
        state_N ^= state_N >> np.uint64(29)
        _mix(state_N, spare_N)
        return state_N
