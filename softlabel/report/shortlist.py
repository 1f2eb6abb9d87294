"""The few rows of many with the lowest score, kept while all of them go by.

Legend: B rows of a batch, K rows that are kept.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Shortlist:
    """The rows with the lowest score; of equal ones those with the lowest number. Their order of arrival is no matter.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[str, NDArray[Any]] = {}

    def add(self, score_B: NDArray[np.floating[Any]], number_B: NDArray[np.int64], **values: NDArray[Any]) -> None:
        """Take in rows.

        Args:
            score_B: float (B,).
            number_B: int64 (B,), another one for each row.
            values: what is kept of a row beside these, (B,) or (B, ...).
        """
        new = {"score": score_B, "number": number_B, **values}
        if self._kept:
            new = {name: np.concatenate([self._kept[name], array]) for name, array in new.items()}
        first = np.lexsort((new["number"], new["score"]))[: self.size]
        self._kept = {name: array[first] for name, array in new.items()}

    @property
    def rows(self) -> Mapping[str, NDArray[Any]]:
        """The kept rows, the lowest score first: `score`, `number` and what was added with them, (K, ...); empty
        without any row."""
        return self._kept
