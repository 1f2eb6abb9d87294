"""Seeds of the random draws of encoding `sampled`: they follow from what a row is, never from its place in a batch.

B rows, P labelled positions of them, M members, R = B * M or P * M.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel.common.hashing import Hasher
from softlabel.common.keys import Keys

I64 = NDArray[np.int64]
_MEMBER_BITS = 16  # the members of a position have consecutive seeds below the next position's


def make_row_seeds(
    keys: Keys, view: int, *, seed: int, members: Sequence[int], spots: tuple[I64, I64] | None = None
) -> I64:
    """Return a seed for each row, or labelled position, and member: a function of (seed, key, view, position, member).

    Args:
        keys: of B rows.
        view: the rows' view.
        seed: of the run's views.
        members: numbers of the M members that are drawn, 0 for the first or for a combination of all.
        spots: for documents, the number of labelled positions of each row, (B,), and which of the document's positions
            each is, (P,). None: rows have no positions.

    Returns:
        int64 (R,), members innermost.
    """
    hashes = Hasher(seed)(keys, view).view(np.int64)
    if spots is not None:
        counts_B, places_P = spots
        hashes = np.repeat(hashes, counts_B) + (places_P << _MEMBER_BITS)
    return (hashes[:, None] + np.asarray(members, np.int64)).reshape(-1)
