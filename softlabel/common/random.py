"""Deterministic random numbers: hashes of integers, the same in every process.

Legend: B words, K numbers of each.
"""

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_U64 = (1 << 64) - 1


def mix64(values: UInt64s) -> UInt64s:
    """Hash uint64 numbers of any shape with the finaliser of SplitMix64, a bijection."""
    mixed = values.copy()
    mix64_in_place(mixed, np.empty_like(mixed))
    return mixed


def mix64_in_place(values: UInt64s, spare: UInt64s) -> None:
    """Apply `mix64` in place, with `spare` as scratch memory of the same shape."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.bitwise_xor(values, np.right_shift(values, np.uint64(shift), out=spare), out=values)
        np.multiply(values, np.uint64(factor), out=values)
    np.bitwise_xor(values, np.right_shift(values, np.uint64(31), out=spare), out=values)


def draw_bits(words_B: UInt64s, first: int, count: int) -> UInt64s:
    """Return numbers `first` to `first + count` of the stream of SplitMix64 that each word seeds: uint64 (B, K)."""
    places_K = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(_GOLDEN)  # modulo 2^64
    return mix64(words_B[:, None] + places_K)


def stream_key(*parts: int) -> np.uint64:
    """Hash integers (for example a seed, an epoch, a round) into one uint64 key."""
    key = 0
    for part in parts:
        # mix64 on a Python integer: numpy scalars are slow, and a batch needs a dozen keys.
        key = ((key ^ (part & _U64)) + _GOLDEN) & _U64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _U64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _U64
        key ^= key >> 31
    return np.uint64(key)
