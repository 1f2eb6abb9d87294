"""The shards of a store as one sequence of N rows: open those that hold a range, and read it block by block."""

from collections.abc import Iterator, Sequence

import numpy as np

from softlabel.errors import StoreCorruptError
from softlabel.store.formats.base import OpenShard, ShardRows
from softlabel.store.formats.registry import open_shard
from softlabel.store.manifest import Run, ShardRecord
from softlabel.store.storage.base import Folder


class ShardFiles:
    """The files of the records, in row order.

    Attributes:
        starts: int64 (number of records + 1,), the first row of each, and N.
    """

    def __init__(self, folder: Folder, run: Run, records: Sequence[ShardRecord]) -> None:
        self._folder, self._run, self._records = folder, run, records
        self.starts = np.concatenate([[0], np.cumsum([record.rows for record in records], dtype=np.int64)])

    def open(self, start: int, stop: int) -> Iterator[tuple[int, OpenShard]]:
        """Yield (first row, open shard) of the shards that hold rows `start` to `stop`.

        Raises:
            StoreCorruptError: a shard is missing or not the planned one.
        """
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for number in range(max(0, first), len(self._records)):
            base = int(self.starts[number])
            if base >= stop:
                return
            if self._records[number].rows:
                shard = self._open(self._records[number])
                try:
                    yield base, shard
                finally:
                    shard.close()

    def read(self, names: Sequence[str], start: int, stop: int) -> Iterator[tuple[range, int, ShardRows]]:
        """Yield (rows, view, columns) of each block of rows `start` to `stop`."""
        for base, shard in self.open(start, stop):
            for first, last in shard.blocks(names):
                first, last = max(first, start - base), min(last, stop - base)
                if first < last:
                    yield range(base + first, base + last), shard.identity.view, shard.read(names, first, last)

    def _open(self, record: ShardRecord) -> OpenShard:
        path = self._folder.where(record.file)
        try:
            with self._folder.local(record.file) as local:
                shard = open_shard(local, self._run.format)
        except FileNotFoundError:
            raise StoreCorruptError(f"{path}: missing; run 'softlabel repair {self._folder}' to relabel it") from None
        plan = self._run.shard(record.number)
        if not shard.identity.belongs(self._run, plan) or shard.identity.rows != record.rows:
            shard.close()
            raise StoreCorruptError(
                f"{path}: a shard of another run or range; run 'softlabel repair {self._folder}' to relabel it"
            )
        return shard
