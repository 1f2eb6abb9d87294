"""Random numbers of views: a pure function of (seed, key, view), independent of order.

Legend: B samples, K numbers for each.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from softlabel.common.random import draw_bits

U64 = NDArray[np.uint64]


def draw(keys: Sequence[str], *, seed: int, view: int) -> U64:
    """Return 64 random bits for each of B keys: uint64 (B,)."""
    stream = xxhash.xxh3_64_intdigest(b"softlabel view %d %d" % (seed, view))
    words = (xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"), seed=stream) for key in keys)
    return np.fromiter(words, dtype=np.uint64, count=len(keys))


def uniforms(words_B: U64, first: int, count: int) -> NDArray[np.float64]:
    """Return the same numbers scaled to [0, 1): float64 (B, K)."""
    return (draw_bits(words_B, first, count) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)
