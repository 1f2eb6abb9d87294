"""The documents of a store as data: what it holds the tokens of needs no other file. Legend: N documents."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels
from softlabel.dataset.source import Source, span
from softlabel.inputs.base import IGNORE, Sample, TokenIds
from softlabel.inputs.tokens import TOKENS as DOCUMENTS
from softlabel.store.reader import Store
from softlabel.store.token_rows import MASK, TOKENS


class StoredDocuments(Source):
    """Some rows of a store of tokens.

    Args:
        store: open.
        rows_N: numbers of the rows, int64; None: all.
    """

    kind, inputs = "store", DOCUMENTS
    lengths: NDArray[np.int32]

    def __init__(self, store: Store, rows_N: NDArray[np.int64] | None = None) -> None:
        self.name, self.store = store.url, store
        self._rows_N = np.arange(len(store)) if rows_N is None else rows_N
        self._keys = store.keys if rows_N is None else store.keys.take(rows_N)
        self.lengths = np.diff(store.spans.offsets["token"])[self._rows_N].astype(np.int32)

    def __len__(self) -> int:
        return len(self._rows_N)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.key_table(start, stop).to_list()

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        start, stop = span(start, stop, len(self))
        return self._keys.slice(start, stop)

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        return np.full(stop - start, IGNORE, dtype=np.int64)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows = self._rows_N[np.asarray(indices, np.int64)]
        if not len(rows):
            return []
        found = self.store.take(rows, ["key", TOKENS, MASK])
        ends = np.cumsum(found.lengths)[:-1]
        ids = np.split(found.columns[TOKENS].reshape(-1).astype(np.int32), ends)
        masks = np.split(found.columns[MASK].reshape(-1).astype(np.uint8), ends)
        return [
            Sample(key=key, raw=TokenIds(ids=one, mask=mask))
            for key, one, mask in zip(found.keys, ids, masks, strict=True)
        ]
