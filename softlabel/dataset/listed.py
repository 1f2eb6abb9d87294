"""What the sources share that hold all their keys in memory, or number their samples."""

import numpy as np
import pyarrow as pa

from softlabel.common.keys import Keys
from softlabel.dataset.base import Source, span


class ListedSource(Source):
    """Keys are `_keys`, an Arrow array of large_string, or the decimal row numbers where it is None."""

    _keys: pa.Array | None = None

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        if self._keys is None:
            return [str(row) for row in range(start, stop)]
        keys: list[str] = self._keys.slice(start, stop - start).to_pylist()
        return keys

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        start, stop = span(start, stop, len(self))
        if self._keys is None:
            return Keys.of(pa.array(np.arange(start, stop)))
        return Keys.of(self._keys.slice(start, stop - start))

    def key_at(self, row: int) -> str:
        """The key of one sample."""
        return str(row) if self._keys is None else str(self._keys[row])
